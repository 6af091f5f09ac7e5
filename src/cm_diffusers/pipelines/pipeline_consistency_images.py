"""Images without a prompt in a few steps: unconditional and class-conditional consistency models."""

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DiffusionPipeline,
    SchedulerMixin,
    SCMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from cm_diffusers.errors import UserError
from cm_diffusers.models.classes import classes_of
from cm_diffusers.models.double_norm import double_normed
from cm_diffusers.models.two_times import TwoTimeUNet2DModel
from cm_diffusers.pipelines import checks
from cm_diffusers.pipelines.generation import Callback
from cm_diffusers.pipelines.latents import Generators, decode, dtype_of
from cm_diffusers.pipelines.manners import IN_SIGMA
from cm_diffusers.pipelines.recorded import RecordedMixin, of_hub, read_training
from cm_diffusers.pipelines.stock import CarriedSchedulerMixin, carried
from cm_diffusers.record import read_record
from cm_diffusers.schedulers.scheduling_edm_consistency import EDMConsistencyScheduler
from cm_diffusers.schedulers.stepping import ToldScheduler


STOCK = {"network": "edm", "noise_conditioning": "adm", "boundary_scalings": "cm", "gamma": 1.0}


@dataclass
class ConsistencyImagesPipelineOutput(ImagePipelineOutput):
    """Images, and the classes `(B,)` they show; None for a network without classes."""

    class_labels: Tensor | None = None


