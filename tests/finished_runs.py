"""Finished runs as tiny as can be: a published student, and snapshots of noisy weights around it."""

from pathlib import Path

import torch
from scripts import image_folder
from tiny import tiny_pipeline

from cm_diffusers.engine.checkpoints import trainable_state, write_folder
from cm_diffusers.engine.snapshots import FOLDER, STEM
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record, lcm_scheduler, save_lora, save_pipeline
from cm_diffusers.publishing.provenance import Provenance


STEPS = (10, 20, 30)
TARGETS = ["to_q", "conv1", "to_k"]


def provenance(**settings: object) -> Provenance:
    told = {"data": "somebody's pictures", "license": {}, "command": "python training/distill_lcm.py", "commit": "abc"}
    return Provenance(
        name="lcm", base_id=None, family="stable-diffusion", settings={"max_train_steps": 30} | settings, **told
    )


def snapshot(run: Path, step: int, network: torch.nn.Module, noise: float = 0.02) -> None:
    """What training leaves behind; the seed is the step."""
    generator = torch.Generator().manual_seed(step)
    state = {
        name: value + noise * torch.randn(value.shape, generator=generator)
        for name, value in trainable_state(network).items()
    }
    keep(run, step, state)


def keep(run: Path, step: int, state: dict[str, torch.Tensor]) -> None:
    """As `engine.snapshots.write_weights`, of any tensors."""
    write_folder(run / FOLDER / f"step-{step}", {STEM: state})


def whole_run(home: Path) -> Path:
    """`run/` of a full student, its teacher in `teacher/`, real images in `data/` and a classifier in `classifier/`."""
    teacher, run = tiny_pipeline(), home / "run"
    teacher.save_pretrained(home / "teacher")
    scheduler = lcm_scheduler(teacher, 50, 10.0)
    record = lcm_record(str(home / "teacher"), "distilled", 2.0, 2.0, 1.0, scheduler)
    save_pipeline(lcm_pipeline(teacher, teacher.unet, scheduler), run / "pipeline", False, record, provenance())
    for step in STEPS:
        snapshot(run, step, teacher.unet.requires_grad_(True))
    measuring(home)
    return run


def lora_run(home: Path) -> Path:
    """The same of a LoRA of rank 2, whose scale is 3, on linear layers and convolutions."""
    teacher, run = tiny_pipeline(), home / "run"
    teacher.save_pretrained(home / "teacher")
    scheduler = lcm_scheduler(teacher, 50, 10.0)
    record = lcm_record(str(home / "teacher"), "distilled", 2.0, 2.0, 1.0, scheduler)
    torch.manual_seed(0)
    add_lora(teacher.unet, 2, 6.0, 0.0, TARGETS)
    for step in STEPS:
        snapshot(run, step, teacher.unet, 0.1)
    told = provenance(lora=True, lora_rank=2, lora_alpha=6.0)
    save_lora(teacher.unet, run / "lora", record, told)
    measuring(home)
    return run


def measuring(home: Path) -> None:
    image_folder(home / "data", 24)
    torch.manual_seed(0)
    labels = ["bag", "coat", "boot", "trousers"]
    ImageClassifier(labels, channels=(4, 8), image_size=32, num_features=6).save_pretrained(home / "classifier")
