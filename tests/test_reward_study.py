"""The study of reward fine-tuning: what its curves say, its control, and the whole of it on tiny models."""

import json
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from scripts import image_folder, models_folder, script
from tiny import FASHION_LABELS
from toys import forget_accelerate

from cm_diffusers.engine.cli import parse_configs
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.rewards import load_reward
from cm_diffusers.rewards.jpeg import jpeg_compressibility


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import reward_study  # noqa: E402
import reward_study_report as report  # noqa: E402
import study  # noqa: E402
from reward_study_measure import SamplingConfig, Start  # noqa: E402


SETTING = report.Setting(8, 3, "net", "data", "a machine")
IMAGES = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def curve(rewards, passes=10.0, seconds=2.0):
    return [
        {"rollout": i, "passes": passes * (i + 1), "seconds": seconds * (i + 1), "reward": float(reward)}
        for i, reward in enumerate(rewards)
    ]


def trained(method, seed, rewards, reward="small files", **cost):
    row = {"method": method, "reward": reward, "seed": seed, "steps": 4, "cpu_minutes": 3.0 + 2 * seed}
    for key in report.FORMATS:
        row |= {f"{key}_before": 1.0, f"{key}_after": 2.0 + seed}
    return report.Run(row, curve(rewards, **cost), ("start", IMAGES), (f"{method} {reward}", 1 - IMAGES))


def test_rewards_are_smoothed_over_full_windows():
    assert report.smoothed(curve([0, 10, 0, 0, 0, 5, 15])) == [2.0, 3.0, 4.0]
    assert report.smoothed(curve([1, 2, 6])) == [3.0]


def test_the_first_roll_out_that_is_as_good():
    """A single lucky roll-out is not; the mean of five is 3 at the fifth, 4.2 at the sixth and 5 at the seventh."""
    rollouts = curve([0, 15, 0, 0, 0, 6, 4, 15])
    assert [report.first_reaching(rollouts, level)["rollout"] for level in (3.0, 3.5, 4.2, 4.3)] == [4, 5, 5, 7]
    assert report.first_reaching(rollouts, 5.1) is None


def test_costs_are_shares_of_the_baselines():
    """The baseline is at its best, 10, from its 7th roll-out to its 9th, and falls then."""
    baseline = curve([0, 0, 10, 10, 10, 10, 10, 10, 10, 0, 0], passes=100.0, seconds=30.0)
    ours = curve([10] * 6, passes=7.0, seconds=3.0)
    assert report.cost_of_reaching(ours, baseline) == {
        "reached_passes": 35.0,
        "share_passes": 35 / 700,
        "reached_seconds": 15.0,
        "share_seconds": 15 / 210,
    }
    assert set(report.cost_of_reaching(curve([9.9] * 9), baseline).values()) == {None}
    assert report.cost_of_reaching(baseline, baseline)["share_passes"] == 1


RUNS = [
    trained("DDPO", 0, [1, 1, 1, 1, 1, 5, 5, 5, 5, 5], passes=1000.0),
    trained("DDPO", 1, [1, 1, 1, 1, 1, 9, 9, 9, 9, 9], passes=1000.0),
    trained("quick", 0, [8] * 10),
    trained("quick", 1, [8] * 10),
    trained("control", 0, [1] * 10),
    trained("control", 0, [1] * 10, reward="large files"),
]


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table_has_a_block_for_each_reward():
    text = report.markdown(report.with_costs(RUNS, "DDPO"), "DDPO", SETTING)
    heads, _, ddpo, quick, control, other_heads, _, alone = cells(text)
    assert heads == [
        "", "seeds", "steps", "reward before → after", "agreement before → after", "Vendi before → after", "FD-net before → after",
        "network evaluations", "CPU minutes", "evaluations to DDPO's best reward", "share of DDPO's", "share of its time",
    ]  # fmt: skip
    quality = ["1.000 → 2.500 ±0.500"] * 2 + ["1.00 → 2.50 ±0.50", "1.0 → 2.5 ±0.5"]
    assert quick == [
        "quick",
        "2",
        "4",
        *quality,
        "100",
        "4.0 ±1.0",
        "50 (1 of 2 seeds)",
        "0.005",
        "0.500",
    ]
    assert ddpo[-3:] == ["10,000", "1.000", "1.000"]
    assert control[-3:] == ["never", "–", "–"]
    assert other_heads == heads[:-3]  # that reward has no baseline yet
    assert alone[:4] == ["control", "1", "4", "1.000 → 2.000"]
    assert text.index("**small files**") < text.index("**large files**")
    assert "8 images a row" in text


