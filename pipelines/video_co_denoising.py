# Written by `make single-files` in cm_diffusers, from pipeline_sources/video_co_denoising.py: change that, not this.
"""Long videos by a few-step student of short clips: overlapping clips are denoised together, without cm_diffusers.

A single file for `custom_pipeline`, after Gen-L-Video (2305.18264). It takes what `AnimateDiffPipeline` takes, with any
consistency student: AnimateLCM, those of cm_diffusers.

    import torch
    from diffusers import DiffusionPipeline, LCMScheduler, MotionAdapter

    pipe = DiffusionPipeline.from_pretrained(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        motion_adapter=MotionAdapter.from_pretrained("wangfuyun/AnimateLCM"),
        custom_pipeline="pipelines/video_co_denoising.py",
        trust_remote_code=True,
    )
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear")
    pipe.load_lora_weights("wangfuyun/AnimateLCM", weight_name="AnimateLCM_sd15_t2v_lora.safetensors")
    frames = pipe({0: "a fox in the snow", 32: "a fox on a beach"}, num_frames=64, share_noise=True).frames[0]

In every step the network sees each clip by itself. Where clips overlap, their predictions of the clean frames are averaged,
weighted by a triangle with its top in the middle of the clip; then the whole video is noised again, once. A network can
only answer for as many frames as its motion modules know, the result can be of any length.
"""

from collections.abc import Callable
from copy import copy
from itertools import chain

import torch
from diffusers import AnimateDiffPipeline
from diffusers.pipelines.animatediff import AnimateDiffPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor


Generators = Generator | list[Generator] | None
Prompt = str | dict[int, str]  # of a whole video, or by the frame from which it holds


