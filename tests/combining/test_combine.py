"""The command from a finished run to a published combination, on tiny networks; and what the hold-out decides."""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finished_runs import STEPS, lora_run, snapshot, whole_run
from safetensors.torch import load_file
from scripts import run_script
from tiny import tiny_unet
from torch import Tensor

from cm_diffusers.combining import runs
from cm_diffusers.combining.log import Entry, SearchLog
from cm_diffusers.combining.objective import ObjectiveConfig, Sheet, make_bench
from cm_diffusers.combining.runs import chosen, judged, searched
from cm_diffusers.combining.search import SearchConfig
from cm_diffusers.combining.vectors import baselines
from cm_diffusers.engine.snapshots import list_weights
from cm_diffusers.evaluation.comparison import Comparison, EvaluationConfig
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.evaluation.report import Row
from cm_diffusers.evaluation.sampling import load_pipeline
from cm_diffusers.publishing.provenance import read_provenance
from cm_diffusers.record import base_model_of, read_record


BASELINES = ["last (step 30)", "best single", "uniform (SWA)", "best EMA", "power function (0.1)"]


def flags(home: Path, **others: object) -> dict[str, object]:
    few = {"evaluations": 3, "population": 3, "num_images": 12, "num_inference_steps": [1, 2], "bootstrap_samples": 10}
    few |= {"eval_batch_size": 12, "ema_rates": [0.5, 0.9], "sigma_rels": [0.1], "resolution": 32}
    places = {"run_dir": home / "run", "train_data_dir": home / "data", "feature_extractor": home / "classifier"}
    return {**few, **places, "output_dir": home / "out", **others}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose combination was interrupted before it was published, and resumed."""
    home = tmp_path_factory.mktemp("whole")
    whole_run(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sheet, "differences", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_script("combine", **flags(home))
    (home / "before.jsonl").write_bytes((home / "out" / "search.jsonl").read_bytes())
    run_script("combine", **flags(home, resume=True, confidence=0.5))
    return home


def interrupted(*of: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("lora")
    lora_run(home)
    run_script("combine", **flags(home, lora_rank=3, step_weights=[0, 1], objective="coverage", pull=0.1))
    return home


def table(home: Path) -> dict:
    return json.loads((home / "out" / "table.json").read_text("utf-8"))


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_the_tables_have_each_baseline_and_the_found_one(kind: str, request: pytest.FixtureRequest) -> None:
    told = table(home := request.getfixturevalue(kind))
    names = list(told["weights"])
    assert all(name.startswith(start) for name, start in zip(names, [*BASELINES, "found"], strict=True))
    assert told["published"] == ("found" if told["accepted"] else told["published"])
    assert all(sum(vector) == pytest.approx(1) for vector in told["weights"].values())
    searched = [1, 2] if kind == "whole" else [2]  # one step has no weight there
    for rows, steps in ((told["search_set"], searched), (told["holdout"], [1, 2])):
        seen = [(row["pipeline"], row["num_inference_steps"]) for row in rows]
        assert seen == [(name, count) for name in names for count in steps]
    assert {row["fid"] for row in told["holdout"]}.isdisjoint(row["fid"] for row in told["search_set"])
    assert told["evaluations"] == 7 + 3
    text = (home / "out" / "table.md").read_text("utf-8")
    assert text.startswith(told["conclusion"])
    assert ("NOT accepted" in text) != told["accepted"]
    assert "10 evaluations, 3 of them of the search, took " in text
    assert {path.name for path in (home / "out").iterdir()} == {
        "coefficients.png", "history.png", "search.jsonl", "table.json", "table.md", "lora" if kind == "lora" else "pipeline",
    }  # fmt: skip


def test_what_was_tried_before_an_interrupt_is_not_tried_again(whole: Path) -> None:
    assert (whole / "before.jsonl").read_bytes() == (whole / "out" / "search.jsonl").read_bytes()


def test_a_whole_student_is_published_as_combined(whole: Path) -> None:
    told, folder = table(whole), whole / "out" / "pipeline"
    alphas = told["weights"][told["published"]]
    unet = load_pipeline(str(folder)).unet.state_dict()
    states = [load_file(one.path) for one in list_weights(whole / "run")]
    for name, value in unet.items():
        exact = sum(a * one[name].double() for a, one in zip(alphas, states, strict=True))
        torch.testing.assert_close(value, exact.float(), atol=0, rtol=2**-22)
    assert read_record(folder) == replace(read_record(whole / "run" / "pipeline"), base_model="../../teacher")
    provenance = read_provenance(folder)
    assert provenance.combination["weights"] == dict(zip(map(str, STEPS), alphas, strict=True))
    first, second = provenance.command.split("\n")
    assert first == "python training/distill_lcm.py"
    assert second.startswith("python training/combine.py --run_dir run ")
    card = (folder / "README.md").read_text("utf-8")
    assert "## Combined from snapshots" in card
    for name in told["weights"]:
        assert f"| {name} | " in card
    assert f"| 20 | {alphas[1]:.4f} |" in card
    assert f"{provenance.combination['objective']}" in card


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_the_holdout_measured_what_is_published(kind: str, request: pytest.FixtureRequest) -> None:
    """From its folder, after the SVD, on other images and seeds."""
    told = table(home := request.getfixturevalue(kind))
    config = ObjectiveConfig(
        num_inference_steps=[1, 2], num_images=12, feature_extractor=str(home / "classifier"), eval_batch_size=12
    )
    data = ReferenceConfig(train_data_dir=str(home / "data"), resolution=32)
    bench = make_bench(config, data, home / "out" / ("pipeline" if kind == "whole" else "lora"))
    assert bench.holdout.seeds == range(12, 24)
    assert not torch.equal(bench.holdout.real, bench.search.real)
    rows = [row for row in told["holdout"] if row["pipeline"] == told["published"]]
    for row, found in zip(rows, bench.holdout.rows(bench.holdout.draw()), strict=True):
        assert found["fid"] == pytest.approx(row["fid"], rel=1e-4)
        assert found["coverage"] == row["coverage"]


def test_the_search_measured_as_our_evaluation_does(whole: Path) -> None:
    told = table(whole)
    config = EvaluationConfig(
        pipelines=[str(whole / "out" / "pipeline")], num_inference_steps=[1, 2], num_images=12, eval_batch_size=12,
        feature_extractor=str(whole / "classifier"),
    )  # fmt: skip
    comparison = Comparison(config, ReferenceConfig(train_data_dir=str(whole / "data"), resolution=32))
    rows = [row for row in told["search_set"] if row["pipeline"] == told["published"]]
    for row, found in zip(rows, comparison.run()[1:], strict=True):
        numbers = [name for name, value in row.items() if isinstance(value, float)]
        assert len(numbers) == 8
        assert [found[name] for name in numbers] == pytest.approx([row[name] for name in numbers], rel=1e-5)


def test_a_lora_is_published_with_its_rank_and_scale(lora: Path) -> None:
    folder = lora / "out" / "lora"
    told = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"]) == (3, 9.0)
    assert read_provenance(folder).settings["lora_rank"] == 3
    assert base_model_of(read_record(folder), folder) == str(lora / "teacher")
    assert "exactly what was combined" in (folder / "README.md").read_text("utf-8")
    ranks = {
        len(value)
        for name, value in load_file(folder / "peft" / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert ranks == {3}


class Ring(Sheet):
    """Images that are those of the reference, moved away as far as the network's vector is from the best one."""

    def __init__(self, network: SimpleNamespace, best: list[float]) -> None:
        self.config = ObjectiveConfig(num_inference_steps=[1, 2], step_weights=[3.0, 1.0], bootstrap_samples=40)
        self.extractor, self.asked, self.labels = None, None, [None] * 60
        self.real = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
        self.network, self.best = network, np.array(best)

    def draw(self) -> dict[int, Tensor] | None:
        apart = float(np.linalg.norm(self.network.vector - self.best))
        return None if apart > 3 else {steps: self.real + apart * steps for steps in (1, 2)}

    def _quality(self, features: Tensor, chosen: Sequence[int], columns: Collection[str] = ("fid",)) -> Row:
        return super()._quality(features, chosen, columns)


