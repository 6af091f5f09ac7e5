"""The single files of `pipelines/`: they do what this package does, and travel beside the weights without it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler


ROOT = Path(__file__).parents[1]
STUDENT = ROOT / "assets" / "fashion_lcm"
FILE = ROOT / "pipelines" / "consistency_text_to_image.py"
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
