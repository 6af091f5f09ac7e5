"""Two processes on this machine: equal weights, different data, and the same run as one process makes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import OPTIM, Duel, Jump
from safetensors.torch import load_file
from torch import Tensor
from toys import assert_same, forget_accelerate, rows, source, tensors, toy_network, toy_trainer

from cm_diffusers.types import Networks


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where `distributed_worker.py` left the results of its two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    worker = [str(Path(__file__).parents[1] / "distributed_worker.py"), str(folder)]
    done = subprocess.run([*launch, *worker], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)]


def part(found: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if name.startswith(prefixes)}


@pytest.mark.parametrize("name", ["student/", "target/", "export_ema/", "resumed/", "halves/", "duel/", "matched/"])
def test_ranks_hold_the_same_weights(ranks, name) -> None:
    assert_same(part(ranks[1], name), part(ranks[0], name))


def test_student_and_target_draw_the_same_dropout_masks(ranks) -> None:
    """On every rank, with gradient checkpointing; and without rewinding two passes differ."""
    for found in ranks:
        assert found["masks/loss"].tolist() == [0.0, 0.0]
        assert found["masks/differ"].item()


def test_ranks_share_the_data(ranks) -> None:
    """4 steps of 2 micro-batches of 4 rows each: batch k of all ranks is rows 8k to 8k + 7."""
    for rank, found in enumerate(ranks):
        expected = [rows(8 * k + 4 * rank, 8 * k + 4 * rank + 4).x0 for k in range(8)]
        assert torch.equal(found["inputs"], torch.cat(expected))


def test_the_reported_loss_is_the_mean_over_ranks(ranks) -> None:
    assert not torch.equal(ranks[0]["losses"], ranks[1]["losses"])
    mean = torch.stack([found["losses"] for found in ranks]).mean(0).unflatten(0, (4, 2)).mean(1)
    for found in ranks:
        torch.testing.assert_close(found["reported"], mean)


def test_resume_is_bit_exact(folder, ranks) -> None:
    assert_same(tensors(folder / "resumed" / "checkpoint-4"), tensors(folder / "whole" / "checkpoint-4"))
    for found in ranks:
        whole = part(found, "student/", "target/", "export_ema/")
        assert_same({name.removeprefix("resumed/"): v for name, v in part(found, "resumed/").items()}, whole)


def test_a_checkpoint_of_two_processes_does_not_continue_in_one(folder, tmp_path) -> None:
    checkpoint = str(folder / "halves" / "checkpoint-4")
    with pytest.raises(ValueError, match="num_processes was 2, now 1"):
        toy_trainer(tmp_path, optim=OPTIM, resume_from_checkpoint=checkpoint)


def test_two_processes_are_one_with_a_double_batch(tmp_path, ranks) -> None:
    trainer = toy_trainer(tmp_path, optim=OPTIM)
    trainer.fit(source(8))
    halves = {name.removeprefix("halves/"): value for name, value in part(ranks[0], "halves/").items()}
    torch.testing.assert_close(halves, dict(trainer.student.state_dict()), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(halves["0.weight"], toy_network()[0].weight, atol=1e-3), "it has moved"


def test_two_players_in_two_processes_are_two_in_one(tmp_path, ranks) -> None:
    nets = Networks(toy_network(0), critic=toy_network(1))
    toy_trainer(tmp_path, nets, Duel(), OPTIM).fit(source(8))
    found = {
        name.rsplit("module.", 1)[-1].removeprefix("duel/"): value for name, value in part(ranks[0], "duel/").items()
    }
    torch.testing.assert_close(found, dict(nets.critic.state_dict()), rtol=1e-5, atol=1e-7)


def test_students_of_scm_and_their_fake_scores_learn(ranks) -> None:
    start = Jump(0).state_dict()
    for name in ("matched/student/network.", "matched/critic/"):
        found = part(ranks[0], name)
        assert found.keys() == {f"{name}{key}" for key in start}
        assert not any(torch.equal(found[f"{name}{key}"], value) for key, value in start.items())
