"""Text of Stable Diffusion 3 without T5, at the cost of its words alone.

Where T5 is left out, the pipeline puts 256 zeros in its place, and so does a T5 that says nothing. No position tells them
apart, so they stay equal in every layer; and n equal keys weigh in a softmax as one whose logit is larger by log n. Here the
network computes one of them. Conditions of training leave them out, so that their number is known without a look at the text.
"""

import math
from functools import partial
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from cm_diffusers.models.families.base import default_of


def silent_t5(width: int) -> T5EncoderModel:
    """All of whose states `(B, L, width)` are zero, as those that the pipeline puts in the place of a missing T5.

    But plain `DiffusionPipeline.from_pretrained` loads no folder without one unless it is told to leave T5 out.
    """
    tower = T5EncoderModel(T5Config(vocab_size=3, d_model=width, d_kv=1, d_ff=1, num_layers=1, num_heads=1))
    tower.encoder.final_layer_norm.weight.data.zero_()
    return tower


def silent_tokenizer() -> T5TokenizerFast:
    """To which every word is unknown."""
    return T5TokenizerFast(vocab=[(token, 0.0) for token in ("<pad>", "</s>", "<unk>")], extra_ids=0)


def merge_zero_text(pipe: StableDiffusion3Pipeline) -> None:
    """The network of a pipeline without T5 computes the same, but faster; for one with T5 nothing changes."""
    if pipe.text_encoder_3 is None or _is_silent(pipe.text_encoder_3):
        merge_zeros(pipe.transformer, *text_lengths(pipe))


def text_lengths(pipe: StableDiffusion3Pipeline) -> tuple[int, int]:
    """Tokens of its CLIP towers, and those of T5 after them as many as the pipeline's call asks for."""
    return pipe.tokenizer_max_length, default_of(pipe, "max_sequence_length")


def _is_silent(tower: T5EncoderModel) -> bool:
    """Whether all its states are zero."""
    gain = tower.encoder.final_layer_norm.weight
    return not gain.is_meta and not gain.any()


def merge_zeros(network: SD3Transformer2DModel, words: int = 0, zeros: int = 0) -> None:
    """Text that ends with zeros is computed with one of them, wherever the network is called by names of arguments.

    Args:
        words: Length of a text whose zeros are left out; of others they are counted, for which the host waits.
        zeros: How many those are.
    """
    if merges_zeros(network):
        return
    network.set_attn_processor(_CountingProcessor())
    network.register_forward_pre_hook(partial(_merge, words, zeros), with_kwargs=True)


def merges_zeros(network: nn.Module) -> bool:
    processors = getattr(network, "attn_processors", {}).values()
    return any(isinstance(processor, _CountingProcessor) for processor in processors)


class _CountingProcessor:
    """Joint attention in which the last token of the text stands for several."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        count: int = 1,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states: Of the latents, `(B, N, D)`.
            encoder_hidden_states: Of the text, `(B, L, D)`; None where the latents attend to themselves alone.
            attention_mask: There is none in this network.
            count: How many the last token stands for.
        """
        own = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is None:
            return _out(attn, nn.functional.scaled_dot_product_attention(*own))
        layers, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
        text = _heads(attn, encoder_hidden_states, layers, norms)
        joint = [torch.cat(pair, dim=2) for pair in zip(own, text, strict=True)]
        states = nn.functional.scaled_dot_product_attention(*joint, attn_mask=_weights(joint[1], count))
        latents, text = states.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=2)
        return _out(attn, latents), _flat(text) if attn.context_pre_only else attn.to_add_out(_flat(text))


def _weights(keys: Tensor, count: int) -> Tensor | None:
    """What is added to the logits `(1, 1, L, L)` of keys `(B, heads, L, d)`, of which the last stands for `count`.

    In bfloat16 log(count) alone would be off by up to 2^-6, a weight by 1.5 percent; what its rounding adds is small enough to
    be exact, and is added to all others.
    """
    if count == 1:
        return None
    mantissa, exponent = math.frexp(math.log(count))
    logit = math.ldexp(round(256 * mantissa), exponent - 8)
    added = keys.new_full((length := keys.shape[2],), logit - math.log(count))
    added[-1] = logit
    return added.expand(1, 1, length, length)


def _heads(attn: Attention, states: Tensor, layers: tuple, norms: tuple) -> list[Tensor]:
    """Queries, keys and values, each `(B, heads, L, D / heads)`."""
    parts = [layer(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in layers]
    return [norm(part) if norm else part for norm, part in zip((*norms, None), parts, strict=True)]


def _flat(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(2)


def _out(attn: Attention, states: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](_flat(states)))


def _merge(
    words: int, zeros: int, network: SD3Transformer2DModel, args: tuple, told: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Before a forward pass: the zeros that end every text of the batch become one, and attention is told how many."""
    if "encoder_hidden_states" not in told:
        return None
    text, others = told["encoder_hidden_states"], told.get("joint_attention_kwargs") or {}
    if text.shape[1] == words:
        text = nn.functional.pad(text, (0, 0, 0, 1))
    else:
        numbers = torch.arange(1, text.shape[1] + 1, device=text.device)
        words = int((text.detach().any(dim=2).any(dim=0) * numbers).max())
        if not (zeros := text.shape[1] - words):
            return None
        text = text[:, : words + 1]
    return args, told | {"encoder_hidden_states": text, "joint_attention_kwargs": {**others, "count": zeros}}
