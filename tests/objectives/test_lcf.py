"""Latent consistency fine-tuning: against data whose consistency function is known, and the script end to end."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from data.test_streaming import encoded, write_tar
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import ModelCard
from latent_objectives import lcf_of, lcm_of
from oracles import ConsistencyNet, Gaussian, OracleNet
from safetensors.torch import load_file, save_file
from scripts import data_flags, image_folder, run_script, script
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet
from tiny_xl import tiny_xl_pipeline, tiny_xl_unet
from torch import nn
from toys import assert_same, tensors

from cm_diffusers.diffusion.process import DiscreteVP, diffuse
from cm_diffusers.engine.averages import ema_update
from cm_diffusers.models.students import frozen_copy
from cm_diffusers.objectives.lcf import LCFConfig
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.pipelines.pipeline_consistency import ConsistencyPipeline
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record, lcm_scheduler, save_pipeline
from cm_diffusers.record import RECORD, base_model_of, read_record, write_record
from cm_diffusers.tasks.finished_students import FinetuneConfig, load_student, with_guidance_of
from cm_diffusers.types import Batch, Networks, Progress


VP = DiscreteVP.from_scheduler(tiny_scheduler())
PROGRESS = Progress(0, 10)
TYPES = ["epsilon", "v_prediction", "sample"]


def lcf(prediction_type="epsilon", dim=None, grid=50, **settings):
    return lcf_of(LCFConfig(**{"loss_type": "l2"} | settings), VP, prediction_type, dim, grid)


def draw(data, *shape):
    return data.mean + data.std * torch.randn(shape, dtype=torch.float64)


# ---- the objective


def test_boundary_is_exact_for_any_network():
    objective, x = lcf(dim=16, w_min=0.0, w_max=1.0), torch.randn(3, 4, 8, 8)
    cond = {"encoder_hidden_states": torch.randn(3, 5, 32), "timestep_cond": torch.randn(3, 16)}
    with torch.no_grad():
        f = objective.teaching.jump(tiny_unet(time_cond_proj_dim=16), x, torch.zeros(3, dtype=torch.long), cond, None)
    assert torch.equal(f, x)


def oracle_loss(data, prediction_type="epsilon", grid=50):
    student = ConsistencyNet(VP, prediction_type, data)
    with torch.no_grad():
        batch = Batch(draw(data, 40_000, 16))
        return lcf(prediction_type, grid=grid)(Networks(student), batch, PROGRESS).value.item()


def expected_loss(data, grid):
    """Of the exact consistency function, in closed form: the pair's jumps differ by what one x_t can have come from."""
    v, skip, total = data.std**2, 1000 // grid, 0.0
    for t in range(skip - 1, 1000, skip):
        a_t, a_s, a_0 = (float(VP.alphas_cumprod[i]) for i in (t, max(t - skip, 0), 0))
        var_t, var_s, var_0 = (a * v + 1 - a for a in (a_t, a_s, a_0))
        covariance = (a_t * a_s) ** 0.5 * v + ((1 - a_t) * (1 - a_s)) ** 0.5
        total += 2 * var_0 * (1 - covariance / (var_t * var_s) ** 0.5) / grid
    return total


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("grid", [25, 100])
def test_loss_on_the_oracle_has_the_predicted_value(prediction_type, grid):
    data = Gaussian(0.3, 0.5)
    assert oracle_loss(data, prediction_type, grid) == pytest.approx(expected_loss(data, grid), rel=0.03)


def test_loss_on_the_oracle_falls_with_the_square_of_the_grid():
    """12.4 of the closed forms: what one x_t leaves open is O(h) apart; noise that is not shared would leave O(1)."""
    losses = [oracle_loss(Gaussian(0.3, 0.5), grid=n) for n in (25, 50, 100, 200)]
    assert all(3.4 < coarse / fine < 4.4 for coarse, fine in pairwise(losses))


def test_no_loss_on_a_point_mass():
    data = Gaussian(0.7, 0.0)
    for solution, bounds in ((data, (0, 1e-10)), (Gaussian(0.7, 0.5), (1e-4, 1))):
        nets = Networks(ConsistencyNet(VP, "epsilon", solution))
        assert bounds[0] <= lcf()(nets, Batch(draw(data, 500, 4)), PROGRESS).value.item() < bounds[1]


