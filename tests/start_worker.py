"""How scripts start whose networks are read from folders: `start_worker.py FOLDER` starts each in one process, then in two that part them.

They leave `alone.safetensors` and `parts.safetensors`, every weight by start, network and name, and `held-<rank>.json`: the bytes of each
network in a process before they are parted.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # once, and not in each fork
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from processes import together
from safetensors.torch import save_file
from scripts import data_flags, image_folder, models_folder, run_script
from sharding_worker import SHARDED, launched
from tasks import test_finetune_direct_reward, test_finetune_rlcm
from tasks.test_animatelcm import randomised_parts
from tasks.test_distill_animatelcm import GRIDS, LORA
from tasks.test_distill_animatelcm import SHARED as OF_CLIPS
from tasks.test_image_runs import COMMON, SMALL, of_data, of_model
from tasks.test_trajectory_runs import CTM, JUDGED
from tiny import tiny_pipeline

from cm_diffusers.engine import trainer
from cm_diffusers.engine.parts import whole
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.publishing.pipelines import lcm_record, lcm_scheduler, save_lora
from cm_diffusers.types import Networks


FULL = {"no_lora": True, "kl_coef": 0.1}


class Started(BaseException):
    """Networks are placed, and that is all."""


def starts(home: Path) -> dict[str, tuple[str, dict]]:
    text, captioned = of_model(home, "teacher") | {"resolution": 32}, data_flags(home / "data", home / "cache")
    clips = OF_CLIPS | {"moving_articles": home / "data", "latent_cache_dir": home / "cache"}
    clips |= {"pretrained_teacher_model": home / "teacher"}
    stage = clips | {"pretrained_motion_adapter": home / "motion"}
    fused, student = {"spatial_lora": home / "spatial"}, {"pretrained_student_model": home / "student"}
    roll_outs, direct = test_finetune_rlcm.SHARED, test_finetune_direct_reward.SHARED
    levels = {"sigma_min": 0.03, "sigma_max": 14.5}
    return {
        "cd": ("distill_cd", COMMON | of_model(home, "edm/pipeline") | {"num_scales": 6}),
        "ctm": ("distill_ctm", COMMON | of_model(home, "ddpm") | CTM | JUDGED | {"sigma_min": 0.011}),
        "scd": ("distill_scd", COMMON | text | levels | {"w_max": 2.0}),
        "ect": ("tune_ect", COMMON | text | levels),
        "time": ("tune_time", COMMON | of_model(home, "ddpm") | {"sigma_min": 0.011}),
        "lcf": ("finetune_lcf", captioned | student),
        "train_motion": ("train_motion", clips | {"motion_num_attention_heads": 4, "motion_max_seq_length": 4}),
        "motion": ("distill_animatelcm", stage | fused | {"stage": "motion", "target_init": "student"}),
        "joint": ("distill_animatelcm", stage | LORA | {"stage": "joint"}),
        "edges": ("distill_animatelcm", stage | fused | {"stage": "adapter", "condition": "edges"}),
        "rlcm": ("finetune_rlcm", roll_outs | {"pretrained_student_model": home / "lora"} | FULL),
        "ddpo": ("finetune_rlcm", roll_outs | {"pretrained_student_model": home / "teacher", "sampler": "ddim"} | FULL),
        "direct": ("finetune_direct_reward", direct | captioned | student | {"through": "single_step", "no_lora": True}),
    }  # fmt: skip


def make_models(home: Path) -> None:
    image_folder(models_folder(home) / "data", 6, label=[0, 1, 2, 0, 1, 2])
    DDPMPipeline(UNet2DModel(sample_size=16, **SMALL), DDPMScheduler()).save_pretrained(home / "ddpm")
    (home / "unet.json").write_text(json.dumps(SMALL))
    run_script("train_edm", **COMMON | of_data(home) | {"max_train_steps": 1, "output_dir": home / "edm"})
    video, teacher = randomised_parts(), tiny_pipeline()
    video.adapter.save_pretrained(home / "motion")
    for name, scheduler in (("spatial", video.scheduler), ("lora", lcm_scheduler(teacher, 50, 10.0))):
        unet = add_lora(tiny_pipeline().unet, 4, 8.0, 0.0)
        with torch.no_grad():
            for p in unet.parameters():
                if p.requires_grad:
                    p.normal_(std=0.05)
        save_lora(unet, home / name, lcm_record(str(home / "teacher"), "distilled", 2.0, 2.0, 1.0, scheduler))


def start(home: Path, name: str, script: str, flags: dict) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Bytes of each network before it is placed, and then its tensors."""
    place, held, found = trainer.place, {}, {}

    def noting(nets: Networks, *how: object) -> None:
        tensors = {one: [*network.parameters(), *network.buffers()] for one, network in nets.items()}
        held.update({one: sum(t.nbytes for t in kept if not t.is_meta) for one, kept in tensors.items()})
        place(nets, *how)
        for one, network in nets.items():
            for key, value in (*network.named_parameters(), *network.named_buffers()):
                found[f"{name}/{one}/{key}"] = whole(value).detach().clone()
        raise Started

    with mock.patch.object(trainer, "place", noting):
        try:
            run_script(script, **flags | {"output_dir": home / "runs" / name})
        except Started:
            return held, found
    raise AssertionError(f"{script} made no trainer")


def alone(home: Path) -> None:
    make_models(home)
    found = {key: v for name, one in starts(home).items() for key, v in start(home, name, *one)[1].items()}
    save_file(found, home / "alone.safetensors")


def pair(home: Path) -> None:
    held, found, rank = {}, {}, os.environ["RANK"]
    with launched(SHARDED):
        for name, one in starts(home).items():
            held[name], tensors = start(home, name, *one)
            found |= tensors
        script, flags = starts(home)["motion"]  # to its end, with grids by both
        run_script(script, **flags | GRIDS | {"max_train_steps": 1, "output_dir": home / "run"})
    (home / f"held-{rank}.json").write_text(json.dumps(held))
    if rank == "0":
        save_file(found, home / "parts.safetensors")


def main() -> None:
    for number, act in ((1, alone), (2, pair)):
        together(number, partial(act, Path(sys.argv[1])))


if __name__ == "__main__":
    main()
