"""Model cards that say what was done: nothing to fill in by hand."""

import subprocess
from pathlib import Path

from huggingface_hub import ModelCardData

from cm_diffusers.record import Record


def model_card(record: Record, data: str, settings: dict[str, object]) -> str:
    """The card of a distilled student, as Markdown with the Hub's front matter.

    Args:
        data: What it was trained on.
        settings: Flags of the run.
    """
    lora = record.guidance == "distilled"
    tags = ["text-to-image", "diffusers", "diffusers-training", "cm_diffusers", "lcm", *(["lora"] if lora else [])]
    base = None if Path(record.base_model).exists() else record.base_model  # the Hub wants an id, not a path
    front = ModelCardData(library_name="diffusers", base_model=base, tags=tags)
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items() if value is not None)
    return CARD.format(
        front=front.to_yaml(),
        title="LCM-LoRA" if lora else "Latent consistency model",
        paper="LCM-LoRA, arXiv 2311.05556" if lora else "LCM, arXiv 2310.04378",
        base=record.base_model,
        data=data,
        guidance=_guidance(record),
        usage=(LORA_USAGE if lora else PIPELINE_USAGE).format(**record.scheduler | vars(record)),
        commit=_commit(),
        rows=rows,
    )


def _guidance(record: Record) -> str:
    low, high = record.w_min + 1, record.w_max + 1
    if record.guidance == "embedded":
        return (
            f"The network takes the guidance scale as an input; it was trained on guidance_scale {low:g} to {high:g}."
        )
    return f"Guidance (guidance_scale {low:g} to {high:g}) is in the weights: sample with guidance_scale 1."


def _commit() -> str:
    """The commit of the code that trains, where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not run from a git checkout"


PIPELINE_USAGE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER_OR_ID")
image = pipe("your prompt", num_inference_steps={recommended_num_inference_steps}, guidance_scale={recommended_guidance_scale}).images[0]"""

LORA_USAGE = """from diffusers import DiffusionPipeline, LCMScheduler

pipe = DiffusionPipeline.from_pretrained("{base_model}")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps={original_inference_steps})
pipe.load_lora_weights("THIS_FOLDER_OR_ID")
image = pipe("your prompt", num_inference_steps={recommended_num_inference_steps}, guidance_scale=1.0).images[0]"""

CARD = """---
{front}
---
# {title} of {base}

A few-step student ({paper}) distilled from `{base}` with cm_diffusers at commit `{commit}`.
Trained on {data}. {guidance}

```python
{usage}
```

How it was made travels in `cm_diffusers.json`. The licence of the teacher binds this model as well.

| setting | value |
|---|---|
{rows}
"""
