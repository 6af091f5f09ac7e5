"""What `accelerate launch` says acts, where no flag does: precision, accumulation, compilation, processes."""

import os

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from scripts import run_script
from toys import assert_same, forget_accelerate, source, tensors, toy_trainer

from cm_diffusers.engine import launcher
from cm_diffusers.engine.cli import parse_configs
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.publishing.provenance import command_of


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """The environment that `accelerate launch` makes of its flags and its config file."""

    def launch(*words: str, config: str = "") -> None:
        head = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n"
        (tmp_path / "accelerate.yaml").write_text(head + config)
        file = ["--config_file", str(tmp_path / "accelerate.yaml")]
        args = launch_command_parser().parse_args([*file, "--num_processes", "1", *words, "train.py"])
        args, *_ = _validate_launch_command(args)
        for name, value in prepare_simple_launcher_cmd_env(args)[1].items():
            if name.startswith("ACCELERATE_"):
                monkeypatch.setenv(name, value)

    return launch


def settings(*words: str) -> tuple:
    (config,) = parse_configs([TrainConfig], "", list(words))
    return config.mixed_precision, config.gradient_accumulation_steps, config.compile


def test_without_a_launcher_flags_have_their_defaults() -> None:
    assert settings() == ("no", 1, False)
    assert settings("--mixed_precision", "bf16", "--compile") == ("bf16", 1, True)
    assert settings("--compile", "false", "--gradient_accumulation_steps", "2") == ("no", 2, False)


def test_a_launcher_that_is_told_nothing_changes_nothing(launched) -> None:
    launched()
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    assert settings() == ("no", 1, False)
    assert settings("--mixed_precision", "bf16", "--compile") == ("bf16", 1, True)


def test_flags_that_are_not_given_are_the_launchers(launched, monkeypatch) -> None:
    launched("--mixed_precision", "bf16", "--dynamo_backend", "inductor")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert settings() == ("bf16", 4, True)
    assert settings("--mixed_precision", "bf16", "--gradient_accumulation_steps", "4") == ("bf16", 4, True)
    assert "--gradient_accumulation_steps 4 --mixed_precision bf16 --compile" in command_of([TrainConfig()])


def test_flags_that_are_not_given_are_the_config_files(launched) -> None:
    launched(config="mixed_precision: bf16\ndynamo_config:\n  dynamo_backend: INDUCTOR\n")
    assert settings() == ("bf16", 1, True)


@pytest.mark.parametrize(
    ("launcher", "words", "sentence"),
    [
        ({"MIXED_PRECISION": "bf16"}, ["--mixed_precision", "no"], "--mixed_precision is no, but .* says bf16"),
        ({"MIXED_PRECISION": "fp16"}, ["--mixed_precision", "bf16"], "--mixed_precision is bf16, but .* says fp16"),
        ({"MIXED_PRECISION": "fp8"}, [], "says --mixed_precision fp8: take no, bf16 or fp16"),
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, ["--gradient_accumulation_steps", "2"], "steps is 2, but .* says 4"),
        ({"GRADIENT_ACCUMULATION_STEPS": "auto"}, [], "STEPS is 'auto': give a whole number"),
        ({"DYNAMO_BACKEND": "INDUCTOR"}, ["--compile", "false"], "--compile is False, but .* says True"),
        ({"DYNAMO_BACKEND": "EAGER"}, [], "dynamo with backend eager, but networks are compiled by inductor"),
        ({"DYNAMO_BACKEND": "INDUCTOR", "DYNAMO_MODE": "max-autotune"}, [], "backend inductor, mode max-autotune"),
    ],
)
def test_a_conflict_is_one_sentence(monkeypatch, launcher, words, sentence) -> None:
    for name, value in launcher.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match=sentence) as refused:
        settings(*words)
    assert "\n" not in str(refused.value)


@pytest.fixture
def sharded(monkeypatch):
    """The environment that `accelerate launch --use_fsdp` makes on a machine with two GPUs."""

    def launch(*words: str) -> None:
        asked = [
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "bf16",
            "--use_fsdp",
        ]
        args = launch_command_parser().parse_args([*asked, "--dynamo_backend", "no", *words, "train.py"])
        for name, value in prepare_multi_gpu_env(args).items():
            if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")):
                monkeypatch.setenv(name, value)

    return launch


def test_sharding_is_the_launchers(sharded) -> None:
    sharded("--fsdp_version", "2", "--fsdp_activation_checkpointing", "true")
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"  # as accelerate has it where nobody asks
    config = TrainConfig()
    assert launcher.is_sharded()
    assert (config.gradient_checkpointing, config.mixed_precision) == (True, "bf16")
    assert (
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    )  # or transformers would load text towers of one process


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "FSDP version 1 is not supported: give fsdp_version 2"),
        (["--fsdp_version", "2", "--fsdp_reshard_after_forward", "false"], "fsdp_reshard_after_forward false would"),
    ],
)  # fmt: skip
def test_other_ways_of_sharding_are_refused(sharded, words, sentence) -> None:
    sharded(*words)
    with pytest.raises(ValueError, match=sentence) as refused:
        settings()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["TP", "CP", "SP"])
def test_other_parallelism_is_refused(sharded, monkeypatch, name) -> None:
    sharded("--fsdp_version", "2")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", "2")
    with pytest.raises(ValueError, match=f"{name.lower()}_size above 1 is not supported"):
        settings()


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
def test_what_trains_one_network_alone_is_refused(monkeypatch, name) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(
        ValueError, match=r"trains one network, but runs here have several .*: choose FSDP with fsdp_version 2"
    ):
        settings()


def test_what_acts_is_what_is_recorded(tmp_path, monkeypatch) -> None:
    """The launcher's values train as the flags do, and accelerate divides no loss a second time."""
    asked = toy_trainer(tmp_path / "flags", mixed_precision="bf16", gradient_accumulation_steps=2)
    asked.fit(source())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    launched = toy_trainer(tmp_path / "launcher")
    launched.fit(source())
    assert launched.identity == asked.identity
    assert launched.identity["mixed_precision"] == "bf16"
    assert_same(tensors(tmp_path / "launcher" / "checkpoint-4"), tensors(tmp_path / "flags" / "checkpoint-4"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_fp16_needs_a_gpu(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"--mixed_precision fp16 needs a GPU, but this run is on cpu"):
        toy_trainer(tmp_path, mixed_precision="fp16")
    with pytest.raises(
        SystemExit, match=r"^error: --mixed_precision fp16 needs a GPU"
    ):  # before the teacher, which is not there
        run_script(
            "distill_lcm", pretrained_teacher_model=tmp_path / "no", train_data_dir=tmp_path, mixed_precision="fp16"
        )


def test_processes_that_would_each_be_a_run_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launcher, "_joined", lambda: 1)
    with pytest.raises(
        ValueError, match="started 2 processes, but only 1 of them would work together, because no GPU"
    ):
        settings()
    with pytest.raises(ValueError, match="started 2 processes, but this script is one"):
        parse_configs([], "", [])
    monkeypatch.setattr(launcher, "_joined", lambda: 2)
    assert settings() == ("no", 1, False)
