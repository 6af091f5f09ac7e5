"""benchmarks/lcsc.py: what it makes of the tables of `training/combine.py`."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import lcsc


def table(accepted: bool, values: dict[str, float]) -> dict:
    """As combine.py writes it: each kind of weights has its value on the search set, one more on the hold-out, and n more at n steps."""
    places = {
        place: [
            {"pipeline": name, "num_inference_steps": steps, "fid": value + more + steps}
            for name, value in values.items()
            for steps in ((1,) if place == "search_set" else lcsc.STEPS)
        ]
        for place, more in (("search_set", 0), ("holdout", 1))
    }
    return places | {
        "accepted": accepted, "share_of_resamples": 1.0, "evaluations": 7, "minutes": 2.0, "hardware": "a CPU",
    }  # fmt: skip


def test_rows_are_kinds_of_weights_with_both_sets():
    found = table(True, {"last (step 60)": 5.0, "best single (step 30)": 4.0, "uniform (SWA)": 3.0, "found": 1.0})
    rows = {row["weights"]: row for row in lcsc.rows_of("CD", 0, lcsc.ONE, found)}
    assert list(rows) == ["last", "best single", "uniform", "found"]
    assert rows["best single"] == {
        "training": "CD", "seed": 0, "search": lcsc.ONE, "weights": "best single", "search_set_1": 5.0, "holdout_1": 6.0,
        "holdout_2": 7.0, "holdout_4": 9.0, "evaluations": 7, "minutes": 2.0, "hardware": "a CPU",
    }  # fmt: skip
    assert rows["found"]["accepted"] is True


def test_the_table_has_means_over_the_seeds_and_how_many_were_accepted():
    rows = lcsc.rows_of("CD", 0, lcsc.ONE, table(True, {"found": 1.0}))
    rows += lcsc.rows_of("CD", 1, lcsc.ONE, table(False, {"found": 2.0}))
    text = lcsc.tables(rows)
    assert "| CD | one step | found | 2 | 2.50 ±0.50 | 3.50 ±0.50 | 4.50 ±0.50 | 6.50 ±0.50 |" in text
    assert "| CD | one step | 330 | 1 of 2 | 1.00 ±0.00 | 7 ±0 | 2 ±0 |" in text
    assert "search set, 2 NFE" not in text  # nothing was searched there


def test_an_early_search_sees_fewer_updates_and_a_finished_one_is_not_made_again(tmp_path, monkeypatch):
    made = []

    def combine(text, *more):
        made.append((text, *more))
        folder = Path(more[more.index("--output_dir") + 1])
        folder.mkdir(exist_ok=True)
        (folder / "table.json").write_text("{}", "utf-8")

    monkeypatch.setattr(lcsc, "command", combine)
    for _ in range(2):
        lcsc.search("LCM", lcsc.EARLY, tmp_path / "LCM-0", tmp_path / "found")
    assert len(made) == 1
    assert "--window 300 450" in made[0][0]
    assert "--guidance_scale 2" in made[0][0]
    assert "--resume" not in made[0]
    (tmp_path / "found" / "table.json").unlink()
    lcsc.search("LCM", lcsc.EARLY, tmp_path / "LCM-0", tmp_path / "found")
    assert made[1][-1] == "--resume"  # of a search that was stopped


def test_an_unknown_training_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lcsc.py", "--only", "iCT"])
    with pytest.raises(ValueError, match="--only iCT: known are LCM, CD"):
        lcsc.main()
