"""Figures in the documentation are those an evaluation wrote."""

import json
import runpy
import shutil
import statistics
import sys
from pathlib import Path

import pytest

from cm_diffusers.measured import FOLDER, GRID, clips_of, distance_name, read_measured
from cm_diffusers.publishing.sharing import ShareConfig, prepare
from cm_diffusers.publishing.student_kinds import LORA_WEIGHTS


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import redraw


update_docs = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "update_docs.py"))


TABLES = {
    page: text for page, text, _ in (*redraw.evaluations(), *redraw.fronts(), *redraw.summary(), *redraw.studies())
}


@pytest.mark.parametrize("page", TABLES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_tables_are_what_the_numbers_beside_them_say(page):
    assert page.read_text("utf-8") == TABLES[page]


@pytest.mark.parametrize("extractor", ["assets/fashion_classifier", "runs/x/fashion_classifier/", "inception"])
def test_only_inception_features_give_an_fid(extractor):
    assert distance_name(extractor) == ("FID" if extractor == "inception" else "FD-fashion")


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
    assert copies[: len(copies) // 2] == copies[len(copies) // 2 :]
    made = {page.name for page in update_docs["cards"]()} | {f"{card}.md" for card in update_docs["TEACHERS"].values()}
    assert {page.name for page in (update_docs["ROOT"] / "model_cards").glob("*.md")} <= made


README = (update_docs["ROOT"] / "README.md").read_text("utf-8")
MEASURED = {  # method of the table in README -> results, name there, metric
    "LCM": ("students", "LCM", "fid"),
    "LCM-LoRA": ("students", "LCM-LoRA", "fid"),
    "SCott": ("students", "SCott", "fid"),
    "LCF": ("finetuned", "LCF", "fid"),
    **{name: ("cm", name, "fid") for name in ("ECT", "CD", "iCT", "sLCT", "CT", "EDM")},
    "sCM": ("scm", "sCD", "fid"),
    "PCM": ("trajectories", "PCM-2", "fid"),
    "TCD": ("trajectories", "TCD, gamma 0", "fid"),
    "BOOT": ("boot", "BOOT", "fid"),
    "CTM": ("ctm", "CTM", "fid"),
    "MeanFlow": ("ctm", "mean flow", "fid"),
    "AnimateLCM": ("video", "AnimateLCM", "fd_frames"),
    "RLCM": ("tuned", "RLCM", "fid"),
}


def figures(results: str, name: str, metric: str) -> str:
    """At 1, 2 and 4 steps, at the highest guidance measured; the mean over the seeds of a study."""
    folder = update_docs["ROOT"] / "assets" / "results" / results
    path = folder / "table.json" if (folder / "table.json").is_file() else folder / "rows.json"
    rows = [row for row in json.loads(path.read_text("utf-8"))["rows"] if row["pipeline"] == name]
    highest = max(row["guidance_scale"] or 0 for row in rows)
    found = []
    for steps in (1, 2, 4):
        values = [
            row[metric]
            for row in rows
            if row["num_inference_steps"] == steps and (row["guidance_scale"] or 0) == highest
        ]
        found.append(f"{statistics.mean(values):.2f}" if values else "–")
    return " / ".join(found)


@pytest.mark.parametrize("method", MEASURED)
def test_readme_gives_the_measured_figures(method):
    (row,) = (line for line in README.splitlines() if line.startswith(f"| {method} | ["))
    assert figures(*MEASURED[method]) in row


def test_readme_is_short_and_shows_one_table_of_results():
    assert len(README.splitlines()) <= 200
    assert [block[1] for block in update_docs["BLOCK"].findall(README)] == ["assets/results/students/summary.md"]


def test_readme_names_every_method():
    training = update_docs["ROOT"] / "training"
    scripts = {p.name for kind in ("distill", "tune", "finetune") for p in training.glob(f"{kind}_*.py")}
    scripts |= {"train_ict.py", "train_slct.py", "train_ct.py", "train_edm.py"}
    table = [line for line in README.splitlines() if line.startswith("|")]
    assert {name for name in scripts if not any(f"`{name}" in line for line in table)} == set()
