"""Students of sCM, saved and loaded: images are those of EDM's coordinates, and folders name a stock scheduler."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DDIMScheduler, DiffusionPipeline, SCMScheduler
from tiny import tiny_pipeline, tiny_unet, tiny_vae

from cm_diffusers import (
    ConsistencyImagesPipeline,
    ConsistencyPipeline,
    EDMConsistencyScheduler,
    TrigFlowConsistencyScheduler,
)
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.objectives.scm import SCMConfig
from cm_diffusers.publishing.images import images_pipeline, images_record, network_of, text_pipeline
from cm_diffusers.publishing.pipelines import save_pipeline
from cm_diffusers.record import read_record
from cm_diffusers.tasks.image_models import ImageModel
from cm_diffusers.tasks.image_runs import ResultConfig, scm_scheduler
from publishing.test_publish_images import (
    STATISTICS,
    VP,
    config_of,
    drawn,
    entries,
    saved,
    unet2d,
    vp_view,
    without_text,
)


STUDENTS = ["pixels", "latents", "epsilon"]


def scheduler_of(view, **options) -> TrigFlowConsistencyScheduler:
    high = 80.0 if isinstance(view, EDMView) else VP[1]
    options = {"recommended_sigmas": [high, 0.821], **options}
    return TrigFlowConsistencyScheduler(sigma_max=high, **options, **network_of(view))


def in_edm(scheduler: TrigFlowConsistencyScheduler) -> EDMConsistencyScheduler:
    known = {name: value for name, value in config_of(scheduler).items() if value is not None}
    return EDMConsistencyScheduler.from_config(known, boundary_scalings="edm", sigma_min=VP[0])


def student(kind: str):
    if kind == "latents":
        torch.manual_seed(1)
        return images_pipeline(
            unet2d(in_channels=4, out_channels=4), scheduler_of(EDMView(0.5, "edm")), tiny_vae(), STATISTICS
        )
    if kind == "pixels":
        return images_pipeline(unet2d(), scheduler_of(EDMView(0.5, "trigflow"), clip_denoised=True))
    return images_pipeline(without_text(), scheduler_of(vp_view(kind, 0.7)))


@pytest.mark.parametrize("kind", STUDENTS)
def test_without_prompts(kind: str, tmp_path: Path) -> None:
    pipe = student(kind)
    folder = saved(pipe, tmp_path / "student", "sct")
    assert type(pipe.scheduler) is TrigFlowConsistencyScheduler  # saving changes nothing here
    assert read_record(folder).scheduler["_class_name"] == "TrigFlowConsistencyScheduler"
    assert entries(folder)["scheduler"] == ["diffusers", "SCMScheduler"]
    stock = SCMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert config_of(stock) == config_of(pipe.scheduler)
    for loader in (DiffusionPipeline, ConsistencyPipeline, ConsistencyImagesPipeline):
        again = loader.from_pretrained(folder)
        assert type(again) is ConsistencyImagesPipeline
        assert type(again.scheduler) is TrigFlowConsistencyScheduler
        assert config_of(again.scheduler) == config_of(pipe.scheduler)
    for asked in ({}, {"num_inference_steps": 1}, {"num_inference_steps": 4}, {"sigmas": [9.0, 3.0, 0.4, 0.1]}):
        (images, labels), (expected, same) = drawn(again, **asked), drawn(pipe, **asked)
        assert torch.equal(images, expected)
        assert labels == same
    edm = ConsistencyImagesPipeline(
        **{**again.components, "scheduler": in_edm(pipe.scheduler)},
        **{name: again.config[name] for name in ("latents_mean", "latents_std", "sigma_data")},
    )
    for sigmas in ([VP[1]], [VP[1], 0.821], [9.0, 3.0, 0.4, 0.1]):
        (images, _), (expected, _) = drawn(again, sigmas=sigmas), drawn(edm, sigmas=sigmas)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_of_text(tmp_path: Path) -> None:
    view = vp_view("v_prediction")
    pipe = text_pipeline(tiny_pipeline(prediction_type="v_prediction"), tiny_unet(), scheduler_of(view))
    record = images_record("scd", "a/b", "distilled", 0.0, pipe.scheduler, 2)
    save_pipeline(pipe, tmp_path / "student", False, record)
    asked = {"prompt": "a bag", "output_type": "latent"}

    def images(pipe, **more):
        pipe.set_progress_bar_config(disable=True)
        return pipe(**asked, **more, generator=torch.Generator().manual_seed(2)).images

    for loader in (DiffusionPipeline, AutoPipelineForText2Image, ConsistencyPipeline):
        again = loader.from_pretrained(tmp_path / "student")
        assert type(again) is ConsistencyPipeline
        assert type(again.scheduler) is TrigFlowConsistencyScheduler
    again.scheduler.set_timesteps()
    for more in ({}, {"num_inference_steps": 4}, {"timesteps": [1.5, 0.7, 0.2]}):
        assert torch.equal(images(again, **more), images(pipe, **more))
    edm = ConsistencyPipeline.from_pipe(again, scheduler=in_edm(again.scheduler))
    for sigmas in ([14.0], [14.0, 0.821], [9.0, 3.0, 0.4, 0.1]):
        torch.testing.assert_close(images(again, sigmas=sigmas), images(edm, sigmas=sigmas), rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "again")
    assert entries(tmp_path / "again") == entries(tmp_path / "student")


def test_a_scheduler_without_a_network_is_refused() -> None:
    for scheduler in (SCMScheduler(), TrigFlowConsistencyScheduler(), DDIMScheduler()):
        with pytest.raises(ValueError, match=f"{type(scheduler).__name__} does not sample consistency models without"):
            ConsistencyImagesPipeline(unet2d(), scheduler)


class TestOfARun:
    """`scm_scheduler`, which the training scripts take."""

    def made(self, given: list[float] | None = None, vae=None, **method) -> TrigFlowConsistencyScheduler:
        model = ImageModel(unet2d(), EDMView(0.5, "trigflow"), vae)
        return scm_scheduler(model, SCMConfig(**method), ResultConfig(given))

    def test_a_consistency_model(self) -> None:
        config = self.made().config
        assert (config.sigma_max, config.gamma, config.clip_denoised) == (80.0, 1.0, True)
        assert (config.network, config.prediction_type, config.noise_conditioning) == ("edm", "epsilon", "trigflow")
        assert config.recommended_sigmas == [80.0, 0.821]
        assert self.made([80.0, 1.0, 0.3]).config.recommended_sigmas == [80.0, 1.0, 0.3]
        assert not self.made(vae=tiny_vae()).config.clip_denoised

    def test_a_student_of_many_segments_jumps_through_each(self) -> None:
        """Borders at t_max k / 4, where t_max = arctan(160) = 1.564546."""
        scheduler = self.made(segments=4)
        assert (scheduler.config.gamma, scheduler.config.clip_denoised) == (0.0, False)
        scheduler.set_timesteps()
        assert scheduler.timesteps.tolist() == pytest.approx([1.564546, 1.173410, 0.782273, 0.391137], abs=1e-5)
        assert self.made([80.0, 0.5], segments=2).config.recommended_sigmas == [80.0, 0.5]
        with pytest.raises(
            ValueError, match=r"--recommended_sigmas names 2: leave it out, or give 80 1\.191 0\.4969 0\.2062\."
        ):
            self.made([80.0, 0.5], segments=4)
