"""AnimateLCM-SVD: the scheduler has the published scalings, is exact on Gaussian data, and drives the stock pipeline."""

import itertools
import math
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from oracles import Gaussian
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from cm_diffusers.diffusion.process import EDM
from cm_diffusers.pipelines.video_diffusion import animatelcm_svd_scheduler, load_animatelcm_svd
from cm_diffusers.schedulers import EDMConsistencyScheduler


STEPS = (1, 2, 4, 8)
DATA = Gaussian(0.3, 0.5)


def at(sigma: float) -> tuple[EDMConsistencyScheduler, torch.Tensor]:
    """The scheduler with one step at sigma, and the timestep of it."""
    scheduler = animatelcm_svd_scheduler()
    scheduler.set_timesteps(sigmas=[sigma])
    return scheduler, scheduler.timesteps[0]


def normal(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestScheduler:
    @pytest.mark.parametrize("sigma", [0.002, 0.4, 1.0, 33.0, 700.0])
    def test_scalings_are_the_published_ones(self, sigma: float) -> None:
        x, output = normal(0), normal(1)
        scheduler, t = at(sigma)
        root = math.sqrt(sigma**2 + 1)
        assert t.item() == pytest.approx(math.log(sigma) / 4, rel=1e-14)
        torch.testing.assert_close(scheduler.scale_model_input(x, t), x / root, rtol=1e-12, atol=0)
        expected = 1 / (sigma**2 + 1) * x - sigma / root * output
        torch.testing.assert_close(scheduler.step(output, t, x).denoised, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("steps", STEPS)
    def test_noise_levels_are_the_published_ones(self, steps: int) -> None:
        scheduler = animatelcm_svd_scheduler()
        scheduler.set_timesteps(steps)
        low, high = 0.002 ** (1 / 7), 700.0 ** (1 / 7)
        levels = [(high + 40 // steps * i / 39 * (low - high)) ** 7 for i in range(steps)]
        assert scheduler.sigmas.tolist() == pytest.approx([*levels, 0.0], rel=1e-12)
        assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(700.0**2 + 1), rel=1e-15)

    def test_at_the_least_noise_the_sample_stays(self) -> None:
        """f(x, sigma_min) = x up to sigma_min times the output: this boundary is at 0."""
        x, output = normal(0), normal(1)
        scheduler, t = at(0.002)
        step = scheduler.step(output, t, x)
        assert torch.equal(step.prev_sample, step.denoised)
        torch.testing.assert_close(step.denoised, x - 0.002 * output, rtol=1e-5, atol=1e-7)

    def test_the_sign_is_that_of_the_stock_scheduler(self) -> None:
        """Without fresh noise a step is Euler's, so the stock one says what "v_prediction" and "epsilon" mean."""
        for kind in ("epsilon", "v_prediction"):
            stock = EDMEulerScheduler(sigma_data=0.5, sigma_max=80.0, prediction_type=kind)
            ours = EDMConsistencyScheduler(
                20,
                noise_conditioning="edm",
                boundary_scalings="edm",
                clip_denoised=False,
                gamma=0.0,
                prediction_type=kind,
            )
            stock.set_timesteps(20)
            ours.set_timesteps(20)
            x, output = normal(0), normal(1)
            stock.scale_model_input(x, stock.timesteps[0])
            expected = stock.step(output, stock.timesteps[0], x).prev_sample
            actual = ours.step(output, ours.timesteps[0], x).prev_sample
            torch.testing.assert_close(actual, expected.double(), rtol=1e-5, atol=1e-5)

    def test_refuses_samples_as_output(self) -> None:
        with pytest.raises(ValueError, match='answers with F, "epsilon", or -F, "v_prediction", got \'sample\''):
            EDMConsistencyScheduler(prediction_type="sample")


class TestOracle:
    """Every step is linear on Gaussian data, so all points of {-1, 1}^steps as noise give its law without an error."""

    @pytest.mark.parametrize("steps", STEPS)
    def test_variance_with_the_exact_velocity(self, steps: int) -> None:
        scheduler = animatelcm_svd_scheduler()
        scheduler.set_timesteps(steps)
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=steps)), dtype=torch.float64)
        start, *noises = signs.split(1, dim=1)
        scheduler.noise_sampler = lambda *_: noises.pop(0)
        x = start * scheduler.init_noise_sigma
        mean, variance = 0.0, 700.0**2 + 1
        for t, sigma, following in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
            x0, noise = DATA.predict(EDM(), x, sigma.view(1))
            velocity = (noise - sigma * x0) / (
                1 + sigma**2
            ).sqrt()  # alpha noise - sigma x0, alpha^2 (1 + sigma^2) = 1
            x = scheduler.step(velocity, t, x).prev_sample
            kept = 0.5**2 / (0.5**2 + sigma.item() ** 2)
            mean, variance = kept * mean + (1 - kept) * DATA.mean, kept**2 * variance + following.item() ** 2
            assert x.mean().item() == pytest.approx(mean, rel=1e-9)
            assert x.var(correction=0).item() == pytest.approx(variance, rel=1e-9)

    def test_the_exact_consistency_function_keeps_the_law(self) -> None:
        scheduler = animatelcm_svd_scheduler()
        scheduler.set_timesteps(4)
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
        start, *noises = signs.split(1, dim=1)
        scheduler.noise_sampler = lambda *_: noises.pop(0)
        x = DATA.mean + start * math.hypot(DATA.std, 700.0)
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            f = DATA.consistency(EDM(), x, sigma.view(1))
            output = (x / (sigma**2 + 1) - f) * (sigma**2 + 1).sqrt() / sigma
            x = scheduler.step(output, t, x).prev_sample
        assert x.mean().item() == pytest.approx(DATA.mean, abs=1e-9)
        assert x.std(correction=0).item() == pytest.approx(DATA.std, rel=1e-9)


