"""Model cards that say what was done: nothing to fill in by hand."""

from textwrap import dedent

from huggingface_hub import ModelCardData

from cm_diffusers.measured import TEACHER, Measured, distance_name
from cm_diffusers.publishing.image_card import (
    EDM_METHODS,
    TASK,
    classes,
    count,
    image_calls,
    image_results,
    image_usage,
    is_stock,
    kind_tags,
    needed,
    without_guidance,
)
from cm_diffusers.publishing.provenance import Provenance, public
from cm_diffusers.publishing.video_card import VIDEO_METHODS, VIDEO_TASK, code_block, is_video, video_usage
from cm_diffusers.record import Record


LCM = "[Latent Consistency Models](https://arxiv.org/abs/2310.04378)"
LCM_LORA = "[LCM-LoRA](https://arxiv.org/abs/2311.05556)"
SCOTT = "[SCott](https://arxiv.org/abs/2403.01505)"
RLCM = "[RLCM](https://arxiv.org/abs/2404.03673)"
REWARD_GRADIENTS = "[RG-LCD](https://arxiv.org/abs/2403.11027), [DRaFT](https://arxiv.org/abs/2309.17400)"
METHODS = {  # method of the record, with "-lora" where that is so -> title, how, paper
    "lcm": ("Latent consistency model", "distilled from", LCM),
    "lcm-lora": ("LCM-LoRA", "distilled from", LCM_LORA),
    "scott": ("Stochastic consistency distillation (SCott)", "distilled from", SCOTT),
    "scott-lora": ("Stochastic consistency distillation (SCott, LoRA)", "distilled from", f"{SCOTT}, {LCM_LORA}"),
    "lcf": ("Latent consistency fine-tuning", "fine-tuned from", LCM),
    "lcf-lora": ("Latent consistency fine-tuning (LoRA)", "fine-tuned from", f"{LCM}, {LCM_LORA}"),
    "rlcm": ("Consistency model tuned for a reward (RLCM)", "tuned from", RLCM),
    "rlcm-lora": ("Consistency model tuned for a reward (RLCM, LoRA)", "tuned from", RLCM),
    "direct_reward": ("Consistency model tuned by a reward's gradient", "tuned from", REWARD_GRADIENTS),
    "direct_reward-lora": ("Consistency model tuned by a reward's gradient (LoRA)", "tuned from", REWARD_GRADIENTS),
    **EDM_METHODS,
    **VIDEO_METHODS,
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
        grid: Where a sample grid lies, which moves for clips, seen from the card: the evaluation's, or the training's last.
        single_file: Whether `PIPELINE_FILE` lies beside the weights.
    """
    lora, text = bool(provenance.settings.get("lora")), provenance.family is not None
    title, how, paper = METHODS[f"{record.method}-lora" if lora else record.method]
    base = public(record.base_model)
    origin = f"{how} {_link(base, provenance)} with cm_diffusers, after {paper}, and trained on {provenance.data}"
    if rewards := provenance.settings.get("rewards"):
        origin += f", for {' + '.join(rewards)}"
    alone = f"trained on {provenance.data} with cm_diffusers, after {paper}"
    parts = [
        f"---\n{_front(record, provenance, lora, measured).to_yaml()}\n---",
        f"# {title} of {base or provenance.data}",
        f"Makes {'clips' if is_video(record.method) else 'images'} in about {count(record.recommended_num_inference_steps)}. It was {origin if base else alone}.",
        *([_guidance(record)] if text else classes(provenance)),
        _license(provenance, bool(base)),
        "## Use",
        *_use(record, provenance, base, lora, single_file),
        *(_beside(record, provenance) if single_file else []),
        *(_measurements(measured if text else without_guidance(measured)) if measured else []),
        *([f"## Samples\n\n{_caption(text, measured)}\n\n![Sample grid]({grid})"] if grid else []),
        "## Training",
        f"Code: cm_diffusers at `{provenance.commit}`.\n\n```bash\n{provenance.command}\n```",
        "\n".join(["| setting | value |", "|---|---|", *_rows(provenance.settings)]),
    ]
    return "\n\n".join(parts) + "\n"


def _use(record: Record, provenance: Provenance, base: str, lora: bool, single_file: bool) -> list[str]:
    if is_video(record.method):
        return video_usage(record, provenance, base)
    if provenance.family is None:
        return image_usage(record, provenance, single_file)
    return _usage(record, provenance, base, lora, single_file)


def _front(record: Record, provenance: Provenance, lora: bool, measured: Measured | None) -> ModelCardData:
    task = TASK if provenance.family is None else VIDEO_TASK if is_video(record.method) else "text-to-image"
    tags = [task, "diffusers", "diffusers-training", "cm_diffusers", *kind_tags(record.method)]
    tags += ["lora", "template:sd-lora"] if lora else []
    prompts = provenance.settings.get("validation_prompts") or []
    dataset = provenance.settings.get("dataset_name") or ""
    results = image_results if provenance.family is None else Measured.results
    optional = {
        "base_model": provenance.base_id,
        "base_model_relation": provenance.base_id and ("adapter" if lora else "finetune"),
        "datasets": dataset if dataset.count("/") == 1 else None,
        "widget": [{"text": prompt} for prompt in prompts],
        "model_name": provenance.name if measured else None,
        "eval_results": list(results(measured)) if measured else None,
    }
    return ModelCardData(
        **provenance.license,
        library_name="diffusers",
        pipeline_tag=task,
        tags=list(dict.fromkeys([*tags, *([provenance.family] if provenance.family else [])])),
        **{name: value for name, value in optional.items() if value},
    )


def _link(base: str, provenance: Provenance) -> str:
    return f"[{base}](https://huggingface.co/{base})" if provenance.base_id else f"`{base}`"


def _license(provenance: Provenance, made_from_model: bool) -> str:
    name = provenance.license.get("license_name") or provenance.license.get("license")
    if name is None:
        return UNSTATED[made_from_model]
    link = provenance.license.get("license_link")
    source = "model it was made from" if made_from_model else "data it was trained on"
    return f"Licence: {f'[{name}]({link})' if link else name}, that of the {source}."


def _guidance(record: Record) -> str:
    low, high = record.w_min + 1, record.w_max + 1
    best = record.recommended_guidance_scale
    if record.guidance == "embedded":
        return (
            f"Guidance is an input of the network, trained on `guidance_scale` {low:g} to {high:g} ({best:g} is a good "
            "value): it costs no second pass, and there is no negative prompt."
        )
    if record.guidance == "distilled" and record.w_max == 0:
        return (
            f"Trained without guidance: sample with `guidance_scale` {best:g}. Up to about 2 is possible, at two passes a "
            "step, and makes a negative prompt work."
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
    stock = ["With diffusers alone:", code_block(LORA_ALONE if lora else PIPELINE_ALONE, values)]
    alone = stock if is_stock(record) else [] if single_file else [needed(provenance)]
    parts = [package, code_block(WITH_PACKAGE, values), *alone]
    if lora and not provenance.base_id:
        parts.append(f"`{base}` is not on the Hub: give the place where you have it.")
    if lora:
        parts.append(
            "For ComfyUI, A1111 and kohya's tools: the file in `comfyui/`, with the sampler `lcm`, "
            f"{values['steps']} steps, CFG {values['scale']:g} and strength 1."
        )
    return parts


def _beside(record: Record, provenance: Provenance) -> list[str]:
    """How the single file is loaded; one that takes a prompt or replaces the package is also called."""
    values = {
        "name": provenance.name,
        "steps": record.recommended_num_inference_steps,
        "scale": float(record.recommended_guidance_scale),
    }
    if is_stock(record):
        return [SINGLE_FILE, code_block(PIPELINE_BESIDE + ("" if provenance.family is None else CALL), values)]
    calls = image_calls(record, provenance) if provenance.family is None else [CALL_AS_RECOMMENDED]
    return [SINGLE_FILE, code_block("\n".join([dedent(PIPELINE_BESIDE).rstrip(), *calls]), values)]


def _measurements(measured: Measured) -> list[str]:
    from cm_diffusers.evaluation import report, video_report

    if measured.of_clips:
        table = video_report.markdown_table(measured.rows, video_report.VideoSetting(**measured.setting)).strip()
    else:
        table = report.markdown_table(measured.rows, report.Setting(**measured.setting)).strip()
    said = [BASELINE] if any(row["pipeline"] == TEACHER for row in measured.rows) else []
    distances = EXTRACTOR_OF_CLIPS if measured.of_clips else EXTRACTOR
    extractor = measured.setting["extractor"]
    said += (
        [] if extractor == "inception" else [distances.format(distance=distance_name(extractor), extractor=extractor)]
    )
    return ["## Measured", *([" ".join(said)] if said else []), table]


def _rows(settings: dict[str, object]) -> list[str]:
    return [f"| {name} | {value} |" for name, value in settings.items() if value is not None]


def _caption(text: bool, measured: Measured | None) -> str:
    return OF_CLIPS if measured and measured.of_clips else CAPTION[text, measured is None]


OF_CLIPS = "A column for each of the first prompts, a row for each number of steps."
CAPTION = {  # of a student with prompts or not; of the training or the evaluation
    (
        True,
        True,
    ): "The validation prompts at the end of training: the teacher's row, then this student's at different steps.",
    (True, False): "Real images, and samples of the evaluated pipelines for the same prompts and seeds.",
    (False, True): "Samples at the end of training.",
    (False, False): "Real images, and samples of the evaluated pipelines for the same seeds.",
}

UNSTATED = {
    True: "The model it was made from states no licence where this was trained; whatever its licence is binds this model too.",
    False: "The data it was trained on states no licence where this was trained; look for it before you use this model.",
}

BASELINE = "The teacher's rows are the baseline."
EXTRACTOR = (
    "{distance} is the Fréchet distance on the features of `{extractor}`: it compares only with itself, not with FID."
)
EXTRACTOR_OF_CLIPS = "{distance} are Fréchet distances on the features of `{extractor}`: they compare only with each other, not with FID."

CALL = """\
    image = pipe("your prompt", num_inference_steps={steps}, guidance_scale={scale}).images[0]
"""

CALL_AS_RECOMMENDED = 'image = pipe("your prompt").images[0]'

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