class Affine(nn.Module):
    """x0 = gain[t] x + bias[t]: every time has its own student."""

    def __init__(self):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(1000, 1)), nn.Parameter(torch.zeros(1000, 1))

    def forward(self, x_t, t, return_dict=True):
        return (self.gain[t] * x_t + self.bias[t],)


def test_gradient_is_that_of_distillation_from_an_exact_teacher():
    """E[x_s | x_t] is one DDIM step: consistency training is distillation on average (2303.01469, Theorem 2)."""
    data, gradients = Gaussian(0.5, 0.5), []
    teacher = OracleNet(VP, "sample", data)
    settings = {"w_min": 0.0, "w_max": 0.0, "loss_type": "l2", "num_ddim_timesteps": 4, "time_power": 0.0}
    distillation = lcm_of(LCMConfig(**settings), VP, "sample", None)
    for objective in (lcf("sample", grid=4), distillation):
        student = Affine()
        batch = Batch(draw(data, 400_000, 2).float())
        objective(Networks(student, teacher=teacher), batch, PROGRESS).value.backward()
        gradients.append(torch.stack([p.grad[objective.teaching.grid, 0] for p in student.parameters()]))
    assert gradients[1].abs().min() > 1e-3
    torch.testing.assert_close(*gradients, rtol=0.03, atol=3e-3)


def test_training_converges_to_what_is_known_in_closed_form():
    """Per time the regression of f(x_s) on x_t: the product of cov(x_s, x_t) / var(x_t), which is DDIM's."""
    data, objective, student = Gaussian(0.5, 0.5), lcf("sample", grid=4), Affine()
    nets = Networks(student, target=frozen_copy(student))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for step in range(800):
        optimizer.zero_grad()
        objective(nets, Batch(draw(data, 512, 2).float()), Progress(step, 800)).value.backward()
        optimizer.step()
        decay.step()
        ema_update(nets.target, student, 0.9)
    gain, mean = 1.0, data.mean * float(VP.alphas_cumprod[0]) ** 0.5
    for t, s in ((249, 0), (499, 249), (749, 499), (999, 749)):
        a_t, a_s = (float(VP.alphas_cumprod[i]) for i in (t, s))
        gain *= ((a_t * a_s) ** 0.5 * 0.25 + ((1 - a_t) * (1 - a_s)) ** 0.5) / (a_t * 0.25 + 1 - a_t)
        assert student.gain[t].item() == pytest.approx(gain, abs=0.01)
        assert student.bias[t].item() == pytest.approx(mean - gain * a_t**0.5 * data.mean, abs=0.01)


class Recorder(nn.Module):
    """Keeps the arguments of every call, and a random number drawn in it."""

    def __init__(self):
        super().__init__()
        self.gain, self.calls = nn.Parameter(torch.ones(())), []

    def forward(self, x_t, t, **cond):
        self.calls.append({"x": x_t, "t": t, "draw": torch.rand(1)} | cond)
        return (self.gain * x_t,)


@pytest.mark.parametrize("with_target", [True, False])
def test_the_pair_shares_noise_guidance_and_random_state(with_target):
    x0, student = torch.randn(64, 8, dtype=torch.float64), Recorder()
    nets = Networks(student, target=Recorder() if with_target else None)
    objective = lcf("sample", dim=16, w_min=2.0, w_max=14.0)
    loss = objective(nets, Batch(x0, {"label": torch.ones(64)}), PROGRESS)
    offline, online = (*nets.target.calls, *student.calls) if with_target else student.calls
    noise = [
        (call["x"] - VP.alpha(call["t"])[:, None] * x0) / VP.sigma(call["t"])[:, None] for call in (online, offline)
    ]
    torch.testing.assert_close(*noise, rtol=0, atol=1e-9)
    assert noise[0].std().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(offline["t"], (online["t"] - 20).clamp(min=0))
    assert set(online["t"].tolist()) <= set(objective.teaching.grid.tolist())
    for name in ("draw", "timestep_cond", "label"):
        assert torch.equal(online[name], offline[name])
    told = 10 * online["timestep_cond"][:, 7].asin()  # the slowest wave is sin(1000 w / 10000)
    assert 2 <= told.min() < 5 < 11 < told.max() <= 14
    assert loss.logs["w"].item() == pytest.approx(told.mean().item(), rel=1e-4)
    f = objective.teaching.jump(lambda x, t, **_: (x,), online["x"], online["t"], {}, None)
    g = objective.teaching.jump(lambda x, t, **_: (x,), offline["x"], offline["t"], {}, None)
    assert loss.value.item() == pytest.approx((f - g).square().mean().item(), rel=1e-9)


