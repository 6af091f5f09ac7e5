"""The training scripts' command lines: help, two steps of each, and one clear sentence for every wrong input."""

import json
import re
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from scripts import FOLDER, data_flags, image_folder, run_script, script
from tiny import tiny_pipeline, tiny_vae

from cm_diffusers.engine.cli import parse_configs
from cm_diffusers.engine.own_files import is_run_file
from cm_diffusers.models.classifier import ImageClassifier


SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
WITH_RECIPES = [name for name in SCRIPTS if "CONFIGS =" in (FOLDER / f"{name}.py").read_text()]
TWO_STEPS = {"max_train_steps": 2, "checkpointing_steps": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("scripts")
    image_folder(home / "data", 16)
    tiny_pipeline().save_pretrained(home / "teacher")
    return home


@pytest.fixture
def lcm(home, tmp_path) -> dict[str, object]:
    """Flags of a distillation that works; its output folder does not exist yet."""
    found = data_flags(home / "data", tmp_path / "cache") | {"pretrained_teacher_model": home / "teacher"}
    return found | {"output_dir": tmp_path / "run", "unet_time_cond_proj_dim": 32, **TWO_STEPS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", [str(FOLDER / f"{name}.py"), "--help"])
    with pytest.raises(SystemExit) as ended:
        script(name).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", WITH_RECIPES)
def test_every_flag_has_help_and_is_shown(name, capsys) -> None:
    configs = script(name).CONFIGS
    with pytest.raises(SystemExit):
        parse_configs(configs, "", ["--help"])
    shown = capsys.readouterr().out
    flags = [field for config in configs for field in fields(config)]
    assert [field.name for field in flags if not field.metadata.get("help")] == []
    assert [field.name for field in flags if f"--{field.name}" not in shown] == []


def test_flags_win_over_the_recipe(tmp_path) -> None:
    (tmp_path / "a.args").write_text(
        '--pretrained_teacher_model t # a comment\n--seed 3\n--w_max 9\n--validation_prompts "a bag" coat\n'
    )
    parsed = parse_configs(script("distill_lcm").CONFIGS, "", ["--recipe", str(tmp_path / "a.args"), "--seed", "5"])
    values = {k: v for config in parsed for k, v in vars(config).items()}
    assert (values["seed"], values["w_max"], values["validation_prompts"]) == (5, 9.0, ["a bag", "coat"])


def test_train_vae(home, tmp_path) -> None:
    shared = data_flags(home / "data", tmp_path / "cache") | {"output_dir": tmp_path / "run"} | TWO_STEPS
    shape = {"block_out_channels": [8, 16], "norm_num_groups": 4, "latent_samples": 4, "test_data_dir": home / "data"}
    del shared["random_flip"]  # so that training and test images are the same
    run_script("train_vae", **shared, **shape)
    vae = AutoencoderKL.from_pretrained(tmp_path / "run" / "vae")
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert vae.config.block_out_channels == [8, 16]
    assert vae.config.scaling_factor == pytest.approx(1 / figures["train"]["latent_std"])
    assert figures["train"]["mse"] == pytest.approx(figures["test"]["mse"], rel=1e-5)
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "student.safetensors")
    assert torch.equal(saved["vae.decoder.conv_out.weight"], vae.decoder.conv_out.weight)


def test_train_diffusion(home, tmp_path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    shared = data_flags(home / "data", tmp_path / "cache") | {"output_dir": tmp_path / "run"} | TWO_STEPS
    shape = {"unet_channels": [32, 32], "num_attention_heads": 2, "text_hidden_size": 32, "text_layers": 1}
    run_script("train_diffusion", **shared, **shape, pretrained_vae=tmp_path / "vae", prediction_type="v_prediction")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "student.safetensors")
    assert torch.equal(saved["unet.conv_out.weight"], pipe.unet.conv_out.weight)
    assert any(name.startswith("text_encoder.") for name in saved)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.vae.config.scaling_factor == 0.5
    image = pipe("a photo of a bag", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (32, 32, 3)


def labelled_parquet(home: Path, folder: Path) -> Path:
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["bag", "coat"]), text=datasets.Value("string")
    )
    pictures = [Image.open(home / "data" / f"{i}.png") for i in range(16)]
    folder.mkdir()
    rows = datasets.Dataset.from_dict(
        {"image": pictures, "label": [i % 2 for i in range(16)], "text": ["a bag"] * 16}, features=features
    )
    rows.to_parquet(folder / "all.parquet")
    return folder


