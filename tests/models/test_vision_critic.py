"""The critic of decoded images, on tiny random networks, and the linear probe that chooses its network."""

import json
import math
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scripts import data_flags, image_folder, run_script
from tasks.test_distill_scott import distil
from tiny import tiny_pipeline, tiny_unet, tiny_vae
from torch import nn
from toys import assert_same, tensors
from transformers import BertConfig, Dinov2Config, Dinov2Model, ResNetBackbone, ResNetConfig

from cm_diffusers.diffusion.adversarial import ADVERSARIAL_LOSSES, accuracy
from cm_diffusers.evaluation import separability
from cm_diffusers.evaluation.candidates import Candidate
from cm_diffusers.evaluation.separability import (
    RankingConfig,
    guidance_of,
    logistic_regression,
    pooled_features,
    probe,
    real_and_generated,
    through_vae,
)
from cm_diffusers.models import decoding
from cm_diffusers.models.critics import CriticConfig, make_critic, unused_flags
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.vision_critic import FeatureNetwork, VisionCritic, levels, load_backbone
from cm_diffusers.record import Record, write_record


BACKBONES = ["dinov2", "resnet"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    Dinov2Model(Dinov2Config(**small)).save_pretrained(home / "dinov2")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetBackbone(ResNetConfig(**sizes)).save_pretrained(home / "resnet")
    image_folder(home / "data", 8)
    tiny_pipeline().save_pretrained(home / "teacher")
    return home


def make(home, backbone="dinov2", opinion=True):
    """A critic of 8 x 8 latents and text of width 32. With an opinion, its last layers are not zero."""
    vae = tiny_vae().requires_grad_(False)
    critic = VisionCritic(vae, load_backbone(str(home / backbone)), channels=16, text_width=32)
    with torch.no_grad():
        for p in critic.parameters() if opinion else ():
            if not p.any():
                p.normal_()
    return critic


def inputs(size=2):
    cond = {"encoder_hidden_states": torch.randn(size, 5, 32)}
    return torch.randn(size, 4, 8, 8), torch.arange(size) * 400, cond


# ---- the critic


@pytest.mark.parametrize(("name", "critic", "generator"), [("hinge", 2.0, 0.0), ("lsgan", 0.5, 0.5)])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_at_first_there_is_no_opinion(home, backbone, name, critic, generator):
    logits, loss = make(home, backbone, opinion=False)(*inputs()), ADVERSARIAL_LOSSES[name]
    assert logits.shape == (2, {"dinov2": 4 * 2 * 2, "resnet": 16 + 16 + 4}[backbone])
    assert loss.critic(logits[:1], logits[1:]).item() == critic
    assert loss.generator(logits).item() == generator
    assert accuracy(logits[:1], logits[1:], 0.0) == 0.5


@pytest.mark.parametrize("backbone", BACKBONES)
def test_only_the_heads_learn_and_are_saved(home, backbone):
    critic = make(home, backbone).train()
    critic(*inputs()).square().mean().backward()
    names = [name for name, _ in critic.named_parameters()]
    assert {name.split(".")[0] for name in names} == {"heads"}
    assert set(critic.state_dict()) == set(names)
    assert all(p.grad is not None and p.grad.any() for p in critic.parameters())
    for module in critic._called:
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
        assert not any(part.training for part in module.modules())


def test_the_gradient_is_that_of_finite_differences(home, monkeypatch):
    """In float64, through VAE, resizing and network, and with every latent a chunk of its own."""
    critic = make(home)
    for module in critic._called:
        module.double()
    weights = [torch.randn(2, 16, 4, 4, dtype=torch.float64) for _ in range(4)]

    def seen(x):
        return sum((m * w).sum() for m, w in zip(critic.features(x), weights, strict=True))

    x = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(seen(x), x)
    monkeypatch.setattr(decoding, "CHUNK", 4)
    (chunks,) = torch.autograd.grad(seen(x), x)
    torch.testing.assert_close(chunks, whole)
    assert whole.abs().min() > 0
    assert torch.autograd.gradcheck(seen, (x,))


def test_chunks_change_nothing(home, monkeypatch):
    critic, (x, t, cond), sizes = make(home), inputs(5), []
    expected = critic(x, t, cond)
    critic._called[0].decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    monkeypatch.setattr(decoding, "CHUNK", 130)
    torch.testing.assert_close(critic(x, t, cond), expected, rtol=1e-4, atol=1e-4)
    assert sizes == [2, 2, 1]
    critic(x.requires_grad_(), t, cond).mean().backward()
    assert sizes[3:] == [2, 2, 1, 1, 2, 2]  # the gradient decodes each once more, the last first


def test_what_the_network_sees(home):
    """The decoded image, by an independent resize (Pillow's) and in NumPy."""

    class Mirror(nn.Module):
        def forward(self, x):
            return [x]

    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.5]
    critic = VisionCritic(tiny_vae(), FeatureNetwork(Mirror(), [3], mean, std, 24), 16, 32)
    x = torch.randn(1, 4, 8, 12)
    (found,) = critic.features(x)
    pixels = (critic._called[0].decode(x / 0.5).sample[0] + 1) / 2
    for colour in range(3):
        picture = Image.fromarray(pixels[colour].detach().numpy(), mode="F").resize((24, 24), Image.Resampling.BICUBIC)
        expected = (np.asarray(picture) - mean[colour]) / std[colour]
        np.testing.assert_allclose(found[0, colour].detach().numpy(), expected, atol=1e-4)
    same = FeatureNetwork(Mirror(), [3], [0.0] * 3, [1.0] * 3, None)(pixels[None])
    assert torch.equal(same[0], pixels[None])


