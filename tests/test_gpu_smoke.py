"""The CPU path of the smoke test, and how its GPU path notices a step that waits for the device."""

import re
import sys
from pathlib import Path

import pytest
import torch
from scripts import FOLDER, script

from cm_diffusers.engine.trainer import Trainer


sys.path.append(str(FOLDER.parent / "benchmarks"))
import gpu_smoke
import smoke_methods
from gpu_smoke import WARM_UP, Row, SmokeConfig, Watch, all_rows, as_table


def test_two_methods_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of LCM takes five passes and a backward pass, 7 F; one of CT a pass less than that: 1 + 3."""
    monkeypatch.setattr(gpu_smoke.torch.cuda, "is_available", lambda: False)
    config = SmokeConfig(["CT", "LCM"], train_batch_size=2)
    lcm, ct = all_rows(config, tmp_path)  # in the order of the table
    assert [(row.method, row.how, row.error) for row in (lcm, ct)] == [("LCM", "no", ""), ("CT", "no", "")]
    assert min(lcm.steps_per_second, ct.steps_per_second) > 0
    planned = script("plan")
    given = planned.configs_of(planned.load("distill_lcm"), gpu_smoke.words_of("LCM", tmp_path, "no", 1, 2, False))
    counted = planned.count(
        planned.training_of(given, lambda place, flag: planned.start_of(place, flag, planned.trained)), given
    )
    assert lcm.tflop * 1e12 == pytest.approx(
        2 * counted.flops, rel=0.1
    )  # of fused attention on CPUs nothing is counted
    table = as_table(config, [lcm, ct])
    assert re.search(r"\| LCM \| no \| [\d.]+ \| [\d.]+ \| – \| – \| well \|", table)


def test_a_step_that_waits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the warm-up only: the first steps make the optimizer's state."""
    modes, seen = [], []
    monkeypatch.setattr(gpu_smoke.torch.cuda, "set_sync_debug_mode", modes.append)

    def step(trainer: object, stream: object) -> tuple:
        seen.append(modes[-1:] == ["error"])
        if len(seen) == WARM_UP + 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        return None, 0

    monkeypatch.setattr(Trainer, "training_step", step)
    watch = Watch(5, strict=True, counts=False, ends=True)

    def train() -> None:
        while True:
            Trainer.training_step(None, None)

    with watch.watching():
        error = gpu_smoke.first_error(train)
    assert seen == [False] * WARM_UP + [True, True]
    assert modes[-1] == "default"
    assert error.startswith("RuntimeError: called a synchronizing CUDA operation")
    assert "| RuntimeError" in as_table(SmokeConfig(), [Row("LCM", "bf16", error=error)])


def test_every_training_script_has_a_row() -> None:
    scripts = {path.stem for kind in ("distill", "train", "tune", "finetune") for path in FOLDER.glob(f"{kind}_*.py")}
    assert scripts - {name for name, _ in smoke_methods.METHODS.values()} == {
        "train_classifier"
    }  # one pass of a tiny network
    assert {
        *smoke_methods.COMPILED,
        *smoke_methods.SHARDED,
        *smoke_methods.LOOKS_ITSELF,
    } <= smoke_methods.METHODS.keys()


def test_compiled_runs_are_measured_against_the_operations_of_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_smoke.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    rows = [Row("LCM", "bf16", 10.0, 9.89, 3.0), Row("LCM", "bf16, compiled", 20.0, 0.0, 2.0)]
    table = as_table(SmokeConfig(), rows)
    assert "| 10.00 | 9.89e+03 | 10.0% | 3.00 | well |" in table  # of 989
    assert "| 20.00 | 9.89e+03 | 20.0% | 2.00 | well |" in table


def test_sharding_is_skipped_with_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu_smoke, "find_spec", lambda name: None)
    assert gpu_smoke.sharded_rows(SmokeConfig(), ["LCM"]) == []
    assert capsys.readouterr().out == "FSDP2: skipped, this version of cm_diffusers does not shard.\n"
    assert torch.cuda.is_available() or gpu_smoke.unsharded_because([]) != ""
