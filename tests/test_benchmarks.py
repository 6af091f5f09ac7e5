"""The benchmark counts the passes a step really makes, and its reference loop does the same arithmetic."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latent_objectives import lcm_of
from PIL import Image
from tiny import FASHION_LABELS, tiny_pipeline, tiny_scheduler, tiny_unet
from torch import nn


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import tangent_step  # noqa: E402
import train_step  # noqa: E402
import trajectory_step  # noqa: E402
from distillation import BenchmarkConfig, Distillation, the_teacher  # noqa: E402
from lcm_variants import VariantConfig, VariedLCM  # noqa: E402
from reference_lcm_step import ReferenceLCM, pixel_batches  # noqa: E402
from tangent_step import TangentStepConfig, Training  # noqa: E402
from trajectory_step import TrajectoryStepConfig  # noqa: E402

from cm_diffusers.diffusion.process import DiscreteVP  # noqa: E402
from cm_diffusers.engine.optimizers import OptimConfig  # noqa: E402
from cm_diffusers.objectives.lcm import LCMConfig  # noqa: E402
from cm_diffusers.types import Batch, Networks, Progress  # noqa: E402


VP = DiscreteVP.from_scheduler(tiny_scheduler())
B = 3
GRAD, FREE = (True, B), (False, B)


@pytest.fixture
def config(tmp_path: Path) -> BenchmarkConfig:
    return BenchmarkConfig(**small(tmp_path), lora_rank=2, memory_steps=1, output_dir=str(tmp_path / "report"))


@pytest.fixture
def tangents(tmp_path: Path) -> TangentStepConfig:
    return TangentStepConfig(**small(tmp_path), output_dir=str(tmp_path / "report"))


@pytest.fixture
def trajectories(tmp_path: Path) -> TrajectoryStepConfig:
    unet = {
        "block_out_channels": [16, 16],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
    }
    (tmp_path / "unet.json").write_text(json.dumps(unet))
    return TrajectoryStepConfig(
        **small(tmp_path), unet_config=str(tmp_path / "unet.json"), output_dir=str(tmp_path / "report")
    )


def small(tmp_path: Path) -> dict[str, object]:
    """A tiny teacher, and five images with captions."""
    tiny_pipeline(prediction_type="v_prediction").save_pretrained(tmp_path / "teacher")
    images = tmp_path / "images"
    images.mkdir()
    for i, label in enumerate(FASHION_LABELS[:5]):
        Image.new("RGB", (32, 32), (50 * i, 20, 200)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"a photo of a {label}")
    return {
        "pretrained_teacher_model": str(tmp_path / "teacher"),
        "train_data_dir": str(images),
        "max_train_samples": 5,
        "train_batch_size": B,
        "repeats": 2,
    }


def count_calls(module: nn.Module) -> list[tuple[bool, int]]:
    """Filled with (gradients on?, batch size) of every call."""
    calls = []
    module.register_forward_pre_hook(lambda _, args: calls.append((torch.is_grad_enabled(), len(args[0]))))
    return calls


def record_passes(nets: Networks) -> list[trajectory_step.Pass]:
    """Filled with every call as `PASSES` has it, its samples counted; the critic's own look at its teacher left out."""
    calls = []

    def watch(name: str, network: nn.Module) -> None:
        def look(_: nn.Module, args: tuple) -> None:
            graph = torch.is_grad_enabled()
            if not (name == "teacher" and graph):
                gradient = "none" if not graph else "input" if args[0].requires_grad else "weights"
                calls.append((name, len(args[0]), gradient))

        network.register_forward_pre_hook(look)

    for name, network in nets.items():
        watch(name, network)
    return calls


def make_reference(config: BenchmarkConfig, one: Distillation) -> ReferenceLCM:
    examples = pixel_batches(one.data, 1, torch.device("cpu"))
    return ReferenceLCM(the_teacher(config), examples, LCMConfig(), OptimConfig(), one.dim)


def test_full_step_makes_the_passes_that_are_measured(config: BenchmarkConfig, tmp_path: Path) -> None:
    one = Distillation(config, "full", tmp_path)
    nets = one.trainer.nets
    calls = [count_calls(nets.student), count_calls(nets.target), count_calls(nets.teacher)]
    one.step()
    assert calls == [[GRAD], [FREE], [(False, 2 * B)]]
    for action in one.passes().values():
        action()
    assert calls == [[GRAD] * 2, [FREE] * 2, [(False, 2 * B)] * 2]


