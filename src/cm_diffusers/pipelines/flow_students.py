"""Students of flow-matching teachers: the stock pipelines of their families, with the manners of a student."""

import inspect
import warnings
from collections.abc import Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any, Self

import diffusers
from diffusers import DiffusionPipeline
from torch import Tensor

from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import FAMILIES, in_steps
from cm_diffusers.models.stored import absent_parts
from cm_diffusers.pipelines.lora import Source, check_weights, folder_of, free_name, layers_of, put_on, read_exact
from cm_diffusers.pipelines.lora_roles import Told, acting, activate, active, why_off
from cm_diffusers.pipelines.manners import Manners, contradiction, mismatches
from cm_diffusers.pipelines.recorded import RecordedMixin, of_hub, read_training
from cm_diffusers.pipelines.stock import PRIVATE_RECORD, CarriedSchedulerMixin, parts_of
from cm_diffusers.record import is_of_flow, read_record
from cm_diffusers.schedulers.scheduling_flow_consistency import FlowConsistencyScheduler


class FlowStudentMixin(CarriedSchedulerMixin, RecordedMixin):
    """Before a stock pipeline: what the record says is what a call leaves out, and what it asks for is checked.

    `ConsistencyPipeline.from_pretrained` makes such pipelines; `AutoPipelineForImage2Image.from_pipe` and the like go on
    from them. A pipeline without a record, as of a base model, is in all but its LoRAs the stock one.
    """

    _network, _record = "transformer", PRIVATE_RECORD
    _stock: type[DiffusionPipeline]
    _before_lora: tuple[str, Told] | None = None  # a student's LoRA, and what was known before it

    @property
    def manners(self) -> Manners | None:
        """What may be asked of the student, and what it is sampled with by default; None where no record tells."""
        return self.record and Manners.of(self.record, self.student)

    def stock_class(self) -> type[DiffusionPipeline]:
        return self._stock

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """As in diffusers, with the record, and the scheduler of the training where the folder names a stock one.

        Raises:
            ValueError: As `RecordedMixin`, or the record does not fit the network.
        """
        kwargs.setdefault("use_safetensors", True)
        absent = absent_parts(cls.load_config(pretrained_model_name_or_path, **of_hub(kwargs)))
        pipe = super().from_pretrained(pretrained_model_name_or_path, **absent | kwargs)
        if record := read_record(pretrained_model_name_or_path, **of_hub(kwargs)):
            pipe._take_record(pretrained_model_name_or_path, record, kwargs)
        if kwargs.get("scheduler") is None and not isinstance(pipe.scheduler, FlowConsistencyScheduler):
            pipe._adopt_scheduler()
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """The same components, with what `from_pretrained` finds beside the weights; none is cast unless `dtype` says so.

        Args:
            pipeline: Stock or ours.
            kwargs: Components or options to replace, and `dtype`.

        Raises:
            ValueError: The record does not fit the network.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        pipe, config = cls(**parts_of(cls, pipeline) | kwargs), pipeline.config
        pipe.register_to_config(**{name: config[name] for name in ("_name_or_path", cls._record) if name in config})
        pipe._merged_adapters = set(getattr(pipeline, "fused_loras", ()))
        pipe._before_lora = getattr(pipeline, "_before_lora", None)
        source = config.get("_name_or_path")
        if pipe.record is None and source and (record := read_record(source, local_files_only=True)):
            pipe._take_record(source, record, kwargs | {"local_files_only": True})
        if "scheduler" not in kwargs and not isinstance(pipe.scheduler, FlowConsistencyScheduler):
            pipe._adopt_scheduler()
        return pipe if dtype is None else pipe.to(dtype=dtype)

    def _adopt_scheduler(self) -> None:
        if self.record is not None and is_of_flow(self.record):
            self.scheduler = FlowConsistencyScheduler.from_config(self.record.scheduler)

    def check_saveable(self) -> None:
        if self._network in self.get_list_adapters():
            raise UserError(
                "A LoRA is on the network, which the folder of a pipeline cannot hold; call fuse_lora() and then "
                "unload_lora_weights(), or save it alone with save_lora_weights()."
            )

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Source | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in diffusers. A LoRA of this package is taken by its exact form, with its scheduler and recommendations.

        The student's LoRA stays active when another is loaded, and joins those that are active when it is.

        Raises:
            ValueError: It is not there, or was made for another architecture.
        """
        source = pretrained_model_name_or_path_or_dict
        kwargs.setdefault("use_safetensors", True)
        hub, subfolder, exact = of_hub(kwargs), kwargs.get("subfolder"), None
        folder = None if isinstance(source, dict) else folder_of(source, subfolder)
        if folder is not None:
            check_weights(source, kwargs)
            exact = None if kwargs.get("weight_name") else read_exact(source, subfolder, self._network, **hub)
        name = adapter_name or free_name(self)
        student, before = self._lora_of_student, active(self.student)
        if exact is None:
            super().load_lora_weights(source, adapter_name=name, hotswap=hotswap, **kwargs)
        else:
            put_on(self, layers_of(self, exact), name, kwargs.get("low_cpu_mem_usage", True), hotswap)
        if record := folder and read_record(folder, **hub):
            self._take_up(name, Told(record, read_training(folder, **hub), None))
        stay = before - {student} if self._lora_of_student == name else before & {student}
        if stay and not hotswap:
            activate(self.student, [*sorted(stay), name])

    @property
    def _lora_of_student(self) -> str | None:
        return self._before_lora and self._before_lora[0]

    def _take_up(self, name: str, told: Told) -> None:
        """Follows a student's LoRA."""
        if reason := contradiction(told.record, self.student):
            warnings.warn(f"{reason}; its scheduler and recommendations are not taken over.", stacklevel=3)
            return
        before = self._before_lora[1] if self._before_lora else Told(self.record, self.training, self.scheduler)
        self._before_lora = name, before
        self._tell(told)
        self._adopt_scheduler()

    def _tell(self, told: Told) -> None:
        self.record = told.record
        self.training = told.training
        self.scheduler = told.scheduler or self.scheduler

    def unload_lora_weights(self) -> None:
        """As in diffusers; what is known is again what was before the student's LoRA, unless that was fused."""
        super().unload_lora_weights()
        self._after_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As in diffusers, and as `unload_lora_weights`."""
        super().delete_adapters(adapter_names)
        self._after_lora()

    def _after_lora(self) -> None:
        if self._before_lora is None:
            return
        name, before = self._before_lora
        if name not in {*getattr(self.student, "peft_config", {}), *self.fused_loras}:
            self._before_lora = None
            self._tell(before)

    def _run(self, asked: Mapping[str, Any]) -> Any:
        return self._stock.__call__(self, **self._asked(asked))

    def _asked(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call with what the record recommends in the place of those left out.

        Raises:
            ValueError: The student cannot fulfil it.
        """
        manners, given = self.manners, {name: value for name, value in asked.items() if value is not None}
        if manners is None:
            return dict(asked)
        times = given.get("sigmas", given.get("timesteps"))
        steps = manners.num_inference_steps if times is None else len(times)
        guided = manners.guided
        name, none = next(iter(guided(1.0).items()))
        scale = given[name] - none + 1 if name in given else manners.guidance_scale  # in the convention of records
        told = given.get("num_inference_steps") if times is None else steps
        manners.check_way(told, not {"image", "strength"} & given.keys())
        self._check(manners, scale, name, given)
        return dict(asked) | {**in_steps(self, steps), **guided(scale), **self._size(given), **given}

    def _size(self, given: Mapping[str, Any]) -> dict[str, int]:
        """That of training, where it is known and the call says nothing of it."""
        known, side = inspect.signature(self._stock.__call__).parameters, self.record.resolution
        size = {"height": side, "width": side, "num_frames": self.record.num_frames}
        if {*size, "latents"} & given.keys():
            return {}
        return {name: value for name, value in size.items() if value is not None and name in known}

    def _check(self, manners: Manners, scale: float, name: str, given: Mapping[str, Any]) -> None:
        negative = any(key.startswith("negative_") and not _is_empty(value) for key, value in given.items())
        if negative and scale <= 1 and manners.guidance == "distilled":
            shown = manners.guided(scale)[name]
            raise UserError(
                f"At {name} {shown:g} there is no guidance, so a negative prompt has no branch to act in; leave it out, or "
                f"give a {name} a little higher."
            )
        manners.check(scale, negative)
        if found := mismatches(self.scheduler, self.record):
            warnings.warn(f"The scheduler does not fit this student: {'; '.join(found)}.", stacklevel=5)
        lora = self._lora_of_student
        if lora and lora not in acting(self.student) | set(self.fused_loras):
            warnings.warn(
                "The LoRA that makes this model a student does not act, so the model underneath is sampled, undistilled: "
                f"{why_off(self.student, lora, 1.0)}.",
                stacklevel=5,
            )


def _is_empty(prompt: object) -> bool:
    return isinstance(prompt, str) and not prompt


def stock_class_of(index: Mapping[str, Any]) -> type[DiffusionPipeline] | None:
    """The stock class of a pipeline whose network is of a family with a transformer.

    Args:
        index: The content of model_index.json; empty where it cannot be read.
    """
    network = (index.get(FlowStudentMixin._network) or [None, None])[1]
    kind = getattr(diffusers, index["_class_name"], None) if network in FAMILIES else None
    return kind if isinstance(kind, type) and issubclass(kind, DiffusionPipeline) else None


@cache
def student_class(stock: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """The stock class with our manners, under its name: by that diffusers finds the classes for other tasks."""
    signature = inspect.signature(stock.__call__)

    @wraps(stock.__call__)
    def call(self: FlowStudentMixin, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        return self._run({name: value for name, value in bound.arguments.items() if name != "self"})

    own = {"_stock": stock, "__call__": call, "__doc__": stock.__doc__, "__module__": __name__}
    return type(stock.__name__, (FlowStudentMixin, stock), own)
