"""The columns of a sweep: what each says, which way is better, what it needs, and how it is measured."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.errors import UserError
from cm_diffusers.evaluation import metrics
from cm_diffusers.evaluation.fronts import Better
from cm_diffusers.evaluation.kept import Found


REWARD = "reward_"  # before the name of a reward, in the name of its column
FEATURES, EMBEDDINGS, SCORE = "features", "embeddings", "score_"  # names of tensors of a point
SUBSETS, RESAMPLED_SUBSETS = 100, 10  # of KID: of the estimate, and of each resample, where they would take long


class Column(NamedTuple):
    """Of the table.

    Attributes:
        heading: With a place for the distance's name.
        form: Of its numbers.
        better: Whether less or more is better.
        kind: What it measures.
        needs: What gives it, beside an extractor of features.
        ends: Between which its values can lie.
    """

    heading: str
    form: str
    better: Better
    kind: str
    needs: str = ""
    ends: tuple[float, float] = (-np.inf, np.inf)


SHARE = (0.0, 1.0)
SEVERAL = "pipelines that are asked for captions or classes, and --images_per_prompt of 2 or more"
COLUMNS = {
    "num_inference_steps": Column("steps", "{}", "min", "cost"),
    "ms_per_image": Column("ms/image", "{:.1f}", "min", "cost"),
    "agreement": Column(
        "agreement", "{:.3f}", "max", "consistency", "a classifier as --feature_extractor, and prompts that name its labels", SHARE
    ),
    "clip_score": Column("CLIP score", "{:.2f}", "max", "consistency", "--clip_model, and pipelines that read prompts"),
    "fid": Column("{distance}", "{:.2f}", "min", "realism", ends=(0.0, np.inf)),
    "kid": Column("KID", "{:.4f}", "min", "realism"),
    "cmmd": Column("CMMD", "{:.3f}", "min", "realism", "--cmmd_model"),
    "precision": Column("precision", "{:.3f}", "max", "realism", ends=SHARE),
    "density": Column("density", "{:.3f}", "max", "realism"),
    "recall": Column("recall", "{:.3f}", "max", "diversity", ends=SHARE),
    "coverage": Column("coverage", "{:.3f}", "max", "diversity", ends=SHARE),
    "vendi": Column("Vendi", "{:.2f}", "max", "diversity", SEVERAL),
    "pairwise_distance": Column("pairwise distance", "{:.3f}", "max", "diversity", SEVERAL),
}  # fmt: skip


def known_columns(rewards: Sequence[str], distance: str) -> dict[str, Column]:
    """All columns with those of rewards, and with the name of the Fréchet distance in their headings."""
    of_rewards = {f"{REWARD}{name}": Column(name, "{:.3f}", "max", "consistency") for name in rewards}
    columns = {**COLUMNS, **of_rewards}
    return {
        key: one._replace(heading=one.heading.format(distance=distance)) if key in COLUMNS else one
        for key, one in columns.items()
    }


def parse_axes(
    words: Sequence[str] | None, columns: Mapping[str, Column], measured: set[str]
) -> list[tuple[str, ...]]:
    """The pairs and triples of columns to plot.

    Args:
        words: As "fid,recall"; None for the first column of each kind that is measured, variety within a prompt first.
        columns: All that there are.
        measured: Those that this sweep will measure.

    Raises:
        ValueError: No pair or triple of different columns, or one that is unknown or not measured.
    """
    if words is None:
        order = sorted(measured, key=[*columns].index)
        variety = [key for key in ("vendi", "recall") if key in measured]
        kinds = [[key for key in order if columns[key].kind == kind] for kind in ("consistency", "realism")]
        return [tuple(keys[0] for keys in (*kinds, variety) if keys)]
    axes = [tuple(part.strip() for part in word.split(",")) for word in words]
    for one in axes:
        if len(one) not in (2, 3) or len(set(one)) < len(one):
            raise UserError(f"--axes {','.join(one)}: give two or three different columns with commas between them.")
        for key in one:
            if key not in columns:
                raise UserError(f"--axes names {key!r}, which is no column: choose from {', '.join(columns)}.")
            if key not in measured:
                raise UserError(f"--axes names {key}, which needs {columns[key].needs}.")
    return axes


def parse_point(words: Sequence[str] | None, axes: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """Values of the reference point by column, from words as "fid=60".

    Raises:
        ValueError: A word is none of a plotted column and a number.
    """
    plotted, point = {key for one in axes for key in one}, {}
    for word in words or []:
        key, _, value = word.rpartition("=")
        try:
            point[key] = float(value)
        except ValueError:
            point[key] = np.nan
        if key not in plotted or not np.isfinite(point[key]):
            raise UserError(
                f"--reference_point {word}: give COLUMN=NUMBER, of a column in {', '.join(sorted(plotted))}."
            )
    return point


def within(interval: Sequence[float], column: Column) -> list[float]:
    """An interval, cut where the column's values end."""
    return np.clip(interval, *column.ends).tolist()


