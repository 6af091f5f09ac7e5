"""What reward fine-tuning publishes: a student with its record, or a diffusion model; whole or as a LoRA."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.utils import get_peft_model_state_dict

from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.policy.policy import Policy
from cm_diffusers.publishing.hub import HubConfig, push_folder
from cm_diffusers.publishing.pipelines import save_lora, save_pipeline, written_aside
from cm_diffusers.publishing.portable import lora_metadata
from cm_diffusers.publishing.provenance import Provenance, describe_run, public, write_provenance
from cm_diffusers.tasks.reward_runs import RewardModelConfig, Tuned


logger = logging.getLogger(__name__)


def publish_run(
    method: str, trainer: Trainer, tuned: Tuned, configs: Sequence[object], data: str, repo_id: str | None
) -> None:
    """Save what a script of reward fine-tuning has trained, and push it where that was asked for.

    Args:
        method: For the record.
        configs: The script's, for its flags and for the card.
        data: What it was trained on, in words or as a folder.
        repo_id: On the Hub; None to save alone.
    """
    if trainer.accelerator.is_main_process:
        given = {type(config): config for config in configs}
        source, hub = given[RewardModelConfig], given[HubConfig]
        folder = trainer.output_dir / ("lora" if source.lora else "pipeline")
        made = data, repo_id or str(folder)
        unused = ["validation_guidance_scale", "validation_teacher_steps"]
        unused += ["eta"] * (tuned.record is not None) + ["ema_decay"] * (trainer.nets.target is None)
        provenance = describe_run(configs, tuned.pipe, source.pretrained_student_model, *made, left_out=unused)
        with trainer.export_weights() as network:
            publish_tuned(method, tuned, network, source, folder, provenance)
        if repo_id:
            logger.info("Published: %s", push_folder(folder, repo_id, hub))
    trainer.accelerator.end_training()


def publish_tuned(
    method: str,
    tuned: Tuned,
    network: UNet2DConditionModel,
    config: RewardModelConfig,
    folder: Path,
    provenance: Provenance,
) -> None:
    """A LoRA, or a whole pipeline; of a student with its record and card.

    Args:
        method: For the record.
    """
    if tuned.record is not None:
        base = config.pretrained_student_model
        steps, scale = tuned.policy.num_steps, tuned.guidance_scale
        record = replace(
            tuned.record,
            method=method,
            base_model=base,
            recommended_num_inference_steps=steps,
            recommended_guidance_scale=scale,
        )
        if config.lora:
            save_lora(network, folder, record, provenance)
        else:
            save_pipeline(tuned.pipeline(network), folder, config.save_fp16, record, provenance)
        return
    with written_aside(folder) as aside:
        if config.lora:
            layers, metadata = get_peft_model_state_dict(network), lora_metadata(network)
            StableDiffusionLoraLoaderMixin.save_lora_weights(
                aside, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
            )
        else:
            save_pipeline(tuned.pipeline(network), aside, config.save_fp16)
        write_provenance(provenance, aside)
        (aside / "README.md").write_text(tuned_card(method, provenance, config.lora, tuned.policy), "utf-8")


def tuned_card(method: str, provenance: Provenance, is_lora: bool, policy: Policy) -> str:
    """The card of a diffusion model that was tuned for a reward.

    Args:
        method: "rlcm" or "direct_reward".
        policy: How it was sampled.
    """
    base = public(provenance.settings["pretrained_student_model"])
    load = LOAD_LORA if is_lora else LOAD_PIPELINE
    sampling = f"num_inference_steps={policy.num_steps}, guidance_scale={policy.guidance_scale:g}, eta={policy.eta:g}"
    code = load.format(name=provenance.name, base=base, sampling=sampling)
    rewards = ", ".join(map(str, provenance.settings["rewards"]))
    tag, paper = PAPERS[method]
    parts = {"rewards": rewards, "code": code, "tag": tag, "paper": paper}
    return CARD.format(base=base, commit=provenance.commit, command=provenance.command, **parts)


PAPERS = {
    "rlcm": ("ddpo", "[DDPO](https://arxiv.org/abs/2305.13301)"),
    "direct_reward": ("draft", "[DRaFT](https://arxiv.org/abs/2309.17400)"),
}
LOAD_LORA = """\
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
pipe.load_lora_weights("{name}")
image = pipe("your prompt", {sampling}).images[0]"""
LOAD_PIPELINE = """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")
image = pipe("your prompt", {sampling}).images[0]"""
CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusers, diffusers-training, cm_diffusers, {tag}]
---

# `{base}`, tuned for {rewards}

A diffusion model, tuned for a reward of its own samples with cm_diffusers, after {paper}.

```python
{code}
```

Code: cm_diffusers at `{commit}`.

```bash
{command}
```
"""
