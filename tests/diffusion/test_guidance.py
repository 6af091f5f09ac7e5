"""Classifier-free guidance and its embedding."""

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from oracles import Gaussian, OracleNet, guided
from tiny import tiny_scheduler

from cm_diffusers.diffusion.denoisers import as_denoiser
from cm_diffusers.diffusion.guidance import guidance_embedding, guide
from cm_diffusers.diffusion.process import DiscreteVP, Prediction, append_dims, interpret


VP = DiscreteVP.from_scheduler(tiny_scheduler())
COND, UNCOND = Gaussian(1.0, 0.5), Gaussian(-0.5, 0.5)
LABELS = {"label": torch.ones(3)}, {"label": torch.zeros(3)}
T = torch.tensor([19, 499, 999])


def sides(prediction_type, w):
    """A guided prediction, its x_t and the network asked."""
    net, x_t = OracleNet(VP, prediction_type, COND, UNCOND), torch.randn(3, 2, 4, dtype=torch.float64)
    prediction = guide(as_denoiser(net, VP, prediction_type), *LABELS, torch.as_tensor(w))(x_t, T)
    return prediction, x_t, net


def assert_close(one, two):
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, check_dtype=False)  # outputs are read in float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("w", "data"), [(0.0, COND), (-1.0, UNCOND), (7.0, guided(COND, UNCOND, 7.0))])
def test_limits_of_guidance(prediction_type, w, data):
    """w = 0 is the conditional branch alone, -1 the unconditional one."""
    prediction, x_t, _ = sides(prediction_type, [w] * 3)
    assert_close(prediction, data.predict(VP, x_t, T))


def test_every_sample_has_its_own_strength():
    prediction, x_t, _ = sides("epsilon", [0.0, -1.0, 3.0])
    for i, data in enumerate([COND, UNCOND, guided(COND, UNCOND, 3.0)]):
        row = slice(i, i + 1)
        assert_close([p[row] for p in prediction], data.predict(VP, x_t[row], T[row]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_combining_data_is_combining_noise(prediction_type):
    """Both are affine in the output at a given x_t, and (1 + w) - w = 1."""
    prediction, x_t, _ = sides(prediction_type, [2.0, 7.5, 14.0])
    assert_close(interpret(VP, prediction.noise, x_t, T, "epsilon"), prediction)
    assert_close(interpret(VP, prediction.x0, x_t, T, "sample"), prediction)


def test_both_branches_are_one_batch():
    _, _, net = sides("epsilon", [5.0] * 3)
    assert net.calls == [6]


def test_every_condition_is_batched_in_order():
    seen = {}

    def denoise(x_t, t, cond):
        seen.update(cond, t=t)
        return Prediction(x_t, x_t)

    cond = {"states": torch.ones(2, 5, 3), "ids": torch.tensor([[1], [2]])}
    uncond = {"states": torch.zeros(2, 5, 3), "ids": torch.tensor([[3], [4]])}
    x_t = torch.randn(2, 4)
    prediction = guide(denoise, cond, uncond, torch.tensor([1.0, 2.0]))(x_t, torch.tensor([10, 20]))
    assert seen["t"].tolist() == [10, 20, 10, 20]
    assert seen["ids"].tolist() == [[1], [2], [3], [4]]
    assert seen["states"].mean((1, 2)).tolist() == [1, 1, 0, 0]
    assert torch.equal(prediction.x0, x_t)  # equal branches: no guidance, whatever w


@pytest.mark.parametrize("dim", [256, 32, 33, 7])
def test_embedding_equals_the_pipelines(dim):
    """diffusers' pipelines embed guidance_scale - 1, which is w."""
    guidance_scale = torch.tensor([1.0, 3.0, 8.5, 15.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, guidance_scale - 1, embedding_dim=dim)
    ours = guidance_embedding(guidance_scale - 1, dim)
    assert ours.shape == (4, dim)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # angles up to 14000 in float32


def test_embedding_values():
    """sin and cos of 1000 w 10000^(-i / (d / 2 - 1)), i = 0 .. d / 2 - 1."""
    w, i = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64), torch.arange(4, dtype=torch.float64)
    angles = append_dims(1000 * w, torch.zeros(3, 1, dtype=torch.float64)) * 10000 ** (-i / 3)
    torch.testing.assert_close(guidance_embedding(w, 8), torch.cat([angles.sin(), angles.cos()], 1))
    assert guidance_embedding(w, 9)[:, 8].tolist() == [0, 0, 0]
    assert guidance_embedding(w[:1], 8).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
