"""Plot what trainings logged: the scalars of their TensorBoard files over steps, a panel for each tag."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.report import write_plot


@dataclass
class CurvesConfig:
    """Which curves of which trainings."""

    runs: list[str] = HfArg(help="Output folders of trainings with --report_to tensorboard, as is the default.")
    tags: list[str] = HfArg(help="What they logged, such as loss, tangent_norm or student/grad_norm.")
    output: str = HfArg(default="runs/curves.png", help="The picture.")


def read_scalars(folder: str) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of everything that a training logged, by tag; of a resumed one, all parts."""
    logs = sorted(Path(folder).rglob("events.out.tfevents.*"))
    if not logs:
        raise UserError(f"--runs {folder} has no TensorBoard file: train with --report_to tensorboard.")
    found: dict[str, dict[int, float]] = {}
    for log in logs:
        events = EventAccumulator(str(log), {"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return {tag: (sorted(values), [values[step] for step in sorted(values)]) for tag, values in found.items()}


def draw(scalars: dict[str, dict[str, tuple[list[int], list[float]]]], tags: list[str]) -> Figure:
    """
    Args:
        scalars: By the name of the training, see `read_scalars`.
    """
    figure = Figure(figsize=(3.6 * len(tags), 2.8), layout="constrained")
    for axes, tag in zip(figure.subplots(1, len(tags), squeeze=False)[0], tags, strict=True):
        for name, found in scalars.items():
            if tag in found:
                axes.plot(*found[tag], label=name, linewidth=1)
        axes.set(title=tag, xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    return figure


def main() -> None:
    (config,) = parse_configs((CurvesConfig,), __doc__)
    scalars = {Path(folder).name: read_scalars(folder) for folder in config.runs}
    known = {tag for found in scalars.values() for tag in found}
    if unknown := [tag for tag in config.tags if tag not in known]:
        raise UserError(
            f"--tags {' '.join(unknown)}: nothing of this was logged; known are {', '.join(sorted(known))}."
        )
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_plot(output, draw(scalars, config.tags), 110)


if __name__ == "__main__":
    run(main)
