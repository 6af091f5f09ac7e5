"""LoRAs on the consistency pipelines: what they bring along, what they displace, and that they fit and act."""

import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from safetensors import SafetensorError
from torch import Tensor

from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import adapter_layers
from cm_diffusers.models.target_input import add_target_input_of, settle_target_input
from cm_diffusers.pipelines.lora import (
    PARTS,
    Source,
    check_weights,
    folder_of,
    free_name,
    layers_of,
    put_on,
    read_lora,
)
from cm_diffusers.pipelines.lora_roles import LoraRoles, Told, acting, activate, active, roles_of, why_off
from cm_diffusers.pipelines.manners import FEW_STEP_SCHEDULERS, adopted_from, contradiction, tells_of_distillation
from cm_diffusers.pipelines.recorded import RecordedMixin, of_hub, read_training
from cm_diffusers.record import read_record


class LoraLoaderMixin(RecordedMixin, StableDiffusionXLLoraLoaderMixin):
    """diffusers' methods for LoRAs, with records, and with a student's LoRA that stays active beside others.

    What LoRAs displace, and which were fused, is kept with the UNet that has them, so every pipeline that shares the UNet
    knows.
    """

    @property
    def _roles(self) -> LoraRoles:
        return roles_of(self.unet)

    @property
    def _merged_adapters(self) -> set[str]:
        """Where diffusers keeps the names of fused LoRAs."""
        return getattr(self.unet, "_merged_adapters", set())

    @_merged_adapters.setter
    def _merged_adapters(self, names: set[str]) -> None:
        self.unet._merged_adapters = names

    def check_saveable(self) -> None:
        if "unet" in self.get_list_adapters():
            raise UserError(
                "A LoRA is on the UNet, which the folder of a pipeline cannot hold; call fuse_lora() and then "
                "unload_lora_weights(), or save it alone with save_lora_weights()."
            )
        if self.unet is not None and self.record is not None and self.record == self._roles.gone:
            raise UserError(
                "The LoRA that made this a student was taken off by another pipeline that shares the UNet; load it again "
                "before you save."
            )

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Source | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs: Any,
    ) -> None:
        """As in diffusers, of files with names of any kind; what is left over is refused.

        A LoRA with a record beside it also brings its scheduler and recommendations, and joins those that are active. The
        student's LoRA stays active when another is loaded; on a model of which nothing says that it is a student, all do,
        for any of them may make it one.

        Raises:
            ValueError: The LoRA was made for another architecture, is not whole, or not finite. Nothing of it stays.
        """
        source = pretrained_model_name_or_path_or_dict
        kwargs.setdefault("use_safetensors", True)
        hub = of_hub(kwargs)
        folder = None if isinstance(source, dict) else folder_of(source, kwargs.get("subfolder"))
        if folder is not None:
            check_weights(source, kwargs)
        if adapter_name is not None and "." in adapter_name:
            raise UserError(f"adapter_name must be without dots, got {adapter_name!r}.")
        before = {part: active(getattr(self, part)) for part in PARTS if getattr(self, part, None) is not None}
        with self._all_or_nothing(before):
            file = read_lora(source, **kwargs)
            add_target_input_of(file.state_dict, self.unet)
            layers = layers_of(self, file)
            name = adapter_name or free_name(self)
            put_on(self, layers, name, low_cpu_mem_usage, hotswap)
        record = folder and read_record(folder, **hub)
        if record and (reason := contradiction(record, self.unet)):
            warnings.warn(f"{reason}; its scheduler and recommendations are not taken over.", stacklevel=2)
            record = None
        stay = self._take_up(name, record and Told(record, read_training(folder, **hub), None), hotswap)
        for part in () if hotswap else layers:
            activate(getattr(self, part), [*sorted(stay & before[part]), name])

    def _take_up(self, name: str, told: Told | None, hotswap: bool) -> set[str]:
        """What a new LoRA is to the student; the names of those that stay active beside it."""
        roles, others = self._roles, self._adapters() - {name}
        if told is None and hotswap and name in roles.students:
            self._after_lora({name})
            roles.styles.add(name)
            return set()
        if told is not None:
            displaced = set(roles.students)
            roles.styles |= others - displaced
            roles.styles.discard(name)
            if roles.before is None:
                roles.before, roles.fused = self._told(), frozenset(self.fused_loras)
            roles.students.pop(name, None)
            roles.students[name] = told
            roles.gone = None
            self._tell(told)
            return others - displaced
        if self._is_student():
            roles.styles.add(name)
            return {roles.student} if roles.student else set()
        roles.unknown.add(name)
        return others

    def _told(self) -> Told:
        return Told(self.record, self.training, self.scheduler)

    def _tell(self, told: Told) -> None:
        self.record = told.record
        self.training = told.training
        if adopted_from(self.scheduler):
            if told.scheduler is None:
                self._adopt_scheduler()
            else:
                self.scheduler = told.scheduler

    def _is_student(self) -> bool:
        """Whether something else than LoRAs without record says so."""
        fused, came_with = set(self.fused_loras) - self._roles.styles, adopted_from(self.scheduler)
        return bool(self.record or self.manners.guidance == "embedded" or fused or came_with in FEW_STEP_SCHEDULERS)

    def unload_lora_weights(self) -> None:
        """As in diffusers; record and scheduler are again those before the first LoRA, unless one was fused."""
        super().unload_lora_weights()
        self._after_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As in diffusers; without the student's LoRA, record and scheduler are those before it."""
        super().delete_adapters(adapter_names)
        self._after_lora()

    def fuse_lora(
        self, components: list[str] | None = None, lora_scale: float = 1.0, *args: Any, **kwargs: Any
    ) -> None:
        """As in diffusers, which could not take values that are not finite out of the weights again.

        Raises:
            ValueError: There are such, or the scale is none.
        """
        networks = [network for part in PARTS if (network := getattr(self, part, None)) is not None]
        values = (
            p
            for network in networks
            for layer in adapter_layers(network)
            for k, p in layer.named_parameters()
            if "lora_" in k
        )
        if not math.isfinite(lora_scale) or not all(value.isfinite().all() for value in values):
            raise UserError("A LoRA, or its scale, is not finite, and would spoil the weights; load it anew.")
        if lora_scale == 0:
            warnings.warn("fuse_lora(lora_scale=0) adds nothing to the weights; leave the scale out.", stacklevel=2)
        super().fuse_lora(list(PARTS) if components is None else components, lora_scale, *args, **kwargs)

    def _after_lora(self, replaced: Collection[str] = ()) -> None:
        """Follows what was taken off: the record is that of the last student's LoRA that is left, or the one before all."""
        settle_target_input(self.unet)
        roles = self._roles
        left = (set(getattr(self.unet, "peft_config", {})) | (set(self.fused_loras) - roles.fused)) - set(replaced)
        gone = [name for name in roles.students if name not in left]
        was = roles.student
        for name in gone:
            roles.gone = roles.students.pop(name).record
        if roles.before is None or was == roles.student:
            return
        if roles.student is not None:
            self._tell(roles.students[roles.student])
        else:
            told, roles.before = roles.before, None
            self._tell(told)

    def _check_loras(self, scale: float) -> bool:
        """Warns where the student's LoRA is off; whether nothing else says that the model was distilled.

        Args:
            scale: Of the call.
        """
        roles, on = self._roles, acting(self.unet, scale)
        inside = set(self.fused_loras) - set(getattr(self.unet, "peft_config", {}))
        off = roles.student if roles.student not in on | inside else None
        if off or (self.record is not None and self.record == roles.gone):
            warnings.warn(
                f"The LoRA that makes this model a student does not act, so the model underneath is sampled, undistilled: "
                f"{why_off(self.unet, off, scale)}.",
                stacklevel=6,
            )
        if self.record is not None or self._manners.guidance == "embedded" or (on | inside) - roles.styles:
            return False
        loras = roles.unknown | (set(getattr(self.unet, "peft_config", {})) - roles.styles)
        return bool(loras) or not tells_of_distillation(self.scheduler)

    @contextmanager
    def _all_or_nothing(self, active_before: dict[str, set[str]]) -> Iterator[None]:
        before = self._adapters()
        try:
            yield
        except SafetensorError as error:
            raise UserError(
                f"The LoRA is not a whole safetensors file ({error}); get it anew, or in that format: others can hold "
                "code that loading would run."
            ) from error
        except OSError as error:
            raise UserError(f"The LoRA cannot be loaded ({str(error).splitlines()[0]}).") from error
        except Exception:
            if new := self._adapters() - before:
                super().delete_adapters(sorted(new))
                for part, names in active_before.items():
                    activate(getattr(self, part), sorted(names))
            settle_target_input(self.unet)
            raise

    def _adapters(self) -> set[str]:
        return {name for names in self.get_list_adapters().values() for name in names}