def test_a_student_without_guidance_input_gets_none():
    student = Recorder()
    loss = lcf()(Networks(student), Batch(torch.randn(2, 4)), PROGRESS)
    assert loss.logs == {}
    assert all("timestep_cond" not in call for call in student.calls)


def test_objective_refuses():
    with pytest.raises(ValueError, match=r"--w_min 5\.0 is above --w_max 2\.0; swap them"):
        lcf(dim=16, w_min=5.0, w_max=2.0)
    with pytest.raises(ValueError, match="Unknown --loss_type 'l1'; one of l2, huber"):
        lcf(loss_type="l1")
    zero = DiscreteVP.from_scheduler(DDIMScheduler.from_config(tiny_scheduler().config, rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="zero terminal SNR"):
        lcf_of(LCFConfig(), zero, "epsilon", None)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_sampling_loop_equals_the_scheduler(n):
    """What it is trained with is what it is sampled with, at another grid and scaling than the defaults."""
    scheduler = LCMScheduler.from_config(tiny_scheduler().config, original_inference_steps=20, timestep_scaling=5.0)
    scheduler.set_timesteps(n)
    objective = lcf_of(LCFConfig(), VP, "epsilon", None, 20, 5.0)
    net = OracleNet(VP, "epsilon", Gaussian(0.4, 0.5)).requires_grad_(False)
    ours = theirs = torch.randn(2, 4, 8, 8)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    times = scheduler.timesteps.tolist()
    assert set(times) <= set(objective.teaching.grid.tolist())
    for i, t in enumerate(times):
        ours = objective.teaching.jump(net, ours, torch.tensor([t, t]), {}, None)
        if i + 1 < n:
            noise = torch.randn(ours.shape, generator=generators[0], dtype=ours.dtype)
            ours = diffuse(VP, ours, noise, torch.tensor([times[i + 1]] * 2))
        output = net(theirs, torch.tensor([t, t]), return_dict=False)[0].float()
        theirs = scheduler.step(output, t, theirs, generator=generators[1], return_dict=False)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ---- students to start from


def save_student(folder: Path, embedded: bool = True, xl: bool = False, with_record: bool = True) -> Path:
    dim = 32 if embedded else None
    teacher = tiny_xl_pipeline() if xl else tiny_pipeline()
    unet = tiny_xl_unet(time_cond_proj_dim=dim) if xl else tiny_unet(time_cond_proj_dim=dim)
    scheduler = lcm_scheduler(teacher, 20, 5.0)
    record = lcm_record("the/teacher", "embedded" if embedded else "distilled", 1.0, 7.0, 6.0, scheduler)
    save_pipeline(lcm_pipeline(teacher, unet, scheduler), folder, False, record if with_record else None)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("lcf")
    image_folder(home / "data")
    for embedded in (True, False):
        save_student(home / ("embedded" if embedded else "plain"), embedded)
    save_student(home / "xl", xl=True)
    tiny_pipeline().save_pretrained(home / "teacher")
    return home


def finetune(home: Path, name: str, student: str = "embedded", **values: object) -> Path:
    folder = home / name
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2, "export_ema_decay": 0.5}
    flags |= data_flags(home / "data", home / "cache") | {"pretrained_student_model": home / student}
    run_script("finetune_lcf", **flags | {"output_dir": folder} | values)
    return folder


