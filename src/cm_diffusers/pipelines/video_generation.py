"""The one sampling run behind the consistency pipeline of clips."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.animatediff import AnimateDiffPipelineOutput
from torch import Tensor

from cm_diffusers.diffusion.guidance import guidance_embedding
from cm_diffusers.errors import UserError
from cm_diffusers.pipelines import checks
from cm_diffusers.pipelines.generation import Callback, call_back
from cm_diffusers.pipelines.ip_adapter import image_embeddings
from cm_diffusers.pipelines.latents import Generators, dtype_of
from cm_diffusers.pipelines.starts import FromNoise
from cm_diffusers.pipelines.video_conditions import (
    Frames,
    Residuals,
    as_arguments,
    check_conditions,
    control_frames,
    control_residuals,
    image_residuals,
)
from cm_diffusers.pipelines.video_noise import initial_noise, injecting, noise_sharing
from cm_diffusers.schedulers.stepping import NoiseSampler


USUAL_FRAMES = 16  # of AnimateDiff (2307.04725); also adapters for up to 32 were trained with so many


@dataclass(frozen=True)
class ClipRequest:
    """What a caller can ask for; `ConsistencyVideoPipeline.__call__` documents it."""

    prompt: str | list[str] | dict[int, str] | None
    num_frames: int | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    negative_prompt: str | list[str] | dict[int, str] | None
    num_videos_per_prompt: int
    generator: Generators
    latents: Tensor | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    ip_adapter_image: PipelineImageInput | None
    ip_adapter_image_embeds: list[Tensor] | None
    image: PipelineImageInput | None
    motion_scale: float
    conditioning_frames: Frames | list[Frames] | None
    controlnet_conditioning_scale: float | list[float]
    noise_sharing: NoiseSampler | None
    original_inference_steps: int | None
    timesteps: list[int] | None
    output_type: str
    return_dict: bool
    cross_attention_kwargs: dict[str, Any] | None
    clip_skip: int | None
    callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None
    callback_on_step_end_tensor_inputs: list[str]
    decode_chunk_size: int

    @property
    def batch(self) -> int:
        """Number of clips."""
        prompts = 1 if isinstance(self.prompt, dict) else checks.count(self.prompt, self.prompt_embeds)
        return prompts * self.num_videos_per_prompt

    @property
    def negative(self) -> bool:
        return self.negative_prompt is not None or self.negative_prompt_embeds is not None

    @property
    def callback_inputs(self) -> list[str]:
        return getattr(self.callback_on_step_end, "tensor_inputs", self.callback_on_step_end_tensor_inputs)


@dataclass
class ClipState:
    """What changes from step to step, or is constant but open to callbacks under these names."""

    latents: Tensor
    prompt_embeds: Tensor
    w_embedding: Tensor | None = None
    denoised: Tensor | None = None
    image_embeds: list[Tensor] | None = field(default=None, repr=False)
    image_residuals: Residuals | None = field(default=None, repr=False)
    control_frames: list[Tensor] | None = field(default=None, repr=False)


def generate_clips(pipe: DiffusionPipeline, ask: ClipRequest) -> AnimateDiffPipelineOutput | tuple:
    """Checks the request, encodes prompts and conditions, samples and decodes."""
    _check_numbers(ask)
    pipe._begin(ask)
    shape = _check(pipe, ask)
    sharing, device = noise_sharing(pipe, ask.noise_sharing), pipe._execution_device
    states = _encode_prompt(pipe, ask, shape[2], device)
    noise = ask.latents
    if noise is None:
        noise = initial_noise(sharing, shape, ask.generator, device, states.dtype)
    state = ClipState(noise.to(device, states.dtype) * pipe.scheduler.init_noise_sigma, states)
    _add_conditions(pipe, ask, state)
    with injecting(pipe.scheduler, sharing):
        for timesteps in _schedules(pipe, ask, state):
            _denoise(pipe, ask, timesteps, state)
    return _output(pipe, ask, state.latents)


def _check_numbers(ask: ClipRequest) -> None:
    names = ("num_inference_steps", "original_inference_steps", "num_frames", "height", "width")
    checks.check_whole(1, **{name: getattr(ask, name) for name in names if getattr(ask, name) is not None})
    checks.check_whole(1, num_videos_per_prompt=ask.num_videos_per_prompt, decode_chunk_size=ask.decode_chunk_size)
    if ask.clip_skip is not None:
        checks.check_whole(0, clip_skip=ask.clip_skip)
    if ask.guidance_scale is not None:
        checks.check_guidance(ask.guidance_scale)


def _check(pipe: DiffusionPipeline, ask: ClipRequest) -> tuple[int, int, int, int, int]:
    """The shape of the latents, if the request can be fulfilled."""
    _check_prompts(pipe, ask)
    checks.check_output(ask.output_type, ask.callback_inputs, pipe._callback_tensor_inputs)
    checks.check_generators(ask.generator, ask.batch)
    checks.check_ip_adapter(pipe, ask.ip_adapter_image, ask.ip_adapter_image_embeds)
    check_conditions(pipe, ask.image, ask.conditioning_frames)
    if ask.num_inference_steps is not None and ask.timesteps is not None:
        raise UserError("Give num_inference_steps or timesteps, not both.")
    size = FromNoise().size(pipe, ask.height, ask.width)
    sides = [side // pipe.vae_scale_factor for side in size]
    shape = (ask.batch, pipe.vae.config.latent_channels, _frames(pipe, ask), *sides)
    checks.check_latents(ask.latents, shape)
    return shape


def _check_prompts(pipe: DiffusionPipeline, ask: ClipRequest) -> None:
    if pipe.free_noise_enabled:  # has a form of its own, and checks the rest of it
        if not isinstance(ask.prompt, str | dict):
            raise UserError("With FreeNoise the prompt is one string, or a dict of frames with their strings.")
        return
    checks.check_prompts({"prompt": ask.prompt, "negative_prompt": ask.negative_prompt}, ask.prompt_embeds)
    width = pipe.unet.config.cross_attention_dim
    pooled = {"pooled_prompt_embeds": None, "negative_pooled_prompt_embeds": None}
    embeds = {"prompt_embeds": ask.prompt_embeds, "negative_prompt_embeds": ask.negative_prompt_embeds}
    checks.check_embeddings({**embeds, **pooled}, False, width if isinstance(width, int) else width[0])


def _frames(pipe: DiffusionPipeline, ask: ClipRequest) -> int:
    most = pipe.unet.config.motion_max_seq_length
    usual = min((pipe.record and pipe.record.num_frames) or USUAL_FRAMES, most)
    frames = usual if ask.num_frames is None else ask.num_frames
    if frames > most and not pipe.free_noise_enabled:
        raise UserError(
            f"num_frames is {frames}, but the motion adapter takes at most {most}; ask for fewer, or call "
            "enable_free_noise() before."
        )
    return frames


def _encode_prompt(pipe: DiffusionPipeline, ask: ClipRequest, frames: int, device: torch.device) -> Tensor:
    """Text for each clip, or with FreeNoise for each frame; if guided, after that of the negative prompts."""
    guided = pipe.do_classifier_free_guidance
    options = {
        "prompt": ask.prompt,
        "device": device,
        "do_classifier_free_guidance": guided,
        "negative_prompt": ask.negative_prompt,
        "prompt_embeds": ask.prompt_embeds,
        "negative_prompt_embeds": ask.negative_prompt_embeds,
        "lora_scale": (ask.cross_attention_kwargs or {}).get("scale"),
        "clip_skip": ask.clip_skip,
    }
    if pipe.free_noise_enabled:
        states, _ = pipe._encode_prompt_free_noise(num_frames=frames, num_videos_per_prompt=1, **options)
        return torch.cat([one.repeat(ask.num_videos_per_prompt, 1, 1) for one in states.chunk(1 + guided)])
    states, negative = pipe.encode_prompt(num_images_per_prompt=ask.num_videos_per_prompt, **options)
    return torch.cat([negative, states]) if guided else states


def _add_conditions(pipe: DiffusionPipeline, ask: ClipRequest, state: ClipState) -> None:
    shape, device, guided = state.latents.shape, state.latents.device, pipe.do_classifier_free_guidance
    if pipe.manners.guidance == "embedded":
        w = torch.full((ask.batch,), pipe.guidance_scale - 1.0)
        state.w_embedding = guidance_embedding(w, pipe.unet.config.time_cond_proj_dim).to(state.latents)
    state.image_embeds = image_embeddings(
        pipe, ask.ip_adapter_image, ask.ip_adapter_image_embeds, ask.batch, guided, device
    )
    if ask.image is not None:
        state.image_residuals = image_residuals(pipe, ask.image, shape, ask.motion_scale, device)
    if ask.conditioning_frames is not None:
        state.control_frames = control_frames(pipe, ask.conditioning_frames, shape, device)


def _schedules(pipe: DiffusionPipeline, ask: ClipRequest, state: ClipState) -> Iterator[Tensor]:
    """The timesteps; with FreeInit several times, from noise that it makes of the last result."""
    options = {"timesteps": ask.timesteps, "original_inference_steps": ask.original_inference_steps}
    options = {name: value for name, value in options.items() if value is not None}
    if ask.timesteps is None:
        options["num_inference_steps"] = ask.num_inference_steps or pipe.manners.num_inference_steps
    if refused := sorted(set(options) - set(inspect.signature(pipe.scheduler.set_timesteps).parameters)):
        raise UserError(
            f"{type(pipe.scheduler).__name__} takes no {', '.join(refused)}; leave it out, or use another scheduler."
        )
    if not pipe.free_init_enabled:
        pipe.scheduler.set_timesteps(**options, device=state.latents.device)
        yield pipe.scheduler.timesteps
        return
    if len(options) > 1 or ask.timesteps is not None:
        raise UserError("FreeInit chooses the timesteps itself; leave out timesteps and original_inference_steps.")
    for i in range(pipe._free_init_num_iters):
        if pipe.interrupt:
            return
        where = (state.latents.device, state.latents.dtype)
        state.latents, timesteps = pipe._apply_free_init(state.latents, i, *options.values(), *where, ask.generator)
        yield timesteps


def _denoise(pipe: DiffusionPipeline, ask: ClipRequest, timesteps: Tensor, state: ClipState) -> None:
    options = pipe.prepare_extra_step_kwargs(ask.generator, eta=0.0)
    pipe._num_timesteps = len(timesteps)
    with pipe.progress_bar(total=len(timesteps)) as bar:
        for i, t in enumerate(timesteps):
            if pipe.interrupt:
                break
            output = _predict(pipe, ask, state, t)
            result = pipe.scheduler.step(output, t, state.latents, **options)
            state.latents = result.prev_sample.to(state.latents.dtype)
            state.denoised = getattr(result, "denoised", getattr(result, "pred_original_sample", None))
            if ask.callback_on_step_end is not None:
                call_back(pipe, ask, state, i, t)
            bar.update()


def _predict(pipe: DiffusionPipeline, ask: ClipRequest, state: ClipState, t: Tensor) -> Tensor:
    """The UNet's output, with classifier-free guidance from both branches in one batch."""
    given, text = len(state.latents), state.prompt_embeds
    both = len(text) == 2 * given * (state.latents.shape[2] if pipe.free_noise_enabled else 1)
    guided = pipe.do_classifier_free_guidance and both
    x = pipe.scheduler.scale_model_input(state.latents, t)
    x = torch.cat([x, x]) if guided else x
    clips, frames = len(x), x.shape[2]
    if both and not guided:  # a callback has ended guidance
        text = text[len(text) // 2 :]
    if len(text) == clips:
        text = text.repeat_interleave(frames, dim=0)
    residuals = []
    if state.image_residuals is not None:
        residuals.append([torch.cat([part] * (1 + guided)) for part in state.image_residuals])
    if state.control_frames is not None:
        scale = ask.controlnet_conditioning_scale
        residuals.append(control_residuals(pipe, state.control_frames, scale, x, text, t))
    images = state.image_embeds
    output = pipe.unet(
        x,
        t,
        encoder_hidden_states=text,
        timestep_cond=state.w_embedding,
        cross_attention_kwargs=pipe.cross_attention_kwargs,
        added_cond_kwargs=None if images is None else {"image_embeds": [one[-clips:] for one in images]},
        **as_arguments(residuals),
        return_dict=False,
    )[0]
    if not guided:
        return output
    unconditional, conditional = output.chunk(2)
    return unconditional + pipe.guidance_scale * (conditional - unconditional)


def _output(pipe: DiffusionPipeline, ask: ClipRequest, latents: Tensor) -> AnimateDiffPipelineOutput | tuple:
    clips = latents
    checks.check_finite(latents, "The sampled latents")
    if ask.output_type != "latent":
        pixels = pipe.decode_latents(latents.to(dtype_of(pipe.vae)), ask.decode_chunk_size)
        checks.check_finite(pixels, "The frames that the VAE made of finite latents")
        clips = pipe.video_processor.postprocess_video(pixels, output_type=ask.output_type)
    pipe.maybe_free_model_hooks()
    return AnimateDiffPipelineOutput(frames=clips) if ask.return_dict else (clips,)
