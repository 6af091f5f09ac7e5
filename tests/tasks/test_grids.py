"""How sample grids are drawn while training."""

import pytest
import torch
from tiny import tiny_pipeline
from toys import forget_accelerate, toy_trainer

from cm_diffusers.tasks import callbacks
from cm_diffusers.tasks.callbacks import ValidationConfig, sample_grid
from cm_diffusers.types import Networks


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_grid_is_drawn_in_parts_and_in_the_precision_of_training(tmp_path, monkeypatch, precision) -> None:
    asked, pipe = [], tiny_pipeline()

    def generate(pipe, prompts, seeds, steps, scale, at_once, resolution, num_frames):
        asked.append((len(prompts), at_once, torch.is_autocast_enabled("cpu"), pipe.unet.training))
        return torch.zeros(len(prompts), 3, 8, 8), 0.0

    monkeypatch.setattr(callbacks, "generate", generate)
    prompts = ["a coat", "a bag", "a shirt"]
    config = ValidationConfig(validation_prompts=prompts, validation_seeds=[0, 1], validation_nfe=[1, 2])
    trainer = toy_trainer(tmp_path, Networks(pipe.unet.train()), mixed_precision=precision)
    sample_grid(config, lambda network: pipe).draw(trainer)
    assert asked == [(6, 4, precision == "bf16", False)] * 2
    assert pipe.unet.training
