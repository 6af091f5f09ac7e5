"""Random pipelines of Flux, FLUX.2, Qwen-Image and Z-Image that are real in every part and run in milliseconds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny import tiny_text_encoder, tiny_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


JOINT = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 16}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = {"vocab_size": len(SPECIAL) + 256, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}


def tiny_flux(seed: int = 0, **config: object) -> FluxPipeline:
    """As dev, with a guidance embedding; latents of 4 x 8 x 8."""
    sizes = {
        "num_single_layers": 1,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    }
    with seeded(seed):
        return ready(
            FluxPipeline(
                scheduler=tiny_flow_scheduler(),
                vae=shifted_vae(),
                text_encoder=tiny_text_encoder(),
                tokenizer=tiny_tokenizer(),
                text_encoder_2=tiny_t5(),
                tokenizer_2=tiny_t5_tokenizer(),
                transformer=FluxTransformer2DModel(**{**JOINT, **sizes, "guidance_embeds": True, **config}),
            )
        )


def tiny_flux2(seed: int = 0) -> Flux2Pipeline:
    """As dev, with a guidance embedding; latents of 16 x 4 x 4, and a text tower of thirty layers."""
    with seeded(seed):
        return ready(
            Flux2Pipeline(
                scheduler=tiny_flow_scheduler(),
                vae=flux2_vae(),
                text_encoder=tiny_mistral(),
                tokenizer=tiny_chat_tokenizer(),
                transformer=flux2_transformer(guidance_embeds=True),
            )
        )


def tiny_klein(seed: int = 0, is_distilled: bool = False) -> Flux2KleinPipeline:
    """Guided by a second pass; its text tower has twenty-seven layers."""
    with seeded(seed):
        return ready(
            Flux2KleinPipeline(
                scheduler=tiny_flow_scheduler(),
                vae=flux2_vae(),
                text_encoder=tiny_qwen3(num_hidden_layers=27),
                tokenizer=tiny_chat_tokenizer(),
                transformer=flux2_transformer(guidance_embeds=False),
                is_distilled=is_distilled,
            )
        )


def tiny_qwen_image(seed: int = 0, **config: object) -> QwenImagePipeline:
    """Latents of 4 x 8 x 8."""
    sizes = {"out_channels": 4, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8)}
    with seeded(seed):
        return ready(
            QwenImagePipeline(
                scheduler=tiny_flow_scheduler(),
                vae=qwen_vae(),
                text_encoder=tiny_qwen_vl(),
                tokenizer=tiny_chat_tokenizer(),
                transformer=QwenImageTransformer2DModel(**{**JOINT, **sizes, **config}),
            )
        )


def tiny_z_image(seed: int = 0) -> ZImagePipeline:
    """Latents of 4 x 8 x 8."""
    heads = {"n_heads": 2, "n_kv_heads": 2, "axes_dims": [4, 4, 8], "axes_lens": [640, 32, 32]}
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 16}
    with seeded(seed):
        transformer = ZImageTransformer2DModel(**heads, **sizes)
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            nn.init.normal_(token)
        return ready(
            ZImagePipeline(
                scheduler=tiny_flow_scheduler(),
                vae=shifted_vae(),
                text_encoder=tiny_qwen3(num_hidden_layers=2),
                tokenizer=tiny_chat_tokenizer(),
                transformer=transformer,
            )
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def ready(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Frozen and silent, with random weights also where a network starts from zeros."""
    for value in pipe.transformer.parameters():
        if not value.any():
            nn.init.normal_(value, std=0.02)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def flux2_transformer(**config: object) -> Flux2Transformer2DModel:
    sizes = {"num_single_layers": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4)}
    return Flux2Transformer2DModel(**{**JOINT, **sizes, **config})


def shifted_vae() -> AutoencoderKL:
    """With four pixels per latent, a shift and a scale."""
    return AutoencoderKL(**image_blocks(), scaling_factor=0.5, shift_factor=0.1)


def flux2_vae() -> AutoencoderKLFlux2:
    """With statistics of its batch norm."""
    vae = AutoencoderKLFlux2(**image_blocks())
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def image_blocks() -> dict[str, object]:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (8, 8, 16), "latent_channels": 4, "norm_num_groups": 8, "layers_per_block": 1}
    return {**blocks, **sizes, "sample_size": 32}


def qwen_vae() -> AutoencoderKLQwenImage:
    """Of clips, with four pixels per latent, and mean and standard deviation of each channel."""
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 2.0, 1.5]}
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 2], "num_res_blocks": 1}
    return AutoencoderKLQwenImage(**sizes, **statistics, temperal_downsample=[False, True])


def tiny_t5() -> T5EncoderModel:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(**sizes, vocab_size=48))


def tiny_t5_tokenizer() -> T5Tokenizer:
    letters = ["▁", *(chr(code) for code in range(ord("a"), ord("z") + 1)), "-"]
    pieces = ["<pad>", "</s>", "<unk>", *letters]
    return T5Tokenizer(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)


def tiny_chat_tokenizer() -> Qwen2Tokenizer:
    """A token for each byte, and a template for chats of strings or of lists."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_qwen3(num_hidden_layers: int) -> Qwen3ForCausalLM:
    """States of 8 numbers if three layers are stacked, of 16 otherwise."""
    size = 8 if num_hidden_layers > 2 else 16
    return Qwen3ForCausalLM(Qwen3Config(**TEXT, hidden_size=size, num_hidden_layers=num_hidden_layers, head_dim=8))


def tiny_mistral() -> Mistral3ForConditionalGeneration:
    text = {"model_type": "mistral", **TEXT, "hidden_size": 8, "num_hidden_layers": 30, "head_dim": 8}
    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=258)
    )


def tiny_qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    text = {**TEXT, **ends, "hidden_size": 16, "num_hidden_layers": 2, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