class ConsistencyImagesPipeline(CarriedSchedulerMixin, RecordedMixin, DiffusionPipeline):
    """Samples a student of `UNet2DModel`'s kind, in pixels or latents, with classes or without.

    It takes folders of this package and published ones of `ConsistencyModelPipeline`, whose images it makes, too::

        pipe = ConsistencyImagesPipeline.from_pretrained("openai/diffusers-cd_imagenet64_l2")
        image = pipe(class_labels=145, sigmas=[80.0, 0.821]).images[0]

    Args:
        unet: A `UNet2DConditionModel` must not read text.
        scheduler: Best an `EDMConsistencyScheduler` or a `TrigFlowConsistencyScheduler`, which `from_pretrained` makes.
        vae: For a student of latents.
        latents_mean, latents_std: Of every channel of the latents, as Stable Diffusion scales them; the student's are
            (latents - latents_mean) / latents_std * sigma_data. None for a student of the latents as they are.
        sigma_data: As in the scheduler.
        record: A `Record` as a dict.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "denoised", "class_labels"]
    is_xl = True  # for `decode`: the VAE may be one that overflows in half precision

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: ToldScheduler | CMStochasticIterativeScheduler | SCMScheduler,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        sigma_data: float = 0.5,
        record: dict | None = None,
    ) -> None:
        super().__init__()
        _check_parts(unet, scheduler)
        _check_statistics(latents_mean, latents_std, unet.config.in_channels)
        self.register_modules(unet=double_normed(unet), scheduler=scheduler, vae=vae)
        self.register_to_config(
            latents_mean=latents_mean, latents_std=latents_std, sigma_data=sigma_data, record=record
        )
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """A student from a folder or the Hub, with a scheduler of ours unless the caller gives one.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            kwargs: As for `DiffusionPipeline.from_pretrained`; weights other than safetensors are only read with
                `use_safetensors=None` or False.
        """
        kwargs.setdefault("use_safetensors", True)
        record = read_record(pretrained_model_name_or_path, **of_hub(kwargs))
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if record is not None:
            pipe.register_to_config(record=asdict(record))
            if kwargs.get("unet") is None:
                pipe.training = read_training(pretrained_model_name_or_path, **of_hub(kwargs))
        if kwargs.get("scheduler") is None and not isinstance(pipe.scheduler, ToldScheduler):
            pipe.scheduler = IN_SIGMA[type(pipe.scheduler).__name__].from_config(pipe.scheduler.config)
        return pipe

    def stock_class(self) -> type[DiffusionPipeline] | None:
        plain = self.vae is None and self.config.latents_std is None
        return ConsistencyModelPipeline if plain and is_stock(self.unet, self.scheduler) else None

    @property
    def num_classes(self) -> int | None:
        """How many classes the network knows, None if it takes none; one more, for any class, may stand after them."""
        return classes_of(self.unet)

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that is running, or was last."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' signature)
    ) -> ConsistencyImagesPipelineOutput | tuple:
        """Images.

        Args:
            batch_size: Number of images; by default as many as there are labels, latents or generators, else 1.
            class_labels: One for all images or one for each; drawn by the generators if None.
            num_inference_steps: By default what the student recommends, else 1.
            timesteps: Places on the training grid, descending, as in `ConsistencyModelPipeline`; of a
                `TrigFlowConsistencyScheduler`, times.
            sigmas: Noise levels, descending.
            generator: Draws noise, labels, the noise of each step; with one for each image, none depends on its batch.
            latents: Noise (B, C, H, W) of variance 1 to start from.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), both in [0, 1], or "latent": without the VAE's
                decoder, or around [-1, 1].
            return_dict: False for a tuple.
            callback_on_step_end: (pipe, step, timestep, tensors) -> tensors to replace, or None.
            callback_on_step_end_tensor_inputs: Which ones it is given; "denoised" is a preview of the result.

        Raises:
            ValueError: The request is malformed, or the student cannot fulfil it.
        """
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        checks.check_output(output_type, names, self._callback_tensor_inputs)
        self._check_sigma_data()
        wanted = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        batch = _batch(batch_size=batch_size, class_labels=wanted, latents=latents, generator=generator)
        shape = (batch, self.unet.config.in_channels, *self._size(latents))
        checks.check_generators(generator, batch)
        checks.check_latents(latents, shape)
        labels = self._checked_labels(wanted, batch)
        device, dtype = self._execution_device, dtype_of(self.unet)
        self._set_timesteps(device, num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if labels is None and self.num_classes is not None:
            labels = _drawn(self.num_classes, batch, generator)
        state = {
            "latents": latents.to(device, dtype) * self.scheduler.init_noise_sigma,
            "class_labels": None if labels is None else labels.to(device),
        }
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=self._num_timesteps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                output = self._predict(state["latents"], t, state["class_labels"])
                result = self.scheduler.step(output, t, state["latents"], generator=generator)
                state |= {"latents": result.prev_sample, "denoised": result.get("denoised")}
                if callback_on_step_end is not None:
                    state |= callback_on_step_end(self, i, t, {name: state[name] for name in names}) or {}
                bar.update()
        images = self._output(state["latents"], output_type)
        self.maybe_free_model_hooks()
        result = ConsistencyImagesPipelineOutput(images=images, class_labels=state["class_labels"])
        return result if return_dict else result.to_tuple()

    def _size(self, latents: Tensor | None) -> tuple[int, int]:
        """Height and width of the samples: those of training, or of given ones where the config does not say."""
        if not (size := self.unet.config.sample_size or (latents is not None and latents.shape[-2:])):
            raise UserError("The UNet's config does not say its sample_size; give latents, or write it there.")
        return (size, size) if isinstance(size, int) else tuple(size)

    def _predict(self, latents: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        shown = self.scheduler.scale_model_input(latents, t)
        told = {"encoder_hidden_states": None} if isinstance(self.unet, UNet2DConditionModel) else {}
        if getattr(self.unet, "is_told_target", False):
            told["target_timestep"] = self.scheduler.target_timestep(t)
        return self.unet(shown, t, **told, class_labels=labels, return_dict=False)[0]

    def _output(self, latents: Tensor, output_type: str) -> Any:
        if self.config.latents_std is not None:
            mean, std = (
                torch.tensor(self.config[name]).view(1, -1, 1, 1).to(latents)
                for name in ("latents_mean", "latents_std")
            )
            latents = latents * std / self.config.sigma_data + mean
        checks.check_finite(latents, "The sampled values")
        if output_type == "latent":
            return latents
        images = latents if self.vae is None else decode(self, latents)
        return self.image_processor.postprocess(images, output_type=output_type)

    def _set_timesteps(self, device: torch.device, **asked: Any) -> None:
        options = {name: value for name, value in asked.items() if value is not None}
        if not options and not self.scheduler.config.get("recommended_sigmas"):
            options = {"num_inference_steps": self.record.recommended_num_inference_steps if self.record else 1}
        if refused := set(options) - set(inspect.signature(self.scheduler.set_timesteps).parameters):
            kind = type(self.scheduler).__name__
            raise UserError(f"{kind} takes no {', '.join(refused)}; use EDMConsistencyScheduler.")
        self.scheduler.set_timesteps(**options, device=device)

    def _check_sigma_data(self) -> None:
        ours, theirs = self.config.sigma_data, self.scheduler.config.sigma_data
        if self.config.latents_std is not None and ours != theirs:
            raise UserError(
                f"The student's latents have sigma_data {ours}, its scheduler {theirs}; load the scheduler anew."
            )

    def _checked_labels(self, labels: int | list[int] | None, batch: int) -> Tensor | None:
        """The labels `(B,)` that were given."""
        if labels is None:
            return None
        if self.num_classes is None:
            raise UserError("This student knows no classes; leave class_labels out.")
        values = labels if isinstance(labels, list) else [labels] * batch
        last = self.unet.config.num_class_embeds - 1
        if not all(isinstance(value, Integral) and 0 <= value <= last for value in values):
            raise UserError(f"class_labels must be whole numbers from 0 to {last}, one or a list; got {labels!r}.")
        return torch.tensor(values)


def is_stock(unet: UNet2DModel | UNet2DConditionModel, scheduler: SchedulerMixin) -> bool:
    """Whether the stock pipeline samples a network of pixels right."""
    if not isinstance(scheduler, EDMConsistencyScheduler | CMStochasticIterativeScheduler):
        return False
    plain = isinstance(unet.config.sample_size, int) and not unet.config.get("double_norm")
    carried = {name: value for name, value in STOCK.items() if name in scheduler.config}
    return type(unet) is UNet2DModel and plain and carried.items() <= scheduler.config.items()


def _check_parts(unet: UNet2DModel | UNet2DConditionModel, scheduler: SchedulerMixin) -> None:
    if not (isinstance(scheduler, CMStochasticIterativeScheduler) or scheduler.config.get("network")):
        raise UserError(
            f"{type(scheduler).__name__} does not sample consistency models without prompts; give an "
            "EDMConsistencyScheduler, a TrigFlowConsistencyScheduler with its network, or a CMStochasticIterativeScheduler."
        )
    if isinstance(unet, TwoTimeUNet2DModel) and not hasattr(carried(scheduler), "target_timestep"):
        raise UserError("This network is told where its jump ends; give an EDMConsistencyScheduler, which says so.")
    blocks = (*unet.config.down_block_types, *unet.config.up_block_types, unet.config.get("mid_block_type"))
    if isinstance(unet, UNet2DConditionModel) and any("CrossAttn" in block for block in blocks if block):
        raise UserError("This UNet2DConditionModel reads text; sample it with ConsistencyPipeline.")


def _check_statistics(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> None:
    given = [numbers for numbers in (mean, std) if numbers is not None]
    if given and (len(given) < 2 or {len(mean), len(std)} != {channels} or min(std) <= 0):
        raise UserError(
            f"latents_mean and latents_std must both hold a number for each of the {channels} channels, latents_std "
            f"positive ones; got {mean} and {std}."
        )


def _batch(**given: object) -> int:
    """How many images are asked for: the number, or the length of everything that is given for each."""
    counts = {name: len(value) for name, value in given.items() if isinstance(value, list | Tensor)}
    if given["batch_size"] is not None:
        checks.check_whole(1, batch_size=given["batch_size"])
        counts["batch_size"] = given["batch_size"]
    if len(set(counts.values())) > 1:
        raise UserError(f"batch_size, class_labels, latents and generator must be equally many, got {counts}.")
    return next(iter(counts.values()), 1)


def _drawn(classes: int, batch: int, generator: Generators) -> Tensor:
    """Labels `(B,)`, each by its generator if there is a list."""
    if isinstance(generator, list):
        return torch.cat([_drawn(classes, 1, one) for one in generator])
    device = "cpu" if generator is None else generator.device
    return torch.randint(classes, (batch,), generator=generator, device=device).cpu()