def test_the_logits_follow_the_text_once_trained(home, monkeypatch):
    """Two images and two texts: which pairs belong together can be told by both only."""
    critic, (x, t, cond) = make(home, opinion=False), inputs()
    features, swapped = critic.features(x), {name: value.flip(0) for name, value in cond.items()}
    monkeypatch.setattr(critic, "features", lambda _: features)  # they do not change: time is saved
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = ADVERSARIAL_LOSSES["hinge"].critic(critic(x, t, cond), critic(x, t, swapped))
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    assert accuracy(critic(x, t, cond), critic(x, t, swapped), 0.0) > 0.95
    assert torch.equal(critic(x, t, cond), critic(x, t + 300, cond))


def test_text_of_another_width_is_refused(home):
    x, t, _ = inputs()
    with pytest.raises(
        ValueError, match=r"text embeddings of width 32, as the teacher's network does .*, but these are 24 wide"
    ):
        make(home)(x, t, {"encoder_hidden_states": torch.randn(2, 5, 24)})


def test_vae_and_network_follow_the_latents(home, monkeypatch):
    critic, (x, t, cond) = make(home), inputs()
    critic.double()
    assert {p.dtype for module in critic._called for p in module.parameters()} == {torch.float32}
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # the device meta has none
    cond = {name: value.to("meta") for name, value in cond.items()}
    assert critic.float().to("meta")(x.to("meta"), t, cond).device.type == "meta"
    state = [value for module in critic._called for value in module.state_dict().values()]
    assert {value.device.type for value in state} == {"meta"}


