"""Text to image in a few steps, with any consistency student of Stable Diffusion or Stable Diffusion XL."""

import warnings
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders import IPAdapterMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Generator, Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from cm_diffusers.errors import UserError
from cm_diffusers.pipelines.checks import check_negative
from cm_diffusers.pipelines.generation import Callback, Request, Size, generate
from cm_diffusers.pipelines.latents import dtype_of
from cm_diffusers.pipelines.loading import ConsistencyLoaderMixin
from cm_diffusers.pipelines.manners import IN_SIGMA, mismatches
from cm_diffusers.pipelines.prompts import Encoded, encode, listed, lora_scaled, repeat_rows, towers, unconditional
from cm_diffusers.pipelines.starts import FromNoise


class ConsistencyPipeline(
    ConsistencyLoaderMixin, DiffusionPipeline, StableDiffusionMixin, TextualInversionLoaderMixin, IPAdapterMixin
):
    """Text to image with a few-step student: ours, a published LCM, or a base model with an LCM-LoRA.

    It serves Stable Diffusion's shape (one text encoder) and Stable Diffusion XL's (both, or the second alone). How
    guidance works and how many steps are taken by default follows from the student's record (`pipe.manners`), see
    `cm_diffusers.record.Record`; without a record from the checkpoint itself::

        pipe = ConsistencyPipeline.from_pretrained("assets/fashion_lcm")
        image = pipe("a photo of a bag").images[0]

    `from_single_file` opens a `.safetensors` checkpoint.

    Args:
        vae: `AutoencoderTiny` is faster.
        text_encoder, text_encoder_2: Either may be None, if not both, or if calls give embeddings.
        scheduler: Best a `ConsistencyScheduler`, which `from_pretrained` makes.
        safety_checker: Run on the images if there is one.
        image_encoder: For IP-Adapters.
        requires_safety_checker: Whether to warn if there is none.
        force_zeros_for_empty_prompt: SDXL's unconditional branch is zeros, not the encoded empty prompt.
        record: A `Record` as a dict.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components = [
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    ]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = [
        "latents",
        "denoised",
        "prompt_embeds",
        "add_text_embeds",
        "add_time_ids",
        "w_embedding",
    ]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
        force_zeros_for_empty_prompt: bool = True,
        record: dict | None = None,
    ) -> None:
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise UserError("The safety checker needs a feature_extractor; give one, or safety_checker=None.")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            record=record,
        )
        if requires_safety_checker and safety_checker is None and unet is not None and not self.is_xl:
            warnings.warn(
                "There is no safety checker: what you show to others is unfiltered. requires_safety_checker=False "
                "says that this is meant.",
                stacklevel=2,
            )
        factor, channels = 8, 4
        if vae is not None:
            factor, channels = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels
        self.vae_scale_factor = factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor, vae_latent_channels=channels)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    @property
    def is_xl(self) -> bool:
        """Whether the UNet is told sizes and a pooled embedding."""
        if self.unet is None:
            return self.text_encoder_2 is not None
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 and self._manners.guidance == "distilled"

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        return self._cross_attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Embeddings (B, L, D), those of the negative prompt, and the pooled ones (B, P) of both; None for absent ones.

        B is the number of prompts times `num_images_per_prompt`. As in diffusers, `clip_skip` leaves the negative
        prompt alone.
        """
        device = device or self._execution_device
        with lora_scaled([tower.encoder for tower in towers(self)], lora_scale):
            positive, negative = Encoded(prompt_embeds, pooled_prompt_embeds), Encoded(None, None)
            if prompt_embeds is None:
                positive = encode(self, [listed(prompt), listed(prompt_2 or prompt)], device, clip_skip)
            if do_classifier_free_guidance:
                negative = Encoded(negative_prompt_embeds, negative_pooled_prompt_embeds)
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                texts = (negative_prompt, negative_prompt_2 or negative_prompt)
                given = None if texts == (None, None) else [listed(x or "", len(positive.states)) for x in texts]
                negative = unconditional(self, given, positive, device)
        check_negative(positive.states, negative.states)
        dtype = positive.states.dtype if self.unet is None else dtype_of(self.unet)
        prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds = (
            repeat_rows(part, num_images_per_prompt, device, dtype) for part in (*positive, *negative)
        )
        return prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
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
        sigmas: list[float] | None = None,
        eta: float | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Images for prompts.

        Args:
            prompt, prompt_2: What to show; the second for SDXL's second text encoder, by default the same.
            height, width: In pixels, multiples of `vae_scale_factor`; by default the size of training.
            num_inference_steps: By default what the student recommends.
            original_inference_steps: Points of the grid it was distilled on; by default the scheduler's.
            timesteps: Instead of a number of steps, descending.
            guidance_scale: By default what the student recommends; 1 is none. What it does depends on the student, see
                `cm_diffusers.record.Record.guidance`.
            negative_prompt, negative_prompt_2: For students with guidance "distilled", at a guidance_scale above 1.
            num_images_per_prompt: Images for each prompt, in succession.
            generator: Draws all noise; with a list, one for each image, an image does not depend on its batch.
            latents: Noise (B, C, height / factor, width / factor) to start from.
            prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds: Results of
                `encode_prompt` for single images, instead of prompts.
            ip_adapter_image, ip_adapter_image_embeds: For each loaded IP-Adapter an image, or its embedding.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W), both in [0, 1], or "latent".
            return_dict: False for a tuple.
            cross_attention_kwargs: For the attention processors; `scale` is that of LoRAs.
            clip_skip: Layers to leave out at the end of the text encoders.
            original_size, crops_coords_top_left, target_size: SDXL's micro-conditioning, (height, width) or (top, left).
            callback_on_step_end: (pipe, step, timestep, tensors) -> tensors to replace, or None.
            callback_on_step_end_tensor_inputs: Which ones it is given; "denoised" is a preview of the result.
            sigmas: Noise levels instead of a number of steps, descending, for students of CD, ECT and sCD.
            eta: gamma of the sampling, 0 to 1, as stock pipelines hand it to `TCDScheduler`; by default the scheduler's own.

        Raises:
            ValueError: The request is malformed, or the student cannot fulfil it.
        """
        return generate(self, FromNoise(), Request(**{k: v for k, v in locals().items() if k != "self"}))

    def stock_class(self) -> type[DiffusionPipeline] | None:
        """That for text to image, from which diffusers makes those for other tasks."""
        if self.unet is None or type(self.scheduler).__name__ in IN_SIGMA:
            return None
        if self.is_xl:
            return StableDiffusionXLPipeline
        is_lcm = self.scheduler.config.get("boundary_scalings") != "none"  # the other hands TCDScheduler its eta
        embeds = is_lcm and self.unet.config.time_cond_proj_dim
        return LatentConsistencyModelPipeline if embeds else StableDiffusionPipeline

    def _begin(self, ask: Request) -> None:
        """Takes up a request, if the student can fulfil it."""
        self._manners = self.manners
        wanted = ask.guidance_scale
        self._guidance_scale = self._manners.guidance_scale if wanted is None else wanted
        self._clip_skip, self._cross_attention_kwargs = ask.clip_skip, ask.cross_attention_kwargs
        self._interrupt = False
        if self._check_loras((ask.cross_attention_kwargs or {}).get("scale", 1.0)):
            warnings.warn(
                "Nothing says that this model was distilled for few steps; expect blurred images. Put an LCM-LoRA on "
                "it with load_lora_weights, or load a student.",
                stacklevel=5,
            )
            return
        self._manners.check(self._guidance_scale, ask.negative)
        if found := mismatches(self.scheduler, self.record):
            warnings.warn(f"The scheduler does not fit this student: {'; '.join(found)}.", stacklevel=5)
