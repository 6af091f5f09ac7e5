"""Optional packages: which value of a flag needs one, and the extra of this package that brings it."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from typing import NamedTuple

from cm_diffusers.errors import UserError


class Need(NamedTuple):
    """A package by the name it is imported by and the name it is installed by, and the extra that lists it."""

    module: str
    package: str
    extra: str


BITSANDBYTES = Need("bitsandbytes", "bitsandbytes", "bnb")
TORCHAO = Need("torchao", "torchao", "torchao")
TIMM = Need("timm", "timm", "timm")
LPIPS = Need("lpips", "lpips", "metrics")
FIDELITY = Need("torch_fidelity", "torch-fidelity", "metrics")
TORCHVISION = Need("torchvision", "torchvision", "metrics")
POT = Need("ot", "POT", "train")
CMA = Need("cma", "cma", "cma")
PYAV = Need("av", "av", "video")
TRACKERS = {
    name: Need(name, name, extra)
    for name, extra in {"tensorboard": "train", "wandb": "wandb", "trackio": "trackio"}.items()
}
OF_TRAINING = [
    Need("datasets", "datasets", "train"),
    Need("matplotlib", "matplotlib", "train"),
    Need("pyarrow", "pyarrow", "train"),
    Need("torchmetrics", "torchmetrics", "train"),
]
NEEDS = {  # flag -> how its value begins -> what it needs; what depends on the data or a checkpoint is found there
    "optimizer": {"adamw_8bit": BITSANDBYTES, "adamp": TIMM},
    "quantize_teacher": {"bnb": BITSANDBYTES, "torchao": TORCHAO},
    "loss_type": {"lpips": LPIPS},
    "coupling": {"ot": POT},
    "search": {"cma": CMA},
    "feature_extractor": {"inception": FIDELITY},
    "rewards": {"multi_view": TORCHVISION},
    "held_out_rewards": {"multi_view": TORCHVISION},
    "report_to": TRACKERS,
    "train_shards_path_or_url": {"http": Need("aiohttp", "aiohttp", "streaming")},
}


def needs_of(configs: Iterable[object]) -> Iterator[tuple[str, Need]]:
    """What the flags of dataclasses need: `--flag value`, and the package."""
    for config in configs:
        for name, value in asdict(config).items():
            for given in value if isinstance(value, list) else [value]:
                for beginning, need in NEEDS.get(name, {}).items():
                    if str(given).startswith(beginning):
                        yield f"--{name} {given}", need


def check_installed(configs: Iterable[object]) -> None:
    """
    Raises:
        ValueError: A flag needs a package that is not installed.
    """
    for what, need in needs_of(configs):
        if find_spec(need.module) is None:
            raise UserError(missing(what, need))


def missing(what: str, need: Need) -> str:
    """The sentence for a package that is not installed."""
    return f'{what} needs {need.package}, which is not installed: pip install "cm_diffusers[{need.extra}]".'


def require_training() -> None:
    """
    Raises:
        ModuleNotFoundError: The package was installed to sample alone.
    """
    for need in OF_TRAINING:
        if find_spec(need.module) is None:
            raise ModuleNotFoundError(missing("Training and evaluation", need))
