"""From the scripts of sCM to a published student: sampled as it was trained, in TrigFlow's coordinates."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import run_script

from cm_diffusers import ConsistencyPipeline, TrigFlowConsistencyScheduler
from cm_diffusers.diffusion.trigflow import TrigFlowView
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.evaluation.grids import image_grid
from cm_diffusers.record import read_record
from cm_diffusers.tasks.image_models import StartConfig, load_image_model
from tasks.test_image_runs import COMMON, home, of_data, of_model, shape  # noqa: F401 (a fixture)


def jump(view: TrigFlowView, unet, x, t: float, s: float, cond: dict) -> torch.Tensor:
    """cos(t - s) x - sin(t - s) sigma_data F."""
    with torch.no_grad():
        F = view(unet, x, torch.full((len(x),), t, dtype=torch.float64), cond)
    return math.cos(t - s) * x - math.sin(t - s) * view.sigma_data * F


def published(folder: Path, method: str, guidance: str) -> ConsistencyPipeline:
    pipe, record = ConsistencyPipeline.from_pretrained(folder), read_record(folder)
    assert (record.method, record.guidance) == (method, guidance)
    assert record.scheduler["_class_name"] == "TrigFlowConsistencyScheduler"
    assert type(pipe.scheduler) is TrigFlowConsistencyScheduler
    assert "cm_diffusers must be installed" in (folder / "README.md").read_text()
    return pipe


@pytest.mark.parametrize("segments", [1, 2])
def test_from_data(home: Path, tmp_path: Path, segments: int) -> None:  # noqa: F811
    settings = {"noise_conditioning": "trigflow", "segments": segments, "validation_steps": 4}
    run_script(
        "train_sct", **of_data(home) | {"validation_images": 1}, **settings, **COMMON, output_dir=tmp_path / "run"
    )
    pipe = published(tmp_path / "run" / "pipeline", "sct", "none")
    last = Image.open(tmp_path / "run" / "samples" / "step-000004.png")
    rows = [torch.zeros(1, *shape(pipe))] * {1: 2, 2: 1}[segments]  # of 1 and 2 steps, or of the 2 jumps alone
    assert last.height == image_grid(rows, ["2 steps"] * len(rows), ["seed 0"]).height
    noise, labels, t_max = torch.randn(2, *shape(pipe)), torch.tensor([2, 0]), math.atan(160)
    view = TrigFlowView.of(EDMView(0.5, "trigflow"))
    x, cond = 0.5 * math.sin(t_max) * noise, {"class_labels": labels}
    if segments == 1:
        expected = jump(view, pipe.unet, x, t_max, 0.0, cond).clamp(-1, 1)
        asked = {"num_inference_steps": 1}
    else:
        x = jump(view, pipe.unet, x, t_max, t_max / 2, cond)
        expected, asked = jump(view, pipe.unet, x, t_max / 2, 0.0, cond), {}
    found = pipe(class_labels=labels, latents=noise, output_type="latent", **asked).images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_from_a_model_of_text(home: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = COMMON | {"sigma_min": 0.03, "sigma_max": 14.5, "resolution": 32, "latent_cache_dir": home / "cache"}
    run_script("distill_scd", **of_model(home, "text"), **settings, output_dir=tmp_path / "run")
    pipe = published(tmp_path / "run" / "pipeline", "scd", "distilled")
    view = TrigFlowView.of(load_image_model(StartConfig(str(home / "text"))).view)
    noise, t_max = torch.randn(1, 4, 8, 8), math.atan(14.5 / view.sigma_data)
    cond = {"encoder_hidden_states": pipe.encode_prompt("a coat", "cpu", 1, False)[0]}
    expected = jump(view, pipe.unet, view.sigma_data * math.sin(t_max) * noise, t_max, 0.0, cond)
    found = pipe("a coat", latents=noise, num_inference_steps=1, output_type="latent").images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    pipe("a coat", output_type="latent")
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([14.5, 0.821, 0.0])