def test_nothing_looks_in_half_precision(home):
    critic, (x, t, cond), seen = make(home), inputs(), []
    vae, network = critic._called
    vae.decoder.conv_in.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    layer = next(module for module in network.modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = critic(x.requires_grad_(), t, cond)
    assert seen == [torch.float32, torch.float32]
    assert logits.dtype == torch.float32
    logits.mean().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


@pytest.mark.parametrize("lora", [False, True])
def test_a_distillation_gets_it_by_its_flags(home, lora):
    nets = make_networks(tiny_unet().requires_grad_(False), StudentConfig(unet_time_cond_proj_dim=16, lora=lora))
    config = CriticConfig("vision", critic_channels=16, critic_backbone=str(home / "resnet"))
    critic = make_critic(nets, config, tiny_vae())
    assert critic(*inputs()).shape == (2, 36)
    assert critic.text_width == 32
    assert unused_flags(config) == "critic_lora_rank"
    assert all("critic_backbone" in unused_flags(CriticConfig(kind)) for kind in ("heads", "lora_decoder", "none"))


# ---- the network


def test_four_levels_evenly_spaced():
    known = {1: [0], 2: [0, 1], 3: [0, 1, 2], 4: [0, 1, 2, 3], 5: [1, 2, 3, 4], 13: [3, 6, 9, 12], 25: [6, 12, 18, 24]}
    assert {n: levels(n) for n in known} == known


@torch.no_grad()
def test_features_are_the_network_s_hidden_states(home):
    x, model = torch.rand(2, 3, 32, 32), Dinov2Model.from_pretrained(home / "dinov2").eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    states = model((x - mean) / std, output_hidden_states=True).hidden_states[1:]
    expected = [model.layernorm(state)[:, 1:].mT.unflatten(2, (4, 4)) for state in states]
    torch.testing.assert_close(load_backbone(str(home / "dinov2"))(x), expected)


@pytest.mark.parametrize(
    ("settings", "mean", "side"),
    [
        ({"crop_size": {"height": 24, "width": 24}, "do_center_crop": True, "size": {"shortest_edge": 30}}, 0.485, 24),
        (
            {"crop_size": {"height": 24, "width": 24}, "do_center_crop": False, "size": {"shortest_edge": 30}},
            0.485,
            30,
        ),
        ({"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 0.5, 16),
        ({"size": 20, "do_normalize": False, "image_mean": [0.5] * 3}, 0.0, 20),
        (None, 0.485, None),
    ],
)
def test_images_are_prepared_as_the_weights_want(home, tmp_path, settings, mean, side):
    folder = shutil.copytree(home / "resnet", tmp_path / "resnet")
    if settings is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    network = load_backbone(str(folder))
    assert network.side == side
    assert network.mean[0].item() == pytest.approx(mean)
    assert network.std[0].item() == pytest.approx({0.485: 0.229, 0.5: 0.5, 0.0: 1.0}[mean])


@pytest.mark.parametrize("kind", ["no folder", "no config", "no safetensors", "a text model", "other weights"])
def test_a_backbone_that_does_not_load_is_one_sentence(home, tmp_path, kind):
    folder = tmp_path / "backbone"
    if kind != "no folder":
        shutil.copytree(home / "resnet", folder)
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no safetensors":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "a text model":
        BertConfig().save_pretrained(folder)
    elif kind == "other weights":
        save_file({n: v for n, v in load_file(weights).items() if "stages.1" not in n}, weights, {"format": "pt"})
    message = {
        "no folder": "Repo id must be",
        "no config": "it has no config.json that tells its model_type",
        "no safetensors": ".*model.safetensors",
        "a text model": "transformers' AutoBackbone does not know its type bert; take one that it knows, such as dinov2",
        "other weights": r"its file lacks \d+ of its weights, such as encoder.stages.1.*; get it anew",
    }[kind]
    with pytest.raises(
        ValueError, match=rf"The backbone {folder} \(a folder, or a Hub id\) cannot be read: {message}"
    ):
        load_backbone(str(folder))


def timm_folder(folder):
    folder.mkdir()
    prepared = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 16, 16]}
    (folder / "config.json").write_text(json.dumps({"architecture": "small", "pretrained_cfg": prepared}))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    return prepared


@pytest.mark.parametrize("fault", [ImportError("No module named 'timm'"), RuntimeError("torchvision::nms is missing")])
def test_timm_is_missed_only_when_it_is_needed(tmp_path, monkeypatch, fault):
    class Broken:
        def find_spec(self, name, *_):
            if name == "timm":
                raise fault

    timm_folder(tmp_path / "net")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ValueError, match=rf"cannot be read: it needs timm with a matching torchvision: {fault}\.$"):
        load_backbone(str(tmp_path / "net"))


