"""A cache that is damaged, foreign, read-only or full costs a sentence, never a traceback or a wrong latent."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from cm_diffusers.data import shards
from cm_diffusers.data.cache import Vae
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.kept import Wanted, keep
from cm_diffusers.data.keys import keys_of
from cm_diffusers.data.shards import shard_key
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.types import Batch


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, scaling_factor=0.5).eval()
    return Encoders(Vae.from_model(vae), lambda texts: {"encoder_hidden_states": torch.ones(len(texts), 2, 3)}, "fake")


@pytest.fixture
def config(tmp_path) -> DataConfig:
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"caption {i}")
    return DataConfig(
        train_data_dir=str(folder), resolution=8, train_batch_size=3, latent_cache_dir=str(tmp_path / "latents")
    )


def first(config: DataConfig, encoders: Encoders) -> Batch:
    return next(islice(text_image_batches(config, encoders, 0)(0), 1))


def files(config: DataConfig) -> list[Path]:
    return sorted(path for path in Path(config.latent_cache_dir).rglob("*") if path.is_file())


def replaced(path: Path, content: bytes) -> None:
    path.unlink()  # what is mapped stays as it was
    path.write_bytes(content)


def resaved(path: Path, change: Callable[[torch.Tensor], torch.Tensor], key: str | None) -> None:
    tensors = {name: change(tensor).contiguous() for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(tensors, path, None if key is None else {"key": key})


DAMAGE = {
    "cut off": lambda path, other: replaced(path, path.read_bytes()[:-7]),
    "empty": lambda path, other: replaced(path, b""),
    "header is no JSON": lambda path, other: replaced(path, path.read_bytes().replace(b'{"', b"?!", 1)),
    "not safetensors": lambda path, other: replaced(path, b"junk" * 99),
    "fewer rows": lambda path, other: resaved(path, lambda tensor: tensor[:1], path.stem),
    "other shapes": lambda path, other: resaved(path, lambda tensor: tensor[..., None], None),
    "of other data": lambda path, other: replaced(path, other.read_bytes()),
    "missing": lambda path, other: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_named_and_encoded_anew(config, encoders, kind, caplog):
    whole = first(config, encoders)
    paths = files(config)
    assert len(paths) == 3  # what is in the image files, latents, captions
    for path, other in zip(paths, [*paths[1:], paths[0]], strict=True):
        DAMAGE[kind](path, other)
        with caplog.at_level(logging.WARNING, "cm_diffusers.data.shards"):
            caplog.clear()
            again = first(config, encoders)
        assert torch.equal(again.x0, whole.x0)
        assert torch.equal(again.cond["encoder_hidden_states"], whole.cond["encoder_hidden_states"])
        assert len(caplog.messages) == (kind != "missing")
        for message in caplog.messages:
            assert message.startswith(f"The cached file {path} ")
            assert message.endswith("; it is encoded anew.")
    assert files(config) == paths


def test_another_vae_or_caption_is_never_taken_for_this_one(config, encoders):
    first(config, encoders)
    before = set(files(config))
    other = replace(encoders, vae=replace(encoders.vae, fingerprint="other"), fingerprint="another")
    first(config, other)
    assert len(set(files(config)) - before) == 2


def test_a_file_that_goes_while_the_run_goes_on_is_one_sentence(config, encoders):
    batches = text_image_batches(config, encoders, 0)
    for path in files(config):
        path.unlink()
    shards._mapped.cache_clear()
    with pytest.raises(ValueError, match=r"was whole when the run began .* --resume_from_checkpoint latest"):
        next(batches(0))


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_a_full_disk_leaves_no_half_file(config, encoders, monkeypatch, when):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*(shards, "save_file", full) if when == "writing" else (shards.os, "replace", full))
    message = (
        r"--latent_cache_dir .*latents cannot take .* MiB \(No space left on device\): make room, .*cache_latents\.$"
    )
    with pytest.raises(ValueError, match=message):
        first(config, encoders)
    assert files(config) == []


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_encoded(config, encoders, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refusing = replace(encoders, vae=replace(encoders.vae, load=lambda: pytest.fail("encoded")))
    with pytest.raises(ValueError, match=r"--latent_cache_dir .*file/latents cannot take files \(Not a directory\)"):
        first(replace(config, latent_cache_dir=str(tmp_path / "file" / "latents")), refusing)
    whole = first(config, encoders)

    def read_only(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    assert torch.equal(first(config, refusing).x0, whole.x0)  # all is there: nothing has to be written
    files(config)[0].unlink()
    files(config)[0].unlink()
    with pytest.raises(ValueError, match="Permission denied"):
        first(config, refusing)


def test_runs_that_fill_one_cache_do_not_disturb_each_other(tmp_path):
    """Each writes a file of its own and renames it, so what is there is always whole."""
    config = DataConfig(latent_cache_dir=str(tmp_path))
    keys = keys_of(map(str, range(50)))
    wanted = [
        Wanted(shard_key(i), keys, lambda rows, i=i: iter([{"x": torch.full((len(rows), 100), float(i))}]))
        for i in range(8)
    ]
    threads = [Thread(target=keep, args=(wanted, config, "rows")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name for path in tmp_path.iterdir()} == {one.setting for one in wanted}
    for i, one in enumerate(wanted):
        (path,) = (tmp_path / one.setting).iterdir()
        found = load_file(path)
        assert found["x"].unique().tolist() == [i]
        assert np.array_equal(found["keys"].numpy(), keys)


def test_what_killed_runs_left_is_removed_when_nobody_can_be_writing_it(config, encoders):
    first(config, encoders)
    path = files(config)[0]
    old, young, foreign = (path.with_name(name) for name in (f"{path.stem}.a.tmp", f"{path.stem}.b.tmp", "mine.tmp"))
    for left in (old, young, foreign):
        left.write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(foreign, (0, 0))
    path.unlink()
    first(config, encoders)
    assert set(files(config)) >= {path, young, foreign}
    assert not old.exists()
