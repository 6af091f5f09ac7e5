"""A student of sCM starts as its teacher: F of any diffusion model, seen in TrigFlow's coordinates, is its own velocity."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from tiny import tiny_scheduler, tiny_unet

from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.diffusion.trigflow import TrigFlowView
from cm_diffusers.diffusion.views import EDMView, VPView


SMALL = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}
T = [0.1, 0.6, 1.1, 1.4]


def rows(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def velocity(x: torch.Tensor, x0: torch.Tensor, t: torch.Tensor, d: float) -> torch.Tensor:
    """dx / dt over d (2410.11081, Sec. 3.1) of a denoiser's answer: cos(t) z - sin(t) x0 with z of x = cos x0 + d sin z."""
    z = (x - t.cos() * x0) / (d * t.sin())
    return (t.cos() * d * z - t.sin() * x0) / d


@torch.no_grad()
@pytest.mark.parametrize("d", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["adm", "edm"])
def test_of_a_model_of_edm(kind: str, d: float) -> None:
    """Its denoiser by 2206.00364, Table 1, typed out."""
    torch.manual_seed(0)
    unet, x, t = UNet2DModel(**SMALL).eval(), d * torch.randn(4, 3, 8, 8), rows(T)
    sigma = d * t.tan()
    noisy = x / t.cos()
    told = {"adm": 250, "edm": 0.25}[kind] * sigma.flatten().log()
    output = unet(noisy / (sigma**2 + d**2).sqrt(), told).sample
    x0 = d**2 / (sigma**2 + d**2) * noisy + sigma * d / (sigma**2 + d**2).sqrt() * output
    found = TrigFlowView.of(EDMView(d, kind))(unet, x, t.flatten().double(), {})
    torch.testing.assert_close(found, velocity(x, x0, t, d), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("d", [0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_of_stable_diffusion(prediction_type: str, d: float) -> None:
    """The denoiser is what diffusers' scheduler makes of the answer at integer times."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler.from_config(tiny_scheduler(prediction_type).config)
    unet, states, times = tiny_unet(), torch.randn(4, 5, 32), [50, 300, 600, 950]
    scheduler.set_timesteps(1000)
    alpha, noise = scheduler.alphas_cumprod.double()[times].sqrt(), torch.randn(4, 4, 8, 8)
    sigma = (1 - alpha**2).sqrt()
    t = torch.atan2(sigma, alpha * d)
    noisy = rows(alpha.tolist()) * d * torch.randn(4, 4, 8, 8) + rows(sigma.tolist()) * noise
    answers = unet(noisy, torch.tensor(times), states).sample
    x0 = torch.cat(
        [
            scheduler.step(answer[None], time, one[None]).pred_original_sample
            for answer, time, one in zip(answers, times, noisy, strict=True)
        ]
    )
    x = noisy * rows((t.cos() / alpha).tolist())
    view = TrigFlowView.of(VPView(DiscreteVP.from_scheduler(scheduler), prediction_type, d))
    found = view(unet, x, t, {"encoder_hidden_states": states})
    torch.testing.assert_close(found, velocity(x, x0, rows(t.tolist()), d), rtol=1e-5, atol=1e-5)


def test_a_rescaled_model_is_told_the_time_itself() -> None:
    vp = DiscreteVP.from_scheduler(tiny_scheduler())
    t = torch.tensor([0.3, math.pi / 2 - 0.1], dtype=torch.float64)
    for view in (VPView(vp, "epsilon", 0.7, "trigflow"), EDMView(0.7, "trigflow")):
        assert torch.equal(TrigFlowView.of(view).told(t), t)
        torch.testing.assert_close(
            view.told(0.7 * t.tan()) if isinstance(view, VPView) else t, t, rtol=1e-12, atol=1e-12
        )
