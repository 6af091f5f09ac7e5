"""What the model cards of the kinds of students say of their own: how each is loaded and called."""

from pathlib import Path
from typing import NamedTuple

from cm_diffusers.models.families.base import family_tagged
from cm_diffusers.models.stored import header
from cm_diffusers.publishing import trajectory_kinds
from cm_diffusers.publishing.card import JUMPING, code_block
from cm_diffusers.publishing.flow_kinds import flow_values
from cm_diffusers.publishing.provenance import Provenance
from cm_diffusers.publishing.trajectory_kinds import (
    TOLD,
    TOLD_LORA,
    is_of_trajectories,
    sampler_of,
    trajectory_values,
)
from cm_diffusers.record import Record, is_of_flow


LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
PIPELINE_FILE = "pipeline.py"  # as diffusers looks for it where custom_pipeline is a folder or Hub id
SHOWN = 4  # noise levels that are named one by one
OWN_SCHEDULERS = ("EDMConsistencyScheduler", "TrigFlowConsistencyScheduler")  # that stock ones only carry
PACKAGE_NEEDED = "Diffusers alone cannot sample this student: cm_diffusers must be installed"
SAMPLED_BY = {  # family of the teacher -> single file of the root folder `pipelines`
    None: "consistency_images.py",
    "stable-diffusion": "consistency_text_to_image.py",
}
SINGLE_FILE = (
    f"With diffusers and `{PIPELINE_FILE}`, the pipeline beside the weights; it is code that runs on your machine, so read "
    "it first:"
)


class Kind(NamedTuple):
    """Templates of Python code, with the sentences above them.

    Attributes:
        task: As the Hub lists it.
        makes: What comes out.
        package: Sentence and code with this package.
        alone: Sentence and code with diffusers alone, where that has the scheduler.
        beside: What follows the loading of a single file where diffusers has the scheduler, and where not.
    """

    task: str
    makes: str
    package: tuple[str, str]
    alone: tuple[str, str]
    beside: tuple[str, str]

    @classmethod
    def of(cls, record: Record, provenance: Provenance) -> "Kind":
        if record.method == "animatelcm":
            return KINDS["fused clips" if provenance.fused else "clips"]
        if provenance.family is None:
            return KINDS["images"]
        if is_of_flow(record):
            clips = family_tagged(provenance.family).clips
            return KINDS[f"flow{' clips' if clips else ''}{' lora' if is_lora(provenance) else ''}"]
        if is_of_trajectories(record):
            return KINDS[f"trajectory{' lora' if is_lora(provenance) else ''}"]
        of_sprint = record.scheduler.get("_class_name") == "SCMScheduler"
        return KINDS[f"{'sprint ' * of_sprint}lora" if is_lora(provenance) else "text"]


def is_lora(provenance: Provenance) -> bool:
    """Whether a LoRA is what lies beside the card."""
    return bool(provenance.settings.get("lora")) and not provenance.fused


def knows_names(folder: Path, provenance: Provenance) -> bool:
    """Whether other programs know the names in the file of a LoRA in a folder: not those for a family that has its own."""
    file, family = folder / LORA_WEIGHTS, family_tagged(provenance.family or "")
    if not file.is_file() or family is None or family.lora_name is None:
        return True
    return any(".lora_down." in name for name in header(file)[0])


def is_stock(record: Record) -> bool:
    """Whether diffusers alone has the scheduler that samples right, and so the pipeline."""
    return record.scheduler.get("_class_name") not in OWN_SCHEDULERS


def usage(record: Record, provenance: Provenance, base: str, single_file: bool, named: bool = True) -> list[str]:
    """Code that loads and calls it, with what it needs.

    Args:
        base: Public name of the base model.
        single_file: Whether `PIPELINE_FILE` lies beside the weights.
        named: See `knows_names`.
    """
    kind, values, stock = Kind.of(record, provenance), _values(record, provenance, base), is_stock(record)
    parts = [kind.package[0], code_block(kind.package[1], values)]
    if record.target_dim is not None:
        parts.append(TOLD_LORA if kind in LORAS else TOLD)
    elif stock:
        parts += [kind.alone[0].format(**values), code_block(kind.alone[1], values)]
    elif not single_file:
        parts += _needed(kind, provenance, values)
    if kind in (*LORAS, KINDS["clips"]) and not provenance.base_id:
        parts.append(f"`{base}` is not on the Hub: give the place where you have it.")
    if kind in LORAS:
        texts = [*_elsewhere(record, provenance, named), EXACT]
        parts += [text.format(**values, made="combined" if provenance.combination else "trained") for text in texts]
    if single_file:
        parts += [SINGLE_FILE, code_block(BY_FILE + kind.beside[not stock], {**values, "file": provenance.name})]
    return parts


