"""Text to video in a few steps, with any consistency student of AnimateDiff's shape."""

import warnings
from typing import Any

import torch
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPipeline,
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    MotionAdapter,
    MultiControlNetModel,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.animatediff import AnimateDiffPipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Generator, Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from cm_diffusers.errors import UserError
from cm_diffusers.models.image_to_video import ImageToVideoAdapter
from cm_diffusers.pipelines.checks import check_negative
from cm_diffusers.pipelines.generation import Callback
from cm_diffusers.pipelines.latents import dtype_of
from cm_diffusers.pipelines.manners import IN_SIGMA, mismatches
from cm_diffusers.pipelines.prompts import Encoded, encode, listed, lora_scaled, repeat_rows, towers, unconditional
from cm_diffusers.pipelines.video_conditions import Frames
from cm_diffusers.pipelines.video_generation import ClipRequest, generate_clips
from cm_diffusers.pipelines.video_loading import VideoLoaderMixin
from cm_diffusers.schedulers.stepping import NoiseSampler


class ConsistencyVideoPipeline(VideoLoaderMixin, AnimateDiffPipeline):
    """Text to video with a few-step student: ours, AnimateLCM, or any motion adapter with an LCM-LoRA.

    As stock `AnimateDiffPipeline`, with LoRA, IP-Adapter, FreeNoise and FreeInit; steps, guidance and number of frames
    are by default what the student wants, see `ConsistencyPipeline`::

        pipe = ConsistencyVideoPipeline.from_pretrained("runs/animatelcm/student")
        export_to_gif(pipe("an ankle boot moving left").frames[0], "boot.gif")

    Args:
        unet: An image UNet becomes a motion UNet with `motion_adapter`.
        motion_adapter: May be None for a UNet that has motion modules.
        scheduler: Best a `ConsistencyScheduler`, which `from_pretrained` makes.
        image_encoder, feature_extractor: For IP-Adapters.
        controlnet: One, or a list, evaluated on every frame.
        image_adapter: For image to video.
        record: A `Record` as a dict.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->image_adapter->unet->vae"
    _optional_components = ["feature_extractor", "image_encoder", "motion_adapter", "controlnet", "image_adapter"]
    _callback_tensor_inputs = ["latents", "denoised", "prompt_embeds", "w_embedding"]
    is_xl, tokenizer_2, text_encoder_2 = False, None, None  # for the parts shared with ConsistencyPipeline

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel | UNetMotionModel,
        motion_adapter: MotionAdapter | None,
        scheduler: KarrasDiffusionSchedulers,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        controlnet: ControlNetModel | list[ControlNetModel] | MultiControlNetModel | None = None,
        image_adapter: ImageToVideoAdapter | None = None,
        record: dict | None = None,
    ) -> None:
        if isinstance(unet, UNet2DConditionModel) and motion_adapter is None:
            raise UserError(
                "This UNet makes images; give a motion_adapter, such as MotionAdapter.from_pretrained(...), for clips."
            )
        self._inflated = isinstance(unet, UNet2DConditionModel)
        super().__init__(
            vae, text_encoder, tokenizer, unet, motion_adapter, scheduler, feature_extractor, image_encoder
        )
        if isinstance(controlnet, list):
            controlnet = MultiControlNetModel(controlnet)
        self.register_modules(controlnet=controlnet, image_adapter=image_adapter)
        self.register_to_config(record=record)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 and self._manners.guidance == "distilled"

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
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, S, D), and those of the negative prompt, or None.

        B is the number of prompts times `num_images_per_prompt`, which has its name from diffusers.
        """
        device = device or self._execution_device
        with lora_scaled([tower.encoder for tower in towers(self)], lora_scale):
            positive, negative = Encoded(prompt_embeds, None), Encoded(None, None)
            if prompt_embeds is None:
                positive = encode(self, [listed(prompt)], device, clip_skip)
            if do_classifier_free_guidance:
                negative = Encoded(negative_prompt_embeds, None)
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                texts = listed(negative_prompt or "", len(positive.states))
                negative = unconditional(self, [texts], positive, device)
        check_negative(positive.states, negative.states)
        return tuple(
            repeat_rows(part.states, num_images_per_prompt, device, dtype_of(self.unet))
            for part in (positive, negative)
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | dict[int, str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | dict[int, str] | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        image: PipelineImageInput | None = None,
        motion_scale: float = 0.8,
        conditioning_frames: Frames | list[Frames] | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        noise_sharing: NoiseSampler | None = None,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' signature)
        decode_chunk_size: int = 16,
    ) -> AnimateDiffPipelineOutput | tuple:
        """Clips for prompts.

        Args:
            prompt: What to show; with FreeNoise also a dict of frames with what is shown from them on.
            num_frames: F; by default those of the student's training or 16, or as many as the motion adapter takes. More than it takes need
                `enable_free_noise`.
            height, width: In pixels, multiples of `vae_scale_factor`; by default the size of training.
            num_inference_steps: By default what the student recommends.
            guidance_scale: By default what the student recommends; 1 is none. What it does depends on the student, see
                `cm_diffusers.record.Record.guidance`.
            negative_prompt: For students with guidance "distilled", at a guidance_scale above 1.
            num_videos_per_prompt: Clips for each prompt, in succession.
            generator: Draws all noise; with a list, one for each clip, a clip does not depend on its batch.
            latents: Noise (B, C, F, height / factor, width / factor) to start from.
            prompt_embeds, negative_prompt_embeds: Results of `encode_prompt` for single clips, instead of prompts.
            ip_adapter_image, ip_adapter_image_embeds: For each loaded IP-Adapter an image, or its embedding.
            image: That the clip shows in motion, of the clip's size, by the `image_adapter`; or one for each prompt.
            motion_scale: How much the frames may differ from it; 0 holds it still.
            conditioning_frames: For the ControlNet, of the clip's size: F images, or a tensor (F, 3, H, W) or
                (B, F, 3, H, W) in [0, 1]; with several ControlNets a list of these.
            controlnet_conditioning_scale: Factor of what the ControlNets add; or a list, one for each.
            noise_sharing: What frames have in common in all noise, of the start and of every step: a function of
                `cm_diffusers.pipelines.frame_noise`, or any `NoiseSampler`. With FreeNoise by default what its `noise_type` says.
            original_inference_steps: Points of the grid the student was distilled on; by default the scheduler's.
            timesteps: Instead of a number of steps, descending.
            output_type: "pil", "np" (B, F, H, W, 3), "pt" (B, F, 3, H, W), both in [0, 1], or "latent" (B, C, F, h, w).
            return_dict: False for a tuple.
            cross_attention_kwargs: For the attention processors; `scale` is that of LoRAs.
            clip_skip: Layers to leave out at the end of the text encoder.
            callback_on_step_end: (pipe, step, timestep, tensors) -> tensors to replace, or None.
            callback_on_step_end_tensor_inputs: Which ones it is given; "denoised" is a preview of the result.
            decode_chunk_size: Frames that are decoded at a time.

        Raises:
            ValueError: The request is malformed, or the student cannot fulfil it.
        """
        return generate_clips(self, ClipRequest(**{k: v for k, v in locals().items() if k != "self"}))

    def stock_class(self) -> type[DiffusionPipeline] | None:
        """None with parts that only this package knows: an image adapter, embedded guidance, a scheduler in sigma."""
        embeds = getattr(self.unet.config, "time_cond_proj_dim", None) is not None
        if self.image_adapter is not None or embeds or type(self.scheduler).__name__ in IN_SIGMA:
            return None
        return AnimateDiffPipeline if self.controlnet is None else AnimateDiffControlNetPipeline

    def _begin(self, ask: ClipRequest) -> None:
        """Takes up a request, if the student can fulfil it."""
        self._manners = self.manners
        wanted = ask.guidance_scale
        self._guidance_scale = self._manners.guidance_scale if wanted is None else wanted
        self._clip_skip, self._cross_attention_kwargs = ask.clip_skip, ask.cross_attention_kwargs
        self._interrupt = False
        if self._check_loras((ask.cross_attention_kwargs or {}).get("scale", 1.0)):
            warnings.warn(
                "Nothing says that this model was distilled for few steps; expect blurred clips. Put an LCM-LoRA on it "
                "with load_lora_weights, or load a student.",
                stacklevel=5,
            )
            return
        self._manners.check(self._guidance_scale, ask.negative)
        if found := mismatches(self.scheduler, self.record):
            warnings.warn(f"The scheduler does not fit this student: {'; '.join(found)}.", stacklevel=5)
