"""Loading students, published LCMs, base models and LoRAs, and keeping what their records say."""

from collections.abc import Mapping
from typing import Any, Self

from diffusers import DiffusionPipeline

from cm_diffusers.errors import UserError
from cm_diffusers.models.single_file import is_single_file
from cm_diffusers.pipelines.flow_students import stock_class_of, student_class
from cm_diffusers.pipelines.layouts import check_index, for_base, is_pipeline, refuse_part
from cm_diffusers.pipelines.lora import Source
from cm_diffusers.pipelines.lora_loading import LoraLoaderMixin
from cm_diffusers.pipelines.manners import (
    FEW_STEP_SCHEDULERS,
    IN_SIGMA,
    Manners,
    consistency_scheduler,
)
from cm_diffusers.pipelines.pipeline_consistency_images import ConsistencyImagesPipeline
from cm_diffusers.pipelines.recorded import of_hub, read_training, refuse_base_model
from cm_diffusers.pipelines.single_file import SingleFileMixin
from cm_diffusers.pipelines.stock import CarriedSchedulerMixin, parts_of
from cm_diffusers.record import Record, base_model_of, read_record
from cm_diffusers.schedulers.scheduling_consistency import ConsistencyScheduler


WITHOUT_PROMPT = ("ConsistencyImagesPipeline", "ConsistencyModelPipeline")


class ConsistencyLoaderMixin(CarriedSchedulerMixin, SingleFileMixin, LoraLoaderMixin):
    """`from_pretrained`, `from_pipe`, `save_pretrained` and LoRAs of the consistency pipelines.

    The record of a student is part of the pipeline's config, so it survives whatever the config survives. The
    scheduler is a `ConsistencyScheduler` made from the checkpoint's own if that is for few steps, else from the record;
    one that the caller passed or set is never replaced.
    """

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
        student that takes no prompts, and for a student of a flow-matching teacher with the stock pipeline of its family,
        see `FlowStudentMixin`.

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
        if not is_pipeline(source, of_hub(kwargs), record is not None):
            return cls._from_lora(source, record, kwargs)
        index = _index(source, kwargs)
        if (kind := index.get("_class_name")) in WITHOUT_PROMPT:
            if cls.__name__ != "ConsistencyPipeline":
                raise UserError(f"{str(source)!r} is a {kind}, without prompts; load it with ConsistencyPipeline.")
            return ConsistencyImagesPipeline.from_pretrained(source, **kwargs)
        if stock := cls._stock_of_flow(repr(str(source)), index):
            return student_class(stock).from_pretrained(source, **kwargs)
        check_index(cls, source, index, kwargs)
        pipe = super().from_pretrained(source, **kwargs)
        if record is not None:
            pipe._take_record(source, record, kwargs)
        if kwargs.get("scheduler") is None:
            pipe._adopt_scheduler(own=True)
        return pipe

    @classmethod
    def _stock_of_flow(cls, what: str, index: Mapping[str, Any]) -> type[DiffusionPipeline] | None:
        """The class of the stock pipeline of a flow's family; None for others."""
        stock = stock_class_of(index)
        if stock and cls.__name__ != "ConsistencyPipeline":
            raise UserError(
                f"{what} is a {stock.__name__}; give it to ConsistencyPipeline, and for image to image give what that "
                "answers to AutoPipelineForImage2Image.from_pipe."
            )
        return stock

    @classmethod
    def _from_lora(cls, source: Source, record: Record | None, kwargs: dict[str, Any]) -> Self:
        if record is None:
            refuse_part(source, of_hub(kwargs))
            raise UserError(
                f"{str(source)!r} has neither a model_index.json nor the record of a LoRA; for a LoRA without record, "
                "load its base model and call load_lora_weights."
            )
        hub = of_hub(kwargs)
        try:
            base = base_model_of(record, source)
            kwargs = for_base(base, kwargs)
            if not is_pipeline(base, of_hub(kwargs), read_record(base, **of_hub(kwargs)) is not None):
                raise UserError("that is a LoRA as well")
            pipe = cls.from_pretrained(base, **kwargs)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"The LoRA {str(source)!r} belongs on {record.base_model!r}, which cannot be loaded ({reason}); load "
                "that base model from where it is and call load_lora_weights."
            ) from error
        pipe.load_lora_weights(source, use_safetensors=True, **hub)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """The same components in this class; unlike in diffusers, none is cast unless `dtype` says so.

        `ConsistencyPipeline` answers as `from_pretrained` does to the stock pipeline of a flow's family.

        Args:
            pipeline: Stock or ours.
            kwargs: Components or options to replace, and `dtype`.

        Raises:
            ValueError: It is of a flow's family and this class is not `ConsistencyPipeline`, or its record does not fit.
        """
        if stock := cls._stock_of_flow("The pipeline", {**pipeline.config, "_class_name": type(pipeline).__name__}):
            return student_class(stock).from_pipe(pipeline, **kwargs)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        pipe = cls(**parts_of(cls, pipeline) | kwargs)
        if name := pipeline.config.get("_name_or_path"):
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
            self.record = record = read_record(source, local_files_only=True)
            if record and "unet" not in given:
                self.training = read_training(source, local_files_only=True)
        if "scheduler" not in given and not isinstance(self.scheduler, ConsistencyScheduler):
            self._adopt_scheduler()

    def _adopt_scheduler(self, own: bool = False) -> None:
        """The scheduler of the record, or else of the checkpoint, as one of ours.

        Args:
            own: Whether one for few steps is the student's own, whose settings may have been changed since its training.
        """
        name, config = type(self.scheduler).__name__, self.scheduler.config
        if self.record is not None and not (own and name in (*FEW_STEP_SCHEDULERS, *IN_SIGMA)):
            name, config = self.record.scheduler.get("_class_name", "LCMScheduler"), self.record.scheduler
        if name in IN_SIGMA:
            self.scheduler = IN_SIGMA[name].from_config(config)
            self.scheduler._adopted_from = type(self.scheduler).__name__  # goes with the LoRA that it came with
        else:
            self.scheduler = consistency_scheduler(name, config)


def _index(source: Source, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The content of model_index.json; empty where there is none to be read."""
    try:
        return DiffusionPipeline.load_config(source, **of_hub(kwargs))
    except (OSError, ValueError):
        return {}
