"""A student beside the learned weight of its loss."""

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from cm_diffusers.models.heads import zeroed


class WithTimeWeight(nn.Module):
    """A network, and w_phi of sCM (2410.11081, Sec. 4.2): a linear head on the embedding of its time, zero at the start.

    It is called as the network, which is told its time second or as `timestep`, and answers with one output more: w `(B,)`.
    """

    def __init__(self, network: nn.Module, channels: int = 128) -> None:
        super().__init__()
        self.network = network
        self.features = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.head = zeroed(nn.Linear(channels, 1))

    @property
    def config(self) -> FrozenDict:
        """Of the network."""
        return self.network.config

    def forward(self, *given: Tensor, **arguments: object) -> tuple[Tensor, Tensor]:
        t = arguments["timestep"] if "timestep" in arguments else given[1]
        with torch.autocast(t.device.type, enabled=False):
            w = self.head(self.features(t.float())).squeeze(1)
        return self.network(*given, **arguments)[0], w


def without_weight(student: nn.Module) -> nn.Module:
    """The network itself, as it is published."""
    return student.network if isinstance(student, WithTimeWeight) else student


def weights_without_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the network itself, by its own names, among a student's; or all, of a student without the weight."""
    inside = {name.removeprefix("network."): value for name, value in weights.items() if name.startswith("network.")}
    return inside or weights
