"""The parts of a new, small Stable Diffusion pipeline, for training a teacher from scratch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.hf_argparser import HfArg

from cm_diffusers.errors import UserError


START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass
class SmallStableDiffusionConfig:
    """Shape of the networks."""

    unet_channels: list[int] = HfArg(
        default_factory=lambda: [64, 128],
        help="Channels; each level but the first halves the latents and attends to text.",
    )
    unet_layers_per_block: int = HfArg(default=1, help="Residual blocks per level.")
    num_attention_heads: int = HfArg(default=4, help="Heads of the UNet's attention layers.")
    text_hidden_size: int = HfArg(default=64, help="Width of the text tower.")
    text_layers: int = HfArg(default=2, help="Layers of the text tower.")
    text_length: int = HfArg(default=16, help="Tokens of a prompt, the two marks included.")


@dataclass
class SmallVAEConfig:
    """Shape of the autoencoder."""

    block_out_channels: list[int] = HfArg(
        default_factory=lambda: [32, 64, 64],
        help="Channels of each level; every level but the first halves the image.",
    )
    layers_per_block: int = HfArg(default=1, help="Residual blocks per level.")
    latent_channels: int = HfArg(default=4, help="Channels of the latents.")
    norm_num_groups: int = HfArg(default=8, help="Groups of the group normalisations.")


def new_vae(config: SmallVAEConfig, resolution: int) -> AutoencoderKL:
    """A fresh autoencoder for square images.

    Raises:
        ValueError: The levels cannot halve the resolution.
    """
    levels = len(config.block_out_channels)
    if resolution % 2 ** (levels - 1):
        raise UserError(
            f"--resolution {resolution} cannot be halved {levels - 1} times, once for each level but the first."
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=resolution,
    )


def new_tokenizer(captions: Iterable[str], length: int) -> CLIPTokenizer:
    """Byte-pair encoding in CLIP's format, learned from the captions; other words fall apart into letters."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        special_tokens=[START, END],
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(set(captions)), trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab = learned["vocab"]
    for letter in letters:
        vocab.setdefault(f"{letter}</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in learned["merges"]], model_max_length=length)


def new_text_encoder(config: SmallStableDiffusionConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_hidden_size,
            intermediate_size=4 * config.text_hidden_size,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_hidden_size // 32,
            max_position_embeddings=config.text_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_pipeline(
    config: SmallStableDiffusionConfig, vae: AutoencoderKL, captions: Iterable[str], prediction_type: str
) -> StableDiffusionPipeline:
    """Fresh UNet and text tower around a trained VAE.

    Args:
        captions: Texts the tokenizer learns its words from.
    """
    tokenizer = new_tokenizer(captions, config.text_length)
    levels = len(config.unet_channels) - 1
    unet = UNet2DConditionModel(
        sample_size=vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=tuple(config.unet_channels),
        layers_per_block=config.unet_layers_per_block,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * levels),
        up_block_types=(*("CrossAttnUpBlock2D",) * levels, "UpBlock2D"),
        attention_head_dim=config.num_attention_heads,  # diffusers' name; it is the number of heads
        cross_attention_dim=config.text_hidden_size,
        norm_num_groups=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=new_text_encoder(config, tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=stable_diffusion_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_scheduler(prediction_type: str) -> DDIMScheduler:
    """Stable Diffusion's noise schedule (2112.10752)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
