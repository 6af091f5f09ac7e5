"""Wan distilled on clips, of files and of its own: trained, resumed, published, and loaded with and without this package."""

import io
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from safetensors.torch import load_file
from scripts import CAPTIONS, FOLDER, data_flags, image_folder, run_script, script
from tiny import tiny_pipeline
from tiny_flow_a import tiny_wan
from tiny_flow_b import tiny_qwen_image
from toys import assert_same

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.data import generated
from cm_diffusers.data.clip_config import ClipConfig
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.generated import GenerationConfig, generated_batches, training_batches
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.teacher_latents import teacher_latents
from cm_diffusers.engine.cli import parse_words
from cm_diffusers.errors import UserError
from cm_diffusers.models.critics import CriticConfig
from cm_diffusers.models.families.base import guided, in_steps, latents_of
from cm_diffusers.models.families.wan import FAMILY
from cm_diffusers.pipelines.stock import stock_entry
from cm_diffusers.record import read_record
from cm_diffusers.tasks.text_to_image_checks import checked_frames


FRAMES, SIDE = 5, 32  # latents 4 x 2 x 4 x 4
CLIPS, LENGTH = 4, 12
STEPS = {
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "learning_rate": 1e-2,
    "w_min": 1.0,
    "w_max": 3.0,
    "shift": 3.0,
}
LORA = {"lora": True, "lora_rank": 4, "lora_alpha": 8.0}
KINDS = {"lora": (LORA, "lora"), "full": ({}, "pipeline")}
ASKED = {"prompt": CAPTIONS[0], "height": SIDE, "width": SIDE, "num_frames": FRAMES, "output_type": "np"}


