"""Set before anything imports torch or a Hugging Face library: offline, silent, one thread per xdist worker, seeded."""

import os
import tempfile


MODULES = tempfile.TemporaryDirectory()  # where diffusers copies single-file pipelines
os.environ.setdefault("HF_MODULES_CACHE", MODULES.name)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
UNDER_XDIST = "PYTEST_XDIST_WORKER" in os.environ
if UNDER_XDIST:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # reaches the processes a test starts, too

import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402


if UNDER_XDIST:
    torch.set_num_threads(1)


load_mapped = safetensors.torch.load_file


def load_aligned(path: str, device: str | int = "cpu") -> dict[str, Tensor]:
    """A mapped file's weights begin anywhere, and some CPUs round otherwise there: a bit of 1e-7, where tests ask for equality."""
    return {name: tensor.clone() for name, tensor in load_mapped(path, device).items()}


safetensors.torch.load_file = load_aligned  # before anything else imports it


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay in the map of their file, as outside of tests."""
    monkeypatch.setattr(safetensors.torch, "load_file", load_mapped)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whatever ran before it in the same process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
