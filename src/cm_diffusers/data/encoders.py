"""What turns the images and captions of a data set into what a teacher's network sees."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from cm_diffusers.data.cache import Vae, module_fingerprint
from cm_diffusers.data.found import Found
from cm_diffusers.data.shards import shard_key


Conditions = dict[str, Tensor]


@dataclass(frozen=True)
class Encoders:
    """The VAE and text towers of a teacher.

    Attributes:
        vae: Loaded only when an image has to be encoded.
        encode_prompts: Prompts to conditions, each (N, ...): `encoder_hidden_states` (N, L, D), and for Stable Diffusion
            XL `text_embeds` (N, P). The empty prompt becomes the teacher's unconditional branch.
        fingerprint: Names what `encode_prompts` computes.
        micro_conditioning: Whether the network is also told sizes and crop, as `time_ids` (B, 6).
        towers: The modules that `encode_prompts` runs where they are.
        tokenizers: Copies of those it reads prompts with, to count tokens.
    """

    vae: Vae
    encode_prompts: Callable[[list[str]], Conditions]
    fingerprint: str
    micro_conditioning: bool = False
    towers: tuple[nn.Module, ...] = ()
    tokenizers: tuple[PreTrainedTokenizerBase, ...] = ()

    @classmethod
    def from_pipeline(cls, pipe: DiffusionPipeline) -> "Encoders":
        """The encoders of a Stable Diffusion or Stable Diffusion XL pipeline."""
        vae, first, second = Vae.from_model(pipe.vae), pipe.text_encoder, getattr(pipe, "text_encoder_2", None)
        text = [module_fingerprint(first), _tokenizer_state(pipe.tokenizer)]
        tokenizers = copy.deepcopy((pipe.tokenizer,) if second is None else (pipe.tokenizer, pipe.tokenizer_2))
        if second is None:
            return cls(vae, lambda prompts: _encode(pipe, prompts), shard_key(*text), False, (first,), tokenizers)
        zeros = bool(pipe.config.force_zeros_for_empty_prompt)
        fingerprint = shard_key(*text, module_fingerprint(second), _tokenizer_state(pipe.tokenizer_2), zeros)
        encode = partial(_encode_xl, pipe, zeros=zeros)
        return cls(vae, encode, fingerprint, True, (first, second), tokenizers)


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list:
    """All that decides the tokens of a prompt, however often the tokenizer was used before."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for last_call in ("truncation", "padding"):
        rules.pop(last_call)
    return [rules, tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.padding_side]


def too_long(prompts: list[str], tokenizers: tuple[PreTrainedTokenizerBase, ...], found: Found) -> None:
    """`found` is told which of the prompts a tokenizer cuts."""
    for most, tokenizer in {tokenizer.model_max_length: tokenizer for tokenizer in tokenizers}.items():
        lengths = map(len, tokenizer(prompts, truncation=False).input_ids)
        cut = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > most]
        found.remark(f"captions that go on after {most} tokens, where the text tower stops reading", cut)


@contextmanager
def placed(modules: tuple[nn.Module, ...], device: torch.device | str) -> Iterator[None]:
    """The modules are on the device inside the block, and back where they were after it."""
    before = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, place in zip(modules, before, strict=True):
            module.to(place)


def _encode(pipe: DiffusionPipeline, prompts: list[str]) -> Conditions:
    return {"encoder_hidden_states": pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)[0]}


def _encode_xl(pipe: DiffusionPipeline, prompts: list[str], zeros: bool) -> Conditions:
    device = pipe.text_encoder_2.device
    states, _, pooled, _ = pipe.encode_prompt(
        prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if zeros:  # the unconditional branch SDXL was trained and is sampled with
        empty = torch.tensor([prompt == "" for prompt in prompts], device=states.device)
        states, pooled = states.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
    return {"encoder_hidden_states": states, "text_embeds": pooled}
