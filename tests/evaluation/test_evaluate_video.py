"""The comparison of video pipelines, with ones that paint what they are told, and on a tiny random AnimateDiff."""

import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, LCMScheduler, MotionAdapter
from peft import LoraConfig
from PIL import Image
from tiny import FASHION_LABELS, tiny_pipeline
from torch import Tensor

from cm_diffusers.data.video import VideoDataConfig
from cm_diffusers.evaluation import metrics, motion, video
from cm_diffusers.evaluation.features import extract_features
from cm_diffusers.evaluation.video import VideoComparison, VideoEvaluationConfig, load_video_extractor
from cm_diffusers.evaluation.video_report import VideoSetting, markdown_table
from cm_diffusers.evaluation.video_sampling import generate_clips, load_video_pipeline, load_video_teacher
from cm_diffusers.measured import clips_of, weights_digest
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.models.motion import MotionConfig
from cm_diffusers.publishing import pipelines as publish
from evaluation.test_seen import IMAGE, only_new


ROOT = Path(__file__).parents[2]
STUDENT = "runs/animatelcm_student_fashion/student"  # of the small video teacher
LINEAR = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}


def tiny_adapter(seed: int = 0) -> MotionAdapter:
    """Random motion modules that fit the tiny UNet and take 8 frames."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MotionAdapter(
            block_out_channels=(32, 64),
            motion_layers_per_block=1,
            motion_mid_block_layers_per_block=1,
            motion_num_attention_heads=4,
            motion_norm_num_groups=8,
            motion_max_seq_length=8,
        ).eval()


def animate_diff(**scheduler) -> AnimateDiffPipeline:
    image = tiny_pipeline()
    parts = {name: getattr(image, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    schedule = DDIMScheduler.from_config(image.scheduler.config, **LINEAR, **scheduler)
    pipe = AnimateDiffPipeline(**parts, motion_adapter=tiny_adapter(), scheduler=schedule)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_articles(folder: Path, captions: list[str]) -> None:
    """Grey rectangles on black."""
    rows = {"image": [], "text": captions}
    for number in range(len(captions)):
        image, buffer = Image.new("RGB", (32, 32)), io.BytesIO()
        image.paste((120 + 10 * number,) * 3, (4, 6, 24 - number, 28))
        image.save(buffer, format="PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
    columns = {"image": datasets.Image(), "text": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).to_parquet(folder / "rows.parquet")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image model, an AnimateDiff pipeline, a motion adapter, a published student, a classifier, articles, clips."""
    torch.manual_seed(0)  # whatever ran before: the classifier's random features decide what is near
    folder = tmp_path_factory.mktemp("parts")
    image = tiny_pipeline()
    image.save_pretrained(folder / "image")
    animate_diff().save_pretrained(folder / "teacher")
    animate_diff(timestep_spacing="trailing").save_pretrained(folder / "again")  # as a teacher is sampled
    tiny_adapter().save_pretrained(folder / "adapter")
    DDIMScheduler.from_config(image.scheduler.config, **LINEAR).save_config(folder / "adapter")
    image.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "conv1"], init_lora_weights=False))
    scheduler = LCMScheduler.from_config(image.scheduler.config, original_inference_steps=20, **LINEAR)
    record = publish.lcm_record(str(folder / "image"), "distilled", 3.0, 3.0, 1.5, scheduler)
    publish.save_lora(image.unet, folder / "student", record)
    tiny_adapter(seed=1).save_pretrained(folder / "student")
    ImageClassifier(labels=list(FASHION_LABELS), channels=(4, 8), num_features=6).save_pretrained(folder / "net")
    broken = shutil.copytree(folder / "student", folder / "broken") / "diffusion_pytorch_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    for name in ("articles", "clips"):
        (folder / name).mkdir()
    write_articles(folder / "articles", ["a bag", "a coat"])
    for number in range(3):
        first, *rest = [Image.new("RGB", (16, 16), (40 * f + number,) * 3) for f in range(5)]
        first.save(folder / "clips" / f"{number}.gif", save_all=True, append_images=rest)
        (folder / "clips" / f"{number}.txt").write_text(f"a lamp {number}")
    return folder


def settings(parts: Path, **changed) -> VideoEvaluationConfig:
    values = {"num_videos": 12, "feature_extractor": str(parts / "net"), "crop_zoom": 1.4, "frames_per_clip": 3}
    return VideoEvaluationConfig(**{**values, "eval_batch_size": 5, **changed})


def articles(parts: Path, **changed) -> VideoDataConfig:
    values = {"moving_articles": str(parts / "articles"), "num_clips": 24, "resolution": 32}
    return VideoDataConfig(**{**values, "sample_n_frames": 6, "sample_stride": 1, **changed})


