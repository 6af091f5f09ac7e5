"""Derivatives along a direction: closed forms, orders of differences, equal dropout masks, one sentence for what fails."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_zoo import of_zoo, unet2d
from torch import Tensor, nn

from cm_diffusers.diffusion.process import append_dims
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.tangent import TANGENTS, check_precision, derivative, step_of
from cm_diffusers.errors import UserError
from cm_diffusers.models.examples import example_of


class Waves(nn.Module):
    """F = sin(x) cos(3 t), with dropout where it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.dropout(torch.sin(x) * append_dims(torch.cos(3 * t), x))


def point(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, t, dx, dt."""
    torch.manual_seed(0)
    return tuple(torch.randn(*shape, dtype=dtype) for shape in ((3, 40), (3,), (3, 40), (3,)))


def closed_form(x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Tensor:
    t, dt = t[:, None], dt[:, None]
    return x.cos() * (3 * t).cos() * dx - 3 * x.sin() * (3 * t).sin() * dt


# Of the leading term of the error: h^p; none of an exact one.
ORDERS = {"jvp": None, "central": 2, "one_sided": 1, "semi": 2}


@pytest.mark.parametrize("kind", TANGENTS)
def test_kinds_are_of_their_order(kind: str) -> None:
    network, errors = Waves().eval(), []
    for h in (1e-2, 5e-3):
        output, slope = derivative(kind, network, network, *point(), torch.full((3,), h, dtype=torch.float64))
        x, t, _, _ = point()
        torch.testing.assert_close(output, network(x, t), rtol=0, atol=0)
        errors.append((slope - closed_form(*point())).norm().item())
    if ORDERS[kind] is None:
        assert max(errors) < 1e-13
    else:
        assert errors[0] < 1
        assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[kind], abs=0.05)


@pytest.mark.parametrize("kind", TANGENTS)
def test_passes_draw_the_masks_of_the_pass_that_learns(kind: str) -> None:
    network = Waves().train()
    x, t, dx, dt = point()
    with rewind_rng(x.device):
        output, slope = derivative(kind, network, network, x, t, dx, dt, torch.full_like(t, 1e-4))
    learns = network(x, t)
    torch.testing.assert_close(output, learns, rtol=0, atol=0)
    kept = learns != 0
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(slope, 2 * closed_form(x, t, dx, dt) * kept, rtol=1e-2, atol=1e-2)


def test_a_derivative_has_no_graph() -> None:
    network = of_zoo("dit")
    example = example_of(network)

    def function(x: Tensor, t: Tensor) -> Tensor:
        return network(x, timestep=t, **example.arguments).sample

    found = derivative("jvp", network, function, example.x, example.t, example.x, example.t, example.t)
    assert not any(tensor.requires_grad for tensor in found)


def test_steps_are_in_the_time_that_the_network_is_told() -> None:
    t, dt = torch.tensor([0.5, 1.5], dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)
    told = torch.tan
    h = step_of(told, t, dt, 1e-6)
    torch.testing.assert_close((told(t + h * dt) - told(t)).abs(), torch.full_like(t, 1e-6), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", TANGENTS)
def test_mixed_precision_of_accelerate_changes_nothing(kind: str) -> None:
    AcceleratorState._reset_state(True)
    network = unet2d()
    try:
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(unet2d())
    finally:
        AcceleratorState._reset_state(True)
    prepared.load_state_dict(network.state_dict())
    x, t, dx = torch.randn(2, 3, 8, 8), torch.tensor([250.0, 750.0]), torch.randn(2, 3, 8, 8)
    slopes = []
    for one in (network, prepared):
        with torch.autocast("cpu", torch.bfloat16):
            slopes.append(
                derivative(kind, one, lambda x, t, one=one: one(x, t)[0], x, t, dx, 600 + 0 * t, 0 * t + 1e-4)[1]
            )
    assert slopes[0].dtype == torch.float32
    torch.testing.assert_close(*slopes, rtol=0, atol=0)


class Detour(torch.autograd.Function):
    """Of an own backward, without a derivative forward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Detour.apply(x)


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


STOPS = {"Recurrent": Recurrent(4, 4), "Odd": Odd()}


@pytest.mark.parametrize("kind", ["jvp", "semi"])
@pytest.mark.parametrize("name", STOPS)
def test_where_forward_ad_stops_is_named_and_differences_pass(name: str, kind: str) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"of": STOPS[name]})["of"]).train()
    x, t = torch.randn(5, 4), torch.rand(5)

    def function(x: Tensor, t: Tensor) -> Tensor:
        return network(x)

    with pytest.raises(UserError, match=rf"^Forward-mode AD stops at 1 \({name}\), .* give --tangent central\.$"):
        derivative(kind, network, function, x, t, x, t, t)
    output, slope = derivative("central", network, function, x, t, x, t, 0 * t + 1e-2)
    assert output.shape == slope.shape == (5, 4)


def test_what_fails_without_a_derivative_too_is_no_matter_of_forward_ad() -> None:
    network = nn.Linear(4, 4)
    x, t = torch.randn(2, 5), torch.rand(2)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        derivative("jvp", network, lambda x, t: network(x), x, t, x, t, t)


def test_integer_times_are_refused() -> None:
    with pytest.raises(UserError, match=r"^A derivative needs times .* torch\.int64: give t\.double\(\)\.$"):
        check_precision(nn.Linear(4, 4), torch.randn(2, 4), torch.tensor([1, 2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    x, t = torch.randn(2, 4), torch.rand(2)
    with pytest.raises(UserError, match=rf"^A derivative needs float32, but weight of Linear is {dtype}: .*\.$"):
        check_precision(nn.Linear(4, 4).to(dtype), x, t)
    with pytest.raises(UserError, match=rf"^A derivative needs float32, but the samples of Linear is {dtype}: .*\.$"):
        check_precision(nn.Linear(4, 4), x.to(dtype), t)
