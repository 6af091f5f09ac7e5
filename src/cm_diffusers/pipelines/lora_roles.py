"""Which of the LoRAs on a UNet make it a student, and which of them act."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffusers import SchedulerMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cm_diffusers.models.adapters import adapter_layers
from cm_diffusers.record import Record


class Told(NamedTuple):
    """What a pipeline knows of its student."""

    record: Record | None
    training: dict[str, Any] | None
    scheduler: SchedulerMixin | None


@dataclass
class LoraRoles:
    """Kept with the UNet, so every pipeline that shares it knows.

    Attributes:
        before: What was known before the first LoRA with a record.
        fused: LoRAs that were in the weights by then.
        students: What each LoRA with a record brought, by its name; the last one counts.
        styles: Those that were put on a student, and make none.
        unknown: Those without record on a model of which nothing says that it is a student: they may make it one.
        gone: The record of the student's LoRA that was taken off last.
    """

    before: Told | None = None
    fused: frozenset[str] = frozenset()
    students: dict[str, Told] = field(default_factory=dict)
    styles: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    gone: Record | None = None

    @property
    def student(self) -> str | None:
        return next(reversed(self.students), None)


def roles_of(unet: nn.Module) -> LoraRoles:
    if not hasattr(unet, "_lora_roles"):
        unet._lora_roles = LoraRoles()
    return unet._lora_roles


def acting(unet: nn.Module, scale: float = 1.0) -> set[str]:
    """Names of the LoRAs that change what their layers compute; where some are fused, PEFT passes over all others.

    Args:
        scale: Of a call, by which all are multiplied that are not fused.
    """
    names, passed_over = set(), set()
    for layer in adapter_layers(unet):
        if layer.disable_adapters:
            continue
        if layer.merged:
            names |= set(layer.merged_adapters)
            passed_over |= set(layer.active_adapters) & _on(layer) - set(layer.merged_adapters)
        elif scale:
            names |= {name for name in layer.active_adapters if layer.scaling.get(name)}
    return names - passed_over


def active(network: nn.Module) -> set[str]:
    return {name for layer in adapter_layers(network) for name in layer.active_adapters}


def activate(network: nn.Module, names: Iterable[str]) -> None:
    """As `set_adapters` of diffusers, but with the scales that they have."""
    names = list(names)
    for layer in adapter_layers(network):
        layer.set_adapter(names)


def why_off(unet: nn.Module, name: str, scale: float) -> str:
    """Why a LoRA does not act, and what to do."""
    layers = [layer for layer in adapter_layers(unet) if name in _on(layer)]
    if not layers:
        return "it is no longer loaded; load it again with load_lora_weights"
    if any(layer.disable_adapters for layer in layers):
        return "LoRAs are disabled; call enable_lora()"
    if any(layer.merged and name not in layer.merged_adapters for layer in layers):
        return "others are fused without it; call unfuse_lora(), and fuse_lora() with it"
    if all(name in layer.active_adapters for layer in layers):
        return (
            f"its scale is 0; leave out the scale of the call, or call set_adapters({name!r}, 1.0)"
            if scale
            else ("the scale of the call is 0; leave it out")
        )
    return f"others are active; call set_adapters with {name!r} among them"


def _on(layer: BaseTunerLayer) -> set[str]:
    return set(layer.scaling)
