"""A random Stable Diffusion 3 pipeline that is real in every part and runs in milliseconds."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny import tiny_tokenizer, tiny_vae, vocabulary
from transformers import CLIPTextConfig, CLIPTextModelWithProjection


def tiny_sd3(*, seed: int = 0, **components) -> StableDiffusion3Pipeline:
    """With 8x8x4 latents and 32x32 images, and no T5; `components` replace its parts (`transformer=...`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "vae": tiny_vae(),
            "text_encoder": tiny_clip(16),
            "tokenizer": tiny_tokenizer(),
            "text_encoder_2": tiny_clip(24),
            "tokenizer_2": tiny_tokenizer(),
            "text_encoder_3": None,
            "tokenizer_3": None,
            "transformer": tiny_sd3_transformer(),
            "scheduler": FlowMatchEulerDiscreteScheduler(),
        }
    parts["vae"].register_to_config(shift_factor=0.25)
    pipeline = StableDiffusion3Pipeline(**{**parts, **components})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd3_transformer(**config) -> SD3Transformer2DModel:
    """As 3.5-medium: norms of queries and keys, and a second attention in the first block."""
    defaults = {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 48,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 40,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }
    return SD3Transformer2DModel(**{**defaults, **config}).eval()


def tiny_clip(width: int) -> CLIPTextModelWithProjection:
    """A text tower whose projection is as wide as its states."""
    config = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(vocabulary()),
        max_position_embeddings=16,
    )
    return CLIPTextModelWithProjection(config).eval()
