"""The one sampling run behind the consistency pipelines."""

import inspect
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from cm_diffusers.diffusion.guidance import guidance_embedding, target_embedding
from cm_diffusers.errors import UserError
from cm_diffusers.pipelines import checks
from cm_diffusers.pipelines.ip_adapter import image_embeddings
from cm_diffusers.pipelines.latents import Generators, decode
from cm_diffusers.pipelines.starts import FromNoise


Callback = Callable[[DiffusionPipeline, int, Tensor, dict], dict]
Size = tuple[int, int]


@dataclass(frozen=True)
class Request:
    """What a caller of a pipeline can ask for; `ConsistencyPipeline.__call__` documents it."""

    prompt: str | list[str] | None
    prompt_2: str | list[str] | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    original_inference_steps: int | None
    timesteps: list[int] | None
    guidance_scale: float | None
    negative_prompt: str | list[str] | None
    negative_prompt_2: str | list[str] | None
    num_images_per_prompt: int
    generator: Generators
    latents: Tensor | None
    prompt_embeds: Tensor | None
    pooled_prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    negative_pooled_prompt_embeds: Tensor | None
    ip_adapter_image: PipelineImageInput | None
    ip_adapter_image_embeds: list[Tensor] | None
    output_type: str
    return_dict: bool
    cross_attention_kwargs: dict[str, Any] | None
    clip_skip: int | None
    original_size: Size | None
    crops_coords_top_left: Size
    target_size: Size | None
    callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None
    callback_on_step_end_tensor_inputs: list[str]
    sigmas: list[float] | None = None
    eta: float | None = None

    @property
    def batch(self) -> int:
        """Number of images."""
        return checks.count(self.prompt, self.prompt_embeds) * self.num_images_per_prompt

    @property
    def steps(self) -> int | None:
        """Number of steps, where it says one."""
        times = self.sigmas if self.timesteps is None else self.timesteps
        return len(times) if isinstance(times, Sized) else self.num_inference_steps

    @property
    def negative(self) -> bool:
        asked = (self.negative_prompt, self.negative_prompt_2, self.negative_prompt_embeds)
        return any(argument is not None for argument in asked)

    @property
    def callback_inputs(self) -> list[str]:
        return getattr(self.callback_on_step_end, "tensor_inputs", self.callback_on_step_end_tensor_inputs)


@dataclass
class State:
    """What changes from step to step, or is constant but open to callbacks under these names."""

    latents: Tensor
    prompt_embeds: Tensor
    add_text_embeds: Tensor | None = None
    add_time_ids: Tensor | None = None
    w_embedding: Tensor | None = None
    denoised: Tensor | None = None
    image_embeds: list[Tensor] | None = field(default=None, repr=False)


def generate(pipe: DiffusionPipeline, start: FromNoise, ask: Request) -> StableDiffusionPipelineOutput | tuple:
    """Checks the request, encodes the prompts, samples and decodes."""
    _check_numbers(ask)
    pipe._begin(ask)
    height, width = _check(pipe, start, ask)
    device = pipe._execution_device
    embeddings = _encode_prompt(pipe, ask, device)
    timesteps = _schedule(pipe, start, ask, device)
    shape = _latent_shape(pipe, ask, height, width)
    template = torch.empty(shape, device=device, dtype=embeddings[0].dtype)
    latents = start.latents(pipe, template, ask.latents, ask.generator, timesteps)
    state = _state(pipe, ask, latents, embeddings, (height, width))
    _denoise(pipe, start, ask, timesteps, state)
    return _output(pipe, ask, state.latents)


def _check_numbers(ask: Request) -> None:
    names = ("num_inference_steps", "original_inference_steps", "height", "width")
    checks.check_whole(1, **{name: getattr(ask, name) for name in names if getattr(ask, name) is not None})
    checks.check_whole(1, num_images_per_prompt=ask.num_images_per_prompt)
    if ask.clip_skip is not None:
        checks.check_whole(0, clip_skip=ask.clip_skip)
    if ask.guidance_scale is not None:
        checks.check_guidance(ask.guidance_scale)


