"""The plan against a real trainer on a CPU, published sizes, and what objectives really call."""

import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from latent_objectives import lcm_of
from objectives.test_objectives import CASES, PROGRESS, VP, latents
from scripts import FOLDER, run_script, script
from test_style import RECIPES
from test_style import script_of as script_in_papers
from tiny import tiny_unet
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cm_diffusers.data.rollouts import RolloutConfig
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.sharding import unit_classes
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError
from cm_diffusers.models.counting import count_flops, count_kept
from cm_diffusers.models.critics import CriticConfig, make_critic
from cm_diffusers.models.probes import asking
from cm_diffusers.models.recomputation import recompute_activations
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.objectives.boot import BOOTConfig
from cm_diffusers.objectives.cd import CDConfig, CDObjective
from cm_diffusers.objectives.ct import CTConfig, CTObjective
from cm_diffusers.objectives.ctm import CTMConfig
from cm_diffusers.objectives.edm import EDMConfig, EDMObjective
from cm_diffusers.objectives.ict import ICTConfig, ICTObjective
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.objectives.mean_flow import MeanFlowConfig
from cm_diffusers.objectives.pcm import PCMConfig
from cm_diffusers.objectives.rlcm import RLCMConfig
from cm_diffusers.objectives.scott import SCottConfig
from cm_diffusers.objectives.slct import SLCTConfig, SLCTObjective
from cm_diffusers.objectives.tcd import TCDConfig
from cm_diffusers.tasks.passes import Pass, passes_for_rewards, passes_of
from cm_diffusers.tasks.plan import (
    Counted,
    PlanConfig,
    Strategy,
    count,
    largest_unit,
    parts_of,
    strategies,
)
from cm_diffusers.tasks.plan_networks import Training, training_of
from cm_diffusers.tasks.plan_page import advice, page, recommended
from cm_diffusers.tasks.plan_starts import configs_of, own_words, script_of, start_of
from cm_diffusers.tasks.reward_runs import RewardModelConfig
from cm_diffusers.types import Batch, Networks


sys.path.append(str(FOLDER.parent / "benchmarks"))
import trajectory_step


ASK = asking(8, tokens=5)  # as `latents` has them
GB = 1e9
WHOLE = Counted({"student": 80.0}, 10, 3, 2, 7.0, 5.0, 2e12, 120.0, 4, 2)


def students(lora: bool, device: str = "cpu", **settings: object) -> Networks:
    with torch.device(device):
        config = StudentConfig(unet_time_cond_proj_dim=16, lora=lora, lora_rank=4, **settings)
        return make_networks(tiny_unet(), config)


def training(nets: Networks, size: int = 3) -> Training:
    return Training(nets, ASK, passes_of(LCMConfig()), size)


def config_of(folder: Path, **settings: object) -> TrainConfig:
    given = {"max_train_steps": 2, "report_to": "none", "mixed_precision": "no"} | settings
    return TrainConfig(str(folder), export_ema_decay=0.9, ema_sigma_rels=[0.1, 0.2], **given)


def bytes_of(tensors: object) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("lora", [False, True])
def test_parts_are_those_of_a_real_trainer(lora: bool, tmp_path: Path) -> None:
    train, nets, gradients = config_of(tmp_path), students(lora), []
    trainer = Trainer(train, nets, lcm_of(LCMConfig(), VP, "epsilon", None if lora else 16), OptimConfig())
    (player,) = trainer.players
    optimizer = player.optimizer.optimizer
    optimizer.register_step_pre_hook(lambda *_: gradients.append(bytes_of(p.grad for p in player.trainable)))
    trainer.training_step(iter([latents(3)]))
    found = parts_of(students(lora, "meta"), OptimConfig(), train)
    frozen = [p for p in nets.student.parameters() if not p.requires_grad]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    expected = {
        "student": bytes_of(player.trainable),
        "frozen layers": bytes_of(frozen),
        "target": 0 if lora else bytes_of(nets.target.parameters()),
        "teacher": bytes_of(nets.teacher.parameters()),
        "averages": sum(bytes_of(one.average.values()) for one in trainer.averages.kept.values()),
        "gradients": gradients[0],
    }
    assert found.pop("optimizer") == pytest.approx(bytes_of(moments), rel=0.02)  # which counts the steps, too
    assert found == {name: size for name, size in expected.items() if size}
    assert found["averages"] == 3 * found["student"]


