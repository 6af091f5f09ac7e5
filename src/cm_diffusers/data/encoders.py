"""What turns the images and captions of a data set into what a teacher's network sees."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from cm_diffusers.data.cache import Vae, module_fingerprint
from cm_diffusers.data.found import Found
from cm_diffusers.data.ragged import trimmed
from cm_diffusers.data.shards import chunks, shard_key
from cm_diffusers.models.families.base import family_of, network_of
from cm_diffusers.models.merged_text import merges_zeros


Conditions = dict[str, Tensor]


@dataclass(frozen=True)
class Encoders:
    """The VAE and text towers of a teacher.

    Attributes:
        vae: Loaded only when an image has to be encoded.
        encode_prompts: Prompts to conditions, each (N, ...), without the tokens that a mask among them hides at the
            end of all. The empty prompt becomes the teacher's unconditional branch.
        fingerprint: Names what `encode_prompts` computes.
        micro_conditioning: Whether the network is also told sizes and crop, as `time_ids` (B, 6).
        towers: The modules that `encode_prompts` runs where they are.
        tokenizers: Those it reads prompts with, to count tokens.
    """

    vae: Vae
    encode_prompts: Callable[[list[str]], Conditions]
    fingerprint: str
    micro_conditioning: bool = False
    towers: tuple[nn.Module, ...] = ()
    tokenizers: tuple[PreTrainedTokenizerBase, ...] = ()

    @classmethod
    def from_pipeline(cls, pipe: DiffusionPipeline) -> "Encoders":
        """The encoders of a pipeline whose network is of a known family.

        They have tokenizers of their own: one is not to be used by two threads, and a pipeline that is sampled while a
        stream is encoded uses its.
        """
        pipe = _with_own_tokenizers(pipe)
        network = network_of(pipe)
        family, towers, tokenizers = family_of(network), _numbered(pipe, "text_encoder"), _numbered(pipe, "tokenizer")
        return cls(
            Vae.from_model(pipe.vae, family.latents),
            lambda prompts: trimmed(family.encode(pipe, prompts)),
            _fingerprint(pipe, family.network == "unet", towers, tokenizers),
            network.config.get("addition_embed_type") == "text_time",
            tuple(towers.values()),
            tuple(tokenizers.values()),
        )


def _with_own_tokenizers(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline and parts, but for copies of the tokenizers."""
    found = copy.copy(pipe)
    for name, part in pipe.components.items():
        if name.startswith("tokenizer"):
            setattr(found, name, copy.deepcopy(part))
    return found


def _numbered(pipe: DiffusionPipeline, kind: str) -> dict[str, Any]:
    """Those of a kind that the pipeline has, by what follows in their names: nothing, "_2" and so on."""
    parts = {name.removeprefix(kind): part for name, part in pipe.components.items() if name.startswith(kind)}
    return {number: _reader(parts[number]) for number in sorted(parts) if parts[number] is not None}


def _reader(part: Any) -> Any:
    """The tokenizer in a processor, which reads images too; anything else as it is."""
    return part.tokenizer if isinstance(part, ProcessorMixin) else part


def _fingerprint(pipe: DiffusionPipeline, is_unet: bool, towers: dict[str, Any], tokenizers: dict[str, Any]) -> str:
    text = []
    for number in sorted(towers.keys() | tokenizers.keys()):
        text += [module_fingerprint(towers[number])] if number in towers else []
        text += [_tokenizer_state(tokenizers[number])] if number in tokenizers else []
    if is_unet:  # the names of what earlier versions have cached
        return shard_key(*text, *([bool(pipe.config.force_zeros_for_empty_prompt)] if len(towers) > 1 else []))
    return shard_key(type(pipe).__name__, *text, *(["without zeros"] if merges_zeros(network_of(pipe)) else []))


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list:
    """All that decides the tokens of a prompt, however often the tokenizer was used before."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for last_call in ("truncation", "padding"):
        rules.pop(last_call)
    template = [tokenizer.chat_template] if tokenizer.chat_template else []
    return [rules, tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.padding_side, *template]


def too_long(prompts: Iterable[str], tokenizers: tuple[PreTrainedTokenizerBase, ...], found: Found) -> None:
    """`found` is told which of the prompts a tokenizer cuts; those that are too short for that are not tokenized."""
    limits = {tokenizer.model_max_length: (tokenizer, _sure(tokenizer)) for tokenizer in tokenizers}
    for part in chunks(prompts):
        for most, (tokenizer, sure) in limits.items():
            perhaps = [prompt for prompt in part if len(prompt) > sure or not prompt.isascii()]
            lengths = map(len, tokenizer(perhaps, truncation=False).input_ids if perhaps else [])
            cut = [prompt for prompt, length in zip(perhaps, lengths, strict=True) if length > most]
            found.remark(f"captions that go on after {most} tokens, where the text tower stops reading", cut)


def _sure(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of ASCII, each a token at most, that it cannot cut: beside them are its marks, and perhaps a leading space."""
    return tokenizer.model_max_length - len(tokenizer([""], truncation=False).input_ids[0]) - 1


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
