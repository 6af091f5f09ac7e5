"""Loading video students: pipelines, image models with a motion adapter, and motion adapters with their LoRA."""

import warnings
from typing import Any, Self

from diffusers import DiffusionPipeline, MotionAdapter, UNetMotionModel

from cm_diffusers.errors import UserError
from cm_diffusers.models.motion import ANIMATEDIFF_BETAS, adapter_at_root
from cm_diffusers.pipelines.layouts import for_base, is_pipeline, refuse_part
from cm_diffusers.pipelines.loading import ConsistencyLoaderMixin
from cm_diffusers.pipelines.lora import Source
from cm_diffusers.pipelines.manners import consistency_scheduler
from cm_diffusers.pipelines.recorded import of_hub
from cm_diffusers.record import Record, base_model_of, read_record


class VideoLoaderMixin(ConsistencyLoaderMixin):
    """`from_pretrained` of the consistency pipeline of clips; the rest as for images."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Source,
        base_model: Source | None = None,
        weight_name: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A few-step video student, from a folder or the Hub.

        That is: a pipeline of AnimateDiff's shape; one of Stable Diffusion's, with `motion_adapter=...`; or a student
        whose motion adapter is at the root of its folder with a LoRA beside it: of this package, or in the layout of
        "wangfuyun/AnimateLCM", for which::

            ConsistencyVideoPipeline.from_pretrained(
                "wangfuyun/AnimateLCM", base_model="emilianJR/epiCRealism", weight_name="AnimateLCM_sd15_t2v_lora.safetensors"
            )

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            base_model: Image model that the motion adapter and the LoRA are put on; by default that of the record.
            weight_name: File of the LoRA; by default, with a record, that of this package.
            kwargs: As for `DiffusionPipeline.from_pretrained`. A `motion_adapter` also replaces that of a pipeline. A
                `scheduler` is kept; otherwise it is made from the record, else has the betas of the pipeline, or, for
                a motion adapter and LoRA without record, AnimateDiff's.

        Raises:
            ValueError: Neither a pipeline nor a motion adapter is there, nothing says what it belongs on, or parts do
                not fit each other.
        """
        source = pretrained_model_name_or_path
        record = read_record(source, **of_hub(kwargs))
        if base_model is None and weight_name is None:
            if kwargs.get("motion_adapter") is not None or is_pipeline(source, of_hub(kwargs), record is not None):
                pipe = cls._from_pipeline(source, kwargs)
                if kwargs.get("scheduler") is None:
                    pipe._warn_of_betas()
                return pipe
        return cls._from_motion(source, record, base_model, weight_name, kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """As for images; a `motion_adapter` makes clips of an image pipeline."""
        pipe = super().from_pipe(pipeline, **kwargs)
        if "scheduler" not in kwargs:
            pipe._warn_of_betas()
        return pipe

    def _warn_of_betas(self) -> None:
        """Of a motion adapter on an image model, whose noise schedule is not the one that AnimateDiff's were trained on."""
        found = {name: self.scheduler.config.get(name) for name in ANIMATEDIFF_BETAS}
        if self._inflated and self.record is None and found != ANIMATEDIFF_BETAS:
            warnings.warn(
                f"Nothing says which noise schedule the motion adapter was trained on, so the image model's is taken "
                f"(beta_schedule {found['beta_schedule']!r}), but AnimateDiff's is linear; set pipe.scheduler = "
                'ConsistencyScheduler.from_config(pipe.scheduler.config, beta_schedule="linear"), or give the scheduler it '
                "belongs to.",
                stacklevel=3,
            )

    @classmethod
    def _from_pipeline(cls, source: Source, kwargs: dict[str, Any]) -> Self:
        pipe = super().from_pretrained(source, **kwargs)
        if kwargs.get("motion_adapter") is not None:
            _put_on(pipe.unet, pipe.motion_adapter)
        return pipe

    @classmethod
    def _from_motion(
        cls,
        source: Source,
        record: Record | None,
        base_model: Source | None,
        weight_name: str | None,
        kwargs: dict[str, Any],
    ) -> Self:
        if record is None and (base_model is None or weight_name is None):
            if base_model is None and weight_name is None:
                refuse_part(source, of_hub(kwargs))
            raise UserError(
                f"{str(source)!r} has neither a model_index.json nor the record of a student; for a motion adapter with "
                "its LoRA, give base_model and weight_name."
            )
        hub = of_hub(kwargs)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        stored = {name: kwargs[name] for name in ("variant", "use_safetensors") if name in kwargs}
        adapter = adapter_at_root(source, dtype, hub, **stored)
        base = base_model or base_model_of(record, source)
        pipe = cls._on_base(source, base, for_base(base, kwargs) | {"motion_adapter": adapter})
        pipe.load_lora_weights(source, weight_name=weight_name, use_safetensors=True, **hub)
        if record is None and kwargs.get("scheduler") is None:
            pipe.scheduler = consistency_scheduler("LCMScheduler", {**pipe.scheduler.config, **ANIMATEDIFF_BETAS})
        return pipe

    @classmethod
    def _on_base(cls, source: Source, base_model: Source, kwargs: dict[str, Any]) -> Self:
        try:
            return cls._from_pipeline(base_model, kwargs)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"The motion adapter {str(source)!r} belongs on {str(base_model)!r}, which cannot be used ({reason}); "
                "say where that base model is, or another one, with base_model."
            ) from error


def _put_on(unet: UNetMotionModel, adapter: MotionAdapter) -> None:
    """Gives a UNet that has motion modules already those of the adapter."""
    try:
        unet.load_motion_modules(adapter)
    except RuntimeError as error:
        raise UserError(f"The motion adapter does not fit the UNet: {str(error).splitlines()[-1].strip()}") from error
