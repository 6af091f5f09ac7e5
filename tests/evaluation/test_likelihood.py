"""Likelihoods by the probability-flow ODE against densities that are known exactly."""

import math

import pytest
import torch
from oracles import Gaussian, Mixture
from torch.distributions import Categorical, MixtureSameFamily, Normal

from cm_diffusers.diffusion.process import EDM
from cm_diffusers.evaluation.likelihood import LEVELS, bits_per_dimension, dequantized, log_likelihood


DATA = Gaussian(0.3, 0.5)
MIXTURE = Mixture((0.3, 0.7), (-1.0, 0.5), (0.2, 0.4))


def _measured(data, x, tolerance=1e-3):
    def denoise(x, t):
        return data.predict(EDM(), x, t)

    return log_likelihood(denoise, x, 0.002, 80.0, tolerance, torch.Generator().manual_seed(0))


def test_of_a_gaussian_within_a_hundredth_of_a_bit_per_dimension() -> None:
    torch.manual_seed(0)
    x = 0.3 + 0.5 * torch.randn(20, 3, 4, 4, dtype=torch.float64)
    exact = Normal(0.3, 0.5).log_prob(x).flatten(1).sum(1)
    found, evaluations = _measured(DATA, x)
    torch.testing.assert_close(bits_per_dimension(found, 48), bits_per_dimension(exact, 48), rtol=0, atol=0.01)
    assert 20 < evaluations < 400
    finer = bits_per_dimension(_measured(DATA, x, 1e-6)[0] - exact, 48)
    assert finer.abs().max() < 0.002  # of the prior's width and the noise that is left


def test_of_a_mixture_whose_dimensions_are_independent() -> None:
    """Signs pull a diagonal Jacobian back to its own diagonal: the estimate has no noise, only the solver's error."""
    torch.manual_seed(0)
    law = MixtureSameFamily(
        Categorical(torch.tensor([0.3, 0.7])), Normal(torch.tensor([-1.0, 0.5]), torch.tensor([0.2, 0.4]))
    )
    x = law.sample((30, 8)).double()
    found, _ = _measured(MIXTURE, x, 1e-5)
    torch.testing.assert_close(found, law.log_prob(x).double().sum(1), rtol=0, atol=0.01 * 8 * math.log(2))


def test_bits_of_pixels_count_their_levels() -> None:
    """A density that is uniform over [-1, 1] needs 8 bits to tell 256 levels, all but for the ends' half levels."""
    log_p = torch.tensor([-10 * math.log(2.0)])
    assert bits_per_dimension(log_p, 10, LEVELS).item() == pytest.approx(8, abs=0.01)
    assert bits_per_dimension(log_p, 10).item() == pytest.approx(1)


def test_dequantized_pixels_stay_within_their_level() -> None:
    x = torch.arange(256) / 127.5 - 1
    moved = dequantized(x.repeat(50, 1), torch.Generator().manual_seed(0)) - x
    assert moved.abs().max() <= 0.5 / 127.5 + 1e-7
    assert moved.std().item() == pytest.approx(1 / 127.5 / 12**0.5, rel=0.02)