def published(pipe, steps=2, scale=4.0):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a coat", num_inference_steps=steps, guidance_scale=scale, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images  # fmt: skip


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("embedded", LatentConsistencyModelPipeline),
        ("plain", StableDiffusionPipeline),
        ("xl", StableDiffusionXLPipeline),
    ],
)
def test_finetuned_students_are_stock_pipelines_with_a_record(home, student, expected):
    folder = finetune(home, f"from-{student}", student, max_train_steps=2)
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    assert type(pipe) is expected
    assert type(pipe.scheduler) is LCMScheduler
    assert (pipe.scheduler.config.original_inference_steps, pipe.scheduler.config.timestep_scaling) == (20, 5.0)
    before = read_record(home / student)
    after = read_record(folder / "pipeline")
    assert after == replace(before, method="lcf", base_model=f"../../{student}", resolution=32)
    weights, old = (
        load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (folder / "pipeline", home / student)
    )
    assert [name for name, value in weights.items() if torch.equal(value, old[name])] == []
    ours = ConsistencyPipeline.from_pretrained(folder / "pipeline")
    scale = 6.0 if student != "plain" else 1.0
    torch.testing.assert_close(*(torch.from_numpy(published(p, scale=scale)) for p in (pipe, ours)), rtol=0, atol=1e-4)


def test_card_says_what_was_done(home):
    text = (home / "from-embedded" / "pipeline" / "README.md").read_text()
    card = ModelCard(text)
    assert {"lcf", "cm_diffusers"} <= set(card.data.tags)
    assert "fine-tuned from" in text
    assert "| w_min | 1.0 |" in text, "the range that was trained, not the flag that was left out"
    assert str(home) not in text


def test_resume_is_bit_exact(home, monkeypatch):
    monkeypatch.setattr(script("finetune_lcf"), "release_encoders", lambda pipe: pytest.fail("they are published"))
    whole = finetune(home, "whole", gradient_accumulation_steps=2)
    resumed = finetune(home, "resumed", gradient_accumulation_steps=2, resume_from_checkpoint=whole / "checkpoint-2")
    assert_same(tensors(resumed / "checkpoint-4"), tensors(whole / "checkpoint-4"))


def test_adapters_belong_on_the_student(home, monkeypatch):
    released, tuning = [], script("finetune_lcf")
    release = tuning.release_encoders
    monkeypatch.setattr(tuning, "release_encoders", lambda pipe: released.append(pipe) or release(pipe))
    folder = finetune(home, "lora", lora=True, lora_rank=2, lora_alpha=4.0) / "lora"
    assert len(released) == 1
    record = read_record(folder)
    assert (record.method, record.base_model, record.guidance) == ("lcf", "../../embedded", "embedded")
    assert base_model_of(record, folder) == str(home / "embedded")
    stock = DiffusionPipeline.from_pretrained(home / "embedded")
    plain = published(stock)
    stock.load_lora_weights(folder)
    adapted = published(stock)
    assert abs(adapted - plain).max() > 1e-4
    assert abs(published(ConsistencyPipeline.from_pretrained(folder)) - adapted).max() < 1e-4


def test_a_lora_of_ours_is_fused(home):
    teacher = {"pretrained_teacher_model": home / "teacher", "output_dir": home / "distilled"}
    flags = {"lora": True, "lora_rank": 2, "max_train_steps": 2, "learning_rate": 1e-2}
    run_script("distill_lcm", **data_flags(home / "data", home / "cache") | teacher | flags)
    pipe, record = load_student(FinetuneConfig(str(home / "distilled" / "lora")))
    assert record.guidance == "distilled"
    stock = DiffusionPipeline.from_pretrained(home / "teacher")
    assert not torch.equal(pipe.unet.conv_in.weight, stock.unet.mid_block.attentions[0].proj_in.weight)
    stock.load_lora_weights(home / "distilled" / "lora")
    given = torch.randn(2, 4, 8, 8), torch.tensor([19, 999]), torch.randn(2, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(*given).sample, stock.unet(*given).sample, rtol=1e-4, atol=1e-4)
    assert not [name for name in pipe.unet.state_dict() if "lora" in name]
    with pytest.raises(ValueError, match="one LoRA on another cannot be published; leave --lora out"):
        load_student(FinetuneConfig(str(home / "distilled" / "lora"), lora=True))
    folder = finetune(home, "from-lora", "distilled/lora", max_train_steps=1)
    assert type(DiffusionPipeline.from_pretrained(folder / "pipeline")) is StableDiffusionPipeline


