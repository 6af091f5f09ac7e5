"""Lets diffusers' own loaders find this package's classes, once it is imported."""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import diffusers

from cm_diffusers.pipelines import (
    ConsistencyImagesPipeline,
    ConsistencyImg2ImgPipeline,
    ConsistencyInpaintPipeline,
    ConsistencyPipeline,
    ConsistencyVideoPipeline,
)
from cm_diffusers.pipelines.recorded import RecordedMixin
from cm_diffusers.schedulers import ConsistencyScheduler, EDMConsistencyScheduler


NAME = "consistency"
CLASSES = (
    ConsistencyPipeline,
    ConsistencyImg2ImgPipeline,
    ConsistencyInpaintPipeline,
    ConsistencyImagesPipeline,
    ConsistencyVideoPipeline,
    ConsistencyScheduler,
    EDMConsistencyScheduler,
)
SAVE_AND_LOAD = ("save_pretrained", "from_pretrained")
BASES = ("SchedulerMixin", "ModelMixin", "DiffusionPipeline")  # attributes of the package, where diffusers looks


def register() -> None:
    """Enter the classes in diffusers' tables; again is harmless.

    The tables are private. Where a release of diffusers has changed one, the rest is entered, one warning says what
    does not work, and the explicit classes still do.
    """
    failures = {what: error for what, enter in ENTRIES.items() if (error := _failure(enter)) is not None}
    if failures:
        reasons = "; ".join(f"{what} ({error})" for what, error in failures.items())
        _warn(
            f"diffusers {diffusers.__version__} does not take cm_diffusers' classes in {reasons}; load with "
            "ConsistencyPipeline.from_pretrained and its siblings instead."
        )


def _describe(pipe: RecordedMixin, folder: Path, name: str) -> None:
    """What publishing, which builds on the pipelines, writes beside one that is saved."""
    from cm_diffusers.publishing.folders import optional
    from cm_diffusers.publishing.saved import describe

    with optional("Its card"):
        describe(pipe, folder, name)


RecordedMixin.describe = _describe


def _enter_components() -> None:
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    LOADABLE_CLASSES["cm_diffusers"] = {base: list(SAVE_AND_LOAD) for base in BASES}


def _enter_classes() -> None:
    taken = [cls.__name__ for cls in CLASSES if getattr(diffusers, cls.__name__, cls) is not cls]
    for cls in CLASSES:
        if cls.__name__ not in taken:
            setattr(diffusers, cls.__name__, cls)
    if taken:
        raise AttributeError(f"diffusers has its own {', '.join(taken)}")


def _enter_tasks() -> None:
    from diffusers.pipelines import auto_pipeline

    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[NAME] = ConsistencyPipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING[NAME] = ConsistencyImg2ImgPipeline
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING[NAME] = ConsistencyInpaintPipeline


ENTRIES: dict[str, Callable[[], None]] = {
    "DiffusionPipeline.from_pretrained": _enter_classes,
    "model_index.json": _enter_components,
    "AutoPipeline": _enter_tasks,
}


def _failure(enter: Callable[[], None]) -> Exception | None:
    try:
        enter()
    except (ImportError, AttributeError, TypeError) as error:
        return error
    return None


@cache
def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
