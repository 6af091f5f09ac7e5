"""A look at the student now and then: a column of a small evaluation, an early stop by it, and the weights that were best."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from accelerate.utils import broadcast
from diffusers import DiffusionPipeline
from torch import nn
from transformers.hf_argparser import HfArg

from cm_diffusers.data.encoders import placed
from cm_diffusers.diffusion.process import home_of_float64
from cm_diffusers.engine.checkpoints import (
    PREFIX,
    list_checkpoints,
    load_trainable_state,
    trainable_state,
    write_folder,
)
from cm_diffusers.engine.cli import parse_words, refuse_changed
from cm_diffusers.engine.own_files import foreign_files, is_checkpoint_file, remove
from cm_diffusers.engine.parts import gathered
from cm_diffusers.engine.slices import Stored
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError, optional
from cm_diffusers.evaluation.comparison import Comparison, EvaluationConfig
from cm_diffusers.evaluation.quality import COLUMNS, LOWER_IS_BETTER
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.evaluation.report import Row, replace_file, write_plot
from cm_diffusers.models.families.base import network_of
from cm_diffusers.ranges import check_ranges
from cm_diffusers.tasks.callbacks import has_ended
from cm_diffusers.types import Loss


if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
BEST, LOOKS = "best", "watch"  # of a run: best/step-<n>/student.safetensors, watch.json and watch.png


OF_TABLES = "names guidance_scales gammas reference_steps dtype clip_model output_dir single_file_config"


@dataclass
class WatchConfig:
    """An early stop, and the best weights instead of the last."""

    stop_when: Literal[COLUMNS] | None = HfArg(
        default=None,
        help="Column of --stop_evaluation that has to go on getting better: training ends when it does not, and publishes the "
        "weights that were best. Nothing is watched if not given.",
    )
    stop_evaluation: str | None = HfArg(
        default=None,
        help="That small evaluation, a recipe of evaluate.py: reference images, --num_images, --num_inference_steps ...; the column "
        "is a mean over the numbers of steps.",
    )
    stop_interval: int = HfArg(default=500, help="Optimizer steps between looks; one more at the end.")
    stop_patience: int = HfArg(default=3, help="Looks without a better value after which training ends.")

    def __post_init__(self) -> None:
        check_ranges(self)

    def check(self) -> None:
        """
        Raises:
            ValueError: Flags that do not go together, or an evaluation that cannot be read.
        """
        if self.stop_when is None:
            refuse_changed(self, "stop_evaluation stop_interval stop_patience", "without --stop_when")
        elif self.stop_evaluation is None:
            raise UserError("--stop_when needs --stop_evaluation, a recipe of evaluate.py with reference images.")
        else:
            self.evaluation()

    def evaluation(self) -> tuple[EvaluationConfig, ReferenceConfig]:
        config, data = parse_words((EvaluationConfig, ReferenceConfig), "", ["--recipe", self.stop_evaluation])
        if config.pipelines or config.teacher:
            raise UserError(
                f"--stop_evaluation {self.stop_evaluation} names pipelines, but the student is measured alone: leave out "
                "--pipelines and --teacher."
            )
        refuse_changed(config, OF_TABLES, "in --stop_evaluation: the student is sampled as its grids are")
        data.check()
        return config, data


def best_file(run: Path, step: int) -> Path:
    return run / BEST / f"step-{step}" / "student.safetensors"


class Watch:
    """A steering callback; `make_watch` makes it.

    Args:
        config: With a column.
        comparison: Without pipelines of its own.
        make_pipeline: Of the network, as it will be published.
        guidance_scale: To sample with, where prompts are read.
        trainer: Whose looks up to its step are known, in its folder.
    """

    def __init__(
        self,
        config: WatchConfig,
        comparison: Comparison,
        make_pipeline: Callable[[nn.Module], DiffusionPipeline],
        guidance_scale: float,
        trainer: Trainer,
    ) -> None:
        self.config, self.comparison = config, comparison
        self.make_pipeline, self.scale = make_pipeline, guidance_scale
        settings = asdict(comparison.config) | asdict(comparison.data) if is_dataclass(comparison.config) else {}
        self.told = {
            "column": config.stop_when,
            "evaluation": json.loads(json.dumps(settings)),
            "scale": guidance_scale,
        }
        self.looks = self._known(trainer) if trainer.folder.continues else []
        if trainer.step == 0 and trainer.takes_part:
            self._value(trainer)  # what cannot be measured is told before training
        trainer.stopping = trainer.stopping or self._reason()

    def _known(self, trainer: Trainer) -> list[Row]:
        """Looks of the run up to its step; none where another column was looked at, or the best weights are gone."""
        path = trainer.output_dir / f"{LOOKS}.json"
        known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        looks = [
            look | {"value": math.nan if look["value"] is None else look["value"]}
            for look in known.pop("looks", [])
            if look["step"] <= trainer.step
        ]
        best = min(looks, key=lambda look: self._worth(look["value"]), default=None)
        if looks and (known != self.told or not best_file(trainer.output_dir, best["step"]).is_file()):
            why = "the best weights of then are gone" if known == self.told else "they were of another evaluation"
            logger.warning("The looks of %s do not count, for %s: --stop_when begins anew.", path, why)
            return []
        return looks

    @property
    def best(self) -> Row:
        """The look with the best value, the first of several."""
        return min(self.looks, key=lambda look: self._worth(look["value"]))

    def _best_until(self, step: int) -> int | None:
        """Of the looks that a run knows which goes on from a checkpoint of this step."""
        known = [look for look in self.looks if look["step"] <= step]
        return min(known, key=lambda look: self._worth(look["value"]))["step"] if known else None

    def _worth(self, value: float) -> float:
        """Less is better; what is no number is worst."""
        return math.inf if math.isnan(value) else value if self.config.stop_when in LOWER_IS_BETTER else -value

    def __call__(self, trainer: Trainer, loss: Loss) -> None:
        if trainer.step % self.config.stop_interval == 0 or has_ended(trainer):
            self._look(trainer)
            trainer.stopping = trainer.stopping or self._reason()

    def _reason(self) -> str:
        """To stop; "" if there is none."""
        since = sum(look["step"] > self.best["step"] for look in self.looks)
        if since < self.config.stop_patience:
            return ""
        seen = f"{self.config.stop_when} was {self.best['value']:.4g} at step {self.best['step']}"
        return f"{seen} and has not been better since, in {since} looks."

    def _look(self, trainer: Trainer) -> None:
        value = torch.zeros((), dtype=torch.float64, device=home_of_float64(trainer.device))
        if trainer.takes_part:
            value += self._value(trainer)
        value = broadcast(value).item()  # or processes might disagree on stopping
        self.looks.append({"step": trainer.step, "value": value})
        if trainer.takes_part:
            self._keep(trainer)
        with optional(f"The tracker at step {trainer.step}"):
            trainer.accelerator.log({f"watch/{self.config.stop_when}": value}, step=trainer.step)

    def _value(self, trainer: Trainer) -> float:
        config, column = self.comparison.config, self.config.stop_when
        with trainer.export_weights() as student, torch.no_grad():
            pipe = self.make_pipeline(student)
            network = pipe.unet if hasattr(pipe, "unet") else network_of(pipe)  # a UNet2DModel is of no family
            others = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not network]
            cast = network.dtype != torch.float32  # below a LoRA
            # the trainer's device, not the network's: offloaded parts of it lie on the CPU
            with placed(tuple(others), trainer.device), trainer.accelerator.autocast() if cast else nullcontext():
                rows = [self.comparison.look(pipe, n, self.scale) for n in config.num_inference_steps]
        if None in rows:  # images that are no numbers
            return math.nan
        values = [row[column] for row in rows]
        if None in values:
            raise UserError(
                f"--stop_when {column} cannot be measured on the images of --stop_evaluation: take another."
            )
        return sum(values) / len(values)

    def _keep(self, trainer: Trainer) -> None:
        """The weights of this step where they are the best, and all looks, to read and to see."""
        run, best, looks = trainer.output_dir, self.best["step"], self.looks
        is_main = trainer.accelerator.is_main_process
        if best == trainer.step:
            with trainer.export_weights() as student:
                weights = gathered(trainable_state(student), is_main)
                if is_main:
                    write_folder(run / BEST / f"step-{best}", {"student": weights})
        if not is_main:
            return
        steps = [int(path.name.removeprefix(PREFIX)) for path in list_checkpoints(run)]
        needed = {self._best_until(step) for step in [*steps, trainer.step]}
        for other in (run / BEST).glob("step-*"):
            if int(other.name.removeprefix("step-")) not in needed and not foreign_files(other, is_checkpoint_file):
                remove(other)
        told = [look | {"value": None if math.isnan(look["value"]) else look["value"]} for look in looks]
        content = json.dumps(self.told | {"looks": told}, indent=1) + "\n"
        replace_file(run / f"{LOOKS}.json", lambda path: path.write_text(content, "utf-8"))
        with optional("The plot of the looks"):
            write_plot(run / f"{LOOKS}.png", self._plot(), 120)

    def _plot(self) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes, best = figure.subplots(), self.best["step"]
        axes.plot([look["step"] for look in self.looks], [look["value"] for look in self.looks], marker=".")
        axes.axvline(best, color="tab:green", linestyle=":")
        axes.set(xlabel="step", ylabel=self.config.stop_when, title=f"best at step {best}")
        axes.grid(alpha=0.3)
        return figure

    @contextmanager
    def best_weights(self, trainer: Trainer) -> Iterator[nn.Module | None]:
        """The student with what was best inside the block, on the main process; None elsewhere."""
        with trainer.exported() as student:
            if student is None:
                yield None
                return
            own = trainable_state(student)
            last = {name: value.clone() for name, value in own.items()}
            load_trainable_state(student, Stored([best_file(trainer.output_dir, self.best["step"])]))
            try:
                yield student
            finally:
                for name, value in last.items():
                    own[name].copy_(value)


def make_watch(
    config: WatchConfig,
    make_pipeline: Callable[[nn.Module], DiffusionPipeline],
    guidance_scale: float,
    resolution: int | None,
) -> Callable[[Trainer], Watch | None]:
    """What gives a trainer its watch. The images and the extractor are loaded here, before anything long; whether the column can
    be measured shows a look before training.

    Args:
        resolution: Side of what is drawn.
    """
    if config.stop_when is None:
        return lambda trainer: None
    evaluation, data = config.evaluation()
    comparison = Comparison(evaluation, replace(data, resolution=data.resolution or resolution))

    def of(trainer: Trainer) -> Watch:
        watch = Watch(config, comparison, make_pipeline, guidance_scale, trainer)
        trainer.steering.append(watch)
        return watch

    return of
