"""Figures in the documentation are those an evaluation wrote."""

import runpy
import shutil
from pathlib import Path

import pytest

from cm_diffusers.measured import FOLDER, GRID, clips_of, read_measured
from cm_diffusers.publishing.model_card import LORA_WEIGHTS
from cm_diffusers.publishing.sharing import ShareConfig, prepare


update_docs = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "update_docs.py"))


@pytest.mark.parametrize("page", update_docs["PAGES"], ids=lambda page: page.parent.name)
def test_tables_are_what_evaluations_wrote(page):
    text = page.read_text("utf-8")
    assert update_docs["with_tables"](text) == text


@pytest.mark.parametrize("page", update_docs["cards"](), ids=lambda page: page.parent.name)
def test_cards_are_what_records_and_evaluations_say(page):
    assert page.read_text("utf-8") == update_docs["cards"]()[page]


@pytest.mark.parametrize("folder", update_docs["STUDENTS"])
def test_evaluations_beside_the_weights_are_those_of_the_results(folder):
    _, where, name = update_docs["STUDENTS"][folder]
    results = update_docs["ROOT"] / "assets" / "results" / where
    beside = update_docs["ROOT"] / "assets" / folder / FOLDER
    measured = read_measured(beside)
    assert measured == read_measured(results, name)
    shown = clips_of(name) if measured.of_clips else GRID
    assert (beside / measured.picture).read_bytes() == (results / shown).read_bytes()


@pytest.mark.parametrize("folder", update_docs["STUDENTS"])
def test_sharing_a_bundled_student_again_keeps_its_card(folder, tmp_path):
    bundled = update_docs["ROOT"] / "assets" / folder
    shutil.copytree(bundled, tmp_path / folder)
    if folder in update_docs["REMADE"]:
        put_weights(tmp_path / folder)
    prepare(ShareConfig(str(tmp_path / folder)))
    card = update_docs["with_note"]((tmp_path / folder / "README.md").read_text("utf-8"), folder)
    assert card == (bundled / "README.md").read_text("utf-8")


def put_weights(folder):
    """Files in the places of the weights that are not bundled."""
    for config in folder.rglob("config.json"):
        config.with_name("diffusion_pytorch_model.safetensors").touch()
    if not (folder / "model_index.json").is_file():
        (folder / LORA_WEIGHTS).touch()


def test_a_pipeline_without_weights_is_not_shared():
    with pytest.raises(
        ValueError, match="fashion_scott' has no weights for text_encoder, unet, vae; make or download"
    ):
        prepare(ShareConfig(str(update_docs["ROOT"] / "assets" / "fashion_scott")))


def test_every_bundled_model_has_its_card():
    readme, *copies = (page.read_text("utf-8") for page in update_docs["PAGES"])
    assert copies[0] == copies[1]
    made = {page.name for page in update_docs["cards"]()} | {"teacher-fashion.md"}
    assert {page.name for page in (update_docs["ROOT"] / "model_cards").glob("*.md")} <= made


def test_readme_shows_every_table():
    assert len(update_docs["BLOCK"].findall(update_docs["PAGES"][0].read_text("utf-8"))) == 18