KNOWN = baselines([1, 2, 3], [0.5, 0.9], [0.1])


def fake_network() -> SimpleNamespace:
    network = SimpleNamespace()
    network.put = network.put_published = lambda vector: setattr(network, "vector", np.array(vector))
    return network


def sought(path: Path, evaluations: int, **config: object) -> tuple[SimpleNamespace, dict[str, Entry], Entry]:
    """A search whose optimum is [0.5, -0.6, 1.1]."""
    network, settings = fake_network(), SearchConfig(evaluations=evaluations, **config)
    return network, *searched(network, Ring(network, [0.5, -0.6, 1.1]), SearchLog(path, {}), KNOWN, settings)


def combined(path: Path, unseen: list[float]) -> tuple[dict[str, Entry], Entry, runs.Verdict]:
    """The same, and a hold-out where the optimum is `unseen`."""
    network, found, best = sought(path, 150)
    return found, best, judged(network, Ring(network, unseen), chosen(found, KNOWN), best)


def test_what_is_better_on_unseen_images_is_accepted(tmp_path: Path) -> None:
    found, best, verdict = combined(tmp_path / "log", [0.5, -0.6, 1.1])
    assert best.vector == pytest.approx([0.5, -0.6, 1.1], abs=0.01)
    assert best.value < min(entry.value for entry in found.values())
    assert verdict.accepted
    assert verdict.share == 1
    assert verdict.published.name == "found"
    assert verdict.differences.mean() == pytest.approx(verdict.contenders[-1].value - verdict.best.value, rel=0.3)


