"""Students in EDM's coordinates, saved and loaded: what was trained is what is sampled, with the package and without."""

import json
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    UNet2DModel,
)
from oracles import cm_scalings, edm_scalings
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet, tiny_vae
from tiny_xl import tiny_xl_pipeline, tiny_xl_unet

from cm_diffusers import ConsistencyImagesPipeline, ConsistencyPipeline, EDMConsistencyScheduler
from cm_diffusers.diffusion.process import DiscreteVP, append_dims
from cm_diffusers.diffusion.views import EDMView, VPView
from cm_diffusers.publishing.images import images_pipeline, images_record, network_of, text_pipeline
from cm_diffusers.publishing.pipelines import save_pipeline
from cm_diffusers.record import read_record


CLASSES = 5
STATISTICS = SimpleNamespace(mean=[0.1, -0.2, 0.3, 0.0], std=[0.5, 1.0, 2.0, 4.0])
EDM, VP = (0.002, 80.0), (0.03, 14.0)  # sigma_min, sigma_max
SCHEDULES = [
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "beta_end": 0.015},
    {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
]


def unet2d(**config) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
    return UNet2DModel(**{**blocks, **sizes, "num_class_embeds": CLASSES, **config}).eval()


def without_text(**config):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return tiny_unet(mid_block_type="UNetMidBlock2D", num_class_embeds=CLASSES, **blocks, **config)


def vp_view(prediction_type: str = "epsilon", sigma_data: float = 0.5) -> VPView:
    return VPView(DiscreteVP.from_scheduler(tiny_scheduler()), prediction_type, sigma_data)


def scheduler_of(view, boundary: str = "cm", recommended: list[float] | None = None, **options):
    low, high = EDM if isinstance(view, EDMView) else VP
    options = {"sigma_min": low, "sigma_max": high, "num_train_timesteps": 18, "clip_denoised": False, **options}
    return EDMConsistencyScheduler(
        boundary_scalings=boundary, recommended_sigmas=recommended, **options, **network_of(view)
    )


def latents_student() -> tuple:
    view = EDMView(0.5, "edm")
    torch.manual_seed(1)
    vae = tiny_vae()
    unet = unet2d(in_channels=4, out_channels=4)
    return images_pipeline(unet, scheduler_of(view, "edm", [80.0, 1.526]), vae, STATISTICS), view


def student(kind: str) -> tuple:
    """A pipeline without prompts, and the view that its network was trained in."""
    if kind == "latents":
        return latents_student()
    if kind == "pixels":
        view = EDMView(0.5, "adm")
        return images_pipeline(unet2d(), scheduler_of(view, recommended=[80.0, 0.821], clip_denoised=True)), view
    view = vp_view(kind, 0.7)
    return images_pipeline(without_text(), scheduler_of(view)), view


STUDENTS = ["pixels", "latents", "epsilon", "v_prediction"]


def in_our_class(pipe) -> ConsistencyImagesPipeline:
    """The stock pipeline knows no latents as its result and draws labels without the generator."""
    if isinstance(pipe, ConsistencyImagesPipeline):
        return pipe
    return ConsistencyImagesPipeline(pipe.unet, EDMConsistencyScheduler.from_config(pipe.scheduler.config))


def drawn(pipe, **asked) -> tuple[torch.Tensor, list[int]]:
    pipe.set_progress_bar_config(disable=True)
    result = pipe(3, generator=torch.Generator().manual_seed(2), output_type="pt", **asked)
    return result.images, result.class_labels.tolist()


def saved(pipe, folder: Path, method: str = "ect", fp16: bool = False) -> Path:
    save_pipeline(pipe, folder, fp16, images_record(method, "", "none", 0.0, pipe.scheduler, 2))
    return folder


@pytest.mark.parametrize("config", SCHEDULES)
def test_the_noise_of_a_teacher_is_kept_to_the_last_bit(config: dict, tmp_path: Path) -> None:
    view = VPView(DiscreteVP.from_scheduler(DDIMScheduler(1000, **config)), "epsilon", 0.5)
    scheduler_of(view, sigma_min=0.1, sigma_max=10.0).save_pretrained(tmp_path)
    found = EDMConsistencyScheduler.from_pretrained(tmp_path).config
    fields = {name: found[name] for name in ("beta_start", "beta_end", "beta_schedule", "trained_betas")}
    again = LCMScheduler(found.num_vp_timesteps, **fields)
    assert (found.trained_betas is None) == (len(config) != 2)  # beta by beta only where it must be
    ulp = 2.0**-23 if "rescale_betas_zero_snr" in config else 0.0  # where the last factors are 0.3
    torch.testing.assert_close(again.alphas_cumprod.double(), view.with_signal.alphas_cumprod, rtol=ulp, atol=0)
    assert (found.network, found.prediction_type, found.sigma_min, found.rho) == ("vp", "epsilon", 0.1, 7.0)


