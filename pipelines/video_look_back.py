# Written by `make single-files` in cm_diffusers, from pipeline_sources/video_look_back.py: change that, not this.
"""Long videos by a few-step student of short clips: each clip looks back at the one before it, without cm_diffusers.

A single file for `custom_pipeline`, after CoNo (2406.05082), adapted to few steps. It takes what `AnimateDiffPipeline`
takes, with any consistency student: AnimateLCM, those of cm_diffusers.

    import torch
    from diffusers import DiffusionPipeline, LCMScheduler, MotionAdapter

    pipe = DiffusionPipeline.from_pretrained(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        motion_adapter=MotionAdapter.from_pretrained("wangfuyun/AnimateLCM"),
        custom_pipeline="pipelines/video_look_back.py",
        trust_remote_code=True,
    )
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear")
    pipe.load_lora_weights("wangfuyun/AnimateLCM", weight_name="AnimateLCM_sd15_t2v_lora.safetensors")
    frames = pipe({0: "a fox in the snow", 26: "a fox on a beach"}, num_frames=56).frames[0]

The video is extended clip by clip. A clip of N frames begins with the last N1 frames of the one before, and is made twice:

1. Extension. Its noise is that of the clip before in another order, with that of the common frames where they are now. In
   the first steps the common frames are tied: their predictions are those that were made for the clip before.
2. Bridge, which takes its place. It is tied on both sides, to the clip before by N1 frames and to the extension by the last
   N2; the frames between get noise of their own.

The next clip extends the bridge. In both, the mean of the predicted frames is drawn towards that of the clip before.

A step of a consistency model replaces most of the noise, so what the paper does to the first noise is done to that of every
step, or nothing would be left of it. Predictions are of clean frames: where the noise is the same, they say what predicted
noise says. The paper's regularization, a gradient step on the squared distance of two means, moves each frame by a multiple
of their difference; that multiple is `regularization` here. Its default is not the paper's, whose norm is not told.
"""

from copy import copy
from dataclasses import dataclass, field
from itertools import chain
from math import ceil

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


@dataclass
class Clip:
    """What sampling a clip used and found.

    Attributes:
        noise: At the start and after each step but the last, `(steps, B, C, N, h, w)`.
        clean: The prediction of each step, each `(B, C, N, h, w)`; the last is the result.
    """

    noise: Tensor
    clean: list[Tensor] = field(default_factory=list)


@dataclass
class Tie:
    """The frames `here` follow the frames `there`, as many, of another clip."""

    here: slice
    clip: Clip
    there: slice


def look_back_order(length: int, common: int) -> Tensor:
    """Which noise of the clip before each frame `(N,)` has: that of its last `common` frames, then the rest backwards.

    That is all of it reversed, with the first frames turned round again.
    """
    order = torch.arange(length).flip(0)
    return torch.cat([order[:common].flip(0), order[common:]])


def regularized(clean: Tensor, before: Tensor, weight: float) -> Tensor:
    """Frames `(B, C, N, h, w)` whose mean over frames moves to that of the clip before, all the way at weight 1."""
    return clean + weight * (before.mean(2, keepdim=True) - clean.mean(2, keepdim=True))


class VideoLookBackPipeline(AnimateDiffPipeline):
    """`AnimateDiffPipeline` for videos of any length, with consistency students and a scheduler of theirs."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | list[Prompt],
        num_frames: int = 56,
        clip_frames: int | None = None,
        left_frames: int | None = None,
        right_frames: int | None = None,
        tied_share: float = 0.8,
        regularization: float = 0.1,
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
            prompt: A text for the video, or texts by the frame at which they start, {0: "...", 26: "..."}; or a list of
                these, one for each video.
            num_frames: Length of the video; clips are made until it is reached, and the rest of the last is cut off.
            clip_frames: N, frames that the network sees at once; by default 16, or all its motion modules know if fewer.
            left_frames: N1, frames that a clip has in common with the one before; by default 6 of 16.
            right_frames: N2, frames that the bridge has in common with the extension; by default 8 of 16.
            tied_share: The share of steps, rounded up, in which common frames are tied; of 4 steps 0.8 are all.
            regularization: From 0 to 1, how much of the difference between mean frames is taken away in each step.
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
        N = clip_length(self, clip_frames, num_frames, num_inference_steps)
        N1 = N * 3 // 8 if left_frames is None else left_frames
        N2 = N // 2 if right_frames is None else right_frames
        if num_frames > N and not (N1 >= 1 and N2 >= 1 and N1 + N2 < N):
            raise ValueError(
                f"left_frames and right_frames must be at least 1 and leave some of the {N} frames of a clip between "
                f"them, got {N1} and {N2}."
            )
        if not (0 <= tied_share <= 1 and 0 <= regularization <= 1):
            raise ValueError(
                f"tied_share and regularization must be from 0 to 1, got {tied_share} and {regularization}."
            )
        rows = texts_of_frames(prompt, num_frames)
        shape, self._guidance_scale = latent_shape(self, len(rows), height, width, generator), guidance_scale
        text = encoded(self, rows, negative_prompt)

        def drawn(frames: int) -> Tensor:
            where = (generator, text.device, text.dtype)
            draws = [randn_tensor((*shape[:2], frames, *shape[2:]), *where) for _ in range(num_inference_steps)]
            return torch.stack(draws)

        def sampled(noise: Tensor, start: int, *ties: Tie) -> Clip:
            places = torch.arange(start, start + N).clamp(max=num_frames - 1)
            return self._sampled(Clip(noise), text[:, places], regularization, tied_steps, *ties)

        tied_steps = ceil(tied_share * num_inference_steps - 1e-9)  # 0.55 * 20 is above 11
        first, last, right = slice(0, N1), slice(N - N1, N), slice(N - N2, N)
        clip = sampled(drawn(N), 0)
        frames = [clip.clean[-1]]
        for start in self.progress_bar(range(N - N1, num_frames - N1, N - N1) if num_frames > N else []):
            before = Tie(first, clip, last)
            extension = sampled(clip.noise[:, :, :, look_back_order(N, N1)], start, before)
            between = drawn(N - N1 - N2)
            noise = torch.cat([clip.noise[:, :, :, last], between, extension.noise[:, :, :, right]], dim=3)
            clip = sampled(noise, start, before, Tie(right, extension, right))
            frames.append(clip.clean[-1][:, :, N1:])
        latents = torch.cat(frames, dim=2)[:, :, :num_frames]
        return decoded(self, latents, output_type, decode_chunk_size, return_dict)

    def _sampled(self, clip: Clip, text: Tensor, regularization: float, tied_steps: int, *ties: Tie) -> Clip:
        """Fills in the predictions of a clip, which has its noise already.

        Args:
            clip: The clip.
            text: As `encoded`, of its frames.
            regularization: As in `regularized`.
            tied_steps: In how many steps ties hold.
            ties: The first is to the clip before; none for the first clip of a video.
        """
        self.scheduler.set_timesteps(len(clip.noise), device=text.device)
        timesteps = self.scheduler.timesteps
        x = clip.noise[0] * self.scheduler.init_noise_sigma
        for i, t in enumerate(timesteps):
            clean = denoised(self, predicted(self, x, t, text), t, x).to(x.dtype)
            if ties:
                clean = regularized(clean, ties[0].clip.clean[i], regularization)
            for tie in ties if i < tied_steps else ():
                clean[:, :, tie.here] = tie.clip.clean[i][:, :, tie.there]
            clip.clean.append(clean)
            if i + 1 < len(timesteps):
                x = noised_again(self, clean, clip.noise[i + 1], timesteps[i + 1])
        return clip
