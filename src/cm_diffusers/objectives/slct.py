"""Improved training of latent consistency models: sLCT (2502.01441), consistency training that survives outliers."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.coupling import load_pot, transport, transport_in_classes
from cm_diffusers.diffusion.distances import cauchy, cauchy_c, l2, pseudo_huber
from cm_diffusers.diffusion.preconditioning import cm_scalings
from cm_diffusers.diffusion.process import append_dims, as_like
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.times import doubling_intervals, karras_grid, lognormal_probabilities, sample_neighbours
from cm_diffusers.diffusion.views import View, check_sigmas
from cm_diffusers.errors import UserError
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class SLCTConfig:
    """How the student is compared with itself and with the data."""

    sigma_min: float = HfArg(default=0.002, help="Least noise, where the student is the identity.")
    sigma_max: float = HfArg(default=80.0, help="Most noise, where sampling starts.")
    rho: float = HfArg(default=7.0, help="Curvature of the grid: the greater, the more of it at little noise.")
    discretization_s_0: int = HfArg(default=10, help="s0: how many intervals the grid has at first.")
    discretization_s_1: int = HfArg(default=640, help="s1: how many it has at the end, after doublings.")
    p_mean: float = HfArg(default=-1.1, help="Mean of ln sigma in training.")
    p_std: float = HfArg(default=2.0, help="Standard deviation of ln sigma in training.")
    loss_type: Literal["cauchy", "pseudo_huber"] = HfArg(default="cauchy", help="Distance between student and target.")
    robust_c: float | None = HfArg(
        default=None, help="c of the distance; by default it falls with every doubling of the grid."
    )
    diffusion_weight: float = HfArg(default=5.0, help="Weight of the diffusion loss at little noise; 0 is none.")
    diffusion_share: float = HfArg(default=0.25, help="Part of the grid, from the least noise, that gets it.")
    coupling: Literal["ot", "class_ot", "independent"] = HfArg(
        default="ot",
        help="ot: noise is matched with data within a batch by optimal transport; needs POT. class_ot: within the classes of "
        "a batch, for a network that takes them: else the noise of a class is not that of sampling.",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, known in (
            ("loss_type", ("cauchy", "pseudo_huber")),
            ("coupling", ("ot", "class_ot", "independent")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"Unknown --{name} {getattr(self, name)!r}; one of {', '.join(known)}.")


class SLCTObjective:
    """A jump from t agrees with the student's own jump from s on a line to the data that optimal transport chose.

    There is no averaged target: leave `Networks.target` None. Networks are made for it by `freeze_norm_scales`.

    Args:
        config: See `SLCTConfig`.
        view: How the student is called.
    """

    spans_training = True

    def __init__(self, config: SLCTConfig, view: View) -> None:
        check_sigmas(view, config.sigma_min, config.sigma_max)
        if config.coupling != "independent":
            load_pot()  # a missing package is told before training
        self.config, self.view = config, view
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        config, x0, device = self.config, batch.x0, batch.x0.device
        grid = self.grid(progress)
        probabilities = lognormal_probabilities(grid, config.p_mean, config.p_std)
        t, s = sample_neighbours(len(x0), grid, probabilities)
        noise = self.coupled(x0, torch.randn_like(x0), batch.cond)
        with torch.no_grad(), rewind_rng(device):  # the student draws the same dropout masks
            x_s = x0 + append_dims(s, x0) * noise
            target = self.consistency(nets.target or nets.student, x_s, s, batch.cond)
        online = self.consistency(nets.student, x0 + append_dims(t, x0) * noise, t, batch.cond)
        low, share = self.low(t, grid, probabilities)
        c = config.robust_c or cauchy_c(x0[0].numel(), len(grid) - 1)
        metric = {"cauchy": cauchy, "pseudo_huber": pseudo_huber}[config.loss_type]
        distance = metric(online, target, c)
        consistency = (distance / as_like(t - s, distance)).mean()
        diffusion = (l2(online, x0) * as_like(low / share, distance)).mean()
        logs = {"consistency": consistency.detach(), "diffusion": diffusion.detach()}
        logs |= {"num_scales": x0.new_full((), len(grid)), "robust_c": x0.new_full((), c)}
        return Loss(consistency + config.diffusion_weight * diffusion, logs)

    def coupled(self, x0: Tensor, noise: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The noise in the order of the data it goes with."""
        if self.config.coupling == "class_ot":
            if "class_labels" not in cond:
                raise UserError("--coupling class_ot needs classes: give --label_column, or --coupling ot.")
            return transport_in_classes(x0, noise, cond["class_labels"])
        return transport(x0, noise) if self.config.coupling == "ot" else noise

    def grid(self, progress: Progress) -> Tensor:
        """The ascending sigmas trained at."""
        config = self.config
        return karras_grid(self.stage(progress) + 1, config.sigma_min, config.sigma_max, config.rho)

    def stage(self, progress: Progress) -> int:
        """Number of intervals of the grid."""
        return doubling_intervals(progress, self.config.discretization_s_0, self.config.discretization_s_1)

    def low(self, t: Tensor, grid: Tensor, probabilities: Tensor) -> tuple[Tensor, float]:
        """Which samples `(B,)` get the diffusion loss, and how many of all do on average.

        Divided by that, not by how many a batch happens to have, each of them counts alike in batches of any size.
        """
        last = math.floor(self.config.diffusion_share * len(probabilities))
        return t <= grid[last], probabilities[:last].sum().item() or 1.0  # 1: there are none

    def consistency(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """f(x, sigma) = c_skip x + c_out F (2303.01469, Eq. 5), `(B, ...)`."""
        c_skip, c_out = cm_scalings(sigma, self.config.sigma_min, self.view.sigma_data)
        return append_dims(c_skip, x) * x + append_dims(c_out, x) * self.view(network, x, sigma, cond)


@torch.no_grad()
def freeze_norm_scales(network: nn.Module) -> None:
    """Norm layers without a trainable scale, the paper's non-scaling norms: ones for good, a bias that starts at 0.

    In place, for a network that starts from scratch. The ones stay in its state, so it loads into the stock class.
    """
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            module.weight.fill_(1).requires_grad_(False)
            if module.bias is not None:
                module.bias.zero_()
