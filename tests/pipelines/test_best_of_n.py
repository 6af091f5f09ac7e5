"""Best of N: the images are those of the stock pipeline, and the best of them are kept."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from tiny import tiny_pipeline
from tiny_xl import tiny_xl_pipeline

from cm_diffusers.rewards import load_reward


ROOT = Path(__file__).parents[2]
FILE = ROOT / "pipelines" / "best_of_n.py"
STUDENT = ROOT / "assets" / "fashion_lcm"
ASKED = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}


def opened(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FILE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> DiffusionPipeline:
    return opened(STUDENT)


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}


def test_keeps_the_best_of_what_the_stock_pipeline_makes(pipe) -> None:
    prompts = ["a photo of a bag", "a photo of a coat"]
    best = pipe(prompts, brightness, n=5, k=2, batch_size=2, seed=7, **ASKED)
    for i, prompt in enumerate(prompts):
        alone = [
            pipe.stock(prompt, generator=torch.Generator().manual_seed(seed), **ASKED).images[0]
            for seed in range(7, 12)
        ]
        order = sorted(range(5), key=lambda j: -alone[j].mean())[:2]
        assert best.seeds[2 * i : 2 * i + 2] == [7 + j for j in order]
        torch.testing.assert_close(best.images[2 * i : 2 * i + 2], torch.stack([alone[j] for j in order]))
        assert best.rewards[2 * i : 2 * i + 2] == pytest.approx([alone[j].mean().item() for j in order], abs=1e-5)
    assert type(pipe.stock) is diffusers.LatentConsistencyModelPipeline
    assert pipe.stock.unet is pipe.unet


def test_neither_the_size_of_a_batch_nor_other_prompts_nor_more_images_matter(pipe) -> None:
    best = pipe("a photo of a bag", brightness, n=5, k=5, batch_size=5, **ASKED)
    for size in (1, 3, 8):
        other = pipe(["a photo of a coat", "a photo of a bag"], brightness, n=5, k=5, batch_size=size, **ASKED)
        assert other.seeds[5:] == best.seeds
        torch.testing.assert_close(other.images[5:], best.images, atol=1e-5, rtol=0)
    fewer = pipe("a photo of a bag", brightness, n=3, k=3, **ASKED)
    assert fewer.seeds == [seed for seed in best.seeds if seed < 3]


def test_rewards_of_the_package_fit_and_equals_are_ordered_by_seed(pipe) -> None:
    reward = load_reward("classifier:" + str(ROOT / "assets" / "fashion_classifier"))
    few, many = (pipe("a photo of a bag", reward, n=n, **ASKED).rewards[0] for n in (1, 8))
    assert few < many <= 0
    assert pipe("a bag", lambda images, *_: [0.5] * len(images), n=4, k=3, seed=3, **ASKED).seeds == [3, 4, 5]


def test_output_types(pipe) -> None:
    asked = {"n": 2, "k": 2, **ASKED}
    tensors = pipe("a bag", brightness, **asked).images
    arrays, rewards, seeds = pipe("a bag", brightness, **{**asked, "output_type": "np"}, return_dict=False)
    images = pipe("a bag", brightness, **{**asked, "output_type": "pil"}).images
    assert np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(images[1]), (arrays[1] * 255).round().astype("uint8"))
    assert len(rewards) == len(seeds) == 2


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_takes_other_pipelines_and_what_their_index_says(make, tmp_path: Path) -> None:
    stock = make()
    stock.scheduler = EulerDiscreteScheduler.from_config(stock.scheduler.config)
    stock.save_pretrained(tmp_path)
    found = opened(tmp_path)
    best = found("a bag", brightness, n=2, k=2, **ASKED, negative_prompt="a coat")
    assert type(found.stock) is type(stock)
    for key in ("requires_safety_checker", "force_zeros_for_empty_prompt"):
        assert found.stock.config.get(key) == stock.config.get(key)
    again = stock("a bag", generator=torch.Generator().manual_seed(best.seeds[0]), **ASKED, negative_prompt="a coat")
    torch.testing.assert_close(best.images[:1], again.images, atol=1e-5, rtol=0)


def test_a_change_of_the_stock_pipeline_acts(pipe) -> None:
    changed = opened(STUDENT)
    changed.stock.scheduler = diffusers.LCMScheduler.from_config(changed.stock.scheduler.config, timestep_scaling=0.01)
    images = [one("a bag", brightness, n=1, **ASKED).images for one in (pipe, changed)]
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"k": 1.5}, "k must be a whole number"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"n": 2, "k": 3}, "k is 3 and n is 2"),
        ({"output_type": "latent"}, "'pil', 'np' or 'pt', got 'latent'"),
        ({"generator": None}, "generator cannot be given: each image has its own seed"),
        ({"prompt": []}, "prompt must be a text"),
        ({"reward": lambda images, *_: images.mean()}, "one finite number for each of 2 images"),
        ({"reward": lambda images, *_: [float("nan")] * 2}, "but it returned .nan, nan."),
    ],
)
def test_refuses_what_cannot_be_done(pipe, asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a bag", "reward": brightness, "n": 2, **ASKED, **asked})


def test_refuses_a_folder_that_is_none_of_text_to_image(tmp_path: Path) -> None:
    stock = diffusers.ConsistencyModelPipeline(None, diffusers.CMStochasticIterativeScheduler())
    stock.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace('"ConsistencyModelPipeline"', '"OtherPipeline"'))
    with pytest.raises(ValueError, match="is the folder of OtherPipeline"):
        _ = opened(tmp_path).stock