def test_train_classifier(home, tmp_path) -> None:
    data = labelled_parquet(home, tmp_path / "labelled")
    shared = data_flags(data, tmp_path / "cache") | {"output_dir": tmp_path / "run"} | TWO_STEPS
    run_script("train_classifier", **shared, channels=[4, 8], test_data_dir=data)
    model = ImageClassifier.from_pretrained(tmp_path / "run" / "classifier")
    figures = json.loads((tmp_path / "run" / "classifier" / "metrics.json").read_text())
    assert model.labels == ["bag", "coat"]
    assert model(torch.rand(3, 3, 32, 32)).shape == (3, 2)
    assert figures["num_images"] == 16
    assert figures["accuracy"] in {i / 16 for i in range(17)}


def corrupt(folder: Path, number: int) -> None:
    for i in range(number):
        (folder / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n not an image")


def other_image_column(flags: dict) -> None:
    source, folder = flags["train_data_dir"], flags["output_dir"].parent / "table"
    folder.mkdir()
    rows = {"picture": [(source / "0.png").read_bytes()], "text": ["a bag"]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "all.parquet")
    flags["train_data_dir"] = folder


def only_corrupt_images(flags: dict) -> None:
    flags["train_data_dir"] = image_folder(flags["output_dir"].parent / "corrupt", 3)
    corrupt(flags["train_data_dir"], 3)


def nan_teacher(flags: dict) -> None:
    pipe = tiny_pipeline()
    pipe.unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    flags["pretrained_teacher_model"] = flags["output_dir"].parent / "nan"
    pipe.save_pretrained(flags["pretrained_teacher_model"])


def teacher_without_weights(flags: dict) -> None:
    nan_teacher(flags)
    (flags["pretrained_teacher_model"] / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def empty_folder(name: str):
    def prepare(flags: dict) -> None:
        flags[name] = flags["output_dir"].parent / "empty"
        flags[name].mkdir()

    return prepare


def used_output(flags: dict) -> None:
    flags["output_dir"].mkdir()
    (flags["output_dir"] / "notes.txt").write_text("x")


def not_a_checkpoint(flags: dict) -> None:
    (flags["output_dir"] / "checkpoint-1").mkdir(parents=True)
    flags["resume_from_checkpoint"] = "checkpoint-1"


def with_flags(**values: object):
    return lambda flags: flags.update(values)


def adapters(**values: object):
    def prepare(flags: dict) -> None:
        del flags["unet_time_cond_proj_dim"]
        flags |= {"lora": True, **values}

    return prepare


WRONG = {
    "caption column": (
        with_flags(caption_column="words"),
        "no column named words: choose from the columns found: text",
    ),
    "image column": (other_image_column, "no column named image: choose from the columns found: picture, text"),
    "corrupt images": (
        only_corrupt_images,
        "can be used: left out, images that cannot be read: 3 (0.png, 1.png, 2.png)",
    ),
    "no data": (empty_folder("train_data_dir"), "holds no image and no parquet file"),
    "recipe": (with_flags(recipe="none.args"), "--recipe none.args: there is no such file"),
    "two sources": (
        with_flags(dataset_name="x/y"),
        "exactly one is needed and --dataset_name and --train_data_dir were given",
    ),
    "nan teacher": (nan_teacher, "holds 1 tensors that are not finite, such as unet.conv_in.weight"),
    "no pipeline": (empty_folder("pretrained_teacher_model"), "there is no model_index.json in it"),
    "no weights": (teacher_without_weights, "does not load: Error no file named"),
    "unknown teacher": (with_flags(pretrained_teacher_model="nobody/nothing"), "nor a Hub id within reach"),
    "missing teacher": (with_flags(pretrained_teacher_model="./no/such/folder"), "nor a Hub id within reach"),
    "guidance": (with_flags(w_min=3.0, w_max=2.0), "--w_min 3.0 is above --w_max 2.0"),
    "grid": (
        with_flags(num_ddim_timesteps=1001),
        "grid has 1001 steps (num_ddim_timesteps, original_inference_steps) but the model has 1000",
    ),
    "resolution": (
        with_flags(resolution=30),
        "--resolution 30 is not a multiple of 4, as the VAE needs: take 28 or 32",
    ),
    "output folder": (used_output, "such as notes.txt, but no run.json"),
    "missing checkpoint": (with_flags(resume_from_checkpoint="checkpoint-7"), "no such checkpoint"),
    "half a checkpoint": (not_a_checkpoint, "is not a checkpoint: there is no state.json in it"),
    "learning rate": (with_flags(learning_rate=-1.0), "--learning_rate must be at least 0, but it is -1.0"),
    "no steps": (with_flags(max_train_steps=0), "--max_train_steps must be at least 1, but it is 0"),
    "no accumulation": (with_flags(gradient_accumulation_steps=0), "--gradient_accumulation_steps must be at least 1"),
    "batch size": (with_flags(train_batch_size=0), "--train_batch_size must be at least 1, but it is 0"),
    "validation": (with_flags(validation_steps=0), "--validation_steps must be at least 1, but it is 0"),
    "schedule": (with_flags(lr_scheduler="wsd", lr_cooldown_steps=9), "more than the 2 steps of the run"),
    "adapters": (
        adapters(lora_target_modules=["nothing"]),
        "--lora_target_modules names no layer of the UNet",
    ),
    "rank": (adapters(lora_rank=0), "--lora_rank must be at least 1, but it is 0"),
    "dropout": (adapters(lora_dropout=1.0), "--lora_dropout must be at least 0 and below 1, but it is 1.0"),
    "no adapters": (with_flags(lora_rank=3), "--lora_rank has no effect without --lora"),
    "no target modules": (
        with_flags(lora_target_modules=["to_q"]),
        "--lora_target_modules has no effect without --lora",
    ),
    "embedded adapters": (with_flags(lora=True), "--unet_time_cond_proj_dim has no effect with --lora"),
    "embedding": (
        with_flags(unet_time_cond_proj_dim=2),
        "--unet_time_cond_proj_dim must be 0 (none) or an even number",
    ),
    "odd embedding": (with_flags(unet_time_cond_proj_dim=7), "an even number from 4 on, but it is 7"),
    "no sampling steps": (with_flags(validation_nfe=[1, 0]), "--validation_nfe must be at least 1, but it is 0"),
    "cast adapters": (adapters(cast_teacher_unet="bf16"), "--cast_teacher_unet bf16 needs --mixed_precision bf16"),
    "cast teacher": (with_flags(cast_teacher_unet="bf16"), "--cast_teacher_unet bf16 needs --mixed_precision bf16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_sentence(lcm, case) -> None:
    prepare, words = WRONG[case]
    prepare(lcm)
    with pytest.raises(SystemExit) as ended:
        run_script("distill_lcm", **lcm)
    assert isinstance(ended.value.code, str)
    assert ended.value.code.startswith("error: ")
    assert words in ended.value.code
    assert "\n" not in ended.value.code


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(flags: dict) -> str:
    with pytest.raises(SystemExit) as ended:
        run_script("distill_lcm", **flags)
    return ended.value.code


def test_overwriting_keeps_a_finished_student_until_all_is_checked(lcm, tmp_path, monkeypatch) -> None:
    run = lcm["output_dir"]
    run_script("distill_lcm", **lcm)
    assert [name for name in files(run) if not is_run_file(name, "cm_diffusers")] == ["run.json"]
    (run / "notes.txt").write_text("the user's")
    image_folder(run / "pictures", 2)
    before, again = files(run), lcm | {"overwrite_output_dir": True, "seed": 1}
    typos = {"train_data_dir": tmp_path / "dta", "pretrained_teacher_model": tmp_path / "no", "resolution": 30}
    for name, value in typos.items():
        assert str(value) in refused(again | {name: value})
    for name in ("train_data_dir", "latent_cache_dir", "pretrained_teacher_model"):
        for place in (run, run / "pictures"):
            assert f"--{name} {place} lies in it" in refused(again | {name: place})
    monkeypatch.chdir(run / "pictures")
    assert "the working directory lies in it" in refused(again)
    assert files(run) == before
    monkeypatch.chdir(tmp_path)
    run_script("distill_lcm", **again)
    after = files(run)
    assert after.keys() == before.keys()
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert after[weights] != before[weights]
    assert [name for name in before if name.startswith(("notes", "pictures")) and after[name] != before[name]] == []


@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_a_lora_run_writes_what_is_listed_and_can_be_replaced(lcm, report_to) -> None:
    grids = {
        "validation_prompts": ["a bag"],
        "validation_steps": 2,
        "validation_nfe": [1],
        "validation_teacher_steps": 2,
    }
    flags = lcm | grids | {"lora": True, "lora_rank": 2, "report_to": report_to, "ema_sigma_rels": [0.1]}
    del flags["unet_time_cond_proj_dim"]
    for more in ({}, {"overwrite_output_dir": True}):
        run_script("distill_lcm", **flags, **more)
        found = files(flags["output_dir"])
        assert [name for name in found if not is_run_file(name, "cm_diffusers")] == ["run.json"]
        assert {"lora", "samples", "averages", "checkpoint-2"} <= {name.partition("/")[0] for name in found}


def test_a_folder_of_pictures_is_no_output_folder(lcm) -> None:
    lcm["output_dir"] = image_folder(lcm["output_dir"], 2)
    before = files(lcm["output_dir"])
    assert "but no run.json" in refused(lcm | {"overwrite_output_dir": True})
    assert "lies in it" in refused(lcm | {"overwrite_output_dir": True, "train_data_dir": lcm["output_dir"]})
    assert files(lcm["output_dir"]) == before


def test_the_corrected_command_starts_with_latest_as_well(lcm, tmp_path) -> None:
    for name, value in {"train_data_dir": tmp_path / "dta", "learning_rate": -1.0}.items():
        refused(lcm | {name: value})
        assert not lcm["output_dir"].exists()
    run_script("distill_lcm", **lcm, resume_from_checkpoint="latest")
    assert (lcm["output_dir"] / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize("flag", ["solver", "loss_type", "optimizer", "lr_scheduler", "mixed_precision", "vae_dtype"])
def test_unknown_choices_are_answered_with_the_known_ones(lcm, flag) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script("distill_lcm", **lcm | {flag: "nonsense"})
    answer = rf"error: argument --{flag}.*invalid choice: '?nonsense'? \(choose from .+\); --help explains the flags\."
    assert re.fullmatch(answer, ended.value.code)


def test_a_corrupt_image_is_skipped_and_reported(lcm, tmp_path, caplog) -> None:
    lcm["train_data_dir"] = image_folder(tmp_path / "mostly", 4)
    corrupt(lcm["train_data_dir"], 1)
    run_script("distill_lcm", **lcm)
    assert "left out, images that cannot be read: 1 (" in caplog.text
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


def test_training_that_diverges_ends_with_one_sentence(lcm, monkeypatch) -> None:
    monkeypatch.setattr("cm_diffusers.objectives.lcm.DISTANCES", {"huber": lambda a, b: (a - b) * float("nan")})
    with pytest.raises(SystemExit, match=r"^error: Training stopped at step 0: the student's loss is nan.* none yet;"):
        run_script("distill_lcm", **lcm)
