"""The single files sample by all that the scheduler's config says: bit for bit as this package, for every kind of student.

In process; that they do so where this package is missing is for `test_community_pipelines`.
"""

import importlib.util
from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler
from publishing.test_publish_images import scheduler_of, unet2d, vp_view, without_text
from publishing.test_publish_scm import scheduler_of as scm_scheduler_of
from tiny import tiny_pipeline, tiny_unet

from cm_diffusers import ConsistencyImagesPipeline, ConsistencyPipeline, EDMConsistencyScheduler
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.pipelines.stock import stock_scheduler


PIPELINES = Path(__file__).parents[2] / "pipelines"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IN_SIGMA = [("edm", "epsilon"), ("edm", "v_prediction"), *(("vp", k) for k in ("epsilon", "v_prediction", "sample"))]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SMALL = {"sample_size": 4, "block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 2}
CLIPPING = {
    "free": {},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.2},
    "thresholding": {"thresholding": True, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 1.5},
}


@cache
def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"portable_{name}", PIPELINES / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def sampled(pipe, **asked) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**asked, generator=torch.Generator().manual_seed(3), output_type="latent").images


def in_sigma(network: str, kind: str, boundary: str, **options) -> EDMConsistencyScheduler:
    """A student's scheduler, trained for data of standard deviation 2: F counts for more than at 0.5."""
    if network == "vp":
        return scheduler_of(vp_view(kind, 2.0), boundary, **options)
    view = EDMView(2.0, "edm" if boundary == "edm" else "adm")
    return EDMConsistencyScheduler.from_config(scheduler_of(view, boundary, **options).config, prediction_type=kind)


@cache
def images_network(network: str, dtype: torch.dtype):
    return (without_text(**SMALL) if network == "vp" else unet2d(**SMALL)).to(dtype)


@pytest.mark.parametrize(("network", "kind"), IN_SIGMA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_of_every_kind_of_student(network: str, kind: str, dtype: torch.dtype) -> None:
    unet, results = images_network(network, dtype), set()
    for (boundary, gamma), clip in product((("cm", 1.0), ("edm", 0.4)), (False, True)):
        options = {"clip_denoised": clip, "gamma": gamma, "s_noise": 0.8, "rho": 5.0, "num_train_timesteps": 9}
        ours = in_sigma(network, kind, boundary, **options)
        pipes = (
            module("consistency_images").PortableImagesPipeline(unet, stock_scheduler(ours)),
            ConsistencyImagesPipeline(unet, ours),
        )
        actual, expected = (sampled(pipe, class_labels=1, num_inference_steps=2) for pipe in pipes)
        assert actual.dtype == dtype
        assert torch.equal(actual, expected), (boundary, options)
        assert not clip or actual.abs().max() <= 1
        results.add(actual.double().norm().item())
    assert len(results) == 4 or kind == "sample"  # every field acts, but clipping where answers are small


@pytest.mark.parametrize(("network", "kind"), IN_SIGMA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_texts_of_students_in_edms_coordinates(texts, network: str, kind: str, dtype: torch.dtype) -> None:
    for boundary, clip, asked in (
        ("cm", True, {"sigmas": [9.0, 0.4]}),
        ("edm", False, {"num_inference_steps": 2, "gamma": 0.3}),
    ):
        compare(texts(dtype), stock_scheduler(in_sigma(network, kind, boundary, clip_denoised=clip)), **asked)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_texts_of_latent_consistency_models(texts, kind: str, dtype: torch.dtype) -> None:
    norms = set()
    for clipping in CLIPPING.values():
        scheduler = LCMScheduler(**BETAS, prediction_type=kind, timestep_scaling=0.01, **clipping)
        norms.add(compare(texts(dtype), scheduler, gamma=0.4, timesteps=[999, 499]).double().norm().item())
    assert len(norms) == (2 if kind == "sample" else 3)  # every field acts, but thresholding where answers are below 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_texts_by_the_schedulers_of_others(texts, dtype: torch.dtype) -> None:
    """Those of TCD have their own gamma and no boundary scalings; those for many steps do not clip latents."""
    strange = LCMScheduler.from_config({**LCMScheduler(**BETAS).config, "gamma": 0.2, "boundary_scalings": "none"})
    for scheduler in (TCDScheduler(**BETAS), strange, DDIMScheduler(**BETAS, clip_sample=True)):
        compare(texts(dtype), scheduler, num_inference_steps=2)


@pytest.fixture(scope="module")
def texts():
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    small = {**SMALL, "block_out_channels": (4,), "time_cond_proj_dim": 16}
    torch.manual_seed(0)
    unet = tiny_unet(**blocks, **small)
    return cache(lambda dtype: tiny_pipeline(unet=deepcopy(unet)).to(dtype=dtype))


def compare(stock, scheduler, gamma: float | None = None, **way) -> torch.Tensor:
    """The sample of the single file, which is this package's."""
    parts = {**stock.components, "scheduler": scheduler}
    portable = module("consistency_text_to_image").PortableConsistencyPipeline(**parts, requires_safety_checker=False)
    ours = ConsistencyPipeline.from_pipe(portable)
    if gamma is not None:
        ours.scheduler = type(ours.scheduler).from_config(ours.scheduler.config, gamma=gamma)
    states = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2)).to(stock.unet.dtype)
    asked = {"prompt_embeds": states, "guidance_scale": 2.5, **way}
    result = sampled(portable, **asked, gamma=gamma)
    assert result.dtype == stock.unet.dtype
    assert torch.equal(result, sampled(ours, **asked)), dict(scheduler.config)
    assert portable.scheduler is scheduler
    return result


