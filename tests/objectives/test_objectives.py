"""The battery every objective passes: a table of methods x checks, on real (tiny) networks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import LCMScheduler
from latent_objectives import boot_of, lcf_of, lcm_of, scott_of
from tiny import tiny_scheduler, tiny_unet, tiny_vae
from tiny_flow import tiny_sd3_transformer

from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.diffusion.teaching import Guiding, embedded_in_time, vp_teaching
from cm_diffusers.diffusion.trigflow import TrigFlowView
from cm_diffusers.diffusion.views import VPView
from cm_diffusers.models.critics import CriticConfig, make_critic
from cm_diffusers.models.families import sd3
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.time_weight import WithTimeWeight
from cm_diffusers.objectives.autoencoder import AutoencoderConfig, AutoencoderObjective, AutoencoderWithPosterior
from cm_diffusers.objectives.boot import BOOTConfig
from cm_diffusers.objectives.diffusion import DiffusionConfig, DiffusionObjective
from cm_diffusers.objectives.direct_reward import DirectRewardConfig, DirectRewardObjective
from cm_diffusers.objectives.flow import FlowConfig, FlowObjective
from cm_diffusers.objectives.lcf import LCFConfig
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.objectives.pcm import PCMConfig, PCMObjective
from cm_diffusers.objectives.scm import SCMConfig, SCMObjective
from cm_diffusers.objectives.scott import SCottConfig
from cm_diffusers.objectives.tcd import TCDConfig, TCDObjective
from cm_diffusers.policy.policy import Policy
from cm_diffusers.tasks.finished_students import FinetuneConfig, finetune_networks
from cm_diffusers.types import Batch, Networks, Progress


VP = DiscreteVP.from_scheduler(tiny_scheduler())
PROGRESS = Progress(1, 10)  # of sCM the derivative is there


@dataclass
class Case:
    objective: object
    networks: Callable[[], Networks]
    batch: Callable[[int], Batch]


def latents(size):
    states = torch.randn(2, size, 5, 32)
    return Batch(
        torch.randn(size, 4, 8, 8), {"encoder_hidden_states": states[0]}, {"encoder_hidden_states": states[1]}
    )


def pixels(size):
    return Batch(torch.rand(size, 3, 32, 32) * 2 - 1)


def networks(**settings):
    return make_networks(tiny_unet(dropout=0.1), StudentConfig(unet_time_cond_proj_dim=16, lora_rank=4, **settings))


def lcm(prediction_type="epsilon", lora=False, **settings):
    objective = lcm_of(LCMConfig(**settings), VP, prediction_type, None if lora else 16)
    return Case(objective, lambda: networks(lora=lora), latents)


def boot(prediction_type="epsilon", lora=False, **settings):
    def prompts(size):
        batch = latents(size)
        batch.x0 = None
        return batch

    objective = boot_of(BOOTConfig(**settings), VP, prediction_type, None if lora else 16, (4, 8, 8))
    return Case(objective, lambda: networks(lora=lora), prompts)


def lcf(prediction_type="epsilon", embedded=True, lora=False, **settings):
    dim = 16 if embedded else None

    def networks():
        return finetune_networks(
            tiny_unet(dropout=0.1, time_cond_proj_dim=dim), FinetuneConfig("", lora=lora, lora_rank=4)
        )

    return Case(lcf_of(LCFConfig(2.0, 14.0, **settings), VP, prediction_type, dim), networks, latents)


def scott(prediction_type="epsilon", critic="none", lora=False, **settings):
    settings = {"adversarial_start": 0, "adversarial_ramp": 0} | settings
    config = SCottConfig(**settings)
    objective = scott_of(config, VP, prediction_type, None if lora else 16, critic != "none")

    def with_critic():
        nets = networks(lora=lora)
        nets.critic = make_critic(nets, CriticConfig(critic, critic_channels=16, critic_lora_rank=4))
        if nets.critic is not None:
            nets.critic.requires_grad_(False)  # as the trainer does in the student's turn
        return nets

    return Case(objective, with_critic, latents)


def trajectories(kind, prediction_type="epsilon", lora=False, critic="none", told=False, **settings):
    """PCM, with a critic from the first step if there is one, or TCD, told where jumps end or not."""
    teaching = replace(
        vp_teaching(VP, prediction_type, None if lora else 16, 50, None), target_dim=16 if told else None
    )
    if kind == "pcm":
        config = PCMConfig(**settings, **({"adversarial_start": 0, "adversarial_ramp": 0} if critic != "none" else {}))
        objective = PCMObjective(config, teaching, critic != "none")
    else:
        objective = TCDObjective(TCDConfig(**settings), teaching)

    def with_critic():
        student = StudentConfig(unet_time_cond_proj_dim=0 if lora else 16, lora_rank=4, lora=lora)
        nets = make_networks(tiny_unet(dropout=0.1), student, teaching.target_dim)
        nets.critic = make_critic(nets, CriticConfig(critic, critic_channels=16, critic_lora_rank=4))
        if nets.critic is not None:
            nets.critic.requires_grad_(False)  # as the trainer does in the student's turn
        return nets

    return Case(objective, with_critic, latents)


def scm(prediction_type="epsilon", taught=True, lora=False, dim=None, w=(0.0, 0.0), dmd_weight=0.0, **settings):
    settings = {"sigma_min": 0.03, "sigma_max": 14.0, "tangent_warmup_steps": 0} | settings
    config, view = SCMConfig(**settings), TrigFlowView.of(VPView(VP, prediction_type, 1.0))

    def networks():
        student = StudentConfig(lora=lora, lora_rank=4, unet_time_cond_proj_dim=dim or 0)
        nets = make_networks(tiny_unet(dropout=0.1), student)
        student = WithTimeWeight(nets.student) if config.learned_weight else nets.student
        fake = (
            copy.deepcopy(nets.student).eval().requires_grad_(False) if dmd_weight else None
        )  # as in the student's turn
        return Networks(student, teacher=nets.teacher if taught else None, critic=fake)

    guiding = Guiding(told=embedded_in_time(dim)) if dim else Guiding()
    return Case(SCMObjective(config, view, w, guiding, dmd_weight), networks, latents)


def diffusion(prediction_type):
    objective = DiffusionObjective(DiffusionConfig(prediction_type, condition_dropout=0.5), VP)
    return Case(objective, lambda: Networks(tiny_unet()), latents)


def flow(**settings):
    def texts(size):
        cond, uncond = (
            {"encoder_hidden_states": torch.randn(size, 5, 48), "pooled_projections": torch.randn(size, 40)}
            for _ in range(2)
        )
        return Batch(torch.randn(size, 4, 8, 8), cond, uncond)

    return Case(FlowObjective(FlowConfig(**settings), sd3.FAMILY.call), unread_frozen, texts)


def unread_frozen():
    """Of the last block, nothing reads what the text attends to."""
    network = tiny_sd3_transformer()
    unread = network.transformer_blocks[-1].attn
    for layer in (unread.add_q_proj, unread.norm_added_q):
        layer.requires_grad_(False)
    return Networks(network)


def direct(through):
    """The reward is negative, so that the loss is not."""
    distillation = lcm_of(LCMConfig(), VP, "epsilon", None) if through == "single_step" else None
    policy = Policy(LCMScheduler.from_config(tiny_scheduler().config), 2)

    def score(x0, texts, metadata):
        return -x0.square().mean((1, 2, 3))

    objective = DirectRewardObjective(DirectRewardConfig(through), policy, score, (4, 8, 8), distillation)
    return Case(objective, lambda: networks(lora=True), latents)


CASES = {
    "lcm": lcm(),
    "lcm-heun": lcm(solver="heun"),
    "lcm-dpm_2s": lcm(solver="dpm_2s"),
    "lcm-l2-v": lcm("v_prediction", loss_type="l2", num_ddim_timesteps=20),
    "lcm-lora-epsilon": lcm(lora=True),
    "lcm-lora-v": lcm("v_prediction", lora=True),
    "lcm-lora-sample": lcm("sample", lora=True),
    "boot": boot(),
    "boot-heun-v": boot("v_prediction", solver="heun", num_ddim_timesteps=20),
    "boot-lora-sample": boot("sample", lora=True),
    "scott": scott(),
    "scott-ddim-huber-v": scott("v_prediction", sde="ddim", loss_type="huber"),
    "scott-heads": scott(critic="heads"),
    "scott-heads-lora": scott("sample", critic="heads", lora=True, adversarial_loss="lsgan"),
    "scott-paper": scott(critic="lora_decoder", critic_inputs="clean", adversarial_weight=0.4),
    "pcm": trajectories("pcm"),
    "pcm-two-phases-v-heun": trajectories("pcm", "v_prediction", phases=2, solver="heun", loss_type="l2"),
    "pcm-heads": trajectories("pcm", critic="heads"),
    "pcm-lora-decoder": trajectories(
        "pcm", "sample", lora=True, critic="lora_decoder", adversarial_balance="adaptive"
    ),
    "tcd": trajectories("tcd"),
    "tcd-second-order-v": trajectories("tcd", "v_prediction", order=2),
    "tcd-told": trajectories("tcd", told=True),
    "tcd-lora-told-phases": trajectories("tcd", lora=True, told=True, phases=8),
    "scd": scm(),
    "scd-guided": scm(dim=16, w=(0.0, 2.0)),
    "scd-lora": scm(lora=True, w=(1.0, 1.0)),
    "scd-central-v": scm("v_prediction", tangent="central", tangent_normalization="rms"),
    "scd-one_sided-unweighted": scm(tangent="one_sided", tangent_normalization="clip", learned_weight=False),
    "scd-semi-sample": scm("sample", tangent="semi", prior_weight=True),
    "scd-two-segments": scm(segments=2),
    "scd-matched": scm(dmd_weight=0.01),
    "scd-matched-guided": scm(dim=16, w=(0.0, 2.0), dmd_weight=0.01, learned_weight=False),
    "sct": scm(taught=False),
    "sct-unweighted": scm(taught=False, learned_weight=False),
    "lcf": lcf(),
    "lcf-l2-v": lcf("v_prediction", loss_type="l2"),
    "lcf-plain-sample": lcf("sample", embedded=False),
    "lcf-lora": lcf(lora=True),
    "direct-single_step": direct("single_step"),
    "direct-last_step": direct("last_step"),
    "direct-trajectory": direct("trajectory"),
    "diffusion-epsilon": diffusion("epsilon"),
    "diffusion-v": diffusion("v_prediction"),
    "diffusion-sample": diffusion("sample"),
    "flow": flow(),
    "flow-uniform-shifted": flow(time_sampling="uniform", shift=3.0, condition_dropout=0.5),
    "autoencoder": Case(
        AutoencoderObjective(AutoencoderConfig()), lambda: Networks(AutoencoderWithPosterior(tiny_vae())), pixels
    ),
}


@pytest.fixture(params=CASES, ids=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("size", [1, 3])
def test_loss_is_a_finite_scalar_with_detached_logs(case, size):
    loss = case.objective(case.networks(), case.batch(size), PROGRESS)
    assert loss.value.shape == ()
    assert loss.value.dtype == torch.float32
    assert 0 < loss.value.item() < float("inf")
    assert all(log.shape == () and log.isfinite() and not log.requires_grad for log in loss.logs.values())


def test_gradient_reaches_the_student_only(case):
    nets = case.networks()
    before = {role: {n: v.clone() for n, v in net.state_dict().items()} for role, net in nets.items()}
    case.objective(nets, case.batch(2), PROGRESS).value.backward()
    trainable = [p for p in nets.student.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)
    assert any(p.grad.any() for p in trainable)
    others = [p for role, net in nets.items() for p in net.parameters() if role != "student" or not p.requires_grad]
    assert all(p.grad is None for p in others)
    for role, net in nets.items():  # nothing moves before the optimizer does
        assert all(torch.equal(value, before[role][name]) for name, value in net.state_dict().items())


def test_seed_decides_the_loss(case):
    nets, batch = case.networks(), case.batch(3)

    def value(seed):
        torch.manual_seed(seed)
        return case.objective(nets, batch, PROGRESS).value.item()

    assert value(1) == value(1) != value(2)


def test_the_student_plays_first_and_a_critic_if_there_is_one(case):
    (name, loss), *others = case.objective.players.items()
    assert (name, loss) == ("student", case.objective)
    assert [name for name, _ in others] == ["critic"] * (case.networks().critic is not None)


def test_every_new_input_learns_from_the_first_step():
    for name in ("lcm", "tcd-told"):
        nets = CASES[name].networks()
        CASES[name].objective(nets, latents(2), PROGRESS).value.backward()
        gradient = nets.student.time_embedding.cond_proj.weight.grad
        assert (gradient.unflatten(1, (-1, 16)).abs().amax((0, 2)) > 0).all()  # of each input


def test_a_student_ignores_new_inputs_at_first():
    for name in ("tcd-told", "tcd-lora-told-phases"):
        nets, x, t = CASES[name].networks(), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
        states = torch.randn(2, 5, 32)
        told = torch.randn(2, 32 if name == "tcd-told" else 16)
        with torch.no_grad():
            student = nets.student.eval()(x, t, states, timestep_cond=told, return_dict=False)[0]
            assert torch.equal(student, nets.teacher.eval()(x, t, states, return_dict=False)[0])