def test_curves_start_at_the_first_full_window():
    figure = report.plot(RUNS, "DDPO", "control")
    over_passes, alone, over_time, _ = figure.axes
    assert (over_passes.get_title(), alone.get_title()) == ("small files", "large files")
    lines = {line.get_label(): line for line in over_passes.get_lines()}
    assert lines["quick"].get_xdata().tolist() == [50.0, 60.0, 70.0, 80.0, 90.0, 100.0]
    assert over_time.get_lines()[2].get_xdata()[0] == pytest.approx(10 / 60)
    assert lines["control"].get_color() == "black"
    (dashed,) = (line for line in over_passes.get_lines() if line.get_linestyle() == "--")
    assert dashed.get_ydata() == [7.0, 7.0]
    assert dashed.get_color() == lines["DDPO"].get_color() != lines["quick"].get_color()
    assert not [line for line in alone.get_lines() if line.get_linestyle() == "--"]


def test_report_of_what_is_there(tmp_path):
    text = report.write_reward_study(tmp_path, RUNS, ("DDPO", "control"), SETTING, list("abcdefghijkl"))
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "rows.json", "curves.png", "grid.png"}
    assert (tmp_path / "table.md").read_text("utf-8") == text
    rows = json.loads((tmp_path / "rows.json").read_text("utf-8"))["rows"]
    assert [row["best_reward"] for row in rows] == [5, 9, 8, 8, 1, 1]
    assert rows[2]["share_seconds"] == 10 / 20
    with Image.open(tmp_path / "grid.png") as image:
        assert image.height // 100 == 1 + 4  # the start, and each method with its first seed
    report.write_reward_study(tmp_path / "none", [], ("DDPO", "control"), SETTING, [])
    assert not (tmp_path / "none" / "curves.png").exists()


def test_shuffled_rewards_are_the_same_rewards():
    images = torch.stack([image * scale for image, scale in zip(IMAGES, torch.linspace(0, 1, 12), strict=True)])
    shuffled, found = load_reward("shuffled_reward:jpeg_compressibility"), []
    true = jpeg_compressibility(images, [""] * 12)
    assert len(true.unique()) > 6
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(shuffled(images, [""] * 12))
    assert torch.equal(found[0].sort().values, true.sort().values)
    assert found[0].double().mean() == pytest.approx(true.double().mean().item())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], true)
    assert torch.equal(
        -load_reward("shuffled_reward:jpeg_incompressibility")(images, [""] * 12).sort().values.flip(0),
        true.sort().values,
    )


def test_the_bundled_study_is_read_flag_by_flag(monkeypatch):
    """Its commands parse with their scripts, and differ."""
    monkeypatch.chdir(ROOT)
    found = reward_study.read_reward_study(Path("benchmarks/studies/rewards.toml"), Path("runs/studies"))
    parse_configs((SamplingConfig, ReferenceConfig), "", shlex.split(found.evaluation))
    for command in [found.classifier["command"], *(variant.command for variant in found.variants)]:
        name, *flags = shlex.split(command)
        parse_configs(runpy.run_path(name)["CONFIGS"], "", flags)
    assert len({variant.command for variant in found.variants}) == len(found.variants)
    bundled = json.loads((ROOT / "assets/fashion_classifier/metrics.json").read_text("utf-8"))
    assert found.classifier["seed"] != bundled["seed"]
    folders = {found.folder(variant, 1).as_posix() for variant in found.variants}
    assert "runs/studies/rewards/RLCM_drop_compressibility-1" in folders
    (rewarded,) = {
        variant.command.partition("--rewards ")[2].split()[0]
        for variant in found.variants
        if variant.reward == "classifier"
    }
    assert rewarded == "classifier:runs/studies/rewards/classifier/classifier"


