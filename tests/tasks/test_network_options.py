"""What a network is told of noise, and double normalisation: from the flags to a published folder and a student of it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from scripts import FOLDER, image_folder, run_script

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.diffusion.trigflow import TrigFlowView
from cm_diffusers.publishing.images import network_of, view_of
from cm_diffusers.record import read_record
from cm_diffusers.schedulers import EDMConsistencyScheduler
from cm_diffusers.tasks.image_models import StartConfig, load_image_model


SMALL = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "add_attention": False,
}
COMMON = {"train_batch_size": 2, "max_train_steps": 2, "report_to": "none", "resolution": 8, "validation_images": 0}
NOISE = {"sigma_min": 0.011, "sigma_max": 80.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("options")
    image_folder(home / "data", 4)
    (home / "plain.json").write_text(json.dumps(SMALL))
    (home / "scaled.json").write_text(json.dumps(SMALL | {"resnet_time_scale_shift": "scale_shift"}))
    torch.manual_seed(0)
    DDPMPipeline(UNet2DModel(sample_size=8, **SMALL), DDPMScheduler()).save_pretrained(home / "ddpm")
    new(home, "train_edm", home / "edm", double_norm=True)
    return home


def new(home: Path, script: str, folder: Path, **flags: object) -> None:
    network = {"unet_config": home / "scaled.json", "train_data_dir": home / "data", "output_dir": folder}
    run_script(script, **network | COMMON | flags)


def of(home: Path, model: Path, script: str, folder: Path, **flags: object) -> None:
    network = {"pretrained_teacher_model": model, "train_data_dir": home / "data", "output_dir": folder}
    run_script(script, **network | COMMON | NOISE | flags)


@torch.no_grad()
def one_step(pipe: DiffusionPipeline, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline samples in a step, and cos(t) x - sin(t) sigma_data F, of which training thinks so."""
    noise, t = torch.randn(2, 3, 8, 8), torch.tensor([sigma / 0.5] * 2, dtype=torch.float64).atan()
    x = sigma * noise * t[0].cos()
    f = TrigFlowView.of(view_of(pipe.scheduler.config))(pipe.unet, x, t, {})
    expected = t[0].cos() * x - t[0].sin() * 0.5 * f
    return pipe(latents=noise, sigmas=[sigma], output_type="latent").images, expected.float().clamp(-1, 1)


def test_a_network_told_the_time_of_trigflow_is_sampled_as_it_was_trained(home: Path, tmp_path: Path) -> None:
    options = {"noise_conditioning": "trigflow", "double_norm": True, "learning_rate": 1e-2}
    new(home, "train_sct", tmp_path / "run", **options)
    folder = tmp_path / "run" / "pipeline"
    pipe = ConsistencyPipeline.from_pretrained(folder)
    assert (pipe.scheduler.config.noise_conditioning, pipe.unet.config["double_norm"]) == ("trigflow", True)
    assert pipe.scheduler.timesteps[0].item() == pytest.approx(1.5645464, abs=1e-7)
    for sigma in (80.0, 0.821):
        torch.testing.assert_close(*one_step(pipe, sigma), rtol=1e-4, atol=1e-4)
    file = {"custom_pipeline": str(FOLDER.parent / "pipelines" / "consistency_images.py"), "trust_remote_code": True}
    images = [
        one(2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for one in (pipe, DiffusionPipeline.from_pretrained(folder, **file))
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize(("model", "network"), [("edm/pipeline", "edm"), ("ddpm", "vp")])
def test_a_rescaled_model_is_a_diffusion_model_like_another(
    home: Path, tmp_path: Path, model: str, network: str
) -> None:
    of(home, home / model, "tune_time", tmp_path / "rescaled")
    folder = tmp_path / "rescaled" / "pipeline"
    pipe, record = ConsistencyPipeline.from_pretrained(folder), read_record(folder)
    config = pipe.scheduler.config
    assert (config.network, config.noise_conditioning, config.gamma) == (network, "trigflow", 0.0)
    assert (record.method, record.recommended_num_inference_steps) == ("edm", 35)
    assert bool(pipe.unet.config.get("double_norm")) == (network == "edm")
    torch.testing.assert_close(*one_step(pipe, 80.0), rtol=1e-4, atol=1e-4)
    of(home, folder, "distill_scd", tmp_path / "student")
    student = ConsistencyPipeline.from_pretrained(tmp_path / "student" / "pipeline")
    assert student.scheduler.config.noise_conditioning == "trigflow"
    assert student(output_type="pt").images.isfinite().all()
    with pytest.raises(SystemExit, match="is told TrigFlow's time already"):
        of(home, folder, "tune_time", tmp_path / "twice")


@pytest.mark.parametrize("kind", ["edm", "vp"])
@pytest.mark.parametrize("told", ["own", "trigflow"])
def test_a_scheduler_s_config_tells_the_view(kind: str, told: str) -> None:
    if kind == "edm":
        config = EDMConsistencyScheduler(noise_conditioning="edm" if told == "own" else told, sigma_data=0.7).config
    else:
        stock = DDIMScheduler(500, 0.0001, 0.02, "linear", prediction_type="v_prediction").config
        settings = {name: stock[name] for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
        conditioning = {} if told == "own" else {"noise_conditioning": told}
        config = EDMConsistencyScheduler(
            network="vp",
            num_vp_timesteps=500,
            sigma_min=0.02,
            sigma_max=10.0,
            sigma_data=0.7,
            **settings,
            **conditioning,
        ).config
    settings = network_of(view_of(config))
    assert settings.items() <= config.items()
    assert settings.get("noise_conditioning", "own") == ("edm" if (kind, told) == ("edm", "own") else told)


@pytest.mark.parametrize("kind", ["fourier", "learned"])
def test_an_embedding_that_takes_no_numbers_is_refused(tmp_path: Path, kind: str) -> None:
    unet = UNet2DModel(8, time_embedding_type=kind, num_train_timesteps=1000, **SMALL)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"has a {kind} embedding of its time, which takes no logarithms or fractions"
    ):
        load_image_model(StartConfig(str(tmp_path)))


def test_double_norm_needs_a_scale(home: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match='set it to "scale_shift" there'):
        new(home, "train_sct", tmp_path / "run", unet_config=home / "plain.json", double_norm=True)
