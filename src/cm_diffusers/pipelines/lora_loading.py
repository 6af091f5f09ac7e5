"""LoRAs on the consistency pipelines: what they bring along, what they displace, and that they fit."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError
from torch import Tensor, nn

from cm_diffusers.pipelines.lora import (
    Source,
    check_fits_text_encoder,
    check_fits_unet,
    check_weights,
    folder_of,
    read_exact,
)
from cm_diffusers.pipelines.manners import adopted_from, contradiction
from cm_diffusers.pipelines.recorded import RecordedMixin, of_hub, read_training
from cm_diffusers.record import Record, read_record


class LoraLoaderMixin(RecordedMixin, StableDiffusionXLLoraLoaderMixin):
    """diffusers' methods for LoRAs, with records.

    What LoRAs displace, and which were fused, is kept with the UNet that has them, so every pipeline that shares the UNet
    knows.
    """

    @property
    def _before_lora(self) -> tuple[Record | None, dict | None, SchedulerMixin, frozenset[str]] | None:
        """Record, training, scheduler and fused LoRAs before the first LoRA that is loaded now."""
        return getattr(self.unet, "_before_lora", None)

    @_before_lora.setter
    def _before_lora(self, value: tuple[Record | None, dict | None, SchedulerMixin, frozenset[str]] | None) -> None:
        self.unet._before_lora = value

    @property
    def _merged_adapters(self) -> set[str]:
        """Where diffusers keeps the names of fused LoRAs."""
        return getattr(self.unet, "_merged_adapters", set())

    @_merged_adapters.setter
    def _merged_adapters(self, names: set[str]) -> None:
        self.unet._merged_adapters = names

    def check_saveable(self) -> None:
        if "unet" in self.get_list_adapters():
            raise ValueError(
                "A LoRA is on the UNet, which the folder of a pipeline cannot hold; call fuse_lora() and then "
                "unload_lora_weights(), or save it alone with save_lora_weights()."
            )

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Source | dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> None:
        """As in diffusers; a LoRA with a record beside it also brings its scheduler and recommendations.

        Raises:
            ValueError: The LoRA was made for another architecture. Nothing of it stays.
        """
        source = pretrained_model_name_or_path_or_dict
        kwargs.setdefault("use_safetensors", True)
        hub = of_hub(kwargs)
        folder = None if isinstance(source, dict) else folder_of(source, kwargs.get("subfolder"))
        if folder is not None:
            check_weights(source, kwargs)
        with self._all_or_nothing():
            super().load_lora_weights(source, *args, **kwargs)
        record = folder and read_record(folder, **hub)
        if record and (reason := contradiction(record, self.unet)):
            warnings.warn(f"{reason}; its scheduler and recommendations are not taken over.", stacklevel=2)
        elif record:
            before = (self.record, self.training, self.scheduler, frozenset(self.fused_loras))
            self._before_lora = self._before_lora or before
            self.register_to_config(record=asdict(record))
            self.training = read_training(folder, **hub)
            if adopted_from(self.scheduler):
                self._adopt_scheduler()

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: Source | dict[str, Tensor], **kwargs: Any
    ) -> tuple[Any, ...]:
        """As in diffusers; of a LoRA of this package the exact form, unless a `weight_name` says otherwise."""
        source, name = pretrained_model_name_or_path_or_dict, kwargs.get("weight_name")
        if not isinstance(source, dict) and name is None:
            hub = of_hub(kwargs)
            if exact := read_exact(source, kwargs.get("subfolder"), **hub):
                parts = (exact.state_dict, None, exact.metadata)
                return parts if kwargs.get("return_lora_metadata") else parts[:2]
            if not Path(source).exists() and read_record(source, **hub):
                kwargs["weight_name"] = (
                    LORA_WEIGHT_NAME_SAFE  # which diffusers must be told where it may not ask the Hub
                )
        return super().lora_state_dict(source, **kwargs)

    def unload_lora_weights(self) -> None:
        """As in diffusers; record and scheduler are again those before the first LoRA, unless one was fused."""
        super().unload_lora_weights()
        self._after_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As in diffusers; without the last adapter, record and scheduler are those before the first."""
        super().delete_adapters(adapter_names)
        if not self._adapters():
            self._after_lora()

    def _after_lora(self) -> None:
        if self._before_lora is None:
            return
        record, training, scheduler, fused = self._before_lora
        self._before_lora = None
        if fused != self.fused_loras:
            return
        self.register_to_config(record=record and asdict(record))
        self.training = training
        if adopted_from(self.scheduler):
            self.scheduler = scheduler

    @classmethod
    def load_lora_into_unet(
        cls, state_dict: dict[str, Tensor], network_alphas: dict, unet: UNet2DConditionModel, *args: Any, **kwargs: Any
    ) -> None:
        """As in diffusers, once every layer is known to fit."""
        check_fits_unet(state_dict, unet)
        if any(key.startswith("unet.") for key in state_dict):
            super().load_lora_into_unet(state_dict, network_alphas, unet, *args, **kwargs)

    @classmethod
    def load_lora_into_text_encoder(
        cls, state_dict: dict[str, Tensor], network_alphas: dict, text_encoder: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        """As in diffusers, once every layer is known to fit; a LoRA that has nothing for this tower leaves it alone."""
        prefix = kwargs.get("prefix") or cls.text_encoder_name
        if not any(key.startswith(f"{prefix}.") for key in state_dict):
            return
        if text_encoder is None:
            raise ValueError(
                f"The LoRA has layers for {prefix}, which this pipeline does not have; it is for another."
            )
        check_fits_text_encoder(state_dict, text_encoder, prefix)
        super().load_lora_into_text_encoder(state_dict, network_alphas, text_encoder, *args, **kwargs)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        before = self._adapters()
        try:
            yield
        except SafetensorError as error:
            raise ValueError(
                f"The LoRA is not a whole safetensors file ({error}); get it anew, or in that format: others can hold "
                "code that loading would run."
            ) from error
        except OSError as error:
            raise ValueError(f"The LoRA cannot be loaded ({str(error).splitlines()[0]}).") from error
        except Exception:
            if new := self._adapters() - before:
                self.delete_adapters(sorted(new))
            raise

    def _adapters(self) -> set[str]:
        return {name for names in self.get_list_adapters().values() for name in names}