def _elsewhere(record: Record, provenance: Provenance, named: bool) -> list[str]:
    """How other programs sample a LoRA; nothing of one that is told where it jumps, as they do not tell it."""
    if record.target_dim is not None:
        return []
    if is_of_flow(record):
        return [FLOW_ELSEWHERE] if named and family_tagged(provenance.family).comfyui else []
    return [NOT_ELSEWHERE if record.guidance == "embedded" else ELSEWHERE]


def _values(record: Record, provenance: Provenance, base: str) -> dict[str, object]:
    """What the templates name."""
    asked = f"class_labels=[0, {provenance.num_classes - 1}]" if provenance.num_classes else "batch_size=4"
    return {
        "name": provenance.name,
        "base": base,
        "steps": record.recommended_num_inference_steps,
        "scale": float(record.recommended_guidance_scale),
        "lcm": sampler_of(record),
        "frames": provenance.settings.get("sample_n_frames", 16),
        "size": f", height={record.resolution}, width={record.resolution}" if record.resolution else "",
        "weights": LORA_WEIGHTS,
        "original": record.scheduler.get("original_inference_steps", 50),
        "scaling": record.scheduler.get("timestep_scaling", 10.0),
        "asked": f"batch_size=2, {asked}" if provenance.num_classes else asked,
        "calls": "\n".join(_image_calls(record, asked)),
        **(flow_values(record, family_tagged(provenance.family)) if is_of_flow(record) else {}),
        **(trajectory_values(record) if is_of_trajectories(record) else {}),
    }


def _image_calls(record: Record, asked: str) -> list[str]:
    """As recommended, and in one step where that is something else and a jump to the data."""
    sigmas = record.scheduler.get("recommended_sigmas") or []
    steps = len(sigmas) or record.recommended_num_inference_steps
    levels = f"at the noise levels {', '.join(f'{sigma:g}' for sigma in sigmas)}"
    calls = [f"images = pipe({asked}).images  # {levels if 0 < len(sigmas) <= SHOWN else f'in {count(steps)}'}"]
    if record.method in JUMPING or (record.method != "edm" and record.scheduler.get("gamma") != 0 and steps > 1):
        calls.append(f"images = pipe({asked}, num_inference_steps=1).images  # in one step")
    return calls


