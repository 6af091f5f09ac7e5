"""What the model cards of students in EDM's coordinates say of their own, above all of those without prompts."""

from collections.abc import Iterator
from dataclasses import replace

from huggingface_hub import EvalResult

from cm_diffusers.measured import Measured
from cm_diffusers.publishing.provenance import Provenance
from cm_diffusers.record import Record


TASK = "unconditional-image-generation"
CM = "[Consistency Models](https://arxiv.org/abs/2303.01469)"
EDM_METHODS = {  # method of the record -> title, how, paper
    "cd": ("Consistency model (CD)", "distilled from", CM),
    "ct": ("Consistency model (CT)", "tuned from", CM),
    "ict": ("Consistency model (iCT)", "tuned from", "[iCT](https://arxiv.org/abs/2310.14189)"),
    "slct": ("Latent consistency model (sLCT)", "tuned from", "[sLCT](https://arxiv.org/abs/2502.01441)"),
    "ect": ("Consistency model (ECT)", "tuned from", "[ECT](https://arxiv.org/abs/2406.14548)"),
    "edm": ("Diffusion model in EDM's coordinates", "tuned from", "[EDM](https://arxiv.org/abs/2206.00364)"),
}
SHOWN = 4  # noise levels that are named one by one
PACKAGE_NEEDED = "Diffusers alone cannot sample this student: cm_diffusers must be installed"
SAMPLED_BY = {  # family of the teacher -> single file of the root folder `pipelines`
    None: "consistency_images.py",
    "stable-diffusion": "consistency_text_to_image.py",
}


def is_stock(record: Record) -> bool:
    """Whether diffusers alone has the scheduler that samples right, and so the pipeline."""
    return record.scheduler.get("_class_name") != "EDMConsistencyScheduler"


def needed(provenance: Provenance) -> str:
    """What samples a student that diffusers alone cannot."""
    file = SAMPLED_BY.get(provenance.family)
    other = f", or its single file `pipelines/{file}` given as `custom_pipeline`" if file else ""
    return f"{PACKAGE_NEEDED}{other}."


def kind_tags(method: str) -> list[str]:
    """What the Hub may list it under, from the general to the method."""
    if method not in EDM_METHODS:
        return ["lcm", method]
    return [method] if method == "edm" else ["consistency-model", method]


def classes(provenance: Provenance) -> list[str]:
    known = provenance.num_classes
    if known is None:
        return []
    return [
        f"It knows {known} classes: `class_labels` are numbers from 0 to {known - 1}, drawn at random if not given."
    ]


def image_usage(record: Record, provenance: Provenance, single_file: bool) -> list[str]:
    """
    Args:
        single_file: Whether a pipeline lies beside the weights.
    """
    name = provenance.name
    parts = [
        "With the package; scheduler and noise levels come from beside the weights:",
        _code(
            "from cm_diffusers import ConsistencyPipeline",
            "",
            f'pipe = ConsistencyPipeline.from_pretrained("{name}")',
            *image_calls(record, provenance),
        ),
    ]
    if not is_stock(record):
        return parts if single_file else [*parts, needed(provenance)]
    labels = f"batch_size=2, {_asked(provenance)}" if provenance.num_classes else _asked(provenance)
    return [
        *parts,
        "With diffusers alone, in one step:",
        _code(
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{name}")',
            f"images = pipe({labels}, num_inference_steps=1).images",
        ),
    ]


def _asked(provenance: Provenance) -> str:
    return f"class_labels=[0, {provenance.num_classes - 1}]" if provenance.num_classes else "batch_size=4"


def image_calls(record: Record, provenance: Provenance) -> list[str]:
    """As recommended, and in one step where that is something else and makes images."""
    asked = _asked(provenance)
    sigmas = record.scheduler.get("recommended_sigmas") or []
    steps = len(sigmas) or record.recommended_num_inference_steps
    levels = f"at the noise levels {', '.join(f'{sigma:g}' for sigma in sigmas)}"
    calls = [f"images = pipe({asked}).images  # {levels if 0 < len(sigmas) <= SHOWN else f'in {count(steps)}'}"]
    if record.method != "edm" and steps > 1:
        calls.append(f"images = pipe({asked}, num_inference_steps=1).images  # in one step")
    return calls


def count(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def without_guidance(measured: Measured) -> Measured:
    return replace(measured, rows=[{**row, "guidance_scale": None} for row in measured.rows])


def image_results(measured: Measured) -> Iterator[EvalResult]:
    """The student's numbers for the Hub, without the guidance that those of `Measured` name."""
    for result in replace(measured, rows=[{**row, "guidance_scale": 1.0} for row in measured.rows]).results():
        yield replace(
            result,
            task_type=TASK,
            metric_name=result.metric_name.partition(", guidance")[0],
            metric_args={name: value for name, value in result.metric_args.items() if name != "guidance_scale"},
        )
