"""What the data of a teacher of any family is made of: its VAE, its text towers and its own encode."""

import io
import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from models.test_latents import MEAN, STD, seeded, tiny_dc, tiny_qwen
from PIL import Image
from pyarrow import parquet
from tiny import tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_vae
from tiny_flow import tiny_clip, tiny_sd3
from tiny_xl import tiny_xl_pipeline
from torch import nn

from cm_diffusers.data.cache import Vae, module_fingerprint
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.preprocessing import PIXELS, View, content_hash, decode_image, preprocess
from cm_diffusers.data.shards import shard_key
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.data.streaming import streaming_batches
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.models.families import base
from cm_diffusers.models.families.base import Family, family_of
from cm_diffusers.models.families.latents import dc_latents, kl_latents, per_channel_latents


CAPTIONS = [f"a photo of a {name}" for name in ("coat", "bag", "dress", "t-shirt")]
LENGTH = 12


class MaskedTransformer(ModelMixin, ConfigMixin):
    """Whose family's text comes with a mask, padded on the left and on the right."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)


def encode_masked(pipe: SimpleNamespace, prompts: list[str]) -> dict[str, torch.Tensor]:
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    states = pipe.text_encoder(tokens.input_ids).last_hidden_state
    mask = tokens.attention_mask.bool()
    mask[:, 0] = False
    return {"prompt_embeds": states * 1000, "prompt_embeds_mask": mask, "pooled": states[:, 0]}


class MaskedPipeline(SimpleNamespace):
    @property
    def components(self) -> dict[str, object]:
        return {**self.__dict__}


def masked_pipeline(vae: nn.Module, pipeline: type = MaskedPipeline, **parts: object) -> MaskedPipeline:
    torch.manual_seed(0)
    own = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer(), "transformer": MaskedTransformer()}
    return pipeline(vae=vae, **own | parts)


@pytest.fixture
def families(monkeypatch):
    """`families(latents)`: the masked family, of such a VAE."""

    def register(latents):
        family = Family(
            pipeline=lambda network: "MaskedPipeline", lora_targets=(), guidance=lambda network: "cfg", call=None,
            encode=encode_masked, latents=latents,
        )  # fmt: skip
        monkeypatch.setitem(base.FAMILIES, "MaskedTransformer", "masked")
        monkeypatch.setitem(sys.modules, f"{base.__package__}.masked", SimpleNamespace(FAMILY=family))

    return register


@pytest.fixture
def config(tmp_path) -> DataConfig:
    (tmp_path / "set").mkdir()
    images = []
    for number in range(len(CAPTIONS)):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer := io.BytesIO(), format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    parquet.write_table(pa.table({"image": images, "text": CAPTIONS}), tmp_path / "set" / "data.parquet")
    return DataConfig(
        train_data_dir=str(tmp_path / "set"), resolution=32, center_crop=True, train_batch_size=4, encode_batch_size=3,
        cache_dir=str(tmp_path / "hf"), latent_cache_dir=str(tmp_path / "latents"),
    )  # fmt: skip


def pixels_of(config: DataConfig) -> torch.Tensor:
    return torch.stack([preprocess(decode_image(row["image"]), config, View()) for row in load_image_text(config)])


def names_in(config: DataConfig) -> set[str]:
    return {file.stem for file in Path(config.latent_cache_dir).glob("*.safetensors")}


def first(batches):
    return next(islice(batches(0), 1))


CASES = {
    "sd3": (tiny_sd3, None),
    "masked, without a posterior": (lambda: masked_pipeline(seeded(tiny_dc)), dc_latents),
    "masked, a VAE of clips": (lambda: masked_pipeline(seeded(tiny_qwen)), per_channel_latents),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_cached_is_what_the_family_encodes(config, families, case):
    make, latents = CASES[case]
    if latents is not None:
        families(latents)
    pipe = make()
    cached = first(text_image_batches(config, Encoders.from_pipeline(pipe), 0))
    order = [CAPTIONS.index(text) for text in cached.texts]
    family = family_of(pipe.transformer)
    of_vae = family.latents(pipe.vae)
    with torch.no_grad():
        mean, std = of_vae.encode(pipe.vae, pixels_of(config)[order])
        expected = {"cond": family.encode(pipe, cached.texts), "uncond": family.encode(pipe, [""] * 4)}
    low, high = (of_vae.of_network(mean.half().float() + sign * 6 * std.half().float()) for sign in (-1, 1))
    assert (low - 1e-3 <= cached.x0).all()
    assert (cached.x0 <= high + 1e-3).all()
    assert torch.equal(low, high) == (latents is dc_latents)
    for which, values in expected.items():
        found = getattr(cached, which)
        assert found.keys() == values.keys()
        mask = values.get("prompt_embeds_mask")
        for name, value in values.items():
            if mask is not None and name == "prompt_embeds":
                assert found[name][~mask].count_nonzero() == 0
                value = value * mask[:, :, None]
            assert found[name].shape == value.shape
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_streamed_data_are_those_of_the_cache(config, families, case):
    make, latents = CASES[case]
    if latents is not None:
        families(latents)
    encoders = Encoders.from_pipeline(make())
    default = DataConfig()
    streamed = replace(config, streaming=True, cache_dir=default.cache_dir, latent_cache_dir=default.latent_cache_dir)
    one = first(text_image_batches(config, encoders, 0))
    two = first(streaming_batches(streamed, encoders, 0))
    order = [two.texts.index(text) for text in one.texts]
    for which in ("cond", "uncond"):
        found, expected = getattr(one, which), getattr(two, which)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            torch.testing.assert_close(found[name], value[order], rtol=1e-3, atol=1e-4)
    assert one.x0.shape == two.x0.shape
    if latents is dc_latents:  # nothing is drawn
        torch.testing.assert_close(one.x0, two.x0[order], rtol=1e-3, atol=1e-4)


def test_channels_are_normalised_each_by_its_own(config, families):
    families(per_channel_latents)
    pipe = masked_pipeline(seeded(tiny_qwen))
    x0 = torch.cat([first(text_image_batches(config, Encoders.from_pipeline(pipe), seed)).x0 for seed in range(60)])
    posterior = pipe.vae.encode(pixels_of(config)[:, :, None]).latent_dist
    for channel in range(4):
        mean, var = posterior.mean[:, channel], posterior.var[:, channel]
        assert x0[:, channel].mean() == pytest.approx(((mean.mean() - MEAN[channel]) / STD[channel]).item(), abs=0.02)
        spread = (var.mean() + mean.var(correction=0)).sqrt() / STD[channel]
        assert x0[:, channel].std() == pytest.approx(spread.item(), rel=0.05)


def test_all_towers_and_tokenizers_of_a_pipeline_count():
    pipe = tiny_sd3()
    encoders = Encoders.from_pipeline(pipe)
    assert encoders.towers == (pipe.text_encoder, pipe.text_encoder_2)
    assert len(encoders.tokenizers) == 2
    assert not encoders.micro_conditioning
    changes = {
        "nothing": {},
        "first tower": {"text_encoder": tiny_clip(16)},
        "second tower": {"text_encoder_2": tiny_clip(24)},
        "a third": {"text_encoder_3": tiny_clip(8)},
        "second tokenizer": {"tokenizer_2": tiny_tokenizer()},
        "third tokenizer": {"tokenizer_3": tiny_tokenizer()},
    }
    changes["second tokenizer"]["tokenizer_2"].model_max_length = 8
    found = {what: Encoders.from_pipeline(tiny_sd3(**parts)).fingerprint for what, parts in changes.items()}
    assert found["nothing"] == encoders.fingerprint
    assert len(set(found.values())) == len(changes)


def test_a_pipelines_class_and_its_chat_template_count(families):
    families(dc_latents)

    class OtherPipeline(MaskedPipeline):
        pass

    told = tiny_tokenizer()
    told.chat_template = "{{ messages }}"
    pipes = [
        masked_pipeline(tiny_dc()),
        masked_pipeline(tiny_dc(), OtherPipeline),
        masked_pipeline(tiny_dc(), tokenizer=told),
    ]
    assert len({Encoders.from_pipeline(pipe).fingerprint for pipe in pipes}) == 3


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_caches_of_stable_diffusion_keep_their_names(config, make):
    """They are written out here as they were before there were families."""

    def state(tokenizer) -> list:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        del rules["truncation"], rules["padding"]
        return [rules, tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.padding_side]

    pipe = make()
    encoders = Encoders.from_pipeline(pipe)
    text = [module_fingerprint(pipe.text_encoder), state(pipe.tokenizer)]
    if make is tiny_xl_pipeline:
        text += [module_fingerprint(pipe.text_encoder_2), state(pipe.tokenizer_2)]
        text.append(bool(pipe.config.force_zeros_for_empty_prompt))
    assert encoders.fingerprint == shard_key(*text)
    assert encoders.vae.fingerprint == module_fingerprint(pipe.vae)
    text_image_batches(replace(config, vae_dtype="bfloat16"), encoders, 0)
    digests = [content_hash(row["image"]) for row in load_image_text(config)]
    crop_and_flip = [None, False]
    images = shard_key(
        "posterior", PIXELS, encoders.vae.fingerprint, 32, "bilinear", "bfloat16", *crop_and_flip, *digests
    )
    captions = shard_key("conditions", shard_key(*text), "", *CAPTIONS)
    assert names_in(config) == {images, captions}


def test_sides_are_whole_patches(config, families):
    families(lambda vae: kl_latents(vae, patch=2))
    encoders = Encoders.from_pipeline(masked_pipeline(tiny_vae()))
    message = "--resolution 36 is not a multiple of 8, as the VAE and patches of 2 latents need: take 32 or 40"
    with pytest.raises(ValueError, match=message):
        text_image_batches(replace(config, resolution=36), encoders, 0)
    assert Vae.from_model(tiny_vae()).latents.multiple == 4


def test_latents_that_overflow_name_the_flag(config, families):
    families(dc_latents)
    vae = seeded(tiny_dc)
    vae.encoder.conv_out.weight.mul_(1e8)
    with pytest.raises(ValueError, match="latents are not finite in bfloat16: pass --vae_dtype float32"):
        text_image_batches(replace(config, vae_dtype="bfloat16"), Encoders.from_pipeline(masked_pipeline(vae)), 0)