def test_what_was_better_on_seen_images_alone_is_not(tmp_path: Path) -> None:
    _, best, verdict = combined(tmp_path / "log", [0.0, 0.0, 1.0])
    assert verdict.best.name == "last (step 3)"
    assert not verdict.accepted
    assert verdict.share == 0
    assert verdict.published is verdict.best
    assert verdict.contenders[-1].entry is best


def test_wild_weights_are_worth_nothing_and_end_nothing(tmp_path: Path) -> None:
    """Whose images are not finite."""
    network = fake_network()
    log = SearchLog(tmp_path / "log", {})
    searched(network, Ring(network, [2.2, 0.0, -1.2]), log, KNOWN, SearchConfig(evaluations=60, mutation_std=1.0))
    assert {np.inf} < {entry.value for entry in log.entries}
    with pytest.raises(ValueError, match="No average of the snapshots draws images whose fid can be measured"):
        searched(network, Ring(network, [9.0, -8.0, 0.0]), SearchLog(tmp_path / "other", {}), KNOWN, SearchConfig())


def test_the_pull_holds_the_search_near_the_best_ema(tmp_path: Path) -> None:
    apart = []
    for pull in (0.0, 1.0, 100.0):
        _, found, best = sought(tmp_path / f"{pull}", 80, pull=pull)
        ema = min((found[name] for name in found if "EMA" in name), key=lambda entry: entry.value)
        apart.append(np.linalg.norm(np.subtract(best.vector, ema.vector)))
    assert apart[0] > 1.5 * apart[1] > 3 * apart[2]


def test_the_objective_is_a_mean_over_the_steps_and_less_is_better() -> None:
    sheet = Ring(fake_network(), [0.0])
    rows = [
        {"num_inference_steps": 1, "fid": 8.0, "coverage": 0.4},
        {"num_inference_steps": 2, "fid": 4.0, "coverage": 0.8},
    ]
    assert sheet.value(rows) == 3 / 4 * 8 + 1 / 4 * 4
    sheet.config.objective = "coverage"
    assert sheet.value(rows) == pytest.approx(-(3 / 4 * 0.4 + 1 / 4 * 0.8))
    assert sheet.shown(sheet.value(rows)) == pytest.approx(0.5)
    sheet.config.step_weights = [0.0, 1.0]
    assert sheet.value(rows) == sheet.value(rows[1:]) == -0.8
    assert sheet.value([]) == sheet.value([{"num_inference_steps": 2, "coverage": None}]) == np.inf