@pytest.mark.parametrize("boundary", ["cm", "edm"])
@pytest.mark.parametrize(
    "view", [EDMView(0.5, "adm"), EDMView(0.7, "edm"), vp_view(), vp_view("v_prediction", 0.7), vp_view("sample")]
)
def test_one_step_is_the_consistency_function_of_training(view, boundary: str) -> None:
    unet = unet2d(num_class_embeds=None) if isinstance(view, EDMView) else without_text()
    pipe = images_pipeline(unet, scheduler_of(view, boundary))
    noise, labels = torch.randn(2, unet.config.in_channels, 8, 8), None
    asked = {"batch_size": 2, "latents": noise, "output_type": "latent", "num_inference_steps": 1}
    if unet.config.num_class_embeds:
        asked["class_labels"] = labels = torch.tensor([4, 0])
    low, high = EDM if isinstance(view, EDMView) else VP
    sigma = torch.full((2,), high, dtype=torch.float64)
    cond = {} if labels is None else {"encoder_hidden_states": None, "class_labels": labels}
    with torch.no_grad():
        output = view(unet, high * noise, sigma, cond)
    scalings = cm_scalings(sigma, low, view.sigma_data), edm_scalings(sigma, view.sigma_data)
    c_skip, c_out = scalings[boundary == "edm"]
    expected = append_dims(c_skip, noise) * high * noise + append_dims(c_out, noise) * output
    torch.testing.assert_close(in_our_class(pipe)(**asked).images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("asked", [{"num_inference_steps": 1}, {"num_inference_steps": 2}])
def test_a_saved_student_makes_the_same_images(kind: str, asked: dict, tmp_path: Path) -> None:
    pipe, view = student(kind)
    again = ConsistencyPipeline.from_pretrained(saved(pipe, tmp_path / "student"))
    assert type(again) is ConsistencyImagesPipeline
    assert again.scheduler.config.sigma_data == view.sigma_data
    (images, labels), (expected, same) = drawn(again, **asked), drawn(in_our_class(pipe), **asked)
    assert torch.equal(images, expected)
    assert labels == same
    assert len(set(labels)) > 1
    other, _ = drawn(again, class_labels=[(label + 1) % CLASSES for label in labels], **asked)
    assert (other - images).abs().amax() > 1e-4


def test_statistics_of_the_latents_travel(tmp_path: Path) -> None:
    pipe, _ = student("latents")
    again = ConsistencyPipeline.from_pretrained(saved(pipe, tmp_path / "student"))
    found = again.config.latents_mean, again.config.latents_std, again.config.sigma_data
    assert found == (STATISTICS.mean, STATISTICS.std, 0.5)
    plain = images_pipeline(pipe.unet, scheduler_of(EDMView(0.5, "edm"), "edm"), pipe.vae)
    asked = {"latents": torch.ones(1, 4, 8, 8), "class_labels": 1, "output_type": "latent", "num_inference_steps": 1}
    mean, std = (torch.tensor(values).view(4, 1, 1) for values in (STATISTICS.mean, STATISTICS.std))
    torch.testing.assert_close(again(**asked).images, plain(**asked).images * std / 0.5 + mean)


def test_recommended_levels_are_the_default(tmp_path: Path) -> None:
    for kind, sigmas in (("pixels", [80.0, 0.821, 0.002]), ("latents", [80.0, 1.526, 0.0])):
        again = ConsistencyPipeline.from_pretrained(saved(student(kind)[0], tmp_path / kind))
        drawn(again)
        assert again.scheduler.sigmas.tolist() == sigmas


class TestStock:
    def test_every_field_comes_back(self, tmp_path: Path) -> None:
        options = {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 5.0, "num_train_timesteps": 30, "clip_denoised": True}
        scheduler = scheduler_of(EDMView(0.7, "adm"), recommended=[50.0, 0.9], **options)
        pipe = images_pipeline(unet2d(), scheduler)
        assert type(pipe) is ConsistencyModelPipeline
        again = ConsistencyPipeline.from_pretrained(saved(pipe, tmp_path / "student")).scheduler
        assert type(again) is EDMConsistencyScheduler
        fields = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        assert {name: again.config[name] for name in fields} == fields
        assert (again.config.sigma_data, again.config.num_train_timesteps) == (0.7, 30)

    @pytest.mark.parametrize("fp16", [False, True])
    def test_diffusers_alone_makes_the_same_image(self, fp16: bool, tmp_path: Path) -> None:
        folder = saved(student("pixels")[0], tmp_path / "student", fp16=fp16)
        index = json.loads((folder / "model_index.json").read_text())
        parts = [entry for name, entry in index.items() if not name.startswith("_")]
        assert (index["_class_name"], {library for library, _ in parts}) == ("ConsistencyModelPipeline", {"diffusers"})
        asked = {"batch_size": 2, "class_labels": [0, 3], "num_inference_steps": 1, "output_type": "np"}
        images = []
        for loader in (DiffusionPipeline, ConsistencyPipeline):
            pipe = loader.from_pretrained(folder)
            images.append(pipe(**asked, generator=torch.Generator().manual_seed(4)).images)
        np.testing.assert_allclose(images[0], images[1], atol=2e-6)
        assert images[0].std() > 0.05

    def test_without_the_package_on_the_path(self, tmp_path: Path) -> None:
        folder = saved(student("pixels")[0], tmp_path / "student")
        code = (
            "import sys, numpy, torch; from diffusers import DiffusionPipeline; folder = sys.argv[1]\n"
            "pipe = DiffusionPipeline.from_pretrained(folder); generator = torch.Generator().manual_seed(4)\n"
            "images = pipe(2, class_labels=[0, 3], num_inference_steps=1, generator=generator, output_type='np').images\n"
            "assert 'cm_diffusers' not in sys.modules; numpy.save(folder + '/images.npy', images)"
        )
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)
        pipe = ConsistencyPipeline.from_pretrained(folder)
        asked = {"class_labels": [0, 3], "num_inference_steps": 1, "output_type": "np"}
        ours = pipe(**asked, generator=torch.Generator().manual_seed(4)).images
        np.testing.assert_allclose(np.load(folder / "images.npy"), ours, atol=2e-6)

    @pytest.mark.parametrize(
        ("unet", "view", "boundary", "gamma"),
        [
            (unet2d(), EDMView(0.5, "edm"), "cm", 1.0),
            (unet2d(), EDMView(0.5, "adm"), "edm", 1.0),
            (unet2d(), EDMView(0.5, "adm"), "cm", 0.0),
            (unet2d(sample_size=(8, 16)), EDMView(0.5, "adm"), "cm", 1.0),
            (without_text(), EDMView(0.5, "adm"), "cm", 1.0),
            (without_text(), vp_view(), "cm", 1.0),
        ],
    )
    def test_what_it_would_sample_wrongly_is_ours(self, unet, view, boundary: str, gamma: float) -> None:
        pipe = images_pipeline(unet, scheduler_of(view, boundary, gamma=gamma))
        assert type(pipe) is ConsistencyImagesPipeline
        assert type(pipe.scheduler) is EDMConsistencyScheduler


