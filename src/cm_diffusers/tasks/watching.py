"""A look at the student now and then: a column of a small evaluation, an early stop by it, and the weights that were best."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from accelerate.utils import broadcast
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn
from transformers.hf_argparser import HfArg

from cm_diffusers.data.encoders import placed
from cm_diffusers.diffusion.process import home_of_float64
from cm_diffusers.engine.checkpoints import load_trainable_state, trainable_state, write_folder
from cm_diffusers.engine.cli import parse_words, refuse_changed
from cm_diffusers.engine.own_files import foreign_files, is_checkpoint_file, remove
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.comparison import Comparison, EvaluationConfig
from cm_diffusers.evaluation.quality import COLUMNS, LOWER_IS_BETTER
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.evaluation.report import Row, replace_file, write_plot
from cm_diffusers.models.families.base import network_of
from cm_diffusers.ranges import check_ranges
from cm_diffusers.tasks.callbacks import has_ended
from cm_diffusers.types import Loss


BEST, LOOKS = "best", "watch"  # of a run: best/step-<n>/student.safetensors, watch.json and watch.png


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
        data.check()
        return config, data


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
        self.config, self.comparison, self.make_pipeline, self.scale = (
            config,
            comparison,
            make_pipeline,
            guidance_scale,
        )
        path = trainer.output_dir / f"{LOOKS}.json"
        known = json.loads(path.read_text("utf-8")) if trainer.step and path.is_file() else {"looks": []}
        self.looks: list[Row] = [
            look | {"value": math.nan if look["value"] is None else look["value"]}
            for look in known["looks"]
            if look["step"] <= trainer.step
        ]

    @property
    def best(self) -> Row:
        """The look with the best value, the first of several."""
        return min(self.looks, key=lambda look: self._worth(look["value"]))

    def _worth(self, value: float) -> float:
        """Less is better; what is no number is worst."""
        return math.inf if math.isnan(value) else value if self.config.stop_when in LOWER_IS_BETTER else -value

    def __call__(self, trainer: Trainer, loss: Loss) -> None:
        if trainer.step % self.config.stop_interval and not has_ended(trainer):
            return
        value = torch.zeros((), dtype=torch.float64, device=home_of_float64(trainer.device))
        if trainer.accelerator.is_main_process:
            value += self._value(trainer)
        value = broadcast(value).item()  # or processes might disagree on stopping
        self.looks.append({"step": trainer.step, "value": value})
        if trainer.accelerator.is_main_process:
            self._keep(trainer)
        trainer.accelerator.log({f"watch/{self.config.stop_when}": value}, step=trainer.step)
        since = sum(look["step"] > self.best["step"] for look in self.looks)
        if since >= self.config.stop_patience:
            best = self.best
            trainer.stopping = (
                f"{self.config.stop_when} was {best['value']:.4g} at step {best['step']} and has not been better since, in {since} "
                "looks."
            )

    def _value(self, trainer: Trainer) -> float:
        config, column = self.comparison.config, self.config.stop_when
        with trainer.export_weights() as student, torch.no_grad():
            pipe = self.make_pipeline(student)
            network = pipe.unet if hasattr(pipe, "unet") else network_of(pipe)  # a UNet2DModel is of no family
            others = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not network]
            cast = network.dtype != torch.float32  # below a LoRA
            with placed(tuple(others), trainer.device), trainer.accelerator.autocast() if cast else nullcontext():
                rows = [self.comparison.look(pipe, n, self.scale) for n in config.num_inference_steps]
        values = [row[column] for row in rows]
        if None in values:
            raise UserError(
                f"--stop_when {column} cannot be measured on the images of --stop_evaluation: take another."
            )
        return sum(values) / len(values)

    def _keep(self, trainer: Trainer) -> None:
        """The weights of this step where they are the best, and all looks, to read and to see."""
        run, best, looks = trainer.output_dir, self.best["step"], self.looks
        if best == trainer.step:
            with trainer.export_weights() as student:
                write_folder(run / BEST / f"step-{best}", {"student": trainable_state(student)})
        for other in (run / BEST).glob("step-*"):
            if other.name != f"step-{best}" and not foreign_files(other, is_checkpoint_file):
                remove(other)
        told = [look | {"value": None if math.isnan(look["value"]) else look["value"]} for look in looks]
        content = json.dumps({"column": self.config.stop_when, "looks": told}, indent=1) + "\n"
        replace_file(run / f"{LOOKS}.json", lambda path: path.write_text(content, "utf-8"))
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.plot([look["step"] for look in looks], [look["value"] for look in looks], marker=".")
        axes.axvline(best, color="tab:green", linestyle=":")
        axes.set(xlabel="step", ylabel=self.config.stop_when, title=f"best at step {best}")
        axes.grid(alpha=0.3)
        write_plot(run / f"{LOOKS}.png", figure, 120)

    @contextmanager
    def best_weights(self, trainer: Trainer) -> Iterator[nn.Module]:
        """The student with what was best inside the block."""
        with trainer.export_weights() as student:
            last = {name: value.clone() for name, value in trainable_state(student).items()}
            load_trainable_state(
                student, load_file(trainer.output_dir / BEST / f"step-{self.best['step']}/student.safetensors")
            )
            try:
                yield student
            finally:
                load_trainable_state(student, last)


def make_watch(
    config: WatchConfig,
    make_pipeline: Callable[[nn.Module], DiffusionPipeline],
    guidance_scale: float,
    resolution: int | None,
) -> Callable[[Trainer], Watch | None]:
    """What gives a trainer its watch; whatever is wrong with the evaluation is told here, before anything long.

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
