"""Noise that frames share, under the name it was published by; the code is in `cm_diffusers.pipelines.frame_noise`."""

from cm_diffusers.pipelines.frame_noise import mixed_frames, progressive_frames, repeated_frames, shuffled_frames


__all__ = ["mixed_frames", "progressive_frames", "repeated_frames", "shuffled_frames"]
