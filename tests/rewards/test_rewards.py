"""Rewards: the protocol, and that each is what its authors defined."""

import io
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import FASHION_LABELS, tiny_tokenizer, vocabulary
from torch import nn
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
)

from cm_diffusers.evaluation.metrics import clip_scores, load_clip
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.rewards import (
    CheckedReward,
    MultiViewConsistency,
    WeightedSum,
    clip,
    load_reward,
    load_rewards,
    multi_view,
    require_differentiable,
)
from cm_diffusers.rewards.image_reward import MEAN, STD, ImageReward
from cm_diffusers.rewards.jpeg import jpeg_size
from cm_diffusers.rewards.multi_view import object_box, split_views
from cm_diffusers.rewards.networks import NetworkReward, folded_head
from cm_diffusers.rewards.open_clip import from_open_clip
from cm_diffusers.rewards.preparation import Preparation


try:  # the processors without torchvision, as they are called in transformers of today and in 5.0
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
except ImportError:
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil
    from transformers import ViTImageProcessor as ViTImageProcessorPil


ROOT = Path(__file__).parents[2]
CLASSIFIER = "classifier:" + str(ROOT / "assets" / "fashion_classifier")
PROMPTS = ["a photo of a bag", "a coat"]
SIDE = 32


def pictures(count: int = 2, height: int = 40, width: int = 56, seed: int = 0) -> torch.Tensor:
    """Smooth colours with some noise, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 7, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth + 0.1 * torch.randn(count, 3, height, width, generator=generator)).clamp(0, 1)


# The protocol


@pytest.mark.parametrize(
    "function",
    [
        lambda images, prompts, metadata: images.mean((1, 2, 3)),
        lambda images, prompts, metadata: (images.mean((1, 2, 3)), {"info": 1}),
        lambda images, prompts, metadata: images.numpy().astype("float64").mean((1, 2, 3)),
        lambda images, prompts, metadata: [image.mean().item() for image in images],
        lambda images, prompts, metadata: [image.mean() for image in images],
    ],
)
def test_any_function_becomes_a_reward_without_a_gradient(function) -> None:
    images = pictures().requires_grad_()
    reward = CheckedReward(function, "mean")
    found = reward(images, PROMPTS)
    assert (found.dtype, found.shape, found.requires_grad, reward.differentiable) == (
        torch.float32,
        (2,),
        False,
        False,
    )
    torch.testing.assert_close(found, images.detach().mean((1, 2, 3)))


def test_prompts_and_metadata_reach_the_function() -> None:
    seen = []
    reward = CheckedReward(lambda images, prompts, metadata: seen.append((prompts, metadata)) or [0, 1], "seen")
    reward(pictures(), tuple(PROMPTS), [{"a": 1}, {"a": 2}])
    reward(pictures(), PROMPTS)
    assert seen == [(PROMPTS, [{"a": 1}, {"a": 2}]), (PROMPTS, [{}, {}])]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "The reward odd must return one finite number for each of 2 images.*nan"),
        ([float("inf"), 0.0], "The reward odd .* returned .inf"),
        (torch.zeros(2, 1), r"The reward odd .* the shape \(2, 1\)"),
        (torch.zeros(3), r"The reward odd .* the shape \(3,\)"),
        (1.0, r"The reward odd .* the shape \(\)"),
        (None, "The reward odd .* a NoneType that is no list of numbers"),
        (["good", "bad"], "The reward odd .* a list that is no list of numbers"),
    ],
)
def test_a_result_that_is_no_reward_is_refused(returned, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckedReward(lambda *_: returned, "odd")(pictures(), PROMPTS)


def test_unequal_arguments_are_refused() -> None:
    reward = load_reward("jpeg_compressibility")
    with pytest.raises(ValueError, match="2 images, 1 prompts and 1 metadata; give equally many"):
        reward(pictures(), PROMPTS[:1])


class Mean:
    differentiable = True

    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))


class Liar(Mean):
    def __call__(self, images, prompts, metadata):
        return super().__call__(images.detach(), prompts, metadata)


def test_a_gradient_that_was_promised_must_be_there() -> None:
    images = pictures().requires_grad_()
    CheckedReward(Mean(), "mean")(images, PROMPTS).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / images[0].numel()))
    with pytest.raises(ValueError, match="liar says that it is differentiable, but"):
        CheckedReward(Liar(), "liar")(images, PROMPTS)
    assert CheckedReward(Liar(), "liar")(images.detach(), PROMPTS).shape == (2,)


def test_a_weighted_sum() -> None:
    reward = load_rewards(["jpeg_compressibility", CLASSIFIER], [0.1, 2.0])
    images = pictures(height=SIDE, width=SIDE)
    parts = reward.parts(images, PROMPTS)
    assert list(parts) == ["jpeg_compressibility", CLASSIFIER]
    torch.testing.assert_close(parts["jpeg_compressibility"], -jpeg_size(images))
    torch.testing.assert_close(reward(images, PROMPTS), 0.1 * -jpeg_size(images) + 2 * parts[CLASSIFIER])
    assert reward.name == f"0.1 jpeg_compressibility + 2 {CLASSIFIER}"
    assert not reward.differentiable
    assert load_rewards([CLASSIFIER]).differentiable
    for names, weights in (([], []), (["jpeg_compressibility"], [1.0, 2.0])):
        with pytest.raises(ValueError, match="give a weight for each reward"):
            load_rewards(names, weights)


def test_a_missing_gradient_names_its_reward() -> None:
    require_differentiable(load_reward(CLASSIFIER), "--mode single_step")
    for reward in (load_reward("jpeg_compressibility"), load_rewards([CLASSIFIER, "jpeg_compressibility"])):
        with pytest.raises(
            ValueError, match="--mode single_step needs the gradient of the reward, and jpeg_compressi"
        ):
            require_differentiable(reward, "--mode single_step")


def test_functions_and_classes_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("judges")
    module.red, module.Mean = lambda images, *_: images[:, 0].mean((1, 2)), Mean
    monkeypatch.setitem(sys.modules, "judges", module)
    images = pictures()
    torch.testing.assert_close(load_reward("judges:red")(images, PROMPTS), images[:, 0].mean((1, 2)))
    assert load_reward("judges:Mean").differentiable
    module.same = lambda views, cameras: views
    assert load_reward("multi_view:judges:same")(images, PROMPTS).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beauty", "There is no reward 'beauty'; give one of jpeg_compressibility, .*, or MODULE:FUNCTION"),
        ("jpeg_compressibility:95", "There is no reward 'jpeg_compressibility:95'"),
        ("classifier", "classifier needs a folder or a Hub id: classifier:SOURCE"),
        ("no_such_module:f", "'no_such_module:f' cannot be imported: No module named"),
        ("json:f", "'json:f' cannot be imported: module 'json' has no attribute 'f'"),
        ("multi_view", "'multi_view' cannot be imported"),
    ],
)
def test_unknown_rewards_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(name)


# JPEG


def test_jpeg_sizes_are_those_of_pillow() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64, generator=generator)])
    sizes = []
    for image in images:
        file = io.BytesIO()
        pixels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype("uint8")
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    found = load_reward("jpeg_incompressibility")(images, ["", ""])
    assert found.tolist() == pytest.approx(sizes, abs=1e-6)
    assert found[0] < 1 < found[1]
    assert torch.equal(load_reward("jpeg_compressibility")(images.flip(0), ["", ""]), -found.flip(0))


def test_bytes_are_rounded_not_cut() -> None:
    """An image just under a byte's value compresses as that byte; cut, it would be of two values."""
    checks = torch.tensor([0.0, -0.4]).repeat(32).expand(3, 64, 64)
    images = torch.stack([torch.full((3, 64, 64), 100.0), 100.0 + checks]) / 255
    sizes = jpeg_size(images)
    assert sizes[0] == sizes[1]
    assert torch.equal(jpeg_size(torch.tensor([-0.5, 1.5]).view(2, 1, 1, 1).expand(2, 3, 8, 8)), sizes_of_ends())


