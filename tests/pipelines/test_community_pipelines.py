"""The single files of `pipelines/`: they do what this package does, and travel beside the weights without it."""

import ast
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DiffusionPipeline
from publishing.test_publish_images import CLASSES, STATISTICS, saved, scheduler_of, unet2d, vp_view, without_text
from publishing.test_publish_scm import scheduler_of as of_scm
from tiny import tiny_pipeline, tiny_unet, tiny_vae

from cm_diffusers import (
    ConsistencyPipeline,
    ConsistencyScheduler,
    EDMConsistencyScheduler,
    TrigFlowConsistencyScheduler,
)
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.publishing.images import images_pipeline, images_record, text_pipeline
from cm_diffusers.publishing.pipelines import save_pipeline
from cm_diffusers.schedulers.stepping import SteppingScheduler, ToldScheduler


ROOT = Path(__file__).parents[2]
STUDENT = ROOT / "assets" / "fashion_lcm"
FILE = ROOT / "pipelines" / "consistency_text_to_image.py"
IMAGES = ROOT / "pipelines" / "consistency_images.py"
PROMPT = "a photo of a bag"
WITHOUT_THE_PACKAGE = """
import sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
image = pipe("a photo of a bag").images[0]
assert "cm_diffusers" not in sys.modules
print(type(pipe).__name__, image.size, pipe.num_timesteps, pipe.guidance_scale)
"""


@pytest.fixture(scope="module")
def portable():
    pipe = DiffusionPipeline.from_pretrained(STUDENT, custom_pipeline=str(FILE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("gamma", [1.0, 0.3, 0.0])
def test_samples_as_the_package(portable, gamma: float) -> None:
    ours = ConsistencyPipeline.from_pretrained(STUDENT)
    ours.scheduler = ConsistencyScheduler.from_config(ours.scheduler.config, gamma=gamma)
    ours.set_progress_bar_config(disable=True)
    images = [
        pipe(PROMPT, generator=torch.Generator().manual_seed(1), output_type="pt", **arguments).images
        for pipe, arguments in ((ours, {}), (portable, {"gamma": gamma}))
    ]
    torch.testing.assert_close(*images, atol=1e-5, rtol=0)


def test_takes_the_defaults_of_the_record(portable) -> None:
    portable(PROMPT, output_type="latent")
    assert (portable.num_timesteps, portable.guidance_scale) == (4, 3.0)
    portable(PROMPT, output_type="latent", num_inference_steps=2, guidance_scale=1.5)
    assert (portable.num_timesteps, portable.guidance_scale) == (2, 1.5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"negative_prompt": "blurry"}, "cannot act; leave it out"),
        ({"gamma": 1.5}, "gamma must be"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "at least 1, got 2.5"),
    ],
)
def test_refuses_what_cannot_be_done(portable, asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        portable(PROMPT, **asked)


def test_travels_beside_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(STUDENT, folder)
    shutil.copyfile(FILE, folder / "pipeline.py")
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found == ["PortableConsistencyPipeline", "(32,", "32)", "4", "3.0"]
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder))


