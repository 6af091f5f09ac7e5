"""A random Stable Diffusion XL pipeline that is real in every part and runs in milliseconds."""

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from tiny import tiny_scheduler, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae, vocabulary
from transformers import CLIPTextConfig, CLIPTextModelWithProjection


def tiny_xl_pipeline(*, prediction_type: str = "epsilon", seed: int = 0, **components) -> StableDiffusionXLPipeline:
    """`StableDiffusionXLPipeline` with 8x8x4 latents and 32x32 images; `components` replace its parts (`unet=...`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "vae": tiny_vae(),
            "text_encoder": tiny_text_encoder(),
            "text_encoder_2": tiny_text_encoder_2(),
            "tokenizer": tiny_tokenizer(),
            "tokenizer_2": tiny_tokenizer(),
            "unet": tiny_xl_unet(),
            "scheduler": tiny_scheduler(prediction_type),
        }
    pipeline = StableDiffusionXLPipeline(**{**parts, **components}, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_xl_unet(**config) -> UNet2DConditionModel:
    """Reads both text towers (32 + 24 wide), the pooled embedding (20 wide) and six sizes."""
    defaults = {
        "cross_attention_dim": 32 + 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    }
    return tiny_unet(**{**defaults, **config})


def tiny_text_encoder_2() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=24,
        projection_dim=20,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(vocabulary()),
        max_position_embeddings=16,
    )
    return CLIPTextModelWithProjection(config).eval()
