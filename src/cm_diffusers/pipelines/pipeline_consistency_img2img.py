"""Image to image in a few steps."""

from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Generator, Tensor

from cm_diffusers.pipelines.generation import Callback, Request, Size, generate
from cm_diffusers.pipelines.pipeline_consistency import ConsistencyPipeline
from cm_diffusers.pipelines.starts import FromImage


class ConsistencyImg2ImgPipeline(ConsistencyPipeline):
    """Changes images in a few steps; see `ConsistencyPipeline`.

    All of `num_inference_steps` are taken, from the share `strength` of the training grid on.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.8,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' signature)
        eta: float | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Images from images and prompts; the arguments are those of `ConsistencyPipeline`, and

        Args:
            image: PIL images, arrays (N, H, W, 3) or tensors (N, 3, H, W) in [0, 1], or latents (N, C, h, w). One for all
                prompts, or one for each.
            strength: How much may change, above 0 and at most 1: of the training grid, or of `timesteps`, the last
                such share is used.
            height, width: By default the image's, rounded down to multiples of `vae_scale_factor`.
            latents: Noised latents to start from, instead of the image's.

        Raises:
            ValueError: The request is malformed, or the student cannot fulfil it.
        """
        asked = {k: v for k, v in locals().items() if k not in ("self", "image", "strength")}
        return generate(self, FromImage(image, strength), Request(**asked))