def _check(pipe: DiffusionPipeline, start: FromNoise, ask: Request) -> Size:
    """Height and width, if the request can be fulfilled."""
    names = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
    checks.check_prompts({name: getattr(ask, name) for name in names}, ask.prompt_embeds)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    checks.check_embeddings({name: getattr(ask, name) for name in names}, pipe.is_xl, _width(pipe))
    if sum(way is not None for way in (ask.num_inference_steps, ask.timesteps, ask.sigmas)) > 1:
        raise UserError("Give num_inference_steps, timesteps or sigmas, not more than one of them.")
    pipe.manners.check_way(ask.steps, type(start) is FromNoise)
    checks.check_output(ask.output_type, ask.callback_inputs, pipe._callback_tensor_inputs)
    checks.check_generators(ask.generator, ask.batch)
    checks.check_ip_adapter(pipe, ask.ip_adapter_image, ask.ip_adapter_image_embeds)
    start.check(pipe)
    height, width = start.size(pipe, ask.height, ask.width)
    checks.check_latents(ask.latents, _latent_shape(pipe, ask, height, width))
    return height, width


def _width(pipe: DiffusionPipeline) -> int:
    """Features of the prompt embeddings that the UNet reads."""
    config = pipe.unet.config
    if config.encoder_hid_dim_type == "text_proj":
        return config.encoder_hid_dim
    width = config.cross_attention_dim
    return width if isinstance(width, int) else width[0]


def _latent_shape(pipe: DiffusionPipeline, ask: Request, height: int, width: int) -> tuple[int, int, int, int]:
    factor = pipe.vae_scale_factor
    return ask.batch, pipe.vae.config.latent_channels, height // factor, width // factor


def _encode_prompt(pipe: DiffusionPipeline, ask: Request, device: torch.device) -> tuple[Tensor | None, ...]:
    return pipe.encode_prompt(
        ask.prompt,
        device,
        ask.num_images_per_prompt,
        pipe.do_classifier_free_guidance,
        ask.negative_prompt,
        ask.prompt_embeds,
        ask.negative_prompt_embeds,
        lora_scale=(ask.cross_attention_kwargs or {}).get("scale"),
        clip_skip=ask.clip_skip,
        prompt_2=ask.prompt_2,
        negative_prompt_2=ask.negative_prompt_2,
        pooled_prompt_embeds=ask.pooled_prompt_embeds,
        negative_pooled_prompt_embeds=ask.negative_pooled_prompt_embeds,
    )


def _schedule(pipe: DiffusionPipeline, start: FromNoise, ask: Request, device: torch.device) -> Tensor:
    """The timesteps: asked for, or by default those, or as many as, the student recommends."""
    ways = {"num_inference_steps": ask.num_inference_steps, "timesteps": ask.timesteps, "sigmas": ask.sigmas}
    if all(way is None for way in ways.values()) and not pipe.scheduler.config.get("recommended_sigmas"):
        ways["num_inference_steps"] = pipe.manners.num_inference_steps
    options = {
        **ways,
        "original_inference_steps": ask.original_inference_steps,
        "strength": start.strength if start.strength < 1 else None,
        "gamma": ask.eta,
    }
    options = {name: value for name, value in options.items() if value is not None}
    unknown = set(options) - set(inspect.signature(pipe.scheduler.set_timesteps).parameters)
    if refused := sorted("eta" if name == "gamma" else name for name in unknown):
        raise UserError(
            f"{type(pipe.scheduler).__name__} takes no {', '.join(refused)}; leave it out, or use another scheduler."
        )
    pipe.scheduler.set_timesteps(**options, device=device)
    if hasattr(pipe.scheduler, "set_begin_index"):
        pipe.scheduler.set_begin_index(0)
    return pipe.scheduler.timesteps


def _state(
    pipe: DiffusionPipeline, ask: Request, latents: Tensor, embeddings: tuple[Tensor | None, ...], size: Size
) -> State:
    guided, batch, device = pipe.do_classifier_free_guidance, ask.batch, latents.device
    states, negative, pooled, negative_pooled = embeddings
    state = State(latents, torch.cat([negative, states]) if guided else states)
    if pipe.is_xl:
        sizes = [*(ask.original_size or size), *ask.crops_coords_top_left, *(ask.target_size or size)]
        state.add_text_embeds = torch.cat([negative_pooled, pooled]) if guided else pooled
        rows = torch.tensor([sizes], dtype=latents.dtype, device=device)
        state.add_time_ids = rows.repeat(len(state.prompt_embeds), 1)
    if pipe.manners.guidance == "embedded":
        w = torch.full((batch,), pipe.guidance_scale - 1.0)
        dim = pipe.unet.config.time_cond_proj_dim - (pipe.manners.target_dim or 0)
        state.w_embedding = guidance_embedding(w, dim).to(latents)
    state.image_embeds = image_embeddings(
        pipe, ask.ip_adapter_image, ask.ip_adapter_image_embeds, batch, guided, device
    )
    return state


