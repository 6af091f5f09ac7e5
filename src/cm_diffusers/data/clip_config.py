"""Clips in place of images, for teachers of videos: the flags of `VideoDataConfig` that images do not have."""

from dataclasses import asdict, dataclass, fields

from transformers.hf_argparser import HfArg

from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.video import VideoDataConfig


OF_FILES = "sample_stride num_starts video_column"  # flags here that act on clips that are there
OF_IMAGES = (
    "train_shards_path_or_url image_column aspect_ratio_buckets bucket_step bucket_max_ratio streaming "
    "shuffle_buffer_size num_crops"
)


@dataclass
class ClipConfig:
    """Clips in place of images, for teachers of videos."""

    sample_n_frames: int | None = HfArg(
        default=None,
        help="Train on clips of so many frames, of --train_data_dir or --dataset_name, or sampled by the teacher; on images "
        "if not given. Wan takes 4k + 1.",
    )
    sample_stride: int = HfArg(
        default=4, help="With --sample_n_frames: frames of the file from one frame of the training clip to the next."
    )
    num_starts: int = HfArg(
        default=1,
        help="With --sample_n_frames: training clips cached of each clip, at starts spread evenly over it; one is its middle.",
    )
    video_column: str = HfArg(default="video", help="With --sample_n_frames: column with the clips.")


def as_video(data: DataConfig, clips: ClipConfig) -> VideoDataConfig:
    """What both say of clips."""
    shared = {field.name for field in fields(DataConfig)} & {field.name for field in fields(VideoDataConfig)}
    return VideoDataConfig(**asdict(clips), **{name: getattr(data, name) for name in shared})
