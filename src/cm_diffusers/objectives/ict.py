"""Improved consistency training (2310.14189): CT with a robust metric, a doubling grid and no averaged target."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.distances import huber_c, pseudo_huber
from cm_diffusers.diffusion.preconditioning import cm_scalings
from cm_diffusers.diffusion.process import append_dims, as_like
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.times import doubling_intervals, karras_grid, lognormal_probabilities, sample_neighbours
from cm_diffusers.diffusion.views import View, check_sigmas
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class ICTConfig:
    """How the student is compared with itself; Table 1 of the paper."""

    sigma_min: float = HfArg(default=0.002, help="Least noise, where the student is the identity.")
    sigma_max: float = HfArg(default=80.0, help="Most noise, where sampling starts.")
    rho: float = HfArg(default=7.0, help="Curvature of the grid: the greater, the more of it at little noise.")
    discretization_s_0: int = HfArg(default=10, help="s0: how many intervals the grid has at first.")
    discretization_s_1: int = HfArg(default=1280, help="s1: how many it has at the end, after doublings.")
    p_mean: float = HfArg(default=-1.1, help="Mean of ln sigma in training.")
    p_std: float = HfArg(default=2.0, help="Standard deviation of ln sigma in training.")
    huber_c: float | None = HfArg(default=None, help="c of pseudo-Huber; 0.00054 sqrt(d) if not given.")

    def __post_init__(self) -> None:
        check_ranges(self)


class ICTObjective:
    """A jump from t agrees with the student's own jump from s, both from the same data and the same noise.

    The paper has no averaged target: leave `Networks.target` None.

    Args:
        config: See `ICTConfig`.
        view: How the student is called.
    """

    spans_training = True

    def __init__(self, config: ICTConfig, view: View) -> None:
        check_sigmas(view, config.sigma_min, config.sigma_max)
        self.config, self.view = config, view
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        config, x0, device = self.config, batch.x0, batch.x0.device
        grid = self.grid(progress)
        probabilities = lognormal_probabilities(grid, config.p_mean, config.p_std)
        t, s = sample_neighbours(len(x0), grid, probabilities)
        noise = torch.randn_like(x0)
        with torch.no_grad(), rewind_rng(device):  # the student draws the same dropout masks
            x_s = x0 + append_dims(s, x0) * noise
            target = self.consistency(nets.target or nets.student, x_s, s, batch.cond)
        online = self.consistency(nets.student, x0 + append_dims(t, x0) * noise, t, batch.cond)
        c = huber_c(x0[0].numel()) if config.huber_c is None else config.huber_c
        distance = pseudo_huber(online, target, c)
        value = (distance / as_like(t - s, distance)).mean()  # Sec. 3.1
        return Loss(value, {"num_scales": x0.new_full((), len(grid)), "distance": distance.mean().detach()})

    def grid(self, progress: Progress) -> Tensor:
        """The ascending sigmas trained at."""
        config = self.config
        return karras_grid(self.stage(progress) + 1, config.sigma_min, config.sigma_max, config.rho)

    def stage(self, progress: Progress) -> int:
        """Number of intervals of the grid."""
        return doubling_intervals(progress, self.config.discretization_s_0, self.config.discretization_s_1)

    def consistency(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """f(x, sigma) = c_skip x + c_out F (2303.01469, Eq. 5), `(B, ...)`."""
        c_skip, c_out = cm_scalings(sigma, self.config.sigma_min, self.view.sigma_data)
        return append_dims(c_skip, x) * x + append_dims(c_out, x) * self.view(network, x, sigma, cond)
