"""Lets diffusers' own loaders find this package's classes, once it is imported."""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import cm_diffusers


if TYPE_CHECKING:
    from cm_diffusers.pipelines.recorded import RecordedMixin


NAME = "consistency"
CLASSES = (
    "ConsistencyPipeline",
    "ConsistencyImg2ImgPipeline",
    "ConsistencyInpaintPipeline",
    "ConsistencyImagesPipeline",
    "ConsistencyVideoPipeline",
    "ConsistencyScheduler",
    "EDMConsistencyScheduler",
    "TrigFlowConsistencyScheduler",
    "FlowConsistencyScheduler",
)
SAVE_AND_LOAD = ("save_pretrained", "from_pretrained")
BASES = ("SchedulerMixin", "ModelMixin", "DiffusionPipeline")  # attributes of the package, where diffusers looks


def register() -> None:
    """Enter the classes in diffusers' tables, now or as soon as diffusers is imported; again is harmless.

    The tables are private. Where a release of diffusers has changed one, the rest is entered, one warning for each says
    what does not work, and the explicit classes still do.
    """
    if not any(isinstance(finder, _Awaited) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaited())
    for name in ENTRIES:
        if name in sys.modules:
            _enter(name)


class _Awaited(MetaPathFinder):
    """Enters the classes when the module that takes them has been imported: importing it here would take seconds."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in ENTRIES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _enter(name)

            spec.loader.exec_module = execute_and_enter
        return spec


class _Late:
    """A class of ours as an attribute of diffusers, imported when asked for; what diffusers itself sets wins."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: ModuleType, owner: type) -> type:
        return getattr(cm_diffusers, self.name)


def _enter_classes(diffusers: ModuleType) -> None:
    """Some of diffusers' modules may be on their way here: nothing of ours that needs them is imported."""
    taken = [name for name in CLASSES if _is_another(getattr(diffusers, name, None))]
    ours = {name: _Late(name) for name in CLASSES if name not in taken}
    diffusers.__class__ = type("WithOurs", (type(diffusers),), ours)
    if taken:
        raise AttributeError(f"diffusers has its own {', '.join(taken)}")


def _is_another(cls: type | None) -> bool:
    return cls is not None and not cls.__module__.startswith("cm_diffusers.")


def _enter_components(pipeline_loading_utils: ModuleType) -> None:
    pipeline_loading_utils.LOADABLE_CLASSES["cm_diffusers"] = {base: list(SAVE_AND_LOAD) for base in BASES}


def _enter_tasks(auto_pipeline: ModuleType) -> None:
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[NAME] = cm_diffusers.ConsistencyPipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING[NAME] = cm_diffusers.ConsistencyImg2ImgPipeline
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING[NAME] = cm_diffusers.ConsistencyInpaintPipeline


def _enter_describe(recorded: ModuleType) -> None:
    recorded.RecordedMixin.describe = _describe


def _describe(pipe: "RecordedMixin", folder: Path, name: str) -> None:
    """What publishing, which builds on the pipelines, writes beside one that is saved."""
    from cm_diffusers.errors import optional
    from cm_diffusers.publishing.folders import WITHOUT
    from cm_diffusers.publishing.saved import describe

    with optional("Its card", WITHOUT):
        describe(pipe, folder, name)


# A module, what needs an entry in it, and how it is made.
ENTRIES: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "diffusers": ("DiffusionPipeline.from_pretrained", _enter_classes),
    "diffusers.pipelines.pipeline_loading_utils": ("model_index.json", _enter_components),
    "diffusers.pipelines.auto_pipeline": ("AutoPipeline", _enter_tasks),
    "cm_diffusers.pipelines.recorded": ("save_pretrained", _enter_describe),
}


def _enter(name: str) -> None:
    what, enter = ENTRIES[name]
    try:
        enter(sys.modules[name])
    except (ImportError, AttributeError, TypeError) as error:
        _warn(
            f"diffusers {sys.modules['diffusers'].__version__} does not take cm_diffusers' classes in {what} ({error}); "
            "load with ConsistencyPipeline.from_pretrained and its siblings instead."
        )


@cache
def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
