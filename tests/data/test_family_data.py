"""What the data of a teacher of any family is made of: its VAE, its text towers and its own encode."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open
from tiny import tiny_pipeline, tiny_tokenizer
from tiny_flow import tiny_clip, tiny_sd3, tiny_sd3_transformer
from tiny_flow_a import tiny_sana, tiny_sprint, tiny_wan
from tiny_flow_b import tiny_flux, tiny_flux2, tiny_klein, tiny_qwen_image, tiny_z_image
from tiny_xl import tiny_xl_pipeline

from cm_diffusers.data.cache import module_fingerprint
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.preprocessing import PIXELS, View, decode_image, preprocess
from cm_diffusers.data.ragged import trimmed
from cm_diffusers.data.sampler import Stream
from cm_diffusers.data.shards import shard_key
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.data.streaming import streaming_batches
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.models.families.base import family_of, network_of
from cm_diffusers.types import Batch


CAPTIONS = ["a coat", "a photo of a bag", "a photo of a t-shirt and an ankle boot", "a dress"]
MASKED = {"sana": tiny_sana, "qwen image": tiny_qwen_image, "z image": tiny_z_image}
FAMILIES = {
    "sd3": lambda: tiny_sd3(transformer=tiny_sd3_transformer(pos_embed_max_size=16)),
    "flux": tiny_flux,
    "flux.2": tiny_klein,
    "wan": tiny_wan,
    **MASKED,
}


@pytest.fixture
def config(tmp_path) -> DataConfig:
    (tmp_path / "set").mkdir()
    images = []
    for number in range(len(CAPTIONS)):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 72, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer := io.BytesIO(), format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    parquet.write_table(pa.table({"image": images, "text": CAPTIONS}), tmp_path / "set" / "data.parquet")
    return DataConfig(
        train_data_dir=str(tmp_path / "set"), resolution=64, center_crop=True, train_batch_size=4, encode_batch_size=3,
        cache_dir=str(tmp_path / "hf"), latent_cache_dir=str(tmp_path / "latents"),
    )  # fmt: skip


def pixels_of(config: DataConfig) -> torch.Tensor:
    return torch.stack([preprocess(decode_image(row["image"]), config, View()) for row in load_image_text(config)])


def first(batches: Stream) -> Batch:
    return next(iter(batches(0)))


def output(pipe: DiffusionPipeline, x_t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
    network = network_of(pipe)
    family = family_of(network)
    if family.guidance(network) == "embedded":
        cond = family.told(network)(cond, torch.full((len(x_t),), 2.5))
    return family.call(network, x_t, torch.full((len(x_t),), 0.5), cond)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_cached_equals_uncached(config, name):
    """For the network of every family: its latents, its text and what it makes of both."""
    pipe = FAMILIES[name]()
    family = family_of(network_of(pipe))
    cached = first(text_image_batches(config, Encoders.from_pipeline(pipe), 0))
    latents, order = family.latents(pipe.vae), [CAPTIONS.index(text) for text in cached.texts]
    mean, std = latents.encode(pipe.vae, pixels_of(config)[order])
    away = (cached.x0 - latents.of_network(mean)) / (latents.of_network(mean + std) - latents.of_network(mean) + 1e-3)
    assert away.abs().max() < 6
    assert away.std() == pytest.approx(0 if name == "sana" else 1, abs=0.2)
    for found, texts in ((cached.cond, cached.texts), (cached.uncond, [""] * 4)):
        expected = family.encode(pipe, texts)
        torch.testing.assert_close(
            output(pipe, cached.x0, found), output(pipe, cached.x0, expected), rtol=1e-2, atol=5e-3
        )
        for key, value in trimmed(expected).items():
            rest = found[key][:, value.shape[1] :]  # as long as the other branch
            assert rest.count_nonzero() == 0
            assert found[key].dtype == value.dtype
            torch.testing.assert_close(found[key][:, : value.shape[1]], value, rtol=2e-3, atol=2e-3)
    assert {key: value.shape for key, value in cached.cond.items()} == {
        key: value.shape for key, value in cached.uncond.items()
    }


@pytest.mark.parametrize("name", ["sd3", *MASKED])
def test_streamed_data_are_those_of_the_cache(config, name):
    encoders, default = Encoders.from_pipeline(FAMILIES[name]()), DataConfig()
    places = {"cache_dir": default.cache_dir, "latent_cache_dir": default.latent_cache_dir}
    cached = first(text_image_batches(config, encoders, 0))
    streamed = first(streaming_batches(replace(config, streaming=True, **places), encoders, 0))
    order = [streamed.texts.index(text) for text in cached.texts]
    for found, expected in ((cached.cond, streamed.cond), (cached.uncond, streamed.uncond)):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            torch.testing.assert_close(found[key], value[order], rtol=2e-3, atol=2e-3)
    assert cached.x0.shape == streamed.x0.shape
    if name == "sana":  # nothing is drawn
        torch.testing.assert_close(cached.x0, streamed.x0[order], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MASKED)
def test_padding_is_not_stored(config, name):
    pipe = FAMILIES[name]()
    encoders = Encoders.from_pipeline(pipe)
    text_image_batches(config, encoders, 0)
    captions = Path(config.latent_cache_dir) / shard_key("conditions", encoders.fingerprint)
    conditions = [family_of(network_of(pipe)).encode(pipe, [text]) for text in ["", *CAPTIONS]]
    mask = next(key for key in conditions[0] if key.endswith("mask"))
    tokens = [max(1, int(told[mask].sum())) for told in conditions]
    with safe_open(next(captions.iterdir()), "pt") as file:
        assert file.get_tensor(mask).tolist() == tokens
        states = next(key for key, told in conditions[0].items() if told.ndim == 3)
        assert file.get_slice(f"{states} of {mask}").get_shape()[0] == sum(tokens)


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


def test_a_pipelines_class_and_its_chat_template_count():
    """Sprint's pipeline prepares a prompt from the same parts otherwise."""
    assert len({Encoders.from_pipeline(make()).fingerprint for make in (tiny_sana, tiny_sprint)}) == 2
    pipe = tiny_qwen_image()
    before = Encoders.from_pipeline(pipe).fingerprint
    pipe.tokenizer.chat_template = f"{pipe.tokenizer.chat_template} "
    assert Encoders.from_pipeline(pipe).fingerprint != before


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_caches_of_stable_diffusion_keep_their_names(config, make: Callable[[], DiffusionPipeline]):
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
    settings = [64, "bilinear", "bfloat16", None, False]
    images = shard_key("posterior", PIXELS, encoders.vae.fingerprint, *settings)
    captions = shard_key("conditions", shard_key(*text))
    assert {images, captions} < {folder.name for folder in Path(config.latent_cache_dir).iterdir()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_flux, "60 is not a multiple of 8, as the VAE and patches of 2 latents need: take 56 or 64"),
        (tiny_flux2, "60 is not a multiple of 8, as the VAE needs: take 56 or 64"),
    ],
)
def test_sides_are_whole_patches(config, make, message):
    with pytest.raises(ValueError, match=f"--resolution {message}"):
        text_image_batches(replace(config, resolution=60), Encoders.from_pipeline(make()), 0)


def test_latents_that_overflow_name_the_flag(config):
    pipe = tiny_sana()
    pipe.vae.encoder.conv_out.weight.data.mul_(1e8)
    with pytest.raises(ValueError, match="latents are not finite in bfloat16: pass --vae_dtype float32"):
        text_image_batches(replace(config, vae_dtype="bfloat16"), Encoders.from_pipeline(pipe), 0)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_towers_encode_where_they_are(name):
    """`placed` moves them alone; a pipeline's own device is that of its first part, which may be the VAE."""
    pipe = FAMILIES[name]()
    expected = Encoders.from_pipeline(pipe).encode_prompts(CAPTIONS)
    encoders = Encoders.from_pipeline(pipe)
    pipe.vae.to("meta")
    network_of(pipe).to("meta")
    found = encoders.encode_prompts(CAPTIONS)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