def _denoise(pipe: DiffusionPipeline, start: FromNoise, ask: Request, timesteps: Tensor, state: State) -> None:
    step_options = {}
    if "generator" in inspect.signature(pipe.scheduler.step).parameters:
        step_options["generator"] = ask.generator
    pipe._num_timesteps = len(timesteps)
    with pipe.progress_bar(total=len(timesteps)) as bar:
        for i, t in enumerate(timesteps):
            if pipe.interrupt:
                break
            output = _predict(pipe, start, state, t)
            result = pipe.scheduler.step(output, t, state.latents, **step_options)
            state.latents = start.bind(pipe, result.prev_sample.to(state.latents.dtype), i)
            state.denoised = getattr(result, "denoised", getattr(result, "pred_original_sample", None))
            if ask.callback_on_step_end is not None:
                call_back(pipe, ask, state, i, t)
            bar.update()


def call_back(pipe: DiffusionPipeline, ask: Any, state: Any, i: int, t: Tensor) -> None:
    """Offers the tensors of `state` to the caller's callback, and takes what it gives back.

    diffusers' callbacks that end guidance keep the last row, as if there was one image; here the half that it is of stays.
    """
    offered, guided = {name: getattr(state, name) for name in ask.callback_inputs}, pipe.do_classifier_free_guidance
    for name, value in (ask.callback_on_step_end(pipe, i, t, dict(offered)) or {}).items():
        former = offered.get(name)
        if isinstance(former, Tensor) and isinstance(value, Tensor) and len(value) == 1 and value.equal(former[-1:]):
            value = former[len(former) // 2 :] if guided else former
        setattr(state, name, value)


def _predict(pipe: DiffusionPipeline, start: FromNoise, state: State, t: Tensor) -> Tensor:
    """The UNet's output, with classifier-free guidance from both branches in one batch."""
    guided = pipe.do_classifier_free_guidance and len(state.prompt_embeds) == 2 * len(state.latents)
    x = start.unet_input(pipe.scheduler.scale_model_input(state.latents, t))
    x = torch.cat([x, x]) if guided else x
    rows = slice(-len(x), None)  # once a callback has ended guidance, the conditional half of all
    added = {"text_embeds": state.add_text_embeds[rows], "time_ids": state.add_time_ids[rows]} if pipe.is_xl else {}
    if state.image_embeds is not None:
        added["image_embeds"] = [one[rows] for one in state.image_embeds]
    output = pipe.unet(
        x,
        t,
        encoder_hidden_states=state.prompt_embeds[rows],
        timestep_cond=_told(pipe, state, t, len(x)),
        cross_attention_kwargs=pipe.cross_attention_kwargs,
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]
    if not guided:
        return output
    unconditional, conditional = output.chunk(2)
    return unconditional + pipe.guidance_scale * (conditional - unconditional)


def _told(pipe: DiffusionPipeline, state: State, t: Tensor, size: int) -> Tensor | None:
    """What the UNet is told beside its time `(size, ...)`: its guidance, and where the step goes, if it knows them."""
    if (dim := pipe.manners.target_dim) is None:
        return state.w_embedding
    s = torch.full((size,), pipe.scheduler.target_timestep(t))
    guidance = [] if state.w_embedding is None else [state.w_embedding]
    return torch.cat([*guidance, target_embedding(s, dim).to(state.latents)], 1)


def _output(pipe: DiffusionPipeline, ask: Request, latents: Tensor) -> StableDiffusionPipelineOutput | tuple:
    image, unsafe = latents, None
    checks.check_finite(latents, "The sampled latents")
    if ask.output_type != "latent":
        image, unsafe = run_safety_checker(pipe, decode(pipe, latents))
        shown = None if unsafe is None else [not flag for flag in unsafe]
        image = pipe.image_processor.postprocess(image, output_type=ask.output_type, do_denormalize=shown)
    pipe.maybe_free_model_hooks()
    if not ask.return_dict:
        return image, unsafe
    return StableDiffusionPipelineOutput(images=image, nsfw_content_detected=unsafe)


def run_safety_checker(pipe: DiffusionPipeline, image: Tensor) -> tuple[Tensor, list[bool] | None]:
    """The images, black where the checkpoint's safety checker objects, and what it found."""
    if pipe.safety_checker is None:
        return image, None
    shown = pipe.image_processor.postprocess(image, output_type="pil")
    clip_input = pipe.feature_extractor(shown, return_tensors="pt").pixel_values
    return pipe.safety_checker(images=image, clip_input=clip_input.to(image.device, pipe.safety_checker.dtype))