def count(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


def _needed(kind: Kind, provenance: Provenance, values: dict[str, object]) -> list[str]:
    """What samples a student that diffusers alone cannot."""
    file = None if is_lora(provenance) else SAMPLED_BY.get(provenance.family)  # it knows no LoRA's scheduler
    if file is None:
        return [f"{PACKAGE_NEEDED}."]
    given = {**values, "file": f"pipelines/{file}"}
    return [f"{PACKAGE_NEEDED}, {OR_FILE.format(**given)}", code_block(BY_FILE + kind.beside[1], given)]


ELSEWHERE = (
    "For ComfyUI, A1111 and kohya's tools: the same file, `{weights}`, with the sampler {lcm}, {steps} steps, CFG {scale:g} "
    "and strength 1."
)
FLOW_ELSEWHERE = (
    "For ComfyUI, whose table has the names in it (this was read, not tried): the same file, `{weights}`, with the sampler "
    "`{sampler}`, the scheduler `simple`, {node}, {steps} steps, {cfg} and strength 1."
)
NOT_ELSEWHERE = (
    "ComfyUI and A1111 cannot sample this one: the network that it belongs on takes guidance as an input, which they do not "
    "give."
)
EXACT = "For PEFT: `peft/`, exactly what was {made}; with this package, it is what is loaded."
WITH_PACKAGE = """
from cm_diffusers import ConsistencyPipeline

pipe = ConsistencyPipeline.from_pretrained("{name}")
"""
ALONE = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")
"""
BY_FILE = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="{file}", trust_remote_code=True)
"""
OR_FILE = "or its single file `{file}`, code that runs on your machine, so read it first:"
AS_RECOMMENDED = 'image = pipe("your prompt").images[0]'
CALL = 'image = pipe("your prompt", num_inference_steps={steps}, guidance_scale={scale}{size}).images[0]'
LORA_ALONE = """
from diffusers import DiffusionPipeline, LCMScheduler

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.scheduler = LCMScheduler.from_config(
    pipe.scheduler.config, original_inference_steps={original}, timestep_scaling={scaling}
)
pipe.load_lora_weights("{name}", weight_name="{weights}")
"""
FLOW_CALL = 'image = pipe("your prompt", {asked}).images[0]'
FLOW_CLIP_CALL = 'frames = pipe("your prompt", {asked}).frames[0]'
FLOW_LORA_ALONE = """
from diffusers import DiffusionPipeline, {scheduler}

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.scheduler = {scheduler}({told})
pipe.load_lora_weights("{name}", weight_name="{weights}")
"""
SPRINT_LORA_ALONE = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{name}", weight_name="{weights}")
"""
CLIPS_WITH_PACKAGE = """
from cm_diffusers import ConsistencyVideoPipeline
from diffusers.utils import export_to_gif

pipe = ConsistencyVideoPipeline.from_pretrained("{name}")
frames = pipe("your prompt", num_frames={frames}).frames[0]
export_to_gif(frames, "clip.gif")
"""
CLIPS_ALONE = """
from diffusers import AnimateDiffPipeline, LCMScheduler, MotionAdapter

adapter = MotionAdapter.from_pretrained("{name}")
pipe = AnimateDiffPipeline.from_pretrained("{base}", motion_adapter=adapter)
pipe.scheduler = LCMScheduler.from_pretrained("{name}")
pipe.load_lora_weights("{name}")
frames = pipe(
    "your prompt", num_frames={frames}, num_inference_steps={steps}, guidance_scale={scale}{size}
).frames[0]
"""
FROM_THE_RECORD = "With the package; scheduler, steps and guidance come from the record beside the weights:"
OF_TEXT = Kind(
    "text-to-image",
    "images",
    (FROM_THE_RECORD, WITH_PACKAGE + AS_RECOMMENDED),
    ("With diffusers alone:", ALONE + CALL),
    (CALL, AS_RECOMMENDED),
)
OF_CLIPS = Kind(
    "text-to-video",
    "clips",
    (
        "Motion modules, the LoRA of the image layers and the scheduler lie here; the rest is the base model. With the "
        "package, which finds it by the record:",
        CLIPS_WITH_PACKAGE,
    ),
    ("With diffusers alone:", CLIPS_ALONE),
    (CALL, AS_RECOMMENDED),
)
FLOW_ALONE = "With diffusers alone{noise}:"
OF_FLOW = OF_TEXT._replace(alone=(FLOW_ALONE, ALONE + FLOW_CALL), beside=(FLOW_CALL, FLOW_CALL))
OF_FLOW_CLIPS = Kind(
    "text-to-video",
    "clips",
    (FROM_THE_RECORD, WITH_PACKAGE + 'frames = pipe("your prompt", num_frames={frames}).frames[0]'),
    (FLOW_ALONE, ALONE + FLOW_CLIP_CALL),
    (FLOW_CLIP_CALL, FLOW_CLIP_CALL),
)
FRAMES_CALL = """
frames = pipe(
    "your prompt", num_frames={frames}, num_inference_steps={steps}, guidance_scale={scale}
).frames[0]
"""
KINDS = {
    "text": OF_TEXT,
    "lora": OF_TEXT._replace(alone=("With diffusers alone:", LORA_ALONE + CALL)),
    "trajectory": OF_TEXT._replace(alone=(trajectory_kinds.ALONE, ALONE + trajectory_kinds.CALL)),
    "trajectory lora": OF_TEXT._replace(
        alone=(trajectory_kinds.ALONE, trajectory_kinds.LORA_ALONE + trajectory_kinds.CALL)
    ),
    "sprint lora": OF_TEXT._replace(alone=("With diffusers alone:", SPRINT_LORA_ALONE + CALL)),
    "images": Kind(
        "unconditional-image-generation",
        "images",
        ("With the package; scheduler and noise levels come from beside the weights:", WITH_PACKAGE + "{calls}"),
        ("With diffusers alone, in one step:", ALONE + "images = pipe({asked}, num_inference_steps=1).images"),
        ("", "{calls}"),
    ),
    "clips": OF_CLIPS,
    "fused clips": OF_CLIPS._replace(
        package=(FROM_THE_RECORD, CLIPS_WITH_PACKAGE), alone=("With diffusers alone:", ALONE + FRAMES_CALL.lstrip())
    ),
    "flow": OF_FLOW,
    "flow lora": OF_FLOW._replace(alone=(FLOW_ALONE, FLOW_LORA_ALONE + FLOW_CALL)),
    "flow clips": OF_FLOW_CLIPS,
    "flow clips lora": OF_FLOW_CLIPS._replace(alone=(FLOW_ALONE, FLOW_LORA_ALONE + FLOW_CLIP_CALL)),
}
LORAS = [KINDS[name] for name in ("lora", "trajectory lora", "sprint lora", "flow lora", "flow clips lora")]
