"""Prompts from files, lists and known sets."""

import json
from collections.abc import Callable
from importlib.resources import files
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import FASHION_LABELS, tiny_pipeline
from tiny_xl import tiny_xl_pipeline

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.prompts import ARTICLES, PROMPT_SETS, Prompt, hardest_prompts, load_prompts, named_prompts
from cm_diffusers.data.prompts_alone import PromptDataConfig, batches_of_prompts
from cm_diffusers.evaluation.metrics import label_in_prompt
from cm_diffusers.types import Batch


def test_known_sets_are_those_of_ddpo() -> None:
    assert {name: len(found) for name, found in PROMPT_SETS.items()} == {
        "simple_animals": 45,
        "imagenet_animals": 398,
        "animal_activities": 135,
        "fashion": 10,
    }
    assert all(len(set(found)) == len(found) for found in PROMPT_SETS.values())
    assert PROMPT_SETS["simple_animals"][:2] == ("cat", "dog")
    assert PROMPT_SETS["simple_animals"][-1] == "kangaroo"
    animals = PROMPT_SETS["imagenet_animals"]
    assert (animals[0], animals[151], animals[397]) == (
        "tench, Tinca tinca",
        "Chihuahua",
        "puffer, pufferfish, blowfish, globefish",
    )
    assert PROMPT_SETS["animal_activities"][0] == "a cat washing the dishes"
    assert "an ant riding a bike" in PROMPT_SETS["animal_activities"]


def test_the_licence_of_the_lists_is_beside_them() -> None:
    licence = (files("cm_diffusers.data") / "PROMPTS_LICENSE").read_text("utf-8")
    for words in ("Copyright (c) 2023 Kevin Black", "Permission is hereby granted", "WITHOUT WARRANTY OF ANY KIND"):
        assert words in licence


def test_articles_are_those_of_the_bundled_student() -> None:
    assert ARTICLES == FASHION_LABELS
    prompts = [text for text, _ in load_prompts("fashion")]
    assert [prompts[i] for i in (0, 1, 9)] == [
        "a photo of a t-shirt",
        "a photo of trousers",
        "a photo of an ankle boot",
    ]
    assert [label_in_prompt(text, FASHION_LABELS) for text in prompts] == list(range(10))


def test_lists_and_files(tmp_path: Path) -> None:
    assert load_prompts(["a bag", "a coat"]) == [Prompt("a bag", {}), Prompt("a coat", {})]
    lines = tmp_path / "prompts.txt"
    lines.write_text("a bag\n\n  a fox, ünïcode \n", encoding="utf-8")
    assert load_prompts(str(lines)) == [Prompt("a bag", {}), Prompt("a fox, ünïcode", {})]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(json.dumps({"prompt": "a bag", "count": 2}) + "\n\n" + json.dumps({"prompt": "a coat"}))
    assert load_prompts(rows) == [Prompt("a bag", {"count": 2}), Prompt("a coat", {})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "empty.txt must hold at least one prompt"),
        ("empty.jsonl", b"", "empty.jsonl must hold at least one prompt"),
        ("bytes.txt", b"\xff\xfe\x00", "bytes.txt cannot be read: it is no text in UTF-8"),
        ("rows.csv", b"prompt\na bag\n", "rows.csv must hold one prompt a line, or be a .jsonl, but it ends in .csv"),
        ("rows.jsonl", b'{"prompt": "a"}\n{"text": "b"}', "rows.jsonl, line 2, must be an object"),
        ("broken.jsonl", b'{"prompt": ', "broken.jsonl, line 1, must be"),
        ("number.jsonl", b'{"prompt": 3}', "with a text as its prompt"),
        ("blank.jsonl", b'{"prompt": " "}', "none that is empty"),
    ],
)
def test_refuses_files_without_prompts(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name)


def test_refuses_unknown_names_and_empty_lists() -> None:
    with pytest.raises(ValueError, match="no file of prompts animals; give one, or one of simple_animals"):
        load_prompts("animals")
    for empty in ([], ["a bag", ""], ["a bag", None]):
        with pytest.raises(ValueError, match="The list must hold at least one prompt"):
            load_prompts(empty)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_batches_of_prompts_alone(make: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    """Every prompt as often as the others, whole and empty, and the sizes that XL is told; the seed decides the order."""
    texts, encoders = ["a bag", "a coat", "an ankle boot", "a bag"], Encoders.from_pipeline(make())
    config = PromptDataConfig(texts, resolution=32, train_batch_size=2, latent_cache_dir=str(tmp_path))

    def epoch(seed: int) -> list[Batch]:
        return list(islice(batches_of_prompts(config, encoders, seed)(0), 2))

    found = epoch(0)
    assert sorted(text for batch in found for text in batch.texts) == sorted(texts)
    empty = encoders.encode_prompts([""])["encoder_hidden_states"]
    for batch in found:
        assert batch.x0 is None
        expected = encoders.encode_prompts(batch.texts)["encoder_hidden_states"]
        torch.testing.assert_close(batch.cond["encoder_hidden_states"], expected, rtol=2e-3, atol=2e-3)  # float16
        torch.testing.assert_close(
            batch.uncond["encoder_hidden_states"], empty.expand(2, -1, -1), rtol=2e-3, atol=2e-3
        )
        sizes = [[32, 32, 0, 0, 32, 32]] * 2
        assert [each["time_ids"].tolist() for each in (batch.cond, batch.uncond) if "time_ids" in each] == (
            [sizes, sizes] if make is tiny_xl_pipeline else []
        )
    assert len({tuple(tuple(batch.texts) for batch in epoch(seed)) for seed in range(6)}) > 1


def test_the_words_of_a_flag_are_prompts_or_name_them(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("a bag\n\na coat\n")
    assert [text for text, _ in named_prompts([str(tmp_path / "some.txt")])] == ["a bag", "a coat"]
    assert named_prompts(["fashion"]) == load_prompts("fashion")
    assert [text for text, _ in named_prompts(["a lone bag"])] == ["a lone bag"]
    assert [text for text, _ in named_prompts(["fashion", "a bag"])] == ["fashion", "a bag"]
    for word in ("fashionable", "animals", "bag.", "a bag/coat", "fashon bag"):
        assert named_prompts([word]) == [Prompt(word, {})]


@pytest.mark.parametrize("word", ["fashon", "Fashion", "simple-animals", "nothere.csv", "data/prompts"])
def test_a_misspelt_set_or_file_is_no_prompt(word: str) -> None:
    with pytest.raises(ValueError, match=f"no file of prompts {word}; give one, or one of .*, fashion"):
        named_prompts([word])


def test_the_hardest_prompts_have_the_lowest_mean_reward() -> None:
    rewards = {"a": [1.0, 3.0], "b": [0.0, 0.5], "c": [9.0], "d": [2.0, -6.0]}
    assert hardest_prompts(rewards, 2) == ["d", "b"]
    assert hardest_prompts(rewards, 4) == ["d", "b", "a", "c"]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"from 1 to the number of prompts, 4, but it is {k}"):
            hardest_prompts(rewards, k)
    with pytest.raises(ValueError, match="'e' has no rewards"):
        hardest_prompts(rewards | {"e": []}, 1)
