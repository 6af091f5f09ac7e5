"""SCott on teachers of flows, end to end and by its critics; Qwen-Image in two processes; what flows are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from flow_checks import branches
from processes import run_worker
from safetensors.torch import load_file
from scripts import data_flags, image_folder, run_script
from tiny_flow import tiny_sd3
from tiny_flow_a import tiny_sana
from tiny_flow_b import tiny_flux, tiny_klein, tiny_qwen_image, tiny_z_image
from toys import assert_same
from transformers import ResNetBackbone, ResNetConfig

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.diffusion.teaching import flow_teaching
from cm_diffusers.errors import UserError
from cm_diffusers.models.critics import CriticConfig, make_critic
from cm_diffusers.models.families.base import family_of, network_of
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.vision_critic import mean_text
from cm_diffusers.objectives.lcm import LCMConfig, LCMObjective
from cm_diffusers.objectives.scott import SCottConfig, SCottObjective


TEACHERS = {
    "sd3": tiny_sd3, "sana": tiny_sana, "flux": tiny_flux, "klein": tiny_klein, "qwen": tiny_qwen_image, "z": tiny_z_image,
}  # fmt: skip
STEPS = {
    "max_train_steps": 3,
    "checkpointing_steps": 3,
    "learning_rate": 1e-2,
    "w_min": 1.0,
    "w_max": 3.0,
    "shift": 3.0,
}
LORA = {"lora": True, "lora_rank": 2, "lora_alpha": 4.0}
JUDGED = {"critic_learning_rate": 1e-2, "adversarial_start": 1, "adversarial_ramp": 1, "critic_channels": 16}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("flow-scott")
    image_folder(home / "data")
    tiny_sd3().save_pretrained(home / "teacher")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetBackbone(ResNetConfig(**sizes)).save_pretrained(home / "resnet")
    return home


def distil(home: Path, name: str, **values: object) -> Path:
    shared = data_flags(home / "data", home / "cache") | STEPS | {"pretrained_teacher_model": home / "teacher"}
    run_script("distill_scott", **shared | {"output_dir": home / name} | values)
    return home / name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("none", {"critic": "none", **LORA}),
        ("heads", {"critic": "heads", **JUDGED, **LORA}),
        ("full", {"critic": "heads", **JUDGED, "sde": "ddim"}),
        ("vision", {"critic": "vision", "critic_inputs": "clean", **JUDGED, **LORA}),
    ],
)
def test_a_student_of_every_critic(home: Path, name: str, values: dict[str, object]) -> None:
    backbone = {"critic_backbone": home / "resnet"} if name == "vision" else {}
    run = distil(home, name, **values, **backbone)
    pipe = ConsistencyPipeline.from_pretrained(run / ("lora" if values.get("lora") else "pipeline"))
    assert (pipe.record.method, pipe.record.guidance, pipe.scheduler.config.shift) == ("scott", "distilled", 3.0)
    if values.get("lora"):
        learnt = [value for key, value in network_of(pipe).named_parameters() if "lora_B" in key]
        assert any(value.abs().max() > 0 for value in learnt)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a bag", height=32, width=32, output_type="pt").images.isfinite().all()


def test_there_is_no_decoder_to_adapt(home: Path) -> None:
    with pytest.raises(
        SystemExit, match="trains the decoder of a UNet, but the teacher is a SD3Transformer2DModel: take heads"
    ):
        distil(home, "refused", critic="lora_decoder", adversarial_start=1, **LORA)
    assert not (home / "refused" / "checkpoint-3").exists()


def test_motion_modules_need_a_unet(home: Path) -> None:
    flags = {"pretrained_teacher_model": home / "teacher", "output_dir": home / "clips", "report_to": "none"}
    with pytest.raises(
        SystemExit, match=r"Motion modules go between the layers of a UNet, but .* has a SD3Transformer2DM"
    ):
        run_script("distill_animatelcm", stage="image_lora", train_data_dir=home / "data", **flags)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("make", TEACHERS.values(), ids=TEACHERS)
def test_heads_see_what_the_teacher_sees(make: Callable[[], DiffusionPipeline], lora: bool) -> None:
    """Three logits per token at most, none of an opinion at first; the student's adapters do not matter."""
    pipe = make()
    network, cond = network_of(pipe), branches(family_of(network_of(pipe)), pipe)[0]
    cond.pop("guidance", None)
    nets = make_networks(network.requires_grad_(False), StudentConfig(lora=lora, lora_rank=2))
    critic = make_critic(nets, CriticConfig("heads", critic_channels=16))
    channels = 16 if make is tiny_klein else 4
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    logits = critic(x, t, cond)
    assert logits.shape[0] == 2
    assert logits.shape[1] >= 2 * (64 if make in (tiny_sd3, tiny_sana, tiny_klein) else 16)
    assert not logits.any()
    with torch.no_grad():
        for value in critic.parameters():
            if not value.any():
                value.normal_(generator=torch.Generator().manual_seed(1))
    logits = critic(x, t, cond)
    logits.square().sum().backward()
    assert x.grad.abs().max() > 0
    assert all(value.grad is not None for value in critic.parameters())
    assert all(value.grad is None for value in nets.student.parameters())
    if lora:
        with torch.no_grad():
            for value in nets.student.parameters():
                if value.requires_grad:
                    value.normal_()
        assert torch.equal(critic(x, t, cond), logits)


def test_the_mean_of_a_prompt_is_that_of_its_own_words() -> None:
    states = torch.tensor([[[1.0], [3.0], [100.0]], [[1.0], [3.0], [5.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert mean_text({"prompt_embeds": states, "prompt_embeds_mask": mask}).tolist() == [[2.0], [3.0]]
    assert mean_text({"encoder_hidden_states": states[1:]}).tolist() == [[3.0]]


def test_every_solver_starts_from_the_noise_of_a_flow() -> None:
    """Where no signal is: that is refused of Stable Diffusion's process alone."""
    teaching = flow_teaching(lambda network, x, t, cond: network(x, t), 3.0)
    assert teaching.starts_from_noise
    for solver in ("ddim", "heun", "dpm_2s"):
        LCMObjective(LCMConfig(solver=solver), teaching)
    for sde in ("ddim", "er_sde"):
        SCottObjective(SCottConfig(sde=sde), teaching, critic=False)


def test_two_processes_share_the_students_of_qwen_image(tmp_path: Path) -> None:
    """All that trains has a gradient on both, and what has none is not waited for."""
    run_worker("qwen_worker.py", tmp_path)
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert_same(second, first)
    moved = {name for name, value in first.items() if value.any()}
    assert len(moved) > 0.9 * len(first)
    assert not any("blocks.1.txt_mlp" in name or "blocks.1.attn.to_add_out" in name for name in first)


def test_a_refusal_is_a_user_error() -> None:
    nets = make_networks(network_of(tiny_sd3()).requires_grad_(False), StudentConfig())
    with pytest.raises(UserError, match="take heads, vision or none"):
        make_critic(nets, CriticConfig("lora_decoder"))