@pytest.mark.parametrize(("network", "kind"), IN_SIGMA[:2])
@pytest.mark.parametrize(("boundary", "clip", "floor"), [("cm", True, 2.0), ("edm", False, 0.0), ("cm", False, 2.0)])
def test_editing_denoises_as_the_scheduler_does(
    network: str, kind: str, boundary: str, clip: bool, floor: float
) -> None:
    """With everything unknown, a step of editing is one of sampling; noise comes back to what f has (2303.01469, Alg. 1)."""
    unet = unet2d(num_class_embeds=None, sample_size=4)
    ours = in_sigma(network, kind, boundary, clip_denoised=clip, sigma_min=2.0)
    editor = module("consistency_editing").ConsistencyEditingPipeline(unet, stock_scheduler(ours))
    editor.set_progress_bar_config(disable=True)
    levels, state = [60.0, 3.0], torch.get_rng_state()
    asked = {"mask_image": torch.ones(1, 1, 4, 4), "sigmas": levels, "output_type": "pt"}
    edited = editor("inpainting", torch.zeros(1, 3, 4, 4), **asked, generator=torch.Generator().manual_seed(1)).images
    assert torch.equal(torch.get_rng_state(), state)  # all noise is the generator's
    draw = torch.Generator().manual_seed(1)
    ours.set_timesteps(sigmas=levels)
    x = levels[0] * torch.randn(1, 3, 4, 4, generator=draw)
    with torch.no_grad():
        for i, t in enumerate(ours.timesteps):
            if i:
                x = x + (levels[i] ** 2 - floor**2) ** 0.5 * torch.randn(1, 3, 4, 4, generator=draw)
            x = ours.step(unet(ours.scale_model_input(x, t), t).sample, t, x).denoised
    torch.testing.assert_close(2 * edited - 1, x.clamp(-1, 1), atol=1e-5, rtol=0)


def test_editing_takes_a_student_of_scm() -> None:
    """The same network in EDM's coordinates, so the same image."""
    unet, view = unet2d(num_class_embeds=None, sample_size=4), EDMView(2.0, "trigflow")
    results = []
    for scheduler in (scm_scheduler_of(view), scheduler_of(view, "edm")):
        editor = module("consistency_editing").ConsistencyEditingPipeline(unet, stock_scheduler(scheduler))
        editor.set_progress_bar_config(disable=True)
        asked = {"mask_image": torch.ones(1, 1, 4, 4), "sigmas": [60.0, 3.0], "output_type": "pt"}
        generator = torch.Generator().manual_seed(1)
        results.append(editor("inpainting", torch.zeros(1, 3, 4, 4), **asked, generator=generator).images)
    assert torch.equal(*results)
    assert results[0].std() > 0.01
