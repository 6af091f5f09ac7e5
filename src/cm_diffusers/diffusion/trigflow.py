"""Any diffusers network seen in TrigFlow's coordinates (2410.11081, Sec. 3.1): the one place that converts them.

x = cos(t) x0 + sigma_data sin(t) noise `(B, ...)`, t `(B,)` in float64 on the CPU. F(x, t, cond) is the velocity over
sigma_data: dx / dt = sigma_data F along the flow, cos(t) x - sin(t) sigma_data F is the data.

A network of another process (alpha, sigma) knows the same sample as c x, at its time of the same signal-to-noise ratio:
tan(t) = sigma / (sigma_data alpha), c = alpha / cos(t). F is made of its answer by F = (cos(t) x - D) / (sigma_data sin(t))
with its denoiser D, simplified by hand: no two terms cancel that need not, and t = pi / 2 is no exception where the
network knows pure noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from cm_diffusers.diffusion.denoisers import Call, call_unet
from cm_diffusers.diffusion.guidance import ConditionalDenoiser, Conditions
from cm_diffusers.diffusion.preconditioning import NOISE_CONDITIONINGS, flow_scalings, noise_condition
from cm_diffusers.diffusion.process import DiscreteVP, Prediction, Process, RectifiedFlow, append_dims, as_like, exact
from cm_diffusers.diffusion.views import EDMView, FlowView, VPView
from cm_diffusers.errors import UserError


class Conversion(NamedTuple):
    """F = on_x x + on_output output, for the answer to `shown` x; each `(B,)`."""

    shown: Tensor
    on_x: Tensor
    on_output: Tensor


def _epsilon(cos: Tensor, sin: Tensor, d: float) -> Conversion:
    return Conversion(_vp(cos, sin, d), -sin / (d * cos), 1 / cos)


def _v_prediction(cos: Tensor, sin: Tensor, d: float) -> Conversion:
    c = _vp(cos, sin, d)
    return Conversion(c, cos * sin * (d**2 - 1) / d * c**2, c)


def _sample(cos: Tensor, sin: Tensor, d: float) -> Conversion:
    return Conversion(_vp(cos, sin, d), cos / (d * sin), -1 / (d * sin))


def _vp(cos: Tensor, sin: Tensor, d: float) -> Tensor:
    return 1 / (cos**2 + (d * sin) ** 2).sqrt()


# What a network answers with, by (cos, sin, sigma_data): EDM's F, a variance-preserving or a flow network's prediction.
OUTPUTS: dict[str, Callable[[Tensor, Tensor, float], Conversion]] = {
    "trigflow": lambda cos, sin, d: Conversion(cos.new_full(cos.shape, 1 / d), 0 * cos, cos.new_ones(cos.shape)),
    "edm": lambda cos, sin, d: Conversion(cos.new_full(cos.shape, 1 / d), 0 * cos, -cos.new_ones(cos.shape)),
    "epsilon": _epsilon,
    "v_prediction": _v_prediction,
    "sample": _sample,
    "flow_prediction": lambda cos, sin, d: Conversion(*flow_scalings(cos, sin, d)),
}


@dataclass(frozen=True, eq=False)
class TrigFlowNetwork:
    """What a network is shown and told in TrigFlow's coordinates, and what its answer means, for trainer and sampler.

    Attributes:
        sigma_data: Standard deviation of the data.
        output: One of `OUTPUTS`.
        conditioning: What it is told: one of `NOISE_CONDITIONINGS`, or "own", the time of `process`, times `time_scale`.
        process: Of a network that is told its own time.
        time_scale: 1000 for flow networks that are told 0 to 1000, as diffusers' are.
    """

    sigma_data: float
    output: str = "trigflow"
    conditioning: str = "trigflow"
    process: Process | None = None
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise UserError(f"--sigma_data is {self.sigma_data}, but the standard deviation of data must be positive.")
        for value, known in ((self.output, OUTPUTS), (self.conditioning, ("own", *NOISE_CONDITIONINGS))):
            if value not in known:
                raise UserError(f"{value!r} is not known of a network; one of {', '.join(known)}.")

    @property
    def difference_step(self) -> float:
        """By how much to move what the network is told for a difference: in float32 it errs by some 1e-3 then, or less."""
        own = 5e-5 * self.time_scale if isinstance(self.process, RectifiedFlow) else 0.05
        return {"trigflow": 3e-3, "edm": 2e-4}.get(self.conditioning, own)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The least and greatest sigma that the network knows."""
        if not isinstance(self.process, DiscreteVP):
            return 0.0, math.inf
        low, high = torch.exp(
            -self.process.half_log_snr(torch.tensor([0, self.process.num_train_timesteps - 1]))
        ).tolist()
        return low, high

    def told(self, t: Tensor) -> Tensor:
        """What the network is told of times `(B,)`, in float64."""
        t = exact(t)
        if self.conditioning == "trigflow":
            return t
        sigma = self.sigma_data * torch.tan(t)
        if self.conditioning == "own":
            return self.process.time_at(-sigma.log()) * self.time_scale
        return noise_condition(sigma, self.conditioning, self.sigma_data)

    def times(self, told: Tensor) -> Tensor:
        """The inverse of `told`."""
        if self.conditioning == "trigflow":
            return exact(told)
        if self.conditioning == "own":
            sigma = torch.exp(-self.process.half_log_snr(exact(told) / self.time_scale))
        else:
            sigma = torch.exp(
                exact(told) / noise_condition(torch.tensor(math.e, dtype=torch.float64), self.conditioning)
            )
        return torch.atan(sigma / self.sigma_data)

    def conversion(self, t: Tensor) -> Conversion:
        t = exact(t)
        return OUTPUTS[self.output](torch.cos(t), torch.sin(t), self.sigma_data)


