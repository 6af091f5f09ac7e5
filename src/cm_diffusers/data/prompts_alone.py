"""Prompts and nothing else: for methods that draw their own noise and need no data."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.data.cache import cached_embeddings
from cm_diffusers.data.captions import EMPTY
from cm_diffusers.data.encoders import Conditions, Encoders, placed, too_long
from cm_diffusers.data.prompt_batches import prompt_batches
from cm_diffusers.data.prompts import Prompt, named_prompts
from cm_diffusers.data.sampler import Position, Stream
from cm_diffusers.data.shards import shard_key
from cm_diffusers.data.sources import DataConfig


@dataclass
class PromptDataConfig:
    """Prompts to train on, without images."""

    prompts: list[str] = HfArg(
        help="Prompts; or one set: simple_animals, imagenet_animals, animal_activities, fashion; or a .txt file with one a line, "
        "or .jsonl with a `prompt` in each."
    )
    resolution: int = HfArg(default=512, help="Side of the student's square images, in pixels.")
    train_batch_size: int = HfArg(default=16, help="Batch size of each process and each micro-batch.")
    latent_cache_dir: str = HfArg(default="~/.cache/cm_diffusers/latents", help="Where text embeddings are kept.")
    encode_batch_size: int = HfArg(default=32, help="Prompts encoded at once while filling the cache.")

    def check(self) -> None:
        """
        Raises:
            ValueError: There is no such set or file, or a prompt is empty.
        """
        self.load()

    def load(self) -> list[Prompt]:
        return named_prompts(self.prompts)


def batches_of_prompts(
    config: PromptDataConfig,
    encoders: Encoders,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Stream:
    """Batches without x0, of prompts in random order and of the empty one; encoded once and kept as float16.

    Args:
        encoders: Of the teacher.
        seed: Of the order.
        rank: Number of this process.
        world_size: Number of processes.
        device: Where the text towers run.
    """
    prompts, side = config.load(), config.resolution
    texts = [prompt.text for prompt in prompts]
    numbers = {text: i for i, text in enumerate(dict.fromkeys(["", *texts]))}
    keeping = DataConfig(encode_batch_size=config.encode_batch_size, latent_cache_dir=config.latent_cache_dir)
    with placed(encoders.towers, device):
        table = cached_embeddings(list(numbers), encoders.encode_prompts, encoders.fingerprint, keeping)

    sized = encoders.micro_conditioning  # what is returned holds no text tower

    def conditions(rows: Tensor) -> tuple[Conditions, Conditions]:
        cond, uncond = table.with_empty(np.array([numbers[texts[row]] for row in rows]), EMPTY)
        ids = {}
        if sized:  # what the pipeline tells the network when nothing else is asked for
            ids["time_ids"] = torch.tensor([[side, side, 0, 0, side, side]] * len(rows)).float()
        return cond | ids, uncond | ids

    stream = prompt_batches(prompts, conditions, config.train_batch_size, Position(seed, rank, world_size))
    too_long(texts, encoders.tokenizers, stream.found)
    stream.found.report()
    return replace(stream, fingerprint=shard_key(encoders.fingerprint, *texts))