def tiny_unet(**config) -> UNetSpatioTemporalConditionModel:
    torch.manual_seed(0)
    shape = {"sample_size": 8, "block_out_channels": (32, 32), "num_attention_heads": (2, 2), "layers_per_block": 1}
    blocks = {
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    }
    time = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "num_frames": 3}
    return UNetSpatioTemporalConditionModel(**{**shape, **blocks, **time, "cross_attention_dim": 8, **config}).eval()


def tiny_parts() -> dict:
    unet = tiny_unet()
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=4,
        force_upcast=False,
    )
    tower = CLIPVisionConfig(
        hidden_size=8, projection_dim=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=56
    )
    return {
        "vae": vae.eval(),
        "image_encoder": CLIPVisionModelWithProjection(tower).eval(),
        "unet": unet,
        "scheduler": EulerDiscreteScheduler(prediction_type="v_prediction"),
        "feature_extractor": CLIPImageProcessor(crop_size=224, size=224),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("svd")
    StableVideoDiffusionPipeline(**tiny_parts()).save_pretrained(home)
    return home


def clip(folder: Path, steps: int, seed: int = 1, guidance: float = 1.5) -> torch.Tensor:
    """Frames (F, 3, H, W) of the stock pipeline, all of whose noise has a seed."""
    generator = torch.Generator().manual_seed(seed)
    pipe = StableVideoDiffusionPipeline.from_pretrained(folder, scheduler=animatelcm_svd_scheduler(generator))
    assert isinstance(pipe.scheduler, EDMConsistencyScheduler)
    pipe.set_progress_bar_config(disable=True)
    image = PIL.Image.new("RGB", (16, 16), "orange")
    size = {"height": 16, "width": 16, "num_inference_steps": steps, "max_guidance_scale": guidance}
    return pipe(image, **size, generator=generator, output_type="pt").frames[0]


class TestStockPipeline:
    @pytest.mark.parametrize("steps", [1, 4])
    def test_samples_by_the_generator_alone(self, folder: Path, steps: int) -> None:
        frames = clip(folder, steps)
        assert frames.shape == (3, 3, 16, 16)
        assert frames.std() > 0.01
        torch.manual_seed(5)
        assert torch.equal(clip(folder, steps), frames)
        assert (clip(folder, steps, seed=2) - frames).abs().max() > 1e-3

    def test_guidance_grows_along_the_frames(self, folder: Path) -> None:
        """From 1, so the first frame has none and the last all of it; the ramp is the stock pipeline's."""
        latents = []
        for guidance in (1.0, 1.5):
            pipe = StableVideoDiffusionPipeline.from_pretrained(folder, scheduler=animatelcm_svd_scheduler())
            pipe.set_progress_bar_config(disable=True)
            asked = {"height": 16, "width": 16, "num_inference_steps": 1, "max_guidance_scale": guidance}
            image, generator = PIL.Image.new("RGB", (16, 16), "orange"), torch.Generator().manual_seed(1)
            latents.append(pipe(image, **asked, generator=generator, output_type="latent").frames[0])
        change = (latents[1] - latents[0]).abs().amax((1, 2, 3))
        assert change[0] < 1e-5 < change[1] < change[2]

    def test_one_step_is_the_networks_answer(self, folder: Path) -> None:
        """From sqrt(700^2 + 1) z the network is shown exactly z, and the result is c_skip x + c_out v."""
        pipe = StableVideoDiffusionPipeline.from_pretrained(folder, scheduler=animatelcm_svd_scheduler())
        pipe.set_progress_bar_config(disable=True)
        calls, z = [], torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        pipe.unet.register_forward_hook(lambda _, given, result: calls.append((given, result[0])))
        asked = {"height": 16, "width": 16, "num_inference_steps": 1, "max_guidance_scale": 1.0, "latents": z}
        result = pipe(PIL.Image.new("RGB", (16, 16), "orange"), **asked, output_type="latent").frames
        ((shown, told), velocity) = calls[0]
        torch.testing.assert_close(shown[:, :, :4], z, rtol=1e-6, atol=1e-6)
        assert told.item() == pytest.approx(math.log(700.0) / 4, rel=1e-6)
        torch.testing.assert_close(result, z / math.hypot(700, 1) - 700 / math.hypot(700, 1) * velocity)


class TestWeights:
    def test_replaces_all(self, tmp_path: Path) -> None:
        unet = tiny_unet()
        published = {name: (weight + 1.0).half() for name, weight in unet.state_dict().items()}
        save_file(published, tmp_path / "svd.safetensors")
        load_animatelcm_svd(unet, tmp_path / "svd.safetensors")
        for name, weight in unet.state_dict().items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, published[name].float()), name

    @pytest.mark.parametrize("how", ["missing", "unknown", "shape"])
    def test_refuses_what_does_not_fit(self, tmp_path: Path, how: str) -> None:
        unet, path = tiny_unet(), tmp_path / "svd.safetensors"
        before = {name: weight.clone() for name, weight in unet.state_dict().items()}
        changed = {name: weight + 1 for name, weight in before.items()}
        if how == "missing":
            del changed["conv_in.bias"]
        elif how == "unknown":
            changed["extra.weight"] = torch.zeros(1)
        else:
            changed["conv_in.bias"] = torch.zeros(7)
        save_file(changed, path)
        name = "extra.weight" if how == "unknown" else "conv_in.bias"
        with pytest.raises(ValueError, match=f"does not fit this UNet: 1 tensors, the first {name}"):
            load_animatelcm_svd(unet, path)
        assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
        assert load_file(path).keys() == changed.keys()
