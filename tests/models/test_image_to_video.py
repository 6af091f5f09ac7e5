"""ImageToVideoAdapter: residuals that fit the UNet, change nothing at first, and tell frames apart by their place."""

import math

import pytest
import torch
from diffusers import MotionAdapter, UNetMotionModel
from tiny import tiny_unet

from cm_diffusers.models.image_to_video import ImageToVideoAdapter


def motion_unet(**config) -> UNetMotionModel:
    unet = tiny_unet(**config)
    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    return UNetMotionModel.from_unet2d(unet, adapter).eval()


def three_levels(layers: int | tuple[int, ...]) -> UNetMotionModel:
    return motion_unet(
        block_out_channels=(16, 24, 32),
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    )


def awake(adapter: ImageToVideoAdapter) -> ImageToVideoAdapter:
    """With outputs that are not zero."""
    for layer in (*adapter.outputs, adapter.mid_output):
        torch.nn.init.normal_(layer.weight)
    return adapter


def skips(unet: UNetMotionModel, sample: torch.Tensor, text: torch.Tensor) -> list[torch.Size]:
    """Shapes of the skip connections and of the middle, as the UNet computes them."""
    shapes, modules = [], [unet.conv_in]
    for block in unet.down_blocks:
        modules += [*(block.motion_modules), *(block.downsamplers or [])]
    hooks = [m.register_forward_hook(lambda m, i, out: shapes.append(out.shape)) for m in (*modules, unet.mid_block)]
    unet(sample, 500, text)
    for hook in hooks:
        hook.remove()
    return shapes


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("make", [motion_unet, lambda: three_levels(2), lambda: three_levels((1, 3, 2))])
@torch.no_grad()
def test_residuals_have_the_shapes_of_the_skip_connections(make, side: int) -> None:
    unet, batch, frames = make(), 2, 3
    sample, text = torch.randn(batch, 4, frames, side, side), torch.randn(batch * frames, 5, 32)
    down, middle = ImageToVideoAdapter.from_unet(unet)(torch.randn(batch, 4, side, side), frames)
    assert [part.shape for part in (*down, middle)] == skips(unet, sample, text)


@torch.no_grad()
def test_a_new_adapter_changes_nothing_and_an_awake_one_every_frame() -> None:
    unet = motion_unet()
    adapter = ImageToVideoAdapter.from_unet(unet)
    sample, text, image = torch.randn(2, 4, 3, 8, 8), torch.randn(6, 5, 32), torch.randn(2, 4, 8, 8)

    def result() -> torch.Tensor:
        down, middle = adapter(image, 3)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return unet(sample, 500, text, **residuals).sample

    plain = unet(sample, 500, text).sample
    torch.testing.assert_close(result(), plain, rtol=0, atol=0)
    awake(adapter)
    assert (result() - plain).flatten(3).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_motion_scale_tells_frames_apart() -> None:
    adapter = awake(ImageToVideoAdapter.from_unet(motion_unet()))
    image = torch.randn(2, 4, 8, 8)

    def spread(scale: float) -> list[float]:
        down, middle = adapter(image, 4, motion_scale=scale)
        clips = [part.unflatten(0, (2, 4)) for part in (*down, middle)]
        return [(clip - clip[:, :1]).abs().max().item() for clip in clips]

    assert max(spread(0.0)) < 1e-5
    assert min(spread(0.8)) > 1e-2


@torch.no_grad()
def test_the_place_of_a_frame_is_a_sinusoid_times_motion_scale() -> None:
    adapter, inputs = ImageToVideoAdapter(block_out_channels=(8, 16), norm_num_groups=8), []
    adapter.levels[0][0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    image = torch.randn(1, 4, 8, 8)
    for scale in (0.0, 0.8):
        adapter(image, 5, motion_scale=scale)
    found = (inputs[1] - inputs[0]).mean((2, 3))
    torch.testing.assert_close(inputs[0], adapter.conv_in(image).expand(5, -1, -1, -1))
    for frame in range(5):
        angles = [frame * 10000 ** (-k / 3) for k in range(4)]
        expected = [0.8 * wave(angle) for wave in (math.sin, math.cos) for angle in angles]
        torch.testing.assert_close(found[frame], torch.tensor(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_clip_has_the_residuals_of_its_image() -> None:
    adapter, images = awake(ImageToVideoAdapter.from_unet(motion_unet())), torch.randn(2, 4, 8, 8)
    together = adapter(images, 3)[1].unflatten(0, (2, 3))
    for image, clip in zip(images, together, strict=True):
        torch.testing.assert_close(adapter(image[None], 3)[1], clip)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_every_parameter_learns() -> None:
    """The outputs in the first step, all that is before them from the second on."""
    adapter = ImageToVideoAdapter.from_unet(motion_unet())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        down, middle = adapter(torch.randn(1, 4, 8, 8), 2)
        optimizer.zero_grad()
        sum((part - torch.randn_like(part)).square().mean() for part in (*down, middle)).backward()
        optimizer.step()
    assert {name for name, p in adapter.named_parameters() if p.grad is None or p.grad.abs().max() == 0} == set()


@torch.no_grad()
def test_it_is_saved_and_loaded(tmp_path) -> None:
    adapter, image = awake(ImageToVideoAdapter.from_unet(three_levels((1, 3, 2)))), torch.randn(1, 4, 8, 8)
    adapter.save_pretrained(tmp_path)
    again = ImageToVideoAdapter.from_pretrained(tmp_path)
    torch.testing.assert_close(again(image, 2), adapter(image, 2), rtol=0, atol=0)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()


def test_an_image_unet_has_the_same_adapter() -> None:
    config = {
        name: dict(ImageToVideoAdapter.from_unet(make()).config)
        for name, make in (("2d", tiny_unet), ("3d", motion_unet))
    }
    assert config["2d"] == config["3d"]
