"""Rewards by name."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cm_diffusers.errors import UserError
from cm_diffusers.rewards.base import CheckedReward, WeightedSum
from cm_diffusers.rewards.classifier import load_classifier
from cm_diffusers.rewards.clip import HPS_FILES, load_aesthetic, load_clip_score, load_hps, load_pick_score
from cm_diffusers.rewards.image_reward import load_image_reward
from cm_diffusers.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from cm_diffusers.rewards.multi_view import MultiViewConsistency
from cm_diffusers.rewards.networks import NetworkReward


FUNCTIONS = {
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
}
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "aesthetic": load_aesthetic,
    "classifier": load_classifier,
    "clip_score": load_clip_score,
    "hpsv2": partial(load_hps, HPS_FILES["hpsv2"]),
    "hpsv2.1": partial(load_hps, HPS_FILES["hpsv2.1"]),
    "image_reward": load_image_reward,
    "pick_score": load_pick_score,
}
MULTI_VIEW = "multi_view"


def load_reward(name: str) -> CheckedReward:
    """A reward; its networks are loaded when it is first called, or moved with `to`.

    Args:
        name: One of
            jpeg_compressibility, jpeg_incompressibility;
            aesthetic, clip_score, hpsv2, hpsv2.1, image_reward, pick_score, each with a folder or Hub id of other weights if wanted,
            and a revision: `clip_score:laion/CLIP-ViT-B-32-laion2B-s34B-b79K@main`;
            `classifier:SOURCE` with a folder or Hub id;
            `multi_view:MODULE:FUNCTION` with a function that reconstructs and renders, see `MultiViewConsistency`;
            `MODULE:FUNCTION`, any function of images, prompts and metadata, see `CheckedReward`; a class is called first.

    Raises:
        ValueError: There is no such reward, or it lacks or cannot take an argument.
    """
    kind, _, argument = name.partition(":")
    if kind in FUNCTIONS and not argument:
        return CheckedReward(FUNCTIONS[kind], name)
    if kind in NETWORKS:
        return CheckedReward(NetworkReward(_loader(kind, argument)), name)
    if kind == MULTI_VIEW:
        return CheckedReward(MultiViewConsistency(_imported(argument, name)), name)
    if kind in FUNCTIONS or not argument:
        known = ", ".join([*FUNCTIONS, *NETWORKS, MULTI_VIEW])
        raise UserError(f"There is no reward {name!r}; give one of {known}, or MODULE:FUNCTION.")
    return CheckedReward(_imported(name, name), name)


def load_rewards(names: Sequence[str], weights: Sequence[float] | None = None) -> WeightedSum:
    """A weighted sum of rewards by name; all weights are 1 by default.

    Raises:
        ValueError: As `load_reward`, or the weights are not as many as the names.
    """
    return WeightedSum([load_reward(name) for name in names], [1.0] * len(names) if weights is None else weights)


def _loader(kind: str, argument: str) -> Callable[[], nn.Module]:
    source, _, revision = (argument, "", "") if Path(argument).exists() else argument.partition("@")
    given = ({"source": source} if source else {}) | ({"revision": revision} if revision else {})
    if not source and inspect.signature(NETWORKS[kind]).parameters["source"].default is inspect.Parameter.empty:
        raise UserError(f"The reward {kind} needs a folder or a Hub id: {kind}:SOURCE.")
    return partial(NETWORKS[kind], **given)


def _imported(place: str, name: str) -> Any:
    module, _, attribute = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"The reward {name!r} cannot be imported: {error}; give MODULE:FUNCTION of a module on PYTHONPATH."
        ) from error
    return found() if isinstance(found, type) else found
