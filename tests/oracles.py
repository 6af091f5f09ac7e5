"""Data whose denoiser, probability flow and consistency function are known exactly, and networks that answer with them.

In the coordinates y = x / alpha, lam = sigma / alpha every process is y = x0 + lam * noise, with the flow
dy / dlam = E[noise | y] (2206.00364, Eq. 1). Everything is float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from cm_diffusers.diffusion.process import EDM, Prediction, append_dims


# The scalings, typed from the papers: what the package has is compared with these, never the package with itself.


def lcm_scalings(t, timestep_scaling=10.0, sigma_data=0.5):
    """c_skip and c_out `(B,)` of LCM (2310.04378, Sec. 4.1)."""
    scaled = timestep_scaling * t.double()
    return sigma_data**2 / (scaled**2 + sigma_data**2), scaled / torch.sqrt(scaled**2 + sigma_data**2)


def edm_scalings(sigma, sigma_data):
    """c_skip and c_out `(B,)` of EDM (2206.00364, Table 1)."""
    sigma = sigma.double()
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / torch.sqrt(total)


def cm_scalings(sigma, sigma_min, sigma_data):
    """c_skip and c_out `(B,)` of consistency models (2303.01469, Appendix C)."""
    sigma = sigma.double()
    c_skip = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
    return c_skip, sigma_data * (sigma - sigma_min) / torch.sqrt(sigma_data**2 + sigma**2)


def rates(process, x, t):
    """alpha(t) and sigma(t), shaped to multiply x `(B, ...)`."""
    x = x.double()
    return append_dims(process.alpha(t), x), append_dims(process.sigma(t), x)


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2) in every dimension; a point mass at std = 0."""

    mean: float
    std: float

    def predict(self, process, x_t, t):
        """E[x0 | x_t] and E[noise | x_t]."""
        alpha, sigma = rates(process, x_t, t)
        score = (x_t - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)  # with the sign flipped
        return Prediction(self.mean + alpha * self.std**2 * score, sigma * score)

    def flow(self, process, x_t, t, s):
        """Where the probability-flow ODE takes x_t from t to s."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(process, x_t, t), rates(process, x_t, s)
        ratio = (alpha_s**2 * self.std**2 + sigma_s**2) / (alpha_t**2 * self.std**2 + sigma_t**2)
        return alpha_s * self.mean + ratio.sqrt() * (x_t - alpha_t * self.mean)

    def consistency(self, process, x_t, t):
        """The flow to t = 0, where consistency models start."""
        return self.flow(process, x_t, t, torch.zeros_like(t))


def guided(cond: Gaussian, uncond: Gaussian, w: float) -> Gaussian:
    """The Gaussian whose denoiser is (1 + w) cond - w uncond; both have one std."""
    return Gaussian(cond.mean + w * (cond.mean - uncond.mean), cond.std)


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians in every dimension, independently."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def predict(self, process, x_t, t):
        alpha, sigma = rates(process, x_t, t)
        noise = self._noise(x_t / alpha, sigma / alpha)
        return Prediction((x_t - sigma * noise) / alpha, noise)

    def flow(self, process, x_t, t, s, steps: int = 100):
        """Runge-Kutta 4 in asinh(lam)."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(process, x_t, t), rates(process, x_t, s)
        y, start, end = x_t.double() / alpha_t, torch.asinh(sigma_t / alpha_t), torch.asinh(sigma_s / alpha_s)
        h = (end - start) / steps

        def slope(y, u):
            return self._noise(y, torch.sinh(u)) * torch.cosh(u)

        for i in range(steps):
            u = start + i * h
            k1 = slope(y, u)
            k2 = slope(y + h / 2 * k1, u + h / 2)
            k3 = slope(y + h / 2 * k2, u + h / 2)
            k4 = slope(y + h * k3, u + h)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return alpha_s * y

    def cdf(self, process, x_t, t):
        """P(X_t <= x_t); a one-dimensional flow keeps it."""
        alpha, sigma = rates(process, x_t, t)
        terms = zip(self.weights, self.means, self.stds, strict=True)
        return sum(
            w * torch.special.ndtr((x_t - alpha * m) / (alpha**2 * s**2 + sigma**2).sqrt()) for w, m, s in terms
        )

    def _noise(self, y, lam):
        """E[noise | y]: the components' answers, weighted by their responsibilities."""
        y = y.double().unsqueeze(-1)
        lam = lam.unsqueeze(-1)
        weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds))
        variance = stds**2 + lam**2
        logits = weights.log() - variance.log() / 2 - (y - means).square() / (2 * variance)
        return (logits.softmax(-1) * lam * (y - means) / variance).sum(-1)


def as_output(process, prediction, x_t, t, prediction_type):
    """The network output that means `prediction`."""
    alpha, sigma = rates(process, x_t, t)
    x0, noise = prediction
    outputs = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }
    return outputs[prediction_type]