def test_how_timm_is_asked(tmp_path, monkeypatch):
    """By a stand-in for timm that notes the questions; its maps have their channels last."""
    prepared, asked = timm_folder(tmp_path / "net"), []

    class Net(nn.Module):
        pretrained_cfg = prepared
        feature_info = SimpleNamespace(info=[{}] * 6, channels=lambda: [3, 3, 3, 3])

        def forward(self, x):
            return [x.movedim(1, -1)] * 4

    def create_model(name, **options):
        asked.append((name, options, torch.empty(0).device.type))
        return Net()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    network = load_backbone(str(tmp_path / "net"))
    name = f"local-dir:{tmp_path / 'net'}"
    loading = {"pretrained": True, "features_only": True, "out_indices": [1, 2, 4, 5]}
    assert asked == [(name, {"features_only": True}, "meta"), (name, loading, "cpu")]
    maps = network(torch.full((2, 3, 20, 30), 0.75))
    assert [m.shape for m in maps] == [(2, 3, 16, 16)] * 4
    torch.testing.assert_close(maps[3], torch.ones(2, 3, 16, 16))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_networks_of_timm(tmp_path, name):
    """Needs timm: the features are those of its own `forward_intermediates`."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    model, folder = timm.create_model(name, num_classes=3).eval(), tmp_path / "net"
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    network, x = load_backbone(str(folder)), torch.rand(1, 3, 224, 224)
    normal = (x - network.mean) / network.std
    every = model.forward_intermediates(normal, intermediates_only=True, output_fmt="NCHW")
    torch.testing.assert_close(network(x), [every[i] for i in levels(len(every))], rtol=1e-4, atol=1e-4)


# ---- distillation


def vision(home, backbone="dinov2", **values):
    return {"critic": "vision", "critic_backbone": home / backbone, "critic_inputs": "clean"} | values


KINDS = {
    "full": {"unet_time_cond_proj_dim": 32, "r1_weight": 1.0},
    "lora": {"lora": True, "lora_rank": 4, "backbone": "resnet"},
}


@pytest.fixture(scope="module", params=KINDS)
def finished(request, home):
    return distil(home, request.param, **vision(home, **KINDS[request.param]))


def test_resume_is_bit_exact(home, finished):
    again = f"{finished.name}-again"
    distil(home, again, **vision(home, **KINDS[finished.name]), resume_from_checkpoint=finished / "checkpoint-2")
    assert_same(tensors(home / again / "checkpoint-4"), tensors(finished / "checkpoint-4"))


def test_both_players_moved(finished):
    for player in ("student", "critic"):
        early, late = (load_file(finished / f"checkpoint-{step}" / f"{player}.safetensors") for step in (2, 4))
        still = [name for name, value in early.items() if torch.equal(value, late[name])]
        assert [name for name in still if not (player == "critic" and name.endswith("bias"))] == []
    assert {name.split(".")[0] for name in early} == {"heads"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"critic_inputs": "renoised"}, "--critic vision judges images without noise: give it --critic_inputs clean."),
        ({"critic_lora_rank": 4}, "--critic_lora_rank has no effect with --critic vision"),
        ({"critic": "heads"}, "--critic_backbone has no effect with --critic heads"),
        ({"backbone": "data"}, "The backbone .*data .* cannot be read: it has no config.json"),
    ],
)
def test_a_wrong_flag_is_one_sentence(home, values, words):
    with pytest.raises(SystemExit, match=f"^error: {words}"):
        distil(home, "wrong", **vision(home, **values))
    assert not (home / "wrong").exists()


# ---- which network


def test_real_against_real_is_chance():
    accuracy, cross_entropy = probe(torch.randn(4000, 20), torch.randn(4000, 20))
    assert accuracy == pytest.approx(0.5, abs=0.03)
    assert cross_entropy == pytest.approx(math.log(2), abs=0.02)
    many, _ = probe(torch.randn(400, 1000), torch.randn(400, 1000))
    assert many == pytest.approx(0.5, abs=0.1), "more features than images"


def test_the_probe_finds_what_can_be_found():
    """Of two Gaussians at distance d, the best line tells Phi(d / 2); scale and offset of a feature do not matter."""
    scale, offset = 10.0 ** torch.arange(-3, 5), torch.arange(8) * 100
    real, fake = torch.randn(2, 6000, 8, dtype=torch.float64)
    fake[:, 3] += 1.5
    accuracy, cross_entropy = probe(real * scale + offset, fake * scale + offset, seed=2)
    assert accuracy == pytest.approx(0.5 * (1 + math.erf(0.75 / math.sqrt(2))), abs=0.02)
    assert 0.4 < cross_entropy < 0.6
    fake[:, 3] += 8
    assert probe(real, fake)[0] > 0.999
    assert probe(real, fake)[1] < 0.01


def test_a_feature_that_is_constant_is_no_trouble():
    real, fake = torch.randn(2, 500, 3)
    real[:, 1] = fake[:, 1] = 7.0
    assert probe(real, fake)[0] == pytest.approx(0.5, abs=0.15)


def test_logistic_regression_is_at_its_minimum():
    """By Newton's method with the Hessian written out."""
    x, y = torch.randn(60, 5, dtype=torch.float64), (torch.arange(60) % 3 == 0).double()
    design, w = torch.cat([x, torch.ones(60, 1)], dim=1), torch.zeros(6, dtype=torch.float64)
    ridge = torch.diag(torch.tensor([1.0] * 5 + [0.0], dtype=torch.float64))
    for _ in range(20):
        p = torch.sigmoid(design @ w)
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + ridge
        w = w - torch.linalg.solve(hessian, design.T @ (p - y) + ridge @ w)
    weight, bias = logistic_regression(x, y)
    torch.testing.assert_close(torch.cat([weight, bias[None]]), w, rtol=1e-5, atol=1e-6)


