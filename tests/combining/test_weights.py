"""Sums of stored weights: to the bit where that can be, in the memory of one, and only of one network."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_runs import keep
from torch import Tensor, nn

from cm_diffusers.combining.vectors import ema, one_hot
from cm_diffusers.combining.weights import Snapshots
from cm_diffusers.engine.averages import MovingAverage
from cm_diffusers.engine.snapshots import list_weights


def state(seed: int) -> dict[str, Tensor]:
    """Of each kind of tensor; floats with both zeros, and with numbers that float16 rounds."""
    generator = torch.Generator().manual_seed(seed)
    zeros = {"zeros": torch.tensor([0.0, -0.0])}
    floats = {
        f"{dtype}".removeprefix("torch."): torch.randn(5, 7, generator=generator).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    return (
        floats
        | zeros
        | {"count": torch.tensor(seed), "mask": torch.arange(4) < seed, "scalar": torch.tensor(1.0 * seed)}
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (300, 20, 1000):
        keep(tmp_path, step, state(step))
    return tmp_path


def combined(run: Path, alphas: np.ndarray, **options: object) -> dict[str, Tensor]:
    snapshots = Snapshots(list_weights(run), **options)
    return dict(snapshots.combined(alphas, list(snapshots.shapes)))


@pytest.mark.parametrize(("index", "step"), [(0, 20), (1, 300), (2, 1000)])
def test_one_alone_is_itself_to_the_bit(run: Path, index: int, step: int) -> None:
    found, wanted = combined(run, one_hot(3, index)), state(step)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        wanted[name] = state(1000)[name] if name in ("count", "mask") else wanted[name]
        assert value.dtype == wanted[name].dtype
        assert (
            value.contiguous()
            .view(torch.uint8 if value.ndim else value.dtype)
            .equal(wanted[name].contiguous().view(torch.uint8 if value.ndim else value.dtype))
        )


def test_sums_are_rounded_once_at_the_end(run: Path) -> None:
    alphas = np.array([1.7, -0.9, 0.2])
    found, states = combined(run, alphas), [state(step) for step in (20, 300, 1000)]
    for name in ("float64", "float32", "float16", "bfloat16", "scalar"):
        exact = sum(alpha * one[name].double() for alpha, one in zip(alphas.tolist(), states, strict=True))
        wanted = exact.to(states[0][name].dtype)
        assert torch.equal(found[name], wanted) or (name == "float64" and torch.allclose(found[name], wanted, 1e-14))
    single = combined(run, alphas, dtype=torch.float32)
    assert not torch.equal(single["float64"], found["float64"])
    torch.testing.assert_close(single["float64"], found["float64"], atol=1e-6, rtol=0)


def test_the_vector_of_an_ema_gives_the_running_ema(tmp_path: Path) -> None:
    """The first snapshot is where it starts."""
    model = nn.Linear(6, 5)
    average = MovingAverage(model, lambda step: 0.7)
    for step in range(8):
        if step:
            nn.init.normal_(model.weight)
            average.update(step)
        keep(tmp_path, step, model.state_dict())
    found = combined(tmp_path, ema(8, 0.7))
    torch.testing.assert_close(found["weight"], average.average["weight"], atol=1e-6, rtol=0)
    assert ema(8, 0.7)[0] == pytest.approx(0.7**7)
    assert ema(8, 0.7)[1:] == pytest.approx(0.3 * 0.7 ** np.arange(6, -1, -1))


def test_another_network_is_refused(run: Path) -> None:
    keep(run, 40, state(1) | {"float32": torch.zeros(5, 8)})
    with pytest.raises(ValueError, match=r"step-40.* are of different networks: 1 tensors differ, such as float32"):
        Snapshots(list_weights(run))
    list_weights(run)[1].path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"step-40.* is no whole safetensors file"):
        Snapshots(list_weights(run))


MEASURE = """
import json, resource, sys
import torch
from pathlib import Path
from cm_diffusers.combining.weights import Snapshots
from cm_diffusers.engine.snapshots import list_weights

def peak():  # of this process: ru_maxrss begins with that of its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

snapshots = Snapshots(list_weights(Path(sys.argv[1])))
alphas = [1 / 20] * 20
small = list(snapshots.combined(alphas, ["0"]))  # code and buffers of the libraries
before = peak()
place = {name: torch.ones(shape) for name, shape in snapshots.shapes.items()}
for name, value in snapshots.combined(alphas, list(snapshots.shapes)):
    place[name].copy_(value)
print(json.dumps([peak() - before, place["3"].mean().item()]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_twenty_are_combined_in_the_memory_of_less_than_two_and_a_half(tmp_path: Path) -> None:
    """Pages of the mapped files included, and the network that is filled."""
    for i in range(20):
        keep(tmp_path, i, {str(j): torch.full((250, 250), float(i)) for j in range(40)})  # 10 MB
    told = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    peak, mean = json.loads(told.stdout)
    assert mean == 9.5
    assert peak / list_weights(tmp_path)[0].path.stat().st_size < 2.5
