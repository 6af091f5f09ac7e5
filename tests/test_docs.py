"""Figures in the documentation are those an evaluation wrote."""

import runpy
from pathlib import Path

import pytest


update_docs = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "update_docs.py"))


@pytest.mark.parametrize("page", update_docs["PAGES"], ids=lambda page: page.name)
def test_tables_are_what_evaluations_wrote(page):
    text = page.read_text("utf-8")
    assert update_docs["with_tables"](text) == text


def test_readme_shows_every_table():
    assert len(update_docs["BLOCK"].findall(update_docs["PAGES"][0].read_text("utf-8"))) == 5
