"""Training on an Apple GPU, which has no float64: losses and gradients are those of the CPU."""

import sys

import pytest
import torch
from accelerate import Accelerator
from apple import AppleTensor, apple_gpu
from diffusers import LCMScheduler
from rollout_worker import run
from tiny import tiny_scheduler
from torch import nn
from toys import forget_accelerate

from cm_diffusers.diffusion.denoisers import as_denoiser, call_unet
from cm_diffusers.diffusion.process import EDM, RectifiedFlow, TrigFlow, doubled, home_of_float64
from cm_diffusers.diffusion.solvers import SOLVERS, er_sde
from cm_diffusers.diffusion.views import EDMView, VPView
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.objectives.cd import CDConfig, CDObjective
from cm_diffusers.objectives.ct import CTConfig, CTObjective
from cm_diffusers.objectives.direct_reward import DirectRewardConfig, DirectRewardObjective
from cm_diffusers.objectives.ect import ECTConfig, ECTObjective
from cm_diffusers.objectives.edm import EDMConfig, EDMObjective
from cm_diffusers.objectives.flow import FlowObjective
from cm_diffusers.objectives.ict import ICTConfig, ICTObjective
from cm_diffusers.objectives.rlcm import RLCMConfig, RLCMObjective
from cm_diffusers.objectives.slct import SLCTConfig, SLCTObjective
from cm_diffusers.policy.policy import Moves, Policy
from cm_diffusers.types import Batch, Networks
from objectives.test_objectives import CASES, PROGRESS, VP, Case, latents


EDM_VIEW, VP_VIEW = EDMView(0.5, "adm"), VPView(VP, "epsilon", 0.5)
VP_RANGE = {"sigma_min": 0.0292, "sigma_max": 14.6}


class Toy(nn.Module):
    """As a UNet is called; it only works where all that it is told lies beside its samples."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix, self.dropout = nn.Conv2d(channels, channels, 3, padding=1), nn.Dropout(0.1)

    def forward(self, x, t, return_dict=False, **cond):
        told = (t.float() / 100).sin() + sum(value.flatten(1).mean(1) for value in cond.values())
        return (self.dropout(self.mix(x)) * (1 + told[:, None, None, None]),)


class ToyCritic(Toy):
    def forward(self, x, t, cond):
        return super().forward(x, t, **cond)[0].flatten(1)


def toys(channels):
    torch.manual_seed(0)
    teacher = Toy(channels).requires_grad_(False)
    return Networks(Toy(channels), teacher=teacher, critic=ToyCritic(channels))


def images(size):
    return Batch(torch.randn(size, 3, 8, 8))


def rlcm(**config):
    policy = Policy(LCMScheduler.from_config(tiny_scheduler().config), 2)

    def moves(size):
        sample, action = torch.randn(2, size, 4, 8, 8)
        of_each = {name: torch.randn(size) for name in ("advantage", "scale", "reward")}
        known, cond = torch.randn(size, dtype=torch.float64), {"encoder_hidden_states": torch.randn(size, 5, 32)}
        of_each |= {"index": 0, "sample": sample, "action": action, "prompt": torch.arange(size), "log_prob": known}
        return Moves(None, cond, cond, **of_each)

    return Case(RLCMObjective(RLCMConfig(**config), policy), lambda: toys(4), moves)


def held_back():
    policy = Policy(LCMScheduler.from_config(tiny_scheduler().config), 2)
    config = DirectRewardConfig("trajectory", kl_coef=0.1)
    return DirectRewardObjective(config, policy, lambda x0, *_: x0.mean((1, 2, 3)), (4, 8, 8))


IMAGES = {
    "cd": CDObjective(CDConfig(), EDM_VIEW),
    "cd-vp": CDObjective(CDConfig(**VP_RANGE), VP_VIEW),
    "ct": CTObjective(CTConfig(), EDM_VIEW),
    "ict": ICTObjective(ICTConfig(), EDM_VIEW),
    "ict-vp": ICTObjective(ICTConfig(**VP_RANGE), VP_VIEW),
    "ect": ECTObjective(ECTConfig(), EDM_VIEW),
    "edm": EDMObjective(EDMConfig(), EDM_VIEW),
    "slct": SLCTObjective(SLCTConfig(), EDM_VIEW),
}
ALL = {name: Case(case.objective, lambda: toys(4), case.batch) for name, case in CASES.items()}
ALL |= {name: Case(objective, lambda: toys(3), images) for name, objective in IMAGES.items()}
ALL["direct-kl"] = Case(held_back(), lambda: toys(4), latents)
ALL |= {"rlcm": rlcm(kl_coef=0.1, logprob_reduction="sum", clip_range=1e9, loss="reinforce")}
for name in [name for name in ALL if name.startswith("flow")]:  # a toy is called as a UNet
    ALL[name] = Case(FlowObjective(ALL[name].objective.config, call_unet), lambda: toys(4), latents)
del ALL["autoencoder"]  # nothing of its own is float64
for name in [name for name, case in ALL.items() if getattr(case.objective.config, "tangent", "") in ("jvp", "semi")]:
    del ALL[name]  # the stand-in has no forward-mode AD


def values_and_gradients(case, device):
    """Of every player's loss."""
    torch.manual_seed(1)
    nets, batch, found = case.networks(), case.batch(3).to(device), []
    for _, module in nets.items():
        module.to(device)
    for name, loss in case.objective.players.items():
        value = loss(nets, batch, PROGRESS).value
        value.backward()
        found += [value.detach(), getattr(nets, name).mix.weight.grad]
    assert {isinstance(x, AppleTensor) for x in found} == {device.type == "meta"}
    return [x.inner if isinstance(x, AppleTensor) else x for x in found]


