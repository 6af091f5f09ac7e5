"""Random pipelines of Sana, SANA-Sprint and Wan that are stock in every part and run in milliseconds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny import WORDS
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, T5Tokenizer, UMT5Config, UMT5EncoderModel


SPACE = "▁"


def tiny_sana(*, timestep_scale: float = 1.0, seed: int = 0, **components: object) -> SanaPipeline:
    """Latents 4x8x8 of images 32x32."""
    with _seeded(seed):
        parts = _sana_parts(timestep_scale=timestep_scale)
    return _quiet(SanaPipeline(**{**parts, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), **components}))


def tiny_sprint(*, seed: int = 0, **components: object) -> SanaSprintPipeline:
    """The same parts with a network that is told its guidance."""
    with _seeded(seed):
        parts = _sana_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return _quiet(SanaSprintPipeline(**{**parts, "scheduler": SCMScheduler(), **components}))


def tiny_wan(*, channels: int = 4, seed: int = 0, **components: object) -> WanPipeline:
    """Latents Cx(F+3)/4x8x8 of F frames of 64x64; with 48 channels as TI2V of Wan 2.2, of frames of 128x128."""
    with _seeded(seed):
        transformer = tiny_wan_transformer(in_channels=channels, out_channels=channels)
        parts = {
            "tokenizer": tiny_t5_tokenizer(),
            "text_encoder": tiny_umt5(),
            "transformer": transformer,
            "vae": tiny_wan_vae(channels),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }
    return _quiet(WanPipeline(**{**parts, "expand_timesteps": channels == 48, **components}))


def tiny_sana_transformer(**config: object) -> SanaTransformer2DModel:
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 2}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    sizes = {"in_channels": 4, "out_channels": 4, "caption_channels": 16, "sample_size": 8}
    return SanaTransformer2DModel(**{**heads, **cross, **sizes, **config}).eval()


def tiny_wan_transformer(**config: object) -> WanTransformer3DModel:
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 2, "rope_max_seq_len": 32}
    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "ffn_dim": 32}
    return WanTransformer3DModel(**{**heads, **sizes, **config}).eval()


def tiny_dc_vae() -> AutoencoderDC:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_out_channels": (8, 8, 8),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), ()),
        }.items()
    }
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **sides).eval()


def tiny_wan_vae(channels: int = 4) -> AutoencoderKLWan:
    """With a mean and a deviation of each channel that are far from 0 and 1."""
    statistics = {
        "latents_mean": torch.linspace(-0.9, 1.5, channels).tolist(),
        "latents_std": torch.linspace(1.1, 3.3, channels).tolist(),
    }
    patched = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16, "is_residual": True}
    sizes = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_dim": channels}
    return AutoencoderKLWan(**sizes, **statistics, **(patched if channels == 48 else {})).eval()


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz-:", SPACE})
    vocabulary = {token: number for number, token in enumerate((*special, *letters))}
    return GemmaTokenizer(vocab=vocabulary, add_bos_token=True)


def tiny_t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz-" + SPACE]
    words = [(SPACE + word, -2.0) for word in dict.fromkeys(WORDS) if len(word) > 1]
    return T5Tokenizer(vocab=[*special, *letters, *words], extra_ids=0)


def tiny_gemma() -> Gemma2Model:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma2Config(**sizes, **heads, vocab_size=len(tiny_gemma_tokenizer()), max_position_embeddings=2048)
    return Gemma2Model(config).eval()


def tiny_umt5() -> UMT5EncoderModel:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(**sizes, vocab_size=len(tiny_t5_tokenizer()), is_encoder_decoder=False)).eval()


def _sana_parts(**config: object) -> dict[str, object]:
    return {
        "tokenizer": tiny_gemma_tokenizer(),
        "text_encoder": tiny_gemma(),
        "transformer": tiny_sana_transformer(**config),
        "vae": tiny_dc_vae(),
    }


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
