"""Folders of results: whole or not at all, and what lies beside the weights of each kind."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cm_diffusers.publishing import folders
from cm_diffusers.publishing.folders import SAMPLES, write_result
from cm_diffusers.record import base_model_of, read_record
from publishing.test_model_card import PROVENANCE_OF_IT, RECORD


WEIGHTS = "weights.safetensors"
TOLD = {"training.json", "README.md"}


def weights(folder: Path) -> None:
    save_file({"w": torch.zeros(1)}, folder / WEIGHTS)


def fails(folder: Path) -> None:
    raise RuntimeError(f"after {sorted(path.name for path in folder.iterdir())}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that drew grids, with an earlier result in it."""
    (tmp_path / "samples").mkdir()
    for step, colour in ((5, "blue"), (10, "red")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"samples/step-{step:06d}.png")
    (tmp_path / "result").mkdir()
    (tmp_path / "result/model_index.json").write_text("{}")
    return tmp_path / "result"


@pytest.mark.parametrize(
    ("beside", "files"),
    [
        ({}, set()),
        ({"record": RECORD}, {"cm_diffusers.json"}),
        ({"provenance": PROVENANCE_OF_IT}, set()),  # of no student, and without a card
        ({"record": RECORD, "provenance": PROVENANCE_OF_IT}, {"cm_diffusers.json", SAMPLES} | TOLD),
        ({"provenance": PROVENANCE_OF_IT, "card": "A card.\n"}, TOLD),
    ],
    ids=["weights", "record", "provenance", "student", "card"],
)
def test_what_lies_beside_the_weights(folder: Path, beside: dict, files: set[str]) -> None:
    write_result(folder, [weights], **beside)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS} | files
    assert not list(folder.parent.glob(".*"))
    if SAMPLES in files:
        assert Image.open(folder / SAMPLES).getpixel((0, 0)) == (255, 0, 0)
        assert f"![Sample grid]({SAMPLES})" in (folder / "README.md").read_text()
    if "card" in beside:
        assert (folder / "README.md").read_text() == "A card.\n"


def test_a_student_of_a_run_without_grids_shows_none(tmp_path: Path) -> None:
    write_result(tmp_path / "result", [weights], RECORD, PROVENANCE_OF_IT)
    assert "Sample grid" not in (tmp_path / "result/README.md").read_text()


@pytest.mark.parametrize("what", ["model_card", "shutil"])
def test_a_card_or_grid_that_fails_does_not_stop_publishing(what: str, folder: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(folders, what, None)
    write_result(folder, [weights], RECORD, PROVENANCE_OF_IT)
    assert (folder / WEIGHTS).is_file()
    assert (folder / "training.json").is_file()
    assert (folder / "README.md").is_file() == (what == "shutil")
    assert not (folder / SAMPLES).exists() or what == "model_card"
    (line,) = caplog.messages
    assert line.endswith("the result is published without it.")


@pytest.mark.parametrize("given", ["relative", "absolute", "hub"])
def test_a_base_model_is_found_from_wherever_scripts_are_started(given: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "models/teacher").mkdir(parents=True)
    (tmp_path / "models/teacher/model_index.json").write_text("{}")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    names = {"relative": "../models/teacher", "absolute": str(tmp_path / "models/teacher"), "hub": "ada/teacher"}
    result = tmp_path / "elsewhere/run/lora"
    write_result(result, [weights], replace(RECORD, base_model=names[given]))
    written = read_record(result)
    assert written.base_model == ("ada/teacher" if given == "hub" else "../../../models/teacher")
    monkeypatch.chdir("/")
    wanted = "ada/teacher" if given == "hub" else str(tmp_path / "models/teacher")
    assert base_model_of(written, result) == wanted


def test_what_fails_leaves_the_earlier_result(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=WEIGHTS):
        write_result(folder, [weights, fails], RECORD, PROVENANCE_OF_IT)
    assert [path.name for path in folder.iterdir()] == ["model_index.json"]
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize(("umask", "files", "folders"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_a_result_is_as_readable_as_the_umask_says(folder: Path, umask: int, files: int, folders: int) -> None:
    """safetensors writes what only the owner may read."""

    def private(aside: Path) -> None:
        (aside / "unet").mkdir()
        weights(aside)
        weights(aside / "unet")

    before = os.umask(umask)
    try:
        write_result(folder, [private], RECORD, PROVENANCE_OF_IT)
    finally:
        os.umask(before)
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in found} == {files}
    assert len(found) == 6
    assert {path.stat().st_mode & 0o777 for path in (folder, folder / "unet")} == {folders}
