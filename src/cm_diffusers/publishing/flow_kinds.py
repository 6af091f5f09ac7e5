"""What the model cards of students of flow-matching teachers name: how their stock pipelines are called."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from cm_diffusers.models.families.base import Family, family_tagged
from cm_diffusers.pipelines.stock import stock_entry
from cm_diffusers.record import Record
from cm_diffusers.schedulers.scheduling_flow_consistency import FlowConsistencyScheduler


DIGITS = 6  # of noise levels
NOISE = ", most of whose pipelines draw the noise between the steps without your generator"


def guidance_of(tag: str | None) -> Callable[[float], Mapping[str, Any]]:
    """As `Family.guided`, of the family with this tag."""
    family = tag and family_tagged(tag)
    return family.guided if family else lambda scale: {"guidance_scale": scale}


def flow_values(record: Record, family: Family) -> dict[str, object]:
    """What the templates for these students name, beside what all do."""
    steps, scale = record.recommended_num_inference_steps, float(record.recommended_guidance_scale)
    ours = FlowConsistencyScheduler.from_config(record.scheduler)
    stock, arguments = stock_entry(ours, steps, family.sigmas)
    fresh, frames = ours.config.gamma > 0, record.num_frames or 1
    told = {"shift": stock.config.shift}
    if stock.config.get("stochastic_sampling"):
        told["stochastic_sampling"] = True
    size = {"height": record.resolution, "width": record.resolution} if record.resolution else {}
    asked = {**arguments, **family.guided(scale), **size, **({"num_frames": frames} if family.clips else {})}
    return {
        "frames": frames,
        "scheduler": type(stock).__name__,
        "told": _written(told),
        "asked": _written(asked),
        "noise": NOISE if fresh else "",
        "sampler": "lcm" if fresh else "euler",
        "node": _node(family, ours.config.shift),
        "cfg": f"guidance {scale:g}, CFG 1" if record.guidance == "embedded" else f"CFG {scale:g}",
    }


def _node(family: Family, shift: float) -> str:
    """How ComfyUI is told the shift; Flux's node interpolates its logarithm by the size of the image."""
    of_flux = family.comfyui == "ModelSamplingFlux"
    told = f"max_shift and base_shift {math.log(shift):.2f}" if of_flux else f"shift {shift:g}"
    return f"the node `{family.comfyui}` with {told}"


def _written(arguments: Mapping[str, Any]) -> str:
    """As code."""
    rounded = {
        name: [round(one, DIGITS) for one in value] if isinstance(value, list) else value
        for name, value in arguments.items()
    }
    return ", ".join(f"{name}={value!r}" for name, value in rounded.items())