def test_a_diffusion_model_is_sampled_by_euler_steps() -> None:
    """x' = x + (sigma' - sigma) (x - D) / sigma, 2206.00364, Eq. 3 and Alg. 1 without churn and correction."""
    view, unet = EDMView(0.5, "edm"), unet2d(num_class_embeds=None)
    pipe = images_pipeline(unet, scheduler_of(view, "edm", gamma=0.0))
    x = start = torch.randn(1, 3, 8, 8)
    sigmas = [80.0, 5.0, 0.5, 0.0]
    x = x * sigmas[0]
    for sigma, following in pairwise(sigmas):
        level = torch.tensor([sigma], dtype=torch.float64)
        c_skip, c_out = edm_scalings(level, 0.5)
        with torch.no_grad():
            denoised = append_dims(c_skip, x) * x + append_dims(c_out, x) * view(unet, x, level, {})
        x = x + (following - sigma) * (x - denoised) / sigma
    found = pipe(latents=start, sigmas=sigmas[:-1], output_type="latent").images
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def entries(folder: Path) -> dict[str, list]:
    index = json.loads((folder / "model_index.json").read_text())
    return {name: entry for name, entry in index.items() if isinstance(entry, list) and isinstance(entry[0], str)}


def config_of(scheduler) -> dict[str, object]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def text_folder(folder: Path, prediction_type: str = "epsilon") -> tuple[Path, ConsistencyPipeline]:
    teacher = tiny_pipeline(prediction_type=prediction_type)
    scheduler = scheduler_of(vp_view(prediction_type), "edm", [14.0, 0.9])
    pipe = text_pipeline(teacher, tiny_unet(), scheduler)
    save_pipeline(pipe, folder, False, images_record("ect", "a/b", "distilled", 0.0, pipe.scheduler, 2))
    return folder, pipe


