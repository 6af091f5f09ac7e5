"""Importing the package is enough for diffusers' own loaders, and costs nothing else."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import MappingProxyType

import diffusers
import pytest
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
)
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils
from hub_server import running_hub
from tiny import tiny_pipeline

import cm_diffusers
from cm_diffusers import (
    ConsistencyImg2ImgPipeline,
    ConsistencyInpaintPipeline,
    ConsistencyPipeline,
    ConsistencyScheduler,
    registration,
)


EXTRAS = ("bitsandbytes", "datasets", "matplotlib", "pyarrow", "scipy", "tensorboard", "timm", "torchmetrics")
WORKER = f"""
import json, sys
sys.modules.update(dict.fromkeys({EXTRAS}))  # as where only the core dependencies are installed
import cm_diffusers
light = "torch" not in sys.modules
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
training = [name for name in sys.modules if name.startswith(("cm_diffusers.data", "cm_diffusers.evaluation"))]
pipes = [cls.from_pretrained("ada/student") for cls in (DiffusionPipeline, AutoPipelineForText2Image)]
classes = [[type(part).__name__ for part in (pipe, pipe.scheduler)] for pipe in pipes]
json.dump(dict(light=light, training=training, classes=classes, gamma=pipes[0].scheduler.config.gamma), sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of ours whose index names the package, as `save_pretrained` of earlier releases wrote it."""
    path = tmp_path_factory.mktemp("student")
    pipe = ConsistencyPipeline.from_pipe(tiny_pipeline(), requires_safety_checker=False)
    pipe.scheduler = ConsistencyScheduler.from_config(pipe.scheduler.config, gamma=0.3)
    pipe.save_pretrained(path)
    pipe.scheduler.save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(pipe.to_json_string())
    return path


def test_the_index_names_the_package(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyPipeline"
    assert index["scheduler"] == ["cm_diffusers", "ConsistencyScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (DiffusionPipeline, ConsistencyPipeline),
        (ConsistencyPipeline, ConsistencyPipeline),
        (AutoPipelineForText2Image, ConsistencyPipeline),
        (AutoPipelineForImage2Image, ConsistencyImg2ImgPipeline),
        (AutoPipelineForInpainting, ConsistencyInpaintPipeline),
        (StableDiffusionPipeline, StableDiffusionPipeline),
    ],
)
def test_every_loader_finds_its_class(loader, expected, folder: Path) -> None:
    pipe = loader.from_pretrained(folder)
    assert type(pipe) is expected
    assert type(pipe.scheduler) is ConsistencyScheduler
    assert pipe.scheduler.config.gamma == 0.3


def test_siblings_find_each_other(folder: Path) -> None:
    pipe = ConsistencyPipeline.from_pretrained(folder)
    to_image = AutoPipelineForImage2Image.from_pipe(pipe)
    inpaint = AutoPipelineForInpainting.from_pipe(to_image)
    back = AutoPipelineForText2Image.from_pipe(inpaint)
    assert [type(p) for p in (to_image, inpaint, back)] == [
        ConsistencyImg2ImgPipeline,
        ConsistencyInpaintPipeline,
        ConsistencyPipeline,
    ]
    assert all(p.unet is pipe.unet for p in (to_image, inpaint, back))


def test_a_stock_pipeline_takes_and_returns_the_scheduler(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = ConsistencyScheduler.from_config(pipe.scheduler.config, gamma=0.3)
    pipe.save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert (type(pipe), type(pipe.scheduler)) == (StableDiffusionPipeline, ConsistencyScheduler)
    assert pipe.scheduler.config.gamma == 0.3
    assert (
        type(DiffusionPipeline.from_pretrained(tmp_path, scheduler=LCMScheduler(steps_offset=1)).scheduler)
        is LCMScheduler
    )


def test_by_hub_id_with_core_dependencies_only(folder: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        hub.add("ada/student", folder)
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        environment = os.environ | settings | {"PYTHONPATH": str(Path(cm_diffusers.__file__).parents[1])}
        run = subprocess.run([sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    pair = ["ConsistencyPipeline", "ConsistencyScheduler"]
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "light": True,
        "training": [],
        "classes": [pair, pair],
        "gamma": 0.3,
    }


def tables() -> list[dict]:
    names = ("AUTO_TEXT2IMAGE", "AUTO_IMAGE2IMAGE", "AUTO_INPAINT")
    mappings = [getattr(auto_pipeline, f"{name}_PIPELINES_MAPPING") for name in names]
    return [dict(table) for table in (pipeline_loading_utils.LOADABLE_CLASSES, *mappings)]


def test_registering_again_changes_nothing() -> None:
    before = tables()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.register()
    assert tables() == before


@pytest.fixture
def fresh_warnings():
    """Each change of diffusers is warned of once in a process."""
    registration._warn.cache_clear()
    yield
    registration._warn.cache_clear()


def warned() -> str:
    with pytest.warns(UserWarning, match="does not take") as caught:
        registration.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.register()  # once is enough
    assert len(caught) == 1
    return str(caught[0].message)


@pytest.mark.usefixtures("fresh_warnings")
class TestChangedDiffusers:
    def test_without_the_table_of_libraries(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        table = {k: v for k, v in pipeline_loading_utils.LOADABLE_CLASSES.items() if k != "cm_diffusers"}
        monkeypatch.setattr(pipeline_loading_utils, "LOADABLE_CLASSES", MappingProxyType(table))
        assert "does not take cm_diffusers' classes in model_index.json" in warned()
        pipe = ConsistencyPipeline.from_pipe(tiny_pipeline(), requires_safety_checker=False)
        pipe.save_pretrained(tmp_path)
        assert type(ConsistencyPipeline.from_pretrained(tmp_path).scheduler) is ConsistencyScheduler

    def test_without_the_tables_of_tasks(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.delattr(auto_pipeline, "AUTO_INPAINT_PIPELINES_MAPPING")
        assert "classes in AutoPipeline (" in warned()
        assert type(DiffusionPipeline.from_pretrained(folder)) is ConsistencyPipeline

    def test_with_a_class_of_the_same_name(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setattr(diffusers, "ConsistencyPipeline", StableDiffusionPipeline)
        assert "DiffusionPipeline.from_pretrained (diffusers has its own ConsistencyPipeline)" in warned()
        assert diffusers.ConsistencyPipeline is StableDiffusionPipeline
        assert type(ConsistencyPipeline.from_pretrained(folder)) is ConsistencyPipeline
