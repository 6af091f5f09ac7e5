"""Attention in blocks equals stock attention, and so do its derivatives; a network is as before after each context."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.models.attention_dispatch import attention_backend
from tiny import tiny_unet
from tiny_zoo import of_zoo, unet2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm_diffusers.diffusion.passable import attention, full_precision, passable
from cm_diffusers.diffusion.tangent import jvp
from cm_diffusers.errors import UserError
from cm_diffusers.models.examples import example_of


N, M = 13, 11
MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "additive": lambda: torch.randn(2, 4, N, M, dtype=torch.float64),
    "boolean": lambda: torch.rand(2, 1, N, M) > 0.3,
    "of queries alone": lambda: torch.randn(N, M, dtype=torch.float64),
    "of keys alone": lambda: torch.rand(2, 1, 1, M) > 0.3,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def qkv(heads: int = 4) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((4, N), (heads, M), (heads, M)))


def same_derivatives(scores: int, tensors: tuple[Tensor, ...], **options: object) -> None:
    """Of blocks and of the mathematical kernel on everything at once."""
    directions = tuple(torch.randn_like(tensor) for tensor in tensors)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch.func.jvp(lambda *x: F.scaled_dot_product_attention(*x, **options), tensors, directions)
    found = torch.func.jvp(lambda *x: attention(*x, scores=scores, **options), tensors, directions)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], F.scaled_dot_product_attention(*tensors, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 5, 13, 100])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_in_blocks_is_exact(mask: str, rows: int) -> None:
    same_derivatives(rows * 8 * M, qkv(), attn_mask=MASKS[mask](), scale=0.7)


@pytest.mark.parametrize("rows", [1, 4, 13])
def test_attention_in_blocks_is_causal(rows: int) -> None:
    same_derivatives(rows * 8 * M, qkv(), is_causal=True)


def test_attention_in_blocks_shares_keys_among_heads() -> None:
    same_derivatives(3 * 8 * M, qkv(heads=2), enable_gqa=True)


def test_blocks_have_as_many_scores_as_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, seen = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *rest, **o: seen.append(q) or stock(q, *rest, **o)
    )
    attention(*qkv(), scores=3 * 8 * M)
    assert [part.shape[-2] for part in seen] == [3, 3, 3, 3, 1]


def test_dropped_out_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"drops out 0\.1 of its weights.* --tangent central\.$"):
        attention(*qkv(), dropout_p=0.1)


def derivative_of(network: nn.Module) -> Tensor:
    example = example_of(network)

    def function(x: Tensor, t: Tensor) -> Tensor:
        return network(x, timestep=t, **example.arguments, return_dict=False)[0]

    return torch.func.jvp(function, (example.x, example.t), (example.x, example.t))[1]


def test_the_context_is_needed_for_attention() -> None:
    network = of_zoo("sd3")
    with pytest.raises(NotImplementedError, match="scaled_dot_product"):
        derivative_of(network)
    with passable(network):
        assert derivative_of(network).isfinite().all()


def test_the_context_wins_over_the_kernel_of_diffusers() -> None:
    network = of_zoo("flux")
    with passable(network), attention_backend("_native_efficient"):
        assert derivative_of(network).isfinite().all()


@pytest.mark.parametrize("name", ["unet2d", "unet"])
def test_the_context_is_needed_for_group_norm(name: str) -> None:
    network = of_zoo(name).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size"), sdpa_kernel(SDPBackend.MATH):
        derivative_of(network)
    with passable(network):
        torch.manual_seed(1)
        found = derivative_of(network)
        torch.manual_seed(1)
        wanted = derivative_of(network.to(memory_format=torch.contiguous_format))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_masks_of_dropout_are_those_of_other_passes_in_any_layout() -> None:
    network = unet2d(dropout=0.5).to(memory_format=torch.channels_last).train()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([250.0, 750.0])
    torch.manual_seed(1)
    wanted = network(x, t).sample
    torch.manual_seed(1)
    with torch.no_grad(), passable(network):
        found, _ = jvp(lambda x, t: network(x, t).sample, x, t, x, t, t)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_autocast_of_accelerate_is_off_inside_and_on_again_after() -> None:
    AcceleratorState._reset_state(True)
    try:
        network = Accelerator(mixed_precision="bf16", cpu=True).prepare(tiny_unet())
    finally:
        AcceleratorState._reset_state(True)
    x, cond, seen = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 32), []
    network.conv_in.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    forward = network.forward
    for context in (full_precision, passable):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            with context(network):
                network(x, torch.ones(1), cond)
            network(x, torch.ones(1), cond)
    assert seen == [torch.float32, torch.bfloat16] * 2
    assert network.forward is forward


def test_checkpointing_is_off_inside_and_on_again_after() -> None:
    network = tiny_unet().train()
    network.enable_gradient_checkpointing()
    blocks = [module for module in network.modules() if hasattr(module, "gradient_checkpointing")]
    before = [block.gradient_checkpointing for block in blocks]
    assert any(before)
    with contextlib.suppress(KeyError), passable(network):  # also if something fails
        assert not any(block.gradient_checkpointing for block in blocks)
        raise KeyError
    assert [block.gradient_checkpointing for block in blocks] == before


def test_compiled_networks_run_uncompiled_inside() -> None:
    def refuse(graph: object, inputs: object) -> None:
        raise AssertionError("it was compiled")

    network = nn.Linear(4, 4)
    network.compile(backend=refuse)
    x = torch.randn(2, 4)
    with torch.no_grad(), passable(network):
        _, found = torch.func.jvp(network, (x,), (x,))
    torch.testing.assert_close(found, x @ network.weight.T)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_without_a_derivative_cost_no_pass(bias: bool) -> None:
    network, x = nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=bias).double(), torch.randn(2, 2, 8, 8).double()
    still, dx = torch.zeros(2), torch.randn_like(x)
    with passable(network), torch.profiler.profile() as seen:
        output, slope = jvp(lambda x, t: network(x), x, still, dx, still, still)
    assert next(event.count for event in seen.key_averages() if event.key == "aten::convolution") == 2
    torch.testing.assert_close(output, network(x))
    torch.testing.assert_close(slope, network(dx) - network(0 * dx))


def test_weights_with_a_derivative_keep_it() -> None:
    x, weight = torch.randn(2, 4).double(), torch.randn(3, 4).double()
    with passable(nn.Identity()):
        _, slope = jvp(lambda x, s: F.linear(x, s * weight), x, torch.ones(1).double(), x, torch.ones(1).double(), x)
    torch.testing.assert_close(slope, 2 * x @ weight.T)