def clip_length(pipe: AnimateDiffPipeline, length: int | None, num_frames: int, steps: int) -> int:
    """How many frames the network sees at once; by default 16, as AnimateDiff was trained, or all it knows.

    Raises:
        ValueError: It does not know so many, or there are no frames or steps.
    """
    for name, count in (("num_frames", num_frames), ("num_inference_steps", steps)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")
    most = pipe.unet.config.motion_max_seq_length
    length = min(16, most) if length is None else length
    if not 1 <= length <= most:
        raise ValueError(
            f"clip_frames must be from 1 to the {most} frames that the motion modules know, got {length}."
        )
    return min(length, num_frames)


def decoded(pipe: AnimateDiffPipeline, latents: Tensor, output_type: str, chunk: int, return_dict: bool):
    """What the pipeline answers for latents `(B, C, F, h, w)`."""
    frames = latents
    if output_type != "latent":
        frames = pipe.video_processor.postprocess_video(pipe.decode_latents(latents, chunk), output_type=output_type)
    pipe.maybe_free_model_hooks()
    return AnimateDiffPipelineOutput(frames=frames) if return_dict else (frames,)


def denoised(pipe: AnimateDiffPipeline, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The scheduler's f(x, t) `(B, C, F, h, w)`, in float32; the noise that its step adds is thrown away.

    A copy makes the step, as the first of its schedule: all clips of a video make the same ones.

    Raises:
        ValueError: The scheduler is not one of consistency models.
    """
    options = pipe.prepare_extra_step_kwargs(Generator(x.device), 0.0)
    step = copy(pipe.scheduler).step(output.float(), t, x.float(), **options)
    if "denoised" not in step or vars(pipe.scheduler).get("gamma", 1.0) != 1.0:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} does not noise a denoised sample anew in each step, as is needed to choose "
            "the noise; take pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)."
        )
    return step.denoised


def encoded(pipe: AnimateDiffPipeline, rows: list[list[str]], negative_prompt: str | None) -> Tensor:
    """The texts `(B, F, S, D)`; with guidance `(2 B, F, S, D)`, first the negative ones."""
    known, guided = list(dict.fromkeys(chain.from_iterable(rows))), pipe.do_classifier_free_guidance
    against = [negative_prompt or ""] * len(known)
    text, negative = pipe.encode_prompt(known, pipe._execution_device, 1, guided, against)
    places = torch.tensor([[known.index(one) for one in row] for row in rows], device=text.device)
    return torch.cat([negative[places], text[places]]) if guided else text[places]


def latent_shape(
    pipe: AnimateDiffPipeline, batch: int, height: int | None, width: int | None, generator: Generators
) -> tuple[int, int, int, int]:
    """(B, C, h, w) of a frame of all videos; by default of the network's size.

    Raises:
        ValueError: The latents do not divide the size, or the generators are not as many as videos.
    """
    factor, size = pipe.vae_scale_factor, pipe.unet.config.sample_size
    height, width = height or size * factor, width or size * factor
    if height % factor or width % factor:
        raise ValueError(f"height and width must be multiples of {factor}, got {height} and {width}.")
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"Found {len(generator)} generators for {batch} videos; give one for each, or a single.")
    return batch, pipe.unet.config.in_channels, height // factor, width // factor


def noised_again(pipe: AnimateDiffPipeline, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x at time t `(B, C, F, h, w)`, as the scheduler's step would make it."""
    return pipe.scheduler.add_noise(clean.float(), noise.float(), t.view(1)).to(clean.dtype)


def predicted(pipe: AnimateDiffPipeline, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The network's answer to a clip x `(B, C, F, h, w)`, guided where the text is twice as long."""
    shown = pipe.scheduler.scale_model_input(x.repeat(len(text) // len(x), 1, 1, 1, 1), t)
    output = pipe.unet(shown, t, encoder_hidden_states=text.flatten(0, 1)).sample
    if len(text) == len(x):
        return output
    negative, positive = output.chunk(2)
    return negative + pipe.guidance_scale * (positive - negative)


def texts_of_frames(prompt: Prompt | list[Prompt], num_frames: int) -> list[list[str]]:
    """What each frame of each video `(B, F)` reads: the last prompt that starts at it or before.

    Raises:
        ValueError: A prompt starts outside the video, none at its first frame, or one is no text.
    """
    rows = []
    for video in prompt if isinstance(prompt, list) else [prompt]:
        starts = {0: video} if isinstance(video, str) else video
        known = isinstance(starts, dict) and 0 in starts and all(start in range(num_frames) for start in starts)
        if not known or not all(isinstance(text, str) for text in starts.values()):
            raise ValueError(
                f"A prompt must be a text, or texts by the frame at which they start, from 0 to {num_frames - 1} and one "
                f"at 0; got {video!r}."
            )
        rows.append([starts[max(start for start in starts if start <= frame)] for frame in range(num_frames)])
    if not rows:
        raise ValueError("There is no prompt; give at least one.")
    return rows


def clips(num_frames: int, length: int, stride: int) -> list[slice]:
    """Which frames each clip has: `length` of them, from every `stride`-th on, the last clip at the very end."""
    starts = [*range(0, num_frames - length, stride), num_frames - length]
    return [slice(start, start + length) for start in starts]


def shares(parts: list[slice], num_frames: int) -> Tensor:
    """How much each clip counts at each frame `(clips, F)`: more towards its middle; all clips sum to 1."""
    weights = torch.zeros(len(parts), num_frames, dtype=torch.float64)
    for row, part in zip(weights, parts, strict=True):
        place = torch.arange(1, part.stop - part.start + 1, dtype=torch.float64)
        row[part] = torch.minimum(place, place.flip(0))
    return weights / weights.sum(0)


def noise_sources(num_frames: int, length: int, stride: int) -> Tensor:
    """The frame of the first clip whose noise each frame `(F,)` has, where noise is shared (2310.15169, Eq. 7).

    The noise of the first clip comes again and again, each time in another order within every `stride` frames. So where
    the stride divides the length, each clip that starts on it has the noise of the first one, reordered.
    """
    order = Generator().manual_seed(0)
    sources = list(range(length))
    while len(sources) < num_frames:
        for start in range(0, length, stride):
            block = torch.arange(start, min(start + stride, length))
            sources += block[torch.randperm(len(block), generator=order)].tolist()
    return torch.tensor(sources[:num_frames])


class VideoCoDenoisingPipeline(AnimateDiffPipeline):
    """`AnimateDiffPipeline` for videos of any length, with consistency students and a scheduler of theirs."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | list[Prompt],
        num_frames: int = 64,
        clip_frames: int | None = None,
        stride: int | None = None,
        share_noise: bool = False,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        decode_chunk_size: int = 16,
        return_dict: bool = True,
    ) -> AnimateDiffPipelineOutput | tuple:
        """Videos.

        Args:
            prompt: A text for the video, or texts by the frame at which they start, {0: "...", 32: "..."}; or a list of
                these, one for each video.
            num_frames: Length of the video.
            clip_frames: Frames that the network sees at once; by default 16, or all its motion modules know if fewer.
            stride: Frames from one clip to the next; by default half of a clip.
            share_noise: Give all frames the noise of the first clip, over and over in changing order, at the start and in
                every step, so that clips are more alike.
            height, width: Size in pixels, by default that of the network.
            num_inference_steps: How often each clip is denoised.
            guidance_scale: Above 1, the network is asked with and without the prompt.
            negative_prompt: What guidance leads away from, in all frames.
            generator: Draws all noise; one for each video makes it independent of its batch.
            output_type: "pil", "np" (B, F, H, W, C), "pt" (B, F, C, H, W), both in [0, 1], or "latent" (B, C, F, h, w).
            decode_chunk_size: Frames that are decoded at once.
            return_dict: False for a tuple.

        Raises:
            ValueError: The request is malformed, or network or scheduler cannot fulfil it.
        """
        length = clip_length(self, clip_frames, num_frames, num_inference_steps)
        stride = max(length // 2, 1) if stride is None else stride
        if not 1 <= stride <= length:
            raise ValueError(f"stride must be from 1 to the {length} frames of a clip, got {stride}.")
        rows = texts_of_frames(prompt, num_frames)
        shape, self._guidance_scale = latent_shape(self, len(rows), height, width, generator), guidance_scale
        text = encoded(self, rows, negative_prompt)
        parts = clips(num_frames, length, stride)
        sources = noise_sources(num_frames, length, stride) if share_noise else torch.arange(num_frames)
        draw = self._noise(shape, sources, generator, text.dtype)
        weights = shares(parts, num_frames).to(text.device, torch.float32)

        self.scheduler.set_timesteps(num_inference_steps, device=text.device)
        timesteps = self.scheduler.timesteps
        x = draw() * self.scheduler.init_noise_sigma
        for i, t in enumerate(self.progress_bar(timesteps)):
            clean = torch.zeros_like(x, dtype=torch.float32)
            for part, weight in zip(parts, weights, strict=True):
                clip = x[:, :, part]
                output = predicted(self, clip, t, text[:, part])
                clean[:, :, part] += weight[part, None, None] * denoised(self, output, t, clip)
            x = clean.to(x.dtype)
            if i + 1 < len(timesteps):
                x = noised_again(self, x, draw(), timesteps[i + 1])
        return decoded(self, x, output_type, decode_chunk_size, return_dict)

    def _noise(
        self, shape: tuple[int, int, int, int], sources: Tensor, generator: Generators, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """Draws noise `(B, C, F, h, w)` in which frame i has what frame sources[i] has."""
        drawn = (*shape[:2], int(sources.max()) + 1, *shape[2:])
        device = self._execution_device
        return lambda: randn_tensor(drawn, generator, device, dtype)[:, :, sources.to(device)]