@pytest.mark.parametrize("name", ALL)
def test_every_objective_computes_what_it_does_on_the_cpu(name, monkeypatch):
    if name == "slct":
        pytest.importorskip("ot")
    expected = values_and_gradients(ALL[name], torch.device("cpu"))
    with apple_gpu(monkeypatch) as device:
        found = values_and_gradients(ALL[name], device)
    assert len(found) == len(expected) > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def process(kind):
    return VP if kind == "vp" else {"edm": EDM, "trig": TrigFlow, "flow": RectifiedFlow}[kind]()


@pytest.mark.parametrize("kind", ["vp", "edm", "trig", "flow"])
def test_times_may_lie_on_the_gpu_too(kind, monkeypatch):
    """Whoever asks with times on the device gets an answer; so do solvers from there."""
    times = torch.tensor([0.3, 0.9, 1.4]) * (300 if kind == "vp" else 0.6)
    x = torch.randn(3, 2)

    def answers(t, x):
        one = process(kind)
        found = [one.alpha(t), one.sigma(t), one.half_log_snr(t), one.time_at(one.half_log_snr(t).float())]
        denoise = as_denoiser(lambda x, t, return_dict: (x * 0.1,), one, "sample")
        steps = [solve(lambda x, t: denoise(x, t, {}), one, x, t, t / 2) for solve in (*SOLVERS.values(), er_sde)]
        return found, steps

    expected = answers(times, x)
    torch.manual_seed(0)
    with apple_gpu(monkeypatch) as device:
        torch.manual_seed(0)
        found, steps = answers(times.to(device), x.to(device))
    torch.testing.assert_close(found, expected[0])
    assert all(isinstance(step, AppleTensor) for step in steps)


def test_a_device_with_float64_keeps_its_samples(monkeypatch):
    assert doubled(torch.ones(2)).dtype == torch.float64
    with apple_gpu(monkeypatch) as device:
        assert doubled(torch.ones(2).to(device)).device == torch.device("cpu")
    assert home_of_float64(torch.device("meta")).type == "meta"


@pytest.mark.parametrize("method", [{}, {"kl_coef": 0.1, "final_step": "pathwise"}])
def test_reward_fine_tuning_runs(method, tmp_path, monkeypatch):
    """Roll-outs, advantages, updates and a resume; the weights end where those on the CPU do."""
    monkeypatch.setattr(Trainer, "_fit", lambda self, batches: [self.training_step(batches) for _ in range(4)])
    options = {"inner_epochs": 2, "kl_in_advantage": 0.2}

    def weights(folder):
        trainer, source = run(folder, options, method, max_train_steps=4)
        source.load_state(source.state())
        return [p.detach().cpu() for p in trainer.student.parameters()]

    expected = weights(tmp_path / "cpu")
    with apple_gpu(monkeypatch) as device:
        monkeypatch.setattr(Accelerator, "device", device)
        for name in (
            "adam",
            "adamw",
        ):  # which know the true device's name; the second has a check of its own before 2.7
            optim = sys.modules[f"torch.optim.{name}"]
            monkeypatch.setattr(optim, "_device_dtype_check_for_fused", lambda *_: None, raising=False)
        found = weights(tmp_path / "gpu")
    torch.testing.assert_close(found, expected)
    forget_accelerate()
