"""From an image model to a video model: the identity start, what trains, the noise schedule and the files."""

import copy
import re
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, MotionAdapter, UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from safetensors.torch import load_file, save_file
from tiny import tiny_scheduler, tiny_unet
from toys import assert_same

from cm_diffusers.diffusion.denoisers import as_denoiser
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.models.motion import (
    MOTION,
    MotionConfig,
    NewMotionConfig,
    check_same_schedule,
    inflate,
    load_motion_adapter,
    motion_adapter_of,
    motion_scheduler,
    new_motion_adapter,
    starting_adapter,
    train_motion,
)
from cm_diffusers.objectives.diffusion import DiffusionConfig, DiffusionObjective
from cm_diffusers.publishing.pipelines import save_motion_adapter
from cm_diffusers.publishing.provenance import Provenance
from cm_diffusers.types import Batch, Networks, Progress


SETTINGS = {"pretrained_teacher_model": "ada/images", "sample_n_frames": 8}
MADE = Provenance("ada/motion", None, None, "ada/clips", {}, "python x.py", "abc1234", SETTINGS)
NEW = NewMotionConfig(motion_num_attention_heads=4, motion_max_seq_length=8)


def randomised(adapter: MotionAdapter) -> MotionAdapter:
    """Motion modules that do something."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


def clips(batch=2, frames=3):
    return torch.randn(batch, 4, frames, 8, 8), torch.randn(batch, 5, 32), torch.tensor([900, 3])[:batch]


def per_frame(unet, x, t, states):
    return torch.stack([unet(x[:, :, i], t, states).sample for i in range(x.shape[2])], 2)


@pytest.mark.parametrize("shape", [{}, {"layers_per_block": 2, "norm_num_groups": 16}])
@torch.no_grad()
def test_a_new_adapter_changes_nothing(shape):
    unet = tiny_unet(**shape)
    x, states, t = clips()
    video = inflate(unet, new_motion_adapter(unet, NEW)).eval()
    found = video(x, t, states.repeat_interleave(3, 0)).sample
    assert torch.allclose(found, per_frame(unet, x, t, states), atol=1e-5)
    changed = inflate(unet, randomised(new_motion_adapter(unet, NEW))).eval()
    assert (changed(x, t, states.repeat_interleave(3, 0)).sample - found).abs().max() > 0.01


@torch.no_grad()
def test_text_is_repeated_for_each_frame_of_its_own_clip():
    """Two clips with two texts: were they repeated in another order, frames would be told the other clip's text."""
    unet, process = tiny_unet(), DiscreteVP.from_scheduler(tiny_scheduler())
    video = inflate(unet, new_motion_adapter(unet, NEW)).eval()
    x, states, t = clips()
    found = as_denoiser(video, process, "epsilon")(x, t, {"encoder_hidden_states": states}).noise
    assert torch.allclose(found, per_frame(unet, x, t, states), atol=1e-5)


@torch.no_grad()
def test_loss_of_clips_is_the_mean_of_their_frames_losses(monkeypatch):
    unet, process = tiny_unet(), DiscreteVP.from_scheduler(tiny_scheduler())
    video = inflate(unet, new_motion_adapter(unet, NEW)).eval()
    objective = DiffusionObjective(DiffusionConfig(condition_dropout=0.0), process)
    x, states, t = clips()
    noise = torch.randn_like(x)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: t)
    drawn = iter([noise, *noise.unbind(2)])
    monkeypatch.setattr(torch, "randn_like", lambda like: next(drawn))
    conditions = {"encoder_hidden_states": states}, {"encoder_hidden_states": torch.zeros_like(states)}
    whole = objective(Networks(video), Batch(x, *conditions), Progress(0, 1)).value
    frames = [objective(Networks(unet), Batch(x[:, :, i], *conditions), Progress(0, 1)).value for i in range(3)]
    assert whole.item() == pytest.approx(torch.stack(frames).mean().item(), rel=1e-5)


def test_only_motion_modules_train():
    unet = tiny_unet()
    video = train_motion(inflate(unet, new_motion_adapter(unet, NEW)))
    names = {name for name, p in video.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in video.named_parameters() if MOTION in name}
    assert len(names) > 50
    x, states, t = clips()
    video(x, t, states.repeat_interleave(3, 0)).sample.square().mean().backward()
    assert all(p.grad is None for name, p in video.named_parameters() if name not in names)
    assert any(p.grad.abs().max() > 0 for name, p in video.named_parameters() if name in names)


def test_modules_come_back_out_bit_for_bit(tmp_path):
    unet = tiny_unet()
    adapter = randomised(new_motion_adapter(unet, NEW))
    video = inflate(unet, adapter)
    scheduler = motion_scheduler(MotionConfig(), tiny_scheduler())
    save_motion_adapter(motion_adapter_of(video, adapter), scheduler, tmp_path / "motion", False, MADE)
    again = load_motion_adapter(MotionConfig(str(tmp_path / "motion")))
    assert_same(again.state_dict(), adapter.state_dict())
    assert again.config.motion_max_seq_length == 8
    stock = UNetMotionModel.from_unet2d(unet, MotionAdapter.from_pretrained(tmp_path / "motion"))
    assert_same(stock.state_dict(), video.state_dict())
    assert DDIMScheduler.from_pretrained(tmp_path / "motion").config.beta_schedule == "linear"


