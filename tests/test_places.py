"""No secret of an address leaves a run: not in its files, its tracker or what it says."""

import json
import sys
from dataclasses import dataclass

import pytest
from toys import ToyObjective, forget_accelerate, rows, toy_network

from cm_diffusers.engine import cli
from cm_diffusers.engine.accelerator import make_accelerator
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.places import without_secrets
from cm_diffusers.types import Networks


KNOWN = {
    "https://ada:s3cret@host/a.tar": "https://host/a.tar",
    "https://host/a.tar?token=s3cret#part": "https://host/a.tar",
    "https://host/a.tar?t=s3cret,https://ada:s3cret@host/b.tar?t=s,cret": "https://host/a.tar,https://host/b.tar",
    "The shard 'https://ada:p@ss@host/a.tar?t=1' cannot be read (s3://b/c?d).": "The shard 'https://host/a.tar' cannot be "
    "read (s3://b/c).",
    "hf://datasets/ada/data@main/a.parquet": "hf://datasets/ada/data@main/a.parquet",
    "Is it so? See ada@host, #1.": "Is it so? See ada@host, #1.",
}


@dataclass
class Source:
    train_shards_path_or_url: str = "https://ada:s3cret@host/a.tar?token=s3cret"


@pytest.mark.parametrize("text", KNOWN)
def test_what_is_left_of_an_address(text: str) -> None:
    assert without_secrets(text) == KNOWN[text]
    assert without_secrets([text, 1]) == [KNOWN[text], 1]


def trained(folder, **settings) -> None:
    forget_accelerate()
    config = TrainConfig(output_dir=str(folder), checkpointing_steps=1, **settings)
    trainer = Trainer(config, Networks(toy_network()), ToyObjective(), OptimConfig(), [Source()])
    trainer.fit(lambda first: (rows(4 * k, 4 * k + 4) for k in range(first, 10)))
    trainer.end()


def test_none_in_the_files_of_a_run_and_its_tracker(tmp_path) -> None:
    trained(tmp_path, max_train_steps=1)
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"https://host/a.tar" in text for text in texts)
    assert [text for text in texts if b"s3cret" in text] == []
    assert {"run.json", "checkpoint-1", "cm_diffusers"} <= {path.name for path in tmp_path.iterdir()}
    state = tmp_path / "checkpoint-1" / "state.json"  # as an earlier release wrote it
    state.write_text(state.read_text().replace("https://host", "https://ada:s3cret@host"))
    assert "s3cret" in json.loads(state.read_text())["identity"]["train_shards_path_or_url"]
    trained(tmp_path, max_train_steps=2, resume_from_checkpoint="latest")


def test_none_in_what_is_said(monkeypatch) -> None:
    def main() -> None:
        without = "--train_shards_path_or_url https://ada:s3cret@host/a.tar?token=s3cret is not there."
        cli.refuse_changed(Source(without), "train_shards_path_or_url", "here")

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert "https://host/a.tar is not there" in str(end.value)
    assert "s3cret" not in str(end.value)
    monkeypatch.setattr(sys, "argv", ["x.py", "--train_shards_path_or_url", Source.train_shards_path_or_url])
    with pytest.raises(
        ValueError, match=r"wandb records the command line with what the address https://host/a.tar holds"
    ):
        make_accelerator("no", "wandb", "runs")
