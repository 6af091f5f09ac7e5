"""Model cards that say what was done: nothing to fill in by hand."""

from textwrap import dedent

from huggingface_hub import ModelCardData

from cm_diffusers.measured import Measured
from cm_diffusers.provenance import Provenance, public
from cm_diffusers.record import Record


LCM = "[Latent Consistency Models](https://arxiv.org/abs/2310.04378)"
LCM_LORA = "[LCM-LoRA](https://arxiv.org/abs/2311.05556)"
SCOTT = "[SCott](https://arxiv.org/abs/2403.01505)"
METHODS = {  # method of the record, with "-lora" where that is so -> title, how, paper
    "lcm": ("Latent consistency model", "distilled from", LCM),
    "lcm-lora": ("LCM-LoRA", "distilled from", LCM_LORA),
    "scott": ("Stochastic consistency distillation (SCott)", "distilled from", SCOTT),
    "scott-lora": ("Stochastic consistency distillation (SCott, LoRA)", "distilled from", f"{SCOTT}, {LCM_LORA}"),
    "lcf": ("Latent consistency fine-tuning", "fine-tuned from", LCM),
    "lcf-lora": ("Latent consistency fine-tuning (LoRA)", "fine-tuned from", f"{LCM}, {LCM_LORA}"),
}
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
PIPELINE_FILE = "pipeline.py"  # as diffusers looks for it where custom_pipeline is a folder or Hub id


def model_card(
    record: Record,
    provenance: Provenance,
    measured: Measured | None = None,
    grid: str | None = None,
    single_file: bool = False,
) -> str:
    """The card of a student, as Markdown with the Hub's front matter.

    Args:
        measured: What an evaluation found.
        grid: Where a sample grid lies, seen from the card: the evaluation's, or the training's last.
        single_file: Whether `PIPELINE_FILE` lies beside the weights.
    """
    lora = bool(provenance.settings.get("lora"))
    title, how, paper = METHODS[f"{record.method}-lora" if lora else record.method]
    base = public(record.base_model)
    parts = [
        f"---\n{_front(record, provenance, lora, measured).to_yaml()}\n---",
        f"# {title} of {base}",
        f"Makes images in about {record.recommended_num_inference_steps} steps. It was {how} {_link(base, provenance)} "
        f"with cm_diffusers, after {paper}, and trained on {provenance.data}.",
        _guidance(record),
        _license(provenance),
        "## Use",
        *_usage(record, provenance, base, lora, single_file),
        *(_measurements(measured) if measured else []),
        *([f"## Samples\n\n{CAPTION[measured is None]}\n\n![Sample grid]({grid})"] if grid else []),
        "## Training",
        f"Code: cm_diffusers at `{provenance.commit}`.\n\n```bash\n{provenance.command}\n```",
        "\n".join(["| setting | value |", "|---|---|", *_rows(provenance.settings)]),
    ]
    return "\n\n".join(parts) + "\n"


def _front(record: Record, provenance: Provenance, lora: bool, measured: Measured | None) -> ModelCardData:
    tags = ["text-to-image", "diffusers", "diffusers-training", "cm_diffusers", "lcm", record.method]
    tags += ["lora", "template:sd-lora", provenance.family] if lora else [provenance.family]
    prompts = provenance.settings.get("validation_prompts") or []
    dataset = provenance.settings.get("dataset_name") or ""
    optional = {
        "base_model": provenance.base_id,
        "base_model_relation": provenance.base_id and ("adapter" if lora else "finetune"),
        "datasets": dataset if dataset.count("/") == 1 else None,
        "widget": [{"text": prompt} for prompt in prompts],
        "model_name": provenance.name if measured else None,
        "eval_results": list(measured.results()) if measured else None,
    }
    return ModelCardData(
        **provenance.license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(dict.fromkeys(tags)),
        **{name: value for name, value in optional.items() if value},
    )


def _link(base: str, provenance: Provenance) -> str:
    return f"[{base}](https://huggingface.co/{base})" if provenance.base_id else f"`{base}`"


def _license(provenance: Provenance) -> str:
    name = provenance.license.get("license_name") or provenance.license.get("license")
    if name is None:
        return "The model it was made from states no licence where this was trained; whatever its licence is binds this model too."
    link = provenance.license.get("license_link")
    return f"Licence: {f'[{name}]({link})' if link else name}, that of the model it was made from."


