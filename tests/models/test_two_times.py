"""A network that is told where its jump ends: the same at first, saved with its code, sampled with and without this package."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from cm_diffusers import ConsistencyImagesPipeline, ConsistencyPipeline, EDMConsistencyScheduler, TwoTimeUNet2DModel
from cm_diffusers.errors import UserError
from cm_diffusers.models.with_target import with_target
from cm_diffusers.schedulers import TrigFlowConsistencyScheduler


ROOT = Path(__file__).parents[2]


def _unet(classes: int | None = None) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
        norm_num_groups=8,
        layers_per_block=1,
    ).eval()


def _moved(unet: UNet2DModel) -> TwoTimeUNet2DModel:
    """One that heeds its target."""
    network = with_target(unet).eval()
    nn.init.normal_(network.class_embedding.target.linear_2.weight, std=0.5)
    return network


def _pipeline(gamma: float = 0.3) -> ConsistencyImagesPipeline:
    scheduler = EDMConsistencyScheduler(boundary_scalings="edm", gamma=gamma, clip_denoised=False)
    return ConsistencyImagesPipeline(_moved(_unet(4)), scheduler)


def _images(pipe: DiffusionPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe(class_labels=[0, 1], num_inference_steps=3, generator=seed, output_type="pt").images


@pytest.mark.parametrize("classes", [None, 4])
def test_starts_as_the_network_it_was_made_from_wherever_it_jumps(classes: int | None) -> None:
    unet, x, t = _unet(classes), torch.randn(4, 3, 8, 8), torch.rand(4)
    labels = None if classes is None else torch.arange(4)
    found = with_target(unet).eval()(x, t, labels, torch.rand(4)).sample
    torch.testing.assert_close(found, unet(x, t, labels).sample, rtol=0, atol=0)


def test_heeds_the_end_of_each_sample_and_takes_the_time_itself_for_it() -> None:
    network, x, t = _moved(_unet()), torch.randn(3, 3, 8, 8), torch.tensor([1.0, 2.0, 3.0])
    ends = torch.tensor([1.0, 0.5, 3.0])
    found, plain = network(x, t, target_timestep=ends).sample, network(x, t).sample
    assert (found - plain).abs().amax((1, 2, 3)).gt(1e-4).tolist() == [False, True, False]
    alone = network(x[1:2], t[1:2], target_timestep=0.5).sample
    torch.testing.assert_close(found[1:2], alone, rtol=1e-4, atol=1e-5)


def test_the_sampler_tells_it_the_level_before_fresh_noise() -> None:
    scheduler = EDMConsistencyScheduler(boundary_scalings="edm", gamma=0.25, noise_conditioning="edm")
    scheduler.set_timesteps(sigmas=[80.0, 2.0, 0.5])
    x, told = torch.randn(1, 3, 8, 8), []
    for t in scheduler.timesteps:
        told.append(scheduler.target_timestep(t))
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    expected = torch.tensor([1.5, 0.375, 0.002], dtype=torch.float64).log() / 4
    torch.testing.assert_close(torch.stack(told), expected)


def test_same_images_from_its_folder_with_and_without_this_package(tmp_path: Path) -> None:
    pipe = _pipeline()
    images = _images(pipe)
    pipe.save_pretrained(tmp_path)
    ours = ConsistencyPipeline.from_pretrained(tmp_path)
    assert type(ours.unet) is TwoTimeUNet2DModel
    torch.testing.assert_close(_images(ours), images, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    alone = DiffusionPipeline.from_pretrained(
        tmp_path / "again", custom_pipeline=str(ROOT / "pipelines/consistency_images.py"), trust_remote_code=True
    )
    assert type(alone.unet).__module__.startswith("diffusers_modules")
    assert torch.equal(_images(alone), _images(ours))


def test_code_beside_the_weights_is_not_run_unasked(tmp_path: Path) -> None:
    _pipeline().save_pretrained(tmp_path)
    (tmp_path / "unet/cm_diffusers_two_times.py").write_text("raise SystemExit('ran')\n")
    assert type(ConsistencyPipeline.from_pretrained(tmp_path).unet) is TwoTimeUNet2DModel


def test_what_cannot_tell_it_or_be_told_is_refused() -> None:
    with pytest.raises(UserError, match="give an EDMConsistencyScheduler, which says so"):
        ConsistencyImagesPipeline(with_target(_unet()), TrigFlowConsistencyScheduler(network="edm"))
    with pytest.raises(UserError, match="a UNet2DModel with a class_embed_type, which cannot be told"):
        with_target(UNet2DModel(sample_size=8, class_embed_type="timestep"))
