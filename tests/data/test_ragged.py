"""Conditions with a mask: what is stored of them, and what comes back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cm_diffusers.data.cache import cached_embeddings
from cm_diffusers.data.ragged import joined, packed, row_of, trimmed
from cm_diffusers.data.sources import DataConfig


MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0]])  # also holes, and nothing at all
LENGTHS = [2, 1, 4, 3]


def conditions(mask: torch.Tensor = MASK) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(4, 4, 3, generator=generator),
        "layers": torch.randn(4, 4, 2, 3, generator=generator),
        "pooled": torch.randn(4, 4, generator=generator),  # as wide as the mask is long
        "other": torch.randn(4, 5, 3, generator=generator),
        "prompt_mask": mask,
    }


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_a_row_ends_with_the_last_token_that_its_mask_shows(dtype):
    told = conditions(MASK.to(dtype))
    stored = packed(told)
    shapes = {name: tuple(value.shape) for name, value in stored.items()}
    assert shapes == {
        "prompt_mask": (4,), "prompt_embeds of prompt_mask": (10, 3), "layers of prompt_mask": (10, 2, 3),
        "pooled": (4, 4), "other": (4, 5, 3), "prompt_mask of prompt_mask": (10,),
    }  # fmt: skip
    assert stored["prompt_mask"].tolist() == LENGTHS
    for row, length in enumerate(LENGTHS):
        found = row_of(stored, row)
        assert found.keys() == told.keys()
        for name, value in told.items():
            kept = value[row : row + 1] if name in ("pooled", "other") else value[row : row + 1, :length]
            assert torch.equal(found[name], kept)
            assert found[name].dtype == value.dtype


def test_rows_are_as_long_as_the_longest_of_their_batch():
    told = trimmed(conditions())
    stored = packed(told)
    for rows, length in (([0, 1], 2), ([3, 0], 3), ([1], 1), ([0, 1, 2, 3], 4)):
        found = joined([row_of(stored, row) for row in rows])
        assert found["prompt_mask"].shape == (len(rows), length)
        for name, value in trimmed({name: value[rows] for name, value in told.items()}).items():
            assert torch.equal(found[name], value), name


def test_what_is_hidden_becomes_zero_whatever_it_was():
    told = conditions()
    told["prompt_embeds"][0, 3] = torch.nan
    hidden = (MASK == 0)[:, :, None].expand_as(told["prompt_embeds"])
    found = trimmed(told)["prompt_embeds"]
    assert found[hidden].count_nonzero() == 0
    assert torch.equal(found[~hidden], told["prompt_embeds"][~hidden])


def test_a_value_that_two_masks_may_mean_is_stored_whole():
    told = conditions() | {"second_mask": MASK.flip(0)}
    assert packed(told).keys() == told.keys()
    assert all(torch.equal(value, told[name]) for name, value in trimmed(told).items())


def test_without_a_mask_lengths_must_agree():
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        joined([{"states": torch.ones(1, 4, 3)}, {"states": torch.ones(1, 5, 3)}])


LENGTH, WIDTH = 64, 32
CAPTIONS = ["", *(f"{'word ' * (n % 5)}number {n}" for n in range(40))]


def encode(texts: list[str], scale: float = 1.0, length: int | None = LENGTH) -> dict[str, torch.Tensor]:
    """A token more than words, whose first value is the word's length; padded with sevens, or to the longest."""
    counts = torch.tensor([1 + len(text.split()) for text in texts])
    mask = torch.arange(length or int(counts.max())) < counts[:, None]
    states = torch.full((*mask.shape, WIDTH), 7.0)
    for row, text in enumerate(texts):
        for place, word in enumerate(text.split()):
            states[row, 1 + place, 0] = len(word) * scale
    return {"states": states, "mask": mask, "pooled": counts[:, None].float()}


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return DataConfig(encode_batch_size=7, latent_cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("length", [LENGTH, None])
def test_a_shard_is_as_large_as_its_captions_are_long(config, length):
    table = cached_embeddings(CAPTIONS, lambda texts: encode(texts, length=length), "fake", config)
    tokens = sum(1 + len(text.split()) for text in CAPTIONS)
    (file,) = Path(config.latent_cache_dir).glob("*/*.safetensors")
    content = tokens * (WIDTH * 2 + 1) + len(CAPTIONS) * (
        2 + 8 + 32
    )  # in float16, with a mask, a pooled value, a length and a key
    assert content < file.stat().st_size < content + 700  # bytes of names and shapes
    assert content < 0.1 * len(CAPTIONS) * LENGTH * WIDTH * 2
    for numbers in (np.array([0, 17, 40, 3]), np.arange(41), np.array([0])):
        found, expected = table[numbers], trimmed(encode([CAPTIONS[i] for i in numbers]))
        assert found["mask"].dtype == torch.bool
        assert found["states"].dtype == torch.float32
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected if name != "states")
        assert torch.equal(found["states"] * found["mask"][:, :, None], expected["states"])


def test_both_branches_are_as_long_as_each_other(config):
    table = cached_embeddings(CAPTIONS, encode, "fake", config)
    cond, uncond = table.with_empty(np.array([1, 5]), 0)
    assert cond["mask"].sum(1).tolist() == [3, 7]
    assert uncond["mask"].sum(1).tolist() == [1, 1]
    assert cond["states"].shape == uncond["states"].shape == (2, 7, WIDTH)


def test_a_ragged_shard_is_read_again_and_one_of_other_rows_is_not(config):
    def refuse(texts: list[str]) -> None:
        raise AssertionError("must not be called")

    cached_embeddings(CAPTIONS, encode, "fake", config)
    again = cached_embeddings(CAPTIONS, refuse, "fake", config)
    assert again[np.array([40])]["pooled"].item() == 1 + 4 + 2  # four times "word", "number" and 39
    (file,) = Path(config.latent_cache_dir).glob("*/*.safetensors")
    other = DataConfig(latent_cache_dir=str(file.parents[1] / "other"))
    cached_embeddings(CAPTIONS[:9], encode, "fake", other)
    file.write_bytes(next(Path(other.latent_cache_dir).glob("*/*")).read_bytes())
    with pytest.raises(AssertionError, match="must not be called"):
        cached_embeddings(CAPTIONS, refuse, "fake", config)


@pytest.mark.parametrize(("scale", "dtype"), [(8000.0, torch.float16), (20000.0, torch.bfloat16)])
def test_a_tensor_is_in_bfloat16_only_where_float16_overflows(config, scale, dtype):
    """The longest word has 6 letters: 48000 fits and 120000 does not, though it is not in the first part encoded."""
    captions = ["a", "of", *"bcdefgh", "number", "i"]
    table = cached_embeddings(captions, lambda texts: encode(texts, scale), "fake", config)
    (file,) = Path(config.latent_cache_dir).glob("*/*.safetensors")
    stored = load_file(file)
    assert stored["states of mask"].dtype == dtype
    assert stored["pooled"].dtype == torch.float16
    found = table[np.array([0, 9])]["states"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 1, 0], torch.tensor([1, 6]) * scale, rtol=2**-8, atol=0)
    assert found[0, 0, 0] == 7
