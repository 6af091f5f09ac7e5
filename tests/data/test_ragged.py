"""Conditions with a mask: what is stored of them, and what comes back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cm_diffusers.data.cache import cached_embeddings
from cm_diffusers.data.ragged import blanked, packed, row_of
from cm_diffusers.data.sources import DataConfig


MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]])  # also holes, and nothing at all


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
def test_only_what_the_mask_shows_is_stored(dtype):
    told = conditions(MASK.to(dtype))
    stored = packed(told)
    shapes = {name: tuple(value.shape) for name, value in stored.items()}
    assert shapes == {
        "prompt_mask": (4, 4), "prompt_embeds of prompt_mask": (8, 3), "layers of prompt_mask": (8, 2, 3),
        "pooled": (4, 4), "other": (4, 5, 3),
    }  # fmt: skip
    assert torch.equal(stored["prompt_embeds of prompt_mask"][2:4], told["prompt_embeds"][2, [1, 3]])
    rows = [row_of(stored, row) for row in range(4)]
    back = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert back.keys() == told.keys()
    assert back["prompt_mask"].dtype == dtype
    for name, value in blanked(told).items():
        assert torch.equal(back[name], value), name
    hidden = (MASK == 0)[:, :, None].expand_as(told["prompt_embeds"])
    assert back["prompt_embeds"][hidden].count_nonzero() == 0
    assert torch.equal(back["prompt_embeds"][~hidden], told["prompt_embeds"][~hidden])


def test_a_value_that_two_masks_may_mean_is_stored_whole():
    told = conditions() | {"second_mask": MASK.flip(0)}
    assert packed(told).keys() == told.keys()
    assert all(torch.equal(value, told[name]) for name, value in blanked(told).items())


def test_what_is_hidden_may_be_no_number():
    told = conditions()
    told["prompt_embeds"][0, 3] = torch.nan
    assert blanked(told)["prompt_embeds"].isfinite().all()


LENGTH, WIDTH = 64, 32
CAPTIONS = ["", *(f"{'word ' * (n % 5)}number {n}" for n in range(40))]


def encode(texts: list[str], scale: float = 1.0) -> dict[str, torch.Tensor]:
    """As many tokens as words, one more for the empty prompt; the first value of a token is its word's length."""
    counts = torch.tensor([1 + len(text.split()) for text in texts])
    mask = torch.arange(LENGTH) < counts[:, None]
    states = torch.full((len(texts), LENGTH, WIDTH), 7.0)
    for row, text in enumerate(texts):
        for place, word in enumerate(text.split()):
            states[row, 1 + place, 0] = len(word) * scale
    return {"states": states, "mask": mask, "pooled": counts[:, None].float()}


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return DataConfig(encode_batch_size=7, latent_cache_dir=str(tmp_path / "cache"))


def shard_in(config: DataConfig) -> dict[str, torch.Tensor]:
    (file,) = Path(config.latent_cache_dir).glob("*.safetensors")
    return load_file(file)


def test_a_shard_is_as_large_as_its_captions_are_long(config):
    table = cached_embeddings(CAPTIONS, encode, "fake", config)
    tokens = sum(1 + len(text.split()) for text in CAPTIONS)
    (file,) = Path(config.latent_cache_dir).glob("*.safetensors")
    content = tokens * WIDTH * 2 + len(CAPTIONS) * (LENGTH + 2)
    assert content < file.stat().st_size < content + 700  # bytes of names and shapes
    assert content < 0.1 * len(CAPTIONS) * LENGTH * WIDTH * 2
    for numbers in (np.array([0, 17, 40, 3]), np.arange(41)):
        found, expected = table[numbers], blanked(encode([CAPTIONS[i] for i in numbers]))
        assert found["mask"].dtype == torch.bool
        assert found["states"].dtype == torch.float32
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_ragged_shard_is_read_again_and_one_of_other_rows_is_not(config):
    def refuse(texts: list[str]) -> None:
        raise AssertionError("must not be called")

    cached_embeddings(CAPTIONS, encode, "fake", config)
    assert (
        cached_embeddings(CAPTIONS, refuse, "fake", config)[np.array([40])]["pooled"].item() == 1 + 4 + 2
    )  # words "word" and of the end
    (file,) = Path(config.latent_cache_dir).glob("*.safetensors")
    other = DataConfig(latent_cache_dir=str(file.parent / "other"))
    cached_embeddings(CAPTIONS[:9], encode, "fake", other)
    file.write_bytes(next(Path(other.latent_cache_dir).glob("*")).read_bytes())
    with pytest.raises(AssertionError, match="must not be called"):
        cached_embeddings(CAPTIONS, refuse, "fake", config)


@pytest.mark.parametrize(("scale", "dtype"), [(8000.0, torch.float16), (20000.0, torch.bfloat16)])
def test_a_tensor_is_in_bfloat16_only_where_float16_overflows(config, scale, dtype):
    """The longest word has 6 letters: 48000 fits and 120000 does not, though it is not in the first part encoded."""
    captions = ["a", "of", *["a"] * 7, "number", "a"]
    table = cached_embeddings(captions, lambda texts: encode(texts, scale), "fake", config)
    stored = shard_in(config)
    assert stored["states of mask"].dtype == dtype
    assert stored["pooled"].dtype == torch.float16
    found = table[np.array([0, 9])]["states"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 1, 0], torch.tensor([1, 6]) * scale, rtol=2**-8, atol=0)
    assert found[0, 0, 0] == 7