def sizes_of_ends() -> torch.Tensor:
    return jpeg_size(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8))


# Networks of images and text


def clip_config() -> CLIPConfig:
    size = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**size, **ids, "vocab_size": len(vocabulary()), "max_position_embeddings": 16}
    return CLIPConfig(text_config=text, vision_config={**size, "image_size": SIDE, "patch_size": 8}, projection_dim=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP model whose towers see something."""
    model = CLIPModel(clip_config())
    torch.manual_seed(0)  # here: how many numbers a new model draws is the version's
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    nn.init.constant_(model.logit_scale, 3.0)
    place = tmp_path_factory.mktemp("clip")
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        place
    )
    return place


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


@pytest.mark.parametrize("shape", [(40, 56), (57, 39), (96, 96), (32, 32), (20, 24)])
@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": 28, "width": 25}, do_normalize=False),
        ViTImageProcessorPil(size={"height": 24, "width": SIDE}),
        CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 28, "width": 44}),
        CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 41, "width": 16}),
    ],
    ids=["clip", "crop", "squeeze", "wider", "higher"],
)
def test_tensors_are_prepared_as_pil_images_are(processor, shape: tuple[int, int]) -> None:
    images = ((0.2 + 0.6 * pictures(2, *shape)) * 255).round() / 255  # PIL cuts overshoots after each axis, too
    expected = processor(as_pil(images), return_tensors="pt").pixel_values
    found = Preparation.of(processor)(images)
    assert found.shape == expected.shape
    scale = min(processor.image_std) if processor.do_normalize else 1
    assert (found - expected).abs().max() < 2.5 / 255 / scale  # PIL rounds to bytes after each axis
    assert (found - expected).abs().mean() < 0.4 / 255 / scale


def test_a_processor_that_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match="does not resize"):
        Preparation.of(CLIPImageProcessorPil(resample=0))


def test_clip_score_is_that_of_the_evaluation(folder: Path) -> None:
    reward, images = load_reward(f"clip_score:{folder}"), pictures()
    found = reward(images, PROMPTS)
    expected = clip_scores(load_clip(str(folder)), images, PROMPTS).mean().item()
    assert found.mean().item() == pytest.approx(expected, abs=0.2)
    assert (found[0] - found[1]).abs() > 1
    swapped = reward(images, PROMPTS[::-1])
    assert (swapped - found).abs().max() > 1
    torch.testing.assert_close(reward(images.flip(0), PROMPTS[::-1]), found.flip(0))


def test_pick_score_is_the_logit_of_the_model(folder: Path) -> None:
    images = pictures()
    model, processor = CLIPModel.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    tokens = tiny_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    pixels = processor(as_pil(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    found = load_reward(f"pick_score:{folder}")(images, PROMPTS)
    torch.testing.assert_close(found, logits, atol=0.05, rtol=0)
    assert found.abs().max() > 1


def test_gradients_reach_the_images_and_nothing_else(folder: Path) -> None:
    reward = load_reward(f"clip_score:{folder}").to("cpu")
    images = pictures(height=SIDE, width=SIDE).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    network = reward.reward.network
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert not network.training
    step = torch.randn(images.shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    middle = images.detach() * 0.8 + 0.1  # away from the ends, so that no step is cut off
    leaf = middle.clone().requires_grad_()
    reward(leaf, PROMPTS).sum().backward()
    difference = reward(middle + step, PROMPTS).sum() - reward(middle - step, PROMPTS).sum()
    assert difference.item() == pytest.approx(2 * (leaf.grad * step).sum().item(), rel=0.02)


def test_precision_is_not_that_of_autocast(folder: Path) -> None:
    reward, images = load_reward(f"clip_score:{folder}"), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        found = reward(images, PROMPTS)
    assert torch.equal(found, reward(images, PROMPTS))


def test_return_types_of_transformers_4_and_5() -> None:
    embeddings = torch.randn(2, 3)
    assert clip.projected(embeddings) is embeddings
    assert clip.projected(SimpleNamespace(pooler_output=embeddings)) is embeddings


def test_networks_load_late_and_once(folder: Path) -> None:
    made = []
    reward = NetworkReward(lambda: made.append(1) or clip.load_clip_score(str(folder)))
    assert made == []
    reward(pictures(), PROMPTS)
    reward.to("cpu")(pictures(), PROMPTS)
    assert made == [1]


@pytest.mark.parametrize("name", ["clip_score", "pick_score", "hpsv2", "aesthetic", "image_reward", "classifier"])
def test_what_cannot_be_had_is_told_in_one_sentence(name: str) -> None:
    with pytest.raises(ValueError, match=r"nobody/nothing.* cannot be read: ") as caught:
        load_reward(f"{name}:nobody/nothing@v1").to("cpu")
    assert "\n" not in str(caught.value)


# open_clip


def to_open_clip(model: CLIPModel) -> dict[str, torch.Tensor]:
    """Built from the modules, not from names."""
    found = {"logit_scale": model.logit_scale, "text_projection": model.text_projection.weight.T}
    text, vision = model.text_model, model.vision_model
    found["token_embedding.weight"] = text.embeddings.token_embedding.weight
    found["positional_embedding"] = text.embeddings.position_embedding.weight
    found["visual.class_embedding"] = vision.embeddings.class_embedding
    found["visual.positional_embedding"] = vision.embeddings.position_embedding.weight
    found["visual.conv1.weight"] = vision.embeddings.patch_embedding.weight
    found["visual.proj"] = model.visual_projection.weight.T
    norms = {
        "ln_final": text.final_layer_norm,
        "visual.ln_pre": vision.pre_layrnorm,
        "visual.ln_post": vision.post_layernorm,
    }
    for prefix, tower in (("", text), ("visual.", vision)):
        for i, layer in enumerate(tower.encoder.layers):
            block, attention = f"{prefix}transformer.resblocks.{i}", layer.self_attn
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            found[f"{block}.attn.in_proj_weight"] = torch.cat([part.weight for part in parts])
            found[f"{block}.attn.in_proj_bias"] = torch.cat([part.bias for part in parts])
            norms |= {f"{block}.ln_1": layer.layer_norm1, f"{block}.ln_2": layer.layer_norm2}
            norms |= {f"{block}.attn.out_proj": attention.out_proj}
            norms |= {f"{block}.mlp.c_fc": layer.mlp.fc1, f"{block}.mlp.c_proj": layer.mlp.fc2}
    found |= {f"{name}.{kind}": getattr(m, kind) for name, m in norms.items() for kind in ("weight", "bias")}
    return {name: value.detach().contiguous() for name, value in found.items()}


def test_open_clip_weights_come_back(folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder)
    back, own = from_open_clip(to_open_clip(model)), model.state_dict()
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], own[name]) for name in own)


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
def test_hps_is_the_cosine_of_an_open_clip_checkpoint(name: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(clip, "CLIP_H", str(folder))
    tensors, file = to_open_clip(CLIPModel.from_pretrained(folder)), tmp_path / clip.HPS_FILES[name]
    torch.save({"epoch": 3, "state_dict": tensors}, file)
    images, expected = pictures(), load_reward(f"clip_score:{folder}")(pictures(), PROMPTS) / 100
    for source in (tmp_path, file):
        torch.testing.assert_close(load_reward(f"{name}:{source}")(images, PROMPTS), expected)
    del tensors["visual.ln_post.weight"]
    torch.save(tensors, file)
    with pytest.raises(ValueError, match="cannot be read: it lacks 1 of the weights"):
        load_reward(f"{name}:{file}")(images, PROMPTS)


# Heads


def head_tensors(width: int) -> tuple[nn.Sequential, dict[str, torch.Tensor]]:
    """The published head's layers, with weights of about its size, and its file."""
    torch.manual_seed(1)
    sizes = (width, 1024, 128, 64, 16, 1)
    a, b, c, d, e = (nn.Linear(i, o) for i, o in pairwise(sizes))
    head = nn.Sequential(a, nn.Dropout(0.2), b, nn.Dropout(0.2), c, nn.Dropout(0.1), d, e).eval()
    return head, {f"layers.{name}": value for name, value in head.state_dict().items()}


def test_a_head_of_five_linear_layers_is_one() -> None:
    head, tensors = head_tensors(24)
    x = torch.randn(5, 24)
    torch.testing.assert_close(folded_head(tensors)(x), head(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_aesthetic_score_is_the_head_of_the_image_embedding(
    suffix: str, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(clip, "CLIP", str(folder))
    head, tensors = head_tensors(24)
    file = tmp_path / f"head.{suffix}"
    (torch.save if suffix == "pth" else save_file)(tensors, file)
    images = pictures()
    with torch.no_grad():
        expected = head(clip.load_towers(str(folder)).eval().images(images)).squeeze(1)
    images.requires_grad_()
    found = load_reward(f"aesthetic:{file}")(images, PROMPTS)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    found.sum().backward()
    assert images.grad.abs().max() > 0


def blip_tensors(vision: BlipVisionConfig, text: BlipTextConfig) -> dict[str, torch.Tensor]:
    """Random weights by the names of the published file."""
    v, t, generator = vision.hidden_size, text.hidden_size, torch.Generator().manual_seed(2)
    shapes = {"cls_token": (1, 1, v), "pos_embed": (1, 17, v)}
    shapes |= {"patch_embed.proj.weight": (v, 3, 8, 8), "patch_embed.proj.bias": (v,)}

    def layer(name: str, out: int, inputs: int | None = None) -> dict[str, tuple]:
        return {f"{name}.weight": (out, inputs) if inputs else (out,), f"{name}.bias": (out,)}

    shapes |= layer("norm", v)
    for i in range(vision.num_hidden_layers):
        block = f"blocks.{i}"
        shapes |= layer(f"{block}.norm1", v) | layer(f"{block}.norm2", v)
        shapes |= layer(f"{block}.attn.qkv", 3 * v, v) | layer(f"{block}.attn.proj", v, v)
        shapes |= layer(f"{block}.mlp.fc1", 2 * v, v) | layer(f"{block}.mlp.fc2", v, 2 * v)
    named = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    words = {"word_embeddings.weight": (text.vocab_size, t), "position_embeddings.weight": (16, t)}
    shapes = {f"embeddings.{name}": shape for name, shape in words.items()} | layer("embeddings.LayerNorm", t)
    for i in range(text.num_hidden_layers):
        block = f"encoder.layer.{i}"
        for kind, seen in (("attention", t), ("crossattention", v)):
            shapes |= layer(f"{block}.{kind}.self.query", t, t) | layer(f"{block}.{kind}.self.key", t, seen)
            shapes |= layer(f"{block}.{kind}.self.value", t, seen) | layer(f"{block}.{kind}.output.dense", t, t)
            shapes |= layer(f"{block}.{kind}.output.LayerNorm", t)
        shapes |= layer(f"{block}.intermediate.dense", 2 * t, t) | layer(f"{block}.output.dense", t, 2 * t)
        shapes |= layer(f"{block}.output.LayerNorm", t)
    named |= {f"blip.text_encoder.{name}": shape for name, shape in shapes.items()}
    found = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in named.items()}
    found["blip.text_encoder.embeddings.position_ids"] = torch.arange(16)[None]
    found["blip.vision_proj.weight"] = torch.zeros(2, v)  # of the published file, and without use
    return found | {f"mlp.{name}": value for name, value in head_tensors(t)[1].items()}


def test_image_reward_takes_the_published_names() -> None:
    size = {"num_hidden_layers": 2, "num_attention_heads": 4}
    vision = BlipVisionConfig(hidden_size=24, intermediate_size=48, image_size=SIDE, patch_size=8, **size)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "sep_token_id": 1, "max_position_embeddings": 16}
    words = {"vocab_size": len(vocabulary()), "encoder_hidden_size": 24, "hidden_size": 16, "intermediate_size": 32}
    text = BlipTextConfig(**ids, **words, **size)
    tensors = blip_tensors(vision, text)
    reward = CheckedReward(NetworkReward(lambda: ImageReward(tensors, tiny_tokenizer(), vision, text)), "image_reward")
    images = pictures().requires_grad_()
    found = reward(images, PROMPTS)
    found.sum().backward()
    assert images.grad.abs().max() > 0
    network, tokens = reward.reward.network, tiny_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        seen = network.vision(pixel_values=network.prepare(images)).last_hidden_state
        read = network.text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen).last_hidden_state
        raw = head_tensors(16)[0](read[:, 0]).squeeze(1)
    torch.testing.assert_close(found.detach(), (raw - MEAN) / STD, atol=1e-5, rtol=1e-4)
    alone = reward(images[1:].detach(), PROMPTS[1:])  # without padding
    torch.testing.assert_close(alone, found[1:].detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="Missing key"):
        ImageReward({k: v for k, v in tensors.items() if ".qkv." not in k}, tiny_tokenizer(), vision, text)


# Classifiers


def test_classifier_reward_is_the_log_probability_of_the_label() -> None:
    images = pictures(3, SIDE, SIDE).requires_grad_()
    prompts = ["a photo of a t-shirt", "An Ankle Boot on a table", "a shirt"]
    found = load_reward(CLASSIFIER)(images, prompts)
    network = ImageClassifier.from_pretrained(ROOT / "assets" / "fashion_classifier").eval()
    expected = network(images).log_softmax(1)
    wanted = [FASHION_LABELS.index(label) for label in ("t-shirt", "ankle boot", "shirt")]
    torch.testing.assert_close(found, expected[[0, 1, 2], wanted])
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    with pytest.raises(ValueError, match="The prompt 'a fox' names no class of the classifier, which knows t-shirt"):
        load_reward(CLASSIFIER)(images, ["a bag", "a coat", "a fox"])


def test_prompts_without_a_class_are_refused_beforehand() -> None:
    both = load_rewards(["jpeg_compressibility", CLASSIFIER])
    both.check(["a bag", "a coat"])
    with pytest.raises(ValueError, match="The prompt 'a handbag' names no class of the classifier"):
        both.check(["a bag", "a handbag"])


def test_classifiers_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = {0: "tench, Tinca tinca", 1: "cock", 2: "great white shark, man-eater"}
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=24, patch_size=8, id2label=labels, initializer_range=0.5, **size)
    model, processor = ViTForImageClassification(config).eval(), ViTImageProcessorPil(size={"height": 24, "width": 24})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = (pictures() * 255).round() / 255
    with torch.no_grad():
        logits = model(**processor(as_pil(images), return_tensors="pt")).logits.log_softmax(1)
    found = load_reward(f"classifier:{tmp_path}")(images, ["a photo of a tench", "a man-eater, by night"])
    torch.testing.assert_close(found, logits[[0, 1], [0, 2]], atol=0.05, rtol=0)
    assert (logits[0, 0] - logits[0, 2]).abs() > 0.2


