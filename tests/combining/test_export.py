"""`export_average.py` on snapshots: SWA, EMA and one alone, of whole students and of LoRAs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_runs import STEPS, lora_run, whole_run
from safetensors.torch import load_file
from scripts import run_script
from torch import Tensor

from cm_diffusers.engine.snapshots import list_weights
from cm_diffusers.publishing.provenance import read_provenance
from cm_diffusers.record import base_model_of, read_record


KINDS = {  # flags -> the weights of the three snapshots
    "SWA": ({}, [1 / 3, 1 / 3, 1 / 3]),
    "SWA of a window": ({"window": [20, 30]}, [0, 0.5, 0.5]),
    "EMA": ({"ema_rate": 0.8}, [0.64, 0.16, 0.2]),
    "one": ({"step": 20}, [0, 1, 0]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora_run(tmp_path_factory.mktemp("lora"))


def snapshots(run: Path) -> list[dict[str, Tensor]]:
    return [load_file(one.path) for one in list_weights(run)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_averaged_snapshots_is_published(tmp_path: Path, whole: Path, kind: str) -> None:
    flags, weights = KINDS[kind]
    run_script("export_average", run_dir=whole, output_dir=tmp_path / "out", **flags)
    found, states = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"), snapshots(whole)
    for name, value in found.items():
        wanted = sum(weight * state[name].double() for weight, state in zip(weights, states, strict=True)).float()
        torch.testing.assert_close(value, wanted, rtol=2e-7, atol=1e-7)
        assert kind != "one" or torch.equal(value, states[1][name])
    told = read_provenance(tmp_path / "out").settings["weights_of_steps"]
    assert list(map(int, told)) == [step for step, weight in zip(STEPS, weights, strict=True) if weight]
    assert np.array(list(told.values())) == pytest.approx([weight for weight in weights if weight])
    found, wanted = read_record(tmp_path / "out"), read_record(whole / "pipeline")
    assert replace(found, base_model=None) == replace(wanted, base_model=None)
    assert Path(base_model_of(found, tmp_path / "out")).samefile(base_model_of(wanted, whole / "pipeline"))


def test_the_average_of_loras_is_that_of_what_they_add(tmp_path: Path, lora: Path) -> None:
    run_script("export_average", run_dir=lora, output_dir=tmp_path / "out", lora_rank=6)  # 3 x 2: exact
    found = load_file(tmp_path / "out" / "peft" / "adapter_model.safetensors")
    path = next(name for name in found if name.endswith("to_q.lora_A.weight"))
    stored = path.removeprefix("base_model.model.").replace("lora_A", "lora_A.default")
    scale = 3.0  # alpha 6 of rank 2
    parts = [scale * state[stored.replace("_A", "_B")] @ state[stored] for state in snapshots(lora)]
    total = scale * found[path.replace("_A", "_B")] @ found[path]
    torch.testing.assert_close(total, sum(parts) / 3, rtol=1e-4, atol=1e-5)
    factors = [sum(state[name] for state in snapshots(lora)) / 3 for name in (stored.replace("_A", "_B"), stored)]
    assert (scale * factors[0] @ factors[1] - total).abs().max() > 0.01  # the average of factors is another one


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"step": 21}, "has no snapshot of step 21; of 10, 20, 30 it has"),
        ({"step": 20, "window": [10, 20]}, "--window has no effect with --step"),
        ({"sigma_rel": 0.1, "ema_rate": 0.9}, "--ema_rate has no effect with --sigma_rel"),
        ({"sigma_rel": 0.1}, "has no folder averages with averages to choose from"),
        ({"window": [21, 29]}, "keeps no weights between steps 21 and 29"),
        ({"lora_rank": 4}, "--lora_rank has no effect on a run that trained the whole network"),
    ],
)
def test_what_is_not_there_is_told(tmp_path: Path, whole: Path, flags: dict, sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        run_script("export_average", run_dir=whole, output_dir=tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()
