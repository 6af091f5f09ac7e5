"""The report on networks of each kind, on those that stop forward-mode AD, and on those told a time on too large a scale."""

import runpy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from tiny_zoo import ZOO, of_zoo, sana
from torch import Tensor, nn

from cm_diffusers.errors import UserError
from cm_diffusers.models.check_jvp import JVPConfig, check_jvp, load_network
from cm_diffusers.models.double_norm import add_double_norm
from cm_diffusers.models.examples import Example, example_of


BLOCKS = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
ROOT = Path(__file__).parents[2]
TEACHER, SCRIPT = ROOT / "assets" / "fashion_teacher", ROOT / "training" / "check_jvp.py"


@pytest.mark.parametrize("name", ZOO)
def test_jvp_equals_differences(name: str) -> None:
    torch.manual_seed(1)
    report = check_jvp(of_zoo(name))
    assert report.stop is None
    assert report.error_x < 1e-3
    assert report.error_t < 1e-3
    assert report.tangent == "jvp"


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * super().forward(x)[0]


class Known(nn.Module):
    """F = a x + sin(b t), in the form of diffusers; `stops` puts something between that stops forward-mode AD."""

    def __init__(self, a: float, b: float, stops: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.middle = a, b, Recurrent(30, 30) if stops else nn.Identity()

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.middle(self.a * x) + torch.sin(self.b * timestep)[:, None],)


def example(length: float = torch.pi / 2) -> Example:
    torch.manual_seed(0)
    return Example(torch.randn(64, 30), torch.linspace(0.25, 0.75, 64) * length, length, {})


def test_slopes_are_those_of_a_known_function() -> None:
    report = check_jvp(Known(0.5, 0.1), example())
    wanted = (0.1 * torch.cos(0.1 * example().t)).square().mean().sqrt().item()
    assert report.slope_x == pytest.approx(0.5, rel=0.05)
    assert report.slope_t == pytest.approx(wanted, rel=1e-4)
    assert not report.is_steep
    assert "Warning" not in str(report)


def test_slopes_go_by_the_time_of_trigflow() -> None:
    """A network that is told 0 to 1000, and the same told 0 to pi / 2."""
    told = check_jvp(Known(0.5, 0.1 * torch.pi / 2000), example(1000.0))
    assert told.slope_t == pytest.approx(check_jvp(Known(0.5, 0.1), example()).slope_t, rel=1e-3)


def test_a_time_on_too_large_a_scale_is_told() -> None:
    report = check_jvp(Known(0.5, 100.0), example())
    assert report.is_steep
    assert "Warning: |dF/dt| is 1" in str(report)  # 100 / (0.5 sqrt(2)) = 141
    assert "training/tune_time.py" in str(report)


def test_where_forward_ad_stops_is_in_the_report() -> None:
    report = check_jvp(Known(1.0, 0.1, stops=True), example())
    assert report.stop == "middle (Recurrent)"
    assert report.tangent == "central"
    assert report.error_x is report.error_t is None
    assert report.slope_x == pytest.approx(1, rel=0.05)
    assert report.slope_t == pytest.approx(0.1, rel=0.01)
    assert "stops at middle (Recurrent)" in str(report)
    assert "Take --tangent central" in str(report)


class Hidden(Known):
    """What jvp does not see, differences do."""

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.a * x + torch.sin(self.b * timestep).detach()[:, None] + 0.01 * timestep[:, None],)


def test_differences_are_advised_where_jvp_misses_something() -> None:
    report = check_jvp(Hidden(1.0, 1.0), example())
    assert report.stop is None
    assert report.error_t > 1
    assert report.tangent == "central"


def test_times_of_an_example_are_those_that_the_network_is_told() -> None:
    assert example_of(of_zoo("unet")).t.tolist() == [250, 750]
    assert example_of(of_zoo("flux")).t.tolist() == [0.25, 0.75]
    assert example_of(sana(guidance_embeds=True), time_range=2.0).t.tolist() == [0.5, 1.5]
    assert example_of(of_zoo("unet"), time_range=2650, time_start=-1550).t.tolist() == [-887.5, 437.5]
    assert example_of(of_zoo("dit"), 4).arguments["class_labels"].tolist() == [0, 1, 2, 3]


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"^No example can be made for Linear, only for UNet2DModel, .*\.$"):
        check_jvp(nn.Linear(4, 4))


def test_a_pipeline_and_a_network_alone_are_loaded() -> None:
    of_pipeline = load_network(JVPConfig(str(TEACHER)))
    alone = load_network(JVPConfig(str(TEACHER / "unet")))
    by_name = load_network(JVPConfig(str(TEACHER), subfolder="unet"))
    for one in (alone, by_name):
        assert torch.equal(one.conv_in.weight, of_pipeline.conv_in.weight)
    assert not of_pipeline.training


def test_a_network_with_double_normalisation_is_checked_with_it(tmp_path: Path) -> None:
    unet = UNet2DModel(8, 3, 3, **BLOCKS, norm_num_groups=4, resnet_time_scale_shift="scale_shift")
    add_double_norm(unet)
    unet.save_pretrained(tmp_path)
    x, t, again = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1.2]), load_network(JVPConfig(str(tmp_path)))
    with torch.no_grad():
        torch.testing.assert_close(again(x, t)[0], unet.eval()(x, t)[0])


@pytest.mark.parametrize("source", [str(TEACHER / "tokenizer"), "nobody/nothing"])
def test_no_network_is_one_sentence(source: str) -> None:
    with pytest.raises(UserError, match=rf"^{source} has no network that loads: "):
        load_network(JVPConfig(source))


def test_the_command_prints_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_zoo("dit").save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["check_jvp.py", "--pretrained_model", str(tmp_path), "--time_range", "500"])
    runpy.run_path(str(SCRIPT))["main"]()
    said = capsys.readouterr().out
    assert "DiTTransformer2DModel: forward-mode AD passes everywhere." in said
    assert "Take --tangent jvp; for differences, --tangent_step 0.0" in said
