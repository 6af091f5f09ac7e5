"""Any diffusers network seen in EDM's coordinates: F(x, sigma, cond), around which c_skip x + c_out F are built.

x = x0 + sigma * noise `(B, ...)`, sigma `(B,)` in float64 on the CPU; see `preconditioning`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from cm_diffusers.diffusion.denoisers import Call, call_unet
from cm_diffusers.diffusion.guidance import ConditionalDenoiser, Conditions
from cm_diffusers.diffusion.preconditioning import (
    edm_scalings,
    flow_scalings,
    input_scaling,
    noise_condition,
    vp_scalings,
)
from cm_diffusers.diffusion.process import (
    PREDICTION_TYPES,
    DiscreteVP,
    Prediction,
    RectifiedFlow,
    append_dims,
    as_like,
    exact,
)
from cm_diffusers.errors import UserError


class View(Protocol):
    """How a network is called, and the data's standard deviation that its scalings assume."""

    sigma_data: float

    @property
    def sigma_range(self) -> tuple[float, float]: ...
    def told(self, sigma: Tensor) -> Tensor: ...
    def __call__(self, network: Callable, x: Tensor, sigma: Tensor, cond: Conditions) -> Tensor: ...


@dataclass(frozen=True)
class EDMView:
    """A network of EDM (2206.00364, Eq. 7): F = network(c_in x, c_noise).

    Attributes:
        sigma_data: Standard deviation of the data.
        noise_conditioning: "edm", "adm" or "trigflow", see `noise_condition`; part of the architecture.
    """

    sigma_data: float
    noise_conditioning: str

    def __post_init__(self) -> None:
        _check_sigma_data(self.sigma_data)
        noise_condition(torch.ones(()), self.noise_conditioning)

    @property
    def sigma_range(self) -> tuple[float, float]:
        return 0.0, math.inf

    def told(self, sigma: Tensor) -> Tensor:
        """What the network is told of noise levels `(B,)`, in float64."""
        return noise_condition(sigma, self.noise_conditioning, self.sigma_data)

    def __call__(self, network: Callable, x: Tensor, sigma: Tensor, cond: Conditions) -> Tensor:
        """F `(B, ...)`, float32."""
        shown = append_dims(input_scaling(sigma, self.sigma_data), x) * x
        return call_unet(network, shown, as_like(self.told(sigma), x), cond).float()


