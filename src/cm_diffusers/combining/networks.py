"""Putting combinations into the network of a published pipeline: all of its weights, or what a LoRA adds to them."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from cm_diffusers.combining.weights import Snapshots, added
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.time_weight import weights_without_head


def student_of(pipe: DiffusionPipeline) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else network_of(pipe)


class WholeNetwork:
    """A student all of whose weights were trained.

    Args:
        network: Of its published pipeline.

    Raises:
        ValueError: The snapshots are of another network.
    """

    def __init__(self, network: nn.Module, snapshots: Snapshots) -> None:
        self.snapshots, self.names = snapshots, weights_without_head({name: name for name in snapshots.shapes})
        self.places = {name: value.detach() for name, value in network.state_dict().items()}
        shapes = {name: snapshots.shapes[stored] for name, stored in self.names.items()}
        odd = sorted(name for name in shapes if name not in self.places or shapes[name] != self.places[name].shape)
        if odd:
            raise UserError(
                f"{snapshots.paths[-1]} is of another network than the published pipeline: {len(odd)} weights differ, such as "
                f"{odd[0]}."
            )

    def put(self, alphas: Sequence[float]) -> None:
        """The combination in place of the weights; what did not train stays."""
        stored = {name: place for place, name in self.names.items()}
        device = next(iter(self.places.values())).device
        for name, value in self.snapshots.combined(alphas, list(stored), device):
            self.places[stored[name]].copy_(value)

    put_published = put


class LoraNetwork:
    """A network below a LoRA, whose combinations are those of what it adds to the weights, B_i A_i, never of its factors.

    Args:
        network: With the published LoRA on it.
        rank: Of the combination when it is published; that of the training if None.

    Raises:
        ValueError: The snapshots are of another LoRA.
    """

    def __init__(self, network: nn.Module, snapshots: Snapshots, rank: int | None = None) -> None:
        (self.adapter,) = network.peft_config
        self.network, self.config, self.snapshots = network, network.peft_config[self.adapter], snapshots
        self.layers = {path: one for path, one in network.named_modules() if isinstance(one, BaseTunerLayer)}
        self.scales = {path: layer.scaling[self.adapter] for path, layer in self.layers.items()}
        self.bases = {path: layer.base_layer.weight.detach().clone() for path, layer in self.layers.items()}
        self.sizes = {path: base.numel() for path, base in self.bases.items()}
        self.stored = weights_without_head({name: name for name in snapshots.shapes})
        self.rank, self.scale = rank or self.config.r, self.config.lora_alpha / self.config.r
        found = {name.partition(".lora_")[0] for name in self.stored if ".lora_" in name}
        if odd := sorted(found ^ self.layers.keys()):
            raise UserError(
                f"{snapshots.paths[-1]} is of another LoRA than the published one: {len(odd)} layers differ, such as {odd[0]}."
            )

    @torch.no_grad()
    def put(self, alphas: Sequence[float]) -> None:
        """W + sum_i alpha_i scale B_i A_i in the layers, exactly; the adapters are off."""
        for path, update in self.snapshots.folded(alphas, self.sizes, self._add):
            base = self.bases[path]
            self.layers[path].base_layer.weight.copy_(base + update.view_as(base))
        for layer in self.layers.values():
            layer._disable_adapters = True

    @torch.no_grad()
    def put_published(self, alphas: Sequence[float]) -> None:
        """The nearest LoRA of the rank to the combination, on the weights as they were."""
        self.config.r, self.config.lora_alpha = self.rank, self.scale * self.rank
        for path, factors in self.snapshots.folded(alphas, self.sizes, self._append):
            layer, (down, up) = self.layers[path], nearest(*map(torch.cat, factors), self.rank)
            layer.base_layer.weight.copy_(self.bases[path])
            layer.r[self.adapter], layer.scaling[self.adapter] = self.rank, self.scale
            for half, value in ((layer.lora_A, down), (layer.lora_B, up.T / self.scale)):
                old = half[self.adapter].weight
                shape = (len(value), *old.shape[1:]) if half is layer.lora_A else (*value.shape, *old.shape[2:])
                half[self.adapter].weight = nn.Parameter(value.reshape(shape).to(old.dtype), requires_grad=False)
            layer._disable_adapters = False

    def _factors(self, file: safe_open, path: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and scale B^T (r, out) of a layer in the dtype of sums."""
        names = (self.stored[f"{path}.lora_{half}.default.weight"] for half in "AB")
        place = {"device": self.bases[path].device, "dtype": self.snapshots.dtype}
        down, up = (file.get_tensor(name).to(**place).flatten(1) for name in names)
        return down, self.scales[path] * up.T

    def _add(self, total: Tensor | None, file: safe_open, path: str, alpha: float) -> Tensor:
        down, up = self._factors(file, path)
        return added(total, up.T @ down, alpha)

    def _append(
        self, factors: tuple[list[Tensor], list[Tensor]] | None, file: safe_open, path: str, alpha: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        down, up = self._factors(file, path)
        downs, ups = factors or ([], [])
        return [*downs, down], [*ups, alpha * up]


def nearest(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (rank, in) and (rank, out) whose product comes nearest to up^T down, by its singular values.

    The SVD is of what is left between the orthonormal parts of both, at most as large as their number of rows.

    Args:
        down: (n, in).
        up: (n, out).
    """
    (q_down, r_down), (q_up, r_up) = (torch.linalg.qr(half.T) for half in (down, up))
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    roots = s[:rank, None].sqrt()
    halves = roots * (vh[:rank] @ q_down.T), roots * (q_up @ u[:, :rank]).T
    return tuple(nn.functional.pad(half, (0, 0, 0, rank - len(half))) for half in halves)
