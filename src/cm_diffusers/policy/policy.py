"""Multi-step sampling as a decision process: a network with its scheduler as a stochastic policy (2404.03673, Sec. 4)."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from cm_diffusers.diffusion.denoisers import Call, call_unet
from cm_diffusers.diffusion.guidance import Combine, combine_linear
from cm_diffusers.diffusion.process import RectifiedFlow, home_of_float64, interpret, moved_to
from cm_diffusers.errors import UserError
from cm_diffusers.policy.transitions import Transition, draw, transition
from cm_diffusers.schedulers.scheduling_flow_consistency import FlowConsistencyScheduler
from cm_diffusers.types import Batch


Conditions = dict[str, Tensor]


@dataclass(kw_only=True)
class Moves(Batch):
    """One transition of each of B samples, to learn from; `cond` and `uncond` are the network's arguments.

    Attributes:
        index: Which step of sampling it was.
        sample, action: Where it started and where it went, each `(B, ...)`.
        advantage: Of the finished sample `(B,)`; `scale` `(B,)` is what rewards were divided by for it.
        reward: Of the finished sample `(B,)`.
        prompt: Number of its prompt `(B,)`.
        log_prob: Of the action when it was taken `(B,)`; None where nothing has been learnt since.
        is_fresh: Whether no step has been made since.
    """

    index: int
    sample: Tensor
    action: Tensor
    advantage: Tensor
    scale: Tensor
    reward: Tensor
    prompt: Tensor
    log_prob: Tensor | None = None
    is_fresh: bool = True

    def to(self, device: torch.device | str) -> "Moves":
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("x0", "cond", "uncond")}
        conditions, exact = super().to(device), home_of_float64(torch.device(device))
        moved = {
            name: value.to(exact if value.dtype == torch.float64 else device)
            for name, value in own.items()
            if isinstance(value, Tensor)
        }
        return replace(self, cond=conditions.cond, uncond=conditions.uncond, **moved)

    @property
    def size(self) -> int:
        """B."""
        return len(self.sample)


class Policy:
    """The steps of a scheduler as Gaussian transitions whose means the network decides.

    Args:
        scheduler: Of those that `transition` knows; a copy is kept.
        num_inference_steps: H.
        guidance_scale: Above 1, means are of classifier-free guidance, in diffusers' convention.
        final_std: Noise of the last step, which has none in sampling.
        eta: Of schedulers that take it (DDIM, TCD).
        call: How networks are called: with the scheduler's timesteps, or with the times of a flow where they are shares of its.
        combine: Of the two branches of guidance, as the pipeline does it; of flows one that is not linear, too.

    Attributes:
        ends_random: Whether the last step adds noise, too.

    Raises:
        ValueError: The scheduler adds no noise or is not known, or its last step has noise without `final_std`.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        final_std: float = 0.0,
        eta: float = 1.0,
        call: Call = call_unet,
        combine: Combine = combine_linear,
    ) -> None:
        scheduler = copy.deepcopy(scheduler)  # the pipeline's own follows whoever samples with it
        scheduler.set_timesteps(num_inference_steps)
        self.scheduler, self.num_steps = scheduler, scheduler.num_inference_steps
        self.guidance_scale, self.final_std, self.eta = guidance_scale, final_std, eta
        self.call, self.combine = call, combine
        zero = torch.zeros(1, 1)
        *before, last = (float(transition(scheduler, i, zero, zero, eta=eta).std) for i in range(self.num_steps))
        if 0.0 in before:
            raise UserError(
                f"Step {before.index(0.0) + 1} of {self.num_steps} adds no noise, so nothing can be learnt from it; take fewer "
                "--num_inference_steps."
            )
        self.ends_random = last > 0
        if self.ends_random and final_std:
            raise UserError(
                f"The last step of {type(scheduler).__name__} adds noise already, so it is learnt from as the others are: "
                "take --final_step drop."
            )
        self.ends_random = self.ends_random or final_std > 0

    @property
    def passes(self) -> int:
        """Of the network through a sample, in a step."""
        return 2 if self.guidance_scale > 1 else 1

    def start(self, noise: Tensor) -> Tensor:
        return noise * float(self.scheduler.init_noise_sigma)

    def transition(
        self, network: Callable, index: int, sample: Tensor, cond: Conditions, uncond: Conditions | None = None
    ) -> Transition:
        """The law of the next sample `(B, ...)`.

        Args:
            network: Called by `call`.
            index: Which step, from 0.
            cond, uncond: Arguments of the network; the second where there is guidance.
        """
        found = transition(
            self.scheduler, index, self._output(network, index, sample, cond, uncond), sample, eta=self.eta
        )
        ends = index == self.num_steps - 1 and self.final_std
        return found._replace(std=torch.full_like(found.std, self.final_std)) if ends else found

    def walk(
        self,
        network: Callable,
        noise: Tensor,
        cond: Conditions,
        uncond: Conditions | None = None,
        gradient_from: int = 0,
    ) -> Iterator[tuple[int, Tensor, Transition, Tensor]]:
        """Samples with standard normal noise `(H + 1, B, ...)`: of each step its index, start, law and end.

        Args:
            gradient_from: The first step whose gradient is kept, where gradients are on.
        """
        sample = self.start(noise[0])
        for index in range(self.num_steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= gradient_from):
                taken = self.transition(network, index, sample, cond, uncond)
                action = draw(taken, noise[index + 1])
            yield index, sample, taken, action
            sample = action

    def _output(
        self, network: Callable, index: int, sample: Tensor, cond: Conditions, uncond: Conditions | None
    ) -> Tensor:
        told = moved_to(self.scheduler.timesteps[index], sample)
        x = copy.copy(self.scheduler).scale_model_input(sample, told)  # some keep the step that they were asked for
        if isinstance(self.scheduler, FlowConsistencyScheduler):
            told = told / self.scheduler.config.num_train_timesteps
        if self.guidance_scale <= 1:
            return self.call(network, x, told.expand(len(x)), cond).float()
        both = {name: torch.cat([uncond[name], cond[name]]) for name in cond}
        negative, positive = self.call(network, torch.cat([x, x]), told.expand(2 * len(x)), both).float().chunk(2)
        if self.combine is combine_linear:
            return negative + self.guidance_scale * (positive - negative)
        return self._combined(positive, negative, x, told.expand(len(x)))

    def _combined(self, positive: Tensor, negative: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of a flow at x `(B, ...)` and t `(B,)`, of those of the two branches."""
        flow, w = RectifiedFlow(), torch.full_like(t, self.guidance_scale - 1)
        branches = (interpret(flow, output, x, t, "flow_prediction") for output in (positive, negative))
        x0, noise = self.combine(*branches, w, t)
        return noise - x0
