"""Frames of a clip: an animated image, a video file, a folder of numbered frames or a list of images."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from cm_diffusers.data.file_names import IMAGE_SUFFIXES, suffix_of
from cm_diffusers.data.preprocessing import content_hash, decode_image, read_bytes
from cm_diffusers.data.shards import shard_key
from cm_diffusers.extras import PYAV, missing
from cm_diffusers.pixels import to_rgb


ANIMATION_SUFFIXES = {".gif", ".webp", ".apng"}
VIDEO_SUFFIXES = ".mp4 .m4v .webm .mov .avi .mkv .mpg .mpeg .ts .m2ts .mts .wmv .flv .ogv .3gp"
CLIP_SUFFIXES = ANIMATION_SUFFIXES | set(VIDEO_SUFFIXES.split())
PNG = b"\x89PNG\r\n\x1a\n"
FRAME_SUFFIXES = IMAGE_SUFFIXES - ANIMATION_SUFFIXES
Record = dict[str, Any]  # a file undecoded: its "bytes", or its "path"; of a clip, also a folder's path


def is_frame(path: Path) -> bool:
    """Whether a file is one of a folder's frames: an image with a number in its name."""
    return suffix_of(path) in FRAME_SUFFIXES and re.search(r"\d", path.stem) is not None


def measure(clip: Record | list[Record] | None) -> tuple[str, int]:
    """Hash of the content, and number of frames; "missing" where there is no file and 0 where it cannot be read.

    Raises:
        ValueError: a video file, but PyAV is not installed.
    """
    if (frames := _frame_records(clip)) is not None:
        return shard_key(*map(content_hash, frames)), len(frames)
    content = read_bytes(clip)
    return content_hash({"bytes": content, "path": None}), 0 if content is None else _count(content)


def read_frames(clip: Record | list[Record] | None, numbers: Sequence[int]) -> list[Image.Image] | None:
    """The upright RGB frames with these ascending numbers; None when one of them cannot be read.

    Raises:
        ValueError: they differ in size.
    """
    if (records := _frame_records(clip)) is not None:
        frames = [decode_image(records[number]) for number in numbers]
    else:
        content = read_bytes(clip)
        frames = [None] if content is None else _decode(content, numbers)
    if any(frame is None for frame in frames):
        return None
    if len(sizes := {frame.size for frame in frames}) > 1:
        found = " and ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise ValueError(f"The frames of {clip_name(clip)} differ in size ({found}): give them one size.")
    return frames


def clip_name(clip: Record | list[Record] | None) -> str:
    """What to call a clip in an error message."""
    first = clip[0] if isinstance(clip, list) and clip else clip
    return (first or {}).get("path") or "a clip without a path"


def _frame_records(clip: Record | list[Record] | None) -> list[Record] | None:
    """One record for each frame, where frames are files of their own."""
    if isinstance(clip, list):
        return clip
    if not clip or clip["bytes"] is not None or not clip["path"] or not Path(clip["path"]).is_dir():
        return None
    files = [path for path in Path(clip["path"]).iterdir() if is_frame(path)]
    files.sort(key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.stem)])
    return [{"bytes": None, "path": str(path)} for path in files]


def _is_animation(content: bytes) -> bool:
    return content[:4] == b"GIF8" or content[:8] == PNG or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


def _count(content: bytes) -> int:
    av = None if _is_animation(content) else _pyav()
    try:
        if av is None:
            with Image.open(io.BytesIO(content)) as image:
                return image.n_frames
        with av.open(io.BytesIO(content)) as file:  # headers may lack the number, or promise what was cut off
            return sum(packet.size > 0 for packet in file.demux(video=0))
    except Exception:  # as in decode_image
        return 0


def _decode(content: bytes, numbers: Sequence[int]) -> list[Image.Image | None]:
    decode = _decode_animation if _is_animation(content) else _decode_video
    try:
        return decode(content, numbers)
    except Exception:  # as in decode_image
        return [None]


def _decode_animation(content: bytes, numbers: Sequence[int]) -> list[Image.Image | None]:
    frames = []
    with Image.open(io.BytesIO(content)) as image:
        for number in numbers:
            image.seek(number)
            frames.append(to_rgb(image.copy()))
    return frames


def _decode_video(content: bytes, numbers: Sequence[int]) -> list[Image.Image | None]:
    frames = {}
    with _pyav().open(io.BytesIO(content)) as file:
        for number, frame in enumerate(file.decode(video=0)):
            if number in numbers:
                frames[number] = frame.to_image().rotate(frame.rotation, expand=True)
            if number == numbers[-1]:
                break
    return [frames.get(number) for number in numbers]


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ValueError(missing("A video file", PYAV)) from error
    return av