@pytest.mark.parametrize(
    ("embedded", "guidance", "bounds"), [(True, "embedded", (2, 14)), (False, "distilled", (6.5, 6.5))]
)
def test_published_models_without_a_record(tmp_path, embedded, guidance, bounds):
    _, record = load_student(FinetuneConfig(str(save_student(tmp_path / "s", embedded, with_record=False))))
    assert (record.guidance, record.w_min, record.w_max) == (guidance, *bounds)
    assert record.scheduler["original_inference_steps"] == 20
    assert record.scheduler["_class_name"] == "LCMScheduler"


def test_guidance_range(home):
    _, record = load_student(FinetuneConfig(str(home / "embedded")))
    config = FinetuneConfig("here")
    method, after = with_guidance_of(record, LCFConfig(), config)
    assert (method.w_min, method.w_max, after.w_min, after.w_max) == (1, 7, 1, 7)
    method, after = with_guidance_of(record, LCFConfig(w_max=3.0), config)
    assert (method.w_min, method.w_max, after.w_max, after.recommended_guidance_scale) == (1, 3, 3, 4)
    plain = load_student(FinetuneConfig(str(home / "plain")))[1]
    with pytest.raises(ValueError, match="--w_max has no effect: here takes no guidance as an input"):
        with_guidance_of(plain, LCFConfig(w_max=3.0), config)


def test_students_that_cannot_be_finetuned(home, tmp_path):
    with pytest.raises(ValueError, match="no record: nothing says that it is a latent consistency model"):
        load_student(FinetuneConfig(str(home / "teacher")))
    with pytest.raises(ValueError, match="neither a pipeline folder here nor a Hub id within reach"):
        load_student(FinetuneConfig(str(tmp_path / "nothing")))
    folder = save_student(tmp_path / "student")
    content = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(content | {"method": "boot"}))
    with pytest.raises(ValueError, match="was made by 'boot'; fine-tuning is for latent consistency models"):
        load_student(FinetuneConfig(str(folder)))
    write_record(replace(read_record(folder), method="lcm"), folder)
    config = folder / "vae" / "config.json"
    content = config.read_text()
    config.write_text(json.dumps(json.loads(content) | {"latents_std": [2.0] * 4}))
    with pytest.raises(ValueError, match="normalises every channel"):
        load_student(FinetuneConfig(str(folder)))
    config.write_text(content)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    broken = load_file(weights)
    broken["conv_in.bias"][0] = float("nan")
    save_file(broken, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds 1 tensors that are not finite, such as unet\.conv_in\.bias"):
        load_student(FinetuneConfig(str(folder)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts_file": "prompts.txt"}, "--prompts_file prompts.txt: this script has no such flag"),
        ({"validation_guidance_scale": 3.0}, "--validation_guidance_scale has no effect without a teacher"),
        ({"lora_rank": 3}, "--lora_rank has no effect without --lora"),
        ({"lora": True, "lora_rank": 0}, "--lora_rank must be at least 1, but it is 0"),
    ],
)
def test_flags_that_cannot_act(home, values, message):
    with pytest.raises(SystemExit, match=message):
        finetune(home, "refused", **values)


def test_streamed_data_finetunes_and_resumes(home, monkeypatch):
    flags = {"train_shards_path_or_url": home / "tars" / "{0,1}.tar", "streaming": True, "shuffle_buffer_size": 2}
    for i in range(2):
        members = {f"{n}.{end}": data for n in range(3) for end, data in (("png", encoded(n)), ("txt", b"a coat"))}
        write_tar(home / "tars" / f"{i}.tar", members)
    data = data_flags(home / "data", home / "cache")
    only = {name: value for name, value in data.items() if name not in ("train_data_dir", "latent_cache_dir")}

    def run(name, **values):
        paths = {"pretrained_student_model": home / "embedded", "output_dir": home / name}
        run_script("finetune_lcf", **only | flags | paths | {"max_train_steps": 4, "checkpointing_steps": 2} | values)
        return tensors(home / name / "checkpoint-4")

    whole = run("streamed")
    assert_same(run("streamed-on", resume_from_checkpoint=home / "streamed" / "checkpoint-2"), whole)