# Multi-view consistency


def tiled(height: int = 24, width: int = 20, margin: int = 0) -> torch.Tensor:
    """Two images of 2 x 2 views, each with a coloured block on white, in another place, and with more white around it."""
    generator = torch.Generator().manual_seed(4)
    images = []
    for _ in range(2):
        views = torch.ones(4, 3, height + 2 * margin, width + 2 * margin)
        for i, view in enumerate(views):
            block = 0.9 * torch.rand(3, 6, 4 + i, generator=generator)
            view[:, 7 + margin : 13 + margin, 6 + margin : 10 + i + margin] = block
        rows = [torch.cat(list(views[k : k + 2]), dim=2) for k in (0, 2)]
        images.append(torch.cat(rows, dim=1))
    return torch.stack(images)


def identity(views, cameras):
    return views


def shifted(views, cameras):
    return views.roll(2, dims=-1)


def test_views_are_split_row_by_row() -> None:
    image = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    views = split_views(image, (2, 3))
    assert views.shape == (2, 6, 3, 2, 2)
    assert torch.equal(views[:, 1], image[..., :2, 2:4])
    assert torch.equal(views[:, 5], image[..., 2:, 4:])


def test_the_box_is_a_square_around_what_is_not_white() -> None:
    view = torch.ones(3, 40, 40)
    view[1, 12:20, 10:24] = 0.9
    view[0, 30, 30] = 0.96
    assert object_box(view) == (4, 5, 24)
    assert object_box(torch.ones(3, 8, 8)) == (-5, -5, 18)


