"""A random Stable Diffusion pipeline that is real in every part and runs in milliseconds."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)


FASHION_LABELS = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
WORDS = ("a", "an", "photo", "of", "t", "-", *(w for label in FASHION_LABELS for w in label.split("-")[-1].split()))


def tiny_pipeline(*, prediction_type: str = "epsilon", seed: int = 0, **components) -> StableDiffusionPipeline:
    """`StableDiffusionPipeline` with 8x8x4 latents and 32x32 images; `components` replace its parts (`unet=...`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "vae": tiny_vae(),
            "text_encoder": tiny_text_encoder(),
            "tokenizer": tiny_tokenizer(),
            "unet": tiny_unet(),
            "scheduler": tiny_scheduler(prediction_type),
            "safety_checker": None,
            "feature_extractor": None,
        }
    pipeline = StableDiffusionPipeline(**{**parts, **components}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_unet(**config) -> UNet2DConditionModel:
    defaults = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**defaults, **config}).eval()


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=32,
        scaling_factor=0.5,
    ).eval()


def tiny_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=32,
        projection_dim=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(vocabulary()),
        max_position_embeddings=16,
    )
    return CLIPTextModel(config).eval()


def tiny_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary(), merges=word_merges(WORDS), model_max_length=16)


def tiny_clip() -> tuple[CLIPModel, CLIPProcessor]:
    """Of the tiny text encoder's shape, with an eye for 32 pixels."""
    vision = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = tiny_text_encoder().config.to_dict()
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return model, CLIPProcessor(image_processor=CLIPImageProcessor(**size), tokenizer=tiny_tokenizer())


def tiny_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that join the letters of every word from the left, so each known word is one token."""
    merges = []
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(letters)):
            merges.append(("".join(letters[:end]), letters[end]))
    return list(dict.fromkeys(merges))


def vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    symbols = [*letters, "-", *(symbol + "</w>" for symbol in [*letters, "-"])]
    merged = ["".join(pair) for pair in word_merges(WORDS)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *symbols, *merged]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}
