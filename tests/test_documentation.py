"""The documentation does what it says: Python runs, commands parse, tables are included, links lead somewhere."""

import os
import re
import shlex
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import SkipTest

import pytest
from scripts import script
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser
from test_style import SCRIPTS, WINGS

from cm_diffusers.engine.cli import parse_configs


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if not {"_build", "generated"} & set(p.relative_to(DOCS).parts))
README, CONTRIBUTING, ASSETS = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "assets" / "README.md"
OUTSIDE = [README, CONTRIBUTING, ASSETS, *sorted((ROOT / "model_cards").glob("*.md"))]
TABLES = sorted((ROOT / "assets" / "results").rglob("*.md"))
RECIPES = ROOT / "training" / "recipes"
FENCE = r"^( *)(`{3,})%s\n(.*?)^\1\2 *$"
CODE = re.compile(FENCE % ".*?", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"(?:(?:^|/)training/|^cm_diffusers\.training\.)(\w+?)(?:\.py)?$")
SYBIL = Sybil([PythonCodeBlockParser(), SkipParser()], patterns=["*.md"])


def each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(FENCE % language, page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [code for _, _, code in found]


def in_a_copy(folder: Path) -> None:
    """Go to a folder that looks like the repository: files are read from it, and written beside it."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "demo", "data", "build", "dist"):
            (folder / path.name).symlink_to(path)
    os.chdir(folder)


@each([page for page in (README, *PAGES) if blocks(page, "python")])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """One namespace a page; `% skip: next "why"` above a block, or `<!-- skip: next "why" -->`, leaves it out."""
    monkeypatch.chdir(ROOT)  # and back, afterwards
    in_a_copy(tmp_path)
    for example in SYBIL.parse(page).examples():
        try:
            example.evaluate()
        except SkipTest:
            continue


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's bash blocks."""
    lines = [line for code in blocks(page, "bash") for line in code.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in re.split(r"\s(?:&&|\|\|?|;)\s", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def script_in(words: list[str]) -> tuple[str, list[str]] | None:
    """The training script of a command and its flags, whatever launches it."""
    for i, word in enumerate(words):
        if match := SCRIPT.search(word):
            return match[1], words[i + 1 :]
    return None


def with_recipe_paths(flags: list[str]) -> list[str]:
    """A recipe may be given by its name alone."""
    named = [i + 1 for i, flag in enumerate(flags) if flag == "--recipe"]
    found = {i: RECIPES / f"{flags[i].removesuffix('.args')}.args" for i in named if "/" not in flags[i]}
    return [str(found.get(i, flag)) for i, flag in enumerate(flags)]


@each([README, CONTRIBUTING, ASSETS, *PAGES])
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        for word in words:
            if re.fullmatch(r"(training|benchmarks|tests|pipelines)/[\w/.]+", word):
                assert (ROOT / word).exists(), f"{word} in {shlex.join(words)}"
        if (found := script_in(words)) and "--help" not in words:
            name, flags = found
            parse = getattr(script(name), "parse", partial(parse_configs, script(name).CONFIGS, ""))
            parse(with_recipe_paths(flags))


def test_every_table_is_on_one_page():
    included = Counter()
    for page in PAGES:
        for name in re.findall(r"\{include\} +(\S+)", page.read_text("utf-8")):
            included[(page.parent / name).resolve()] += 1
    assert {str(table.relative_to(ROOT)): included[table] for table in TABLES if included[table] != 1} == {}


@each([page for page in SCRIPTS if "CONFIGS" in page.read_text("utf-8")])
def test_every_script_has_its_page_of_flags(page):
    """`docs/conf.py` writes it."""
    assert f"\ngenerated/flags/{page.stem}\n" in (DOCS / "api" / "flags.md").read_text("utf-8")


def test_the_reference_lists_the_wings_in_their_order():
    named = re.findall(r"^   cm_diffusers\.(\w+)$", (DOCS / "api" / "index.md").read_text("utf-8"), re.MULTILINE)
    assert [name for name in named if name in WINGS] == WINGS


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", CODE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each(OUTSIDE)
def test_links_lead_somewhere(page):
    text = CODE.sub("", page.read_text("utf-8"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link
