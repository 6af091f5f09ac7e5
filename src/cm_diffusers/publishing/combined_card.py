"""The section of a model card on weights that are a linear combination of those that a training run kept."""

from collections.abc import Mapping
from typing import Any

from cm_diffusers.markdown import cell


PAPER = "[LCSC](https://arxiv.org/abs/2404.02241)"


def combined(told: Mapping[str, Any]) -> list[str]:
    """
    Args:
        told: `published` (name of the combination), `accepted` (whether it is the found one), `objective` (in words), `weights`
            (step -> coefficient), `values` (name -> the objective on the hold-out), `evaluations`, `share` (of resamples in which
            the found one is better than the best baseline), `num_images`.
    """
    used = sum(alpha != 0 for alpha in told["weights"].values())
    average = f"an average of {used} snapshots" if used > 1 else "one snapshot"
    how = (
        f"These weights are a linear combination of {used} snapshots of the training run, whose coefficients were "
        f"searched for ({PAPER}) by {told['evaluations']} evaluations of {cell(told['objective'])}."
        if told["accepted"]
        else f"These weights are {average} of the training run, {cell(told['published'])}. A "
        f"search for a better combination ({PAPER}, {told['evaluations']} evaluations of {cell(told['objective'])}) did not beat it."
    )
    shown = (
        f"On a hold-out of {told['num_images']} other images from other seeds, the found combination is better than the best "
        f"baseline in {told['share']:.0%} of the resamples of a paired bootstrap."
    )
    values = ["| weights | objective on the hold-out |", "|---|---:|"]
    values += [f"| {cell(name)} | {value:.4g} |" for name, value in told["values"].items()]
    weights = ["| step | coefficient |", "|---:|---:|"]
    weights += [f"| {step} | {alpha:.4f} |" for step, alpha in told["weights"].items()]
    return ["## Combined from snapshots", f"{how} {shown}", "\n".join(values), "\n".join(weights)]
