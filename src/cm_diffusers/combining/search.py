"""The search for coefficients (LCSC, 2404.02241): an evolution, or CMA-ES, over vectors whose sum is one.

The authors' search was never released; this one is ours, after the paper's description.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from transformers.hf_argparser import HfArg


WIDER = 1.5  # mutations after a child that is better than both its parents; after another narrower by the fourth root


@dataclass
class SearchConfig:
    """How coefficients are searched for."""

    search: Literal["evolution", "cma"] = HfArg(
        default="evolution", help="Evolution of a population, or CMA-ES, which needs the package cma."
    )
    evaluations: int = HfArg(default=200, help="Vectors that the search tries, beside the baselines.")
    population: int = HfArg(default=10, help="Vectors that stay alive; of CMA-ES those of a generation.")
    mutation_std: float = HfArg(
        default=0.1, help="Standard deviation of the first changes of a coefficient; both searches adapt it."
    )
    alpha_max: float = HfArg(default=2.0, help="Greatest size of a coefficient.")
    pull: float = HfArg(
        default=0.0,
        help="Price of the squared distance to the best EMA's coefficients, as a share of that EMA's value: holds the search "
        "near it.",
    )
    search_seed: int = HfArg(default=0, help="Seed of the search.")


class Tried(NamedTuple):
    """A vector `(K,)` and what is to be least of it."""

    value: float
    vector: np.ndarray


def find_best(value: Callable[[np.ndarray], float], starts: Sequence[Tried], config: SearchConfig) -> Tried:
    """The best vector that was tried beside the starts.

    Args:
        value: Is called up to `config.evaluations` times; a function of the vector alone makes this one of the seed alone.
        starts: Vectors in the box whose sums are one, at least two.
    """
    tried = []

    def counted(vector: np.ndarray) -> float:
        tried.append(Tried(value(vector), vector))
        return tried[-1].value

    kind = {"evolution": evolution, "cma": cma_es}[config.search]
    kind(counted, starts, config, np.random.default_rng(config.search_seed))
    return min(tried, key=lambda one: one.value)


def evolution(
    value: Callable[[np.ndarray], float], starts: Sequence[Tried], config: SearchConfig, rng: np.random.Generator
) -> None:
    """Each child has its coefficients from two of the better half, and a Gaussian mutation; then the worst vector dies.

    The best live on for ever. After the crossover, and after the mutation, the child is brought back by `feasible`. The size of
    the mutations follows the rule of one fifth of successes (Rechenberg, 1973).
    """
    alive = sorted(starts, key=lambda one: one.value)[: config.population]
    std = config.mutation_std
    for _ in range(config.evaluations):
        mother, father = (alive[i] for i in rng.choice(max(2, len(alive) // 2), 2, replace=False))
        inherited = rng.random(len(mother.vector)) < 0.5
        crossed = feasible(np.where(inherited, mother.vector, father.vector), config.alpha_max)
        mutated = feasible(crossed + std * rng.standard_normal(len(crossed)), config.alpha_max)
        child = Tried(value(mutated), mutated)
        std *= WIDER if child.value < min(mother.value, father.value) else WIDER**-0.25
        alive = sorted([*alive, child], key=lambda one: one.value)[: config.population]


def cma_es(
    value: Callable[[np.ndarray], float], starts: Sequence[Tried], config: SearchConfig, rng: np.random.Generator
) -> None:
    """CMA-ES from the best start, in the K - 1 directions that keep the sum.

    A vector outside the box is brought back by `feasible`, at a price of the squared distance, as a share of the start's value.
    """
    from cma import CMAEvolutionStrategy

    start = min(starts, key=lambda one: one.value)
    basis, left = directions(len(start.vector)), config.evaluations
    own_noise = {"seed": np.nan, "randn": lambda *shape: rng.standard_normal(shape)}
    options = {"popsize": config.population, "verbose": -9, "verb_log": 0, **own_noise}
    strategy = CMAEvolutionStrategy(np.zeros(len(basis)), config.mutation_std, options)
    while left and not strategy.stop():
        points, values = strategy.ask()[:left], []
        for point in points:
            wanted = start.vector + point @ basis
            vector = feasible(wanted, config.alpha_max)
            values.append(value(vector) + abs(start.value) * np.square(vector - wanted).sum())
        left -= len(points)
        if left:
            strategy.tell(points, values)


def directions(count: int) -> np.ndarray:
    """Orthonormal rows `(K - 1, K)` whose sums are zero (Helmert's)."""
    rows = np.tril(np.ones((count, count)), -1)[1:] - np.diag(np.arange(count))[1:]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def feasible(vector: np.ndarray, alpha_max: float) -> np.ndarray:
    """The nearest vector whose sum is one and whose coefficients are at most alpha_max: shifted by one number, and cut.

    Args:
        alpha_max: At least 1 / K.
    """
    low, high = vector.min() - alpha_max, vector.max() + alpha_max
    for _ in range(100):  # the sum falls as the shift grows
        middle = (low + high) / 2
        if np.clip(vector - middle, -alpha_max, alpha_max).sum() > 1:
            low = middle
        else:
            high = middle
    return np.clip(vector - high, -alpha_max, alpha_max)
