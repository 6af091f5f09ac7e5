"""Figures in the documentation are those an evaluation wrote."""

import runpy
from pathlib import Path

import pytest


update_docs = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "update_docs.py"))


@pytest.mark.parametrize("page", update_docs["PAGES"], ids=lambda page: page.parent.name)
def test_tables_are_what_evaluations_wrote(page):
    text = page.read_text("utf-8")
    assert update_docs["with_tables"](text) == text


@pytest.mark.parametrize("page", update_docs["cards"](), ids=lambda page: page.parent.name)
def test_cards_are_what_records_and_evaluations_say(page):
    assert page.read_text("utf-8") == update_docs["cards"]()[page]


def test_every_bundled_model_has_its_card():
    readme, *copies = (page.read_text("utf-8") for page in update_docs["PAGES"])
    assert copies[0] == copies[1]
    made = {page.name for page in update_docs["cards"]()} | {"teacher-fashion.md"}
    assert {page.name for page in (update_docs["ROOT"] / "model_cards").glob("*.md")} <= made


def test_readme_shows_every_table():
    assert len(update_docs["BLOCK"].findall(update_docs["PAGES"][0].read_text("utf-8"))) == 8
