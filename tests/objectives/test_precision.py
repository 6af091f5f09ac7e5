"""Mixed precision: every gradient is there, though the network has just run without one; and what looks, looks in float32."""

import pytest
import torch
from diffusion.test_views import tiny_image_unet
from torch import nn
from toys import forget_accelerate, toy_trainer

from cm_diffusers.diffusion.distances import perceptual
from cm_diffusers.diffusion.feature_networks import in_float32, move
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.engine.accelerator import make_accelerator
from cm_diffusers.evaluation.features import extract_features
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.objectives.ect import ECTConfig, ECTObjective
from cm_diffusers.objectives.ict import ICTConfig, ICTObjective
from cm_diffusers.objectives.slct import SLCTConfig, SLCTObjective
from cm_diffusers.types import Batch, Networks
from objectives.test_objectives import CASES, PROGRESS, Case


VIEW = EDMView(0.5, "adm")
IMAGES = {
    "ict": ICTObjective(ICTConfig(), VIEW),
    "ect": ECTObjective(ECTConfig(stage_steps=0, q=256.0), VIEW),
    "slct": SLCTObjective(SLCTConfig(coupling="independent"), VIEW),
}
LORA = ("lcm-lora-epsilon", "lcf-lora", "scott-heads-lora")
WITHOUT_TARGET = {
    name: Case(
        one, lambda: Networks(tiny_image_unet().train()), lambda size: Batch(torch.randn(size, 3, 8, 8), CLASSES)
    )
    for name, one in IMAGES.items()
} | {name: case for name, case in CASES.items() if name in LORA or name.startswith("direct")}
CLASSES = {"class_labels": torch.tensor([0, 3])}


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


@pytest.mark.parametrize("name", WITHOUT_TARGET)
def test_every_weight_gets_its_gradient(name, tmp_path):
    """Before torch 2.11 autocast kept the weights that the pass without a gradient had cast, and lost theirs."""
    case, cached = WITHOUT_TARGET[name], []
    nets = case.networks()
    nets.student.register_forward_hook(
        lambda *_: cached.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
    )
    if nets.critic is not None:
        nets.critic.heads.requires_grad_(True)
    trainer = toy_trainer(tmp_path, nets, case.objective, mixed_precision="bf16")
    trainer._accumulate(trainer.players[0], [case.batch(2)], PROGRESS)
    assert nets.target is None
    assert set(cached) == {(True, False)}
    trained = {name: p.grad for name, p in trainer.student.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None] == []
    assert len(trained) > 10


def test_the_autocast_of_a_run_keeps_no_weights(tmp_path):
    accelerator = make_accelerator("bf16", "none", str(tmp_path))
    with accelerator.autocast():
        assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_as_the_flag_says(allowed, tmp_path):
    """Of convolutions, too, which torch has on by itself."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = not allowed
        toy_trainer(tmp_path, allow_tf32=allowed)
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


# ---- networks that look


class Eye(nn.Module):
    """The mean square of a convolution's difference: in bfloat16, of rounding."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x, y, factor=1.0):
        return factor * (self.layer(x) - self.layer(y)).square().mean((1, 2, 3))


def test_small_differences_keep_their_digits_under_autocast():
    eye = Eye()
    x = torch.rand(2, 3, 32, 32)
    y = x + 1e-3 * torch.randn_like(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, found = eye(x, y), in_float32(eye, x, y)
        whole = perceptual(lambda x, y: in_float32(eye, x, y))(x, y)
    assert torch.equal(found, eye(x, y))
    assert torch.equal(whole, perceptual(eye)(x, y))
    assert (rounded / found).min() > 2
    assert in_float32(eye, x.half(), y.bfloat16(), factor=2.0).dtype == torch.float32


def test_features_of_an_evaluation_are_those_of_float32():
    network = ImageClassifier(["a", "b"], (8, 16)).eval()
    images = torch.rand(3, 3, 32, 32)
    expected = extract_features(network, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extract_features(network, images), expected)
    assert extract_features(network, images.half()).dtype == torch.float32


def test_a_network_is_moved_only_where_it_is_not(monkeypatch):
    network = nn.Linear(2, 2)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved.append(device))
    moved = []
    move(network, torch.device("cpu"))
    move(nn.Identity(), torch.device("meta"))
    assert moved == []
    move(network, torch.device("meta"))
    assert moved == [torch.device("meta")]
