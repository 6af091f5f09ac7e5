"""Folders of random students of flows: whole ones, LoRAs on their teachers, and SANA-Sprint as it is published."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.families.base import family_of, network_of
from cm_diffusers.publishing.pipelines import lcm_pipeline, save_lora, save_pipeline, scheduler_entry
from cm_diffusers.record import Record
from cm_diffusers.schedulers import FlowConsistencyScheduler


SHIFT, SIDE = 3.0, 32
W = 2.5  # of guidance in the students


def record_of(teacher: Path, pipe: DiffusionPipeline, scheduler: FlowConsistencyScheduler) -> Record:
    network = network_of(pipe)
    told = family_of(network).guidance(network) == "embedded"
    guidance, scale = ("embedded", W + 1) if told else ("distilled", 1.0)
    return Record("lcm", str(teacher), guidance, W - 1, W + 1, scale, 2, scheduler_entry(scheduler), SIDE)


def whole_student(pipe: DiffusionPipeline, home: Path) -> Path:
    """`home/teacher` and `home/student`, which is the teacher with the scheduler of a student."""
    pipe.save_pretrained(home / "teacher")
    scheduler = FlowConsistencyScheduler(shift=SHIFT)
    record = record_of(home / "teacher", pipe, scheduler)
    save_pipeline(lcm_pipeline(pipe, network_of(pipe), scheduler), home / "student", False, record)
    return home / "student"


def lora_student(pipe: DiffusionPipeline, home: Path) -> Path:
    """`home/teacher` and `home/lora`, adapters that change its output."""
    pipe.save_pretrained(home / "teacher")
    network = add_lora(network_of(pipe), 2, 4.0, 0.0)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(value, std=0.05)
    save_lora(network, home / "lora", record_of(home / "teacher", pipe, FlowConsistencyScheduler(shift=SHIFT)))
    return home / "lora"
