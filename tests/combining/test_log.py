"""A search that is cut off anywhere goes on as if it had not been."""

import json
from pathlib import Path

import numpy as np
import pytest

from cm_diffusers.combining.log import SearchLog
from cm_diffusers.combining.search import SearchConfig, Tried, find_best
from cm_diffusers.combining.vectors import baselines


SETTINGS = {"population": 5, "steps": [10, 20, 30]}


def run(path: Path, stop: int | None = None, kind: str = "evolution") -> tuple[np.ndarray, int]:
    """Best vector of a search with its log, and how often it measured; an interrupt comes in the evaluation `stop`."""
    log, count = SearchLog(path, SETTINGS), 0

    def measure(vector: np.ndarray) -> tuple[float, list]:
        nonlocal count
        if len(log.entries) == stop:
            raise KeyboardInterrupt
        count += 1
        return float(np.square(vector - [0.1, -0.3, 1.2]).sum()), [{"num_inference_steps": 1, "fid": 1 / 3}]

    known = baselines([10, 20, 30], [0.5], [0.1])
    entries = [log.evaluate(one.name, one.vector, measure) for one in known]
    starts = [Tried(one.value, np.array(one.vector)) for one in entries]
    config = SearchConfig(search=kind, evaluations=30, population=5)
    return find_best(lambda vector: log.evaluate("found", vector, measure).value, starts, config).vector, count


def without_seconds(path: Path) -> list[dict]:
    return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["evolution", "cma"])
@pytest.mark.parametrize("cut", [False, True], ids=["between lines", "within a line"])
def test_a_resumed_search_is_the_straight_one(tmp_path: Path, cut: bool, kind: str) -> None:
    if kind == "cma":
        pytest.importorskip("cma", reason="of the extra cma")
    straight, count = run(tmp_path / "straight.jsonl", kind=kind)
    assert count == 36
    with pytest.raises(KeyboardInterrupt):
        run(path := tmp_path / "cut.jsonl", stop=17, kind=kind)
    if cut:
        path.write_bytes(path.read_bytes()[:-5])
    resumed, rest = run(path, kind=kind)
    assert rest == 36 - 17 + cut
    assert np.array_equal(resumed, straight)
    assert without_seconds(path) == without_seconds(tmp_path / "straight.jsonl")
    assert run(path, kind=kind)[1] == 0


def test_logs_of_other_searches_are_refused(tmp_path: Path) -> None:
    run(path := tmp_path / "search.jsonl")
    with pytest.raises(ValueError, match=r"of another search: population was 5, and now is 6; give the flags of then"):
        SearchLog(path, SETTINGS | {"population": 6})
    log = SearchLog(path, SETTINGS)
    with pytest.raises(ValueError, match="tried other vectors from line 2 on"):
        log.evaluate("single (step 10)", np.array([0.5, 0.5, 0.0]), None)
    path.write_text(path.read_text().replace("{", "(", 3))
    with pytest.raises(ValueError, match="is damaged"):
        SearchLog(path, SETTINGS)


def test_what_is_infinite_is_read_back(tmp_path: Path) -> None:
    vector = np.array([1.0, 0.0])
    for _ in range(2):
        log = SearchLog(tmp_path / "search.jsonl", {})
        assert log.evaluate("found", vector, lambda vector: (np.inf, [])).value == np.inf
