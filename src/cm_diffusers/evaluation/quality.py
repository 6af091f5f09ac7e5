"""How good images are by their features: the columns of an evaluation."""

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from cm_diffusers.evaluation import metrics
from cm_diffusers.evaluation.features import classify
from cm_diffusers.evaluation.report import Row


COLUMNS = ("fid", "kid", "precision", "recall", "density", "coverage", "vendi", "agreement")
LOWER_IS_BETTER = ("fid", "kid")


def quality(
    extractor: nn.Module,
    real: Tensor,
    features: Tensor,
    asked: Sequence[str] | Sequence[int] | None,
    labels: Sequence[int | None],
    columns: Collection[str] = COLUMNS,
) -> Row:
    """Of images that were asked to show something, also how varied they are for each, and whether they do.

    Args:
        real: Features (N, D) of the reference.
        features: Of M drawn images (M, D).
        asked: What each should show; None for images of nothing in particular.
        labels: Class of the extractor that each should show.
        columns: Those that are wanted; others may come along.
    """
    row: Row = {}
    if "fid" in columns:
        row["fid"] = metrics.frechet_distance(real, features)
    if "kid" in columns:
        row["kid"], row["kid_std"] = metrics.kernel_distance(real, features)
    if not {"precision", "recall", "density", "coverage"}.isdisjoint(columns):
        row |= metrics.neighbour_metrics(real, features)
    if "vendi" in columns:
        row["vendi"] = None if asked is None else metrics.prompt_vendi_score(features, list(map(str, asked)))
    if "agreement" in columns:
        logits = None if asked is None else classify(extractor, features)
        row["agreement"] = None if logits is None else metrics.prompt_agreement(logits, labels)
    return row
