"""sCM with distribution matching (rCM, 2510.08431): two players, on Gaussians."""

import copy
from pathlib import Path

import pytest
import torch
from oracles import Gaussian
from torch import nn
from toys import assert_same, toy_trainer

from cm_diffusers.diffusion.process import TrigFlow
from cm_diffusers.diffusion.teaching import Guiding, embedded_in_time
from cm_diffusers.diffusion.trigflow import TrigFlowView, velocity
from cm_diffusers.models.time_weight import WithTimeWeight
from cm_diffusers.objectives.scm import SCMConfig, SCMObjective
from cm_diffusers.types import Batch, Networks, Progress


D = 0.5  # sigma_data
DATA = Gaussian(0.3, 0.4)
NOW = Progress(1, 10)  # rollouts of two steps


class Teacher(nn.Module):
    def forward(self, shown, told, return_dict=True):
        return (velocity(DATA.predict(TrigFlow(D), shown * D, told), told, D).float() / D,)


class Affine(nn.Module):
    """F = (slope x + offset) by time."""

    def __init__(self):
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.tensor([0.0, -0.3])), nn.Parameter(torch.tensor([0.1, 0.1]))

    def forward(self, shown, told, return_dict=True):
        t = told.to(shown)[:, None] ** torch.arange(2.0)
        return ((t * self.slope).sum(1)[:, None] * shown + (t * self.offset).sum(1)[:, None],)


def objective(dmd_weight=0.01, **settings):
    settings = {"tangent_warmup_steps": 0, "learned_weight": False} | settings
    return SCMObjective(SCMConfig(**settings), TrigFlowView(D), dmd_weight=dmd_weight)


def networks(learned=False):
    student = Affine()
    return Networks(WithTimeWeight(student) if learned else student, teacher=Teacher(), critic=copy.deepcopy(student))


def value(method, nets, progress=NOW, player="student"):
    torch.manual_seed(0)
    return method.players[player](nets, Batch(torch.randn(8, 4)), progress)


@pytest.mark.parametrize("player", ["student", "critic"])
def test_a_turn_teaches_its_player_alone(player):
    nets = networks()
    value(objective(), nets, player=player).value.backward()
    for name, network in nets.items():
        assert [p.grad is not None for p in network.parameters()] == [name == player] * len([*network.parameters()])


def test_no_weight_is_the_plain_method():
    nets, method = networks(), objective(0.0)
    plain = SCMObjective(SCMConfig(tangent_warmup_steps=0, learned_weight=False), TrigFlowView(D))
    assert method.players.keys() == {"student"}
    found, wanted = value(method, nets), value(plain, Networks(nets.student, teacher=nets.teacher))
    assert_same(found.logs | {"value": found.value}, wanted.logs | {"value": wanted.value})


@pytest.mark.parametrize(("learned", "values"), [(False, 1), (True, 4)])
def test_the_weight_is_of_a_mean_or_beside_a_learned_weight_of_a_sum(learned, values):
    nets = networks(learned)
    with_it, without = (value(objective(weight, learned_weight=learned), nets) for weight in (0.01, 0.0))
    assert with_it.logs["matching"] > 0.1
    wanted = without.value + 0.01 * values * with_it.logs["matching"]
    torch.testing.assert_close(with_it.value, wanted, rtol=1e-6, atol=0)


def test_it_begins_when_the_tangent_is_warm():
    nets, method = networks(), objective(tangent_warmup_steps=2)
    seen = [value(method, nets, Progress(step, 10), player) for player in ("critic", "student") for step in (1, 2)]
    assert [loss is None for loss in seen] == [True, False, False, False]
    assert ["matching" in loss.logs for loss in seen[2:]] == [False, True]


