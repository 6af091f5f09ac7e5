"""Loading students, published LCMs, base models and LoRAs, and keeping what their records say."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn

from cm_diffusers.models.single_file import is_single_file
from cm_diffusers.pipelines.lora import Source, check_fits_text_encoder, check_fits_unet, check_weights, folder_of
from cm_diffusers.pipelines.manners import (
    Manners,
    adopted_from,
    consistency_scheduler,
    contradiction,
    refuse_contradiction,
)
from cm_diffusers.pipelines.pipeline_consistency_images import CarriedSchedulerMixin, ConsistencyImagesPipeline
from cm_diffusers.pipelines.recorded import RecordedMixin, of_hub, refuse_base_model
from cm_diffusers.pipelines.single_file import SingleFileMixin
from cm_diffusers.record import Record, base_model_of, read_record
from cm_diffusers.schedulers.scheduling_consistency import ConsistencyScheduler
from cm_diffusers.schedulers.scheduling_edm_consistency import EDMConsistencyScheduler


WITHOUT_PROMPT = ("ConsistencyImagesPipeline", "ConsistencyModelPipeline")
IN_SIGMA = ("EDMConsistencyScheduler", "CMStochasticIterativeScheduler")


class ConsistencyLoaderMixin(CarriedSchedulerMixin, SingleFileMixin, RecordedMixin, StableDiffusionXLLoraLoaderMixin):
    """`from_pretrained`, `from_pipe`, `save_pretrained` and LoRAs of the consistency pipelines.

    The record of a student is part of the pipeline's config, so it survives whatever the config survives. The
    scheduler is a `ConsistencyScheduler` made from the record, or from the checkpoint's own scheduler; one that the
    caller passed or set is never replaced. What LoRAs displace, and which were fused, is kept with the UNet that has
    them, so every pipeline that shares the UNet knows.
    """

    @property
    def _before_lora(self) -> tuple[Record | None, SchedulerMixin, frozenset[str]] | None:
        """Record, scheduler and fused LoRAs before the first LoRA that is loaded now."""
        return getattr(self.unet, "_before_lora", None)

    @_before_lora.setter
    def _before_lora(self, value: tuple[Record | None, SchedulerMixin, frozenset[str]] | None) -> None:
        self.unet._before_lora = value

    @property
    def _merged_adapters(self) -> set[str]:
        """Where diffusers keeps the names of fused LoRAs."""
        return getattr(self.unet, "_merged_adapters", set())

    @_merged_adapters.setter
    def _merged_adapters(self, names: set[str]) -> None:
        self.unet._merged_adapters = names

    @property
    def manners(self) -> Manners:
        """What may be asked of the student, and what it is sampled with by default."""
        return Manners.of(self.record, self.unet)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Source, **kwargs: Any) -> Self:
        """Any few-step student, from a folder or the Hub.

        That is: a student of this package; a published LCM, Stable Diffusion or SDXL; a base model on which
        `load_lora_weights` puts an LCM-LoRA; or the folder or repository of a LoRA of this package, which is put on
        the base model that its record names. `ConsistencyPipeline` answers with a `ConsistencyImagesPipeline` for a
        student that takes no prompts.

        Args:
            pretrained_model_name_or_path: Folder or Hub id, or file, as for `from_single_file`.
            kwargs: As for `DiffusionPipeline.from_pretrained`; weights other than safetensors are only read with
                `use_safetensors=None` or False. A `scheduler` among them is kept.

        Raises:
            ValueError: A folder holds neither a pipeline nor a LoRA with its record, lacks weights, or is not as its
                record says; the LoRA's base model cannot be loaded, or the student takes no prompts and this class is
                not `ConsistencyPipeline`; or a `base_model` is given.
        """
        source = pretrained_model_name_or_path
        refuse_base_model(kwargs)
        if is_single_file(source):
            return cls.from_single_file(source, **kwargs)
        kwargs.setdefault("use_safetensors", True)
        record = read_record(source, **of_hub(kwargs))
        if not _is_pipeline(source, record, kwargs):
            return cls._from_lora(source, record, kwargs)
        if (kind := _class_name(source, kwargs)) in WITHOUT_PROMPT:
            if cls.__name__ != "ConsistencyPipeline":
                raise ValueError(f"{str(source)!r} is a {kind}, without prompts; load it with ConsistencyPipeline.")
            return ConsistencyImagesPipeline.from_pretrained(source, **kwargs)
        pipe = super().from_pretrained(source, **kwargs)
        if record is not None:
            if kwargs.get("unet") is None:
                refuse_contradiction(source, record, pipe.unet)
            pipe.register_to_config(record=asdict(record))
        if kwargs.get("scheduler") is None:
            pipe._adopt_scheduler()
        return pipe

    @classmethod
    def _from_lora(cls, source: Source, record: Record | None, kwargs: dict[str, Any]) -> Self:
        if record is None:
            raise ValueError(
                f"{str(source)!r} has neither a model_index.json nor the record of a LoRA; for a LoRA without record, "
                "load its base model and call load_lora_weights."
            )
        hub = of_hub(kwargs)
        kwargs.pop("revision", None)  # the LoRA's
        try:
            base = base_model_of(record, source)
            if not _is_pipeline(base, read_record(base, **of_hub(kwargs)), kwargs):
                raise ValueError("that is a LoRA as well")
            pipe = cls.from_pretrained(base, **kwargs)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"The LoRA {str(source)!r} belongs on {record.base_model!r}, which cannot be loaded ({reason}); load "
                "that base model from where it is and call load_lora_weights."
            ) from error
        pipe.load_lora_weights(source, weight_name=LORA_WEIGHT_NAME_SAFE, use_safetensors=True, **hub)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """The same components in this class; unlike in diffusers, none is cast unless `dtype` says so.

        Args:
            pipeline: Stock or ours.
            kwargs: Components or options to replace, and `dtype`.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        modules, options = cls._get_signature_keys(cls)
        parts, config = {name: getattr(pipeline, name, None) for name in modules}, pipeline.config
        # a stock pipeline that was made from ours holds what it does not know under a private name
        parts |= {name: config[key] for name in options for key in (f"_{name}", name) if key in config}
        pipe = cls(**{**parts, **kwargs})
        if name := config.get("_name_or_path"):
            pipe.register_to_config(_name_or_path=name)
        if not isinstance(pipeline, ConsistencyLoaderMixin):
            pipe._take_over(pipeline, kwargs)
        return pipe if dtype is None else pipe.to(dtype=dtype)

    def _take_over(self, stock: DiffusionPipeline, given: dict[str, Any]) -> None:
        """What `given` lacks: fused LoRAs, the record of the folder or cached repository, and the scheduler."""
        if "unet" not in given and getattr(stock, "fused_loras", None):
            self._merged_adapters = set(stock.fused_loras)
        source = self.config.get("_name_or_path")
        if "record" not in given and self.record is None and source:
            record = read_record(source, local_files_only=True)
            self.register_to_config(record=record and asdict(record))
        if "scheduler" not in given and not isinstance(self.scheduler, ConsistencyScheduler):
            self._adopt_scheduler()

    def save_pretrained(self, save_directory: Source, *args: Any, **kwargs: Any) -> None:
        """As `DiffusionPipeline.save_pretrained`, with the record beside the weights.

        Raises:
            ValueError: A LoRA is on the UNet, and not in its weights; text encoders save theirs.
        """
        if "unet" in self.get_list_adapters():
            raise ValueError(
                "A LoRA is on the UNet, which the folder of a pipeline cannot hold; call fuse_lora() and then "
                "unload_lora_weights(), or save it alone with save_lora_weights()."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

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
            self._before_lora = self._before_lora or (self.record, self.scheduler, frozenset(self.fused_loras))
            self.register_to_config(record=asdict(record))
            if adopted_from(self.scheduler):
                self._adopt_scheduler()

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
        record, scheduler, fused = self._before_lora
        self._before_lora = None
        if fused != self.fused_loras:
            return
        self.register_to_config(record=record and asdict(record))
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

    def _adopt_scheduler(self) -> None:
        """The scheduler of the record, or else of the checkpoint, as one of ours."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        if self.record is not None:
            name, config = self.record.scheduler.get("_class_name", "LCMScheduler"), self.record.scheduler
        if name in IN_SIGMA:
            self.scheduler = EDMConsistencyScheduler.from_config(config)
        else:
            self.scheduler = consistency_scheduler(name, config)


def _is_pipeline(source: Source, record: Record | None, kwargs: dict[str, Any]) -> bool:
    """False for what can only be a LoRA: a folder without model_index.json, or such a repository with a record."""
    if Path(source).is_file():
        return True
    if Path(source).exists():
        return (Path(source) / "model_index.json").is_file()
    if record is None:
        return True
    try:
        return bool(hf_hub_download(str(source), "model_index.json", **of_hub(kwargs)))
    except EntryNotFoundError:
        return False


def _class_name(source: Source, kwargs: dict[str, Any]) -> str | None:
    """The pipeline class that an index names; None where there is none to be read."""
    try:
        return DiffusionPipeline.load_config(source, **of_hub(kwargs)).get("_class_name")
    except (OSError, ValueError):
        return None
