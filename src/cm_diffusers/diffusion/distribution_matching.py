"""Distribution matching (DMD, 2311.18828): a student's samples go where a teacher finds them likelier than they are.

How likely they are says the fake score, a diffusion model that learns from the samples while the student does. All are
denoisers in TrigFlow's coordinates, as in rCM (2510.08431), whose published code has the constants.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cm_diffusers.diffusion.guidance import Denoiser
from cm_diffusers.diffusion.process import Prediction, TrigFlow, diffuse
from cm_diffusers.diffusion.times import sample_lognormal
from cm_diffusers.diffusion.trigflow import velocity


LONGEST_ROLLOUT = 4  # steps
TIMES_STD = 1.6  # of ln tan(t), whose mean is 0
LEAST_SCALE = 1e-5


def matching_gradient(x0: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    """`(D_fake - D_teacher) / mean |x0 - D_teacher|`, `(B, ...)`, of denoised x0 (2311.18828, Eq. 7 and 8).

    It falls to 0 as the samples get the teacher's law.
    """
    scale = (x0 - teacher).abs().flatten(1).mean(1).clamp(min=LEAST_SCALE)
    return (fake - teacher) / scale.reshape(-1, *[1] * (x0.ndim - 1))


@dataclass(frozen=True)
class DistributionMatching:
    """What student and fake score minimise.

    Attributes:
        process: Of all denoisers.
        sigma_min, sigma_max: Least and most noise; sampling starts at the most.
    """

    process: TrigFlow
    sigma_min: float
    sigma_max: float

    def student_loss(self, jump: Denoiser, teacher: Denoiser, fake: Denoiser, like: Tensor, step: int) -> Tensor:
        """Mean over the values of `(x0 - sg(x0 - gradient))^2`, `(B,)`.

        Args:
            jump: The student's, to the data.
            like: Of the shape of the samples.
            step: See `rollout`.
        """
        x0 = self.rollout(jump, like, step)
        with torch.no_grad():
            x, t, _ = self.renoised(x0)
            goal = x0 - matching_gradient(x0, teacher(x, t).x0, fake(x, t).x0)
        return (x0 - goal).square().flatten(1).mean(1)

    def fake_loss(self, jump: Denoiser, fake: Denoiser, like: Tensor, step: int) -> Tensor:
        """Mean over the values of `(F_fake - v / sigma_data)^2` on the student's samples, which get no gradient, `(B,)`."""
        with torch.no_grad():
            x0 = self.rollout(jump, like, step)
        x, t, noise = self.renoised(x0)
        d = self.process.sigma_data
        error = velocity(fake(x, t), t, d) - velocity(Prediction(x0, noise), t, d)
        return (error / d).square().flatten(1).mean(1)

    def rollout(self, jump: Denoiser, like: Tensor, step: int) -> Tensor:
        """Samples `(B, ...)` as the student makes them, in 1 to 4 steps with fresh noise, a gradient through the last.

        Args:
            step: Of training. It decides how many: all processes call the network equally often.
        """
        steps = step % LONGEST_ROLLOUT + 1
        times = self.times(steps * len(like)).reshape(steps, -1)
        times[0] = math.atan(self.sigma_max / self.process.sigma_data)
        x0 = torch.zeros_like(like)
        for left, t in zip(reversed(range(steps)), times.cummin(0).values, strict=True):
            with torch.set_grad_enabled(torch.is_grad_enabled() and left == 0):
                x0 = jump(diffuse(self.process, x0, torch.randn_like(like), t), t).x0
        return x0

    def renoised(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t `(B, ...)`, t `(B,)` and the noise."""
        t, noise = self.times(len(x0)), torch.randn_like(x0)
        return diffuse(self.process, x0, noise, t), t, noise

    def times(self, batch_size: int) -> Tensor:
        d = self.process.sigma_data
        return torch.atan(sample_lognormal(batch_size, math.log(d), TIMES_STD, self.sigma_min, self.sigma_max) / d)
