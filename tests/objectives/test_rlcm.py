"""Policy gradients of chains whose true gradients are known, and what PPO's clipping does."""

import logging

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, LCMScheduler
from torch import nn

from cm_diffusers.objectives.rlcm import RLCMConfig, RLCMObjective
from cm_diffusers.policy.policy import Moves, Policy
from cm_diffusers.policy.transitions import draw, log_prob
from cm_diffusers.types import Networks, Progress


N, GOAL = 400_000, 0.7
START = Progress(0, 1)


class Linear(nn.Module):
    """Predicts x0 = slope x + biases[step], one bias for each timestep, or one for all."""

    def __init__(self, policy: Policy, slope: float = 0.5, bias: float = 0.3, shared: bool = True):
        super().__init__()
        self.steps = {int(t): i for i, t in enumerate(policy.scheduler.timesteps)}
        self.biases = nn.Parameter(torch.full((1 if shared else policy.num_steps,), bias, dtype=torch.float64))
        self.slope = slope

    def forward(self, x, t, return_dict=False):
        step = self.steps[int(t[0])] if len(self.biases) > 1 else 0
        return (self.slope * x.double() + self.biases[step],)


def policy_of(steps: int, final_std: float = 0.0) -> Policy:
    return Policy(LCMScheduler(prediction_type="sample"), steps, final_std=final_std)


def reward_of(x, prompts=None):
    return -(x.double() - GOAL).square().flatten(1).sum(1)


def drawn(policy: Policy, network: nn.Module, shape: tuple[int, ...] = (1,), count: int = N) -> list[torch.Tensor]:
    """States, the noise first; with a gradient through all of them."""
    torch.manual_seed(0)
    states = [policy.start(torch.randn(count, *shape))]
    for index in range(policy.num_steps):
        taken = policy.transition(network, index, states[-1], {})
        states.append(draw(taken, torch.randn(count, *shape)))
    return states


def moves(states: list[torch.Tensor], index: int, **values) -> Moves:
    rewards = reward_of(states[-1].detach())
    given = {
        "advantage": (rewards - rewards.mean()).float(), "scale": torch.ones(len(rewards)), "reward": rewards,
        "prompt": torch.zeros(len(rewards), dtype=torch.int64), "index": index, "sample": states[index].detach(),
        "action": states[index + 1].detach(),
    }  # fmt: skip
    return Moves(None, **given | values)


def learnt(objective: RLCMObjective, network: nn.Module, states: list[torch.Tensor]) -> torch.Tensor:
    """Gradient of the expected reward, as the objective estimates it from all transitions together."""
    network.zero_grad()
    for index in range(objective.num_transitions):
        objective(Networks(network), moves(states, index), START).value.backward()
    return -network.biases.grad


def objective_of(policy: Policy, **config) -> RLCMObjective:
    settings = {"loss": "reinforce", "logprob_reduction": "sum", "adv_clip": 1e9}
    return RLCMObjective(RLCMConfig(**settings | config), policy, reward_of)


def true_gradient(policy: Policy, network: nn.Module) -> torch.Tensor:
    """By reparametrisation: through all states."""
    (gradient,) = torch.autograd.grad(reward_of(drawn(policy, network)[-1]).mean(), network.biases)
    return gradient


def test_hybrid_gradient_is_the_true_one():
    """Three steps that share a bias (RLCM leaves out what the last step does to the reward, and here gets the sign wrong)."""
    policy = policy_of(3)
    network = Linear(policy, slope=-1.0, bias=0.1)
    true = true_gradient(policy, network)
    states = [state.detach() for state in drawn(policy, network)]
    hybrid = learnt(objective_of(policy, final_step="pathwise"), network, states)
    assert hybrid.item() == pytest.approx(true.item(), rel=0.01)
    alone = learnt(objective_of(policy, final_step="drop"), network, states)
    assert alone.item() * true.item() < 0


def test_each_step_gets_its_own_gradient():
    policy, noisy = policy_of(2), policy_of(2, final_std=0.1)
    network = Linear(policy, shared=False)
    true = true_gradient(policy, network)
    states = [state.detach() for state in drawn(policy, network)]
    dropped = learnt(objective_of(policy, final_step="drop"), network, states)
    assert dropped[0].item() == pytest.approx(true[0].item(), rel=0.03)
    assert dropped[1] == 0
    states = [state.detach() for state in drawn(noisy, network)]
    stochastic = learnt(objective_of(noisy, final_step="stochastic"), network, states)
    assert stochastic[1].item() == pytest.approx(true[1].item(), abs=0.05)
    assert abs(true[1]) > 0.3


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_gaussian_bandit(reduction):
    """One step with noise: the gradient of E[-|a - c|^2] is -2 (mu - c); of the mean over D numbers, 1 / D of it."""
    policy = policy_of(1, final_std=0.5)
    network = Linear(policy, slope=0.0, bias=0.2)
    states = [state.detach() for state in drawn(policy, network, (4,))]
    found = learnt(objective_of(policy, final_step="stochastic", logprob_reduction=reduction), network, states)
    bias = network.biases.detach()
    expected = -2 * 4 * (bias - GOAL) / (4 if reduction == "mean" else 1)  # D = 4 numbers share the bias
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    first = learnt(
        objective_of(policy, final_step="stochastic", loss="ppo", logprob_reduction=reduction), network, states
    )
    assert torch.equal(first, found)