def test_the_schedule_is_animatediffs_unless_one_lies_beside(tmp_path):
    scheduler = motion_scheduler(MotionConfig(), tiny_scheduler("v_prediction"))
    beta = torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)
    assert torch.allclose(scheduler.alphas_cumprod.double(), torch.cumprod(1 - beta, 0), rtol=1e-5)
    assert (scheduler.config.prediction_type, scheduler.config.clip_sample) == ("v_prediction", False)
    scaled = motion_scheduler(MotionConfig(beta_schedule="scaled_linear"), tiny_scheduler())
    assert torch.equal(scaled.alphas_cumprod, tiny_scheduler().alphas_cumprod)
    adapter = new_motion_adapter(tiny_unet(), NEW)
    save_motion_adapter(adapter, scaled, tmp_path / "motion", True, MADE)
    beside = MotionConfig(str(tmp_path / "motion"))
    assert motion_scheduler(beside, tiny_scheduler()).config.beta_schedule == "scaled_linear"
    with pytest.raises(ValueError, match="--beta_schedule linear: the motion modules were trained on scaled_linear"):
        motion_scheduler(MotionConfig(str(tmp_path / "motion"), beta_schedule="linear"), tiny_scheduler())


@pytest.mark.parametrize(("points", "visited"), [(50, [999, 759, 499, 259]), (100, [999, 749, 499, 249])])
def test_a_students_four_timesteps(points, visited):
    """As the published configurations visit them (2402.00769's repository)."""
    ddim = motion_scheduler(MotionConfig(), tiny_scheduler())
    scheduler = LCMScheduler.from_config(ddim.config, original_inference_steps=points)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == visited
    assert scheduler.config.beta_schedule == "linear"


def test_another_schedule_is_refused():
    linear = motion_scheduler(MotionConfig(), tiny_scheduler())
    check_same_schedule(linear, dict(LCMScheduler.from_config(linear.config).config), "The LoRA x")
    with pytest.raises(ValueError, match="The LoRA x was trained on another noise schedule than the teacher's"):
        check_same_schedule(linear, dict(tiny_scheduler().config), "The LoRA x")


def test_published_layouts_without_positions_load(tmp_path):
    adapter = randomised(new_motion_adapter(tiny_unet(), NEW))
    adapter.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if not k.endswith("pos_embed.pe")}, weights, {"format": "pt"})
    assert_same(load_motion_adapter(MotionConfig(str(tmp_path))).state_dict(), adapter.state_dict())
    gone = next(k for k in state if k.endswith("to_q.weight"))
    save_file({k: v for k, v in state.items() if k != gone}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"lacks weights (1, such as {gone})")):
        load_motion_adapter(MotionConfig(str(tmp_path)))


def test_bad_input():
    unet = tiny_unet()
    with pytest.raises(ValueError, match="--pretrained_motion_adapter is missing"):
        load_motion_adapter(MotionConfig())
    with pytest.raises(ValueError, match="'nowhere/at/all' holds no motion adapter that can be loaded"):
        load_motion_adapter(MotionConfig("nowhere/at/all"))
    with pytest.raises(ValueError, match="heads 7 does not divide the 32 channels"):
        new_motion_adapter(unet, NewMotionConfig(motion_num_attention_heads=7))
    with pytest.raises(ValueError, match="--sample_n_frames 9 is more than the 8 frames"):
        starting_adapter(MotionConfig(), NEW, unet, 9)
    with pytest.raises(ValueError, match="made for another image model"):
        inflate(tiny_unet(layers_per_block=2), new_motion_adapter(unet, NEW))
    with pytest.raises(ValueError, match="normalises 8 groups of channels and the image model 16"):
        inflate(tiny_unet(norm_num_groups=16), new_motion_adapter(unet, NEW))


def test_motion_modules_are_recomputed_under_gradient_checkpointing(monkeypatch):
    """Every one runs again in the backward pass, also in a copy, and the gradients are the same."""
    unet = tiny_unet()
    plain = train_motion(inflate(unet, randomised(new_motion_adapter(unet, NEW))))
    checked = copy.deepcopy(plain)
    checked.enable_gradient_checkpointing()
    calls, forward = [], AnimateDiffTransformer3D.forward
    monkeypatch.setattr(
        AnimateDiffTransformer3D, "forward", lambda self, *a, **k: calls.append(id(self)) or forward(self, *a, **k)
    )
    x, states, t = clips()
    counts = {}
    for name, network in (("plain", plain), ("checked", checked)):
        calls.clear()
        network(x, t, states.repeat_interleave(3, 0)).sample.square().mean().backward()
        counts[name] = Counter(calls).values()
    modules = sum(isinstance(module, AnimateDiffTransformer3D) for module in plain.modules())
    assert list(counts["plain"]) == [1] * modules
    assert len(counts["checked"]) == modules
    assert min(counts["checked"]) == 2
    pairs = [(p, q) for p, q in zip(plain.parameters(), checked.parameters(), strict=True) if p.requires_grad]
    assert all(torch.allclose(p.grad, q.grad, atol=1e-6) for p, q in pairs)