LATENTS = EDMView(0.5, "edm")
STUDENTS = {
    "slct": lambda: images_pipeline(
        unet2d(in_channels=4, out_channels=4), scheduler_of(LATENTS, "cm", [80.0, 1.526]), vae(), STATISTICS
    ),
    "ect": lambda: images_pipeline(
        unet2d(num_class_embeds=None), scheduler_of(EDMView(0.7, "edm"), "edm", [80.0, 5.0, 0.5], clip_denoised=True)
    ),
    "gamma": lambda: images_pipeline(unet2d(), scheduler_of(EDMView(0.5, "adm"), "edm", gamma=0.3)),
    "epsilon": lambda: images_pipeline(without_text(), scheduler_of(vp_view("epsilon", 0.7), recommended=[14.0, 1.0])),
    "v_prediction": lambda: images_pipeline(without_text(), scheduler_of(vp_view("v_prediction", 0.7), "edm")),
    "sample": lambda: images_pipeline(without_text(), scheduler_of(vp_view("sample"))),
    "stock": lambda: images_pipeline(unet2d(), scheduler_of(EDMView(0.5, "adm"), recommended=[80.0, 0.821])),
}
REQUESTS = [
    {},
    {"num_inference_steps": 1},
    {"num_inference_steps": 3},
    {"timesteps": [12, 5, 0]},
    {"sigmas": [13.0, 2.0, 0.4]},
]
ALONE = """
import json, shutil, sys
import numpy as np, torch
sys.modules["cm_diffusers"] = None  # now it cannot be imported
from diffusers import DiffusionPipeline
file, folders, requests, fixed = sys.argv[1], *map(json.loads, sys.argv[2:])
for folder in folders:
    shutil.copyfile(file, folder + "/pipeline.py")
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    assert type(pipe.scheduler).__name__ in ("CMStochasticIterativeScheduler", "SCMScheduler")
    pipe.set_progress_bar_config(disable=True)
    for i, asked in enumerate(requests):
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        result = pipe(**fixed, **asked, generator=seeds, output_type="pt")
        np.save(f"{folder}/{i}.npy", result.images.numpy())
        if result.get("class_labels") is not None:
            np.save(f"{folder}/labels{i}.npy", result.class_labels.numpy())
"""


def vae():
    torch.manual_seed(1)
    return tiny_vae()


