"""Prompts to what a UNet reads: one CLIP tower for Stable Diffusion, the second or both for Stable Diffusion XL."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cm_diffusers.errors import UserError


class Tower(NamedTuple):
    """A tokenizer with its text encoder."""

    tokenizer: PreTrainedTokenizerBase
    encoder: PreTrainedModel


class Encoded(NamedTuple):
    """Hidden states (B, L, D) and, where the second tower gives them, pooled embeddings (B, P)."""

    states: Tensor
    pooled: Tensor | None


def towers(pipe: DiffusionPipeline) -> list[Tower]:
    pairs = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
    return [Tower(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None]


def encode(
    pipe: DiffusionPipeline, prompts: Sequence[list[str]], device: torch.device, clip_skip: int | None
) -> Encoded:
    """Encodes the first list of prompts with the pipeline's first tower, the second with its second.

    Args:
        pipe: A consistency pipeline; it converts the tokens of textual inversion.
        prompts: One list of B prompts for each tower; the last serves a tower that has none.
        device: Where the towers run.
        clip_skip: Layers to leave out at the end of each tower.
    """
    if not towers(pipe):
        raise UserError(
            "This pipeline has no text encoder; give prompt_embeds, and for guidance negative_prompt_embeds."
        )
    parts = [
        _encode_with(pipe, tower, prompts[min(i, len(prompts) - 1)], device, clip_skip)
        for i, tower in enumerate(towers(pipe))
    ]
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Encoded(torch.cat([part.states for part in parts], dim=-1), pooled[0] if pooled else None)


def _encode_with(
    pipe: DiffusionPipeline, tower: Tower, prompts: list[str], device: torch.device, clip_skip: int | None
) -> Encoded:
    ids = _tokens(tower.tokenizer, pipe.maybe_convert_prompt(prompts, tower.tokenizer))
    mask = ids.attention_mask.to(device) if getattr(tower.encoder.config, "use_attention_mask", False) else None
    inner = pipe.text_encoder_2 is not None or clip_skip is not None
    output = tower.encoder(
        ids.input_ids.to(device), attention_mask=mask, **({"output_hidden_states": True} if inner else {})
    )
    if pipe.text_encoder_2 is not None:  # SDXL reads the penultimate layer, without the final norm
        return Encoded(_from_end(output.hidden_states, 2 + (clip_skip or 0)), getattr(output, "text_embeds", None))
    if clip_skip is None:
        return Encoded(output.last_hidden_state, None)
    body = getattr(tower.encoder, "text_model", tower.encoder)  # transformers 5.6 made CLIPTextModel flat
    return Encoded(body.final_layer_norm(_from_end(output.hidden_states, 1 + clip_skip)), None)


def _from_end(states: Sequence[Tensor], place: int) -> Tensor:
    if place > len(states):
        raise UserError(f"clip_skip leaves out more than the {len(states) - 1} layers of a text encoder; lower it.")
    return states[-place]


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> dict[str, Tensor]:
    length = tokenizer.model_max_length
    whole = tokenizer(prompts)["input_ids"]
    if cut := [tokenizer.decode(ids[length - 1 : -1]) for ids in whole if len(ids) > length]:
        warnings.warn(f"CLIP reads {length} tokens; these ends of prompts were left out: {cut}.", stacklevel=2)
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def unconditional(
    pipe: DiffusionPipeline, negatives: Sequence[list[str]] | None, like: Encoded, device: torch.device
) -> Encoded:
    """The unconditional branch: negative prompts, else zeros where SDXL was trained so, else the empty prompt.

    Args:
        pipe: A consistency pipeline.
        negatives: As `prompts` of `encode`, or None.
        like: The conditional branch.
        device: Where the towers run.
    """
    if negatives is not None:
        return encode(pipe, negatives, device, None)
    if pipe.is_xl and pipe.config.force_zeros_for_empty_prompt:
        return Encoded(torch.zeros_like(like.states), torch.zeros_like(like.pooled))
    return encode(pipe, [[""] * len(like.states)], device, None)


def listed(prompt: str | list[str], size: int = 1) -> list[str]:
    return [prompt] * size if isinstance(prompt, str) else prompt


def repeat_rows(x: Tensor | None, times: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Each row of x (B, ...) `times` in succession: (B * times, ...); None stays None."""
    return None if x is None else x.to(device, dtype).repeat_interleave(times, dim=0)


@contextmanager
def lora_scaled(encoders: Sequence[PreTrainedModel], scale: float | None) -> Iterator[None]:
    """The text encoders with the scale of their LoRA layers multiplied by `scale`."""
    if scale is None:
        yield
        return
    for encoder in encoders:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in encoders:
            unscale_lora_layers(encoder, scale)
