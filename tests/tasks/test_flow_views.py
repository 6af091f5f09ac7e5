"""`distill_cd.py`, `tune_ect.py` and `distill_scd.py` on flow-matching teachers: trained by noise levels, sampled by times."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from oracles import Gaussian
from safetensors.torch import load_file
from scripts import CAPTIONS, data_flags, image_folder, run_script
from tiny_flow import tiny_sd3
from tiny_flow_a import tiny_sana, tiny_wan
from tiny_flow_b import tiny_flux, tiny_qwen_image
from torch import Tensor

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.diffusion.process import Prediction, RectifiedFlow
from cm_diffusers.diffusion.teaching import Guiding, flow_teaching
from cm_diffusers.diffusion.trigflow import TrigFlowView, trigflow_denoiser, velocity
from cm_diffusers.diffusion.views import FlowView, edm_denoiser
from cm_diffusers.evaluation.sampling import generate
from cm_diffusers.models.families.base import family_of, network_of
from cm_diffusers.models.families.shared import pack, told_scale, unpack
from cm_diffusers.models.time_weight import weights_without_head
from cm_diffusers.objectives.cd import CDConfig, CDObjective
from cm_diffusers.objectives.ect import ECTConfig, ECTObjective
from cm_diffusers.objectives.scm import SCMConfig, SCMObjective
from cm_diffusers.pipelines.stock import carried, stock_entry
from cm_diffusers.record import read_record
from cm_diffusers.schedulers import FlowConsistencyScheduler
from cm_diffusers.tasks.image_models import ImageModel, StartConfig, load_image_model
from cm_diffusers.tasks.image_runs import flow_scheduler
from cm_diffusers.tasks.teachings import guiding_of
from cm_diffusers.types import Batch, Networks, Progress
from tasks.test_flow_runs import alone


TEACHERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "sana": tiny_sana,
    "wan": tiny_wan,
}
STEPS = {"max_train_steps": 2, "checkpointing_steps": 2, "learning_rate": 1e-2}
SHOWN = {"validation_prompts": [CAPTIONS[1]], "validation_images": 2, "validation_steps": 2}
BAKED = {"w_min": 2.0, "w_max": 2.0, "tangent_warmup_steps": 1}
LORA = {"lora": True, "lora_rank": 2, "lora_alpha": 4.0, "w_min": 1.0, "w_max": 3.0, "tangent_warmup_steps": 1}
KINDS = {  # -> script, teacher, flags
    "cd": ("distill_cd", "sd3", {"w": 2.0, **SHOWN}),
    "ect": ("tune_ect", "sd3", {}),
    "scd": ("distill_scd", "sd3", BAKED),
    "segments": ("distill_scd", "sd3", BAKED | {"segments": 2}),
    "told": ("distill_scd", "flux", LORA | SHOWN),
    "told-cd": ("distill_cd", "flux", {"w": 2.0}),
    "told-ect": ("tune_ect", "flux", {}),
}
SECOND = 0.821 / 1.821
SIGMA = 9.0  # of the time .9


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("views")
    image_folder(home / "data")
    return home


def teacher(home: Path, family: str) -> Path:
    if not (home / family).exists():
        TEACHERS[family]().save_pretrained(home / family)
    return home / family


def train(home: Path, script: str, family: str, name: str, **values: object) -> Path:
    where = {"pretrained_teacher_model": teacher(home, family), "output_dir": home / name}
    run_script(script, **data_flags(home / "data", home / "cache" / family) | STEPS | where | values)
    return home / name / ("lora" if values.get("lora") else "pipeline")


@pytest.fixture(scope="module")
def made(home: Path) -> Callable[[str], Path]:
    found: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in found:
            script, family, flags = KINDS[kind]
            found[kind] = train(home, script, family, kind, **flags)
        return found[kind]

    return make


def published(folder: Path) -> DiffusionPipeline:
    pipe = ConsistencyPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cd", ("cd", "distilled", 2.0, 2.0, 1.0)),
        ("ect", ("ect", "distilled", 0.0, 0.0, 1.0)),
        ("scd", ("scd", "distilled", 2.0, 2.0, 1.0)),
        ("told", ("scd", "embedded", 1.0, 3.0, 3.0)),
        ("told-cd", ("cd", "embedded", 2.0, 2.0, 3.0)),
        ("told-ect", ("ect", "embedded", 0.0, 0.0, 1.0)),
    ],
)
def test_what_is_published_samples_in_one_and_two_steps(made: Callable, kind: str, expected: tuple) -> None:
    folder = made(kind)
    record, pipe = read_record(folder), published(folder)
    scales = (record.w_min, record.w_max, record.recommended_guidance_scale)
    assert (record.method, record.guidance, *scales) == expected
    assert record.scheduler["recommended_sigmas"] == [1.0, pytest.approx(SECOND)]
    assert isinstance(pipe.scheduler, FlowConsistencyScheduler)
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.gamma) == (1.0, 1.0)
    images = [generate(pipe, [CAPTIONS[1]] * 2, range(2), steps, scales[2], 2, 32)[0] for steps in (1, 2)]
    assert torch.equal(pipe.scheduler.sigmas, torch.tensor([1.0, 0.821 / 1.821, 0.0], dtype=torch.float64))
    assert (images[0] - images[1]).abs().max() > 1 / 255
    card = (folder / "README.md").read_text()
    assert "sigmas=[1.0, 0.450851]" in card
    assert "custom_pipeline" not in card
    if kind in ("cd", "told"):
        assert (folder / "samples.png").is_file()


@pytest.mark.parametrize("kind", ["cd", "ect", "scd", "told", "told-cd", "told-ect"])
def test_a_step_is_the_jump_that_was_trained(home: Path, made: Callable, kind: str) -> None:
    """At the time .9 EDM's x is 10 times that of the flow."""
    record, pipe, noise = read_record(made(kind)), published(made(kind)), torch.randn(2, 4, 8, 8)
    network, family = network_of(pipe), KINDS[kind][1]
    cond = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in encoded(pipe).items()}
    if family == "flux":
        cond = told_scale(cond, torch.full((2,), record.recommended_guidance_scale - 1))
    view = load_image_model(StartConfig(str(teacher(home, family)))).view
    with torch.no_grad():
        expected = jump(record.method, view, network, noise, cond)
        given = pack(noise) if family == "flux" else noise
        found = pipe([CAPTIONS[1]] * 2, latents=given, sigmas=[0.9], output_type="latent", height=32, width=32).images
    found = unpack(found, like=noise) if family == "flux" else found
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_boundary_at_sigma_min_would_be_another_jump() -> None:
    """Which the stock pipelines of flows cannot take."""
    x, sigma = torch.randn(4, 2), torch.full((4,), 0.3, dtype=torch.float64)
    view, answer = FlowView(1.0, lambda network, x, t, cond: network(x)), torch.randn(4, 2)
    at_0, at_min = (
        CDObjective(CDConfig(), view, boundary=kind).consistency(lambda x: answer, 1.3 * x, sigma, {})
        for kind in ("edm", "cm")
    )
    torch.testing.assert_close(at_0, (x - 0.3 / 1.3 * answer), rtol=1e-5, atol=1e-5)
    assert (at_min - at_0).abs().max() > 1e-3