def test_lora_step_makes_the_passes_that_are_measured(config: BenchmarkConfig, tmp_path: Path) -> None:
    one = Distillation(config, "lora", tmp_path)
    nets = one.trainer.nets
    student, teacher = count_calls(nets.student), count_calls(nets.teacher)
    one.step()
    assert teacher == [(False, 2 * B)]
    assert student == [(False, 2 * B), FREE, GRAD]  # the teacher is the student without adapters
    for action in one.passes().values():
        action()
    assert sorted(student) == sorted([GRAD, (False, 2 * B), FREE] * 2)


def test_scott_step_makes_the_passes_that_are_measured(config: BenchmarkConfig, tmp_path: Path) -> None:
    one = Distillation(config, "scott", tmp_path)
    nets = one.trainer.nets
    seen = []
    nets.critic.register_forward_pre_hook(lambda _, args: seen.append((args[0].requires_grad, len(args[0]))))
    student, target, teacher = count_calls(nets.student), count_calls(nets.target), count_calls(nets.teacher)
    one.step()
    assert (sorted(student), target, sorted(seen)) == ([FREE, GRAD], [FREE], [(False, 2 * B), GRAD])
    solver, judged = [(False, 2 * B)] * 3, [(True, B), (True, 2 * B)]
    assert sorted(teacher) == sorted(solver + judged)
    for action in one.passes().values():
        action()
    assert (sorted(student), target) == (sorted([FREE, GRAD] * 2), [FREE] * 2)
    assert sorted(seen) == sorted([(False, 2 * B), GRAD] * 2)
    assert sorted(teacher) == sorted((solver + judged) * 2)


@pytest.mark.parametrize(("kind", "passes"), [("jvp", 1), ("central", 3), ("one_sided", 2), ("semi", 3)])
def test_a_tangent_step_makes_the_passes_that_are_measured(
    tangents: TangentStepConfig, tmp_path: Path, kind: str, passes: int
) -> None:
    one = Training(tangents, kind, tmp_path)
    student, teacher = count_calls(one.trainer.nets.student.network), count_calls(one.trainer.nets.teacher)
    one.step()
    assert (student, teacher) == ([FREE] * passes + [GRAD], [FREE])
    for action in one.passes().values():
        action()
    assert (student, teacher) == (([FREE] * passes + [GRAD]) * 2, [FREE] * 2)
    assert all(p.grad is not None for p in one.trainer.student.parameters())


def test_a_plain_step_is_a_pass_with_gradient(tangents: TangentStepConfig, tmp_path: Path) -> None:
    one = Training(tangents, "plain", tmp_path)
    calls = count_calls(one.trainer.nets.student)
    one.step()
    assert calls == [GRAD]


def test_reference_encodes_every_step_and_guides_in_two_passes(config: BenchmarkConfig, tmp_path: Path) -> None:
    reference = make_reference(config, Distillation(config, "full", tmp_path))
    pipe = reference.pipe
    modules = (reference.student, reference.target, pipe.unet, pipe.vae.encoder, pipe.text_encoder)
    calls = [count_calls(module) for module in modules]
    weights = [p.detach().clone() for p in reference.target.parameters()]
    reference.step()
    assert calls == [[GRAD], [FREE], [FREE] * 2, [FREE], [FREE]]
    for old, new, student in zip(weights, reference.target.parameters(), reference.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.95 * old + 0.05 * student)


def test_reference_has_the_loss_of_the_objective(config: BenchmarkConfig, tmp_path: Path) -> None:
    one = Distillation(config, "full", tmp_path)
    reference, batch, objective = make_reference(config, one), next(one.stream), one.trainer.objective
    objective.config.time_power = 0.0  # as the reference draws
    torch.manual_seed(5)
    mine = objective(one.trainer.nets, batch, Progress(0, 1)).value
    torch.manual_seed(5)
    theirs = reference.loss(batch.x0, batch.cond["encoder_hidden_states"])
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=0)  # the cached empty prompt is float16
    assert mine > 1e-3


def test_ratios_are_medians_over_rounds() -> None:
    times = {f"{kind}/{name}": [(1.0, 2.0)] * 3 for kind in ("full", "lora") for name in train_step.PASSES[:3]}
    times |= {f"scott/{name}": [(2.0, 2.0)] * 3 for name in train_step.PASSES}
    times["full/step"] = [(3.3, 9.0), (3.6, 9.0), (30.0, 9.0)]
    times["lora/step"] = [(6.0, 6.0)] * 3
    times["scott/step"] = [(9.9, 9.0), (7.2, 9.0), (60.0, 9.0)]
    times["reference/step"] = [(6.6, 18.0), (5.4, 18.0), (60.0, 18.0)]
    names = [f"{kind} step / passes" for kind in train_step.KINDS]
    names += ["full images/s / reference images/s", "scott step / full step"]
    wall, cpu = (1.2, 2.0, 9.9 / 8, 2.0, 2.0), (3.0 / 2, 1.0, 9.0 / 8, 2.0, 1.0)
    assert train_step.ratios(times, 0) == pytest.approx(dict(zip(names, wall, strict=True)))
    assert train_step.ratios(times, 1) == pytest.approx(dict(zip(names, cpu, strict=True)))