class Painter:
    """A pipeline that paints a square which moves as `steps` says: prompt's direction -> (dx, dy) per frame."""

    def __init__(self, steps: dict[str | None, tuple[int, int]]) -> None:
        self.steps = steps

    def __call__(self, prompt: list[str], num_frames: int, height: int, width: int, **kwargs) -> SimpleNamespace:
        assert kwargs["output_type"] == "pt"
        clips = torch.zeros(len(prompt), num_frames, 3, height, width)
        for clip, text in zip(clips, prompt, strict=True):
            dx, dy = self.steps[motion.direction_in_prompt(text)]
            for f in range(num_frames):
                clip[f, :, 8 + dy * f : 24 + dy * f, 8 + dx * f : 24 + dx * f] = 0.6
        return SimpleNamespace(frames=clips)


OBEDIENT = {**motion.DIRECTIONS, None: (1, 1)}


def measured(parts: Path, **painters: dict) -> dict[str, dict]:
    comparison = VideoComparison(settings(parts), articles(parts), MotionConfig())
    for name, steps in painters.items():
        comparison._measure(Painter(steps), name, [4], [2.0])
    return {row["pipeline"]: row for row in comparison.rows}


def test_painters_get_what_they_deserve(parts: Path) -> None:
    opposite = {"left": (1, 0), "right": (-1, 0), "up": (0, 1), "down": (0, -1), None: (0, 0)}
    always_right = dict.fromkeys(OBEDIENT, (1, 0))
    still = dict.fromkeys(OBEDIENT, (0, 0))
    rows = measured(parts, obedient=OBEDIENT, opposite=opposite, right=always_right, still=still)
    accuracy = {name: row["direction_accuracy"] for name, row in rows.items()}
    assert accuracy == {"other real clips": 1, "obedient": 1, "opposite": 0, "right": 0.25, "still": 0}
    assert [rows["right"][f"direction_accuracy_{name}"] for name in motion.DIRECTIONS] == [0, 1, 0, 0]
    static = {name: row["static_rate"] for name, row in rows.items()}
    assert static == {"other real clips": 0, "obedient": 0, "opposite": pytest.approx(1 / 3), "right": 0, "still": 1}
    for name in ("velocity_residual", "colour_drift", "mass_change"):
        assert rows["obedient"][name] == pytest.approx(0, abs=1e-7)
    assert rows["obedient"]["content_drift"] < 1e-5
    assert rows["other real clips"]["velocity_residual"] < 0.2  # afterimages are cut off at the border
    assert rows["still"]["fd_differences"] > rows["obedient"]["fd_differences"]
    assert (rows["obedient"]["num_inference_steps"], rows["obedient"]["guidance_scale"]) == (4, 2.0)
    assert rows["obedient"]["seconds_per_clip"] > 0
    assert "seconds_per_clip" not in rows["other real clips"]


def test_distances_are_those_of_the_frames(parts: Path) -> None:
    comparison = VideoComparison(settings(parts), articles(parts), MotionConfig())
    (row,) = comparison.rows
    clips = [comparison.reference.views.frames(number, 0) for number in range(24)]
    clips = torch.stack([torch.stack(clip) for clip in clips]) / 2 + 0.5
    seen = {"fd_frames": clips[:, [0, 2, 5]], "fd_differences": (1 + clips[:, 1:] - clips[:, :-1])[:, [0, 2, 4]] / 2}
    for key, images in seen.items():
        features = extract_features(comparison.extractor, images.flatten(0, 1))
        assert row[key] == pytest.approx(metrics.frechet_distance(features[:36], features[36:]), rel=1e-4, abs=1e-6)
    assert comparison.setting.static_threshold == pytest.approx(
        motion.static_threshold((clips[:12, 1:] - clips[:12, :-1]).abs().mean((1, 2, 3, 4)))
    )
    again, _ = comparison._measured(comparison.reference.batches(7))
    assert comparison._distance(again, "frames") == pytest.approx(0, abs=1e-6)
    content = extract_features(comparison.extractor, motion.centred(clips[12:], 1.4).flatten(0, 1)).unflatten(
        0, (12, 6)
    )
    upright = [i for i in range(12) if i % 6 != 5]  # not the rotating
    assert row["content_drift"] == pytest.approx(motion.content_drift(content)[upright].mean().item(), rel=1e-4)
    middle = motion.centred(clips[12:], 1.4)[:, 3]
    known = [(i, ([8] * 6 + [4] * 6)[i]) for i in upright]  # bags, then coats
    chosen = comparison.extractor(middle).argmax(1)
    assert row["agreement"] == pytest.approx(sum(chosen[i] == label for i, label in known) / 10)