class TestEntries:
    """Every folder names the stock scheduler; with the package, none samples with it what it would sample wrongly."""

    @pytest.mark.parametrize("kind", [kind for kind in STUDENTS if kind != "pixels"])
    def test_without_prompts(self, kind: str, tmp_path: Path) -> None:
        pipe, _ = student(kind)
        folder = saved(pipe, tmp_path / "student")
        assert type(pipe.scheduler) is EDMConsistencyScheduler  # saving changes nothing here
        assert pipe.config["scheduler"][1] == "EDMConsistencyScheduler"
        assert {library for library, _ in entries(folder).values()} == {"diffusers"}
        assert entries(folder)["scheduler"] == ["diffusers", "CMStochasticIterativeScheduler"]
        stock = CMStochasticIterativeScheduler.from_pretrained(folder, subfolder="scheduler")
        assert config_of(stock) == config_of(pipe.scheduler)
        for loader in (DiffusionPipeline, ConsistencyPipeline, ConsistencyImagesPipeline):
            again = loader.from_pretrained(folder)
            assert type(again) is ConsistencyImagesPipeline
            assert type(again.scheduler) is EDMConsistencyScheduler
            assert config_of(again.scheduler) == config_of(pipe.scheduler)
        again.save_pretrained(tmp_path / "again")
        assert entries(tmp_path / "again") == entries(folder)

    def test_of_text(self, tmp_path: Path) -> None:
        folder, pipe = text_folder(tmp_path / "student")
        assert entries(folder)["scheduler"] == ["diffusers", "CMStochasticIterativeScheduler"]
        assert {library for library, _ in entries(folder).values()} == {"diffusers", "transformers"}
        for loader in (DiffusionPipeline, AutoPipelineForText2Image, ConsistencyPipeline):
            again = loader.from_pretrained(folder)
            assert type(again) is ConsistencyPipeline
            assert type(again.scheduler) is EDMConsistencyScheduler
            assert config_of(again.scheduler) == config_of(pipe.scheduler)

    def test_older_folders_name_our_class(self, tmp_path: Path) -> None:
        folder, pipe = text_folder(tmp_path / "student")
        index = json.loads((folder / "model_index.json").read_text())
        name = "EDMConsistencyScheduler"
        index["scheduler"] = ["cm_diffusers.schedulers.scheduling_edm_consistency", name]
        (folder / "model_index.json").write_text(json.dumps(index))
        pipe.scheduler.save_pretrained(folder / "scheduler")
        for loader in (DiffusionPipeline, ConsistencyPipeline):
            again = loader.from_pretrained(folder).scheduler
            assert type(again) is EDMConsistencyScheduler
            assert config_of(again) == config_of(pipe.scheduler)

    def test_a_scheduler_that_carries_nothing_is_the_callers(self, tmp_path: Path) -> None:
        folder = saved(student("latents")[0], tmp_path / "student")
        given = CMStochasticIterativeScheduler(sigma_max=50.0)
        assert ConsistencyPipeline.from_pretrained(folder, scheduler=given).scheduler is given
        assert ConsistencyImagesPipeline(unet2d(), given).scheduler is given
        ours = EDMConsistencyScheduler(sigma_max=50.0)
        assert ConsistencyPipeline.from_pretrained(folder, scheduler=ours).scheduler is ours