@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_those_that_a_step_keeps(lora: bool, tmp_path: Path) -> None:
    """But for those of the loss, which are as small as a latent."""
    nets, held, alive = students(lora), {}, []
    own = {p.untyped_storage().data_ptr() for _, net in nets.items() for p in net.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in own:
            held[place.data_ptr()] = place.nbytes()
            alive.append(tensor)
        return tensor

    objective = lcm_of(LCMConfig(), VP, "epsilon", None if lora else 16)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(nets, latents(3), PROGRESS)
    given = {TrainConfig: config_of(tmp_path), OptimConfig: OptimConfig()}
    found = count(training(students(lora, "meta")), given)
    assert found.activations == pytest.approx(sum(held.values()), rel=0.1)
    assert found.casts == 0


def test_checkpointed_blocks_keep_their_inputs_and_one_all() -> None:
    nets = students(False, "meta")
    plain = count_kept(nets.student, ASK)
    recompute_activations(nets.student)
    assert 0.1 * plain.activations < count_kept(nets.student, ASK).activations < 0.5 * plain.activations


def test_autocast_copies_weights() -> None:
    """2 bytes for each weight of a layer; norms and biases of convolutions stay, and half of the activations go."""
    student = students(False, "meta").student
    layers = [m for m in student.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    numbers = sum(m.weight.numel() for m in layers)
    plain, half = count_kept(student, ASK), count_kept(student, ASK, torch.bfloat16)
    assert half.casts == pytest.approx(2 * numbers, rel=0.02)
    assert 0.5 < half.activations / plain.activations < 0.8


def test_operations_are_seven_forward_passes(tmp_path: Path) -> None:
    """Guided teacher 2, target 1, student 3, and 1 for what is computed again; a LoRA has no gradients of most weights."""
    given = {TrainConfig: config_of(tmp_path), OptimConfig: OptimConfig()}
    whole = count(training(students(False, "meta")), given)
    again = {TrainConfig: config_of(tmp_path, gradient_checkpointing=True), OptimConfig: OptimConfig()}
    recomputed = count(training(students(False, "meta")), again)
    assert whole.flops / (recomputed.flops - whole.flops) == pytest.approx(6, rel=0.02)
    lora = count(training(students(True, "meta")), given)
    assert 4.9 < lora.flops / (recomputed.flops - whole.flops) < 6  # 3 without a gradient, and about 2


@pytest.mark.parametrize("lora", [False, True])
def test_a_critic_costs_a_part_of_its_teacher(lora: bool, tmp_path: Path) -> None:
    """Besides the step without one: a sample of the student, two that are judged, and one with a gradient to the sample."""
    nets = students(lora, "meta")
    with torch.device("meta"):
        nets.critic = make_critic(nets, CriticConfig(critic_channels=16))
    given = {TrainConfig: config_of(tmp_path), OptimConfig: OptimConfig()}
    passes = passes_of(SCottConfig(solver_steps=1), critic=True)
    with_critic = count(Training(nets, ASK, passes, 3), given)
    alone = count(training(students(lora, "meta")), given)
    assert 1.2 * alone.flops < with_critic.flops < 2 * alone.flops
    assert with_critic.trained - alone.trained == sum(p.numel() for p in nets.critic.parameters())
    assert alone.activations < with_critic.activations < 2 * alone.activations


@pytest.mark.parametrize(
    ("shape", "full", "lora"),
    [  # GB by DDP, by FSDP2 over 8 and over 64
        ("sd15", (22.4, 2.95, 0.89), (2.8, 0.94)),
        ("sdxl", (66.7, 7.65, 1.47), (8.3, 1.63)),
        ("flux_dev", (309.4, 36.8, 8.17), (27, 7.5)),
    ],
)
def test_published_networks_take_what_the_formulas_say(shape: str, full: tuple, lora: tuple, tmp_path: Path) -> None:
    """26 P; 22 P / N + 12 U; with A in adapters 2 P + 16 A, and (2 P + 16 A) / N + 12 U. U of UNets is 49, of Flux 340 M."""
    start = start_of(shape, "", lambda name: None, str(FOLDER / "recipes" / f"shape_{shape}.json"))
    kept = {"cast_teacher_unet": "bf16"}
    for config, expected in ((StudentConfig(**kept), full), (StudentConfig(lora=True, **kept), lora)):
        with torch.device("meta"):
            nets = make_networks(start.network, config)
        parts = parts_of(nets, OptimConfig(), TrainConfig(str(tmp_path)))
        trained = sum(p.numel() for p in nets.student.parameters() if p.requires_grad)
        found = replace(WHOLE, parts=parts, trained=trained, unit=largest_unit(nets.student), activations=0, casts=0)
        sizes = [found.memory(Strategy("", *split)) for split in ((1, 2), (8, 1), (64, 1))]
        if config.lora:
            sizes[0].pop("buckets")  # which the formula leaves out
        given = [sum(one.values()) / GB for one in sizes]
        assert given[: len(expected)] == pytest.approx(expected, rel=0.04)  # adapters lie in units, too


def test_units_are_the_blocks(tmp_path: Path) -> None:
    start = start_of("", "", lambda name: None, str(FOLDER / "recipes" / "shape_sd15.json"))
    names = unit_classes(start.network)
    assert {"BasicTransformerBlock", "ResnetBlock2D"} <= names
    assert (
        largest_unit(start.network)
        == 2560 * 1280 * 9 + 1280 * 1280 * 9 + 2560 * 1280 + 1280 * 1280 + 2 * 2560 + 6 * 1280
    )


def test_a_pass_of_stable_diffusion_is_counted() -> None:
    """0.8 TFLOP for an image of 512 pixels: of an H100 at two fifths of 989 TFLOP/s, 70 images a second by 7 of them."""
    network = start_of("", "", lambda name: None, str(FOLDER / "recipes" / "shape_sd15.json")).network
    assert count_flops(network, asking(64), trains=False).forward == pytest.approx(0.803e12, rel=0.005)


def test_memory_and_time_in_closed_form() -> None:
    config = PlanConfig(gpus=16, peak_tflops=100, share_of_peak=0.5, node_bandwidth=1e-9, network_bandwidth=1e-9)
    ddp, hsdp, fsdp = found = strategies(config)
    assert [(how.name, how.shards, how.replicas) for how in found] == [
        ("DDP", 1, 16),
        ("HSDP", 8, 2),
        ("FSDP2", 16, 1),
    ]
    assert WHOLE.memory(ddp) == {"student": 80, "buckets": 40, "activations": 7, "casts of weights": 5}
    assert WHOLE.memory(hsdp) == {"student": 10, "gathered units": 12 * 3, "activations": 7}
    seconds = [WHOLE.seconds(how, config) for how in found]
    assert [one[0] for one in seconds] == [4 * 2 * 2e12 / 50e12] * 3
    assert seconds[0][1] == pytest.approx(2 * 40 * 15 / 16)  # a byte a second
    assert seconds[1][1] == pytest.approx((120 + 40) * 2 * 7 / 8 + 2 * 40 / 8 / 2)
    assert seconds[2][1] == pytest.approx((120 + 40) * 2 * 15 / 16)
    fast = replace(config, node_bandwidth=1e9, network_bandwidth=1e9)
    assert WHOLE.images_per_second(ddp, fast) == pytest.approx(16 * 50e12 / 2e12)
    assert [how.name for how in strategies(PlanConfig(gpus=1))] == ["one GPU"]
    assert "buckets" not in WHOLE.memory(strategies(PlanConfig(gpus=1))[0])


def test_the_plainest_that_fits_is_recommended() -> None:
    large = replace(WHOLE, parts={"student": 100.0 * 2**30})
    assert recommended(WHOLE, PlanConfig()).name == "DDP"
    assert recommended(large, PlanConfig()).name == "FSDP2"
    assert recommended(large, PlanConfig(gpus=16)).name == "HSDP"
    assert recommended(large, PlanConfig(gpus=1)) is None
    assert advice(large, PlanConfig(gpus=1)).startswith("Nothing fits: at the least 102 GiB")
    assert "| **sum** | **100.0** | **12.5** |" in page(large, PlanConfig())
    assert "| fits 80 GiB | no | yes |" in page(large, PlanConfig())


def asked(nets: Networks, players: list, batch: Batch) -> Counter:
    """Samples that each network sees for one of the batch, by whether it learns from them."""
    found = Counter()

    def look(name: str, _: nn.Module, args: tuple) -> None:
        found[name, torch.is_grad_enabled()] += len(args[0]) / batch.size

    hooks = [net.register_forward_pre_hook(partial(look, name)) for name, net in nets.items()]
    for play in players:
        play(nets, batch, PROGRESS)
    for hook in hooks:
        hook.remove()
    return found


def totals(passes: list[Pass]) -> Counter:
    found = Counter()
    for name, samples, gradient in passes:
        found[name, gradient != "none"] += samples
    return found


BRANCHES = {
    "scd-central-v": 1,
    "scd-one_sided-unweighted": 1,
    "diffusion-epsilon": 0,
    "flow": 0,
    "autoencoder": 0,
    "lcf": 0,
}


@pytest.mark.parametrize(
    "name",
    [
        "lcm",
        "lcm-heun",
        "boot",
        "boot-heun-v",
        "scott",
        "pcm-two-phases-v-heun",
        "tcd",
        "tcd-second-order-v",
        *BRANCHES,
    ],
)
def test_objectives_ask_what_is_counted(name: str) -> None:
    case = CASES[name]
    found = asked(case.networks(), list(case.objective.players.values()), case.batch(4))
    assert found == totals(passes_of(case.objective.config, BRANCHES.get(name, 2)))


class Zero(nn.Module):
    """Answers x times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (x * self.weight,)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (CDObjective, CDConfig(loss_type="l2")),
        (CTObjective, CTConfig(loss_type="l2")),
        (ICTObjective, ICTConfig()),
        (SLCTObjective, SLCTConfig(coupling="independent")),
        (EDMObjective, EDMConfig()),
    ],
)
def test_objectives_without_prompts_ask_what_is_counted(kind, config) -> None:
    nets = Networks(Zero(), Zero(), Zero())
    found = asked(nets, [kind(config, EDMView(0.5, "edm"))], Batch(torch.randn(4, 3, 8, 8)))
    assert found == totals(passes_of(config, 1))


def test_jumps_cost_what_their_benchmark_measures() -> None:
    """Whose own table is compared with real steps."""
    methods = {
        "PCM": (PCMConfig(), False),
        "PCM with critic": (PCMConfig(), True),
        "TCD": (TCDConfig(), False),
        "BOOT": (BOOTConfig(), False),
        "CTM": (CTMConfig(teacher_intervals=1), False),
        "CTM with critic": (CTMConfig(teacher_intervals=1), True),
        "mean flow": (MeanFlowConfig(tangent="one_sided"), False),
    }
    for name, (method, critic) in methods.items():
        assert totals(passes_of(method, critic=critic)) == totals(trajectory_step.PASSES[name]), name


def test_roll_outs_are_shared_by_what_is_learnt_from_them() -> None:
    model, drawn = RewardModelConfig("a", num_inference_steps=4), RolloutConfig(inner_epochs=2)
    assert passes_for_rewards(model, RLCMConfig(), drawn) == [Pass("student", 4 / 6), Pass("student", 1, "weights")]


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if path.stem.split("_")[0] not in ("evaluate", "fronts", "combine")],
    ids=lambda path: path.stem,
)
def test_recipes_say_their_script_by_name(path: Path) -> None:
    assert script_of(path.name, FOLDER) == script_in_papers(path).stem


@pytest.mark.parametrize(
    ("recipe", "teacher", "shape"),
    [
        ("lcm_flow_fashion", True, (1, 4, 8, 8)),
        ("boot_fashion", True, (1, 4, 8, 8)),
        ("ctm_critic_fashion_latents", True, (1, 4, 8, 8)),
        ("scd_lora_fashion", True, (1, 4, 8, 8)),
        ("cd_cifar10", True, (1, 3, 32, 32)),
        ("ct_fashion_pixels", False, (1, 3, 16, 16)),
        ("mean_flow_fashion_latents", False, (1, 4, 8, 8)),
        ("lcf_fashion", False, (1, 4, 8, 8)),
        ("rlcm_fashion", True, (1, 4, 8, 8)),
        ("animatelcm_joint_fashion", True, (1, 4, 8, 8, 8)),
        ("motion_fashion", False, (1, 4, 8, 8, 8)),
        ("teacher_fashion", False, (1, 4, 8, 8)),
        ("flow_fashion", False, (1, 4, 8, 8)),
        ("vae_fashion", False, (1, 3, 32, 32)),
        ("classifier_fashion", False, (1, 10)),
    ],
)  # fmt: skip
def test_networks_are_made_of_any_recipe(recipe: str, teacher: bool, shape: tuple, monkeypatch) -> None:
    """Also of one that starts from another's result, which is not there."""
    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.setattr(sys, "argv", [str(FOLDER / "plan.py")])
    _, given = script("plan").parse(["--recipe", recipe])
    made = training_of(given, partial(start_of, trained=script("plan").trained))
    assert (made.nets.teacher is not None) == teacher
    assert all(p.is_meta for _, net in made.nets.items() for p in net.parameters())
    with torch.device("meta"), torch.no_grad():
        assert made.ask(made.nets.student).shape == shape


def test_the_command(capsys, monkeypatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    run_script("plan", recipe="lcm_lora_fashion", gpus=16, gpu_memory=1, train_batch_size=1)
    said = capsys.readouterr().out
    assert "| GiB per GPU | DDP | HSDP (2 x 8) | FSDP2 |" in said
    assert "micro-batches of 1 on each of 16 GPUs" in said
    assert "Nothing fits: at the least 2 GiB" in said  # of which all but a little is CUDA's own
    for given, sentence in (
        ({}, "--recipe is missing"),
        ({"script": "distill"}, "--script distill is no training script"),
        ({"recipe": "nothing_like_it"}, "there is no such file|does not say by its name"),
        ({"recipe": "evaluate_demo"}, "does not say by its name"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            run_script("plan", **given)


def test_a_teacher_out_of_reach_is_told() -> None:
    with pytest.raises(UserError, match="What network --pretrained_teacher_model no/where has cannot be read"):
        start_of("no/where", "--pretrained_teacher_model", lambda name: None)


def test_words_are_parted() -> None:
    own, others = own_words("--gpus 8 --recipe a --lora --gpu_memory=40 --seed 3".split(), PlanConfig)
    assert (own, others) == (["--gpus", "8", "--gpu_memory=40"], "--recipe a --lora --seed 3".split())
    assert configs_of(script("distill_lcm"), ["--pretrained_teacher_model", "a", "--lora"])[StudentConfig].lora