def film(clip: int) -> list[Image.Image]:
    """Greys, each frame another one: a crop changes nothing."""
    pixels = np.random.default_rng(clip).integers(0, 256, (LENGTH, 1, 1), dtype=np.uint8)
    return [Image.fromarray(np.broadcast_to(frame, (36, 40)).copy()) for frame in pixels]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clips`, `images`, `prompts.txt` and `teacher`."""
    home = tmp_path_factory.mktemp("wan")
    (home / "clips").mkdir()
    for number in range(CLIPS):
        first, *rest = film(number)
        first.save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=rest)
        (home / "clips" / f"{number}.gif").write_bytes(buffer.getvalue())
        (home / "clips" / f"{number}.txt").write_text(CAPTIONS[number])
    image_folder(home / "images")
    (home / "prompts.txt").write_text("\n".join(CAPTIONS))
    tiny_wan().save_pretrained(home / "teacher")
    return home


def flags_of(home: Path, source: str) -> dict[str, object]:
    shared = data_flags(home / "clips", home / "cache") | {"sample_n_frames": FRAMES}
    if source == "files":
        return shared | {"sample_stride": 2, "random_flip": False}
    kept = {
        name: value for name, value in shared.items() if name not in ("train_data_dir", "center_crop", "random_flip")
    }
    return kept | {"prompts_file": home / "prompts.txt", "generation_steps": 2, "generation_guidance_scale": 3.0}


def distil(home: Path, name: str, source: str, of: str = "distill_lcm", **values: object) -> Path:
    given = flags_of(home, source) | STEPS | {"pretrained_teacher_model": home / "teacher"}
    run_script(of, **given | {"output_dir": home / name} | values)
    return home / name


def clip_of(pipe: WanPipeline, **asked: object) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**ASKED | {"guidance_scale": 1.0} | asked, generator=torch.Generator().manual_seed(3)).frames[0]


@pytest.fixture(
    scope="module", params=[(kind, source) for kind in KINDS for source in ("files", "prompts")], ids="-".join
)
def trained(request: pytest.FixtureRequest, home: Path) -> tuple[Path, str, str]:
    """A finished run, its kind and its source."""
    kind, source = request.param
    return distil(home, f"{kind}-{source}", source, **KINDS[kind][0]), kind, source


def test_a_student_samples_the_clips_it_was_trained_on(home: Path, trained: tuple[Path, str, str]) -> None:
    """Alone, the stock pipeline draws other noise between the steps, so that one step is what can be compared."""
    run, kind, _ = trained
    folder = run / KINDS[kind][1]
    record, ours = read_record(folder), ConsistencyPipeline.from_pretrained(folder)
    assert (record.num_frames, record.resolution) == (FRAMES, SIDE)
    card = (folder / "README.md").read_text()
    steps = stock_entry(ours.scheduler, record.recommended_num_inference_steps, FAMILY.sigmas).arguments
    assert (
        f"num_inference_steps={steps['num_inference_steps']}, guidance_scale=1.0, height={SIDE}, width={SIDE}" in card
    )
    assert f"num_frames={FRAMES}).frames[0]" in card
    stock = WanPipeline.from_pretrained(home / "teacher" if kind == "lora" else folder)
    if kind == "lora":
        stock.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
        stock.scheduler = stock_entry(ours.scheduler, 4, FAMILY.sigmas).scheduler
    assert clip_of(stock, **steps).shape == (FRAMES, SIDE, SIDE, 3)
    once = stock_entry(ours.scheduler, 1, FAMILY.sigmas).arguments
    np.testing.assert_allclose(clip_of(stock, **once), clip_of(ours, num_inference_steps=1), atol=0.05)
    stock.scheduler = ours.scheduler
    by_record = ours(CAPTIONS[0], output_type="np", generator=torch.Generator().manual_seed(3)).frames[0]
    found = clip_of(stock, num_inference_steps=record.recommended_num_inference_steps)
    np.testing.assert_allclose(by_record, found, atol=1e-4)
    teacher = WanPipeline.from_pretrained(home / "teacher", scheduler=ours.scheduler)
    assert np.abs(clip_of(teacher, num_inference_steps=4) - found).max() > 1e-2


def test_resume_is_bit_exact(home: Path, trained: tuple[Path, str, str]) -> None:
    whole, kind, source = trained
    resumed = {"resume_from_checkpoint": whole / "checkpoint-1"}
    again = distil(home, f"{kind}-{source}-again", source, **KINDS[kind][0], **resumed)
    for file in sorted(whole.glob("checkpoint-2/**/*.safetensors")):
        assert_same(load_file(again / file.relative_to(whole)), load_file(file))


def test_a_resume_on_clips_of_another_length_is_refused(home: Path, trained: tuple[Path, str, str]) -> None:
    whole, kind, source = trained
    other = {"resume_from_checkpoint": whole / "checkpoint-1", "sample_n_frames": 9, "sample_stride": 1}
    other = other if source == "files" else {k: v for k, v in other.items() if k != "sample_stride"}
    with pytest.raises(SystemExit, match="sample_n_frames was 5, now 9"):
        distil(home, "other", source, **KINDS[kind][0], **other)


def config(home: Path, **changes: object) -> DataConfig:
    given = {"train_data_dir": str(home / "clips"), "resolution": SIDE, "center_crop": True, "train_batch_size": 4}
    return DataConfig(**given | {"latent_cache_dir": str(home / "data-cache"), "encode_batch_size": 1} | changes)


CLIP = ClipConfig(sample_n_frames=FRAMES, sample_stride=2)


@torch.no_grad()
def test_clips_are_encoded_whole(home: Path) -> None:
    """The causal VAE remembers the frames before: one at a time, each would be a first frame."""
    pipe = tiny_wan()
    batch = next(training_batches(config(home), GenerationConfig(), pipe, 0, clips=CLIP)(0))
    assert batch.x0.shape == (CLIPS, 4, 2, 4, 4)
    latents, levels = (
        latents_of(pipe),
        [np.asarray(film(i)[2 * k + 1]).flat[0] for i in range(CLIPS) for k in range(FRAMES)],
    )
    greys = torch.tensor(np.array(levels).reshape(CLIPS, 1, FRAMES, 1, 1)) / 127.5 - 1
    posterior = pipe.vae.encode(greys.float().expand(-1, 3, -1, SIDE, SIDE)).latent_dist
    texts = Encoders.from_pipeline(pipe).encode_prompts(list(CAPTIONS))["encoder_hidden_states"]
    for x0, told in zip(batch.x0, batch.cond["encoder_hidden_states"], strict=True):
        number = int((texts - told).abs().amax((1, 2)).argmin())
        means, stds = (
            torch.tensor(pipe.vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std")
        )
        z = x0 * stds + means
        away = (z - posterior.mean[number]) / posterior.std[number]
        assert away.abs().max() < 4.5
        assert away.std() == pytest.approx(1, abs=0.25)
    assert latents.frames_per_latent == 4


@pytest.mark.parametrize("source", ["files", "prompts"])
def test_cached_equals_uncached(home: Path, source: str) -> None:
    pipe, ask = tiny_wan(), GenerationConfig()
    data, clips = config(home), CLIP
    if source == "prompts":
        data = replace(data, train_data_dir=None, center_crop=False)
        ask = GenerationConfig(prompts_file=str(home / "prompts.txt"), generation_steps=2)
        clips = ClipConfig(sample_n_frames=FRAMES)
    kept, again, free = (
        next(training_batches(replace(data, cache_latents=cached), ask, pipe, 0, clips=clips)(1))
        for cached in (True, True, False)
    )
    assert kept.x0.shape == (4, 4, 2, 4, 4)
    for other in (again, free):
        assert torch.equal(other.x0, kept.x0)
        assert_same(other.cond, kept.cond)
        assert_same(other.uncond, kept.uncond)


@torch.no_grad()
def test_samples_are_the_clips_of_the_teachers_pipeline(home: Path) -> None:
    pipe, size = tiny_wan(), {"height": SIDE, "width": SIDE, "num_frames": FRAMES, "output_type": "pt"}
    found = teacher_latents(pipe, list(CAPTIONS[:2]), [3, 4], SIDE, 2, 3.0, FRAMES)
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = pipe(list(CAPTIONS[:2]), **size, **in_steps(pipe, 2), **guided(pipe, 3.0), generator=seeds).frames
    assert found.shape == (2, 4, 2, 4, 4)
    decoded = (latents_of(pipe).decode(pipe.vae, found) / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)


def test_an_interruption_costs_few_clips(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are as large as their frames: here two clips each."""
    monkeypatch.setattr(generated, "GENERATED_ROWS", 2 * FRAMES)
    pipe, ask = tiny_wan(), GenerationConfig(prompts_file=str(home / "prompts.txt"), generation_steps=1)
    data = config(home, train_data_dir=None, center_crop=False, latent_cache_dir=str(tmp_path))
    batch = next(generated_batches(data, ask, Encoders.from_pipeline(pipe), pipe, 0, num_frames=FRAMES)(0))
    shards = [file["x0"] for file in map(load_file, tmp_path.rglob("*.safetensors")) if "x0" in file]
    assert [len(shard) for shard in shards] == [2, 2]
    kept = torch.cat(shards).float()
    assert all(any(torch.equal(row, one) for one in kept) for row in batch.x0)
    assert len(batch.x0.flatten(1).unique(dim=0)) == 4


def test_grids_show_frames_of_clips(home: Path) -> None:
    watched = {
        "validation_prompts": [CAPTIONS[0]],
        "validation_nfe": [1],
        "validation_seeds": [0],
        "validation_steps": 2,
    }
    run = distil(home, "watched", "files", **LORA, **watched, validation_teacher_steps=1)
    with Image.open(run / "samples" / "step-000002.png") as grid:
        assert grid.width > 4 * 96  # four frames of the clip beside each other


@pytest.mark.parametrize("critic", ["heads", "none"])
def test_scott_takes_clips(home: Path, critic: str) -> None:
    judged = {"adversarial_start": 1, "critic_channels": 8} if critic == "heads" else {}
    run = distil(home, f"scott-{critic}", "files", "distill_scott", **LORA, **judged, critic=critic)
    assert read_record(run / "lora").num_frames == FRAMES


def test_a_run_says_what_it_trains_on_and_how_to_sample_it(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "cm_diffusers"):
        distil(home, "told", "files", **LORA)
    assert f"2 of {FRAMES} frames of {SIDE} px" in caplog.text
    line = next(line for line in caplog.text.splitlines() if "python -c '" in line)
    monkeypatch.chdir(tmp_path)
    exec(line.split("python -c '")[1].rstrip("'"), {})
    with Image.open("clip.gif") as clip:
        assert (clip.n_frames, clip.size) == (FRAMES, (SIDE, SIDE))


def test_the_recipe_gives_way_to_prompts(home: Path) -> None:
    """Its flags of files would be refused."""
    words = ["--recipe", str(FOLDER / "recipes" / "lcm_lora_wan_1_3b.args"), "--prompts_file", "prompts.txt"]
    given = {type(config): config for config in parse_words(script("distill_lcm").CONFIGS, "", words)}
    assert given[ClipConfig] == ClipConfig(sample_n_frames=81)
    assert (given[DataConfig].train_data_dir, given[DataConfig].center_crop) == (None, False)


def test_images_stay_images(home: Path) -> None:
    images = {"train_data_dir": home / "images", "random_flip": True}
    run = home / "of-images"
    given = data_flags(home / "images", home / "cache") | STEPS | LORA | images
    run_script("distill_lcm", **given, pretrained_teacher_model=home / "teacher", output_dir=run)
    assert read_record(run / "lora").num_frames == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sample_n_frames": 6}, "--sample_n_frames 6 is not 4k \\+ 1, as the VAE needs, .*: take 5 or 9"),
        ({"sample_n_frames": 4}, "take 5"),
        ({"sample_stride": 3}, "4 of 4 clips are too short, such as .* with 12 frames: .* needs 13"),
        ({"aspect_ratio_buckets": True}, "--aspect_ratio_buckets has no effect with --sample_n_frames"),
        ({"streaming": True}, "--streaming has no effect with --sample_n_frames"),
        (
            {"train_data_dir": None},
            "--sample_n_frames needs clips: give --train_data_dir or --dataset_name, or --prom",
        ),
        ({"sample_n_frames": None}, "--sample_stride has no effect without --sample_n_frames"),
        ({"pretrained_teacher_model": "sd"}, "--sample_n_frames is for teachers of videos, such as Wan, but this one"),
        (
            {"pretrained_teacher_model": "qwen"},
            "--sample_n_frames is for teachers of videos, such as Wan, but this one",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(home: Path, changes: dict[str, object], sentence: str) -> None:
    for name, make in {"sd": tiny_pipeline, "qwen": tiny_qwen_image}.items():
        if changes.get("pretrained_teacher_model") == name:
            make().save_pretrained(home / name)
            changes = {"pretrained_teacher_model": home / name} | ({"shift": 3.0} if name == "qwen" else {})
    given = (
        flags_of(home, "files") | LORA | {"pretrained_teacher_model": home / "teacher", "max_train_steps": 1} | changes
    )
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(SystemExit, match=sentence):
        run_script("distill_lcm", **given, output_dir=home / "refused")


def test_what_clips_of_prompts_and_critics_cannot_take(home: Path) -> None:
    with pytest.raises(SystemExit, match="--sample_stride has no effect with --prompts_file"):
        distil(home, "refused", "prompts", sample_stride=2)
    with pytest.raises(SystemExit, match="--sample_n_frames 6 is not 4k"):
        distil(home, "refused", "prompts", sample_n_frames=6)
    with pytest.raises(UserError, match="--critic vision judges images, not clips"):
        checked_frames(CLIP, config(home), tiny_wan(), False, CriticConfig(critic="vision"))
    clip = ClipConfig(sample_n_frames=6, sample_stride=1)
    data = config(home, train_data_dir=None, center_crop=False)
    ask = GenerationConfig(prompts_file=str(home / "prompts.txt"), generation_steps=1)
    with pytest.raises(UserError, match="is not 4k"):
        training_batches(data, ask, tiny_wan(), 0, clips=clip)
    with pytest.raises(UserError, match="is not 4k"):
        training_batches(config(home), GenerationConfig(), tiny_wan(), 0, clips=clip)
