"""What pipelines for long videos share."""

from copy import copy
from itertools import chain

import torch
from diffusers import AnimateDiffPipeline
from diffusers.pipelines.animatediff import AnimateDiffPipelineOutput
from torch import Generator, Tensor


Prompt = str | dict[int, str]  # of a whole video, or by the frame from which it holds
Generators = Generator | list[Generator] | None


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


def encoded(pipe: AnimateDiffPipeline, rows: list[list[str]], negative_prompt: str | None) -> Tensor:
    """The texts `(B, F, S, D)`; with guidance `(2 B, F, S, D)`, first the negative ones."""
    known, guided = list(dict.fromkeys(chain.from_iterable(rows))), pipe.do_classifier_free_guidance
    against = [negative_prompt or ""] * len(known)
    text, negative = pipe.encode_prompt(known, pipe._execution_device, 1, guided, against)
    places = torch.tensor([[known.index(one) for one in row] for row in rows], device=text.device)
    return torch.cat([negative[places], text[places]]) if guided else text[places]


def predicted(pipe: AnimateDiffPipeline, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The network's answer to a clip x `(B, C, F, h, w)`, guided where the text is twice as long."""
    shown = pipe.scheduler.scale_model_input(x.repeat(len(text) // len(x), 1, 1, 1, 1), t)
    output = pipe.unet(shown, t, encoder_hidden_states=text.flatten(0, 1)).sample
    if len(text) == len(x):
        return output
    negative, positive = output.chunk(2)
    return negative + pipe.guidance_scale * (positive - negative)


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


def noised_again(pipe: AnimateDiffPipeline, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x at time t `(B, C, F, h, w)`, as the scheduler's step would make it."""
    return pipe.scheduler.add_noise(clean.float(), noise.float(), t.view(1)).to(clean.dtype)


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


def decoded(pipe: AnimateDiffPipeline, latents: Tensor, output_type: str, chunk: int, return_dict: bool):
    """What the pipeline answers for latents `(B, C, F, h, w)`."""
    frames = latents
    if output_type != "latent":
        frames = pipe.video_processor.postprocess_video(pipe.decode_latents(latents, chunk), output_type=output_type)
    pipe.maybe_free_model_hooks()
    return AnimateDiffPipelineOutput(frames=frames) if return_dict else (frames,)
