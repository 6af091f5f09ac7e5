"""Distillation without images: prompts of the user, latents sampled by the teacher itself."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.data.cache import Embeddings, cached_embeddings
from cm_diffusers.data.captions import EMPTY
from cm_diffusers.data.clip_config import ClipConfig, as_video
from cm_diffusers.data.clip_latents import check_frames
from cm_diffusers.data.encoders import Encoders, placed, too_long
from cm_diffusers.data.file_names import suffix_of
from cm_diffusers.data.found import Found
from cm_diffusers.data.kept import Kept, Wanted, keep
from cm_diffusers.data.keys import keys_of
from cm_diffusers.data.ragged import Tensors
from cm_diffusers.data.sampler import Position, Stream, batch_generator, batch_rows, stream
from cm_diffusers.data.shards import row_ranges, shard_key
from cm_diffusers.data.sources import DataConfig, captions_of, check_values
from cm_diffusers.data.streaming import streaming_batches
from cm_diffusers.data.tables import TABLE_SUFFIXES, read_lines, read_table
from cm_diffusers.data.teacher_latents import check_side, teacher_latents
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.data.video import video_batches
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError, readable
from cm_diffusers.models.adapters import adapter_layers, adapters_off
from cm_diffusers.models.families.base import latents_of, network_of


GENERATED_ROWS = 256  # images in a shard, or frames of clips: what an interruption may cost
GENERATE = 2  # a family of random streams, beside those of the sampler
OF_IMAGES = (
    "dataset_name dataset_config_name train_data_dir train_shards_path_or_url dataset_split image_column "
    "interpolation_type center_crop random_flip aspect_ratio_buckets bucket_step bucket_max_ratio streaming "
    "shuffle_buffer_size max_train_samples cache_dir num_crops vae_dtype"
)


@dataclass
class GenerationConfig:
    """Prompts in place of images; the teacher samples what it is distilled on."""

    prompts_file: str | None = HfArg(
        default=None,
        help="Prompts to train on without images: a .txt with one a line, or .jsonl, .csv or .parquet with "
        "--caption_column.",
    )
    generated_samples: int | None = HfArg(
        default=None, help="With --prompts_file: samples to draw from the teacher; one for each prompt if not given."
    )
    generation_steps: int = HfArg(default=25, help="With --prompts_file: steps of the teacher's own scheduler.")
    generation_guidance_scale: float = HfArg(default=7.5, help="With --prompts_file: the teacher's guidance_scale.")

    def check(self) -> None:
        """
        Raises:
            ValueError: There is no such file of prompts.
        """
        if self.prompts_file is not None:
            checked_prompts_file(self.prompts_file)


def training_batches(
    data: DataConfig,
    generation: GenerationConfig,
    teacher: DiffusionPipeline,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    clips: ClipConfig | None = None,
) -> Stream:
    """The data source that the flags name: generated, streamed or cached images, or clips; see the functions of that name."""
    encoders, frames = Encoders.from_pipeline(teacher), clips and clips.sample_n_frames
    if generation.prompts_file:
        return generated_batches(data, generation, encoders, teacher, seed, rank, world_size, device, frames)
    refuse_changed(
        generation, "generated_samples generation_steps generation_guidance_scale", "without --prompts_file"
    )
    if frames is not None:
        return video_batches(as_video(data, clips), encoders, seed, rank, world_size, device)
    source = streaming_batches if data.streaming else text_image_batches
    return source(data, encoders, seed, rank, world_size, device)


def generated_batches(
    config: DataConfig,
    generation: GenerationConfig,
    encoders: Encoders,
    teacher: DiffusionPipeline,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    num_frames: int | None = None,
) -> Stream:
    """As `text_image_batches`, x0 (B, C, h, w) being samples of the teacher; drawn once and kept as float16.

    Sample i is drawn from prompt i modulo their number and from (seed, i), so more samples later keep those there are.

    Args:
        config: Resolution, batch size and cache.
        generation: Prompts, and how the teacher samples them.
        encoders: Of the teacher.
        teacher: Sampled with its own scheduler; adapters on its network are left out.
        seed: Seed of the samples, their order and the dropped prompts.
        rank: Number of this process.
        world_size: Number of processes.
        device: Where the teacher runs.
        num_frames: Of a teacher of videos, whose samples are then clips (B, C, f, h, w); None for images.

    Raises:
        ValueError: no prompt, a flag that has no effect without images, or samples that are not finite in float16.
    """
    _check(config, generation, teacher, num_frames)
    texts = read_prompts(generation.prompts_file, config.caption_column)
    number = generation.generated_samples or len(texts)
    found = Found(generation.prompts_file, number, min(number, len(texts)), "samples")
    found.skip(f"prompts beyond --generated_samples {number}", texts[number:])
    too_long(texts, encoders.tokenizers, found)
    found.report()
    prompts = [texts[i % len(texts)] for i in range(number)]
    sampler = _Sampler(config, generation, teacher, prompts, seed, num_frames)
    setting = sampler.setting(encoders.fingerprint)
    samples = sampler.samples(setting, device)
    table = {text: i for i, text in enumerate(dict.fromkeys(["", *texts]))}
    with placed(encoders.towers, device):
        embeddings = cached_embeddings(list(table), encoders.encode_prompts, encoders.fingerprint, config)
    numbers = np.array([table[prompt] for prompt in sampler.prompts])
    position = Position(seed, rank, world_size)
    source = _Source(config, samples, numbers, embeddings, position, encoders.micro_conditioning)
    fingerprint = shard_key(encoders.fingerprint, setting, iter(prompts))
    return stream(source.make, config.dataloader_num_workers, found=found, fingerprint=fingerprint)


def read_prompts(path: str, column: str) -> list[str]:
    """The prompts in a file, without empty ones.

    Raises:
        ValueError: no such file, another kind of file, a missing column, or no prompt in it.
    """
    file = checked_prompts_file(path)
    is_text = suffix_of(file) == ".txt"
    with readable(f"--prompts_file {path}"):
        content = read_lines(file) if is_text else read_table(file, [column])
    values, where = content, ""
    if not is_text:
        if column not in content.column_names:
            found = ", ".join(content.column_names)
            raise UserError(f"--prompts_file {path} has no column {column}: name one of {found} by --caption_column.")
        values, where = content[column].to_pylist(), f" in its column {column}"
    prompts = [text.strip() for value in values for text in captions_of(value, column)]
    if not prompts:
        raise UserError(f"--prompts_file {path} holds no prompt{where}: found {len(values)} rows, all empty.")
    return prompts


def checked_prompts_file(path: str) -> Path:
    """
    Raises:
        ValueError: No such file, or another kind of file.
    """
    file = Path(path).expanduser()
    if not file.is_file() or suffix_of(file) not in (".txt", *TABLE_SUFFIXES):
        found = f"it ends in {file.suffix or 'nothing'}" if file.is_file() else "there is no such file"
        raise UserError(f"--prompts_file {path} must be a .txt, .jsonl, .csv or .parquet file, but {found}.")
    return file


def _check(
    config: DataConfig, generation: GenerationConfig, teacher: DiffusionPipeline, num_frames: int | None
) -> None:
    check_values(config)
    refuse_changed(config, OF_IMAGES, "with --prompts_file")
    if suffix_of(Path(generation.prompts_file)) == ".txt":
        refuse_changed(config, "caption_column", "with a .txt file of prompts")
    for name in ("generated_samples", "generation_steps"):
        if (value := getattr(generation, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, but it is {value}.")
    if not 0 <= (scale := generation.generation_guidance_scale) < float("inf"):
        raise UserError(f"--generation_guidance_scale must be at least 0, but it is {scale}.")
    if generation.generation_steps > (most := teacher.scheduler.config.num_train_timesteps):
        raise UserError(f"--generation_steps is {generation.generation_steps}, but the teacher has {most} timesteps.")
    check_side(teacher, config.resolution)
    if num_frames is not None:
        check_frames(num_frames, latents_of(teacher).frames_per_latent)


@dataclass(frozen=True)
class _Sampler:
    config: DataConfig
    generation: GenerationConfig
    teacher: DiffusionPipeline
    prompts: list[str]  # one for each sample
    seed: int
    num_frames: int | None

    @property
    def shard_rows(self) -> int:
        return max(1, GENERATED_ROWS // (self.num_frames or 1))

    def setting(self, text_fingerprint: str) -> str:
        """sha256 of all that decides a sample beside its number and prompt."""
        ask, scheduler = self.generation, self.teacher.scheduler
        schedule = sorted((k, repr(v)) for k, v in scheduler.config.items() if not k.startswith("_"))
        made_by = [_fingerprint(network_of(self.teacher)), text_fingerprint, type(scheduler).__name__, schedule]
        settings = [ask.generation_steps, ask.generation_guidance_scale, self.config.resolution, self.seed]
        settings += [] if self.num_frames is None else ["frames", self.num_frames]
        return shard_key("generated", *made_by, *settings)

    def samples(self, setting: str, device: torch.device | str) -> Kept:
        """Latents (N, C, ...) float16, scaled as the network wants them."""
        at_once = max(1, self.config.encode_batch_size // (self.num_frames or 1))

        def draw(numbers: Sequence[int]) -> Iterator[Tensors]:
            with _ready(self.teacher, device):
                for part in row_ranges(len(numbers), at_once):
                    yield {"x0": self.draw([numbers[i] for i in part])}

        keys = keys_of(f"{number} {prompt}" for number, prompt in enumerate(self.prompts))
        return keep([Wanted(setting, keys, draw)], self.config, "samples of the teacher", self.shard_rows)[0]

    def draw(self, numbers: list[int]) -> Tensor:
        seeds = [int(np.random.SeedSequence([self.seed, GENERATE, i]).generate_state(1)[0]) for i in numbers]
        latents = teacher_latents(
            self.teacher,
            [self.prompts[i] for i in numbers],
            seeds,
            self.config.resolution,
            self.generation.generation_steps,
            self.generation.generation_guidance_scale,
            self.num_frames,
        )
        latents = latents.half().cpu()
        if not latents.isfinite().all():
            raise UserError("The teacher's samples are not finite in float16: check its weights and --resolution.")
        return latents


def _fingerprint(network: nn.Module) -> str:
    """sha256 of the configuration and the weights below any adapter."""
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in sorted((k.replace(".base_layer", ""), v) for k, v in network.state_dict().items()):
        if ".lora_" not in name:
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _ready(teacher: DiffusionPipeline, device: torch.device | str) -> Iterator[None]:
    """The teacher alone inside the block: without adapters or dropout, and in the precision its network is kept in."""
    network = network_of(teacher)
    training = network.training
    others = [part for part in teacher.components.values() if isinstance(part, nn.Module) and part is not network]
    half = torch.autocast(torch.device(device).type, network.dtype, enabled=network.dtype != torch.float32)
    with placed(tuple(others), device), adapters_off(adapter_layers(network.to(device))), half:
        try:
            network.eval()
            yield
        finally:
            network.train(training)


@dataclass(frozen=True)
class _Source:
    config: DataConfig
    samples: Kept
    numbers: np.ndarray  # of each sample's prompt in `table`
    table: Embeddings
    position: Position
    micro_conditioning: bool

    def make(self, k: int) -> tuple[Tensor, Tensors, Tensors]:
        size, resolution = self.config.train_batch_size, self.config.resolution
        rows = batch_rows(k, size, len(self.numbers), self.position)
        places = [self.samples.row(row) for row in rows]
        x0 = torch.stack([tensors["x0"][place] for tensors, place in places]).float()
        dropped = batch_generator(k, self.position).random(size) < self.config.proportion_empty_prompts
        cond, uncond = self.table.with_empty(np.where(dropped, EMPTY, self.numbers[rows]), EMPTY)
        ids = {}
        if self.micro_conditioning:  # what the pipeline tells the network when nothing else is asked for
            ids["time_ids"] = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * size).float()
        return x0, cond | ids, uncond | ids
