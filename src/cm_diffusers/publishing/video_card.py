"""What the model cards of video students say of their own."""

import json
from textwrap import dedent

from cm_diffusers.publishing.provenance import Provenance, public
from cm_diffusers.record import Record


VIDEO_TASK = "text-to-video"
ANIMATELCM = "[AnimateLCM](https://arxiv.org/abs/2402.00769)"
VIDEO_METHODS = {"animatelcm": ("Video consistency model (AnimateLCM)", "distilled from", ANIMATELCM)}


def is_video(method: str) -> bool:
    return method in VIDEO_METHODS


def video_usage(record: Record, provenance: Provenance, base: str) -> list[str]:
    values = {
        "name": provenance.name,
        "base": base,
        "frames": provenance.settings.get("sample_n_frames", 16),
        "steps": record.recommended_num_inference_steps,
        "scale": float(record.recommended_guidance_scale),
    }
    parts = [
        "Motion modules, the LoRA of the image layers and the scheduler lie here; the rest is the base model. With the "
        "package, which finds it by the record:",
        code_block(WITH_PACKAGE, values),
        "With diffusers alone:",
        code_block(ALONE, values),
    ]
    return parts if provenance.base_id else [*parts, f"`{base}` is not on the Hub: give the place where you have it."]


def code_block(template: str, values: dict[str, object]) -> str:
    return f"```python\n{dedent(template).strip().format(**values)}\n```"


WITH_PACKAGE = """
    from cm_diffusers import ConsistencyVideoPipeline
    from diffusers.utils import export_to_gif

    pipe = ConsistencyVideoPipeline.from_pretrained("{name}")
    frames = pipe("your prompt", num_frames={frames}).frames[0]
    export_to_gif(frames, "clip.gif")
"""

ALONE = """
    from diffusers import AnimateDiffPipeline, LCMScheduler, MotionAdapter

    adapter = MotionAdapter.from_pretrained("{name}")
    pipe = AnimateDiffPipeline.from_pretrained("{base}", motion_adapter=adapter)
    pipe.scheduler = LCMScheduler.from_pretrained("{name}")
    pipe.load_lora_weights("{name}")
    frames = pipe(
        "your prompt", num_frames={frames}, num_inference_steps={steps}, guidance_scale={scale}
    ).frames[0]
"""


def condition_card(provenance: Provenance, kind: str, student: str) -> str:
    """The card of a condition that was trained in front of a video student.

    Args:
        kind: "image_adapter" or "controlnet".
        student: Folder or Hub id of the student.
    """
    values = {"name": provenance.name, "student": student, "data": provenance.data, "commit": provenance.commit}
    return dedent(CONDITIONS[kind]).lstrip().format(**values, command=provenance.command)


def motion_card(provenance: Provenance, beta_schedule: str, max_frames: int) -> str:
    """The card of motion modules that were trained by diffusion.

    Args:
        beta_schedule: Of the noise that they were trained on.
        max_frames: That they take.
    """
    base = public(provenance.settings["pretrained_teacher_model"])
    base_model = f"base_model: {provenance.base_id}\nbase_model_relation: adapter\n" if provenance.base_id else ""
    license = "".join(f"{key}: {json.dumps(value)}\n" for key, value in provenance.license.items())
    values = {"name": provenance.name, "base": base, "data": provenance.data, "commit": provenance.commit}
    values |= {"schedule": beta_schedule, "frames": provenance.settings["sample_n_frames"], "most": max_frames}
    head = f"---\nlibrary_name: diffusers\npipeline_tag: {VIDEO_TASK}\n{license}{base_model}{MOTION_TAGS}\n---\n\n"
    return head + dedent(MOTION).lstrip().format(**values, command=provenance.command)


MOTION_TAGS = "tags: [text-to-video, diffusers, diffusers-training, cm_diffusers, animatediff]"
MOTION = """
    # Motion modules for `{base}`

    Make clips of up to {most} frames with this image model. Trained between its frozen layers on {frames} frames of
    {data}, by diffusion, after [AnimateDiff](https://arxiv.org/abs/2307.04725); the noise schedule, `{schedule}`, lies in
    `scheduler_config.json`.

    ```python
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

    adapter = MotionAdapter.from_pretrained("{name}")
    pipe = AnimateDiffPipeline.from_pretrained("{base}", motion_adapter=adapter)
    pipe.scheduler = DDIMScheduler.from_pretrained("{name}", timestep_spacing="trailing", clip_sample=False)
    frames = pipe("your prompt", num_frames={frames}).frames[0]
    ```

    For few steps: `training/distill_animatelcm.py --pretrained_motion_adapter {name}`.

    Code: cm_diffusers at `{commit}`.

    ```bash
    {command}
    ```
    """

CONDITIONS = {
    "image_adapter": """
        ---
        library_name: diffusers
        pipeline_tag: image-to-video
        tags: [image-to-video, diffusers, diffusers-training, cm_diffusers, animatelcm]
        ---

        # Image-to-video adapter of `{student}`

        Lets a few-step video student begin with a given image. Trained on {data} without a teacher, after
        [AnimateLCM](https://arxiv.org/abs/2402.00769).

        ```python
        from cm_diffusers import ConsistencyVideoPipeline, ImageToVideoAdapter

        adapter = ImageToVideoAdapter.from_pretrained("{name}")
        pipe = ConsistencyVideoPipeline.from_pretrained("{student}", image_adapter=adapter)
        frames = pipe("your prompt", image=image).frames[0]
        ```

        Code: cm_diffusers at `{commit}`.

        ```bash
        {command}
        ```
        """,
    "controlnet": """
        ---
        library_name: diffusers
        pipeline_tag: text-to-video
        tags: [text-to-video, controlnet, diffusers, diffusers-training, cm_diffusers, animatelcm]
        ---

        # ControlNet of edges for `{student}`

        Lets a few-step video student follow the edges of given frames (Sobel magnitude, normalised per clip). Trained on
        {data} without a teacher, after [AnimateLCM](https://arxiv.org/abs/2402.00769).

        ```python
        from cm_diffusers import ConsistencyVideoPipeline
        from diffusers import ControlNetModel

        net = ControlNetModel.from_pretrained("{name}")
        pipe = ConsistencyVideoPipeline.from_pretrained("{student}", controlnet=net)
        frames = pipe("your prompt", conditioning_frames=edges).frames[0]
        ```

        Code: cm_diffusers at `{commit}`.

        ```bash
        {command}
        ```
        """,
}
