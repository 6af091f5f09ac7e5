"""What the model cards of students that jump to anywhere (PCM, TCD) say: how diffusers' `TCDScheduler` samples them."""

from cm_diffusers.record import Record


ALONE = "With diffusers alone; {exact}:"
CALL = 'image = pipe("your prompt", {asked}, guidance_scale={scale}, eta={gamma:g}{size}).images[0]'
LORA_ALONE = """
from diffusers import DiffusionPipeline, TCDScheduler

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config, original_inference_steps={original})
pipe.load_lora_weights("{name}", weight_name="{weights}")
"""
TOLD = (
    "Diffusers alone cannot sample this student: it is told where each step goes, which stock pipelines do not tell it. "
    "cm_diffusers must be installed."
)
TOLD_LORA = (
    "Diffusers alone puts this LoRA on without the layer that is told where each step goes (it lies in `peft/`): it samples, "
    "but not as it was trained. cm_diffusers should be installed."
)
EXACT = "these are the steps it was trained for, and `eta` is the share of fresh noise"
OF_PHASES = (
    '`timesteps` are where its phases start. `DDIMScheduler` with `timestep_spacing="trailing"` and '
    "`set_alpha_to_one=False` {ddim}"
)
SAME, NEAR = "takes the same steps", "is near, not the same: it takes the timesteps {trailing}"
DETERMINISTIC = "`euler` with the scheduler `sgm_uniform` (without its fresh noise; this was read, not tried)"


def is_of_trajectories(record: Record) -> bool:
    """Whether `TCDScheduler` samples it."""
    return record.scheduler.get("_class_name") == "TCDScheduler"


def trajectory_values(record: Record) -> dict[str, object]:
    """What the templates for these students name, beside what all do."""
    starts, steps = record.scheduler.get("recommended_timesteps"), record.recommended_num_inference_steps
    asked, exact = f"num_inference_steps={steps}", EXACT
    if starts:
        points = record.scheduler["num_train_timesteps"]
        trailing = [round(points - i * points / len(starts)) - 1 for i in range(len(starts))]
        same = trailing == starts and points % len(starts) == 0
        asked, exact = f"timesteps={starts}", OF_PHASES.format(ddim=SAME if same else NEAR.format(trailing=trailing))
    return {"asked": asked, "exact": exact, "gamma": record.scheduler["gamma"]}


def sampler_of(record: Record) -> str:
    """What ComfyUI and A1111 call the sampler."""
    return DETERMINISTIC if is_of_trajectories(record) else "`lcm`"
