"""Images without prompts from students that know noise levels, as they were trained, without installing cm_diffusers.

A single file for `custom_pipeline`. It needs diffusers alone and serves the consistency models that cm_diffusers makes
without prompts, of pixels and latents, with classes or without, and published folders of `ConsistencyModelPipeline`. Put
it beside the weights as `pipeline.py`, or name it:

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "runs/ect/pipeline", custom_pipeline="pipelines/consistency_images.py", trust_remote_code=True
    )
    image = pipe().images[0]  # at the noise levels that the student recommends
    image = pipe(class_labels=3, sigmas=[80.0, 0.821]).images[0]

What the stock pipeline lacks: it reads neither `cm_diffusers.json` nor what the scheduler's config says of boundary,
network and noise levels, and knows no latents. Images are those of `ConsistencyImagesPipeline`.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    SCMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from cm_diffusers.models.classes import classes_of
from cm_diffusers.models.double_norm import double_normed
from cm_diffusers.pipelines.latents import decode, dtype_of
from cm_diffusers.pipelines.manners import IN_SIGMA
from cm_diffusers.pipelines.pipeline_consistency_images import _drawn

from .shared.record import read_record


@dataclass
class PortableImagesOutput(ImagePipelineOutput):
    """Images, and the classes `(B,)` they show; None for a network without classes."""

    class_labels: Tensor | None = None


class PortableImagesPipeline(DiffusionPipeline):
    """Samples a student without prompts by what its folder says.

    Args:
        unet: A `UNet2DConditionModel` must not read text.
        scheduler: Carries the fields that `EDMConsistencyScheduler` or `TrigFlowConsistencyScheduler` samples by.
        vae: For a student of latents.
        latents_mean, latents_std, sigma_data: The student's latents are (latents - mean) / std * sigma_data, of latents as
            Stable Diffusion scales them; None for those as they are.
        record: `cm_diffusers.json`, read where the folder is if None.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    is_xl = True  # for `decode`: the VAE may be one that overflows in half precision

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: CMStochasticIterativeScheduler | SCMScheduler,
        vae: AutoencoderKL | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        sigma_data: float = 0.5,
        record: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=double_normed(unet), scheduler=scheduler, vae=vae)
        statistics = {"latents_mean": latents_mean, "latents_std": latents_std, "sigma_data": sigma_data}
        self.register_to_config(**statistics, record=record)
        self.image_processor = VaeImageProcessor()

    @property
    def record(self) -> dict[str, Any]:
        """How the student was made; {} where nothing tells."""
        return self.config.record or read_record(self.config.get("_name_or_path") or "")

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
    ) -> PortableImagesOutput | tuple:
        """Images.

        Args:
            batch_size: Number of images; by default as many as there are labels, latents or generators, else 1.
            class_labels: One for all images or one for each; drawn by the generators if None.
            num_inference_steps, timesteps, sigmas: How many noise levels, which places on the training grid (or times of
                TrigFlow), or these, descending; by default what the student recommends.
            generator: Draws noise, then labels, then the noise of each step; one for each image makes it independent of
                its batch.
            latents: Noise (B, C, H, W) of variance 1 to start from.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), both in [0, 1], or "latent".
            return_dict: False for a tuple.

        Raises:
            ValueError: The request is malformed, or the student cannot fulfil it.
        """
        wanted = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        batch = _batch(batch_size=batch_size, class_labels=wanted, latents=latents, generator=generator)
        size = self.unet.config.sample_size
        shape = (batch, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}.")
        labels = self._labels(wanted, batch)
        device, dtype = self._execution_device, dtype_of(self.unet)
        scheduler = IN_SIGMA[type(self.scheduler).__name__].from_config(self.scheduler.config)
        if num_inference_steps is None and timesteps is None and sigmas is None:
            if scheduler.config.recommended_sigmas is None:
                num_inference_steps = self.record.get("recommended_num_inference_steps", 1)
        scheduler.set_timesteps(num_inference_steps, device, timesteps, sigmas)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if labels is None and (known := classes_of(self.unet)) is not None:
            labels = _drawn(known, batch, generator)
        labels = None if labels is None else labels.to(device)
        x = latents.to(device, dtype) * scheduler.init_noise_sigma
        told = {"encoder_hidden_states": None} if isinstance(self.unet, UNet2DConditionModel) else {}
        for t in self.progress_bar(scheduler.timesteps):
            shown = scheduler.scale_model_input(x, t)
            if getattr(self.unet, "is_told_target", False):
                told["target_timestep"] = scheduler.target_timestep(t)
            output = self.unet(shown, t, **told, class_labels=labels, return_dict=False)[0]
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        images = self._output(x, output_type)
        self.maybe_free_model_hooks()
        return PortableImagesOutput(images, labels) if return_dict else PortableImagesOutput(images, labels).to_tuple()

    def _output(self, latents: Tensor, output_type: str) -> Any:
        if self.config.latents_std is not None:
            mean, std = (
                torch.tensor(self.config[name]).view(1, -1, 1, 1).to(latents)
                for name in ("latents_mean", "latents_std")
            )
            latents = latents * std / self.config.sigma_data + mean
        if output_type == "latent":
            return latents
        images = latents if self.vae is None else decode(self, latents)
        return self.image_processor.postprocess(images, output_type=output_type)

    def _labels(self, labels: int | list[int] | None, batch: int) -> Tensor | None:
        """The labels `(B,)` that were given."""
        classes = self.unet.config.num_class_embeds
        if labels is None:
            return None
        if classes is None:
            raise ValueError("This student knows no classes; leave class_labels out.")
        values = labels if isinstance(labels, list) else [labels] * batch
        if not all(isinstance(value, Integral) and 0 <= value < classes for value in values):
            raise ValueError(f"class_labels must be whole numbers from 0 to {classes - 1}, got {labels!r}.")
        return torch.tensor(values)


def _batch(**given: Any) -> int:
    """How many images are asked for: the number, or the length of everything that is given for each."""
    counts = {name: len(value) for name, value in given.items() if isinstance(value, list | Tensor)}
    if (size := given["batch_size"]) is not None:
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {size!r}.")
        counts["batch_size"] = size
    if len(set(counts.values())) > 1:
        raise ValueError(f"batch_size, class_labels, latents and generator must be equally many, got {counts}.")
    return next(iter(counts.values()), 1)