def test_features_are_means_over_maps(home):
    network, images = load_backbone(str(home / "resnet")), torch.rand(5, 3, 32, 32)
    expected = torch.cat([m.mean(dim=(2, 3)) for m in network(images)], dim=1)
    found = pooled_features(network, images)
    assert found.shape == (5, 8 + 8 + 16)
    torch.testing.assert_close(found, expected)


def test_images_of_one_kind_are_at_chance_and_brighter_ones_are_not(home):
    network, images = load_backbone(str(home / "resnet")), torch.rand(600, 3, 32, 32)
    one, other = (pooled_features(network, part) for part in images.chunk(2))
    assert probe(one, other)[0] == pytest.approx(0.5, abs=0.12)
    assert probe(one, pooled_features(network, images[300:] * 0.8 + 0.2))[0] > 0.99


@torch.no_grad()
def test_real_images_meet_the_probe_decoded():
    vae, images = tiny_vae(), torch.rand(3, 3, 32, 32)
    found = through_vae(vae, images)
    assert torch.equal((found * 255).round() / 255, found)
    expected = (vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample + 1) / 2
    torch.testing.assert_close(found, expected.clamp(0, 1), atol=0.5 / 255 + 1e-5, rtol=0)


def ranking(home, **values):
    data = data_flags(home / "data", home / "cache")
    shared = {"pipeline": home / "teacher", "num_images": 8, "output_dir": home / "ranking", "guidance_scale": 1.5}
    shared |= {"train_data_dir": data["train_data_dir"], "resolution": 32, "eval_batch_size": 3}
    run_script("rank_critics", **shared | {"backbones": [home / name for name in BACKBONES]} | values)


def test_the_table_is_sorted_and_written(home, capsys):
    ranking(home)
    table = (home / "ranking" / "table.md").read_text()
    assert capsys.readouterr().out == table + "\n"
    found = json.loads((home / "ranking" / "table.json").read_text())
    assert found["setting"]["student"]["guidance_scale"] == 1.5
    assert {row["backbone"]: row["features"] for row in found["rows"]} == {
        str(home / "dinov2"): 64,
        str(home / "resnet"): 32,
    }
    best, worst = found["rows"]
    assert (-best["accuracy"], best["cross_entropy"]) <= (-worst["accuracy"], worst["cross_entropy"])
    lines = table.splitlines()
    assert lines[0] == "| backbone | features | accuracy, % | cross-entropy |"
    assert lines[2] == (
        f"| {best['backbone']} | {best['features']} | {100 * best['accuracy']:.1f} | {best['cross_entropy']:.3f} |"
    )
    assert "Chance is 50 % and 0.693, give or take 17.7 %" in lines[-1]
    assert sorted(path.name for path in (home / "ranking").iterdir()) == ["table.json", "table.md"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_images": 1}, "--num_images must be at least 2, but it is 1."),
        ({"num_images": 9}, "--num_images is 9 but the reference set holds 8 rows"),
        ({"backbones": ["nowhere/x"]}, r"The backbone nowhere/x \(a folder, or a Hub id\) cannot be read"),
    ],
)
def test_a_wrong_ranking_is_one_sentence(home, values, words):
    with pytest.raises(SystemExit, match=f"^error: {words}"):
        ranking(home, **values)


@pytest.mark.parametrize(("given", "expected"), [(None, 3.5), (1.5, 1.5)])
def test_guidance_is_the_record_s_or_given(home, tmp_path, monkeypatch, given, expected):
    student, asked, images = shutil.copytree(home / "teacher", tmp_path / "student"), [], torch.rand(4, 3, 32, 32)
    config = RankingConfig(str(student), [], num_images=4, num_inference_steps=2, guidance_scale=given, seed=5)
    reference = SimpleNamespace(pictures=images, prompts=["a coat"] * 4)
    see = lambda images: images.flatten(1)  # noqa: E731
    monkeypatch.setattr(separability, "generate", lambda _, *values: (asked.append(values), (see(images), 1.0))[1])

    def draw():
        scale = guidance_of(config, Candidate.of(str(student)))
        return real_and_generated(config, reference, 32, scale, see, torch.device("cpu"))

    if given is None:
        with pytest.raises(ValueError, match="has no record that recommends a guidance scale: give --guidance_scale"):
            draw()
    write_record(Record("lcm", "teacher", "distilled", 1.0, 7.0, 3.5, 4, {}), student)
    real, fake = draw()
    assert asked == [(["a coat"] * 4, range(5, 9), 2, expected, 32, 32, see)]
    assert torch.equal(fake, see(images))
    assert not torch.equal(real, see(images))
