"""Latents of clips with captions: the data source of text-to-video training."""

import re
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.data.cache import Embeddings, Posteriors, Vae, cached_embeddings
from cm_diffusers.data.captions import EMPTY
from cm_diffusers.data.clip_latents import ClipViews, cached_clips
from cm_diffusers.data.clip_sources import FileClips
from cm_diffusers.data.edges import edges
from cm_diffusers.data.encoders import Encoders, placed, too_long
from cm_diffusers.data.folders import checked_folder
from cm_diffusers.data.found import Found
from cm_diffusers.data.images import usable_rows
from cm_diffusers.data.moving_articles import MovingArticles
from cm_diffusers.data.ragged import Tensors
from cm_diffusers.data.sampler import Position, Stream, batch_generator, batch_rows, stream
from cm_diffusers.data.shards import shard_key
from cm_diffusers.data.sources import DataConfig, check_values, load_image_text
from cm_diffusers.data.text_image import drawn_latents
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.types import Batch


SOURCES = ("train_data_dir", "dataset_name", "moving_articles")
OF_FILES = "video_column max_train_samples center_crop num_starts"
SIDES = re.compile(r"\b(left|right)(wards?)?\b|clockwise", re.IGNORECASE)


@dataclass
class VideoDataConfig:
    """Clips and captions to train on."""

    train_data_dir: str | None = HfArg(
        default=None,
        help="Local folder: clips (.gif, .webp, .mp4, .webm, .mov, .avi, .mkv) or sub-folders of numbered frames, "
        "with metadata.jsonl, .csv or .parquet (a file_name column) or captions in .txt or .caption files of the same "
        "name; or "
        "parquet files.",
    )
    dataset_name: str | None = HfArg(
        default=None, help="Dataset id on the Hub, with a column of videos or of lists of images."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the Hub dataset.")
    moving_articles: str | None = HfArg(
        default=None,
        help="Folder of captioned images on black, as assets/fashion_captioned: the clips show them travelling, "
        "bouncing and rotating over 32x32 pixels.",
    )
    num_clips: int = HfArg(default=4800, help="With --moving_articles: number of clips.")
    dataset_split: str = HfArg(
        default="train",
        help="Split to read: of the Hub dataset, or of a local folder, as its folders and tables are called.",
    )
    video_column: str = HfArg(default="video", help="Column with the clips.")
    caption_column: str = HfArg(default="text", help="Column with a caption, or a list of captions to choose from.")
    sample_n_frames: int = HfArg(default=16, help="Frames of a training clip.")
    sample_stride: int = HfArg(default=4, help="Frames of the file from one frame of the training clip to the next.")
    num_starts: int = HfArg(
        default=1, help="Training clips cached of each clip, at starts spread evenly over it; one is its middle."
    )
    resolution: int = HfArg(default=512, help="Side of the square frames, in pixels.")
    interpolation_type: Literal["bilinear", "bicubic", "lanczos", "nearest"] = HfArg(
        default="bilinear", help="Filter that resizes the shorter side to --resolution."
    )
    center_crop: bool = HfArg(default=False, help="Crop the centre instead of a random place, one for a whole clip.")
    random_flip: bool = HfArg(
        default=False, help="Mirror a random half of the clips; refused where a caption names left or right."
    )
    max_train_samples: int | None = HfArg(default=None, help="Use a fixed random subset of this many clips.")
    train_batch_size: int = HfArg(default=1, help="Clips in a batch of each process and each micro-batch.")
    dataloader_num_workers: int = HfArg(default=0, help="Processes that prepare batches; 0 prepares them in line.")
    cache_dir: str | None = HfArg(default=None, help="Where `datasets` keeps what it downloads.")
    cache_latents: bool = HfArg(
        default=True, help="Keep VAE posteriors and text embeddings on disk; otherwise in memory, for this run only."
    )
    latent_cache_dir: str = HfArg(
        default="~/.cache/cm_diffusers/latents", help="Where VAE posteriors and text embeddings are kept."
    )
    encode_batch_size: int = HfArg(default=32, help="Frames or captions encoded at once while filling the cache.")
    proportion_empty_prompts: float = HfArg(default=0.0, help="Share of captions replaced by the empty prompt.")
    vae_dtype: Literal["float32", "float16", "bfloat16"] = HfArg(
        default="float32", help="Precision of the VAE encoder; several VAEs overflow in float16."
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: A folder that is named is not there.
        """
        for name in ("train_data_dir", "moving_articles"):
            if (folder := getattr(self, name)) is not None:
                checked_folder(folder, f"--{name}")

    @property
    def source(self) -> str:
        """What the clips were called on the command line."""
        return next(filter(None, (getattr(self, name) for name in SOURCES)), "")

    @property
    def span(self) -> int:
        """Frames of a clip from the first one sampled to the last."""
        return (self.sample_n_frames - 1) * self.sample_stride + 1


def video_batches(
    config: VideoDataConfig,
    encoders: Encoders,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    *,
    first_frame: bool = False,
    control: Literal["edges"] | None = None,
) -> Stream:
    """A data source of scaled latents of clips with text embeddings.

    Args:
        config: Clips, captions, sampled frames, preprocessing and cache.
        encoders: Of the teacher; not called for what the cache holds.
        seed: Seed of order, starts, flips, captions and posterior noise.
        rank: Number of this process.
        world_size: Number of processes, which share every epoch.
        device: Where the VAE and the text tower run while the cache is filled.
        first_frame: Also give the first frame's posterior mean, scaled, as `image_latents` (B, C, h, w).
        control: Also give what is seen of the frames, as `control` (B, 3, F, H, W) in [0, 1].

    Returns:
        A function from the number of the first batch to an endless iterator of batches with x0 (B, C, F, h, w), in `cond`
        `encoder_hidden_states` (B, S, D) of each clip's caption, in `uncond` of the empty prompt; image latents and
        control are the same in both.

    Raises:
        ValueError: Wrong configuration, or no clip that can be read and has a caption.
    """
    if control not in (None, "edges"):
        raise UserError(f"Unknown control {control!r}: give 'edges', or None.")
    if encoders.micro_conditioning:
        raise UserError(
            "Clips are encoded for Stable Diffusion, but the teacher is told sizes as XL is: take another."
        )
    rows, texts = _load(config, encoders, device)
    with placed(encoders.towers, device):
        table = cached_embeddings(texts, encoders.encode_prompts, encoders.fingerprint, rows.views.images)
    position = Position(seed, rank, world_size)
    source = _Source(encoders.vae, rows, table, position, first_frame, control == "edges")
    fingerprint = shard_key(rows.fingerprint, encoders.fingerprint)
    return stream(source.make, config.dataloader_num_workers, found=rows.found, fingerprint=fingerprint)


def single_frames(clips: Stream) -> Stream:
    """The frames of clips `(B, C, F, h, w)` as images `(B F, C, h, w)`."""
    return replace(clips, batches=lambda start: map(_as_images, clips(start)))


def _as_images(clips: Batch) -> Batch:
    def repeated(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.repeat_interleave(clips.x0.shape[2], 0) for name, value in conditions.items()}

    return Batch(clips.x0.transpose(1, 2).flatten(0, 1), repeated(clips.cond), repeated(clips.uncond))


@dataclass(frozen=True)
class _Rows:
    views: ClipViews
    posteriors: Posteriors
    numbers: np.ndarray  # clips that can be used
    captions: list[list[int]]  # for each of them, its captions' numbers in the table
    found: Found
    fingerprint: str  # of clips, captions and VAE


@dataclass(frozen=True)
class _Source:
    vae: Vae
    rows: _Rows
    table: Embeddings
    position: Position
    first_frame: bool
    edges: bool

    def make(self, k: int) -> tuple[Tensor, Tensors, Tensors]:
        images, generator = self.rows.views.images, batch_generator(k, self.position)
        indices = batch_rows(k, images.train_batch_size, len(self.rows.numbers), self.position)
        clips = self.rows.numbers[indices]
        variants = generator.integers(self.rows.views.variants, size=len(clips))
        mean, std = self.rows.posteriors[clips, variants]  # (B, F, C, h, w)
        x0 = drawn_latents(self.vae, (mean, std), generator).transpose(1, 2).contiguous()
        captions = [self.rows.captions[i][generator.integers(len(self.rows.captions[i]))] for i in indices]
        dropped = generator.random(len(clips)) < images.proportion_empty_prompts
        cond, uncond = self.table.with_empty(np.where(dropped, EMPTY, captions), EMPTY)
        seen = {}
        if self.first_frame:
            seen["image_latents"] = self.vae.latents.of_network(mean[:, 0].float())
        if self.edges:
            frames = [self.rows.views.frames(*clip) for clip in zip(clips.tolist(), variants.tolist(), strict=True)]
            pixels = torch.stack([torch.stack(clip) for clip in frames]) / 2 + 0.5
            seen["control"] = edges(pixels).transpose(1, 2).contiguous()
        return x0, cond | seen, uncond | seen


def _load(config: VideoDataConfig, encoders: Encoders, device: torch.device | str) -> tuple[_Rows, list[str]]:
    found = Found(config.source, kind="clips")
    clips, images = open_clips(config, found)
    if config.random_flip:
        _refuse_flip(clips.captions)
    views = ClipViews(clips, images, config.sample_n_frames, config.sample_stride, config.num_starts)
    posteriors = cached_clips(views, encoders.vae, device)
    captioned = np.array([len(texts) > 0 for texts in clips.captions])
    numbers = usable_rows(posteriors.valid, captioned, lambda row: clips.records[row][clips.column], found)
    table = {"": EMPTY}
    by_clip = [[table.setdefault(text, len(table)) for text in clips.captions[i]] for i in numbers]
    found.captions = len(table) - 1
    too_long(list(table), encoders.tokenizers, found)
    found.report()
    fingerprint = shard_key(encoders.vae.fingerprint, clips.digests, clips.captions)
    return _Rows(views, posteriors, numbers, by_clip, found, fingerprint), list(table)


def open_clips(config: VideoDataConfig, found: Found) -> tuple[MovingArticles | FileClips, DataConfig]:
    """The clips that the flags name, and how their frames are made; `found` is told what is left out.

    Raises:
        ValueError: Wrong configuration, or clips that are shorter than what is sampled.
    """
    images = _image_config(config)
    _validate(config, images)
    clips = (
        _moving_articles(config, images, found) if config.moving_articles else FileClips.of(images, config.span, found)
    )
    return clips, images


def _image_config(config: VideoDataConfig) -> DataConfig:
    """The same flags as far as images have them, clips in place of images."""
    shared = {field.name for field in fields(DataConfig)} & {field.name for field in fields(config)}
    return DataConfig(image_column=config.video_column, **{name: getattr(config, name) for name in shared})


def _validate(config: VideoDataConfig, images: DataConfig) -> None:
    given = [f"--{name}" for name in SOURCES if getattr(config, name) is not None]
    if len(given) != 1:
        raise UserError(
            f"Give one of {', '.join(f'--{name}' for name in SOURCES)}: exactly one is needed and "
            f"{' and '.join(given) or 'none'} {'were' if given else 'was'} given."
        )
    check_values(images)
    for name, least in (("sample_n_frames", 2), ("sample_stride", 1), ("num_starts", 1), ("num_clips", 1)):
        if (value := getattr(config, name)) < least:
            raise UserError(f"--{name} must be at least {least}, but it is {value}.")
    if not config.dataset_name:
        refuse_changed(config, "dataset_config_name", "without --dataset_name")
    if config.moving_articles:
        refuse_changed(config, OF_FILES, "with --moving_articles")
    else:
        refuse_changed(config, "num_clips", "without --moving_articles")


def _moving_articles(config: VideoDataConfig, images: DataConfig, found: Found) -> MovingArticles:
    source = replace(images, train_data_dir=config.moving_articles, image_column="image")
    articles = load_image_text(source, None, found)
    return MovingArticles(articles, config.span, config.num_clips, caption_column=config.caption_column)


def _refuse_flip(captions: list[list[str]]) -> None:
    """A mirrored clip must not go right under a caption that says left."""
    named = [text for texts in captions for text in texts if SIDES.search(text)]
    if named:
        raise UserError(
            f"--random_flip would make {len(named)} captions false that name a side, such as {named[0]!r}: "
            "leave it out."
        )
