"""Double normalisation of scale and shift: its formula, what it bounds, and that nobody samples without it unawares."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch.nn.functional import group_norm, silu

from cm_diffusers import ConsistencyImagesPipeline, EDMConsistencyScheduler
from cm_diffusers.diffusion.passable import passable
from cm_diffusers.models.double_norm import NormalizedScaleShift, add_double_norm, double_normed


FILES = Path(__file__).parents[2] / "pipelines"
REQUEST = {"sigmas": [80.0, 0.821], "output_type": "latent"}


def unet2d(time: str = "scale_shift") -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        resnet_time_scale_shift=time,
    ).eval()


def normed() -> UNet2DModel:
    unet = unet2d()
    add_double_norm(unet)
    return unet


def pipeline(unet: UNet2DModel) -> ConsistencyImagesPipeline:
    return quiet(ConsistencyImagesPipeline(unet, EDMConsistencyScheduler(noise_conditioning="trigflow")))


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: DiffusionPipeline) -> torch.Tensor:
    return pipe(latents=torch.ones(1, 3, 8, 8), generator=torch.Generator().manual_seed(0), **REQUEST).images


def test_the_formula_of_a_block() -> None:
    """y = norm(x) pnorm(s) + pnorm(b) (2410.11081, Sec. 4.1) in float64, typed out."""
    block = normed().double().mid_block.resnets[0]
    x, embedding = torch.randn(2, 16, 4, 4, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    s, b = (silu(embedding) @ block.time_emb_proj.weight.T + block.time_emb_proj.bias).split(16, dim=1)
    s, b = (a / (a.pow(2).mean(1, keepdim=True) + 1e-8).sqrt() for a in (s, b))
    hidden = block.conv1(silu(group_norm(x, 4, block.norm1.weight, block.norm1.bias, block.norm1.eps)))
    hidden = group_norm(hidden, 4, block.norm2.weight, block.norm2.bias, block.norm2.eps)
    expected = (x + block.conv2(silu(hidden * s[:, :, None, None] + b[:, :, None, None]))) / block.output_scale_factor
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-12, atol=1e-12)


def test_all_blocks_have_it_once_with_their_own_weights() -> None:
    plain, unet = unet2d(), normed()
    assert double_normed(unet) is unet
    layers = [block.time_emb_proj for block in unet.modules() if isinstance(block, ResnetBlock2D)]
    assert len(layers) == 8  # one in each block on the way down, two in each on the way up, two in the middle
    assert {type(layer) for layer in layers} == {NormalizedScaleShift}
    assert {name: value.tolist() for name, value in unet.state_dict().items()} == {
        name: value.tolist() for name, value in plain.state_dict().items()
    }


def test_it_is_at_home_in_half_precision() -> None:
    layer = NormalizedScaleShift(4, 16).half()
    torch.nn.init.constant_(layer.weight, 0)
    torch.nn.init.constant_(layer.bias, 300)  # whose square float16 has no number for
    torch.testing.assert_close(layer(torch.ones(1, 4).half())[0], torch.tensor([0.0] * 8 + [1.0] * 8).half())


def time_slope(unet: UNet2DModel, factor: float) -> float:
    """The root mean square of dF/dt where all that blocks make of the time is `factor` times as large."""
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            block.time_emb_proj.weight.data *= factor
            block.time_emb_proj.bias.data *= factor
    x, t = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((4,), 1.1)
    with passable(unet), torch.no_grad():
        _, slope = torch.func.jvp(lambda t: unet(x, t).sample, (t,), (torch.ones(4),))
    return slope.square().mean().sqrt().item()


def test_the_derivative_in_time_stays_bounded() -> None:
    assert time_slope(unet2d(), 10) > 5 * time_slope(unet2d(), 1)
    assert time_slope(normed(), 10) == pytest.approx(time_slope(normed(), 1), rel=1e-3)


def test_a_saved_network_has_it_again(tmp_path: Path) -> None:
    pipe = pipeline(normed())
    pipe.save_pretrained(tmp_path)
    expected = sample(pipe)
    assert not torch.allclose(expected, sample(pipeline(unet2d())), atol=0.1)
    assert torch.equal(sample(ConsistencyImagesPipeline.from_pretrained(tmp_path)), expected)
    file = {"custom_pipeline": str(FILES / "consistency_images.py"), "trust_remote_code": True}
    assert torch.equal(sample(DiffusionPipeline.from_pretrained(tmp_path, **file)), expected)


def test_diffusers_alone_refuses_its_folder(tmp_path: Path) -> None:
    """It knows no double normalisation, and weights without it make noise: the index names a class that it lacks."""
    for unet, kind in ((unet2d(), "ConsistencyModelPipeline"), (normed(), "ConsistencyImagesPipeline")):
        folder = tmp_path / kind
        quiet(ConsistencyImagesPipeline(unet, EDMConsistencyScheduler())).save_pretrained(folder)
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == kind


def test_without_a_scale_it_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"--double_norm is for scale and shift, but --unet_config has .* 'default': set"
    ):
        add_double_norm(unet2d("default"))
