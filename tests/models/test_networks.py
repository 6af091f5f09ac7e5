"""Teachers, students, adapters and moving averages."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_unet
from torch import nn

from cm_diffusers.diffusion.guidance import guidance_embedding
from cm_diffusers.engine.averages import ema_update
from cm_diffusers.models.adapters import WithoutAdapters, add_lora
from cm_diffusers.models.families.base import FAMILIES
from cm_diffusers.models.families.unet import LCM_LORA_TARGETS
from cm_diffusers.models.students import StudentConfig, frozen_copy, make_networks, make_student
from cm_diffusers.models.teachers import TeacherConfig, load_teacher


@pytest.fixture
def teacher():
    return tiny_unet().requires_grad_(False)


@pytest.fixture
def inputs():
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    return {
        "sample": sample,
        "timestep": torch.tensor([19, 999]),
        "encoder_hidden_states": states,
        "return_dict": False,
    }


def same_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def clone(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def output(net, inputs, **more):
    return net(**inputs, **more)[0]


def lora(teacher, **settings):
    return add_lora(teacher, rank=4, alpha=4.0, dropout=0.0, target_modules=LCM_LORA_TARGETS, **settings)


@torch.no_grad()
def shake(module):
    """Change every trainable weight."""
    for p in module.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn_like(p))


def test_student_starts_as_the_teacher(teacher, inputs):
    student = make_student(teacher, 16)
    strength = guidance_embedding(torch.tensor([2.0, 14.0]), 16)
    assert torch.equal(output(student, inputs), output(teacher, inputs))
    assert torch.equal(output(student, inputs, timestep_cond=strength), output(teacher, inputs))
    assert student.config.time_cond_proj_dim == 16
    assert student.training
    assert all(p.requires_grad for p in student.parameters())


def test_student_shares_nothing_with_the_teacher(teacher, inputs):
    before, student = clone(teacher), make_student(teacher, 16)
    shake(student)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not torch.equal(output(student, inputs), output(teacher, inputs))


def test_guidance_reaches_a_trained_student(teacher, inputs):
    student = make_student(teacher, 16)
    shake(student)
    one, two = (
        output(student, inputs, timestep_cond=guidance_embedding(torch.full((2,), w), 16)) for w in (2.0, 14.0)
    )
    assert not torch.equal(one, two)


def test_student_of_a_student_starts_as_it_is_without_strength(teacher, inputs):
    """Teachers are asked without one, so their own embedding is not inherited and may have another size."""
    first = make_student(teacher, 16).eval()
    shake(first)
    second = make_student(first, 8).eval()
    assert torch.equal(output(second, inputs, timestep_cond=torch.ones(2, 8)), output(first, inputs))


def test_student_of_a_half_precision_teacher_is_float32(teacher):
    assert {p.dtype for p in make_student(teacher.to(torch.bfloat16), 16).parameters()} == {torch.float32}


def test_adapters_start_as_the_teacher(teacher, inputs):
    expected = output(teacher, inputs)
    student = lora(teacher)
    assert torch.equal(output(student, inputs), expected)
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_without_adapters_is_the_original_teacher(teacher, inputs):
    expected = output(teacher, inputs)
    student = lora(teacher)
    shake(student)
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    changed, original = output(student, inputs), WithoutAdapters(student)
    assert not torch.equal(changed, expected)
    assert torch.equal(output(original, inputs), expected)
    assert torch.equal(output(student, inputs), changed)  # the adapters are on again
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
    assert student.training
    assert list(original.parameters()) == list(original.children()) == list(original.state_dict()) == []


def test_without_adapters_turns_them_on_after_an_error(teacher, inputs):
    student = lora(teacher)
    with pytest.raises(TypeError):
        WithoutAdapters(student)(**inputs, nonsense=1)
    layers = [m for m in student.modules() if isinstance(m, BaseTunerLayer)]
    assert layers
    assert not any(m.disable_adapters for m in layers)
    assert student.training


def test_without_adapters_has_no_dropout(inputs):
    teacher = tiny_unet(dropout=0.5).requires_grad_(False)
    expected = output(teacher, inputs)
    student = add_lora(teacher, 4, 4.0, 0.5, LCM_LORA_TARGETS)
    assert torch.equal(output(WithoutAdapters(student), inputs), expected)
    assert not torch.equal(output(student, inputs), expected)


def test_without_adapters_does_not_walk_through_the_network(teacher, inputs, monkeypatch):
    """A student of Stable Diffusion has thousands of modules: `eval` and `train` cost 18 ms a call."""
    original = WithoutAdapters(lora(teacher))
    monkeypatch.setattr(nn.Module, "train", lambda *_: pytest.fail("walks"))
    monkeypatch.setattr(nn.Module, "modules", lambda *_: pytest.fail("walks"))
    output(original, inputs)


def test_without_adapters_is_recomputed_without_dropout(inputs):
    """With gradient checkpointing the gradient is the same, which dropout in the second pass alone would change."""
    student = add_lora(tiny_unet(dropout=0.5).requires_grad_(False), 4, 4.0, 0.5, LCM_LORA_TARGETS)
    shake(student)
    x, gradients = inputs["sample"].clone().requires_grad_(), []
    for checkpointing in (False, True):
        (student.enable_gradient_checkpointing if checkpointing else student.disable_gradient_checkpointing)()
        value = WithoutAdapters(student)(**inputs | {"sample": x})[0].square().mean()
        gradients += torch.autograd.grad(value, x)
    torch.testing.assert_close(*gradients)
    assert all(module.training for module in student.modules() if isinstance(module, nn.Dropout))


def test_without_adapters_keeps_running_statistics():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x)

    student = Normed().train()
    assert torch.equal(WithoutAdapters(student)(torch.ones(4, 3)), torch.ones(4, 3) / (1 + 1e-5) ** 0.5)
    assert not student.norm.running_mean.any()
    assert student.norm.training


def test_networks_of_a_full_student(teacher):
    nets = make_networks(teacher, StudentConfig(unet_time_cond_proj_dim=16, cast_teacher_unet="bf16"))
    assert nets.teacher.dtype == torch.bfloat16
    assert same_weights(nets.target, nets.student)
    assert nets.target is not nets.student
    assert not any(p.requires_grad for p in nets.target.parameters())
    assert [name for name, _ in nets.items()] == ["student", "target", "teacher"]


def test_networks_of_adapters(teacher):
    nets = make_networks(teacher, StudentConfig(lora=True, lora_rank=2, lora_target_modules=["to_q"]))
    assert nets.student is teacher
    assert isinstance(nets.teacher, WithoutAdapters)
    assert nets.target is None
    names = [name for name, p in nets.student.named_parameters() if p.requires_grad]
    assert all(".to_q.lora_" in name for name in names)


def test_adapters_on_a_network_in_half_precision():
    nets = make_networks(tiny_unet(), StudentConfig(lora=True, lora_rank=2, cast_teacher_unet="fp16"))
    dtypes = {p.requires_grad: p.dtype for p in nets.student.parameters()}
    assert dtypes == {False: torch.float16, True: torch.float32}


def layer(value):
    """A weight and a buffer, both `value`."""
    module = nn.Linear(3, 2, bias=False)
    nn.init.constant_(module.weight, value)
    module.register_buffer("count", torch.tensor(int(value)))
    return module


def test_ema_closed_form():
    """After n updates towards a fixed model: model + decay^n (start - model)."""
    average, model = layer(3.0), layer(1.0)
    for _ in range(7):
        ema_update(average, model, 0.9)
    torch.testing.assert_close(average.weight.detach(), torch.full((2, 3), 1 + 0.9**7 * 2))
    assert (model.weight == 1).all()
    assert int(average.count) == 1  # buffers are copied


@pytest.mark.parametrize(("decay", "value"), [(1.0, 3.0), (0.0, 1.0)])
def test_ema_limits(decay, value):
    average = layer(3.0)
    ema_update(average, layer(1.0), decay)
    assert (average.weight == value).all()


def test_frozen_copy():
    model = layer(2.0)
    copied = frozen_copy(model)
    assert same_weights(copied, model)
    assert not copied.weight.requires_grad
    nn.init.zeros_(model.weight)
    assert (copied.weight == 2).all()
    assert model.weight.requires_grad


def refusal(path):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the caller compares the message
        load_teacher(TeacherConfig(str(path)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_load_teacher(tmp_path, inputs):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = load_teacher(TeacherConfig(str(tmp_path)))
    for name in ("unet", "vae", "text_encoder"):
        part = getattr(loaded, name)
        assert same_weights(part, getattr(pipe, name))
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())
    assert torch.equal(output(loaded.unet, inputs), output(pipe.unet, inputs))


def test_a_folder_without_a_pipeline(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path} is not a diffusers pipeline folder: there is no model_index.json in it."


def test_a_path_that_is_nowhere():
    message = refusal("nobody/no-such-teacher")
    assert message.startswith("nobody/no-such-teacher is neither a pipeline folder here nor a Hub id within reach: ")


def test_a_teacher_that_is_not_finite(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    file = next((tmp_path / "unet").glob("*.safetensors"))
    weights = load_file(file)
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    assert refusal(tmp_path) == (
        f"The teacher {tmp_path} holds 1 tensors that are not finite, such as unet.conv_in.weight; get it anew."
    )


def test_a_pipeline_of_another_kind(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    assert refusal(tmp_path) == (
        f"{tmp_path} is a DDPMPipeline without a network of a known family, but with UNet2DModel; give a text-to-image "
        f"pipeline of {', '.join(FAMILIES)}."
    )
