"""The families of boundary scalings f(x, t) = c_skip(t) x + c_out(t) x0_hat(x, t). The one place they are defined."""

from torch import Tensor


def lcm_scalings(t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip and c_out `(B,)` of LCM (2310.04378, Sec. 4.1), float64; exactly (1, 0) at t = 0.

    Args:
        t: Discrete times `(B,)`.
        timestep_scaling: Multiplies t, as `LCMScheduler.config.timestep_scaling`.
    """
    scaled = t.double() * timestep_scaling
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / (scaled**2 + sigma_data**2).sqrt()
    return c_skip, c_out
