"""Minibatch optimal transport between data and noise."""

import sys

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from cm_diffusers.diffusion.coupling import load_pot, transport, transport_in_classes


def cost(x0, noise):
    return (x0 - noise).double().square().sum().item()


def test_on_a_line_the_order_is_kept():
    x0, noise = torch.tensor([[3.0], [-1.0], [0.5]]), torch.tensor([[0.1], [2.0], [-0.4]])
    pytest.importorskip("ot")
    assert transport(x0, noise).tolist() == noise[[1, 2, 0]].tolist()


@pytest.mark.parametrize("shape", [(2, 1), (7, 3), (64, 4, 8, 8), (128, 2)])
def test_the_plan_is_the_best_permutation(shape):
    """As cheap as the assignment that scipy finds, cheaper than as drawn, and every noise is used once."""
    pytest.importorskip("ot")
    x0, noise = 0.5 * torch.randn(shape) + 1, torch.randn(shape)
    found = transport(x0, noise)
    costs = torch.cdist(x0.flatten(1).double(), noise.flatten(1).double()).square().numpy()
    assert cost(x0, found) == pytest.approx(costs[linear_sum_assignment(costs)].sum(), rel=1e-6)
    assert cost(x0, found) <= cost(x0, noise)
    assert sorted(found.flatten(1).tolist()) == sorted(noise.flatten(1).tolist())


def test_equal_data_still_gets_every_noise():
    pytest.importorskip("ot")
    noise = torch.randn(16, 3)
    assert sorted(transport(torch.zeros(16, 3), noise).tolist()) == sorted(noise.tolist())


def test_within_classes_every_class_keeps_its_noise():
    """Data of two classes apart: across them the plan gives each class the noise on its side, within them it cannot."""
    pytest.importorskip("ot")
    labels = torch.arange(40) % 3
    x0 = labels[:, None] + 0.1 * torch.randn(40, 2)
    noise = torch.randn(40, 2)
    found = transport_in_classes(x0, noise, labels)
    for label in range(3):
        rows = labels == label
        assert torch.equal(found[rows], transport(x0[rows], noise[rows]))
    across = transport(x0, noise)
    assert (across[labels == 2].mean() - across[labels == 0].mean()).item() > 1
    assert cost(x0, across) < cost(x0, found) < cost(x0, noise)


def test_a_class_of_one_keeps_its_noise():
    pytest.importorskip("ot")
    x0, noise = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[2.0], [-2.0], [0.0]])
    assert transport_in_classes(x0, noise, torch.tensor([4, 4, 7])).tolist() == [[-2.0], [2.0], [0.0]]


def test_near_pairs_stay_as_they_are():
    pytest.importorskip("ot")
    noise = torch.randn(32, 16)
    assert torch.equal(transport(noise + 0.01 * torch.randn(32, 16), noise), noise)


def test_one_sample_has_no_choice():
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        transport(torch.zeros(1, 4), torch.ones(1, 4))
    assert str(error.value) == (
        "Optimal transport matches samples within a batch, but this one has 1; give --train_batch_size 2 or more, or "
        "--coupling independent."
    )


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        load_pot()
    assert str(error.value) == ('--coupling ot needs POT, which is not installed: pip install "cm_diffusers[train]".')
