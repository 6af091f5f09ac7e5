"""Three walks through the package, traced: `PYTHONPATH=src python tests/walks.py` writes them into docs/concepts/walks.md.

A step of a walk is the first entry into a file, with the file it was entered from: the nearest of ours that was running.
"""

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from unittest import mock

from scripts import data_flags, flags, image_folder, script
from tiny import tiny_pipeline
from toys import forget_accelerate

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.data.generated import GenerationConfig, training_batches
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.objectives.lcm import LCMObjective


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "concepts" / "walks.md"
HERE = {ROOT / "src" / "cm_diffusers": "", ROOT / "training": "training/"}
# How flags check themselves and make their defaults, and how python finds modules and names of diffusers: no step.
ASIDE = {"__post_init__", "check", "<lambda>", "find_spec", "__get__", "__getattr__"}
BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@cache
def name_of(code: CodeType) -> str | None:
    """`objectives/lcm.py` or `training/distill_lcm.py`; None for code that is not ours, or that an import runs."""
    path = Path(code.co_filename)
    homes = [(home, prefix) for home, prefix in HERE.items() if home in path.parents]
    if not homes or code.co_name == "<module>":
        return None
    home, prefix = homes[0]
    return prefix + path.relative_to(home).as_posix()


def caller_of(frame: FrameType) -> str | None:
    """The nearest file of ours below a frame in the stack, whatever of torch or diffusers lies between."""
    while (frame := frame.f_back) is not None:
        if (name := name_of(frame.f_code)) is not None:
            return name
    return None


@dataclass
class Walk:
    """The first entries (file, entered from) in order, and every pair of files of which one called into the other."""

    steps: list[tuple[str, str | None]] = field(default_factory=list)
    calls: set[tuple[str | None, str]] = field(default_factory=set)

    @contextmanager
    def traced(self, until: CodeType | None = None) -> Iterator[None]:
        """Looks on while the block runs, or until a function returns."""

        def look(frame: FrameType, event: str, _: object) -> None:
            if event == "return" and frame.f_code is until:
                sys.setprofile(None)
            if event == "call" and frame.f_code.co_name not in ASIDE and (name := name_of(frame.f_code)):
                self.enter(name, caller_of(frame))

        sys.setprofile(look)
        try:
            yield
        finally:
            sys.setprofile(None)

    def enter(self, name: str, origin: str | None) -> None:
        if name not in [entered for entered, _ in self.steps]:
            self.steps.append((name, origin))
        self.calls.add((origin, name))

    def table(self) -> str:
        rows = [
            f"| {i} | `{name}` | {f'`{origin}`' if origin else ''} |" for i, (name, origin) in enumerate(self.steps, 1)
        ]
        return "\n".join(["|  | file | entered from |", "| ---: | --- | --- |", *rows]) + "\n"


def to_the_loss(folder: Path) -> Walk:
    """From `training/distill_lcm.py` to the first loss."""
    walk = Walk()
    tiny_pipeline().save_pretrained(folder / "teacher")
    given = {"pretrained_teacher_model": folder / "teacher", "output_dir": folder / "run", "max_train_steps": 1}
    data = data_flags(image_folder(folder / "images", 2), folder / "cache")
    argv = flags(**given, unet_time_cond_proj_dim=16, **data)
    main = script("distill_lcm").main
    forget_accelerate()
    with mock.patch.object(sys, "argv", ["distill_lcm.py", *argv]), walk.traced(LCMObjective.__call__.__code__):
        main()
    forget_accelerate()
    return walk


def to_pixels(folder: Path) -> Walk:
    """From `ConsistencyPipeline.from_pretrained` to an image."""
    walk = Walk()
    with walk.traced():
        ConsistencyPipeline.from_pretrained(ROOT / "assets" / "fashion_lcm")("a photo of a bag", num_inference_steps=2)
    return walk


def to_a_batch(folder: Path) -> Walk:
    """From a folder of images to a batch."""
    walk = Walk()
    config = DataConfig(
        train_data_dir=str(image_folder(folder / "images", 2)),
        latent_cache_dir=str(folder / "cache"),
        resolution=32,
        train_batch_size=2,
    )
    teacher = tiny_pipeline()
    with walk.traced():
        next(training_batches(config, GenerationConfig(), teacher, seed=0)(0))
    return walk


WALKS: dict[str, Callable[[Path], Walk]] = {f.__name__: f for f in (to_the_loss, to_pixels, to_a_batch)}


def with_walks(text: str, tables: dict[str, str]) -> str:
    return BLOCK.sub(lambda match: f"{match[1]}{tables[match[2]]}{match[3]}", text)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        tables = {name: walk(Path(folder) / name).table() for name, walk in WALKS.items()}
    PAGE.write_text(with_walks(PAGE.read_text("utf-8"), tables), "utf-8")
