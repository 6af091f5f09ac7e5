"""Where sampling starts and what binds it: noise, an image, or an image with a mask."""

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from cm_diffusers.errors import UserError
from cm_diffusers.pipelines.checks import check_channels, check_size, check_strength, image_size
from cm_diffusers.pipelines.latents import Generators, encode
from cm_diffusers.pipelines.pictures import check_values, readable, readable_mask
from cm_diffusers.record import Record


class FromNoise:
    """Text to image."""

    strength = 1.0

    def check(self, pipe: DiffusionPipeline) -> None:
        advice = "use ConsistencyInpaintPipeline for an inpainting UNet"
        check_channels(pipe, (pipe.vae.config.latent_channels,), advice)

    def size(self, pipe: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the result in pixels; by default those of the student's training, or the UNet's.

        Raises:
            ValueError: They are no multiples of `vae_scale_factor`, or missing where nothing says a size.
        """
        size = sided((height, width), native_size(pipe.unet, pipe.vae_scale_factor, pipe.record) or (None, None))
        if None in size:
            raise UserError(
                "The UNet's config does not say the size it was trained with (sample_size); give height and width."
            )
        check_size(*size, pipe.vae_scale_factor)
        return size

    def latents(
        self,
        pipe: DiffusionPipeline,
        template: Tensor,
        given: Tensor | None,
        generator: Generators,
        timesteps: Tensor,
    ) -> Tensor:
        """The latents at the first timestep.

        Args:
            pipe: The pipeline.
            template: An empty tensor with their shape (B, C, h, w), device and dtype.
            given: The caller's.
            generator: Draws the noise.
            timesteps: The schedule.
        """
        noise = draw(template, generator) if given is None else given.to(template)
        return noise * pipe.scheduler.init_noise_sigma

    def unet_input(self, latents: Tensor) -> Tensor:
        return latents

    def bind(self, pipe: DiffusionPipeline, latents: Tensor, step: int) -> Tensor:
        """The latents after a step, held to what must not change."""
        return latents


def native_size(unet: ModelMixin, factor: int, record: Record | None) -> tuple[int, int] | None:
    """Height and width in pixels that a network was trained at: by its record, or else by its config; None if neither says.

    Args:
        factor: By which the VAE makes images smaller.
    """
    if record is not None and record.resolution:
        return record.resolution, record.resolution
    sample = unet.config.get("sample_size")
    height, width = sample if isinstance(sample, list | tuple) else (sample, sample)
    return None if sample is None else (height * factor, width * factor)


class FromImage(FromNoise):
    """Image to image: the schedule begins at the share `strength` of the training grid."""

    def __init__(self, image: PipelineImageInput, strength: float) -> None:
        check_strength(strength)
        self.image, self.strength = readable(image), strength

    def check(self, pipe: DiffusionPipeline) -> None:
        super().check(pipe)
        check_values(self.image, pipe.vae.config.latent_channels)

    def size(self, pipe: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int]:
        """By default the image's size, rounded down to what the VAE can take.

        Raises:
            ValueError: A tensor would be latents of an image that much larger than in training: it must be pixels.
        """
        factor, channels = pipe.vae_scale_factor, pipe.vae.config.latent_channels
        raw, own = image_size(self.image, factor, -1), image_size(self.image, factor, channels)
        trained = native_size(pipe.unet, factor, pipe.record)
        if raw != own and None in (height, width) and trained and min(raw) >= min(trained):
            raise UserError(
                f"An image of {channels} channels is read as latents, here of {own[0]} x {own[1]} pixels; give 3 channels if "
                "these are pixels, or height and width if they are latents."
            )
        size = sided((height, width), (side - side % factor for side in own))
        check_size(*size, factor)
        return size

    def latents(
        self,
        pipe: DiffusionPipeline,
        template: Tensor,
        given: Tensor | None,
        generator: Generators,
        timesteps: Tensor,
    ) -> Tensor:
        if given is not None:
            return given.to(template)
        clean = self.encoded(pipe, self.pixels(pipe, template), template, generator)
        return pipe.scheduler.add_noise(clean, draw(template, generator), timesteps[:1])

    def pixels(self, pipe: DiffusionPipeline, template: Tensor) -> Tensor:
        """The images (N, 3, H, W) in [-1, 1], or latents (N, C, h, w)."""
        pixels = preprocess(pipe.image_processor, self.image, template, pipe.vae_scale_factor)
        if pixels.shape[1] != 3 and pixels.shape[1:] != template.shape[1:]:
            found, latents = tuple(pixels.shape[1:]), tuple(template.shape[1:])
            raise UserError(f"An image must have 3 channels, or be latents of the shape {latents}; got {found}.")
        return pixels

    @staticmethod
    def encoded(pipe: DiffusionPipeline, pixels: Tensor, template: Tensor, generator: Generators) -> Tensor:
        """Their latents (B, C, h, w), repeated for several images per prompt."""
        if isinstance(generator, list):  # each image draws from its own
            pixels = repeated(pixels, len(template))
        return repeated(encode(pipe, pixels, generator), len(template)).to(template)


class FromMaskedImage(FromImage):
    """Inpainting: where the mask is black, the image stays.

    A UNet with the VAE's channels has the image put back after every step, noised like the sample and in the end
    exactly; an inpainting UNet gets mask and masked image as further channels.
    """

    def __init__(self, image: PipelineImageInput, mask: PipelineImageInput, strength: float) -> None:
        super().__init__(image, strength)
        mask = readable_mask(mask)
        array = isinstance(mask, np.ndarray | Tensor) and mask.ndim == 2
        self.mask_image = mask[None] if array else mask

    def check(self, pipe: DiffusionPipeline) -> None:
        channels, factor = pipe.vae.config.latent_channels, pipe.vae_scale_factor
        check_channels(pipe, (channels, 2 * channels + 1), "take the UNet of a text-to-image or an inpainting model")
        check_values(self.image, channels)
        image, mask = image_size(self.image, factor, channels), image_size(self.mask_image, factor, -1)
        if tuple(image) != tuple(mask):
            raise UserError(
                f"The mask is {mask[0]} x {mask[1]}, the image {image[0]} x {image[1]}; make them one size."
            )

    def latents(
        self,
        pipe: DiffusionPipeline,
        template: Tensor,
        given: Tensor | None,
        generator: Generators,
        timesteps: Tensor,
    ) -> Tensor:
        """As for text to image at strength 1; `given` is noise here."""
        pixels, mask = self.pixels(pipe, template), self._mask(pipe, template)
        blends = pipe.unet.config.in_channels == template.shape[1]
        clean = self.encoded(pipe, pixels, template, generator) if blends or self.strength < 1 else None
        noise = draw(template, generator) if given is None else given.to(template)
        small = torch.nn.functional.interpolate(mask, template.shape[2:])
        self._warn_lost(pipe, small, template)
        self.mask = repeated(small, len(template)).to(template)
        self.known, self.noise, self.timesteps = (clean if blends else None), noise, timesteps
        self.extra = [] if blends else [self.mask, self._masked(pipe, pixels, mask, template, generator)]
        if self.strength == 1:
            return noise * pipe.scheduler.init_noise_sigma
        return pipe.scheduler.add_noise(clean, noise, timesteps[:1])

    def _mask(self, pipe: DiffusionPipeline, template: Tensor) -> Tensor:
        """(N, 1, H, W), 1 where the image is to change."""
        return preprocess(pipe.mask_processor, self.mask_image, template, pipe.vae_scale_factor)

    def _warn_lost(self, pipe: DiffusionPipeline, small: Tensor, template: Tensor) -> None:
        """A mask that is not black, but changes no latent pixel, is told."""
        grey = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor, do_normalize=False)
        brightest = preprocess(grey, self.mask_image, template, pipe.vae_scale_factor).amax((1, 2, 3))
        lost = (brightest > 0) & (small.amax((1, 2, 3)) == 0)
        if lost.any():
            warnings.warn(
                f"A mask changes nothing, though it is not black: its brightest place is {float(brightest[lost][0]):.2g} "
                f"where white begins at 0.5, or its white places are smaller than {pipe.vae_scale_factor} pixels.",
                stacklevel=2,
            )

    def _masked(
        self, pipe: DiffusionPipeline, pixels: Tensor, mask: Tensor, template: Tensor, generator: Generators
    ) -> Tensor:
        if pixels.shape[1] == template.shape[1]:
            raise UserError("An inpainting UNet needs the image itself, not its latents.")
        return self.encoded(pipe, pixels * (mask < 0.5), template, generator)

    def unet_input(self, latents: Tensor) -> Tensor:
        return torch.cat([latents, *self.extra], dim=1)

    def bind(self, pipe: DiffusionPipeline, latents: Tensor, step: int) -> Tensor:
        if self.known is None:
            return latents
        following = self.timesteps[step + 1 : step + 2]
        known = pipe.scheduler.add_noise(self.known, self.noise, following) if len(following) else self.known
        return (1 - self.mask) * known + self.mask * latents


def sided(asked: Iterable[int | None], default: Iterable[int]) -> tuple[int, int]:
    return tuple(side if one is None else one for one, side in zip(asked, default, strict=True))


def draw(template: Tensor, generator: Generators) -> Tensor:
    return randn_tensor(template.shape, generator=generator, device=template.device, dtype=template.dtype)


def preprocess(processor: VaeImageProcessor, image: PipelineImageInput, template: Tensor, factor: int) -> Tensor:
    """The image at the size of the template's pixels and on its device, in float32."""
    height, width = (side * factor for side in template.shape[2:])
    return processor.preprocess(image, height, width).to(template.device)


def repeated(x: Tensor, batch: int) -> Tensor:
    """x (N, ...) as (batch, ...): each row in succession, as the prompts are repeated for several images.

    Raises:
        ValueError: The batch is no multiple of N.
    """
    if batch % len(x):
        raise UserError(f"{len(x)} images cannot be spread over {batch} results; give one, or one for each prompt.")
    return x.repeat_interleave(batch // len(x), dim=0)