@dataclass(frozen=True, eq=False)
class VPView:
    """A variance-preserving network: F is what EDM's F would have to be for the same denoiser.

    Attributes:
        process: Its noising process; times between the integers are shown as fractions.
        prediction_type: "epsilon", "v_prediction" or "sample".
        sigma_data: Standard deviation of the data.
        noise_conditioning: What it is told: "own", its time, or "trigflow" after time rescaling.
    """

    process: DiscreteVP
    prediction_type: str
    sigma_data: float
    noise_conditioning: str = "own"

    def __post_init__(self) -> None:
        _check_sigma_data(self.sigma_data)
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(f"Unknown prediction_type {self.prediction_type!r}; one of {', '.join(PREDICTION_TYPES)}.")
        if self.noise_conditioning not in ("own", "trigflow"):
            raise UserError(
                f"Unknown noise_conditioning {self.noise_conditioning!r} of such a network; own or trigflow."
            )

    @cached_property
    def with_signal(self) -> DiscreteVP:
        """The process without the last time of zero terminal SNR, where sigma is infinite."""
        return DiscreteVP(self.process.alphas_cumprod[self.process.alphas_cumprod > 0])

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The sigmas of its first and last time."""
        half_log_snr = self.with_signal.half_log_snr(torch.tensor([0, len(self.with_signal.alphas_cumprod) - 1]))
        low, high = torch.exp(-half_log_snr).tolist()
        return low, high

    def told(self, sigma: Tensor) -> Tensor:
        """What the network is told of noise levels `(B,)`, in float64."""
        if self.noise_conditioning == "own":
            return self.with_signal.time_at(-exact(sigma).log())
        return noise_condition(sigma, self.noise_conditioning, self.sigma_data)

    def __call__(self, network: Callable, x: Tensor, sigma: Tensor, cond: Conditions) -> Tensor:
        """F `(B, ...)`, float32."""
        sigma = exact(sigma)
        shown = append_dims(1 / (1 + sigma**2).sqrt(), x) * x
        output = call_unet(network, shown, as_like(self.told(sigma), x), cond).float()
        on_x, on_output = vp_scalings(sigma, self.sigma_data, self.prediction_type)
        return append_dims(on_x, x) * x + append_dims(on_output, x) * output


@dataclass(frozen=True, eq=False)
class FlowView:
    """A network of rectified flow, which answers noise - x0: F is what EDM's F would have to be for the same denoiser.

    x is 1 + sigma times the sample as it knows it, at its time sigma / (1 + sigma): 1, pure noise, is never reached.

    Attributes:
        sigma_data: Standard deviation of the data; of latents that are normalised, as theirs are, about 1.
        call: Of its architecture, with times of `RectifiedFlow`; see `as_denoiser`.
    """

    sigma_data: float
    call: Call

    def __post_init__(self) -> None:
        _check_sigma_data(self.sigma_data)

    @property
    def sigma_range(self) -> tuple[float, float]:
        return 0.0, math.inf

    def told(self, sigma: Tensor) -> Tensor:
        """Its times t `(B,)` of noise levels, in float64; `call` makes of them what it is told."""
        return RectifiedFlow().time_at(-exact(sigma).log())

    def __call__(self, network: Callable, x: Tensor, sigma: Tensor, cond: Conditions) -> Tensor:
        """F `(B, ...)`, float32."""
        sigma, d = exact(sigma), self.sigma_data
        cos, sin = d * input_scaling(sigma, d), sigma * input_scaling(sigma, d)
        c, on_x, on_output = flow_scalings(cos, sin, d)
        output = self.call(network, append_dims(c * cos, x) * x, as_like(self.told(sigma), x), cond).float()
        return append_dims(-on_x * cos, x) * x - append_dims(on_output, x) * output


def edm_denoiser(view: View, network: Callable) -> ConditionalDenoiser:
    """The network's denoiser (x, sigma, conditions) -> Prediction, for the solvers with the process `EDM`."""

    def denoise(x: Tensor, sigma: Tensor, cond: Conditions) -> Prediction:
        output = view(network, x, sigma, cond)
        c_skip, c_out = edm_scalings(sigma, view.sigma_data)
        c_in = input_scaling(sigma, view.sigma_data)
        x0 = append_dims(c_skip, x) * x + append_dims(c_out, x) * output
        # (x - x0) / sigma without the difference, which has no digits left at small sigma
        noise = append_dims(sigma * c_in**2, x) * x - append_dims(view.sigma_data * c_in, x) * output
        return Prediction(x0, noise)

    return denoise


def check_sigmas(view: View, sigma_min: float, sigma_max: float) -> None:
    """
    Raises:
        ValueError: sigma_min and sigma_max are no range, or go beyond what the network was trained with.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(
            f"--sigma_min {sigma_min} and --sigma_max {sigma_max} are no range; give 0 < sigma_min < sigma_max."
        )
    low, high = view.sigma_range
    if sigma_min < low:
        least = math.ceil(low * 1e4) / 1e4
        raise UserError(f"--sigma_min {sigma_min} is less noise than the network knows; give at least {least}.")
    if sigma_max > high:
        most = math.floor(high * 1e3) / 1e3
        raise UserError(f"--sigma_max {sigma_max} is more noise than the network knows; give at most {most}.")


def _check_sigma_data(sigma_data: float) -> None:
    if not 0 < sigma_data < math.inf:
        raise UserError(f"--sigma_data is {sigma_data}, but the standard deviation of data must be positive.")
