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

import torch
from diffusers import AnimateDiffPipeline
from diffusers.pipelines.animatediff import AnimateDiffPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from .shared.long_video import (
    Generators,
    Prompt,
    clip_length,
    decoded,
    denoised,
    encoded,
    latent_shape,
    noised_again,
    predicted,
    texts_of_frames,
)


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
