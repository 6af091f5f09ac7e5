"""The scalings around a network: boundary families f = c_skip x + c_out (output), and inputs in EDM's coordinates.

The one place they are defined. In EDM's coordinates x = x0 + sigma * noise, sigma is the time, and F is the output of
a network of EDM (2206.00364, Eq. 7). All answers are in float64 on the CPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cm_diffusers.diffusion.process import PREDICTION_TYPES, exact
from cm_diffusers.errors import UserError


def lcm_scalings(t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip and c_out `(B,)` of LCM (2310.04378, Sec. 4.1), float64; exactly (1, 0) at t = 0.

    Args:
        t: Discrete times `(B,)`.
        timestep_scaling: Multiplies t, as `LCMScheduler.config.timestep_scaling`.
    """
    scaled = exact(t) * timestep_scaling
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / (scaled**2 + sigma_data**2).sqrt()
    return c_skip, c_out


def input_scaling(sigma: Tensor, sigma_data: float) -> Tensor:
    """c_in `(B,)` of EDM (2206.00364, Table 1): c_in x has unit variance."""
    return 1 / (exact(sigma) ** 2 + sigma_data**2).sqrt()


def edm_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out `(B,)` of EDM's denoiser (2206.00364, Table 1); exactly (1, 0) at sigma = 0."""
    sigma = exact(sigma)
    return 1 / (1 + (sigma / sigma_data) ** 2), sigma * sigma_data * input_scaling(sigma, sigma_data)


def cm_scalings(sigma: Tensor, sigma_min: float, sigma_data: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out `(B,)` of consistency models (2303.01469, Appendix C); exactly (1, 0) at sigma = sigma_min."""
    shifted = exact(sigma) - sigma_min
    return 1 / (1 + (shifted / sigma_data) ** 2), shifted * sigma_data * input_scaling(sigma, sigma_data)


# (sigma, sigma_min, sigma_data) -> (c_skip, c_out): where f(x, sigma) = x, at sigma_min or at 0
BOUNDARY_SCALINGS: dict[str, Callable[[Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "cm": cm_scalings,
    "edm": lambda sigma, sigma_min, sigma_data: edm_scalings(sigma, sigma_data),
}

# (sigma, sigma_data) -> c_noise, what a network is told of sigma: part of its architecture. "adm" as
# `CMStochasticIterativeScheduler`; "trigflow" is the time of sCM (2410.11081, Sec. 4.1), which ends at pi / 2.
NOISE_CONDITIONINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "edm": lambda sigma, sigma_data: sigma.log() / 4,
    "adm": lambda sigma, sigma_data: 1000 * torch.log(sigma + 1e-44) / 4,
    "trigflow": lambda sigma, sigma_data: torch.atan(sigma / sigma_data),
}


def noise_condition(sigma: Tensor, kind: str, sigma_data: float = 0.5) -> Tensor:
    """c_noise `(B,)`: ln(sigma) / 4 for networks of EDM, 1000 times that for ADM's and diffusers' `UNet2DModel`.

    Args:
        kind: One of `NOISE_CONDITIONINGS`.
        sigma_data: Of the data; "trigflow" depends on it. Its times go from 0 to pi / 2, of which the positional embedding
            of diffusers makes waves of frequencies from 1 to 1e-4, as slow as the paper wants them.
    """
    if kind not in NOISE_CONDITIONINGS:
        raise UserError(f"Unknown --noise_conditioning {kind!r}; one of {', '.join(NOISE_CONDITIONINGS)}.")
    return NOISE_CONDITIONINGS[kind](exact(sigma), sigma_data)


def flow_scalings(cos: Tensor, sin: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """c, on_x and on_output `(B,)`: of a sample x in TrigFlow's coordinates, rectified flow's network is shown c x.

    Its answer v = noise - x0 (2209.03003) makes F = on_x x + on_output v, TrigFlow's F; EDM's is -F. For sigma_data = 1 this
    is the form of SANA-Sprint (2503.09641, Eq. 9).
    """
    c = 1 / (cos + sigma_data * sin)
    return c, c * (sigma_data * cos - sin) / sigma_data, c


def vp_scalings(sigma: Tensor, sigma_data: float, prediction_type: str) -> tuple[Tensor, Tensor]:
    """on_x and on_output `(B,)` with F = on_x x + on_output output, for the output of a variance-preserving network.

    The network is shown x / sqrt(1 + sigma^2). F is (D - c_skip x) / c_out with its denoiser D and EDM's scalings,
    simplified by hand: no two terms cancel that need not.

    Args:
        prediction_type: What the output is: "epsilon", "v_prediction" or "sample".
    """
    sigma = exact(sigma)
    edm, vp = (sigma**2 + sigma_data**2).sqrt(), (1 + sigma**2).sqrt()
    if prediction_type == "epsilon":  # D = x - sigma output
        return sigma / (sigma_data * edm), -edm / sigma_data
    if prediction_type == "v_prediction":  # D = (x - sigma vp output) / vp^2
        return sigma * (1 - sigma_data**2) / (sigma_data * vp**2 * edm), -edm / (sigma_data * vp)
    if prediction_type == "sample":  # D = output
        return -sigma_data / (sigma * edm), edm / (sigma * sigma_data)
    raise UserError(f"Unknown prediction_type {prediction_type!r}; one of {', '.join(PREDICTION_TYPES)}.")