def test_table_of_a_tiny_run(config: BenchmarkConfig, tmp_path: Path) -> None:
    times = train_step.measure_times(config, tmp_path)
    loops = {f"{kind}/{name}" for kind in train_step.KINDS for name in ("step", *train_step.PASSES[:3])}
    assert times.keys() == loops | {"reference/step", "scott/critic"}
    assert {len(values) for values in times.values()} == {2}
    table = train_step.as_table(config, times, {"idle": 100.0, "full": 130.0, "lora": 112.4, "scott": 150.0})
    rows = {cells[0]: cells for cells in ([c.strip(" |") for c in line.split(" | ")] for line in table.splitlines())}
    assert rows["full"][-1] == "30"
    assert rows["lora"][-1] == "12"
    assert rows["reference"][2:6] == ["–"] * 4


@pytest.mark.slow
def test_the_script(config: BenchmarkConfig) -> None:
    flags = ("pretrained_teacher_model", "train_data_dir", "output_dir", "train_batch_size", "repeats", "lora_rank")
    argv = [part for name in flags for part in (f"--{name}", str(getattr(config, name)))]
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *argv], check=True)
    found = json.loads((Path(config.output_dir) / "train_step.json").read_text())
    assert found["ratios"]["wall"].keys() == found["ratios"]["cpu"].keys()
    assert found["memory_mib"]["idle"] < min(found["memory_mib"]["full"], found["memory_mib"]["lora"])
    assert (Path(config.output_dir) / "train_step.md").read_text().startswith("|  | step, ms |")


def test_tangents_are_held_against_their_passes_and_a_plain_step() -> None:
    times = {"plain/step": [(3.0, 3.0), (4.0, 3.0), (300.0, 3.0)]}
    for kind in tangent_step.TANGENTS:
        times |= {f"{kind}/{name}": [(value, 1.0)] * 3 for name, value in (("teacher", 1.0), ("tangent", 4.0))}
        times |= {f"{kind}/student": [(3.0, 2.0)] * 3, f"{kind}/step": [(9.0, 5.0), (8.0, 5.0), (800.0, 5.0)]}
    wall, cpu = tangent_step.ratios(times, 0), tangent_step.ratios(times, 1)
    assert wall["semi"] == pytest.approx({"step / passes": 9 / 8, "step / plain step": 8 / 3, "tangent / teacher": 4})
    assert cpu["jvp"] == pytest.approx({"step / passes": 5 / 4, "step / plain step": 5 / 3, "tangent / teacher": 1})


def test_table_of_tiny_tangents(tangents: TangentStepConfig, tmp_path: Path) -> None:
    times = tangent_step.measure(tangents, tmp_path)
    names = {f"{kind}/{name}" for kind in tangent_step.TANGENTS for name in ("step", *tangent_step.PASSES)}
    assert times.keys() == names | {"plain/step"}
    assert {len(values) for values in times.values()} == {2}
    rows = [line.split(" | ") for line in tangent_step.as_table(tangents, times).splitlines() if line.startswith("|")]
    assert [row[0].strip("| ") for row in rows[2:]] == [*tangent_step.TANGENTS, "plain step"]
    assert {len(row) for row in rows} == {8}


@pytest.mark.parametrize("kind", trajectory_step.PASSES)
def test_a_step_of_a_trajectory_makes_the_passes_that_are_measured(
    trajectories: TrajectoryStepConfig, tmp_path: Path, kind: str
) -> None:
    one = trajectory_step.Training(trajectories, kind, tmp_path)
    calls = record_passes(one.trainer.nets)
    wanted = [(name, math.ceil(share * B), gradient) for name, share, gradient in trajectory_step.PASSES[kind]]
    one.step()
    assert sorted(calls) == sorted(wanted)
    assert all(p.grad is None for p in one.trainer.student.parameters())
    for action in one.passes().values():
        action()
    assert sorted(calls) == sorted(wanted * 2)
    assert any(p.grad is not None for p in one.trainer.student.parameters())


