"""Scalings in EDM's coordinates, and diffusers networks seen in them."""

import math

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, UNet2DModel
from oracles import Gaussian, OracleNet, as_output, edm_teacher
from tiny import tiny_scheduler, tiny_unet
from torch import nn

from cm_diffusers.diffusion.denoisers import as_denoiser
from cm_diffusers.diffusion.preconditioning import (
    BOUNDARY_SCALINGS,
    cm_scalings,
    edm_scalings,
    input_scaling,
    noise_condition,
    vp_scalings,
)
from cm_diffusers.diffusion.process import EDM, DiscreteVP, append_dims
from cm_diffusers.diffusion.views import EDMView, VPView, check_sigmas, edm_denoiser


VP = DiscreteVP.from_scheduler(tiny_scheduler())
TYPES = ["epsilon", "v_prediction", "sample"]
VP_SIGMAS = [0.0292, 0.05, 0.5, 1.0, 3.0, 14.6]


def zero_snr():
    config = tiny_scheduler().config
    return DiscreteVP.from_scheduler(type(tiny_scheduler()).from_config(config, rescale_betas_zero_snr=True))


def at(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- scalings


@pytest.mark.parametrize(
    ("sigma", "c_skip", "c_out", "c_in"),
    [(0.5, 1 / 2, 0.25 * 2**0.5, 2**0.5), (1.2, 0.25 / 1.69, 0.6 / 1.3, 1 / 1.3), (0.0, 1, 0, 2)],
)
def test_the_scalings_of_edm(sigma, c_skip, c_out, c_in):
    """sigma_data = 0.5; 1.2, 0.5 and 1.3 are a right triangle."""
    found = [float(c) for c in (*edm_scalings(at(sigma), 0.5), input_scaling(at(sigma), 0.5))]
    assert found == pytest.approx([c_skip, c_out, c_in], rel=1e-14)


def test_the_scalings_of_consistency_models():
    """c_skip is shifted by sigma_min, and c_out's numerator, but not its root."""
    c_skip, c_out = cm_scalings(at(1.2), 0.2, 0.5)
    assert float(c_skip) == pytest.approx(0.25 / (1.0**2 + 0.25), rel=1e-14)
    assert float(c_out) == pytest.approx(1.0 * 0.5 / 1.3, rel=1e-14)


@pytest.mark.parametrize("sigma_data", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("family", "sigma"), [("cm", 0.002), ("edm", 0.0)])
def test_the_boundary_is_exact(family, sigma, sigma_data):
    c_skip, c_out = BOUNDARY_SCALINGS[family](at(sigma), 0.002, sigma_data)
    assert (c_skip.item(), c_out.item()) == (1, 0)


def test_scalings_and_conditions_are_the_stock_scheduler_s():
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    sigmas = scheduler.sigmas
    for ours, theirs in zip(
        cm_scalings(sigmas, 0.002, 0.5), scheduler.get_scalings_for_boundary_condition(sigmas), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    for ours, theirs in zip(edm_scalings(sigmas, 0.5), scheduler.get_scalings(sigmas), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    told = torch.from_numpy(scheduler.sigma_to_t(sigmas.numpy()))
    torch.testing.assert_close(noise_condition(sigmas, "adm"), told, rtol=1e-14, atol=0)


def test_what_networks_are_told_of_sigma():
    assert noise_condition(at(80.0, 1.0), "edm").tolist() == pytest.approx([1.0955066587, 0])
    assert noise_condition(at(80.0, 0.002), "adm").tolist() == pytest.approx([1095.5066587, -1553.6520246])
    assert noise_condition(at(0.0), "adm").item() == pytest.approx(250 * math.log(1e-44))
    with pytest.raises(ValueError, match=r"Unknown --noise_conditioning 'log'; one of edm, adm, trigflow\."):
        noise_condition(at(1.0), "log")


def test_the_time_of_trigflow_ends_at_a_right_angle():
    """2410.11081: sampling of images starts at arctan(80 / 0.5), and its second step is at t = 1.1, sigma = 0.982."""
    assert noise_condition(at(80.0, 0.5), "trigflow", 0.5).tolist() == pytest.approx(
        [1.5645464, math.pi / 4], abs=1e-7
    )
    assert noise_condition(at(0.98238, 0.0), "trigflow", 0.5).tolist() == pytest.approx([1.1, 0.0], abs=1e-5)
    assert noise_condition(at(1.0, 1e9), "trigflow", 1.0).tolist() == pytest.approx(
        [math.pi / 4, math.pi / 2], abs=1e-8
    )


# ---- EDM networks


class Recorder(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.dtype, self.calls = dtype, []

    def forward(self, x, t, **arguments):
        self.calls.append((x, t, arguments))
        return (torch.ones_like(x, dtype=self.dtype),)


@pytest.mark.parametrize("kind", ["edm", "adm", "trigflow"])
def test_what_a_network_of_edm_is_shown(kind):
    network, x, labels = Recorder(torch.bfloat16), torch.randn(2, 3, 4, 4), torch.tensor([1, 2])
    output = EDMView(0.5, kind)(network, x, at(1.2, 80.0), {"class_labels": labels})
    ((shown, told, arguments),) = network.calls
    torch.testing.assert_close(shown, x / torch.tensor([1.3, 80.0015625])[:, None, None, None])
    scale = {"edm": 0.25, "adm": 250}.get(kind)
    logs = [math.log(1.2), math.log(80)]
    expected = [math.atan(2.4), math.atan(160)] if scale is None else [scale * value for value in logs]
    assert told.tolist() == pytest.approx(expected)
    assert (shown.dtype, told.dtype, output.dtype) == (torch.float32,) * 3
    assert arguments["class_labels"] is labels
    assert arguments["return_dict"] is False


def test_conditions_of_sdxl_travel_together():
    network, cond = Recorder(), {"text_embeds": torch.ones(1, 4), "time_ids": torch.ones(1, 6)}
    VPView(VP, "epsilon", 1.0)(network, torch.randn(1, 4), at(1.0), cond)
    assert network.calls[0][2]["added_cond_kwargs"].keys() == cond.keys()


@pytest.mark.parametrize("kind", ["edm", "adm", "trigflow"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_denoiser_of_a_network_of_edm(kind, sigma_data):
    data, sigma = Gaussian(0.3, 0.5), at(0.002, 0.1, 1.0, 80.0)
    x = torch.randn(4, 8, dtype=torch.float64) * sigma[:, None]
    view = EDMView(sigma_data, kind)
    found = edm_denoiser(view, edm_teacher(data, sigma_data=sigma_data, noise_conditioning=kind))(x, sigma, {})
    expected = data.predict(EDM(), x, sigma)
    torch.testing.assert_close(found.x0, expected.x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.noise, expected.noise, rtol=1e-6, atol=1e-6)


def test_noise_keeps_its_digits_at_little_noise():
    """(x - x0) / sigma in float32 is off by 6e-8 |x| / sigma, 3e-5 here."""
    data, sigma = Gaussian(0.3, 0.5), at(0.002).expand(1000)
    x = torch.randn(1000, 8)
    found = edm_denoiser(EDMView(0.5, "edm"), edm_teacher(data))(x, sigma, {})
    exact = data.predict(EDM(), x, sigma).noise
    assert (found.noise - exact).abs().max() < 2e-8
    assert ((x - found.x0) / 0.002 - exact).abs().max() > 1e-5


# ---- variance-preserving networks


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_denoiser_is_the_network_s_own(prediction_type, sigma_data):
    """c_skip x + c_out F of an arbitrary network equals what `interpret` reads in its output at x / sqrt(1 + sigma^2)."""
    x, output = torch.randn(2, 6, 5, dtype=torch.float64)
    network, sigma = (lambda *_, **__: (output.float(),)), at(*VP_SIGMAS)
    found = edm_denoiser(VPView(VP, prediction_type, sigma_data), network)(x, sigma, {})
    t, scale = VP.time_at(-sigma.log()), (1 + sigma**2).sqrt()[:, None]
    expected = as_denoiser(network, VP, prediction_type)(x / scale, t, {})
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_oracle_s_denoiser_is_that_of_edm(prediction_type, sigma_data):
    data, sigma = Gaussian(0.3, 0.5), at(*VP_SIGMAS)
    x = data.mean + (0.25 + sigma[:, None] ** 2).sqrt() * torch.randn(6, 100, dtype=torch.float64)
    view = VPView(VP, prediction_type, sigma_data)
    found = edm_denoiser(view, OracleNet(VP, prediction_type, data))(x, sigma, {})
    expected = data.predict(EDM(), x, sigma)
    torch.testing.assert_close(found.x0, expected.x0, rtol=1e-5, atol=5e-6)  # 14.6 times float32's epsilon
    torch.testing.assert_close(found.noise, expected.noise, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_float32_changes_little(prediction_type, sigma_data):
    """F has magnitude 1; epsilon at sigma = 14.6 and the sample at 0.03 lose digits in any form."""
    data, sigma = Gaussian(0.0, sigma_data), at(*VP_SIGMAS)
    x = (data.std**2 + sigma[:, None] ** 2).sqrt() * torch.randn(6, 1000, dtype=torch.float64)
    output = as_output(VP, data.predict(EDM(), x, sigma), x, VP.time_at(-sigma.log()), prediction_type)
    on_x, on_output = (append_dims(c, x) for c in vp_scalings(sigma, sigma_data, prediction_type))
    exact = on_x * x + on_output * output
    found = VPView(VP, prediction_type, sigma_data)(lambda *_, **__: (output.float(),), x.float(), sigma, {})
    assert found.dtype == torch.float32
    worst = {"epsilon": 14.6, "v_prediction": 2.0, "sample": 35.0}[prediction_type] / sigma_data
    assert (found - exact).abs().max() < 5 * worst * 6e-8 * 4


def test_v_prediction_on_unit_variance_is_edm_with_another_sign():
    """on_x is 0: sCM's remark that v is the output of a network preconditioned for sigma_data = 1."""
    on_x, on_output = vp_scalings(at(*VP_SIGMAS), 1.0, "v_prediction")
    assert on_x.tolist() == [0] * 6
    torch.testing.assert_close(on_output, -torch.ones(6, dtype=torch.float64), rtol=1e-14, atol=0)


def test_networks_are_shown_the_times_they_know():
    t = torch.tensor([0, 1, 500, 999])
    sigma, network = VP.sigma(t) / VP.alpha(t), Recorder()
    x = torch.randn(4, 3)
    VPView(VP, "epsilon", 1.0)(network, x, sigma, {})
    ((shown, told, _),) = network.calls
    torch.testing.assert_close(shown, x * VP.alpha(t)[:, None].float())
    torch.testing.assert_close(told, t.float(), rtol=0, atol=1e-4)
    assert told.dtype == torch.float32


def test_the_range_of_a_stable_diffusion_network():
    assert VPView(VP, "epsilon", 1.0).sigma_range == pytest.approx((0.0291675, 14.6146469), rel=1e-5)
    assert EDMView(0.5, "edm").sigma_range == (0, math.inf)


def test_zero_terminal_snr_ends_before_its_last_time():
    process = zero_snr()
    view = VPView(process, "v_prediction", 1.0)
    low, high = view.sigma_range
    assert high == pytest.approx(float((process.alphas_cumprod[-2] ** -1 - 1).sqrt()), rel=1e-9)
    network = Recorder()
    assert view(network, torch.randn(2, 3), at(low, high), {}).isfinite().all()
    assert network.calls[0][1].tolist() == pytest.approx([0, 998], abs=1e-3)


# ---- the boundary, on real networks


def tiny_image_unet(**config):
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    defaults = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
    return UNet2DModel(**{**defaults, **blocks, "num_class_embeds": 4, **config}).eval()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["edm", "vp"])
def test_f_is_x_at_the_boundary_whatever_the_network_says(name, precision):
    network, view, cond = {
        "edm": (tiny_image_unet(), EDMView(0.5, "adm"), {"class_labels": torch.tensor([0, 3])}),
        "vp": (tiny_unet(), VPView(VP, "epsilon", 1.0), {"encoder_hidden_states": torch.randn(2, 5, 32)}),
    }[name]
    sigma_min = {"edm": 0.002, "vp": 0.0292}[name]
    x = torch.randn(2, network.config.in_channels, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        output = view(network, x, at(sigma_min, 1.0), cond)
        c_skip, c_out = (append_dims(c, x) for c in cm_scalings(at(sigma_min, 1.0), sigma_min, view.sigma_data))
        f = c_skip * x + c_out * output
    assert f.dtype == output.dtype == torch.float32
    assert torch.equal(f[0], x[0])
    assert not torch.equal(f[1], x[1])


# ---- wrong settings


@pytest.mark.parametrize(
    ("view", "sigmas", "message"),
    [
        (EDMView(0.5, "edm"), (80.0, 0.002), "--sigma_min 80.0 and --sigma_max 0.002 are no range; give 0 < sigma_min < sigma_max."),
        (EDMView(0.5, "edm"), (1.0, 1.0), "--sigma_min 1.0 and --sigma_max 1.0 are no range; give 0 < sigma_min < sigma_max."),
        (EDMView(0.5, "edm"), (0.0, 80.0), "--sigma_min 0.0 and --sigma_max 80.0 are no range; give 0 < sigma_min < sigma_max."),
        (VPView(VP, "epsilon", 1.0), (0.002, 14.0), "--sigma_min 0.002 is less noise than the network knows; give at least 0.0292."),
        (VPView(VP, "epsilon", 1.0), (0.03, 80.0), "--sigma_max 80.0 is more noise than the network knows; give at most 14.614."),
    ],
)  # fmt: skip
def test_sigmas_out_of_range(view, sigmas, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        check_sigmas(view, *sigmas)
    assert str(error.value) == message


def test_the_limits_told_are_accepted():
    check_sigmas(VPView(VP, "epsilon", 1.0), 0.0292, 14.614)
    check_sigmas(EDMView(0.5, "adm"), 0.002, 80.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPView(VP, "flow", 1.0), "Unknown prediction_type 'flow'; one of epsilon, v_prediction, sample."),
        (lambda: VPView(VP, "epsilon", 0.0), "--sigma_data is 0.0, but the standard deviation of data must be positive."),
        (lambda: EDMView(-1.0, "edm"), "--sigma_data is -1.0, but the standard deviation of data must be positive."),
        (lambda: EDMView(0.5, "fourier"), "Unknown --noise_conditioning 'fourier'; one of edm, adm, trigflow."),
        (
            lambda: VPView(VP, "epsilon", 1.0, "adm"),
            "Unknown noise_conditioning 'adm' of such a network; own or trigflow.",
        ),
        (lambda: vp_scalings(at(1.0), 0.5, "flow"), "Unknown prediction_type 'flow'; one of epsilon, v_prediction, sample."),
    ],
)  # fmt: skip
def test_wrong_settings(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        make()
    assert str(error.value) == message


def test_a_rescaled_vp_network_is_told_another_time_and_nothing_else():
    x, sigma = torch.randn(2, 4, 4, 4), at(0.5, 14.0)
    own, rescaled = Recorder(), Recorder()
    outputs = [
        VPView(VP, "epsilon", 0.7, told)(net, x, sigma, {}) for net, told in ((own, "own"), (rescaled, "trigflow"))
    ]
    assert torch.equal(*outputs)
    assert torch.equal(own.calls[0][0], rescaled.calls[0][0])
    assert rescaled.calls[0][1].tolist() == pytest.approx([math.atan(0.5 / 0.7), math.atan(20)])
    assert own.calls[0][1].tolist() == pytest.approx(VP.time_at(-sigma.log()).tolist())
