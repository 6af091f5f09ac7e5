"""What several families of transformers share: layers that attend, tokens of 2 x 2 latents, guidance that is told."""

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from cm_diffusers.diffusion.guidance import Conditions


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


def told_scale(cond: Conditions, w: Tensor) -> Conditions:
    """With `guidance`, the guidance scale w + 1 `(B,)` as it stands."""
    return cond | {"guidance": w + 1}
