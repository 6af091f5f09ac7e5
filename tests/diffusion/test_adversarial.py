"""Adversarial losses by hand, and the critics of latents on tiny networks."""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import tiny_unet
from tiny_xl import tiny_xl_unet
from torch import nn

from cm_diffusers.diffusion.adversarial import ADVERSARIAL_LOSSES, accuracy, adaptive_weight, approximate_r1, detour
from cm_diffusers.diffusion.denoisers import unet_arguments
from cm_diffusers.models.critics import CriticConfig, LoRADecoderCritic, TeacherFeatureCritic, make_critic
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.types import Networks


KINDS = ["heads", "lora_decoder"]


def inputs(size=2, xl=False):
    cond = {"encoder_hidden_states": torch.randn(size, 5, 56 if xl else 32)}
    if xl:
        cond |= {"text_embeds": torch.randn(size, 20), "time_ids": torch.full((size, 6), 32.0)}
    return torch.randn(size, 4, 8, 8), torch.arange(size) * 400 + 100, cond


def networks(unet=None, **settings):
    unet = (unet or tiny_unet()).requires_grad_(False)  # as `load_teacher` does
    return make_networks(unet, StudentConfig(unet_time_cond_proj_dim=16, lora_rank=4, **settings))


def make(kind, nets=None, opinion=True):
    """With an opinion: its last layer is not zero, and neither are the adapters of the decoder."""
    critic = make_critic(nets or networks(), CriticConfig(kind, critic_channels=16, critic_lora_rank=4))
    with torch.no_grad():
        for p in critic.parameters() if opinion else ():
            if p.requires_grad and not p.any():
                p.normal_()
    return critic


def unsettle(nets):
    """Adapters that do something."""
    with torch.no_grad():
        for p in nets.student.parameters():
            if p.requires_grad:
                p.normal_()
    return nets


# ---- losses


def test_losses_by_hand():
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.0]])
    hinge, lsgan = ADVERSARIAL_LOSSES["hinge"], ADVERSARIAL_LOSSES["lsgan"]
    assert hinge.critic(real, fake) == 0.25 + 0.5
    assert hinge.generator(fake) == 1.5
    assert lsgan.critic(real, fake) == ((1 + 0.25) / 2 + 9 / 2) / 2
    assert lsgan.generator(fake) == (16 + 1) / 4
    assert accuracy(real, fake, 0.0) == 0.875  # one of the four lies on the boundary
    assert accuracy(real, fake, 0.5) == 0.875
    assert approximate_r1(real, real) == 0
    assert approximate_r1(real, fake) == (25 + 0.25) / 2