def by_prompt(found: Found, num_prompts: int) -> dict[str, Tensor]:
    """Columns that are means over prompts: their values (P,) of each.

    Args:
        found: Of a point; scores are of images, those of a prompt side by side, or of prompts.
        num_prompts: P.
    """
    scores = {name.removeprefix(SCORE): found[name] for name in found if name.startswith(SCORE)}
    return {name: values.double().unflatten(0, (num_prompts, -1)).nanmean(1) for name, values in scores.items()}


def variety(features: Tensor, images_per_prompt: int) -> Found:
    """Scores (P,) of how different the images of each prompt are; none where there is one image of each."""
    if images_per_prompt < 2:
        return {}
    groups = features.unflatten(0, (-1, images_per_prompt))
    ways = {"vendi": metrics.vendi_score, "pairwise_distance": metrics.mean_pairwise_distance}
    return {f"{SCORE}{key}": torch.tensor([way(group) for group in groups]) for key, way in ways.items()}


def of_sets(found: Found, real: Found, subsets: int) -> dict[str, float]:
    """Columns that compare all images with real ones.

    Args:
        found, real: Features and, for CMMD, embeddings.
        subsets: Of KID.
    """
    features = real[FEATURES], found[FEATURES]
    values = {
        "fid": metrics.frechet_distance(*features),
        "kid": metrics.kernel_distance(*features, subsets=subsets)[0],
        **metrics.neighbour_metrics(*features),
    }
    if EMBEDDINGS in real:
        values["cmmd"] = metrics.gaussian_discrepancy(real[EMBEDDINGS], found[EMBEDDINGS])
    return values


class RealImages(NamedTuple):
    """Features and, for CMMD, embeddings of real images, and which of them belong to a prompt.

    Attributes:
        found: By name, (N, D).
        of_prompts: Rows of each prompt's.
        others: Rows of no prompt.
    """

    found: Found
    of_prompts: list[Tensor]
    others: Tensor

    @classmethod
    def of(cls, found: Found, told: Sequence[str | int | None], prompts: Sequence[str | int | None]) -> Self:
        """
        Args:
            told: Caption or class of each image.
            prompts: Those of each prompt.
        """
        rows: dict[str | int | None, list[int]] = {prompt: [] for prompt in prompts}
        others = [row for row, what in enumerate(told) if what not in rows or rows[what].append(row)]
        return cls(found, [torch.tensor(rows[prompt]) for prompt in prompts], torch.tensor(others, dtype=torch.long))

    def chosen(self, prompts: np.ndarray) -> Found:
        """With those of some prompts, of each as often as it is named, in place of those of all."""
        rows = torch.cat([self.others, *(self.of_prompts[prompt] for prompt in prompts)])
        return {name: tensor[rows.to(tensor.device)] for name, tensor in self.found.items()}


def chosen(found: Found, num_prompts: int, prompts: np.ndarray) -> Found:
    """Features and embeddings of the images of some prompts, of each as often as it is named."""
    rows = torch.from_numpy(prompts)
    kept = {name: found[name] for name in (FEATURES, EMBEDDINGS) if name in found}
    return {name: tensor.unflatten(0, (num_prompts, -1))[rows].flatten(0, 1) for name, tensor in kept.items()}
