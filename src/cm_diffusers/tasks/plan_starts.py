"""Networks that trainings start from, on "meta": by a folder, a recipe that makes it, sizes that are known, or the Hub."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from cm_diffusers.engine.cli import parse_words
from cm_diffusers.engine.recipes import flags_of, shipped
from cm_diffusers.errors import UserError, read_text, readable
from cm_diffusers.models.casting import NETWORK_NAMES
from cm_diffusers.tasks.memory import Shape


class Start(NamedTuple):
    """A network without weights.

    Attributes:
        downscale: Pixels per latent, along each side; None where its config says the side of what it sees.
        text_tokens: That it sees; 0 for those of the stock pipeline.
    """

    network: nn.Module
    downscale: int | None
    text_tokens: int = 0


Given = Mapping[type, Any]  # the configs of a script by their classes
# What recipes are called whose names do not begin with that of their script, after its first word.
OTHERS = {
    "ddpo": "finetune_rlcm",
    "rg_lcd": "finetune_direct_reward",
    "tune_time": "tune_time",
    "teacher": "train_diffusion",
    "frames": "train_diffusion",
}


def script_of(recipe: str, folder: Path) -> str:
    """The stem of the training script that a recipe is for, by the longest beginning of its name.

    Args:
        folder: Of the scripts.

    Raises:
        ValueError: It begins like none.
    """
    stems = [path.stem for kind in ("distill", "train", "tune", "finetune") for path in folder.glob(f"{kind}_*.py")]
    known = {stem.partition("_")[2]: stem for stem in stems} | OTHERS
    name = Path(recipe).stem
    if fits := [start for start in known if name == start or name.startswith(f"{start}_")]:
        return known[max(fits, key=len)]
    raise UserError(
        f"--recipe {recipe} does not say by its name which script it is for: give --script, e.g. distill_lcm."
    )


def own_words(words: Sequence[str], config: type) -> tuple[list[str], list[str]]:
    """Those of a config's flags and of --help, and the rest."""
    names = {field.name for field in fields(config)} | {"help", ""}
    own, others = [], []
    for name, said in flags_of(words):
        (own if name in names else others).extend(said)
    return own, others


def configs_of(script: Any, words: list[str]) -> Given:
    """What a script would be given with these words; no file that they name is looked for but recipes."""
    return {type(config): config for config in parse_words(script.CONFIGS, "", words)}


def start_of(place: str, flag: str, trained: Callable[[str], nn.Module | None], shape: str | None = None) -> Start:
    """
    Args:
        place: Folder or Hub id of a pipeline.
        flag: That names it.
        trained: Name of a recipe -> the network that it trains; None where there is no such recipe.
        shape: Sizes of the teacher, see `Shape`, by path or name, in the place of what is found.

    Raises:
        ValueError: Nothing says what the network is.
    """
    if found := shape or _known_shape(place):
        read = Shape.from_config(json.loads(read_text(shipped("--shape", found, ".json"))))
        return Start(read.network, read.downscale, read.text_tokens)
    parts = Path(place).parts
    if parts[:1] == ("runs",) and not Path(place).exists() and (network := trained(parts[1])) is not None:
        return Start(network, None)
    with readable(f"What network {flag} {place} has"):
        index = DiffusionPipeline.load_config(place)
        name = next(name for name in NETWORK_NAMES if name in index)
        kind = getattr(diffusers, index[name][1])
        with init_empty_weights(include_buffers=True):
            network = kind.from_config(kind.load_config(place, subfolder=name))
        return Start(network, _downscale(place) if "vae" in index else None)


def _known_shape(place: str) -> str | None:
    """File with the sizes of a teacher on the Hub, beside the running script."""
    files = (Path(sys.argv[0]).resolve().parent / "recipes").glob("shape_*.json")
    return next((str(path) for path in files if place in json.loads(read_text(path))["teachers"]), None)


def _downscale(place: str) -> int:
    return vae_downscale(diffusers.AutoencoderKL.load_config(place, subfolder="vae"))


def vae_downscale(config: Mapping[str, Any]) -> int:
    """Pixels per latent, along each side, of a VAE of any class."""
    names = ("block_out_channels", "encoder_block_out_channels", "dim_mult")
    return 2 ** (len(next(config[name] for name in names if name in config)) - 1)


def stored_vae_config(place: str) -> Mapping[str, Any]:
    """Of an AutoencoderKL's folder or Hub id, or a pipeline's; for one that is not there yet Stable Diffusion's."""
    for where in ({}, {"subfolder": "vae"}):
        try:
            return diffusers.AutoencoderKL.load_config(place, **where)
        except (OSError, ValueError):
            continue
    return {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4}