STUDY = """
evaluation = "--train_data_dir {data} --resolution 32 --num_images 40 --eval_batch_size 40 --feature_extractor {net}"
baseline = "DDPO"
control = "shuffled"
[pieces]
tune = '''training/finetune_rlcm.py --pretrained_student_model {{source}} --num_inference_steps {{steps}}
    --guidance_scale {{guidance_scale}} --resolution 32 --samples_per_rollout 4 --sample_batch_size 4 --train_batch_size 4
    --max_train_steps 2 --learning_rate 1e-2 --loss reinforce --guard_prompts 0 --report_to none --prompts "a bag" "a coat"'''
[rewards]
small = "jpeg_compressibility"
[starts.student]
source = "{home}/student"
guidance_scale = 2
[starts.teacher]
source = "{home}/teacher"
guidance_scale = 2
eta = 1
[methods.drop]
start = "student"
steps = 3
rewards = ["small"]
command = "{{tune}} --rewards {{reward}} --gradient_accumulation_steps 2"
[methods.shuffled]
start = "student"
steps = 3
rewards = ["small"]
command = "{{tune}} --rewards shuffled_reward:{{reward}} --gradient_accumulation_steps 2"
[methods.DDPO]
start = "teacher"
steps = 3
rewards = ["small"]
command = "{{tune}} --rewards {{reward}} --sampler ddim --eta {{eta}} --baseline batch --gradient_accumulation_steps 3"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = models_folder(tmp_path_factory.mktemp("study"), 2.0)
    torch.manual_seed(0)
    ImageClassifier(labels=list(FASHION_LABELS), channels=[4, 8], image_size=32).save_pretrained(home / "net")
    image_folder(home / "data", 40)
    text = STUDY.format(home=home, data=home / "data", net=home / "net")
    (home / "tiny.toml").write_text(text, "utf-8")
    (home / "faster.toml").write_text(text.replace("1e-2", "2e-2"), "utf-8")
    (home / "fewer.toml").write_text(text.replace("num_images 40", "num_images 20"), "utf-8")
    return home


def conduct(home, *flags, name="tiny", calls=None):
    """The script, whose trainings run in this process."""

    def in_process(argv, check):
        _, path, *rest = argv
        (calls if calls is not None else []).append(rest[rest.index("--output_dir") + 1])
        forget_accelerate()
        with mock.patch.object(sys, "argv", [path, *rest]):
            script(Path(path).stem).main()
        forget_accelerate()

    own = ["--study", home / f"{name}.toml", "--work_dir", home / "work", "--output_dir", home / "out", "--seeds", 0]
    with (
        mock.patch.object(sys, "argv", ["reward_study.py", *map(str, own), *flags]),
        mock.patch.object(study, "subprocess", SimpleNamespace(run=in_process)),
        mock.patch.dict("os.environ"),
    ):
        reward_study.main()


def test_whole_study(home, monkeypatch, capsys):
    """A part, then all; what is done is not done again, and is refused if it was done otherwise."""
    monkeypatch.chdir(ROOT)
    calls, out, work = [], home / "out" / "tiny", home / "work" / "tiny"
    conduct(home, "--only", "drop small", calls=calls)
    assert [Path(folder).name for folder in calls] == ["drop_small-0"]
    assert "| drop | 1 | 3 |" in capsys.readouterr().out
    kept = (work / "drop_small-0" / "samples.safetensors").stat().st_mtime_ns
    conduct(home, calls=calls)
    assert (work / "drop_small-0" / "samples.safetensors").stat().st_mtime_ns == kept
    assert [Path(folder).name for folder in calls[1:]] == ["shuffled_small-0", "DDPO_small-0"]
    table = cells((out / "table.md").read_text("utf-8"))
    assert [line[0] for line in table[2:]] == ["drop", "shuffled", "DDPO"]
    rows = json.loads((out / "rows.json").read_text("utf-8"))["rows"]
    assert [row["passes"] for row in rows] == [2 * 4 * 2 * (3 + 3 * 2)] * 2 + [2 * 4 * 2 * (3 + 3 * 3)]
    for row in rows:
        assert row["reward_before"] != row["reward_after"]
        assert row["vendi_after"] > 1
    for name, message in {
        "faster": "was trained with --learning_rate 0.01, but the study now says 0.02",
        "fewer": "was made by",
    }.items():
        (home / "work" / name).symlink_to(work)
        with pytest.raises(ValueError, match=message):
            conduct(home, "--no_train", name=name, calls=calls)
    assert len(calls) == 3
    with pytest.raises(ValueError, match="--only 'drop': the study has drop small, shuffled small, DDPO small"):
        conduct(home, "--only", "drop")


def test_samples_are_those_of_stock_pipelines(home, monkeypatch):
    """The first image of each model, by a pipeline that is put together by hand; after the whole study."""
    monkeypatch.chdir(ROOT)
    conduct(home)
    found = reward_study.read_reward_study(home / "tiny.toml", home / "work")
    measuring = reward_study.Measuring(found.evaluation)
    for variant in found.variants:
        runs = reward_study.measure(measuring, found, variant, 0)
        for tuned, (_, images) in ((False, runs.before), (True, runs.after)):
            pipe = DiffusionPipeline.from_pretrained(found.starts[variant.start].source)
            pipe.set_progress_bar_config(disable=True)
            how = {"guidance_scale": 2.0}
            if variant.method == "DDPO":
                pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
                how["eta"] = 1.0
            if tuned:
                pipe.load_lora_weights(found.folder(variant, 0) / "lora")
            generator = torch.Generator().manual_seed(0)
            drawn = pipe(
                "a photo of a bag", num_inference_steps=3, generator=generator, output_type="pt", **how
            ).images
            assert abs(drawn[0] - images[0]).max() < 1.5 / 255
        expected = jpeg_compressibility(images, [""] * 40).mean().item()
        assert runs.row["reward_after"] == pytest.approx(expected, abs=1e-6)
        assert abs(runs.before[1] - runs.after[1]).max() > 1 / 255


def test_names_are_checked(home, tmp_path):
    text = (home / "tiny.toml").read_text("utf-8")
    for wrong, right, message in (
        ('control = "none"', 'control = "shuffled"', "names 'none', but its methods are drop, shuffled, DDPO"),
        ('rewards = ["large"]', 'rewards = ["small"]', "names 'large', but its rewards are small"),
        ('start = "pupil"', 'start = "student"', "names 'pupil', but its starts are student, teacher"),
    ):
        (tmp_path / "a.toml").write_text(text.replace(right, wrong), "utf-8")
        with pytest.raises(ValueError, match=message):
            reward_study.read_reward_study(tmp_path / "a.toml", tmp_path)
    with pytest.raises(ValueError, match="there is no such file; studies lie in"):
        reward_study.read_reward_study(tmp_path / "b.toml", tmp_path)


def test_the_classifier_is_trained_once_where_it_is_needed(tmp_path, monkeypatch):
    calls = []

    def train(command, seed, folder):
        calls.append((folder.name, command.split()[0], seed))
        (folder / "classifier").mkdir(parents=True)

    monkeypatch.setattr(reward_study, "train", train)
    commands = {"a": "x", "b": "y classifier:{}", "c": "z classifier:{}"}
    parts = [], {}, {"student": Start("x", 1.0)}, {"command": "make", "seed": 5}, "", "", ""
    found = reward_study.RewardStudy(tmp_path, *parts)
    variants = [reward_study.Variant(name, "r", "student", 4, command) for name, command in commands.items()]
    for variant in variants:
        found.train(variant._replace(command=variant.command.format(found.own_classifier)), 0)
    assert calls == [("a_r-0", "x", 0), ("classifier", "make", 5), ("b_r-0", "y", 0), ("c_r-0", "z", 0)]
