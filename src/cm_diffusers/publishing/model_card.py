"""Model cards that say what was done: nothing to fill in by hand."""

from collections.abc import Sequence
from dataclasses import replace

from huggingface_hub import ModelCardData

from cm_diffusers.markdown import cell
from cm_diffusers.measured import TEACHER, Measured, distance_name
from cm_diffusers.pipelines.manners import BURNS_ABOVE
from cm_diffusers.places import public
from cm_diffusers.publishing.card import EDM_METHODS, MATCHING, METHODS, TAGS, card, made_by
from cm_diffusers.publishing.combined_card import combined
from cm_diffusers.publishing.flow_kinds import guidance_of
from cm_diffusers.publishing.provenance import Provenance
from cm_diffusers.publishing.student_kinds import Kind, count, is_lora, usage
from cm_diffusers.publishing.trajectory_kinds import sampler_of
from cm_diffusers.record import Record


def model_card(
    record: Record,
    provenance: Provenance,
    measured: Measured | None = None,
    grid: str | None = None,
    single_file: bool = False,
    checkpoints: Sequence[str] = (),
    named: bool = True,
) -> str:
    """The card of a student, as Markdown with the Hub's front matter.

    Args:
        measured: What an evaluation found.
        grid: Where a sample grid lies, which moves for clips, seen from the card: the evaluation's, or the training's last.
        single_file: Whether `PIPELINE_FILE` lies beside the weights.
        checkpoints: Files that hold the whole student in one.
        named: See `knows_names`.
    """
    lora, text = bool(provenance.settings.get("lora")), provenance.family is not None
    if measured and not text:
        measured = replace(measured, rows=[{**row, "guidance_scale": None} for row in measured.rows])
    title, how, paper = METHODS[f"{record.method}-lora" if lora else record.method]
    if provenance.settings.get("dmd_weight"):
        paper = f"{paper}, {MATCHING}"
    base, kind = public(record.base_model), Kind.of(record, provenance)
    origin = (
        f"{how} {_link(base, provenance)} with cm_diffusers, after {paper}, and trained on {cell(provenance.data)}"
    )
    if rewards := provenance.settings.get("rewards"):
        origin += f", for {cell(' + '.join(rewards))}"
    alone = f"trained on {cell(provenance.data)} with cm_diffusers, after {paper}"
    steps = "one step" if record.one_step else f"about {count(record.recommended_num_inference_steps)}"
    sections = [
        f"Makes {kind.makes} in {steps}. It was {origin if base else alone}.",
        *([ONE_STEP] if record.one_step else []),
        *([_guidance(record, provenance)] if text else _without_prompts(record, provenance)),
        *([FUSED] if provenance.fused else []),
        _license(provenance, bool(base)),
        "## Use",
        *usage(record, provenance, base, single_file, named),
        *[_for_other_tools(file, record) for file in checkpoints],
        *(_measurements(measured) if measured else []),
        *(combined(provenance.combination) if provenance.combination else []),
        *([f"## Samples\n\n{_caption(record, text, measured)}\n\n![Sample grid]({grid})"] if grid else []),
        "## Training",
        made_by(provenance),
        "\n".join(["| setting | value |", "|---|---|", *_rows(provenance.settings)]),
    ]
    front = _front(record, provenance, kind.task, measured)
    return card(front.to_yaml(), f"{title} of {cell(base or provenance.data)}", sections)


def _for_other_tools(file: str, record: Record) -> str:
    steps, scale = count(record.recommended_num_inference_steps), record.recommended_guidance_scale
    sampler = sampler_of(record)
    return f"For ComfyUI and A1111: `{file}` as the checkpoint, with the sampler {sampler}, {steps} and CFG {scale:g}."


def _front(record: Record, provenance: Provenance, task: str, measured: Measured | None) -> ModelCardData:
    settings, lora = provenance.settings, is_lora(provenance)
    tags = [task, *TAGS, *_method_tags(record.method), *(["lora", "template:sd-lora"] if lora else [])]
    dataset = settings.get("dataset_name") or ""
    optional = {
        "base_model": provenance.base_id,
        "base_model_relation": provenance.base_id and ("adapter" if lora else "finetune"),
        "datasets": dataset if dataset.count("/") == 1 else None,
        "widget": [{"text": prompt} for prompt in settings.get("validation_prompts") or []],
        "model_name": provenance.name if measured else None,
        "eval_results": list(measured.results()) if measured else None,
    }
    return ModelCardData(
        **provenance.license,
        library_name="diffusers",
        pipeline_tag=task,
        tags=list(dict.fromkeys([*tags, *([provenance.family] if provenance.family else [])])),
        **{name: value for name, value in optional.items() if value},
    )


