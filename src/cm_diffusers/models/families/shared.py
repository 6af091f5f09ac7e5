"""What several families of rectified-flow transformers share: tokens of 2 x 2 latents, ragged prompts, a guidance scale."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.errors import UserError


# Of a block in which text and image, each with layers of its own, attend to each other.
JOINT_ATTENTION = tuple(
    f"attn.{name}" for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
)


def pack(latents: Tensor) -> Tensor:
    """Latents `(B, C, h, w)` as tokens `(B, h w / 4, 4 C)`, each of which is a square of 2 x 2."""
    return tokens(pixel_unshuffle(latents, 2))


def unpack(packed: Tensor, like: Tensor) -> Tensor:
    """The inverse of `pack`, of the size of `like` `(B, C, h, w)`."""
    return pixel_shuffle(untokened(packed, like.shape[-2] // 2, like.shape[-1] // 2), 2)


def tokens(latents: Tensor) -> Tensor:
    """`(B, C, h, w)` as `(B, h w, C)`."""
    return latents.flatten(2).transpose(1, 2)


def untokened(sequence: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `tokens`, `(B, C, height, width)`."""
    return sequence.transpose(1, 2).unflatten(2, (height, width))


def places(*sizes: int, like: Tensor) -> Tensor:
    """Coordinates of all places of a grid, the last one fastest, `(L, len(sizes))`."""
    return torch.cartesian_prod(*(torch.arange(size, device=like.device) for size in sizes))


def padded(texts: list[Tensor], length: int) -> Conditions:
    """States `(N, length, D)` of prompts of `(L, D)` each, with zeros after the end, and which of them are text `(N, length)`."""
    states = texts[0].new_zeros(len(texts), length, texts[0].shape[-1])
    mask = torch.zeros(len(texts), length, dtype=torch.bool, device=states.device)
    for row, text in enumerate(texts):
        states[row, : len(text)], mask[row, : len(text)] = text, True
    return {"prompt_embeds": states, "prompt_embeds_mask": mask}


def told_scale(cond: Conditions, w: Tensor) -> Conditions:
    """With `guidance`, the guidance scale w + 1 `(B,)` as it stands."""
    return cond | {"guidance": w + 1}


def refuse_distilled(path: str, pipe: DiffusionPipeline, sign: str) -> None:
    """
    Args:
        sign: What the config says.

    Raises:
        ValueError: Always.
    """
    raise UserError(
        f"{path} is a {type(pipe).__name__} that is distilled to few steps already ({sign}); give the model it came from."
    )