@torch.no_grad()
def encoded(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    return family_of(network_of(pipe)).encode(pipe, [CAPTIONS[1]])


def jump(method: str, view: FlowView, network: torch.nn.Module, x: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """As the objective trains it, of x `(B, ...)` of the flow at the time .9."""
    sigma = torch.full((len(x),), SIGMA, dtype=torch.float64)
    if method == "scd":
        t = torch.atan(sigma)
        return trigflow_denoiser(TrigFlowView.of(view), network)((1 + SIGMA) * math.cos(t[0]) * x, t, cond).x0
    objective = CDObjective(CDConfig(), view, boundary="edm") if method == "cd" else ECTObjective(ECTConfig(), view)
    return objective.consistency(network, (1 + SIGMA) * x, sigma, cond)


def test_a_step_through_a_segment_is_trigflow_s(home: Path, made: Callable) -> None:
    """From the time .9 to .4: the jump of t - s in TrigFlow's coordinates, in those of the flow."""
    pipe, x = published(made("segments")), torch.randn(2, 4, 8, 8)
    border = math.tan(math.atan(80.0) / 2)
    assert pipe.scheduler.config.gamma == 0
    assert pipe.scheduler.config.recommended_sigmas == [1.0, pytest.approx(border / (1 + border))]
    view = TrigFlowView.of(load_image_model(StartConfig(str(teacher(home, "sd3")))).view)
    cond = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in encoded(pipe).items()}
    start, end = math.atan(9.0), math.atan(0.4 / 0.6)
    t = torch.full((2,), start, dtype=torch.float64)
    with torch.no_grad():
        x_trig = 10 * math.cos(start) * x
        u, output = start - end, view(network_of(pipe), x_trig, t, cond)
        expected = (math.cos(u) * x_trig - math.sin(u) * output) / (math.cos(end) + math.sin(end))
        pipe.scheduler.set_timesteps(sigmas=[0.9, 0.4])
        v = family_of(network_of(pipe)).call(network_of(pipe), x, torch.full((2,), 0.9), cond)
    found = pipe.scheduler.step(v, pipe.scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["cd", "told"])
def test_diffusers_alone_samples_the_same_in_one_step(home: Path, made: Callable, kind: str) -> None:
    folder, family = made(kind), KINDS[kind][1]
    pipe = published(folder)
    if kind == "cd":
        stock = alone(folder)
    else:
        stock = alone(teacher(home, family))
        stock.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
        stock.scheduler = stock_entry(pipe.scheduler, 1, "passed").scheduler
    asked = {"prompt": CAPTIONS[1], "output_type": "np", "height": 32, "width": 32, "sigmas": [1.0]}
    scale = 1.0 if kind == "cd" else 3.0
    images = [
        each(**asked, generator=torch.Generator().manual_seed(3), guidance_scale=scale).images
        for each in (pipe, stock)
    ]
    np.testing.assert_allclose(*images, atol=1e-4)


@pytest.mark.parametrize(("start", "mean", "std"), [(1.0, 0.4, 1.3), (80 / 81, 0.4 * (1 - 1.3 / 81), 1.3 * 1.0123)])
def test_noise_alone_is_taken_for_the_time_1(start: float, mean: float, std: float) -> None:
    """With the exact consistency function: the mean and deviation are the data's. At sigma_max they were 1.2 % off and more."""
    data, process = Gaussian(0.4, 1.3), RectifiedFlow()
    noise = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    scheduler = flow_scheduler(80.0, [80.0, 0.821], 1.0)
    scheduler.set_timesteps(sigmas=[start])
    t = torch.full((2,), start, dtype=torch.float64)
    f = data.flow(process, noise, t, torch.zeros_like(t))
    found = scheduler.step((noise - f) / start, scheduler.timesteps[0], noise).prev_sample
    low, high = found.flatten().tolist()
    assert ((high + low) / 2, (high - low) / 2) == (pytest.approx(mean, abs=1e-4), pytest.approx(std, abs=2e-4))


class Told:
    """A network that answers with its guidance and remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Tensor]] = []

    def __call__(self, x: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.calls.append((len(x), cond["guidance"]))
        return cond["guidance"][:, None].expand_as(x)


def test_a_teacher_that_is_told_its_guidance_takes_one_pass_and_so_does_its_student() -> None:
    view, guiding = FlowView(1.0, lambda network, x, t, cond: network(x, cond)), Guiding("embedded", told_scale)
    batch = Batch(torch.randn(4, 2), {"level": torch.zeros(4)})
    methods = {
        CDObjective(CDConfig(w=2.5), view, guiding=guiding, boundary="edm"): (3.5, 3.5),
        ECTObjective(ECTConfig(), view, guiding): (1.0, 1.0),
    }
    for method, (low, high) in methods.items():
        nets = Networks(Told(), teacher=Told())
        method(nets, batch, Progress(0, 10))
        for rows, guidance in nets.student.calls + nets.teacher.calls:
            assert rows <= 4
            assert guidance.aminmax() == (low, high)
        assert len(nets.teacher.calls) == (2 if isinstance(method, CDObjective) else 0)  # Heun's
    method = SCMObjective(SCMConfig(), TrigFlowView.of(view), (1.0, 3.0), guiding)
    cond, teach = method.guided(batch, Networks(Told(), teacher=Told()))
    t = torch.full((4,), 0.8, dtype=torch.float64)
    conversion = method.view.conversion(t)
    output = (velocity(teach(batch.x0, t), t, 1.0) - conversion.on_x[:, None] * batch.x0) / conversion.on_output[
        :, None
    ]
    torch.testing.assert_close(output[:, 0].float(), cond["guidance"], rtol=1e-4, atol=1e-4)
    assert 2 <= cond["guidance"].min() < cond["guidance"].max() <= 4


def test_guidance_that_is_not_linear_is_the_pipeline_s_in_all_coordinates() -> None:
    """Qwen-Image's keeps the length of the velocity."""
    pipe = tiny_qwen_image()
    network, x, t = pipe.transformer, torch.randn(2, 4, 8, 8), torch.full((2,), 0.6, dtype=torch.float64)
    family = family_of(network)
    model = ImageModel(network, FlowView(1.0, family.call), pipe=pipe)
    with torch.no_grad():
        batch = Batch(x, family.encode(pipe, [CAPTIONS[0], CAPTIONS[1]]), family.encode(pipe, ["", ""]))
        w, sigma = torch.full((2,), 3.0), torch.full((2,), 1.5, dtype=torch.float64)
        expected = flow_teaching(family.call, 1.0, guiding=Guiding(combine=family.combine)).guided(network, batch, w)(
            x, t
        )
        in_edm = guiding_of(model, model.view.told).teacher(edm_denoiser(model.view, network), batch, w)(
            2.5 * x, sigma
        )
        view, theta = TrigFlowView.of(model.view), torch.atan(sigma)
        denoise = trigflow_denoiser(view, network)
        in_trig = guiding_of(model, view.told).teacher(denoise, batch, w)(2.5 * math.cos(theta[0]) * x, theta)
        linear = Guiding().teacher(edm_denoiser(model.view, network), batch, w)(2.5 * x, sigma)
    for found in (in_edm, in_trig):
        assert_alike(found, expected)
    assert (linear.x0 - expected.x0).abs().max() > 1e-3


def assert_alike(found: Prediction, expected: Prediction) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-4, atol=1e-4)


