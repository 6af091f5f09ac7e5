"""Every script against inputs that cannot work: one sentence that names the culprit, before anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from finished_runs import whole_run
from safetensors.torch import load_file, save_file
from scripts import image_folder, models_folder, run_script
from tiny import tiny_vae
from transformers import ResNetBackbone, ResNetConfig

from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.record import RECORD


UNET = {
    "block_out_channels": [8, 16], "layers_per_block": 1, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 4, "attention_head_dim": 8,
}  # fmt: skip
RUN = {"max_train_steps": 2, "checkpointing_steps": 2, "report_to": "none", "train_batch_size": 2}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Inputs that are whole: labelled pictures, models of each kind, and two finished runs."""
    home = models_folder(tmp_path_factory.mktemp("whole"))
    image_folder(home / "data", 6, label=[0, 1, 2, 0, 1, 2])
    labels = {"label": datasets.ClassLabel(names=["bag", "coat", "boot"]), "image": datasets.Image()}
    rows = [{"image": str(home / "data" / f"{i}.png"), "label": i % 3, "text": "a bag"} for i in range(6)]
    (home / "labelled").mkdir()
    features = datasets.Features(labels | {"text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(home / "labelled" / "all.parquet")
    (home / "unet.json").write_text(json.dumps(UNET))
    (home / "flow.json").write_text(json.dumps({"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}))
    tiny_vae().save_pretrained(home / "vae")
    ResNetBackbone(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(
        home / "resnet"
    )
    DDPMPipeline(UNet2DModel(16, 3, 3, **UNET), DDPMScheduler()).save_pretrained(home / "ddpm")
    ImageClassifier(["bag", "coat"], channels=(4, 8), image_size=32, num_features=6).save_pretrained(
        home / "classifier"
    )
    run_script("train_motion", **BASE["train_motion"](home), output_dir=home / "motion")
    run_script("train_ict", **BASE["train_ict"](home), ema_sigma_rels=[0.1], output_dir=home / "ict")
    whole_run(home / "kept")
    return home


def of_data(home: Path) -> dict:
    return RUN | {"train_data_dir": home / "data", "latent_cache_dir": home / "cache", "resolution": 32}


def of_pixels(home: Path) -> dict:
    return RUN | {"train_data_dir": home / "data", "resolution": 16, "validation_images": 0}


def of_network(home: Path) -> dict:
    return of_pixels(home) | {"unet_config": home / "unet.json"}


def of_model(home: Path) -> dict:
    return of_pixels(home) | {"pretrained_teacher_model": home / "ddpm", "sigma_min": 0.011}


def of_clips(home: Path) -> dict:
    clips = {
        "moving_articles": home / "data",
        "num_clips": 12,
        "sample_n_frames": 3,
        "sample_stride": 1,
        "resolution": 32,
    }
    return RUN | clips | {"latent_cache_dir": home / "cache", "pretrained_teacher_model": home / "teacher"}


def of_rewards(home: Path) -> dict:
    few = {"guard_prompts": 2, "guard_samples": 2, "prompts": ["a bag", "a coat"], "num_inference_steps": 2}
    return {**RUN, **few, "pretrained_student_model": home / "student", "resolution": 32}


BASE: dict[str, Callable[[Path], dict]] = {
    "distill_lcm": lambda home: of_data(home) | {"pretrained_teacher_model": home / "teacher"},
    "distill_scott": lambda home: of_data(home) | {"pretrained_teacher_model": home / "teacher", "adversarial_start": 1},
    "distill_cd": of_model,
    "distill_animatelcm": lambda home: of_clips(home) | {"stage": "image_lora"},
    "train_motion": lambda home: of_clips(home) | {"motion_num_attention_heads": 4, "motion_max_seq_length": 4},
    "train_ct": of_network,
    "train_ict": of_network,
    "train_slct": of_network,
    "train_edm": of_network,
    "tune_ect": of_model,
    "distill_scd": of_model,
    "train_sct": of_network,
    "tune_time": of_model,
    "check_jvp": lambda home: {"pretrained_model": home / "ddpm"},
    "train_vae": lambda home: of_data(home) | {"block_out_channels": [8, 16], "norm_num_groups": 4},
    "train_diffusion": lambda home: of_data(home) | {"pretrained_vae": home / "vae"},
    "train_flow": lambda home: of_data(home) | {"pretrained_pipeline": home / "teacher", "transformer_config": home / "flow.json"},
    "train_classifier": lambda home: of_data(home) | {"train_data_dir": home / "labelled", "test_data_dir": home / "labelled", "channels": [4, 8]},
    "finetune_lcf": lambda home: of_data(home) | {"pretrained_student_model": home / "student"},
    "finetune_rlcm": lambda home: of_rewards(home) | {"rewards": ["jpeg_compressibility"], "samples_per_rollout": 2},
    "finetune_direct_reward": lambda home: of_rewards(home) | {"rewards": ["differentiable_rewards:Red"]},
    "evaluate": lambda home: {"pipelines": [home / "student"], "train_data_dir": home / "data", "resolution": 32,
                              "feature_extractor": home / "classifier", "num_images": 6},
    "evaluate_video": lambda home: {"teacher": home / "teacher", "pretrained_motion_adapter": home / "motion/motion_adapter",
                                    "moving_articles": home / "data", "num_clips": 12, "num_videos": 6, "sample_n_frames": 3,
                                    "sample_stride": 1, "resolution": 32, "feature_extractor": home / "classifier"},
    "rank_critics": lambda home: {"pipeline": home / "teacher", "backbones": [home / "resnet"], "train_data_dir": home / "data",
                                  "resolution": 32, "guidance_scale": 1.5, "num_images": 6},
    "share": lambda home: {"folder": home / "ict" / "pipeline"},
    "export_average": lambda home: {"run_dir": home / "ict", "sigma_rel": 0.1},
    "combine": lambda home: {"run_dir": home / "kept/run", "train_data_dir": home / "kept/data", "num_images": 12, "resolution": 32,
                             "feature_extractor": home / "kept/classifier", "num_inference_steps": [1]},
    "prepare_fashion_mnist": lambda home: {"idx_dir": home / "data"},
    "prepare_moving_articles": lambda home: {"moving_articles": home / "data"},
}  # fmt: skip
TRAININGS = [name for name in BASE if name.startswith(("distill", "train", "tune", "finetune"))]


def numbers() -> list[tuple[str, dict, str]]:
    """Values out of range, each with its flag; what all trainings share is tried on each of them in turn."""
    shared = {
        "learning_rate": [-1, "nan", "inf"], "adam_beta1": [1.0, -0.1], "adam_beta2": [2, "nan"], "adam_epsilon": [-1e-8],
        "adam_weight_decay": [-0.1, "nan"], "max_grad_norm": [0, "nan"], "lr_warmup_steps": [-1], "seed": [-1, 2**64],
        "lr_cooldown_steps": [-5], "max_train_steps": [0, -3], "gradient_accumulation_steps": [0], "ema_decay": [1.5, -0.1, "nan"],
        "export_ema_decay": [1.0, 1.5, -0.5], "checkpointing_steps": [0], "checkpoints_total_limit": [0], "logging_steps": [0],
        "train_batch_size": [0, -1, 10**9],
    }  # fmt: skip
    pairs = [(flag, value) for flag, values in shared.items() for value in values]
    spread = [(TRAININGS[i % len(TRAININGS)], {flag: value}, f"--{flag}") for i, (flag, value) in enumerate(pairs)]
    own = {
        "distill_lcm": {
            "resolution": [0, -8, 10**6], "w_min": ["nan"], "w_max": ["inf"], "num_ddim_timesteps": [0],
            "timestep_scaling_factor": [0, -1, "nan"], "unet_time_cond_proj_dim": [3], "proportion_empty_prompts": [-0.1, 1.5, "nan"],
            "encode_batch_size": [0], "max_train_samples": [0], "dataloader_num_workers": [-1], "bucket_step": [0],
            "num_crops": [0], "validation_steps": [0], "validation_nfe": [0], "validation_guidance_scale": ["nan"],
            "validation_teacher_steps": [0], "ema_sigma_rels": [0.5, 0, "nan"], "validation_seeds": [-1],
        },
        "distill_scott": {
            "solver_steps": [0], "solver_interval": [0], "eta": [-0.1, 1.5, "nan"], "adversarial_weight": [-1, "nan"],
            "adversarial_ramp": [-1], "adversarial_start": [-1], "critic_learning_rate": [-1, "nan"], "critic_adam_beta2": [1.0],
            "r1_weight": [-1],
        },
        "distill_cd": {"num_scales": [1], "rho": [0, "nan"], "sigma_max": ["inf", -1], "w": ["nan"], "dropout": [1, -0.1]},
        "train_ct": {"discretization_s_0": [0], "target_decay_0": [1.5], "sigma_data": [0, "nan"]},
        "train_ict": {"discretization_s_1": [1], "p_std": [0, "nan"], "p_mean": ["nan"], "huber_c": [-1], "num_classes": [0]},
        "train_slct": {"diffusion_share": [1.5, -0.1], "diffusion_weight": [-1], "robust_c": [-1]},
        "train_edm": {"sigma_min": [0, -1, "nan"], "validation_images": [-1]},
        "tune_ect": {"q": [0.5, "nan"], "stage_steps": [-1], "mapping_k": ["nan"], "mapping_b": ["inf"]},
        "distill_scd": {
            "tangent_warmup_steps": [-1], "tangent_step": [0, "nan", "inf"], "tangent_c": [-1, "nan"], "segments": [0],
            "dmd_weight": [-0.1, "nan"], "w_max": ["inf"], "sigma_min": [0], "p_std": [0, "inf"],
            "recommended_sigmas": [0, "nan", [80.0, -1]],
        },
        "train_sct": {"segments": [2000], "p_mean": ["nan"], "sigma_data": [0], "tangent_step": [-1]},
        "tune_time": {"rho": [0], "p_std": ["nan"], "sigma_max": [-1]},
        "check_jvp": {"time_range": [0, "nan", "inf"], "time_start": ["nan"]},
        "train_vae": {"kl_weight": [-1, "nan"], "l1_weight": [-1], "norm_num_groups": [0], "latent_channels": [0]},
        "train_diffusion": {"condition_dropout": [1.5, -0.1], "text_length": [0], "unet_channels": [0], "text_layers": [0]},
        "train_flow": {"condition_dropout": [1.5], "text_length": [0], "shift": [0, "inf"], "logit_std": [0, "nan"], "logit_mean": ["inf"]},
        "train_classifier": {"label_smoothing": [1.0, -0.1, "nan"], "channels": [0]},
        "train_motion": {"sample_n_frames": [0], "sample_stride": [0], "motion_num_attention_heads": [0], "num_clips": [0]},
        "distill_animatelcm": {"lora_rank": [0], "lora_alpha": [0, "nan"], "num_starts": [0]},
        "finetune_lcf": {"w_min": ["nan"], "lora_dropout": [1.0]},
        "finetune_rlcm": {
            "samples_per_rollout": [0], "clip_range": [0, "nan"], "adv_clip": [0], "eta": [1.5], "num_inference_steps": [0],
            "guidance_scale": ["nan"], "kl_coef": [-1], "inner_epochs": [0], "guard_steps": [0], "stop_diversity": ["nan"],
        },
        "finetune_direct_reward": {"reward_weight": ["nan"], "kl_coef": [-1], "reward_weights": ["nan"], "guard_samples": [0]},
        "evaluate": {
            "num_images": [0, -1], "num_inference_steps": [0], "seed": [-1], "eval_batch_size": [0], "guidance_scales": ["nan"],
            "reference_steps": [0], "resolution": [0],
        },
        "evaluate_video": {"num_videos": [0], "frames_per_clip": [0], "crop_zoom": [0, "nan"], "num_shown": [-1], "teacher_steps": [0]},
        "rank_critics": {"num_images": [0], "num_inference_steps": [0], "guidance_scale": ["nan"]},
        "export_average": {"sigma_rel": [0, 0.5, "nan"], "step": [-1]},
        "combine": {
            "evaluations": [0], "population": [1], "mutation_std": [0, "nan"], "alpha_max": [0.5, "inf"], "pull": [-1, "nan"],
            "ema_rates": [1.0, -0.1], "sigma_rels": [0.3], "step_weights": [-1, "nan"], "search_seed": [-1], "holdout_seed": [-1],
            "bootstrap_samples": [0], "confidence": [0, 1], "window": [-1], "lora_rank": [0], "guidance_scale": [-1],
        },
        "prepare_moving_articles": {"num_frames": [0], "train_samples": [-1], "num_gifs": [-1]},
        "prepare_fashion_mnist": {"train_samples": [-1], "seed": [-1]},
    }  # fmt: skip
    return spread + [
        (name, {flag: value}, f"--{flag}")
        for name, flags in own.items()
        for flag, values in flags.items()
        for value in values
    ]


def words() -> list[tuple[str, dict, str]]:
    """Words that are no value of their flag, and flags that are of other programs."""
    wrong = {
        "max_train_steps": "ten", "learning_rate": "fast", "seed": "1.5", "mixed_precision": "fp8", "report_to": "paper",
        "optimizer": "sgd", "lr_scheduler": "step", "train_batch_size": "2.5",
    }  # fmt: skip
    other = {
        "pretrained_model_name_or_path": "x", "train_data": "x", "lr": 1, "max_steps": 5, "batch_size": 2, "dataset_config": "x",
        "network_dim": 8, "output": "x",
    }  # fmt: skip
    scripts = iter(TRAININGS * 2)
    of_scm = {"tangent": "exact", "tangent_normalization": "l1", "segments": "2.5", "noise_conditioning": "log"}
    found = [("train_sct", {flag: value}, f"argument --{flag}") for flag, value in of_scm.items()]
    found += [(next(scripts), {flag: value}, f"argument --{flag}") for flag, value in wrong.items()]
    return found + [(next(scripts), {flag: value}, f"--{flag}") for flag, value in other.items()]


def places() -> list[tuple[str, dict, str]]:
    """Paths that lead nowhere, to a file, or to something else."""
    found = []
    flags = {
        "pretrained_teacher_model": ["distill_lcm", "distill_scott", "distill_cd", "distill_scd", "tune_ect", "tune_time", "distill_animatelcm", "train_motion"],
        "pretrained_model": ["check_jvp"],
        "pretrained_student_model": ["finetune_lcf", "finetune_rlcm", "finetune_direct_reward"],
        "train_data_dir": ["distill_lcm", "train_ict", "train_vae", "train_classifier", "train_diffusion", "finetune_lcf", "evaluate", "combine"],
        "moving_articles": ["train_motion", "evaluate_video", "prepare_moving_articles"],
        "pretrained_vae": ["train_diffusion", "train_slct"],
        "pretrained_pipeline": ["train_flow"],
        "transformer_config": ["train_flow"],
        "pretrained_vae_model_name_or_path": ["distill_lcm"],
        "pretrained_motion_adapter": ["evaluate_video"],
        "unet_config": ["train_ct", "train_edm", "train_sct"],
        "test_data_dir": ["train_classifier", "train_vae"],
        "pipelines": ["evaluate", "evaluate_video"],
        "pipeline": ["rank_critics"],
        "backbones": ["rank_critics"],
        "feature_extractor": ["evaluate", "combine"],
        "clip_model": ["evaluate"],
        "folder": ["share"],
        "evaluation": ["share"],
        "run_dir": ["export_average", "combine"],
        "idx_dir": ["prepare_fashion_mnist"],
        "spatial_lora": ["distill_animatelcm"],
        "prompts_file": ["distill_lcm"],
        "recipe": ["distill_lcm", "evaluate"],
        "resume_from_checkpoint": ["distill_lcm", "train_edm", "finetune_rlcm"],
    }  # fmt: skip
    for flag, scripts in flags.items():
        for name in scripts:
            found.append((name, {flag: "{home}/nowhere"}, "nowhere"))
        if flag not in ("recipe", "unet_config", "prompts_file"):
            found.append((scripts[0], {flag: "{home}/empty"}, "empty"))
            found.append((scripts[-1], {flag: "{home}/notes.txt"}, "notes.txt"))
    return found


NUMBERS, WORDS, PLACES = numbers(), words(), places()


def refused(name: str, home: Path, folder: Path, changes: dict) -> str:
    """The sentence with which a script ends; it has written nothing."""
    flags = BASE[name](home) | ({} if name in ("share", "check_jvp") else {"output_dir": folder / "out"}) | changes
    if "prompts_file" in changes or "dataset_name" in changes:
        del flags["train_data_dir"]
    before = set(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        run_script(name, **flags)
    sentence = ended.value.code
    assert isinstance(sentence, str)
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
    assert len(sentence) < 700
    assert set(folder.rglob("*")) == before
    return sentence


OF_SCM = {
    "more noise than it knows": ("distill_scd", {"sigma_max": 200.0}, "--sigma_max 200.0 is more noise than the network knows"),
    "guidance of a class teacher": ("distill_scd", {"w_max": 5.0}, "without a null condition"),
    "a LoRA of a class teacher": ("distill_scd", {"lora": True}, "--lora has no effect for a teacher that reads no text"),
    "levels beyond the most noise": ("distill_scd", {"recommended_sigmas": [90.0]}, "from at most 80.0"),
    "levels that rise": ("train_sct", {"recommended_sigmas": [0.5, 80.0]}, "must be numbers that descend"),
    "levels of a student of segments": ("train_sct", {"segments": 2, "recommended_sigmas": [80.0]}, "--recommended_sigmas names 1: leave it out, or give 80 "),
    "an averaged target": ("train_sct", {"ema_decay": 0.5}, "--ema_decay has no effect with sct"),
    "norms without a scale": ("train_sct", {"double_norm": True}, "--double_norm is for scale and shift"),
    "grids of words": ("train_sct", {"validation_prompts": ["a bag"]}, "--validation_prompts are for a model that reads text"),
    "not pushed": ("train_sct", {"push_to_hub": True}, "--push_to_hub needs"),
    "no network": ("check_jvp", {"subfolder": "scheduler"}, "no network that loads"),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_SCM)
def test_what_a_student_of_continuous_time_cannot_be(home, tmp_path, case) -> None:
    name, changes, words = OF_SCM[case]
    assert words in refused(name, home, tmp_path, changes)


def test_no_teacher_and_no_network(tmp_path, capsys) -> None:
    for name, flag in {"distill_scd": "pretrained_teacher_model", "tune_time": "pretrained_teacher_model",
                       "train_sct": "unet_config", "check_jvp": "pretrained_model"}.items():  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            run_script(name)
        assert f"--{flag}" in str(ended.value) + capsys.readouterr().err


def label(case: tuple[str, dict, str]) -> str:
    return f"{case[0]}-{'-'.join(f'{name}-{value}' for name, value in case[1].items())}"


@pytest.mark.parametrize("case", NUMBERS + WORDS, ids=label)
def test_values_that_make_no_sense(home, tmp_path, case) -> None:
    name, changes, words = case
    assert words in refused(name, home, tmp_path, changes)


@pytest.mark.parametrize("case", PLACES, ids=label)
def test_paths_that_lead_nowhere(home, tmp_path, case) -> None:
    name, changes, words = case
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("nothing of the kind")
    changes = {flag: value.format(home=tmp_path) for flag, value in changes.items()}
    assert words in refused(name, home, tmp_path, changes)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(path: Path, part: str) -> None:
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if not name.startswith(part)}, path, {"format": "pt"})


def in_dtype(path: Path, dtype: torch.dtype) -> None:
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, {"format": "pt"})


def nan(path: Path) -> None:
    weights = load_file(path)
    weights[next(iter(weights))].view(-1)[0] = torch.nan
    save_file(weights, path, {"format": "pt"})


def with_entry(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


DAMAGES = {
    "cut weights": lambda model: cut(model / WEIGHTS),
    "weights of nothing": lambda model: (model / WEIGHTS).write_bytes(b""),
    "no weights": lambda model: (model / WEIGHTS).unlink(),
    "missing tensors": lambda model: without(model / WEIGHTS, "conv_out"),
    "whole numbers": lambda model: in_dtype(model / WEIGHTS, torch.int8),
    "nan": lambda model: nan(model / WEIGHTS),
    "no config": lambda model: (model / "unet" / "config.json").unlink(),
    "cut config": lambda model: cut(model / "unet" / "config.json"),
    "cut index": lambda model: cut(model / "model_index.json"),
    "index of a list": lambda model: (model / "model_index.json").write_text("[]"),
    "unknown class": lambda model: with_entry(model / "model_index.json", _class_name="NoSuchPipeline"),
    "no scheduler": lambda model: shutil.rmtree(model / "scheduler"),
    "cut text tower": lambda model: cut(model / "text_encoder" / "model.safetensors"),
    "no tokenizer": lambda model: shutil.rmtree(model / "tokenizer"),
    "cut VAE": lambda model: cut(model / "vae" / "diffusion_pytorch_model.safetensors"),
}
RECORDS = {
    "cut record": lambda model: cut(model / RECORD),
    "record of a list": lambda model: (model / RECORD).write_text("[]"),
    "unknown guidance": lambda model: with_entry(model / RECORD, guidance="some"),
    "contradiction": lambda model: with_entry(model / RECORD, guidance="embedded"),
    "nan in the record": lambda model: with_entry(model / RECORD, w_min=float("nan")),
    "no steps": lambda model: with_entry(model / RECORD, recommended_num_inference_steps=0),
}
READERS = {
    "teacher": ("distill_lcm", "pretrained_teacher_model"),
    "student": ("finetune_lcf", "pretrained_student_model"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", READERS)
def test_damaged_models(home, tmp_path, kind, damage) -> None:
    model, (name, flag) = shutil.copytree(home / kind, tmp_path / "model"), READERS[kind]
    DAMAGES[damage](model)
    assert "model" in refused(name, home, tmp_path, {flag: model})


@pytest.mark.parametrize("damage", [*RECORDS, *DAMAGES])
def test_evaluation_finds_a_damaged_second_pipeline_before_it_samples(home, tmp_path, monkeypatch, damage) -> None:
    monkeypatch.setattr("cm_diffusers.evaluation.sampling.generate", lambda *args, **kwargs: pytest.fail("sampled"))
    model = shutil.copytree(home / "student", tmp_path / "model")
    (RECORDS | DAMAGES)[damage](model)
    assert "model" in refused("evaluate", home, tmp_path, {"pipelines": [home / "student", model]})


def metadata(text: str | bytes, name: str = "metadata.jsonl") -> Callable[[Path], None]:
    def write(data: Path) -> None:
        (data / "metadata.jsonl").unlink()
        (data / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def pictures(content: bytes) -> Callable[[Path], None]:
    def write(data: Path) -> None:
        for path in data.glob("*.png"):
            path.write_bytes(content)

    return write


DATA = {
    "no JSON": metadata("{"),
    "no rows": metadata(""),
    "a list": metadata("[1, 2]\n"),
    "no file_name": metadata('{"text": "a bag"}\n'),
    "no such picture": metadata('{"file_name": "none.png", "text": "a bag"}\n'),
    "no captions": metadata('{"file_name": "0.png"}\n'),
    "not UTF-8": metadata(b'{"file_name": "0.png", "text": "\xff\xfe\xfa"}\n'),
    "CSV without columns": metadata("0.png\n", "metadata.csv"),
    "pictures of text": pictures(b"no picture"),
    "pictures of nothing": pictures(b""),
}


@pytest.mark.parametrize("damage", DATA)
def test_damaged_data(home, tmp_path, damage) -> None:
    data = shutil.copytree(home / "data", tmp_path / "pictures")
    DATA[damage](data)
    flags = {"train_data_dir": data, "cache_dir": tmp_path / "hf"}
    (tmp_path / "hf").mkdir()
    sentence = refused("distill_lcm", home, tmp_path, flags | {"cache_dir": home / "hf"})
    assert any(word in sentence for word in ("pictures", "rows", "column"))
