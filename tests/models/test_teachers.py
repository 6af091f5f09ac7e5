"""The objectives that make a teacher: their losses at the optimum are posterior variances and entropies known exactly."""

import math

import pytest
import torch
from oracles import Gaussian, OracleNet
from tiny import tiny_scheduler, tiny_vae
from torch import nn

from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.objectives.autoencoder import AutoencoderConfig, AutoencoderObjective, AutoencoderWithPosterior
from cm_diffusers.objectives.diffusion import DiffusionConfig, DiffusionObjective
from cm_diffusers.types import Batch, Networks, Progress


VP = DiscreteVP.from_scheduler(tiny_scheduler())
PROGRESS = Progress(0, 10)
COND, UNCOND = Gaussian(1.0, 0.5), Gaussian(-0.5, 0.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_perfect_network_is_left_with_the_posterior_variance(prediction_type):
    """Var[x0 | x_t] = v sigma^2 / (alpha^2 v + sigma^2); noise and v are multiples of x0 at a given x_t."""
    a, v = VP.alphas_cumprod, 0.25
    variance = v * (1 - a) / (a * v + 1 - a)
    factor = {"epsilon": a / (1 - a), "sample": 1.0, "v_prediction": 1 / (1 - a)}[prediction_type]
    objective = DiffusionObjective(DiffusionConfig(prediction_type), VP)
    batch = Batch(1 + 0.5 * torch.randn(20_000, 16, dtype=torch.float64))
    net = OracleNet(VP, prediction_type, COND)
    value = objective(Networks(net), batch, PROGRESS).value.item()
    assert value == pytest.approx((variance * factor).mean().item(), rel=0.02)
    wrong = objective(Networks(OracleNet(VP, prediction_type, UNCOND)), batch, PROGRESS).value.item()
    assert wrong > 1.02 * value


class Listener(nn.Module):
    def forward(self, x_t, t, label, return_dict=True):
        self.label, self.t = label, t
        return (x_t,)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_dropped_conditions(share):
    net, size = Listener(), 4000
    batch = Batch(torch.randn(size, 2), {"label": torch.ones(size, 3)}, {"label": torch.zeros(size, 3)})
    DiffusionObjective(DiffusionConfig(condition_dropout=share), VP)(Networks(net), batch, PROGRESS)
    assert (net.label == net.label[:, :1]).all()  # a sample keeps or loses its whole condition
    assert 1 - net.label.mean().item() == pytest.approx(share, abs=0.04 if 0 < share < 1 else 0)
    counts = torch.bincount(net.t, minlength=1000)
    assert len(counts) == 1000
    assert counts.max() < 20


def test_every_time_is_trained_at():
    net, process = Listener(), DiscreteVP(VP.alphas_cumprod[:10])
    batch = Batch(torch.randn(4000, 1), {"label": torch.ones(4000, 1)}, {"label": torch.zeros(4000, 1)})
    DiffusionObjective(DiffusionConfig(), process)(Networks(net), batch, PROGRESS)
    counts = torch.bincount(net.t)
    assert len(counts) == 10
    assert (counts - 400).abs().max() < 100


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_the_share_is_a_share(share):
    with pytest.raises(ValueError, match=f"--condition_dropout is {share}; give a share between 0 and 1"):
        DiffusionObjective(DiffusionConfig(condition_dropout=share), VP)


class Known(nn.Module):
    """Reconstructs with a constant error from a posterior N(0.5, e) on 2x3 latents."""

    def forward(self, x):
        return x + 0.2, torch.full((len(x), 2, 3), 0.5), torch.full((len(x), 2, 3), 1.0)


def test_terms_of_the_autoencoder():
    """KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2 for each of 6 latents."""
    kl = 6 * (0.25 + math.e - 1 - 1) / 2
    objective = AutoencoderObjective(AutoencoderConfig(kl_weight=0.1, l1_weight=2.0))
    loss = objective(Networks(Known()), Batch(torch.randn(3, 3, 4, 4)), PROGRESS)
    assert {k: v.item() for k, v in loss.logs.items()} == pytest.approx({"mse": 0.04, "l1": 0.2, "kl": kl}, rel=1e-5)
    assert loss.value.item() == pytest.approx(0.04 + 2 * 0.2 + 0.1 * kl, rel=1e-5)


def test_latents_are_drawn_from_the_posterior():
    vae, x = tiny_vae(), torch.rand(1, 3, 32, 32)
    drawn, decode = [], vae.decode
    vae.decode = lambda z: drawn.append(z) or decode(z)
    with torch.no_grad():
        for _ in range(100):
            _, mean, logvar = AutoencoderWithPosterior(vae)(x)
    z = (torch.cat(drawn) - mean) / (logvar / 2).exp()
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert z.var().item() == pytest.approx(1, abs=0.05)