def test_another_average_becomes_a_pipeline(home: Path) -> None:
    folder = train(home, "distill_scd", "sd3", "averaged", **BAKED, ema_sigma_rels=[0.05, 0.1])
    run_script("export_average", run_dir=folder.parent, sigma_rel=0.1, output_dir=home / "average")
    kept = weights_without_head(load_file(folder.parent / "averages" / "step-2" / "0.1.safetensors"))
    pipe = published(home / "average")
    found = pipe.transformer.state_dict()
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in kept.items())
    assert isinstance(pipe.scheduler, FlowConsistencyScheduler)
    assert isinstance(carried(alone(home / "average").scheduler), FlowConsistencyScheduler)


@pytest.mark.parametrize(
    ("script", "family", "flags", "sentence"),
    [
        (
            "distill_cd",
            "sd3",
            {"sigma_max": 14.5},
            r"--sigma_max 14.5 ends at the time 0.935 of the flow, .* at least 80",
        ),
        (
            "tune_ect",
            "sd3",
            {"recommended_sigmas": [5.0, 1.0]},
            r"--recommended_sigmas starts at 5.0, but pipelines of a",
        ),
        (
            "distill_cd",
            "sd3",
            {"dropout": 0.1},
            r"--dropout is of a UNet's residual blocks, but SD3Transformer2DModel",
        ),
        ("tune_time", "sd3", {}, r"Time rescaling is for UNets"),
        ("tune_ect", "wan", {}, r"which makes clips; give a text-to-image pipeline"),
    ],
)
def test_refusals(home: Path, script: str, family: str, flags: dict[str, object], sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        train(home, script, family, "refused", **flags)
