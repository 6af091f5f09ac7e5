"""What a method of jumps is told of its teacher: times, noise, how networks are called, how guidance reaches them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cm_diffusers.diffusion.denoisers import Call, as_denoiser, call_unet
from cm_diffusers.diffusion.guidance import (
    Combine,
    ConditionalDenoiser,
    Conditions,
    Denoiser,
    combine_linear,
    guidance_embedding,
    guide,
    target_embedding,
)
from cm_diffusers.diffusion.preconditioning import lcm_scalings
from cm_diffusers.diffusion.process import DiscreteVP, Process, RectifiedFlow, append_dims, as_like, exact
from cm_diffusers.diffusion.solvers import SOLVERS, moved
from cm_diffusers.diffusion.times import shifted, shifted_grid, solver_grid
from cm_diffusers.errors import UserError
from cm_diffusers.types import Batch


FLOW_POINTS = 1000  # times of a flow between 0 and 1 that methods draw from which are not bound to the sampler's grid
Guidance = Literal["cfg", "embedded", "none"]
Told = Callable[[Conditions, Tensor], Conditions]  # (conditions, w (B,)) -> of a network that is told its guidance


@dataclass(frozen=True, eq=False)
class Guiding:
    """How guidance reaches teacher and student.

    Attributes:
        kind: How the teacher is guided: by a second pass, by a number that it is told, or not at all.
        told: Of a student, and of a teacher with embedded guidance; None where guidance goes into the weights.
        combine: Of the teacher's two branches.
    """

    kind: Guidance = "cfg"
    told: Told | None = None
    combine: Combine = combine_linear

    def student(self, cond: Conditions, w: Tensor) -> Conditions:
        """What a student is told with guidance w `(B,)`."""
        return cond if self.told is None else self.told(cond, w)

    def teacher(self, denoise: ConditionalDenoiser, batch: Batch, w: Tensor) -> Denoiser:
        """The teacher with guidance w `(B,)`; without a second pass where it is told, or takes none."""
        if self.kind == "cfg":
            return guide(denoise, batch.cond, batch.uncond, w, self.combine)
        cond = self.told(batch.cond, w) if self.kind == "embedded" else batch.cond
        return lambda x_t, t: denoise(x_t, t, cond)


@dataclass(frozen=True, eq=False)
class Teaching:
    """One process, in which teacher and student are called, noised and guided alike.

    Attributes:
        process: In whose times and coordinates networks are called.
        prediction_type: Of their outputs, see `interpret`.
        times: All times of training `(T,)`, ascending; of the first one nothing is learnt.
        grid: Those of the sampler `(N,)`, ascending.
        before: For each of the grid, the time one spacing below it `(N,)`.
        scalings: t `(B,)` -> c_skip and c_out `(B,)` of the jump c_skip x_t + c_out x0.
        call: How a network is called.
        guiding: How guidance reaches teacher and student.
        target_dim: Size of the embedding of where a jump ends; None for a student that is not told.
    """

    process: Process
    prediction_type: str
    times: Tensor
    grid: Tensor
    before: Tensor
    scalings: Callable[[Tensor], tuple[Tensor, Tensor]]
    call: Call = call_unet
    guiding: Guiding = Guiding()
    target_dim: int | None = None

    @property
    def starts_from_noise(self) -> bool:
        """Whether the last time holds no signal."""
        return bool(self.process.alpha(self.times[-1:]) <= 0)

    def check_start(self, bears_noise: bool, cure: str, chosen: str) -> None:
        """
        Args:
            bears_noise: Whether the teacher's steps may start where no signal is.
            cure: Flag that makes them.
            chosen: What was chosen instead.

        Raises:
            ValueError: The last time holds no signal, and the network's prediction or the teacher's steps need some; of a
                rectified flow neither does.
        """
        if isinstance(self.process, RectifiedFlow) or not self.starts_from_noise:
            return
        if self.prediction_type == "epsilon" or not bears_noise:
            raise UserError(
                "The teacher has zero terminal SNR: its last timestep holds no signal, which needs a v-prediction or sample "
                f"teacher and {cure}; this is {self.prediction_type} with {chosen}."
            )

    def pairs(self, batch_size: int, power: float = 0.0) -> tuple[Tensor, Tensor]:
        """Times t `(B,)` of the grid, the k-th with a chance proportional to k^power, and s `(B,)` below them."""
        if power == 0:
            number = torch.randint(len(self.grid), (batch_size,))
        else:
            chances = torch.arange(1, len(self.grid) + 1, dtype=torch.float64) ** power
            number = torch.multinomial(chances, batch_size, replacement=True)
        return self.grid[number], self.before[number]

    def denoiser(self, network: nn.Module) -> ConditionalDenoiser:
        return as_denoiser(network, self.process, self.prediction_type, self.call)

    def guided(self, teacher: nn.Module, batch: Batch, w: Tensor) -> Denoiser:
        """The teacher with guidance w `(B,)`."""
        return self.guiding.teacher(self.denoiser(teacher), batch, w)

    def jump(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions, w: Tensor | None) -> Tensor:
        """f(x_t, t) = c_skip x_t + c_out x0 (2310.04378, Sec. 4.1), `(B, ...)`, as the scheduler's step computes it.

        Args:
            w: What a student that is told its guidance is told; None where there is none to tell.
        """
        cond = cond if w is None else self.guiding.student(cond, w)
        x0 = self.denoiser(network)(x_t, t, cond).x0
        c_skip, c_out = self.scalings(t)
        return append_dims(c_skip, x_t) * x_t + append_dims(c_out, x_t) * x0

    def jump_to(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Conditions,
        w: Tensor | None,
        solver: str = "ddim",
    ) -> Tensor:
        """The trajectory function f(x_t, t, s) (2402.19159, Sec. 4.1), `(B, ...)`: a step of the network's own prediction.

        Args:
            s: Where it ends `(B,)`, at or below t; at t it is x_t itself, whatever the network says.
            w: As for `jump`.
            solver: One of `SOLVERS`; of the second order it asks the network twice.
        """
        cond = cond if w is None else self.guiding.student(cond, w)
        if self.target_dim is not None:
            cond = with_target(cond, as_like(target_embedding(s, self.target_dim), x_t))
        denoise = self.denoiser(network)
        x_s = SOLVERS[solver](lambda x, time: denoise(x, time, cond), self.process, x_t, t, s)
        return moved(t, s, x_t, x_s)


def with_target(cond: Conditions, embedding: Tensor) -> Conditions:
    """Conditions of a UNet that is told where its jump ends `(B, dim)`, beside its guidance where it is told that."""
    guidance = [cond["timestep_cond"]] if "timestep_cond" in cond else []
    return cond | {"timestep_cond": torch.cat([*guidance, embedding], 1)}


def vp_teaching(
    process: DiscreteVP,
    prediction_type: str,
    guidance_embedding_dim: int | None,
    num_solver_steps: int = 50,
    timestep_scaling: float | None = 10.0,
) -> Teaching:
    """Of a UNet of Stable Diffusion, on the grid and with the scalings of LCM (2310.04378).

    Args:
        process: Of the teacher.
        prediction_type: What teacher and student predict.
        guidance_embedding_dim: Of the student, or None where it has none (LoRA).
        num_solver_steps: Points of the grid.
        timestep_scaling: Scale of t in the scalings; None for jumps without: f is x0.
    """
    grid = solver_grid(process.num_train_timesteps, num_solver_steps)
    return Teaching(
        process,
        prediction_type,
        torch.arange(process.num_train_timesteps),
        grid,
        (grid - int(grid[0]) - 1).clamp(min=0),
        without_scalings if timestep_scaling is None else lambda t: lcm_scalings(t, timestep_scaling),
        guiding=Guiding(told=None if guidance_embedding_dim is None else embedded_in_time(guidance_embedding_dim)),
    )


def without_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out `(B,)` of f = x0."""
    return torch.zeros_like(exact(t)), torch.ones_like(exact(t))


def embedded_in_time(dim: int) -> Told:
    """For a UNet with an embedding of guidance, as diffusers' LCM pipelines make it."""
    return lambda cond, w: cond | {"timestep_cond": guidance_embedding(w, dim)}


def flow_teaching(call: Call, shift: float, num_solver_steps: int = 50, guiding: Guiding = Guiding()) -> Teaching:
    """Of a network of a rectified flow, whose jump x_t - t v is the data itself at t = 0.

    Args:
        call: Of its family.
        shift: Of the grid, see `shifted_grid`; the sampler must know it.
        num_solver_steps: Points of the grid.
        guiding: Of its family.
    """
    grid = shifted_grid(num_solver_steps, shift)
    share = torch.arange(FLOW_POINTS + 1, dtype=torch.float64) / FLOW_POINTS
    return Teaching(
        RectifiedFlow(),
        "flow_prediction",
        shifted(share, shift),
        grid,
        torch.cat([grid.new_zeros(1), grid[:-1]]),
        without_scalings,
        call,
        guiding,
    )