def _method_tags(method: str) -> list[str]:
    """What the Hub may list it under, from the general to the method."""
    general = (
        [] if method in ("edm", "pcm", "tcd", "boot") else ["consistency-model"] if method in EDM_METHODS else ["lcm"]
    )
    return [*general, method]


def _link(base: str, provenance: Provenance) -> str:
    return f"[{base}](https://huggingface.co/{base})" if provenance.base_id else f"`{base}`"


def _license(provenance: Provenance, made_from_model: bool) -> str:
    name = provenance.license.get("license_name") or provenance.license.get("license")
    if name is None:
        return UNSTATED[made_from_model]
    link = provenance.license.get("license_link")
    source = "model it was made from" if made_from_model else "data it was trained on"
    return f"Licence: {f'[{name}]({link})' if link else name}, that of the {source}."


def _guidance(record: Record, provenance: Provenance) -> str:
    guided = guidance_of(provenance.family)
    name = next(iter(guided(1.0)))
    scales = (record.w_min + 1, record.w_max + 1, record.recommended_guidance_scale, BURNS_ABOVE)
    low, high, best, most = (guided(scale)[name] for scale in scales)
    if record.guidance == "embedded":
        return (
            f"Guidance is an input of the network, trained on `{name}` {low:g} to {high:g} ({best:g} is a good "
            "value): it costs no second pass, and there is no negative prompt."
        )
    if record.guidance == "distilled" and record.w_max == 0:
        return (
            f"Trained without guidance: sample with `{name}` {best:g}. Up to about {most:g} is possible, at two passes a "
            "step, and makes a negative prompt work."
        )
    if record.guidance == "distilled":
        trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return (
            f"Guidance (`{name}` {trained}) is in the weights: sample with `{name}` {best:g}. Up to "
            f"about {most:g} on top is possible, at two passes a step, and makes a negative prompt work."
        )
    return f"This student cannot be guided: `{name}` has no effect, and there is no negative prompt."


def _without_prompts(record: Record, provenance: Provenance) -> list[str]:
    """Its classes, and guidance that was trained into it."""
    said, known = [], provenance.num_classes
    if known is not None:
        said.append(
            f"It knows {known} classes: `class_labels` are numbers from 0 to {known - 1}, drawn at random if not given."
        )
    if record.guidance == "distilled" and record.w_max > 0:
        scale = f"{record.w_max + 1:g}"
        said.append(f"Guidance is in the weights, at a scale of {scale} where 1 is none: sampling takes no scale.")
    return said


def _measurements(measured: Measured) -> list[str]:
    from cm_diffusers.evaluation import report, video_report

    if measured.of_clips:
        table = video_report.markdown_table(measured.rows, video_report.VideoSetting(**measured.setting)).strip()
    else:
        table = report.markdown_table(measured.rows, report.Setting(**measured.setting)).strip()
    said = [BASELINE] if any(row["pipeline"] == TEACHER for row in measured.rows) else []
    distances = EXTRACTOR_OF_CLIPS if measured.of_clips else EXTRACTOR
    extractor = measured.setting["extractor"]
    if extractor != "inception":
        said.append(distances.format(distance=distance_name(extractor), extractor=extractor))
    return ["## Measured", *([" ".join(said)] if said else []), table]


def _rows(settings: dict[str, object]) -> list[str]:
    """Those that acted: of a LoRA not those of a full student, and the reverse."""
    idle = IDLE.get(settings.get("lora"), ())
    return [
        f"| {name} | {cell(value)} |" for name, value in settings.items() if value is not None and name not in idle
    ]


def _caption(record: Record, text: bool, measured: Measured | None) -> str:
    if measured is None and text and record.method in EDM_METHODS:
        return WITHOUT_TEACHER
    return OF_CLIPS if measured and measured.of_clips else CAPTION[text, measured is None]


WITHOUT_TEACHER = "The validation prompts at the end of training, a row for each number of steps."
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

ONE_STEP = (
    "It answers pure noise with its image, and nothing else: more steps make it worse, and it can neither change nor fill in a "
    "given image. The pipelines of cm_diffusers refuse both; ask other programs for text to image in one step."
)
FUSED = "This is a whole pipeline: what was trained, or a LoRA, was put into the weights of the model it belongs on."
IDLE = {  # by `lora`
    True: {"unet_time_cond_proj_dim", "ema_decay"},
    False: {"lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"},
}
BASELINE = "The teacher's rows are the baseline."
EXTRACTOR = (
    "{distance} is the Fréchet distance on the features of `{extractor}`: it compares only with itself, not with FID."
)
EXTRACTOR_OF_CLIPS = "{distance} are Fréchet distances on the features of `{extractor}`: they compare only with each other, not with FID."