class TestText:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_a_reloaded_student_makes_the_same_images_and_no_warning(
        self, prediction_type: str, tmp_path: Path
    ) -> None:
        teacher = tiny_pipeline(prediction_type=prediction_type)
        view = VPView(DiscreteVP.from_scheduler(teacher.scheduler), prediction_type, 0.5)
        pipe = text_pipeline(teacher, tiny_unet(), scheduler_of(view))
        record = images_record("cd", "ada/teacher", "distilled", 2.0, pipe.scheduler, 1)
        save_pipeline(pipe, tmp_path / "student", False, record)
        again = ConsistencyPipeline.from_pretrained(tmp_path / "student")
        asked = {"prompt": "a bag", "output_type": "latent"}
        images = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for one in (pipe, again):
                generator = torch.Generator().manual_seed(3)
                images.append(one(**asked, num_inference_steps=1, generator=generator).images)
        assert torch.equal(*images)
        assert again.record == record == read_record(tmp_path / "student")
        assert (again.manners.guidance_scale, again.manners.num_inference_steps) == (1.0, 1)
        expected = self._one_step(again, view)
        torch.testing.assert_close(images[0], expected, rtol=1e-4, atol=1e-4)

    @staticmethod
    def _one_step(pipe, view: VPView) -> torch.Tensor:
        high, low = VP[1], VP[0]
        x = high * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        sigma = torch.tensor([high], dtype=torch.float64)
        states = pipe.encode_prompt("a bag", "cpu", 1, False)[0]
        with torch.no_grad():
            output = view(pipe.unet, x, sigma, {"encoder_hidden_states": states})
        c_skip, c_out = cm_scalings(sigma, low, view.sigma_data)
        return append_dims(c_skip, x) * x + append_dims(c_out, x) * output

    def test_a_scheduler_of_other_levels_is_named(self, tmp_path: Path) -> None:
        pipe = text_pipeline(tiny_pipeline(), tiny_unet(), scheduler_of(vp_view()))
        record = images_record("ect", "ada/teacher", "distilled", 0.0, pipe.scheduler, 1)
        save_pipeline(pipe, tmp_path / "student", False, record)
        again = ConsistencyPipeline.from_pretrained(tmp_path / "student")
        again.set_progress_bar_config(disable=True)
        again.scheduler = EDMConsistencyScheduler.from_config(again.scheduler.config, sigma_max=12.0)
        with pytest.warns(UserWarning, match=r"sigma_max is 12\.0, in training it was 14\.0\.$"):
            again("a bag", output_type="latent")

    def test_an_xl_student_keeps_all_but_network_and_scheduler(self, tmp_path: Path) -> None:
        teacher, unet = tiny_xl_pipeline(), tiny_xl_unet()
        teacher.register_to_config(force_zeros_for_empty_prompt=False)
        pipe = text_pipeline(teacher, unet, scheduler_of(vp_view()))
        save_pipeline(pipe, tmp_path, False, images_record("cd", "a/b", "distilled", 0.0, pipe.scheduler, 1))
        again = ConsistencyPipeline.from_pretrained(tmp_path)
        assert again.text_encoder_2.state_dict().keys() == teacher.text_encoder_2.state_dict().keys()
        assert not again.config.force_zeros_for_empty_prompt
        assert again.unet.config.addition_embed_type == "text_time"
        assert again("a bag", output_type="latent").images.isfinite().all()


class TestRecord:
    def test_it_says_how_the_student_was_made(self, tmp_path: Path) -> None:
        pipe, _ = student("latents")
        folder = saved(pipe, tmp_path / "student", "slct")
        record = read_record(folder)
        assert (record.method, record.base_model, record.guidance) == ("slct", "", "none")
        assert (record.w_min, record.w_max, record.recommended_guidance_scale) == (0.0, 0.0, 1.0)
        assert record.scheduler["_class_name"] == "EDMConsistencyScheduler"
        fields = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
        assert record.scheduler == {"_class_name": "EDMConsistencyScheduler", **fields}
        assert ConsistencyPipeline.from_pretrained(folder).record == record

    def test_of_a_stock_pipeline_it_names_the_stock_scheduler(self) -> None:
        record = images_record("cd", "a/b", "none", 0.0, student("pixels")[0].scheduler, 2)
        assert record.scheduler["_class_name"] == "CMStochasticIterativeScheduler"
        assert record.scheduler["recommended_sigmas"] == [80.0, 0.821]

    def test_another_method_is_refused(self) -> None:
        with pytest.raises(
            ValueError, match="Unknown method 'lcm'; give one of cd, ct, ict, slct, ect, sct, scd, ctm, mean_flow, edm"
        ):
            images_record("lcm", "", "none", 0.0, EDMConsistencyScheduler(), 1)