@pytest.mark.parametrize(("name", "critic", "generator"), [("hinge", 2.0, 0.0), ("lsgan", 0.5, 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_at_first_there_is_no_opinion(kind, name, critic, generator):
    logits, loss = make(kind, opinion=False)(*inputs()), ADVERSARIAL_LOSSES[name]
    assert loss.critic(logits[:1], logits[1:]).item() == critic
    assert loss.generator(logits).item() == generator
    assert accuracy(logits[:1], logits[1:], 0.0) == 0.5


def test_a_gradient_that_overflows_leaves_the_value_alone():
    """In half precision the scaler then skips the step; a value that is not finite would end the run."""
    x = torch.zeros(3, requires_grad=True)
    value, gradient = detour(lambda y: (y.sum() + 5) + (y * 1e38).sum() * 1e3, x)
    assert value == 5
    assert not gradient.isfinite().any()
    value.backward()
    assert not x.grad.isfinite().any()
    assert adaptive_weight(torch.ones(2), torch.tensor([math.nan, 1.0])) == pytest.approx(0.01)


def test_adaptive_weight_has_bounds_and_no_gradient():
    hold, pull = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([0.0, 2.0], requires_grad=True)
    found = [adaptive_weight(hold * scale, pull) for scale in (1.0, 1e-4, 1e4)]
    assert [value.item() for value in found] == [2.5, pytest.approx(0.01), 10]
    assert not any(value.requires_grad for value in found)
    assert adaptive_weight(hold, 0 * pull) == 10


def test_a_gradient_too_small_for_half_precision_arrives():
    """1e-4 / 4096 is less than half of the least number of float16, 6e-8."""
    x = torch.ones(4096, requires_grad=True)
    value, gradient = detour(lambda y: (y.half() * 1e-4).float().mean(), x)
    value.backward()
    for found in (gradient, x.grad):
        torch.testing.assert_close(found, torch.full((4096,), 1e-4 / 4096), rtol=1e-2, atol=0)


def test_a_detour_leads_to_the_same_gradient():
    weight, judge = torch.randn(3, requires_grad=True), nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(x):
        return judge(x).square().mean()

    x = weight * torch.randn(5, 3)
    (direct,) = torch.autograd.grad(loss(x), weight, retain_graph=True)
    (at_x,) = torch.autograd.grad(loss(x), x, retain_graph=True)
    judge.requires_grad_(False)
    value, gradient = detour(loss, x)
    assert value.item() == pytest.approx(loss(x).item(), rel=1e-6)
    torch.testing.assert_close(gradient, at_x)
    torch.testing.assert_close(torch.autograd.grad(value, weight)[0], direct)


# ---- critics


def test_the_decoder_trains_the_share_of_the_paper():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)  # SD 1.5
        critic = LoRADecoderCritic(unet, CriticConfig().critic_lora_rank)
        heads = TeacherFeatureCritic(unet, unet, CriticConfig().critic_channels)
    size = sum(p.numel() for p in unet.parameters())
    trained = sum(p.numel() for p in critic.parameters() if p.requires_grad)
    assert size == 859_520_964
    assert trained / size == pytest.approx(0.036, abs=0.002)
    assert sum(p.numel() for p in heads.parameters()) < 5e6


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_critic_s_own_parts_learn(kind, lora):
    nets = networks(lora=lora)
    critic, before = make(kind, nets), [p.requires_grad for p in nets.student.parameters()]
    critic(*inputs()).square().mean().backward()
    learning = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in critic.parameters() if p.requires_grad)
    assert all(p.grad is None for p in (*nets.student.parameters(), *nets.teacher.parameters()))
    assert [p.requires_grad for p in nets.student.parameters()] == before
    if kind == "heads":
        assert learning == set(critic.state_dict())
        assert {name.split(".")[0] for name in learning} == {"heads"}
    else:
        assert all(name.startswith(("unet.up_blocks.", "unet.conv_norm_out", "unet.conv_out")) for name in learning)
        assert all(".lora_" in name for name in learning if name.startswith("unet.up_blocks."))
        assert any("attn2.to_q" in name for name in learning)
        assert any("upsamplers.0.conv" in name for name in learning)


@torch.no_grad()
def test_features_are_what_the_blocks_answer_and_no_more():
    nets, (x, t, cond) = networks(), inputs()
    critic, unet, expected, calls = make("heads", nets), nets.teacher, [], []
    for block in (*unet.down_blocks, unet.mid_block):
        block.register_forward_hook(lambda _, __, out: expected.append(out[0] if isinstance(out, tuple) else out))
    unet(x, t, **cond)
    unet.up_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    full, expected[:] = list(expected), []
    found = critic.features(x, t, cond)
    assert len(found) == 3
    assert all(map(torch.equal, found, full))
    assert calls == []
    assert [len(block._forward_hooks) for block in critic._blocks] == [1, 1, 1], "only the test's own remain"


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_and_time_count(kind, xl):
    unet = tiny_xl_unet() if xl else tiny_unet()
    critic, (x, t, cond) = make(kind, networks(unet)), inputs(xl=xl)
    logits = critic(x, t, cond)
    assert logits.shape == (2, 3 * 2 * 2 if kind == "heads" else 64)
    for name, value in cond.items():
        assert not torch.allclose(critic(x, t, cond | {name: value + 1.0}), logits, atol=1e-4), name
    assert not torch.allclose(critic(x, t + 100, cond), logits, atol=1e-4)
    alone = [critic(x[i : i + 1], t[i : i + 1], {name: v[i : i + 1] for name, v in cond.items()}) for i in (0, 1)]
    torch.testing.assert_close(torch.cat(alone), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_the_student_do_not_reach_the_critic(kind):
    """Neither forwards nor backwards, where gradient checkpointing would compute the teacher again with them."""
    x, t, cond = inputs()
    unet = tiny_unet(dropout=0.5)
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    nets = unsettle(networks(unet, lora=True))
    plain = tiny_unet(dropout=0.5)
    plain.load_state_dict(state)
    torch.manual_seed(1)
    expected = make(kind, Networks(plain, teacher=plain))
    torch.manual_seed(1)
    critic = make(kind, nets)
    critic.load_state_dict(expected.state_dict())
    nets.student.train().enable_gradient_checkpointing()
    pulls = []
    for judge in (expected, critic):
        leaf = x.clone().requires_grad_()
        judge(leaf, t, cond).square().mean().backward()
        pulls.append(leaf.grad)
    torch.testing.assert_close(pulls[1], pulls[0])
    assert pulls[0].any()
    assert nets.student.training
    assert nets.student.is_gradient_checkpointing


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_in_half_precision(kind):
    nets = networks(cast_teacher_unet="bf16")
    critic, (x, t, cond) = make(kind, nets), inputs()
    assert {p.dtype for p in critic.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        logits = critic(x.requires_grad_(), t, cond)
    assert logits.dtype == torch.float32
    logits.mean().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


def test_a_network_without_a_mid_block():
    unet = tiny_unet(mid_block_type=None)
    critic = make("heads", Networks(unet, teacher=unet))
    assert len(critic.heads) == 2
    assert critic(*inputs()).shape == (2, 2 * 2 * 2)


def test_the_critic_s_teacher_is_not_its_own():
    nets = networks()
    critic = make("heads", nets)
    assert not any(isinstance(module, UNet2DConditionModel) for module in critic.modules())
    critic.to(torch.float64)
    assert nets.teacher.dtype == torch.float32


def test_none_is_none():
    assert make_critic(networks(), CriticConfig("none")) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_that_cannot_read_is_refused(kind):
    settings = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = tiny_unet(**settings, mid_block_type=None)
    message = (
        r"The critic would judge images without their text: .* have no cross-attention \(DownBlock2D.*--critic none"
    )
    with pytest.raises(ValueError, match=message):
        make_critic(Networks(unet, teacher=unet), CriticConfig(kind))


def test_an_unknown_critic_is_refused():
    with pytest.raises(ValueError, match="Unknown --critic 'dino'; one of heads, lora_decoder, vision, none"):
        make_critic(networks(), CriticConfig("dino"))


def test_conditions_reach_the_network_in_its_order():
    cond = {"encoder_hidden_states": 1, "text_embeds": 2, "time_ids": 3}
    nested = {"encoder_hidden_states": 1, "added_cond_kwargs": {"text_embeds": 2, "time_ids": 3}}
    assert unet_arguments(cond) == nested
    assert unet_arguments({"encoder_hidden_states": 1}) == {"encoder_hidden_states": 1}
