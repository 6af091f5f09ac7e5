"""Easy consistency tuning (2406.14548): from a diffusion model to a consistency model, by pairs that move together."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.distances import pseudo_huber
from cm_diffusers.diffusion.preconditioning import edm_scalings
from cm_diffusers.diffusion.process import append_dims, as_like, moved_to
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.teaching import Guiding
from cm_diffusers.diffusion.times import easy_ratio, sample_lognormal
from cm_diffusers.diffusion.views import View, check_sigmas
from cm_diffusers.errors import UserError
from cm_diffusers.models.dropout import has_dropout
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


WEIGHTINGS = {
    "inverse": lambda t, r, sigma_data: 1 / (t - r),
    "snrpk": lambda t, r, sigma_data: 1 / t**2 + 1 / sigma_data**2,
}


@dataclass
class ECTConfig:
    """How the student is compared with itself. Defaults are those of CIFAR-10."""

    sigma_min: float = HfArg(default=0.002, help="Least noise; below it the data itself is the target.")
    sigma_max: float = HfArg(default=80.0, help="Most noise, where sampling starts.")
    p_mean: float = HfArg(default=-1.1, help="Mean of ln sigma in training.")
    p_std: float = HfArg(default=2.0, help="Standard deviation of ln sigma in training.")
    mapping: Literal["sigmoid", "const"] = HfArg(
        default="sigmoid", help="How r / t depends on t: nearer to 1 at much noise, or not at all."
    )
    mapping_k: float = HfArg(default=8.0, help="k of the sigmoid: how much further apart pairs are at little noise.")
    mapping_b: float = HfArg(default=1.0, help="b of the sigmoid: the inverse of the sigma where it turns.")
    q: float = HfArg(default=2.0, help="1 - r / t is divided by it in every stage; 256 is the last of 8 stages of 2.")
    stage_steps: int = HfArg(default=25_000, help="Optimizer steps in a stage; 0 stays in the first.")
    huber_c: float = HfArg(default=0.0, help="c of pseudo-Huber; 0 is the norm. 0.06 for ImageNet-64.")
    weighting: Literal["inverse", "snrpk"] = HfArg(
        default="inverse", help="inverse: 1 / (t - r). snrpk: 1 / t^2 + 1 / sigma_data^2, for ImageNet-64."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, known in (("mapping", ("sigmoid", "const")), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise UserError(f"Unknown --{name} {getattr(self, name)!r}; one of {', '.join(known)}.")


class ECTObjective:
    """A jump from t agrees with the student's own jump from r < t, which comes nearer in stages, or with the data.

    At r = 0 this is diffusion, so a diffusion model is a good start: f is its denoiser. The paper has no averaged
    target: leave `Networks.target` None.

    Args:
        config: See `ECTConfig`.
        view: How the student is called.
        guiding: A student that is told its guidance is told of none: there is none in the data.
    """

    def __init__(self, config: ECTConfig, view: View, guiding: Guiding = Guiding()) -> None:  # noqa: B008 (frozen)
        check_sigmas(view, config.sigma_min, config.sigma_max)
        self.config, self.view, self.guiding = config, view, guiding
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        config, x0, device = self.config, batch.x0, batch.x0.device
        batch = replace(batch, cond=self.guiding.student(batch.cond, x0.new_zeros(len(x0))))
        t, r = self.times(len(x0), progress)
        noise = torch.randn_like(x0)
        with torch.no_grad(), rewind_rng(device):  # the student draws the same dropout masks
            target = self.target(nets.target or nets.student, batch, noise, t, r)
        online = self.consistency(nets.student, x0 + append_dims(t, x0) * noise, t, batch.cond)
        distance = pseudo_huber(online, target, config.huber_c)
        weight = WEIGHTINGS[config.weighting](t, r, self.view.sigma_data)
        logs = {"stage": x0.new_full((), self.stage(progress)), "distance": distance.mean().detach()}
        return Loss((as_like(weight, distance) * distance).mean(), logs)

    def target(self, network: nn.Module, batch: Batch, noise: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The jump from r `(B, ...)`, or the data where r is 0.

        The network runs on those samples only that need it; on all where dropout is on, whose masks hang on the batch.
        """
        x0, needed = batch.x0, r > 0
        rows = torch.arange(len(x0)) if has_dropout(network) else needed.nonzero().flatten()
        rows = rows if len(rows) else torch.zeros(1, dtype=torch.int64)  # all ranks call the network equally often
        seen, at = torch.where(needed, r, t)[rows], moved_to(rows, x0)  # networks have no sigma = 0
        x = x0[at] + append_dims(seen, x0) * noise[at]
        jump = self.consistency(network, x, seen, {name: value[at] for name, value in batch.cond.items()})
        return torch.where(append_dims(needed, x0) != 0, x0.index_copy(0, at, jump), x0)

    def stage(self, progress: Progress) -> int:
        """How often 1 - r / t has been divided by q."""
        return progress.step // self.config.stage_steps if self.config.stage_steps else 0

    def times(self, batch_size: int, progress: Progress) -> tuple[Tensor, Tensor]:
        """t and r, each `(B,)`; r is 0 where it would be less than sigma_min."""
        config = self.config
        t = sample_lognormal(batch_size, config.p_mean, config.p_std, config.sigma_min, config.sigma_max)
        k = config.mapping_k if config.mapping == "sigmoid" else 0.0
        r = t * easy_ratio(t, self.stage(progress), config.q, k, config.mapping_b)
        return t, torch.where(r < config.sigma_min, 0, r)

    def consistency(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """f(x, sigma) = c_skip x + c_out F with EDM's scalings, `(B, ...)`: x itself at sigma = 0."""
        c_skip, c_out = edm_scalings(sigma, self.view.sigma_data)
        return append_dims(c_skip, x) * x + append_dims(c_out, x) * self.view(network, x, sigma, cond)