def clipped(advantage: float, ratio: float) -> float:
    """Size of the gradient where the probability is `ratio` times that when the action was drawn."""
    policy = policy_of(1, final_std=0.5)
    network = Linear(policy)
    states = [torch.zeros(1, 1), torch.ones(1, 1)]
    objective = RLCMObjective(RLCMConfig("stochastic", clip_range=0.1), policy)
    now = log_prob(policy.transition(network, 0, states[0], {}), states[1], "mean").detach()
    then = now - torch.tensor([ratio]).log()
    step = moves(states, 0, advantage=torch.tensor([advantage]), log_prob=then, is_fresh=False)
    objective(Networks(network), step, START).value.backward()
    return network.biases.grad.abs().item()


@pytest.mark.parametrize(
    ("advantage", "ratio", "learns"),
    [
        (1.0, 1.2, False),
        (1.0, 0.8, True),
        (-1.0, 0.8, False),
        (-1.0, 1.2, True),
        (1.0, 1.05, True),
        (-1.0, 0.95, True),
    ],
)
def test_ppo_stops_where_it_has_gone_far_enough(advantage, ratio, learns):
    assert (clipped(advantage, ratio) > 0) == learns


@pytest.mark.parametrize("sign", [1, -1])
def test_advantages_are_clipped(sign):
    policy = policy_of(1, final_std=0.5)
    network, states = Linear(policy), [torch.zeros(1, 1), torch.ones(1, 1)]
    found = []
    for advantage in (3.0, 100.0):
        network.zero_grad()
        step = moves(states, 0, advantage=torch.tensor([sign * advantage]))
        objective_of(policy, final_step="stochastic", adv_clip=3.0)(Networks(network), step, START).value.backward()
        found.append(network.biases.grad.item())
    assert found[0] == found[1] != 0


def test_a_policy_starts_and_ends_with_the_noise_that_it_says():
    """Standard normal noise times sigma_max; the last step, which adds none, gets `final_std`."""
    edm = Policy(CMStochasticIterativeScheduler(sigma_max=60.0), 2)
    assert edm.start(torch.ones(1, 1)).item() == pytest.approx(60.0, rel=1e-6)
    policy = policy_of(2, final_std=0.3)
    network = Linear(policy)
    assert float(policy.transition(network, 1, torch.zeros(1, 1), {}).std) == pytest.approx(0.3, rel=1e-6)
    following = float(policy.scheduler.alphas_cumprod[policy.scheduler.timesteps[1]])
    assert float(policy.transition(network, 0, torch.zeros(1, 1), {}).std) == pytest.approx((1 - following) ** 0.5)


def test_divergence_from_the_start_is_zero_there_and_holds_back_later():
    policy = policy_of(2)
    network, before = Linear(policy), Linear(policy)
    states = [state.detach() for state in drawn(policy, network, count=8)]
    objective = objective_of(policy, kl_coef=1.0)
    still = moves(states, 0, advantage=torch.zeros(8))
    assert objective(Networks(network, teacher=before), still, START).logs["kl"] == 0
    network.biases.data += 0.1
    value = objective(Networks(network, teacher=before), still, START)
    std = policy.transition(before, 0, states[0], {}).std
    signal = 1 - std.square()  # the mean is sqrt(signal) f, and f moves by almost the bias
    assert value.logs["kl"].item() == pytest.approx((signal * 0.01 / (2 * std.square())).item(), rel=1e-2)
    value.value.backward()
    assert network.biases.grad > 0


def test_rounding_beyond_the_clip_range_is_told_once(caplog):
    policy = policy_of(2)
    network = Linear(policy)
    states = [state.detach() for state in drawn(policy, network, count=8)]
    objective = RLCMObjective(RLCMConfig(), policy)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            objective(Networks(network), moves(states, 0, log_prob=torch.full((8,), -0.5)), START)
    assert caplog.text.count("The clip acts on") == 1


def test_one_step_cannot_be_learnt_by_dropping_it():
    with pytest.raises(ValueError, match="--final_step drop leaves out the last step, and there is no other"):
        RLCMObjective(RLCMConfig(), policy_of(1))
    with pytest.raises(ValueError, match="--clip_range must be positive, but it is 0"):
        RLCMObjective(RLCMConfig(clip_range=0.0), policy_of(2))


def test_a_sampler_with_noise_in_its_last_step_learns_from_all():
    policy = Policy(DDIMScheduler(set_alpha_to_one=False, steps_offset=1), 10, eta=1.0)
    assert policy.ends_random
    assert RLCMObjective(RLCMConfig(), policy).num_transitions == 10
    with pytest.raises(ValueError, match="pathwise is for a last step without noise"):
        RLCMObjective(RLCMConfig("pathwise"), policy)
    with pytest.raises(ValueError, match="The last step of DDIMScheduler adds noise already"):
        Policy(DDIMScheduler(set_alpha_to_one=False, steps_offset=1), 10, final_std=0.1)
