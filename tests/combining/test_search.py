"""The search on a bowl whose least point is known: it gets there, and no vector on the way leaves the plane or the box."""

from collections.abc import Callable

import numpy as np
import pytest

from cm_diffusers.combining.search import SearchConfig, Tried, directions, feasible, find_best
from cm_diffusers.combining.vectors import baselines


STEPS = [100, 200, 300, 400, 500, 600]
Value = Callable[[np.ndarray], float]


def bowl(seed: int = 0) -> tuple[Value, float]:
    """Squared distance to the optimum of a combination of noisy iterates that approach it, and the least there is."""
    rng = np.random.default_rng(seed)
    optimum = rng.normal(size=40)
    start = optimum + 3 * rng.normal(size=40)
    iterates = np.stack([optimum + (start - optimum) * 0.6**k + 0.4 * rng.normal(size=40) for k in range(1, 7)])
    sides = iterates[1:] - iterates[0]
    best = np.linalg.lstsq(sides.T, optimum - iterates[0], rcond=None)[0]
    value = lambda alphas: float(np.square(alphas @ iterates - optimum).sum())  # noqa: E731
    return value, value(np.array([1 - best.sum(), *best]))


def starts(value: Value) -> list[Tried]:
    known = baselines(STEPS, [0.3, 0.5, 0.7, 0.8, 0.9, 0.95], [0.05, 0.1, 0.2])
    return [Tried(value(one.vector), one.vector) for one in known]


def searched(value: Value, **settings: object) -> tuple[Tried, list[np.ndarray]]:
    tried = []

    def noted(vector: np.ndarray) -> float:
        tried.append(vector)
        return value(vector)

    return find_best(noted, starts(value), SearchConfig(**{"evaluations": 400, "population": 10, **settings})), tried


@pytest.mark.parametrize("kind", ["evolution", "cma"])
def test_it_finds_the_optimum_and_beats_the_best_average(kind: str) -> None:
    if kind == "cma":
        pytest.importorskip("cma", reason="of the extra cma")
    value, least = bowl()
    best_average = min(one.value for one in starts(value))
    found, tried = searched(value, search=kind)
    assert found.value == value(found.vector) == min(map(value, tried))
    assert found.value - least < 1e-3 * (best_average - least)
    assert len(tried) == 400
    assert max(abs(vector.sum() - 1) for vector in tried) < 1e-14


@pytest.mark.parametrize("kind", ["evolution", "cma"])
def test_it_is_a_function_of_its_seed(kind: str) -> None:
    if kind == "cma":
        pytest.importorskip("cma", reason="of the extra cma")
    value, _ = bowl()
    runs = []
    for seed in (0, 0, 1):
        np.random.seed(len(runs))  # nobody draws from it
        np.random.random()
        state = np.random.get_state()[1].copy()
        runs.append(np.stack(searched(value, search=kind, evaluations=45, search_seed=seed)[1]))
        assert np.array_equal(np.random.get_state()[1], state)
    assert len(runs[0]) == 45  # of CMA-ES a generation that is cut
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize("kind", ["evolution", "cma"])
def test_the_box_is_kept_and_its_edge_is_reached(kind: str) -> None:
    """The optimum of a linear function lies in a corner: the last coefficient at the bound, the first at the other."""
    if kind == "cma":
        pytest.importorskip("cma", reason="of the extra cma")
    slope = np.array([3.0, 1, 0, 0, -1, -3])
    found, tried = searched(lambda alphas: float(slope @ alphas), search=kind, alpha_max=1.5, mutation_std=0.3)
    assert max(np.abs(vector).max() for vector in tried) <= 1.5
    assert max(abs(vector.sum() - 1) for vector in tried) < 1e-14
    assert found.vector[[0, 5]] == pytest.approx([-1.5, 1.5], abs=0.02)


def test_the_best_live_on_and_the_worst_die() -> None:
    """With a population of 2 of which each child is worse, all children have the two parents of the start."""
    value, _ = bowl()
    first, second = sorted(starts(value), key=lambda one: one.value)[:2]
    settings = SearchConfig(evaluations=50, population=2, mutation_std=1e-9)
    tried = []
    find_best(lambda vector: tried.append(vector) or np.inf, starts(value), settings)
    whole = [feasible(np.where(mask, first.vector, second.vector), 2.0) for mask in np.ndindex(*[2] * 6)]
    assert max(min(np.abs(vector - one).max() for one in whole) for vector in tried) < 1e-7
    assert len({tuple(vector.round(6)) for vector in tried}) > 5


def test_the_nearest_vector_of_the_plane_and_the_box() -> None:
    """Of a projection, what is not cut is shifted by one number, and what is cut would be shifted beyond."""
    rng = np.random.default_rng(0)
    for bound in (1.0, 2.0):
        for _ in range(20):
            vector = rng.normal(size=4) * 3
            found = feasible(vector, bound)
            assert found.sum() == pytest.approx(1, abs=1e-14)
            assert np.abs(found).max() <= bound
            shift, inside = vector - found, np.abs(found) < bound
            assert np.ptp(shift[inside]) < 1e-12
            assert (shift[found == bound] >= shift[inside][0] - 1e-12).all()
            assert (shift[found == -bound] <= shift[inside][0] + 1e-12).all()
    assert feasible(np.array([0.5, 0.5, 0.3]), 1.0) == pytest.approx(np.array([0.4, 0.4, 0.2]))


def test_directions_are_orthonormal_and_keep_the_sum() -> None:
    rows = directions(7)
    assert rows @ rows.T == pytest.approx(np.eye(6), abs=1e-15)
    assert rows.sum(1) == pytest.approx(np.zeros(6), abs=1e-15)