def _guidance(record: Record) -> str:
    low, high = record.w_min + 1, record.w_max + 1
    best = record.recommended_guidance_scale
    if record.guidance == "embedded":
        return (
            f"Guidance is an input of the network, trained on `guidance_scale` {low:g} to {high:g} ({best:g} is a good "
            "value): it costs no second pass, and there is no negative prompt."
        )
    if record.guidance == "distilled":
        trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return (
            f"Guidance (`guidance_scale` {trained}) is in the weights: sample with `guidance_scale` {best:g}. Up to "
            "about 2 on top is possible, at two passes a step, and makes a negative prompt work."
        )
    return "This student cannot be guided: `guidance_scale` has no effect, and there is no negative prompt."


def _usage(record: Record, provenance: Provenance, base: str, lora: bool, single_file: bool) -> list[str]:
    values = {
        "name": provenance.name,
        "base": base,
        "steps": record.recommended_num_inference_steps,
        "scale": float(record.recommended_guidance_scale),
        "weights": LORA_WEIGHTS,
        "original": record.scheduler.get("original_inference_steps", 50),
        "scaling": record.scheduler.get("timestep_scaling", 10.0),
    }
    package = "With the package; scheduler, steps and guidance come from the record beside the weights:"
    stock = "With diffusers alone:"
    parts = [package, _code(WITH_PACKAGE, values), stock, _code(LORA_ALONE if lora else PIPELINE_ALONE, values)]
    if single_file:
        parts += [SINGLE_FILE, _code(PIPELINE_BESIDE, values)]
    if lora and not provenance.base_id:
        parts.append(f"`{base}` is not on the Hub: give the place where you have it.")
    if lora:
        parts.append(
            "For ComfyUI, A1111 and kohya's tools: the file in `comfyui/`, with the sampler `lcm`, "
            f"{values['steps']} steps, CFG {values['scale']:g} and strength 1."
        )
    return parts


def _code(template: str, values: dict[str, object]) -> str:
    return f"```python\n{dedent(template).strip().format(**values)}\n```"


def _measurements(measured: Measured) -> list[str]:
    from cm_diffusers.evaluation.report import Setting, markdown_table  # matplotlib

    table = markdown_table(measured.rows, Setting(**measured.setting)).strip()
    only = "" if measured.setting["extractor"] == "inception" else EXTRACTOR.format(**measured.setting)
    return ["## Measured", f"The teacher's rows are the baseline.{only}", table]


def _rows(settings: dict[str, object]) -> list[str]:
    return [f"| {name} | {value} |" for name, value in settings.items() if value is not None]


CAPTION = {
    True: "The validation prompts at the end of training: the teacher's row, then this student's at different steps.",
    False: "Real images, and samples of the evaluated pipelines for the same prompts and seeds.",
}

EXTRACTOR = " FID is computed on the features of `{extractor}` and compares only with itself."

WITH_PACKAGE = """
    from cm_diffusers import ConsistencyPipeline

    pipe = ConsistencyPipeline.from_pretrained("{name}")
    image = pipe("your prompt").images[0]
"""

PIPELINE_ALONE = """
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("{name}")
    image = pipe("your prompt", num_inference_steps={steps}, guidance_scale={scale}).images[0]
"""

SINGLE_FILE = (
    f"With diffusers and `{PIPELINE_FILE}`, the pipeline beside the weights; it is code that runs on your machine, so read "
    "it first:"
)

PIPELINE_BESIDE = """
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="{name}", trust_remote_code=True)
    image = pipe("your prompt", num_inference_steps={steps}, guidance_scale={scale}).images[0]
"""

LORA_ALONE = """
    from diffusers import DiffusionPipeline, LCMScheduler

    pipe = DiffusionPipeline.from_pretrained("{base}")
    pipe.scheduler = LCMScheduler.from_config(
        pipe.scheduler.config, original_inference_steps={original}, timestep_scaling={scaling}
    )
    pipe.load_lora_weights("{name}", weight_name="{weights}")
    image = pipe("your prompt", num_inference_steps={steps}, guidance_scale={scale}).images[0]
"""