class OracleNet(nn.Module):
    """The perfect teacher, called as a UNet. Where condition `label` `(B,)` is 0 the data is `uncond`, elsewhere `cond`.

    `calls` holds the batch size of every call.
    """

    def __init__(self, process, prediction_type, cond, uncond=None):
        super().__init__()
        self.process, self.prediction_type, self.cond, self.uncond = process, prediction_type, cond, uncond or cond
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))  # something to train, or to keep from training
        self.calls = []

    def forward(self, x_t, t, label=None, timestep_cond=None, return_dict=True):
        self.calls.append(len(x_t))
        prediction = self.cond.predict(self.process, x_t, t)
        if label is not None:
            other, mask = self.uncond.predict(self.process, x_t, t), append_dims(label, x_t) != 0
            prediction = Prediction(*(torch.where(mask, a, b) for a, b in zip(prediction, other, strict=True)))
        return (self.gain * as_output(self.process, prediction, x_t, t, self.prediction_type),)


class ConsistencyNet(nn.Module):
    """The perfect student: with it, c_skip x + c_out x0 of LCM is the exact consistency function of `data`."""

    def __init__(self, process, prediction_type, data):
        super().__init__()
        self.process, self.prediction_type, self.data = process, prediction_type, data
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x_t, t, label=None, timestep_cond=None, return_dict=True):
        x_t = x_t.double()
        alpha, sigma = rates(self.process, x_t, t)
        c_skip, c_out = (append_dims(c, x_t) for c in lcm_scalings(t))
        x0 = (self.data.consistency(self.process, x_t, t) - c_skip * x_t) / c_out.clamp(min=math.ulp(0.0))
        x0 = torch.where(c_out == 0, x_t, x0)  # the boundary: f = x whatever the network says
        prediction = Prediction(x0, (x_t - alpha * x0) / sigma)
        return (self.gain * as_output(self.process, prediction, x_t, t, self.prediction_type),)


SIGMAS = {  # of c_noise, and sigma_data
    "edm": lambda told, sigma_data: torch.exp(4 * told),
    "adm": lambda told, sigma_data: torch.exp(told / 250),
    "trigflow": lambda told, sigma_data: sigma_data * torch.tan(told),
}


class EDMNet(nn.Module):
    """A network in EDM's coordinates (2206.00364, Eq. 7): its F makes c_skip x + c_out F equal to `answer(x, sigma)`.

    `scalings(sigma)` are those around it. Where condition `class_labels` `(B,)` is 0, `other` answers. `calls` holds the
    batch size of every call.
    """

    def __init__(self, answer, scalings, sigma_data=0.5, noise_conditioning="edm", other=None):
        super().__init__()
        self.answer, self.scalings, self.other = answer, scalings, other or answer
        self.sigma_data, self.noise_conditioning = sigma_data, noise_conditioning
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))  # something to train, or to keep from training
        self.calls = []

    def forward(self, shown, told, class_labels=None, return_dict=True):
        self.calls.append(len(shown))
        shown, sigma = shown.double(), SIGMAS[self.noise_conditioning](told.double(), self.sigma_data)
        x = shown * append_dims((sigma**2 + self.sigma_data**2).sqrt(), shown)
        answer = self.answer(x, sigma)
        if class_labels is not None:
            answer = torch.where(append_dims(class_labels, x) != 0, answer, self.other(x, sigma))
        c_skip, c_out = (append_dims(c, x) for c in self.scalings(sigma))
        inside = c_out.abs() > 1e-6  # at the boundary F does not matter
        return (self.gain * torch.where(inside, (answer - c_skip * x) / torch.where(inside, c_out, 1), 0),)


def edm_teacher(data, uncond=None, **settings):
    """The perfect EDM denoiser of `data`."""
    answers = [lambda x, sigma, data=data: data.predict(EDM(), x, sigma).x0 for data in (data, uncond or data)]
    return EDMNet(
        answers[0], lambda sigma: edm_scalings(sigma, settings.get("sigma_data", 0.5)), other=answers[1], **settings
    )


def edm_student(data, sigma_min=0.002, **settings):
    """The perfect consistency model of `data`, down to sigma_min."""

    def answer(x, sigma):
        return data.flow(EDM(), x, sigma, torch.full_like(sigma, sigma_min))

    scalings = lambda sigma: cm_scalings(sigma, sigma_min, settings.get("sigma_data", 0.5))  # noqa: E731
    return EDMNet(answer, scalings, **settings)


class GridLinear(nn.Module):
    """A network in EDM's coordinates, F = gain[i] shown + bias[i]: every sigma of the grid has its own."""

    def __init__(self, grid):
        super().__init__()
        self.register_buffer("grid", grid)
        self.gain, self.bias = nn.Parameter(torch.zeros(len(grid))), nn.Parameter(torch.zeros(len(grid)))

    def forward(self, shown, told, return_dict=True):
        index = (4 * told.double()[:, None] - self.grid.log()).abs().argmin(1)
        return (self.gain[index][:, None] * shown + self.bias[index][:, None],)
