"""What looks at the images of a sweep, batch by batch: an extractor of features, CLIP models, and rewards."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cm_diffusers.errors import UserError
from cm_diffusers.evaluation import metrics
from cm_diffusers.evaluation.compared import wanted_labels
from cm_diffusers.evaluation.features import classify, load_extractor
from cm_diffusers.evaluation.front_columns import EMBEDDINGS, REWARD, SCORE
from cm_diffusers.evaluation.kept import Found, network_digest
from cm_diffusers.evaluation.reference import Reference


class Judge(Protocol):
    """A reward, and what its numbers depend on."""

    digest: str

    def check(self, prompts: Sequence[str]) -> None: ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


class Judging:
    """Features, embeddings and scores of images.

    Args:
        extractor: As for `load_extractor`.
        clip_model, cmmd_model: As for `metrics.load_clip`, or None.
        judges: Rewards by name.
        device: Where networks run.

    Raises:
        ValueError: One of them cannot be loaded.
    """

    def __init__(
        self,
        extractor: str,
        clip_model: str | None,
        cmmd_model: str | None,
        judges: Mapping[str, Judge],
        device: torch.device,
    ) -> None:
        self.extractor, self.judges, self.device = load_extractor(extractor, device), judges, device
        self.clip = clip_model and metrics.load_clip(clip_model, device)
        self.embedder = cmmd_model and metrics.load_clip(cmmd_model, device)

    def ask(self, asked: Reference) -> None:
        """What the images to come should show.

        Raises:
            ValueError: Classifier and labels do not agree, or a reward cannot judge one of the prompts.
        """
        self.labels, self.texts = wanted_labels(self.extractor, asked), texts_of(asked)
        for name, judge in self.judges.items():
            if self.texts is None:
                raise UserError(
                    f"--rewards {name} needs captions or named classes, and the reference set has neither."
                )
            judge.check(self.texts)

    @property
    def scored(self) -> set[str]:
        """Columns of scores of images that were asked for something; the CLIP score only of those that read it."""
        told = {"agreement": any(label is not None for label in self.labels), "clip_score": bool(self.clip)}
        return {key for key, is_there in told.items() if is_there} | {f"{REWARD}{name}" for name in self.judges}

    @property
    def digest(self) -> dict[str, object]:
        """All that the numbers depend on beside the images, in JSON's types."""
        networks = {"clip": self.clip and self.clip[0], "cmmd": self.embedder and self.embedder[0]}
        return {
            "extractor": network_digest(self.extractor),
            **{name: network and network_digest(network) for name, network in networks.items()},
            "rewards": {name: judge.digest for name, judge in self.judges.items()},
            "labels": self.labels,
            "texts": self.texts,
        }

    def embed(self, images: Tensor) -> Found:
        """Embeddings for CMMD (B, D) of images (B, 3, H, W) in [0, 1]; nothing if it is not wanted."""
        return {EMBEDDINGS: metrics.clip_embeddings(self.embedder, images)} if self.embedder else {}

    @torch.no_grad()
    def score(self, images: Tensor, rows: slice, prompted: bool) -> Found:
        """Scores (B,) by CLIP and rewards of images that show what `ask` says.

        Args:
            images: (B, 3, H, W) in [0, 1].
            rows: Which of all they are.
            prompted: Whether they were drawn for captions, and not for classes alone.
        """
        found = {}
        if self.clip and prompted:
            found["clip_score"] = metrics.clip_scores(self.clip, images, self.texts[rows])
        for name, judge in self.judges.items():
            found[f"{REWARD}{name}"] = judge(images.to(self.device), self.texts[rows])
        return {f"{SCORE}{key}": values for key, values in found.items()}

    def agreement(self, features: Tensor) -> Found:
        """Scores (N,) of the features (N, D) of all images that show what `ask` says; none without a classifier."""
        logits = classify(self.extractor, features.to(self.device))
        return {} if logits is None else {f"{SCORE}agreement": metrics.agreements(logits, self.labels)}


def texts_of(asked: Reference) -> list[str] | None:
    """Captions, or the names of classes where there are none."""
    names = asked.class_names
    if asked.captions is not None:
        return asked.captions
    return None if names is None or None in asked.labels else [names[label] for label in asked.labels]
