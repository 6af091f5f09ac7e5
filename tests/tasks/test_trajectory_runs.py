"""From the scripts of jumps to anywhere to a published student, which is told where each jump of sampling ends."""

import json
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline
from scripts import run_script

from cm_diffusers import ConsistencyPipeline, TwoTimeUNet2DModel
from cm_diffusers.diffusion.views import EDMView, VPView
from cm_diffusers.models.teachers import is_late
from cm_diffusers.objectives.ctm import CTMConfig, CTMObjective
from cm_diffusers.publishing.images import view_of
from cm_diffusers.record import read_record
from cm_diffusers.tasks.image_models import StartConfig, load_image_model
from tasks.test_image_runs import COMMON, home, of_data, of_model, shape  # noqa: F401 (a fixture)


ROOT = Path(__file__).parents[2]
CTM = {"num_scales": 6, "teacher_intervals": 3, "ema_decay": 0.9, "critic": "none"}
JUDGED = {
    "critic": "heads",
    "critic_channels": 8,
    "adversarial_start": 1,
    "adversarial_ramp": 1,
    "adversarial_balance": "adaptive",
}


def expected(pipe: ConsistencyPipeline, noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Two jumps of the objective itself: from the most noise to the level 1, and from there to the data."""
    view = view_of(pipe.scheduler.config)
    jumps = CTMObjective(CTMConfig(sigma_min=pipe.scheduler.config.sigma_min, sigma_max=14.0), view)
    cond = {} if labels is None else {"class_labels": labels}
    levels = torch.tensor([14.0, 1.0, 0.0], dtype=torch.float64)[:, None].expand(-1, len(noise))
    x = 14.0 * noise
    with torch.no_grad():
        for start, end in pairwise(levels):
            x = jumps.jump(pipe.unet, x, start, end, cond)
    return x


@pytest.mark.parametrize("model", ["edm/pipeline", "ddpm"])
def test_a_trajectory_model_of_a_diffusion_model(home: Path, tmp_path: Path, model: str) -> None:  # noqa: F811
    bounds = {"edm/pipeline": {}, "ddpm": {"sigma_min": 0.011}}[model]
    judged = JUDGED if model == "ddpm" else {}
    run_script("distill_ctm", **of_model(home, model), **CTM | judged, **COMMON, **bounds, output_dir=tmp_path / "run")
    folder = tmp_path / "run" / "pipeline"
    pipe, record = ConsistencyPipeline.from_pretrained(folder), read_record(folder)
    assert (record.method, record.guidance) == ("ctm", "none")
    assert type(pipe.unet) is TwoTimeUNet2DModel
    assert (pipe.scheduler.config.boundary_scalings, pipe.scheduler.config.gamma) == ("edm", 0.0)
    assert type(view_of(pipe.scheduler.config)) is {"edm/pipeline": EDMView, "ddpm": VPView}[model]
    assert pipe.unet.class_embedding.target.linear_2.weight.abs().sum() > 0
    noise = torch.randn(2, *shape(pipe))
    labels = torch.tensor([2, 0]) if model == "edm/pipeline" else None
    pipe.scheduler.register_to_config(clip_denoised=False)
    found = pipe(class_labels=labels, latents=noise, sigmas=[14.0, 1.0], output_type="latent").images
    torch.testing.assert_close(found, expected(pipe, noise, labels), rtol=1e-3, atol=1e-3)
    single = {"custom_pipeline": str(ROOT / "pipelines/consistency_images.py"), "trust_remote_code": True}
    alone = DiffusionPipeline.from_pretrained(folder, **single)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours = ConsistencyPipeline.from_pretrained(folder)
    assert torch.equal(
        *(one(generator=seed, output_type="pt").images for one, seed in zip((alone, ours), seeds, strict=True))
    )


def test_a_finished_one_is_a_denoiser_again(home: Path, tmp_path: Path) -> None:  # noqa: F811
    """Told its own time for the end it is the diffusion model: further methods and likelihoods start from it."""
    run_script("distill_ctm", **of_model(home, "edm/pipeline"), **CTM, **COMMON, output_dir=tmp_path / "run")
    folder = tmp_path / "run" / "pipeline"
    model = load_image_model(StartConfig(str(folder)))
    assert type(model.network) is TwoTimeUNet2DModel
    with mock.patch("cm_diffusers.tasks.image_models.comes_from_the_first", return_value=True):
        known = load_image_model(StartConfig(str(folder))).network
    assert type(known) is TwoTimeUNet2DModel
    assert is_late(known)
    assert {k: v.shape for k, v in known.state_dict().items()} == {
        k: v.shape for k, v in model.network.state_dict().items()
    }
    settings = {"train_batch_size": 2, "num_images": 3, "resolution": 16, "tolerance": 0.1, "num_probes": 2}
    data = {"train_data_dir": home / "data", "label_column": "label", "output_dir": tmp_path / "likelihood"}
    run_script("evaluate_likelihood", pretrained_teacher_model=folder, **data, **settings)
    found = json.loads((tmp_path / "likelihood" / "table.json").read_text())
    assert (found["images"], found["of"]) == (3, "pixels of 8 bits")
    assert 0 < found["bits_per_dimension"] < 30
    assert "bits per dimension" in (tmp_path / "likelihood" / "table.md").read_text()
    again = {"pretrained_teacher_model": folder, "max_train_steps": 1, "checkpointing_steps": 1}
    run_script(
        "distill_ctm", **of_model(home, "edm/pipeline") | again, **CTM, **{k: v for k, v in COMMON.items() if k not in again},
        output_dir=tmp_path / "again",
    )  # fmt: skip


def test_a_mean_flow_from_images_alone_with_guidance(home: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = {"condition_dropout": 0.5, "w": 1.0, "guidance_mix": 0.5, "instant_share": 0.25}
    run_script("train_mean_flow", **of_data(home), **settings, **COMMON, output_dir=tmp_path / "run")
    pipe, record = (read(tmp_path / "run" / "pipeline") for read in (ConsistencyPipeline.from_pretrained, read_record))
    assert (record.method, record.base_model) == ("mean_flow", "")
    assert (record.guidance, record.w_min, record.w_max) == ("distilled", 3.0, 3.0)  # (1 + w) / (1 - kappa) = 4
    assert (pipe.num_classes, pipe.unet.config.num_class_embeds) == (3, 4)  # the last is any
    training = json.loads((tmp_path / "run" / "pipeline" / "training.json").read_text())
    assert "--num_classes 3" in training["command"]
    drawn = pipe(batch_size=64, output_type="pt").class_labels
    assert drawn.max() == 2
    images = pipe(class_labels=[0, 3], num_inference_steps=2, output_type="pt").images
    assert images.isfinite().all()


def test_a_trajectory_model_resumes_as_it_would_have_gone_on(home: Path, tmp_path: Path) -> None:  # noqa: F811
    given = of_model(home, "edm/pipeline") | CTM | COMMON
    run_script("distill_ctm", **given, output_dir=tmp_path / "straight")
    run_script("distill_ctm", **given | {"max_train_steps": 2}, output_dir=tmp_path / "resumed")
    run_script("distill_ctm", **given, resume_from_checkpoint="latest", output_dir=tmp_path / "resumed")
    weights = [
        ConsistencyPipeline.from_pretrained(tmp_path / name / "pipeline").unet.state_dict()
        for name in ("straight", "resumed")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(one.values() for one in weights), strict=True))


def test_what_cannot_be_told_where_to_jump_is_refused(home: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = {"sigma_min": 0.03, "sigma_max": 14.5, "resolution": 32, "latent_cache_dir": home / "cache"}
    with pytest.raises(SystemExit, match="a UNet2DConditionModel, which cannot be told where to jump"):
        run_script(
            "distill_ctm", **of_model(home, "text"), critic="none", **COMMON | settings, output_dir=tmp_path / "run"
        )
    given = {k: v for k, v in of_data(home).items() if k not in ("num_classes", "label_column")}
    with pytest.raises(SystemExit, match="--condition_dropout hides classes"):
        run_script("train_mean_flow", **given, condition_dropout=0.1, **COMMON, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
