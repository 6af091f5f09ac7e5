"""AnimateLCM's stages on tiny networks: who learns, what the target is at first and later, and what is published."""

import copy
import json

import pytest
import torch
from diffusers import AnimateDiffPipeline, ControlNetModel, LCMScheduler, MotionAdapter
from models.test_motion import NEW, clips, randomised
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import tiny_pipeline, tiny_scheduler
from toys import assert_same

from cm_diffusers.data.found import Found
from cm_diffusers.data.sampler import Stream
from cm_diffusers.engine.averages import ema_update
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.families.unet import LCM_LORA_TARGETS
from cm_diffusers.models.image_to_video import ImageToVideoAdapter
from cm_diffusers.models.motion import MOTION, MotionConfig, motion_scheduler, new_motion_adapter
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.pipelines.lora import PEFT_PREFIX, PEFT_WEIGHTS
from cm_diffusers.publishing.pipelines import lcm_record, save_lora
from cm_diffusers.publishing.provenance import describe_run
from cm_diffusers.record import read_record
from cm_diffusers.tasks.animatelcm import Parts, StageConfig, make_stage
from cm_diffusers.types import Batch, Progress


METHOD = LCMConfig(w_min=2.0, w_max=2.0)


def randomised_parts():
    """A tiny teacher whose motion modules do something."""
    torch.manual_seed(0)
    image = tiny_pipeline()
    image.unet.requires_grad_(False)
    ddim = motion_scheduler(MotionConfig(), image.scheduler)
    return Parts(image, randomised(new_motion_adapter(image.unet, NEW)), LCMScheduler.from_config(ddim.config))


@pytest.fixture(scope="module")
def parts():
    return randomised_parts()


@pytest.fixture(scope="module")
def lora(parts, tmp_path_factory):
    """A LoRA that changes the network, of the teacher's schedule."""
    return lora_folder(tmp_path_factory.mktemp("lora"), parts.scheduler)


def lora_folder(folder, scheduler):
    torch.manual_seed(1)
    unet = add_lora(tiny_unet_of(tiny_pipeline()), 4, 8.0, 0.0, list(LCM_LORA_TARGETS))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    save_lora(unet, folder / "lora", lcm_record("base", "distilled", 2.0, 2.0, 1.0, scheduler))
    return str(folder / "lora")


def tiny_unet_of(pipe):
    return copy.deepcopy(pipe.unet)


def stage(parts, name, **settings):
    return make_stage(StageConfig(name, **settings), LCMConfig() if name == "adapter" else METHOD, parts)


def batch(frames=3, **conditions):
    x, states, _ = clips(frames=frames)
    cond = {"encoder_hidden_states": states, **conditions}
    return Batch(x, cond, cond | {"encoder_hidden_states": torch.zeros_like(states)})


def trainable(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def step(made, data):
    """One step of plain gradient descent; the loss before it."""
    loss = made.objective(made.nets, data, Progress(0, 10)).value
    loss.backward()
    with torch.no_grad():
        for parameter in made.nets.student.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-2 * parameter.grad)
                parameter.grad = None
    return loss.item()


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_motion_trains_motion_modules_only_and_the_teacher_stays(parts, lora):
    made = stage(parts, "motion", spatial_lora=lora)
    nets = made.nets
    assert all(MOTION in name for name in trainable(nets.student))
    assert len(trainable(nets.student)) > 50
    assert trainable(nets.teacher) == trainable(nets.target) == set()
    teacher, student, target = state(nets.teacher), state(nets.student), state(nets.target)
    for _ in range(2):
        assert step(made, batch()) > 0
    assert_same(state(nets.teacher), teacher)
    assert_same(state(nets.target), target)
    changed = {name for name, value in state(nets.student).items() if not torch.equal(value, student[name])}
    assert changed
    assert all(MOTION in name for name in changed)
    assert_same(state(parts.image.unet), state(tiny_pipeline().unet))


def test_the_lora_leaks_into_the_target(parts, lora):
    """2402.00769 v1, Sec. 4.2: after k averages the target's image layers are W + (1 - mu^k) BA."""
    nets = stage(parts, "motion", spatial_lora=lora).nets
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    raw = load_file(f"{lora}/{PEFT_WEIGHTS}")
    delta = 8 / 4 * raw[f"{PEFT_PREFIX}{path}.lora_B.weight"] @ raw[f"{PEFT_PREFIX}{path}.lora_A.weight"]
    before = parts.image.unet.get_submodule(path).weight
    assert delta.abs().max() > 0.01
    assert torch.allclose(nets.student.get_submodule(path).weight, before + delta, atol=1e-6)
    assert_same(state(nets.target), state(nets.teacher))
    for k in range(1, 15):
        ema_update(nets.target, nets.student, 0.95)
        found = nets.target.get_submodule(path).weight
        assert torch.allclose(found, before + (1 - 0.95**k) * delta, atol=1e-6)
    assert_same(
        state(stage(parts, "motion", spatial_lora=lora, target_init="student").nets.target), state(nets.student)
    )


def test_a_cast_teacher_leaves_the_student_in_full_precision(parts, lora):
    nets = stage(parts, "motion", spatial_lora=lora, cast_teacher_unet="bf16").nets
    assert {p.dtype for p in nets.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for n in (nets.student, nets.target) for p in n.parameters()} == {torch.float32}


def test_a_lora_of_another_schedule_is_refused(parts, tmp_path):
    other = lora_folder(tmp_path, LCMScheduler.from_config(tiny_scheduler().config))
    with pytest.raises(ValueError, match=r"The LoRA .* was trained on another noise schedule than the teacher's"):
        stage(parts, "motion", spatial_lora=other)