def test_table_of_tiny_trajectories(trajectories: TrajectoryStepConfig, tmp_path: Path) -> None:
    times = trajectory_step.measure(trajectories, tmp_path)
    names = {f"{kind}/{one[0]}" for kind, passes in trajectory_step.PASSES.items() for one in passes}
    assert times.keys() == names | {f"{kind}/step" for kind in trajectory_step.PASSES}
    assert {len(values) for values in times.values()} == {2}
    times |= {"TCD/step": [(9.0, 5.0)] * 2, "TCD/student": [(3.0, 2.0)] * 2}
    times |= {"TCD/target": [(1.0, 1.0)] * 2, "TCD/teacher": [(2.0, 1.0)] * 2}
    table = trajectory_step.as_table(trajectories, times)
    rows = {cells[0]: cells for cells in ([c.strip(" |") for c in line.split(" | ")] for line in table.splitlines())}
    assert rows["TCD"] == ["TCD", "9000.0", "3000.0", "1000.0", "2000.0", "–", "1.50", "1.25"]
    assert rows["mean flow"][3:6] == ["–"] * 3


def varied_loss(batch: Batch, networks: Networks, **changes) -> float:
    torch.manual_seed(3)
    method = VariantConfig(w_min=0.0, w_max=4.0, **changes)
    return VariedLCM(method, lcm_of(method, VP, "epsilon", 16).teaching, 0.95)(
        networks, batch, Progress(0, 10)
    ).value.item()


def test_variants_of_lcm_begin_at_lcm_itself_and_differ_where_they_say() -> None:
    teacher, student = tiny_unet(), tiny_unet(time_cond_proj_dim=16)
    networks = Networks(student, target=student, teacher=teacher)
    words = {"encoder_hidden_states": torch.randn(4, 5, 32)}
    batch = Batch(torch.randn(4, 4, 8, 8), words, {"encoder_hidden_states": torch.randn(4, 5, 32)})
    torch.manual_seed(3)
    lcm = lcm_of(LCMConfig(w_min=0.0, w_max=4.0), VP, "epsilon", 16)(networks, batch, Progress(0, 10)).value.item()
    assert varied_loss(batch, networks) == lcm
    changes = [
        {"distance": "l2"}, {"distance": "adaptive"}, {"distance": "sample_huber"}, {"huber_c": 0.03}, {"time_power": 0.0},
        {"guidance_pairs": True}, {"coarse_share": 0.5}, {"ict_weights": True},
    ]  # fmt: skip
    losses = [varied_loss(batch, networks, **change) for change in changes]
    assert len({varied_loss(batch, networks), *losses}) == 1 + len(changes)


def test_weights_of_a_variant_fall_with_the_length_of_a_step_in_noise() -> None:
    method = VariantConfig(num_ddim_timesteps=50, ict_weights=True)
    teaching = lcm_of(method, VP, "epsilon", 16).teaching
    weights = VariedLCM(method, teaching, 0.95).weights(teaching.grid, teaching.before)
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    kept = VP.alphas_cumprod.double()  # of the signal's square
    length = [((1 / kept[t] - 1).sqrt() - (1 / kept[s] - 1).sqrt()).item() for t, s in ((999, 979), (519, 499))]
    assert (weights[49] / weights[25]).item() == pytest.approx(length[1] / length[0], rel=1e-5)
    assert weights.argmin() == 49
    assert weights[49] < 0.1
    assert weights.max() > 1.2


def test_variants_of_lcm_draw_the_times_that_they_say() -> None:
    method = VariantConfig(num_ddim_timesteps=50, time_power=1.0, coarse_share=0.5)
    objective = VariedLCM(method, lcm_of(method, VP, "epsilon", 16).teaching, 0.95)
    t, s = objective.times(40_000, Progress(5, 10))
    assert set((t - s).tolist()) == {20, 19}  # the first time of the grid goes to 0
    numbers = (t + 1) // 20  # 1 to 50: the mean of k drawn with k is (2 N + 1) / 3
    assert numbers.double().mean().item() == pytest.approx(101 / 3, rel=0.01)
    t, s = objective.times(1000, Progress(4, 10))
    assert set((t - s).tolist()) == {40, 39}
    assert ((t + 1) // 20 % 2 == 0).all()
    slower = VariedLCM(VariantConfig(last_ema_decay=0.9), objective.teaching, 0.5)
    assert [slower.target_decay(Progress(n, 10)) for n in (0, 5, 10)] == pytest.approx([0.5, 0.7, 0.9])