def test_the_bootstrap_is_paired() -> None:
    """One constant shift of all images: every resample sees nearly the same difference; images drawn apart would not."""
    sheet = Ring(fake_network(), [0.0])
    noise = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    other = torch.randn(60, 3, generator=torch.Generator().manual_seed(2))
    one, near, far = ({1: x, 2: x} for x in (noise, noise + 0.05, other + 0.05))
    paired, apart = sheet.differences(near, one), sheet.differences(far, one)
    assert paired.std() < 0.3 * apart.std()
    assert (sheet.differences(one, one) == 0).all()
    assert len(paired) == 40


WRONG = {
    "no snapshots": ({"run_dir": "{home}/teacher"}, "has no folder snapshots with weights to choose from: train with --snapshot_steps"),
    "one snapshot": ({"run_dir": "{home}/one"}, "keeps the weights of step 10 alone: at least two are combined"),
    "not ended": ({"run_dir": "{home}/unended"}, "has neither a folder pipeline nor a folder lora: the training has not ended"),
    "window": ({"window": [11, 29]}, "keeps the weights of step 20 alone in --window 11 29: at least two are combined"),
    "empty window": ({"window": [11, 19]}, "keeps no weights between steps 11 and 19; it has those of 10 to 30"),
    "half a window": ({"window": 10}, "--window takes the first and the last step, but 1 numbers were given"),
    "column": ({"objective": "beauty"}, "argument --objective: invalid choice: 'beauty'"),
    "column without its data": ({"objective": "vendi"}, "--objective vendi cannot be measured on these images"),
    "output": ({"output_dir": "{home}/teacher"}, "teacher exists already: give a new folder."),
    "output with a log": ({"output_dir": "{home}/logged"}, "give a new folder, or --resume, for it has a search.jsonl"),
    "resumed result": ({"output_dir": "{home}/out", "resume": True}, "has its result already, in pipeline"),
    "weights": ({"step_weights": [1.0]}, "--step_weights gives 1 weights for 2 numbers of steps"),
    "no weight": ({"step_weights": [0, 0]}, "--step_weights are all 0"),
    "steps twice": ({"num_inference_steps": [2, 2]}, "names one number twice: 2 2"),
    "shared noise": ({"holdout_seed": 11}, "--holdout_seed 11 shares noise with the search's seeds from 0 to 11"),
    "few images": ({"num_images": 5}, "--num_images is 5: the metrics need more than 5"),
    "few real images": ({"num_images": 13}, "has not twice the 13 images of --num_images"),
    "rank": ({"lora_rank": 4}, "--lora_rank has no effect on a run that trained the whole network"),
    "many steps": ({"num_inference_steps": [1, 900]}, "cannot be sampled in 900 steps"),
    "too small a box": ({"alpha_max": 0.5}, "--alpha_max must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_combined_is_refused_in_one_sentence(whole: Path, tmp_path: Path, case: str) -> None:
    changes, words = WRONG[case]
    for name in ("one", "unended"):
        (whole / name).mkdir(exist_ok=True)
        for step in STEPS[: 1 if name == "one" else 2]:
            if step not in [one.step for one in list_weights(whole / name)]:
                snapshot(whole / name, step, tiny_unet())
    (whole / "logged").mkdir(exist_ok=True)
    (whole / "logged" / "search.jsonl").touch()
    changes = {
        name: str(value).format(home=whole) if name.endswith("dir") else value for name, value in changes.items()
    }
    with pytest.raises(SystemExit) as ended:
        run_script("combine", **flags(whole, output_dir=tmp_path / "new") | changes)
    assert words in ended.value.code
    assert "\n" not in ended.value.code
    assert not (tmp_path / "new").exists()
