"""A critic on the features of a frozen transformer, with a logit for each token: after LADD (2403.12015, Sec. 3)."""

import math

import torch
from torch import Tensor, nn

from cm_diffusers.diffusion.process import as_like
from cm_diffusers.models.block_outputs import block_outputs
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.heads import zeroed


BLOCKS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")  # names of lists of them, in order
SEEN = (0.25, 0.5, 0.75)  # after so much of the network


class TokenFeatureCritic(nn.Module):
    """Heads on the tokens of the image after three blocks of the frozen teacher, which stops there.

    The teacher is called, not owned, as by `TeacherFeatureCritic`. One that is told its guidance is told that of none.

    Args:
        teacher: What to call.
        network: The transformer inside it, whose blocks are looked at.
        channels: Width of the heads.
    """

    def __init__(self, teacher: nn.Module, network: nn.Module, channels: int) -> None:
        super().__init__()
        blocks = [block for name in BLOCKS for block in getattr(network, name, [])]
        numbers = sorted({math.ceil(len(blocks) * share) - 1 for share in SEEN})
        self._teacher, self._network = [teacher], [network]  # lists: not registered
        self._blocks = [blocks[number] for number in numbers]
        self.heads = nn.ModuleList(_head(_width(block), channels) for block in self._blocks)

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Logits `(B, N)` of x `(B, C, H, W)` at times t `(B,)`, zero at first."""
        features = self.features(x, t, cond)
        logits = [head(feature).flatten(1) for head, feature in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1).float()

    def features(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> list[Tensor]:
        """Tokens `(B, N', D)` after each of the blocks, in float32; of text and image together where a block mixes them."""
        network = self._network[0]
        family = family_of(network)
        if family.guidance(network) == "embedded":
            cond = family.told(network)(cond, x.new_zeros(len(x)))
        found = block_outputs(network, self._blocks, lambda: family.call(self._teacher[0], x, as_like(t, x), cond))
        return [(output[-1] if isinstance(output, tuple) else output).float() for output in found]  # text is first


def _head(width: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels), nn.SiLU(), zeroed(nn.Linear(channels, 1)))


def _width(block: nn.Module) -> int:
    """Of its tokens: what its first layer reads."""
    return next(layer.in_features for layer in block.modules() if isinstance(layer, nn.Linear))
