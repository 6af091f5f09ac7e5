"""Refusals of a pipeline call, one clear sentence each."""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import numpy as np
import PIL.Image
from diffusers import DiffusionPipeline
from torch import Generator, Tensor

from cm_diffusers.errors import UserError


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Prompt = str | list[str] | None


def check_prompt(name: str, prompt: object) -> None:
    if isinstance(prompt, str) or prompt is None:
        return
    if not isinstance(prompt, list) or not prompt or not all(isinstance(text, str) for text in prompt):
        raise UserError(f"{name} must be a string or a list of strings, got {prompt!r}.")


def check_prompts(prompts: dict[str, Prompt], prompt_embeds: Tensor | None) -> None:
    """`prompts` by argument name, "prompt" first; the lists must be equally long.

    Raises:
        ValueError: One is of a wrong type or length, or prompt and embeddings are both given or both missing.
    """
    for name, prompt in prompts.items():
        check_prompt(name, prompt)
    if (prompts["prompt"] is None) == (prompt_embeds is None):
        raise UserError("Give exactly one of prompt and prompt_embeds.")
    size = count(prompts["prompt"], prompt_embeds)
    for name, prompt in prompts.items():
        if isinstance(prompt, list) and len(prompt) != size:
            raise UserError(f"{name} has {len(prompt)} entries for {size} prompts; give one each, or one string.")


def check_embeddings(embeddings: dict[str, Tensor | None], needs_pooled: bool, width: int) -> None:
    """Embeddings by argument name, first the prompt's, then its negative, its pooled and its pooled negative."""
    prompt, negative, pooled, negative_pooled = embeddings.values()
    for states, pool, name in ((prompt, pooled, ""), (negative, negative_pooled, "negative_")):
        if states is None:
            continue
        if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[-1] != width:
            found = tuple(states.shape) if isinstance(states, Tensor) else repr(states)
            raise UserError(f"{name}prompt_embeds must be a tensor (prompts, tokens, {width}), got {found}.")
        if needs_pooled and pool is None:
            raise UserError(f"This student is SDXL-shaped: give {name}pooled_prompt_embeds along with the embeddings.")
    check_negative(prompt, negative)


def check_negative(prompt: Tensor | None, negative: Tensor | None) -> None:
    if prompt is not None and negative is not None and prompt.shape != negative.shape:
        raise UserError(
            f"prompt_embeds {tuple(prompt.shape)} and negative_prompt_embeds {tuple(negative.shape)} must have one shape."
        )


def count(prompt: Prompt, prompt_embeds: Tensor | None) -> int:
    if prompt is None:
        return len(prompt_embeds)
    return 1 if isinstance(prompt, str) else len(prompt)


def check_whole(least: int, **arguments: object) -> None:
    """Each of the named arguments is a whole number of at least `least`."""
    for name, value in arguments.items():
        if not isinstance(value, Integral) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_strength(strength: float) -> None:
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise UserError(
            f"strength must be above 0 (keep the image) and at most 1 (start from noise), got {strength!r}."
        )


def check_guidance(guidance_scale: float) -> None:
    if not isinstance(guidance_scale, Real) or not 0 <= guidance_scale < math.inf:
        raise UserError(f"guidance_scale must be a number of at least 0, where 1 is none; got {guidance_scale!r}.")


def check_size(height: int, width: int, factor: int) -> None:
    if height % factor or width % factor or height < 1 or width < 1:
        raise UserError(f"height and width must be multiples of {factor}, got {height} and {width}.")


def check_generators(generator: Generator | list[Generator] | None, batch: int) -> None:
    several = generator if isinstance(generator, list) else [generator] * batch
    if len(several) != batch:
        raise UserError(f"Found {len(several)} generators for {batch} images; give one for each, or a single one.")
    if not all(one is None or isinstance(one, Generator) for one in several):
        raise UserError(f"generator must be a torch.Generator or a list of them, got {generator!r}.")


def check_latents(latents: Tensor | None, shape: tuple[int, ...]) -> None:
    if latents is not None and tuple(latents.shape) != shape:
        raise UserError(f"latents must have the shape {shape}, got {tuple(latents.shape)}.")


def check_output(output_type: str, names: Iterable[str], allowed: Sequence[str]) -> None:
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}.")
    if unknown := [name for name in names if name not in allowed]:
        raise UserError(f"callback_on_step_end_tensor_inputs can hold {', '.join(allowed)}; got {unknown}.")


def check_channels(pipe: DiffusionPipeline, allowed: tuple[int, ...], advice: str) -> None:
    """The UNet's input channels fit the task, else `advice`."""
    if (channels := pipe.unet.config.in_channels) not in allowed:
        raise UserError(f"{type(pipe).__name__} cannot use a UNet with {channels} input channels; {advice}.")


def check_ip_adapter(pipe: DiffusionPipeline, image: object, embeds: object) -> None:
    loaded = pipe.unet.config.encoder_hid_dim_type == "ip_image_proj"
    given = sum(argument is not None for argument in (image, embeds))
    if given == 2:
        raise UserError("Give ip_adapter_image or ip_adapter_image_embeds, not both.")
    if loaded and not given:
        raise UserError("An IP-Adapter is loaded: give ip_adapter_image, or call unload_ip_adapter().")
    if given and not loaded:
        raise UserError("No IP-Adapter is loaded: call load_ip_adapter before you give an image for it.")


def check_finite(values: Tensor, what: str) -> None:
    """
    Args:
        what: Begins the sentence.

    Raises:
        ValueError: A value is not finite: images would be black.
    """
    if not values.isfinite().all():
        raise UserError(
            f"{what} hold values that are not finite ({values.dtype}); where the weights, LoRAs and inputs are finite, load the "
            "model in float32 or bfloat16, whose range is wider than float16's."
        )


def image_size(image: object, factor: int, latent_channels: int) -> tuple[int, int]:
    """Height and width in pixels of an image, or of each in a list; latents count `factor` pixels each.

    Raises:
        ValueError: It is nothing an image processor reads, or a list of several sizes.
    """
    if isinstance(image, list | tuple) and image:
        sizes = [image_size(one, factor, latent_channels) for one in image]
        if len(set(sizes)) > 1:
            raise UserError(f"The images or masks of a list must be of one size (height, width), got {sizes}.")
        return sizes[0]
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    if isinstance(image, np.ndarray) and image.ndim >= 2:
        return image.shape[-3:-1] if image.ndim > 2 and image.shape[-1] in (1, 3, 4) else image.shape[-2:]
    if isinstance(image, Tensor) and image.ndim >= 2:
        scale = factor if image.ndim > 2 and image.shape[-3] == latent_channels else 1
        return image.shape[-2] * scale, image.shape[-1] * scale
    raise UserError(f"An image must be a PIL image, an array, a tensor, latents or a list of them, got {image!r}.")
