"""The only training loop. It knows players, batches and progress, and no method."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from cm_diffusers.engine import checkpoints
from cm_diffusers.engine.accelerator import any_rank, make_accelerator, start_trackers
from cm_diffusers.engine.averages import Averages, ema_update
from cm_diffusers.engine.branching import check_stages
from cm_diffusers.engine.identity import run_defaults, run_identity
from cm_diffusers.engine.interrupts import stop_request
from cm_diffusers.engine.looks import Looks, Turn, is_looked_at, is_saved, stacked
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.parts import filled, gathered, skeleton
from cm_diffusers.engine.player import Player, only_trains
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.run_folder import RunFolder
from cm_diffusers.engine.sharding import place, sharding_of
from cm_diffusers.engine.snapshots import is_due, write_weights
from cm_diffusers.engine.state import load_state, write_state
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.errors import UserError, optional, writable
from cm_diffusers.models.execution import to_channels_last
from cm_diffusers.models.recomputation import recompute_activations
from cm_diffusers.types import Batch, Loss, Networks, Objective, Progress


logger = logging.getLogger(__name__)


class Trainer:
    """Accumulate, clip, step, average, log, checkpoint, resume.

    Everything random in a step is drawn from (seed, rank, step), so a checkpoint needs no generator state
    and nothing done between steps (validation grids, saving) can change the run.

    Args:
        config: See `TrainConfig`.
        nets: Of which those players' parameters train that require gradients; or what makes them of `place`, called last.
        objective: The method.
        optim: How the players learn: one config for all, or one per player.
        settings: Dataclasses with whatever else a resumed run must share, such as the data's.
        callbacks: `(trainer, loss) -> None` after each optimizer step and its checkpoint, on every rank; they only show
            something, so one that fails is a warning. They do not wait for other ranks. To read the loss is to wait for the
            device.

    Attributes:
        place: Rank, number of ranks and device, as sources of batches take them.
        sharding: How networks are parted among the ranks; None where each has them whole.
        steering: Callbacks that are part of the run, before the checkpoint, which has what they keep; one that fails ends it.
        stopping: Why training ends after this step; those set it, on all ranks alike.
    """

    def __init__(
        self,
        config: TrainConfig,
        nets: Networks | Callable[..., Networks],
        objective: Objective,
        optim: OptimConfig | dict[str, OptimConfig],
        settings: Iterable[object] = (),
        callbacks: Iterable[Callable[["Trainer", Loss], None]] = (),
    ) -> None:
        self.config, self.objective, self.callbacks = config, objective, list(callbacks)
        self.steering: list[Callable[[Trainer, Loss], None]] = []
        self.output_dir, self.step, self.stopping = Path(config.output_dir), 0, ""
        self.source, self.source_state = None, {}
        optims = optim if isinstance(optim, dict) else dict.fromkeys(objective.players, optim)
        self.accelerator = make_accelerator(config.mixed_precision, config.report_to, config.output_dir)
        self.sharding = sharding_of(self.accelerator, getattr(objective, "takes_derivatives", False))
        self.place = self.accelerator.process_index, self.accelerator.num_processes, self.device
        settings = [config, objective.config, *settings]
        self.identity = run_identity(type(objective).__name__, self.accelerator.num_processes, *settings, **optims)
        if getattr(objective, "spans_training", False):
            self.identity["max_train_steps"] = config.max_train_steps
        defaults = run_defaults(*settings, **optims)
        self.folder = RunFolder(config, self.identity, defaults, settings[1:], self.accelerator)
        self.nets = nets(*self.place) if callable(nets) else nets
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        if self.sharding is not None:
            self.sharding.check(self.nets, optims.values(), config.channels_last)
            self._skeleton = skeleton(self.nets.student)
        place(self.nets, self.sharding, self.device, config.compile)
        if config.channels_last:
            to_channels_last([module for _, module in self.nets.items()])
        self.averages = Averages(self.nets.student, config.export_ema_decay, config.ema_sigma_rels)
        self.looks, self.ahead = Looks(self.accelerator, config), []
        self.players = [self._make_player(name, optims[name]) for name in objective.players]
        cooldowns = [player.optim.cooldown_of(config.max_train_steps) for player in self.players]
        is_branch = self.folder.checkpoint is not None and not self.folder.continues
        check_stages(objective, cooldowns, config.max_train_steps, is_branch)
        self._resume()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def progress(self) -> Progress:
        return Progress(self.step, self.config.max_train_steps)

    @property
    def student(self) -> nn.Module:
        """The student without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.nets.student)

    def fit(self, batches: Callable[[int], Iterator[Batch]]) -> None:
        """Train to `max_train_steps`, then leave a last checkpoint.

        Args:
            batches: Data source; called with the number of micro-batches this rank has already seen. One with `state` and
                `load_state` (named tensors, on all ranks) has them in checkpoints; with `fingerprint`, of the data, a
                resumed run must have the same.

        Raises:
            ValueError: The folder is in use, the data are others than before, or a checkpoint cannot be written.
            FloatingPointError: A loss or gradient was not finite: its step changed nothing, and the last checkpoint stands.
                Found when the run is next looked at: every `logging_steps`, at the end and before anything is written.
            SystemExit: SIGINT or SIGTERM arrived, in several processes before the last look; a checkpoint was written.
        """
        config, self.source, self.ahead = self.config, batches, []
        self.folder.know_data(getattr(batches, "fingerprint", None))
        if self.source_state:
            with checkpoints.undamaged(self.folder.checkpoint):
                batches.load_state(self.source_state)
        stream = iter(batches(self.step * config.gradient_accumulation_steps))
        with self.folder.claimed(self.step):
            with writable(f"The tracker's folder in {self.output_dir}"):
                start_trackers(self.accelerator, config.report_to, config.tracker_project_name, self.identity)
            self._fit(stream)
        if self.stopping:
            logger.warning("Training ended at step %d of %d: %s", self.step, config.max_train_steps, self.stopping)

    def _fit(self, stream: Iterator[Batch]) -> None:
        config, last_saved, alone = self.config, self.step, self.accelerator.num_processes == 1
        quiet = not self.accelerator.is_local_main_process
        with stop_request() as request, tqdm(initial=self.step, total=config.max_train_steps, disable=quiet) as bar:
            while self.step < config.max_train_steps and not self.stopping:
                with self.looks.measured():
                    loss, images = self.training_step(stream)
                    self._take_ahead(stream)
                    self.looks.seen += images
                    values = self.looks.values(loss) if self._looks else {}
                bar.update()
                self.looks.show(self.step, values, bar)
                for callback in self.steering:
                    callback(self, loss)
                self._keep_weights()
                if self._saves:
                    last_saved = self._save_sound()
                for callback in self.callbacks:
                    with optional(f"What shows step {self.step}"):
                        callback(self, loss)
                # all leave at the same step
                if (alone or self._looks) and any_rank(self.accelerator, request.arrived):
                    if last_saved != self.step:
                        self._save_sound()
                    raise SystemExit(
                        f"Stopped {'by a signal' if request.signum else 'without a launcher'} at step {self.step}; "
                        "continue with --resume_from_checkpoint latest."
                    )

    @property
    def _saves(self) -> bool:
        """Whether a checkpoint is due after the step just taken."""
        return bool(self.stopping) or is_saved(self.step, self.config)

    @property
    def _looks(self) -> bool:
        """Whether the step just taken is looked at, by all ranks."""
        return self._saves or is_looked_at(self.step, self.config)

    def _save_sound(self) -> int:
        self.looks.check()
        return self.save()

    def end(self) -> None:
        """The result is written: what this run has replaced goes, and the tracker is closed."""
        self.folder.end()
        self.accelerator.end_training()

    def training_step(self, stream: Iterator[Batch]) -> tuple[Loss, int]:
        """One optimizer step of every player; returns the mean loss of the first and the images seen by all ranks."""
        rank, progress, losses, logs = self.accelerator.process_index, self.progress, [], {}
        batches, self.ahead = self.ahead or self._take(stream), []
        for turn, player in enumerate(self.players, start=1):
            seed_everything(self.config.seed, rank, self.step, turn)
            with only_trains(player, self.players):
                loss = self._accumulate(player, batches, progress)
            if loss is not None:
                losses.append(loss)
                logs |= loss.logs | player.update(loss)
                self.looks.turns.append(Turn(self.step, player.name, loss.value, logs[f"{player.name}/grad_norm"]))
        self.step += 1
        skipped = self.players[0].skipped
        if self.nets.target is not None:
            decay = getattr(self.objective, "target_decay", lambda progress: self.config.ema_decay)
            ema_update(self.nets.target, self.student, decay(progress), skipped)
        self.averages.update(self.step, skipped)
        return Loss(losses[0].value, logs), sum(b.size for b in batches) * self.accelerator.num_processes

    def _accumulate(self, player: Player, batches: list[Batch], progress: Progress) -> Loss | None:
        """Back-propagate the mean loss over the micro-batches; returns means over micro-batches and ranks."""
        rows = []
        for batch in batches:
            syncs = player.is_sharded or batch is batches[-1]  # whole gradients of a sharded one would not fit
            with nullcontext() if syncs else self.accelerator.no_sync(player.network):
                with self.accelerator.autocast():
                    loss = self.objective.players[player.name](self.nets, batch, progress)
                if loss is None:
                    return None
                self.accelerator.backward(loss.value / len(batches))
            rows.append(stacked([loss.value, *loss.logs.values()], loss.value))
        value, *logs = self.accelerator.reduce(torch.stack(rows).mean(0), reduction="mean")
        return Loss(value, dict(zip(loss.logs, logs, strict=True)))

    def _take(self, stream: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of the next step; the seed is for sources that sample, such as rollouts."""
        seed_everything(self.config.seed, self.accelerator.process_index, self.step, 0)
        return [next(stream).to(self.device) for _ in range(self.config.gradient_accumulation_steps)]

    def _take_ahead(self, stream: Iterator[Batch]) -> None:
        """Make the next step's batches while the device is busy with this one.

        Not of a source with a state, which a checkpoint must find as this step left it and weights may enter; nor before a
        checkpoint, which a source that fails must not prevent.
        """
        if not (self._saves or hasattr(self.source, "state")):
            self.ahead = self._take(stream)

    @contextmanager
    def export_weights(self) -> Iterator[nn.Module]:
        """The student as it would be published: with averaged weights where `export_ema_decay` is set.

        To sample with: a sharded one by all processes alike, see `takes_part`; to save, see `exported`.
        """
        student = self.student
        was_training = student.training
        rounded = self.sharding is not None and self.sharding.dtype is not None  # when gathered
        with self.averages.applied(), self.accelerator.autocast() if rounded else nullcontext():
            try:
                yield student.eval()
            finally:
                student.train(was_training)

    @contextmanager
    def exported(self) -> Iterator[nn.Module | None]:
        """The whole student of `export_weights` on the main process, None elsewhere; entered by all."""
        with self.export_weights() as student:
            is_main = self.accelerator.is_main_process
            if self.sharding is None:
                yield student if is_main else None
                return
            weights = gathered(student.state_dict(), is_main)
        yield filled(self._skeleton, weights) if is_main else None

    @property
    def takes_part(self) -> bool:
        """Whether this process takes part in passes between steps: the main one, or all where the student is sharded."""
        return self.accelerator.is_main_process or self.sharding is not None

    def save(self) -> int:
        """Write a checkpoint and return its step: by the main process, or each its part of what is sharded.

        Raises:
            ValueError: It cannot be written; the one before stands.
        """
        source = self.source.state() if hasattr(self.source, "state") else {}
        if self.takes_part:
            write_state(self, source)
        self.accelerator.wait_for_everyone()
        return self.step

    def _keep_weights(self) -> None:
        config = self.config
        if self.takes_part and is_due(self.step, config.snapshot_steps, config.snapshot_window):
            write_weights(self.output_dir, self.step, self.student, self.accelerator.is_main_process)

    def _resume(self) -> None:
        """From the folder's checkpoint, or from the one before if that is damaged."""
        while self.folder.checkpoint:
            try:
                self.source_state = load_state(self, self.folder.checkpoint)
                break
            except checkpoints.DamagedCheckpointError as error:
                self.folder.fall_back(error)
        if self.step > (steps := self.config.max_train_steps):
            raise UserError(
                f"--max_train_steps {steps} is less than the {self.step} of {self.folder.checkpoint}: give more steps."
            )

    def _make_player(self, name: str, optim: OptimConfig) -> Player:
        if self.config.gradient_checkpointing:
            recompute_activations(getattr(self.nets, name))
        return Player(name, self.nets, optim, self.config.max_train_steps, self.accelerator)
