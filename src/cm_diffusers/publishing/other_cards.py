"""The cards of what is no student: motion modules, conditions of video students, and tuned diffusion models."""

import json
from typing import NamedTuple

from cm_diffusers.markdown import cell
from cm_diffusers.places import public
from cm_diffusers.policy.policy import Policy
from cm_diffusers.publishing.card import ANIMATELCM, TAGS, card, code_block, made_by
from cm_diffusers.publishing.provenance import Provenance


class Kind(NamedTuple):
    """Templates of what a card says: title, lead, Python code, and what is said below it."""

    task: str
    tags: tuple[str, ...]
    title: str
    lead: str
    code: str
    below: str = ""


def motion_card(provenance: Provenance, beta_schedule: str, max_frames: int) -> str:
    """The card of motion modules that were trained by diffusion.

    Args:
        beta_schedule: Of the noise that they were trained on.
        max_frames: That they take.
    """
    base = public(provenance.settings["pretrained_teacher_model"])
    base_model = f"base_model: {provenance.base_id}\nbase_model_relation: adapter\n" if provenance.base_id else ""
    license = "".join(f"{key}: {json.dumps(value)}\n" for key, value in provenance.license.items())
    frames = {"frames": provenance.settings["sample_n_frames"], "most": max_frames}
    return _card(MOTION, provenance, {"base": base, "schedule": beta_schedule} | frames, license + base_model)


def condition_card(provenance: Provenance, kind: str, student: str) -> str:
    """The card of a condition that was trained in front of a video student.

    Args:
        kind: "image_adapter" or "controlnet".
        student: Folder or Hub id of the student.
    """
    return _card(CONDITIONS[kind], provenance, {"student": public(student)})


def tuned_card(method: str, provenance: Provenance, is_lora: bool, policy: Policy) -> str:
    """The card of a diffusion model that was tuned for a reward.

    Args:
        method: "rlcm" or "direct_reward".
        policy: How it was sampled.
    """
    sampling = f"num_inference_steps={policy.num_steps}, guidance_scale={policy.guidance_scale:g}, eta={policy.eta:g}"
    values = {
        "base": public(provenance.settings["pretrained_student_model"]),
        "rewards": cell(", ".join(map(str, provenance.settings["rewards"]))),
        "sampling": sampling,
        **TUNED_BY[method],
    }
    return _card(TUNED_LORA if is_lora else TUNED, provenance, values)


def _card(kind: Kind, provenance: Provenance, values: dict[str, object], origin: str = "") -> str:
    """
    Args:
        values: Of the names in the templates, beside the provenance's.
        origin: Lines of the front matter about licence and base model.
    """
    values = {"name": provenance.name, "data": cell(provenance.data)} | values
    tags = ", ".join(kind.tags).format(**values)
    front = f"library_name: diffusers\npipeline_tag: {kind.task}\n{origin}tags: [{tags}]"
    below = [kind.below.format(**values)] if kind.below else []
    sections = [kind.lead.format(**values), code_block(kind.code, values), *below, made_by(provenance)]
    return card(front, kind.title.format(**values), sections)


MOTION = Kind(
    "text-to-video",
    ("text-to-video", *TAGS, "animatediff"),
    "Motion modules for `{base}`",
    """\
Make clips of up to {most} frames with this image model. Trained between its frozen layers on {frames} frames of
{data}, by diffusion, after [AnimateDiff](https://arxiv.org/abs/2307.04725); the noise schedule, `{schedule}`, lies in
`scheduler_config.json`.""",
    """
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

adapter = MotionAdapter.from_pretrained("{name}")
pipe = AnimateDiffPipeline.from_pretrained("{base}", motion_adapter=adapter)
pipe.scheduler = DDIMScheduler.from_pretrained("{name}", timestep_spacing="trailing", clip_sample=False)
frames = pipe("your prompt", num_frames={frames}).frames[0]
""",
    "For few steps: `training/distill_animatelcm.py --pretrained_motion_adapter {name}`.",
)
CONDITIONS = {
    "image_adapter": Kind(
        "image-to-video",
        ("image-to-video", *TAGS, "animatelcm"),
        "Image-to-video adapter of `{student}`",
        f"""\
Lets a few-step video student begin with a given image. Trained on {{data}} without a teacher, after
{ANIMATELCM}.""",
        """
from cm_diffusers import ConsistencyVideoPipeline, ImageToVideoAdapter

adapter = ImageToVideoAdapter.from_pretrained("{name}")
pipe = ConsistencyVideoPipeline.from_pretrained("{student}", image_adapter=adapter)
frames = pipe("your prompt", image=image).frames[0]
""",
    ),
    "controlnet": Kind(
        "text-to-video",
        ("text-to-video", "controlnet", *TAGS, "animatelcm"),
        "ControlNet of edges for `{student}`",
        f"""\
Lets a few-step video student follow the edges of given frames (Sobel magnitude, normalised per clip). Trained on
{{data}} without a teacher, after {ANIMATELCM}.""",
        """
from cm_diffusers import ConsistencyVideoPipeline
from diffusers import ControlNetModel

net = ControlNetModel.from_pretrained("{name}")
pipe = ConsistencyVideoPipeline.from_pretrained("{student}", controlnet=net)
frames = pipe("your prompt", conditioning_frames=edges).frames[0]
""",
    ),
}
TUNED_BY = {
    "rlcm": {"tag": "ddpo", "paper": "[DDPO](https://arxiv.org/abs/2305.13301)"},
    "direct_reward": {"tag": "draft", "paper": "[DRaFT](https://arxiv.org/abs/2309.17400)"},
}
TUNED = Kind(
    "text-to-image",
    ("text-to-image", *TAGS, "{tag}"),
    "`{base}`, tuned for {rewards}",
    "A diffusion model, tuned for a reward of its own samples with cm_diffusers, after {paper}.",
    """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")
image = pipe("your prompt", {sampling}).images[0]
""",
)
TUNED_LORA = TUNED._replace(
    code="""
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
pipe.load_lora_weights("{name}")
image = pipe("your prompt", {sampling}).images[0]
""",
    below="For ComfyUI, A1111 and kohya's tools: the same file, `pytorch_lora_weights.safetensors`. For PEFT: `peft/`, exactly "
    "what was trained.",
)
