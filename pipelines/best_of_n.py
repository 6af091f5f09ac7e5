"""Best of N: samples each prompt N times and keeps the k images that a reward likes best, without installing cm_diffusers.

A single file for `custom_pipeline`. It takes the folder of any text-to-image pipeline of diffusers, and samples with that
pipeline:

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "SimianLuo/LCM_Dreamshaper_v7", custom_pipeline="pipelines/best_of_n.py", trust_remote_code=True
    )
    best = pipe("a fox in the snow", reward, n=16, k=2, num_inference_steps=4)
    best.images, best.rewards, best.seeds

`reward(images, prompts, metadata)` is given images `(B, 3, H, W)` in [0, 1] and returns a number for each; those of
`cm_diffusers.rewards` fit, and those of trl's DDPOTrainer.

The pipeline itself is `pipe.stock`: load a LoRA there, or change its scheduler. With a few-step student this is the plainest
use of a reward, and what fine-tuning has to beat.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from numbers import Integral
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from torch import Generator, Tensor


OWN = ("generator", "num_images_per_prompt", "latents", "prompt_embeds")  # what a call sets, or what would not fit it


@dataclass
class BestOfNOutput(BaseOutput):
    """The best k of each prompt, best first, prompt after prompt.

    Attributes:
        images: As `output_type` says.
        rewards: Of each image.
        seeds: With each image's seed, `pipe.stock(prompt, generator=torch.Generator().manual_seed(seed))` makes it again.
    """

    images: list[Any] | np.ndarray | Tensor
    rewards: list[float]
    seeds: list[int]


class Candidate(NamedTuple):
    """An image `(3, H, W)` on the CPU, the seed it was made from, and its reward."""

    image: Tensor
    seed: int
    reward: float


class BestOfNPipeline(DiffusionPipeline):
    """A text-to-image pipeline of diffusers that keeps the best of its images; it has the components that this one has."""

    _optional_components = [
        "vae",
        "unet",
        "transformer",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "image_encoder",
        "feature_extractor",
        "safety_checker",
    ]

    def __init__(
        self,
        scheduler: Any,
        vae: Any = None,
        unet: Any = None,
        transformer: Any = None,
        text_encoder: Any = None,
        text_encoder_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer: Any = None,
        tokenizer_2: Any = None,
        tokenizer_3: Any = None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        safety_checker: Any = None,
    ) -> None:
        super().__init__()
        given = {name: part for name, part in locals().items() if name in ("scheduler", *self._optional_components)}
        self.register_modules(**given)

    @cached_property
    def stock(self) -> DiffusionPipeline:
        """The pipeline that the folder's index names, of the same components.

        Raises:
            ValueError: It is none of diffusers, or has components that are not known here.
        """
        source = self.config.get("_name_or_path")
        index = DiffusionPipeline.load_config(source) if source else {}
        name = index.get("_class_name")
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
        known = self.components
        other = [key for key, value in index.items() if isinstance(value, list) and value[0] and key not in known]
        if found is None or other:
            raise ValueError(
                f"{source} is the folder of {name} with {', '.join(other) or 'no other components'}; Best of N takes "
                f"text-to-image pipelines of diffusers whose components are among {', '.join(known)}."
            )
        taken = signature(found.__init__).parameters
        given = {key: known.get(key, index.get(key)) for key in taken if key in known or key in index}
        return found(**given)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        reward: Callable[..., Any],
        n: int = 16,
        k: int = 1,
        batch_size: int = 4,
        seed: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ) -> BestOfNOutput | tuple:
        """The best k of n images of each prompt.

        Args:
            prompt: One or several.
            reward: (images `(B, 3, H, W)` in [0, 1], B prompts, None) -> rewards `(B,)`, or these first in a tuple.
            n: Images sampled for each prompt.
            k: Images kept of each prompt.
            batch_size: Images sampled at once, all of one prompt; up to rounding, the result does not depend on it.
            seed: Image i of every prompt is made from the seed `seed + i`.
            output_type: "pil", "np" or "pt".
            return_dict: False returns a tuple.
            kwargs: The other arguments of the stock pipeline's call.

        Raises:
            ValueError: An argument is out of range, or the reward does not return a finite number for each image.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check(prompts, n, k, batch_size, output_type, kwargs)
        self.stock.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        best = []
        for text in prompts:
            kept = []
            for start in range(0, n, batch_size):
                seeds = range(seed + start, seed + min(start + batch_size, n))
                kept += self._judged(text, reward, seeds, kwargs)
                kept = sorted(kept, key=lambda one: (-one.reward, one.seed))[:k]
            best += kept
        images = _converted(torch.stack([one.image for one in best]), output_type)
        output = BestOfNOutput(images, [one.reward for one in best], [one.seed for one in best])
        return output if return_dict else output.to_tuple()

    def _judged(self, text: str, reward: Callable[..., Any], seeds: range, kwargs: dict[str, Any]) -> list[Candidate]:
        generators = [Generator("cpu").manual_seed(one) for one in seeds]
        asked = {"prompt": text, "num_images_per_prompt": len(seeds), "generator": generators, "output_type": "pt"}
        images = self.stock(**asked, **kwargs).images
        found = reward(images, [text] * len(images), None)
        rewards = torch.as_tensor(found[0] if isinstance(found, tuple) else found, dtype=torch.float32)
        if rewards.shape != (len(images),) or not rewards.isfinite().all():
            raise ValueError(
                f"The reward must return one finite number for each of {len(images)} images, but it returned "
                f"{rewards.tolist()}."
            )
        return [Candidate(*one) for one in zip(images.cpu(), seeds, rewards.tolist(), strict=True)]


def _check(prompts: list[str], n: int, k: int, batch_size: int, output_type: str, kwargs: dict[str, Any]) -> None:
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompt must be a text or a list of texts, got {prompts!r}.")
    for name, count in (("n", n), ("k", k), ("batch_size", batch_size)):
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")
    if k > n:
        raise ValueError(f"k must be at most n, the images of a prompt, but k is {k} and n is {n}.")
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}.")
    if wrong := [name for name in OWN if name in kwargs]:
        raise ValueError(f"{wrong[0]} cannot be given: each image has its own seed; give prompt, n and seed.")


def _converted(images: Tensor, output_type: str) -> list[Any] | np.ndarray | Tensor:
    if output_type == "pt":
        return images
    arrays = VaeImageProcessor.pt_to_numpy(images)
    return arrays if output_type == "np" else VaeImageProcessor.numpy_to_pil(arrays)