def test_of_clips_those_that_are_shown_stay(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and however many at once."""
    extract = video.extract_features

    def compare(count: int) -> None:
        config = settings(parts, num_videos=count, eval_batch_size=6, num_shown=2)
        comparison = VideoComparison(config, articles(parts, num_clips=48), MotionConfig())
        comparison._measure(Painter(OBEDIENT), "obedient", [1, 2], [2.0])
        kept = {part.label: part.clips.untyped_storage().nbytes() for part in comparison.shown}
        assert kept == dict.fromkeys(["real", "obedient, 1 steps, 2", "obedient, 2 steps, 2"], 2 * 6 * IMAGE)

    with only_new() as holding:
        monkeypatch.setattr(video, "extract_features", lambda *given: holding.note() or extract(*given))
        assert 0 < holding.most(48, compare, 24) == holding.most(24, compare, 12)


def test_fvd_calls_the_extractor_with_clips(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_features.py").write_text(
        "seen = []\n\n\ndef brightness(clips):\n    seen.append(clips)\n    return clips.mean((2, 3, 4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = settings(parts, video_extractor="own_features:brightness")
    comparison = VideoComparison(config, articles(parts), MotionConfig())
    seen = sys.modules["own_features"].seen
    assert [tuple(clips.shape) for clips in seen] == [(n, 6, 3, 32, 32) for n in (5, 5, 2)] * 2
    real, other = (torch.cat(seen[part]) for part in (slice(0, 3), slice(3, 6)))
    assert 0 == min(real.min(), other.min()) < max(real.max(), other.max()) <= 1
    means = [clips.mean((2, 3, 4)) for clips in (real, other)]
    assert comparison.rows[0]["fvd"] == pytest.approx(metrics.frechet_distance(*means), rel=1e-4)
    assert "| FVD |" in markdown_table(comparison.rows, comparison.setting)


def test_clips_do_not_depend_on_the_batch() -> None:
    pipe = animate_diff()
    prompts = [f"a {label}" for label in FASHION_LABELS[:3]]
    asked = 2, 3.0
    alone = torch.cat([clips for clips, _ in generate_clips(pipe, prompts, range(3), *asked, 1, 4, 32)])
    batches = list(generate_clips(pipe, prompts, range(3), *asked, 2, 4, 32))
    assert [len(clips) for clips, _ in batches] == [2, 1]
    assert all(seconds > 0 for _, seconds in batches)
    together = torch.cat([clips for clips, _ in batches])
    assert (alone - together).abs().max() <= 1 / 255 + 1e-6  # a value may fall on the other side of a half
    assert (alone == together).float().mean() > 0.999
    assert alone.shape == (3, 4, 3, 32, 32)
    assert torch.equal((alone * 255).round() / 255, alone)
    ((other, _),) = generate_clips(pipe, prompts[:1], [9], *asked, 1, 4, 32)
    assert not torch.equal(other[0], alone[0])


def drawn(pipe: AnimateDiffPipeline, steps: int = 2, scale: float = 1.5) -> Tensor:
    ((clips, _),) = generate_clips(pipe, ["a bag"], [3], steps, scale, 1, 4, 32)
    return clips


def test_a_student_folder_is_its_base_with_adapter_and_lora(parts: Path) -> None:
    stock = animate_diff()
    stock.unet.load_motion_modules(tiny_adapter(seed=1))
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config, original_inference_steps=20)
    without = drawn(stock)
    stock.load_lora_weights(parts / "student")
    found = drawn(load_video_pipeline(str(parts / "student")))
    assert (found - drawn(stock)).abs().max() <= 1 / 255 + 1e-6
    assert (found - without).abs().max() > 0.02


def test_a_teacher_is_sampled_with_ddim(parts: Path) -> None:
    expected = drawn(animate_diff(timestep_spacing="trailing"))
    assert not torch.equal(drawn(animate_diff()), expected)
    pipe = load_video_teacher(str(parts / "teacher"), MotionConfig(), 4, torch.float32, "cpu")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert torch.equal(drawn(pipe), expected)
    config = MotionConfig(pretrained_motion_adapter=str(parts / "adapter"))
    inflated = load_video_teacher(str(parts / "image"), config, 4, torch.float32, "cpu")
    assert (drawn(inflated) - expected).abs().max() <= 1 / 255 + 1e-6
    with pytest.raises(ValueError, match="--sample_n_frames 9 is more than the 8 frames"):
        load_video_teacher(str(parts / "image"), config, 9, torch.float32, "cpu")


def evaluate(parts: Path, monkeypatch: pytest.MonkeyPatch, **flags: str) -> None:
    """Runs training/evaluate_video.py; flags replace the defaults below, empty ones are left out."""
    defaults = {
        "pipelines": f"{parts / 'student'}",
        "moving_articles": f"{parts / 'articles'}",
        "num_clips": "24",
        "sample_n_frames": "4",
        "sample_stride": "1",
        "resolution": "32",
        "num_videos": "6",
        "feature_extractor": f"{parts / 'net'}",
        "num_shown": "2",
        "output_dir": f"{parts / 'out'}",
    }
    chosen = {name: value.split() for name, value in {**defaults, **flags}.items()}
    pairs = [[f"--{name}", *words] for name, words in chosen.items() if words]
    monkeypatch.setattr(sys, "argv", ["evaluate_video.py", *(word for pair in pairs for word in pair)])
    spec = importlib.util.spec_from_file_location("evaluate_video", ROOT / "training" / "evaluate_video.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main()


def test_evaluate_video_end_to_end(
    parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    both = f"{parts / 'student'} {parts / 'again'}"
    flags = {"num_inference_steps": "1 2", "teacher_steps": "3", "guidance_scales": "2.0"}
    evaluate(parts, monkeypatch, teacher=f"{parts / 'teacher'}", pipelines=both, names="student again/2", **flags)
    out = parts / "out"
    table = (out / "table.md").read_text("utf-8")
    assert capsys.readouterr().out == table + "\n"
    found = json.loads((out / "table.json").read_text("utf-8"))
    rows = {(r["pipeline"], r["num_inference_steps"], r["guidance_scale"]): r for r in found["rows"]}
    teacher = [("teacher", n, 2.0) for n in (3, 1, 2)]
    student = [("student", n, 1.5) for n in (1, 2)]  # its own guidance, not the flag
    again = [("again/2", n, 2.0) for n in (1, 2)]
    assert list(rows) == [("other real clips", None, None), *teacher, *student, *again]
    for key in ("direction_accuracy", "fd_frames", "fd_differences", "colour_drift", "static_rate", "agreement"):
        assert rows["again/2", 2, 2.0][key] == pytest.approx(rows["teacher", 2, 2.0][key])
    assert rows["student", 1, 1.5]["fd_frames"] != rows["student", 2, 1.5]["fd_frames"]
    assert found["setting"]["num_frames"] == 4
    assert "6 clips of 4 frames and 32 px, seed 0" in table
    assert "| other real clips | – | – | 1.000 |" in table
    names = ["again_2.gif", "grid.png", "plot.png", "real.gif", "student.gif", "table.json", "table.md", "teacher.gif"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert found["weights"] == {
        "student": weights_digest(parts / "student"),
        "again/2": weights_digest(parts / "again"),
    }
    assert (found["setting"]["extractor"], found["setting"]["reference"]) == ("net", "articles")
    for written in ("table.md", "table.json"):
        assert str(parts) not in (out / written).read_text("utf-8")
    with Image.open(out / "teacher.gif") as clip, Image.open(out / "grid.png") as grid:
        assert clip.n_frames == 4
        assert clip.height > 3 * 96
        assert grid.height > 8 * 96
        assert grid.width > 4 * 96


def test_a_table_leaves_no_animations_of_an_earlier_one(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = parts / "again_out"
    out.mkdir()
    (out / "mine.gif").write_text("the user's")
    for names in ("first", "second"):
        evaluate(parts, monkeypatch, pipelines=str(parts / "student"), names=names, output_dir=str(out))
        assert sorted(path.name for path in out.glob("*.gif")) == sorted(["mine.gif", "real.gif", f"{names}.gif"])


def test_clips_without_directions(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"moving_articles": "", "num_clips": "", "train_data_dir": f"{parts / 'clips'}", "num_videos": "3"}
    evaluate(parts, monkeypatch, **flags, num_inference_steps="1", output_dir=f"{parts / 'plain'}")
    (row,) = json.loads((parts / "plain" / "table.json").read_text("utf-8"))["rows"]
    assert row["pipeline"] == parts.name  # the folder of the run
    assert row["direction_accuracy"] is row["velocity_residual"] is row["agreement"] is None
    assert row["fd_frames"] > 0
    assert "direction accuracy" not in (parts / "plain" / "table.md").read_text("utf-8").splitlines()[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pipelines": ""}, "Nothing to evaluate"),
        ({"pipelines": "{parts}/image"}, "is a StableDiffusionPipeline, which makes no clips"),
        (
            {"pipelines": "{parts}/student nobody/nothing", "names": "a b"},
            "neither a pipeline folder here nor a Hub id",
        ),
        (
            {"pipelines": "{parts}/student {parts}/broken", "names": "a b"},
            "safetensors cannot be read .*; get or make it",
        ),
        ({"teacher": "{parts}/image", "pretrained_motion_adapter": "{parts}/nowhere"}, "holds no motion adapter"),
        (
            {"teacher": "{parts}/image", "pretrained_motion_adapter": "{parts}/adapter", "sample_n_frames": "40"},
            "--sample_n_frames 40 is more than the",
        ),
        ({"output_dir": "{parts}/clips/0.gif/out"}, "cannot be written, for .* is a file: give another folder"),
        ({"num_inference_steps": "0"}, "--num_inference_steps must be at least 1, but it is 0"),
        ({"names": "a b"}, "2 names for 1 pipelines"),
        (
            {"pipelines": "a/x b/x", "feature_extractor": "none"},
            "Two rows would be called x: give each pipeline a name",
        ),
        ({"names": "real"}, "Two rows would be called real"),
        ({"num_videos": "1"}, "--num_videos must be at least 2"),
        ({"num_videos": "25"}, "--num_videos is 25, but there are 24 real clips"),
        ({"frames_per_clip": "0"}, "--frames_per_clip must be at least 1"),
        ({"crop_zoom": "0"}, "--crop_zoom must be above 0"),
        ({"random_flip": "True"}, "--random_flip has no effect in an evaluation"),
        ({"pretrained_motion_adapter": "{parts}/adapter"}, "no effect without --teacher"),
        ({"feature_extractor": "resnet"}, "Unknown feature extractor 'resnet'"),
        ({"video_extractor": "no_such_module:f"}, "no module:function that can be imported"),
        ({"video_extractor": "math:pi"}, "is not callable"),
    ],
)
def test_wrong_input_gets_one_sentence(
    parts: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, str], message: str
) -> None:
    """Before anything is drawn."""
    monkeypatch.setattr(video, "generate_clips", None)
    with pytest.raises(ValueError, match=message) as error:
        evaluate(parts, monkeypatch, **{name: value.format(parts=parts) for name, value in flags.items()})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["own", "os.path:", ":f", "os:nothing"])
def test_video_extractors_are_functions_of_modules(name: str) -> None:
    with pytest.raises(ValueError, match="no module:function that can be imported"):
        load_video_extractor(name)


def test_video_features_of_another_shape_are_refused(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wrong_features", SimpleNamespace(f=lambda clips: clips.mean((3, 4))))
    with pytest.raises(ValueError, match=r"must give features \(N, D\), here N = 5, but it gave \(5, 6, 3\)"):
        VideoComparison(settings(parts, video_extractor="wrong_features:f"), articles(parts), MotionConfig())


def test_table_and_file_names() -> None:
    setting = VideoSetting(4, 8, 32, 0, "net", None, 1.4, 4, 0.3, 0.01234, "data", "a machine", "float32", 2)
    rows = [{"pipeline": "x", "num_inference_steps": 2, "direction_accuracy": 0.5, "fvd": None, "fd_frames": 1.239}]
    lines = markdown_table(rows, setting).splitlines()
    assert lines[0] == "| pipeline | NFE | direction accuracy | FD-net of frames |"
    assert lines[2] == "| x | 2 | 0.500 | 1.24 |"
    assert lines[4].startswith("**Only 16 frames were measured")
    assert "below 0.0123" in lines[6]
    assert clips_of("AnimateLCM, w/o init") == "AnimateLCM_w_o_init.gif"


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / STUDENT).is_dir(), reason=f"{STUDENT} is not there: assets/README.md has the commands that make it"
)
def test_the_small_student_moves_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Motion has survived distillation: chance is 0.25, and a student that died makes still clips."""
    monkeypatch.chdir(ROOT)  # its record names the base model from there
    config = VideoEvaluationConfig(
        pipelines=[STUDENT], num_inference_steps=[4], num_videos=24, eval_batch_size=12,
        feature_extractor="assets/fashion_classifier", crop_zoom=1.3,
    )  # fmt: skip
    data = VideoDataConfig(
        moving_articles="assets/fashion_captioned/test",
        num_clips=48,
        sample_n_frames=8,
        sample_stride=1,
        resolution=32,
    )
    real, student = VideoComparison(config, data, MotionConfig()).run()
    assert student["direction_accuracy"] > 0.9
    assert student["static_rate"] == 0
    assert student["velocity_residual"] < 1.0
    assert student["fd_differences"] < 20 * real["fd_differences"]