def test_joint_trains_the_lora_of_image_layers_and_the_motion_modules(parts):
    made = stage(parts, "joint", lora_rank=4, lora_alpha=4.0)
    names = trainable(made.nets.student)
    assert {name for name in names if MOTION in name and "lora" in name} == set()
    assert any(MOTION in name for name in names)
    image = add_lora(tiny_unet_of(parts.image), 4, 4.0, 0.0, list(LCM_LORA_TARGETS))
    assert {name for name in names if "lora" in name} == trainable(image)
    x, states, t = clips()
    with torch.no_grad():  # at first the student is the teacher
        asked = x, t, states.repeat_interleave(3, 0)
        assert torch.allclose(made.nets.student.eval()(*asked).sample, made.nets.teacher(*asked).sample, atol=1e-5)
    assert step(made, batch()) > 0


def test_image_lora_sees_single_frames(parts):
    fresh = Parts(tiny_pipeline(), None, parts.scheduler)
    made = stage(fresh, "image_lora", lora_rank=4, lora_alpha=4.0)
    assert all("lora" in name for name in trainable(made.nets.student))
    whole = batch(frames=3)
    single = next(iter(made.views(Stream(lambda start: iter([whole]), found=Found("clips")))(0)))
    assert single.x0.shape == (6, 4, 8, 8)
    assert torch.equal(single.x0[4], whole.x0[1, :, 1])  # the second clip's second frame
    assert torch.equal(single.cond["encoder_hidden_states"][4], whole.cond["encoder_hidden_states"][1])
    assert step(made, single) > 0


@pytest.mark.parametrize(("condition", "kind"), [("image", ImageToVideoAdapter), ("edges", ControlNetModel)])
def test_adapter_trains_nothing_but_the_condition(parts, lora, condition, kind):
    made = stage(parts, "adapter", spatial_lora=lora, condition=condition)
    network = made.nets.student
    assert isinstance(network.condition, kind)
    assert all(name.startswith("condition.") for name in trainable(network))
    told = (
        {"image_latents": torch.randn(2, 4, 8, 8)}
        if condition == "image"
        else {"control": torch.rand(2, 3, 3, 32, 32)}
    )
    x, states, t = clips()
    with torch.no_grad():  # a new condition changes nothing
        alone = network.unet(x, t, states.repeat_interleave(3, 0)).sample
        assert torch.allclose(network(x, t, states.repeat_interleave(3, 0), **told)[0], alone, atol=1e-5)
    before = state(network.unet)
    for _ in range(2):
        assert step(made, batch(**told)) > 0
    assert_same(state(network.unet), before)
    with torch.no_grad():
        changed = network(x, t, states.repeat_interleave(3, 0), **told)[0]
    assert (changed - alone).abs().max() > 1e-6


def frames_of(pipe):
    asked = {"num_frames": 3, "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
    return pipe("a bag", **asked, generator=torch.Generator().manual_seed(0), output_type="pt").frames


@pytest.mark.parametrize("name", ["motion", "joint"])
def test_what_is_saved_samples_alike_in_a_stock_pipeline(parts, lora, tmp_path, name):
    settings = {"spatial_lora": lora} if name == "motion" else {"lora_rank": 4, "lora_alpha": 4.0}
    made = stage(parts, name, **settings)
    for _ in range(2):
        step(made, batch())
    network, folder = made.nets.student.eval(), tmp_path / made.result
    record = lcm_record("base", "distilled", 2.0, 2.0, 1.0, parts.scheduler)
    provenance = describe_run([StageConfig(name, **settings)], parts.image, "base", "clips", "mine/student")
    made.save(network, folder, record, provenance)
    assert read_record(folder).method == "animatelcm"
    assert read_record(folder).scheduler["beta_schedule"] == "linear"
    assert json.loads((folder / "scheduler_config.json").read_text())["beta_schedule"] == "linear"

    image = tiny_pipeline()
    stock = AnimateDiffPipeline(
        **{name: image.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet")},
        motion_adapter=MotionAdapter.from_pretrained(folder),
        scheduler=LCMScheduler.from_pretrained(folder),
    )
    stock.load_lora_weights(folder)
    adapted = [path for path, layer in stock.unet.named_modules() if hasattr(layer, "lora_A")]
    assert adapted
    assert not any(MOTION in path for path in adapted)
    raw = load_file(folder / PEFT_WEIGHTS)
    loaded = get_peft_model_state_dict(stock.unet, adapter_name="default_0")
    assert_same({f"{PEFT_PREFIX}{key}": value for key, value in loaded.items()}, raw)  # none missing, none unexpected
    wanted = frames_of(made.make_pipeline(network))
    assert torch.allclose(frames_of(stock), wanted, atol=2e-5)
    stock.unload_lora_weights()
    assert (frames_of(stock) - wanted).abs().max() > 2e-4  # the LoRA matters


def test_bad_input(parts, lora):
    with pytest.raises(ValueError, match="stage motion needs the LCM-LoRA of the image model"):
        stage(parts, "motion")
    with pytest.raises(ValueError, match="--target_init has no effect in stage joint"):
        stage(parts, "joint", target_init="student")
    with pytest.raises(ValueError, match="--spatial_lora has no effect in stage image_lora"):
        stage(parts, "image_lora", spatial_lora=lora)
    with pytest.raises(ValueError, match="--condition has no effect in stage motion"):
        stage(parts, "motion", spatial_lora=lora, condition="edges")
    with pytest.raises(ValueError, match="Unknown --stage 'video'"):
        stage(parts, "video")
    with pytest.raises(ValueError, match="nowhere"):
        stage(parts, "motion", spatial_lora="/nowhere/lora")