def alone(file: Path, folders: list[Path], requests: list[dict] = REQUESTS, **fixed) -> None:
    """What the single file makes of the folders, in a process that cannot import this package."""
    arguments = [json.dumps(part) for part in ([str(folder) for folder in folders], requests, fixed)]
    done = subprocess.run([sys.executable, "-c", ALONE, str(file), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compared(folder: Path, requests: list[dict] = REQUESTS, **fixed) -> None:
    pipe = ConsistencyPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for i, asked in enumerate(requests):
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        result = pipe(**fixed, **asked, generator=seeds, output_type="pt")
        assert result.images.std() > 0.01
        assert np.array_equal(np.load(folder / f"{i}.npy"), result.images.numpy()), (folder.name, asked)
        if result.get("class_labels") is not None:
            assert np.load(folder / f"labels{i}.npy").tolist() == result.class_labels.tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("students")
    found = {name: saved(make(), home / name) for name, make in STUDENTS.items()}
    published = ConsistencyModelPipeline(unet2d(), CMStochasticIterativeScheduler())
    published.save_pretrained(home / "published")
    found["published"] = home / "published"
    alone(IMAGES, list(found.values()))
    return found


@pytest.mark.parametrize("name", [*STUDENTS, "published"])
def test_students_without_prompts_make_the_same_images_without_the_package(name: str, folders) -> None:
    compared(folders[name])


def test_text_students_make_the_same_images_without_the_package(tmp_path: Path) -> None:
    folders = []
    for kind, boundary, recommended in (("epsilon", "cm", [14.0, 2.0]), ("v_prediction", "edm", None)):
        scheduler = scheduler_of(vp_view(kind, 1.0), boundary, recommended)
        pipe = text_pipeline(tiny_pipeline(prediction_type=kind), tiny_unet(), scheduler)
        record = images_record("ect", "ada/teacher", "distilled", 0.0, pipe.scheduler, 2)
        save_pipeline(pipe, tmp_path / kind, False, record)
        folders.append(tmp_path / kind)
    asked = {"prompt": ["a bag", "a coat"]}
    alone(FILE, folders, **asked)
    for folder in folders:
        compared(folder, **asked)


def test_students_of_scm_make_the_same_images_without_the_package(tmp_path: Path) -> None:
    requests = [asked for asked in REQUESTS if "timesteps" not in asked] + [{"timesteps": [1.4, 0.7, 0]}]
    scm = [of_scm(EDMView(0.5, "trigflow"), clip_denoised=True), of_scm(vp_view("v_prediction", 0.7), gamma=0.3)]
    pipes = images_pipeline(unet2d(), scm[0]), images_pipeline(without_text(), scm[1])
    folders = [saved(pipe, tmp_path / str(i), "sct") for i, pipe in enumerate(pipes)]
    alone(IMAGES, folders, requests)
    for folder in folders:
        compared(folder, requests)
    pipe = text_pipeline(tiny_pipeline(), tiny_unet(), of_scm(vp_view("epsilon", 1.0)))
    save_pipeline(
        pipe, tmp_path / "text", False, images_record("scd", "ada/teacher", "distilled", 0.0, pipe.scheduler, 2)
    )
    alone(FILE, [tmp_path / "text"], requests, prompt=["a bag", "a coat"])
    compared(tmp_path / "text", requests, prompt=["a bag", "a coat"])


@pytest.fixture(scope="module")
def drawer(folders):
    pipe = DiffusionPipeline.from_pretrained(folders["slct"], custom_pipeline=str(IMAGES), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_all_ways_to_say_how_many_and_which(drawer, folders) -> None:
    ours = ConsistencyPipeline.from_pretrained(folders["slct"])
    ours.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8)
    for asked in (
        {"batch_size": 2, "class_labels": 3},
        {"class_labels": [4, 0], "output_type": "latent"},
        {"class_labels": torch.tensor([4, 0]), "latents": noise, "output_type": "np"},
        {"latents": noise[:1], "sigmas": torch.tensor([80.0, 1.0])},
    ):
        results = []
        for pipe in (drawer, ours):
            result = pipe(**{"output_type": "pt", **asked}, generator=torch.Generator().manual_seed(5))
            results.append((torch.as_tensor(result.images), result.class_labels))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
    images, labels = drawer(2, return_dict=False)
    assert (len(images), images[0].size, labels.shape) == (2, (32, 32), (2,))
    assert type(drawer.scheduler) is CMStochasticIterativeScheduler  # as it was


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"class_labels": CLASSES}, "whole numbers from 0 to 4, got 5"),
        ({"class_labels": [0, 1], "batch_size": 3}, r"equally many, got \{'class_labels': 2, 'batch_size': 3\}"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"latents must have the shape \(1, 4, 8, 8\)"),
        ({"num_inference_steps": 2, "sigmas": [80.0]}, "Give exactly one of"),
        ({"num_inference_steps": 19}, "whole number from 1 to the 18 points of the training grid, got 19"),
        ({"timesteps": [18, 0]}, "from 17 down to 0"),
        ({"timesteps": [0, 5]}, "must descend"),
        ({"sigmas": [0.8, 80.0]}, "numbers that descend, from at most 80.0 to at least 0.002"),
        ({"sigmas": []}, "numbers that descend"),
        ({"sigmas": [float("nan")]}, "numbers that descend"),
        ({"sigmas": [81.0]}, "from at most 80.0"),
    ],
)
def test_the_other_file_refuses_what_cannot_be_done(drawer, asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawer(**asked)


def test_a_gamma_is_for_one_call(tmp_path: Path) -> None:
    scheduler = scheduler_of(vp_view())
    pipe = text_pipeline(tiny_pipeline(), tiny_unet(), scheduler)
    save_pipeline(pipe, tmp_path, False, images_record("cd", "a/b", "distilled", 0.0, scheduler, 2))
    single = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(FILE), trust_remote_code=True)
    single.set_progress_bar_config(disable=True)
    first, other, again = (
        single("a bag", generator=torch.Generator().manual_seed(1), output_type="latent", gamma=gamma).images
        for gamma in (None, 0.0, 1.0)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="not more than one of them"):
        single("a bag", num_inference_steps=1, sigmas=[14.0])


def test_the_files_have_no_schedulers_but_the_packages() -> None:
    """Each stands alone, so each has them; none may sample otherwise than the package."""
    samplers = ConsistencyScheduler, EDMConsistencyScheduler, TrigFlowConsistencyScheduler
    known = {kind.__name__: inspect.getsource(kind).rstrip() for kind in (*samplers, SteppingScheduler, ToldScheduler)}
    found = set()
    for path in (ROOT / "pipelines").glob("*.py"):
        text = path.read_text()
        for node in ast.parse(text).body:
            if any(
                getattr(base, "id", "").endswith(("SchedulerMixin", "Scheduler"))
                for base in getattr(node, "bases", ())
            ):
                assert ast.get_source_segment(text, node) == known[node.name], path.name
                found.add(node.name)
    assert found == set(known)