def test_the_fake_score_is_told_the_student_s_guidance():
    class Guided(Affine):
        def forward(self, shown, told, timestep_cond, return_dict=True):
            self.guidance = timestep_cond
            return super().forward(shown, told)

    nets = Networks(Guided(), teacher=Teacher(), critic=Guided())
    guiding = Guiding(told=embedded_in_time(16))
    method = SCMObjective(SCMConfig(tangent_warmup_steps=0), TrigFlowView(D), (1.0, 3.0), guiding, dmd_weight=0.01)
    method.score(nets, Batch(torch.randn(4, 2), {}, {"unused": torch.zeros(4)}), NOW)
    assert nets.critic.guidance.shape == (4, 16)
    assert torch.equal(nets.critic.guidance, nets.student.guidance)


def test_every_turn_calls_the_networks_equally_often():
    """Whatever is drawn: rollouts of 1 to 4 steps, by the number of the training step."""
    calls, method, nets = [], objective(), networks()
    for name, network in nets.items():
        network.register_forward_hook(lambda *_, name=name: calls.append(name))
    counts = {}
    for step in range(4):
        for player in method.players:
            calls.clear()
            value(method, nets, Progress(step, 10), player)
            counts[step, player] = [calls.count(name) for name in ("student", "teacher", "critic")]
    tangent_and_pass = 2
    assert counts == {
        (step, player): [step + 1 + tangent_and_pass, 2, 1] if player == "student" else [step + 1, 0, 1]
        for step in range(4)
        for player in ("student", "critic")
    }


def source(start):
    while True:
        generator = torch.Generator().manual_seed(start)
        yield Batch(DATA.mean + DATA.std * torch.randn(256, 4, generator=generator))
        start += 1


def test_players_learn_in_turns_and_resume_bit_exactly(tmp_path: Path):
    def trained(folder, **config):
        trainer = toy_trainer(folder, networks(), objective(0.1), **config)
        trainer.fit(source)
        return trainer

    whole = trained(tmp_path / "run", max_train_steps=4, checkpointing_steps=2)
    again = trained(tmp_path / "again", max_train_steps=4, resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for name in ("student", "critic"):
        found = getattr(again.nets, name).state_dict()
        assert_same(found, getattr(whole.nets, name).state_dict())
        assert not torch.equal(found["slope"], Affine().slope)


class Learned(nn.Module):
    """The diffusion model of N(mean, std^2), which learn."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))

    def forward(self, shown, told, return_dict=True):
        law = Gaussian(self.mean, self.std)
        return (velocity(law.predict(TrigFlow(D), shown * D, told), told, D).float() / D,)


def test_both_players_arrive_at_the_data():
    """By matching alone, in one step, from N(-0.4, 0.2^2): the students' samples, and what the fake score knows of them."""
    torch.manual_seed(0)
    nets, method, like, steps = networks(), objective(), torch.zeros(64, 4), 200
    nets.critic = Learned(0.0, 0.3)
    denoisers = [method.denoiser(network, {}) for network in (nets.student, nets.teacher, nets.critic)]
    losses = {
        "student": lambda: method.matching.student_loss(*denoisers, like, 0),
        "critic": lambda: method.matching.fake_loss(denoisers[0], denoisers[2], like, 0),
    }
    rates = {"student": 0.03, "critic": 0.1}  # a score that lags behind makes both swing about the data
    optimizers = {
        name: torch.optim.Adam(getattr(nets, name).parameters(), rate, (0.5, 0.99)) for name, rate in rates.items()
    }
    decays = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps) for optimizer in optimizers.values()]
    for _ in range(steps):
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            losses[name]().mean().backward()
            optimizer.step()
        for decay in decays:
            decay.step()
    x0 = method.matching.rollout(denoisers[0], torch.zeros(20_000, 4), 0).detach()
    assert x0.mean().item() == pytest.approx(DATA.mean, abs=0.015)
    assert x0.std().item() == pytest.approx(DATA.std, rel=0.04)
    assert nets.critic.mean.item() == pytest.approx(DATA.mean, abs=0.015)
    assert nets.critic.std.abs().item() == pytest.approx(DATA.std, rel=0.04)