@dataclass(frozen=True, eq=False)
class TrigFlowView(TrigFlowNetwork):
    """How training calls a network.

    Attributes:
        call: Of its architecture, see `as_denoiser`.
    """

    call: Call = call_unet

    @classmethod
    def of(cls, view: EDMView | VPView | FlowView) -> Self:
        """The same network, seen so."""
        if isinstance(view, EDMView):
            return cls(view.sigma_data, "edm", view.noise_conditioning)
        if isinstance(view, FlowView):
            return cls(view.sigma_data, "flow_prediction", "own", RectifiedFlow(), call=view.call)
        return cls(view.sigma_data, view.prediction_type, view.noise_conditioning, view.with_signal)

    def __call__(self, network: Callable, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """F `(B, ...)`, at least float32."""
        shown, on_x, on_output = (append_dims(factor, x) for factor in self.conversion(t))
        output = self.call(network, shown * x, as_like(self.told(t), x), cond)
        return on_x * x + on_output * output.to(torch.promote_types(output.dtype, torch.float32))


def trigflow_denoiser(view: TrigFlowView, network: Callable) -> ConditionalDenoiser:
    """The network's denoiser (x, t, conditions) -> Prediction, for solvers and guidance with the process `TrigFlow`."""

    def denoise(x: Tensor, t: Tensor, cond: Conditions) -> Prediction:
        output, t, d = view(network, x, t, cond), exact(t), view.sigma_data
        cos, sin = append_dims(torch.cos(t), x), append_dims(torch.sin(t), x)
        return Prediction(cos * x - d * sin * output, sin / d * x + cos * output)

    return denoise


def velocity(prediction: Prediction, t: Tensor, sigma_data: float) -> Tensor:
    """dx / dt `(B, ...)` of the flow: cos(t) sigma_data noise - sin(t) x0, whether of data or of a denoiser."""
    cos, sin = (append_dims(function(exact(t)), prediction.x0) for function in (torch.cos, torch.sin))
    return cos * sigma_data * prediction.noise - sin * prediction.x0