def test_consistency_is_zero_for_the_same_views_and_less_for_others() -> None:
    images = tiled()
    assert MultiViewConsistency(identity)(images, PROMPTS).tolist() == [0, 0]
    assert (MultiViewConsistency(shifted)(images, PROMPTS) < -0.01).all()
    one = images.clone()
    one[0, :, 7:13, 6:10] = 0.0

    def other(views, cameras):
        return split_views(images, (2, 2))

    found = MultiViewConsistency(other)(one, PROMPTS)
    difference = images[0, :, 7:13, 6:10].sum() / (
        3 * 16**2
    )  # of one view in its box of 6 + 2 * 5 pixels, one in four
    torch.testing.assert_close(found, torch.stack([-difference / 4, torch.tensor(0.0)]))


def test_more_white_around_changes_nothing() -> None:
    plain, wider = (MultiViewConsistency(shifted)(tiled(margin=m), PROMPTS) for m in (0, 9))
    torch.testing.assert_close(plain, wider)


def test_cameras_and_other_distances() -> None:
    seen = []

    def render(views, cameras):
        seen.append((views.shape, cameras))
        return 1 - views

    reward = MultiViewConsistency(render, "eight", (1, 2), lambda x, y: (x - y).flatten(1).abs().amax(1))
    assert (reward(tiled(), PROMPTS) <= -0.9).all()
    assert seen == [((2, 2, 3, 48, 20), "eight")]
    assert not reward.differentiable
    identity_with = lambda views, cameras: views.square()  # noqa: E731
    identity_with.differentiable = True
    images = tiled().requires_grad_()
    CheckedReward(MultiViewConsistency(identity_with), "views")(images, PROMPTS).sum().backward()
    assert images.grad.abs().max() > 0


def test_bad_layouts_and_renderers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="layout must be the numbers of rows and columns"):
        MultiViewConsistency(identity, layout=(2, 0))
    with pytest.raises(ValueError, match="48 x 40 pixels cannot be split into 2 x 3 views"):
        MultiViewConsistency(identity, layout=(2, 3))(tiled(), PROMPTS)
    with pytest.raises(ValueError, match="must return the same views"):
        MultiViewConsistency(lambda views, cameras: views[:, :2])(tiled(), PROMPTS)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(ValueError, match="LPIPS needs torchvision, which is not installed"):
        multi_view.lpips()


def test_a_sum_of_networks_is_differentiable(folder: Path) -> None:
    reward = WeightedSum([load_reward(f"clip_score:{folder}"), load_reward(CLASSIFIER)], [1.0, -1.0]).to("cpu")
    images = pictures(height=SIDE, width=SIDE).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert reward.differentiable
    assert images.grad.abs().max() > 0
