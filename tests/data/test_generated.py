"""Latents that the teacher samples from a user's prompts."""

import json
from dataclasses import replace
from itertools import islice

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tiny import tiny_pipeline
from tiny_flow import tiny_sd3
from tiny_flow_a import tiny_sana, tiny_wan
from tiny_flow_b import tiny_flux, tiny_flux2, tiny_klein, tiny_qwen_image, tiny_z_image
from tiny_xl import tiny_xl_pipeline

from cm_diffusers.data import generated
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.generated import GenerationConfig, generated_batches, read_prompts, training_batches
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.teacher_latents import teacher_latents
from cm_diffusers.models.families.base import family_of, guided, in_steps, latents_of
from cm_diffusers.models.students import StudentConfig, make_networks


PROMPTS = ["a photo of a bag", "a coat", "an ankle boot"]


@pytest.fixture(params=["SD", "SDXL"])
def teacher(request):
    return tiny_pipeline() if request.param == "SD" else tiny_xl_pipeline()


@pytest.fixture
def data(tmp_path) -> DataConfig:
    cache = str(tmp_path / "cache")
    return DataConfig(resolution=32, train_batch_size=4, encode_batch_size=2, latent_cache_dir=cache)


@pytest.fixture
def ask(tmp_path) -> GenerationConfig:
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0], "", PROMPTS[1], "  ", PROMPTS[2]]) + "\n")
    return GenerationConfig(
        str(tmp_path / "prompts.txt"), generated_samples=8, generation_steps=2, generation_guidance_scale=3.0
    )


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many samples the teacher draws at each call."""
    found, draw = [], generated._Sampler.draw
    monkeypatch.setattr(generated._Sampler, "draw", lambda self, rows: found.append(len(rows)) or draw(self, rows))
    return found


def batches(data, ask, teacher, number=2, start=0, seed=0, **position):
    source = generated_batches(data, ask, Encoders.from_pipeline(teacher), teacher, seed, **position)
    return list(islice(source(start), number))


def latents(data, ask, teacher, **options) -> list[torch.Tensor]:
    """Of the first epoch of eight samples, in a fixed order."""
    rows = torch.cat([batch.x0 for batch in batches(data, ask, teacher, **options)])
    return sorted(rows, key=lambda row: row[0, 0, 0].item())


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_they_are_the_teachers_own_latents(data, ask, teacher):
    """Row i of the data is what the stock call gives for prompt i mod 3 and seed (0, i)."""
    expected = []
    for i in range(8):
        seed = int(torch.tensor(generated.np.random.SeedSequence([0, generated.GENERATE, i]).generate_state(1)[0]))
        draw = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "latent"}
        expected.append(teacher(PROMPTS[i % 3], generator=torch.Generator().manual_seed(seed), **draw).images[0])
    encoders = Encoders.from_pipeline(teacher)
    conditions = [encoders.encode_prompts([PROMPTS[i % 3]])["encoder_hidden_states"][0] for i in range(8)]
    for batch in batches(data, ask, teacher):
        for x0, states in zip(batch.x0, batch.cond["encoder_hidden_states"], strict=True):
            i = min(range(8), key=lambda i: (expected[i] - x0).abs().max())
            torch.testing.assert_close(x0, expected[i], rtol=2e-3, atol=2e-3)  # float16
            torch.testing.assert_close(states, conditions[i], rtol=2e-3, atol=2e-3)


def test_conditions(data, ask, teacher):
    (batch,) = batches(replace(data, proportion_empty_prompts=1.0), ask, teacher, 1)
    assert all(torch.equal(batch.cond[name], batch.uncond[name]) for name in batch.cond)
    empty = Encoders.from_pipeline(teacher).encode_prompts([""])["encoder_hidden_states"]
    torch.testing.assert_close(batch.cond["encoder_hidden_states"], empty.expand(4, -1, -1), rtol=2e-3, atol=2e-3)
    if "time_ids" in batch.cond:
        assert batch.cond["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 4
    assert ("time_ids" in batch.cond) == hasattr(teacher, "text_encoder_2")


def test_samples_are_drawn_once(data, ask, calls):
    teacher = tiny_pipeline()
    first = latents(data, ask, teacher)
    assert calls == [2, 2, 2, 2]
    assert same(latents(data, ask, teacher), first)
    assert len(calls) == 4
    assert same(latents(replace(data, cache_latents=False), ask, teacher), first)
    assert len(calls) == 8


@pytest.mark.parametrize(
    "change",
    ["steps", "guidance", "seed", "prompts", "resolution", "weights", "text", "schedule"],
)
def test_what_changes_a_sample_draws_anew(data, ask, calls, tmp_path, change):
    first, seed, teacher = latents(data, ask, tiny_pipeline()), 0, tiny_pipeline()
    if change in ("steps", "guidance"):
        field = {"steps": "generation_steps", "guidance": "generation_guidance_scale"}[change]
        ask = replace(ask, **{field: 4})
    elif change == "prompts":
        (tmp_path / "prompts.txt").write_text("a photo of a sandal")
    elif change == "resolution":
        data = replace(data, resolution=40)
    elif change == "schedule":
        teacher.scheduler = type(teacher.scheduler).from_config(teacher.scheduler.config, beta_end=0.02)
    elif change == "seed":
        seed = 1
    else:
        part = teacher.unet if change == "weights" else teacher.text_encoder
        next(part.parameters()).data.mul_(1.5)
    second = latents(data, ask, teacher, seed=seed)
    assert len(calls) == 8
    assert second[0].shape != first[0].shape if change == "resolution" else not same(first, second)


def test_an_interruption_costs_one_shard(data, ask, calls, monkeypatch):
    monkeypatch.setattr(generated, "GENERATED_ROWS", 4)
    teacher, whole = tiny_pipeline(), latents(replace(data, cache_latents=False), ask, tiny_pipeline())
    calls.clear()
    monkeypatch.setattr(type(teacher), "__call__", stops_after(3, type(teacher).__call__))
    with pytest.raises(KeyboardInterrupt):
        latents(data, ask, teacher)
    monkeypatch.undo()
    monkeypatch.setattr(generated, "GENERATED_ROWS", 4)
    assert same(latents(data, ask, teacher), whole)
    more = latents(data, replace(ask, generated_samples=12), teacher, number=3)
    assert all(any(torch.equal(row, other) for other in more) for row in whole), "more samples keep those there are"


def stops_after(number, call):
    left = iter([True] * number)

    def limited(self, *args, **kwargs):
        if not next(left, False):
            raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    return limited


@pytest.mark.parametrize("student", [{"lora": True, "lora_dropout": 0.5}, {"cast_teacher_unet": "bf16"}])
def test_a_teacher_already_in_use_is_sampled_alone(data, ask, student):
    """Adapters, dropout and training mode of the student inside it leave no trace."""
    teacher, rank = tiny_pipeline(), {"lora_rank": 2, "unet_time_cond_proj_dim": 16}
    alone = latents(data, ask, teacher)
    nets = make_networks(teacher.unet, StudentConfig(**student, **rank))
    if "lora" in student:
        for p in nets.student.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p)
    again = latents(replace(data, cache_latents=False), ask, teacher)
    if "lora" in student:
        assert same(again, alone)
        assert same(latents(data, ask, teacher), alone), "one key: they are the same samples"
        assert nets.student.training
    else:
        assert 0 < max((a - b).abs().max() for a, b in zip(again, alone, strict=True)) < 0.1


def test_batches_are_a_function_of_their_number_and_ranks_share_epochs(data, ask):
    teacher = tiny_pipeline()
    whole = batches(data, ask, teacher, 5)
    assert torch.equal(batches(data, ask, teacher, 1, start=3)[0].x0, whole[3].x0)
    ranks = [batches(data, ask, teacher, 1, rank=rank, world_size=2)[0].x0 for rank in (0, 1)]
    found = sorted(torch.cat(ranks), key=lambda row: row[0, 0, 0].item())
    assert same(found, latents(data, ask, teacher))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_kinds_of_prompt_files(tmp_path, kind):
    path, column = tmp_path / f"prompts.{kind}", "text" if kind == "txt" else "prompt"
    if kind == "txt":
        path.write_text("\n".join([*PROMPTS, "", " "]))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"id": 1, "prompt": text}) for text in [*PROMPTS, None, ""]))
    elif kind == "csv":
        path.write_text("\n".join(["id,prompt", *(f"1,{text}" for text in [*PROMPTS, ""])]))
    else:
        parquet.write_table(pa.table({"prompt": [*PROMPTS, None, ""]}), path)
    assert read_prompts(str(path), column) == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "but there is no such file"),
        ("prompts.md", "x", r"but it ends in \.md"),
        ("prompts.txt", " \n\n", "holds no prompt: found 2 rows, all empty"),
        ("prompts.txt", "caf\xe9", "prompts.txt cannot be read: it is no text in UTF-8 .byte 0xe9 at place 3"),
        ("prompts.jsonl", "{broken", "prompts.jsonl cannot be read: line 1 is no JSON"),
        ("prompts.jsonl", '{"caption": "x"}', "has no column text: name one of caption by --caption_column"),
    ],
)
def test_wrong_prompt_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name), "text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": "x"}, "--train_data_dir has no effect with --prompts_file"),
        ({"random_flip": True}, "--random_flip has no effect with --prompts_file"),
        ({"streaming": True}, "--streaming has no effect with --prompts_file"),
        ({"resolution": 36}, "--resolution 36 is not a multiple of 8"),
        ({"proportion_empty_prompts": 2.0}, "must lie between 0 and 1"),
        ({"generated_samples": 0}, "--generated_samples must be at least 1"),
        ({"generation_steps": 0}, "--generation_steps must be at least 1"),
        ({"generation_steps": 1001}, "--generation_steps is 1001, but the teacher has 1000 timesteps"),
        ({"generation_guidance_scale": -3.0}, "--generation_guidance_scale must be at least 0, but it is -3"),
        ({"caption_column": "prompt"}, "--caption_column has no effect with a .txt file of prompts"),
    ],
)
def test_wrong_settings(data, ask, changes, message):
    teacher = tiny_pipeline()
    of_ask = {name: value for name, value in changes.items() if hasattr(ask, name)}
    of_data = {name: value for name, value in changes.items() if name not in of_ask}
    with pytest.raises(ValueError, match=message):
        generated_batches(replace(data, **of_data), replace(ask, **of_ask), None, teacher, 0)


def test_flags_of_generation_need_prompts(data):
    with pytest.raises(ValueError, match="--generation_steps has no effect without --prompts_file"):
        training_batches(data, GenerationConfig(generation_steps=30), tiny_pipeline(), 0)
    with pytest.raises(ValueError, match="exactly one is needed and none was given"):
        training_batches(data, GenerationConfig(), tiny_pipeline(), 0)


def test_samples_must_be_finite(data, ask):
    teacher = tiny_pipeline()
    teacher.unet.conv_out.weight.data.mul_(1e9)
    with pytest.raises(ValueError, match="samples are not finite in float16"):
        batches(data, ask, teacher)


FAMILIES = [
    tiny_pipeline,
    tiny_sd3,
    tiny_sana,
    tiny_flux,
    tiny_flux2,
    tiny_klein,
    tiny_qwen_image,
    tiny_z_image,
    tiny_wan,
]


@torch.no_grad()
@pytest.mark.parametrize("make", FAMILIES)
def test_latents_of_any_family_are_decoded_to_its_pipelines_images(make):
    pipe, side = make(), 64 if make is tiny_wan else 32
    found = teacher_latents(pipe, PROMPTS[:2], [3, 4], side, 2, 3.0)
    call = {"height": side, "width": side, "output_type": "pt", **in_steps(pipe, 2), **guided(pipe, 3.0)}
    one = {"num_frames": 1} if make is tiny_wan else {}
    out = pipe(prompt=PROMPTS[:2], generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], **call, **one)
    expected = out.frames[:, 0] if make is tiny_wan else out.images
    decoded = (latents_of(pipe).decode(pipe.vae, found) / 2 + 0.5).clamp(0, 1)
    assert found.ndim == 4
    assert decoded.shape == (2, 3, side, side)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.05


@pytest.mark.parametrize("make", [tiny_flux, tiny_qwen_image])
def test_a_teacher_of_tokens_gives_images_and_their_text(data, ask, make):
    pipe = make()
    (batch,) = batches(data, ask, pipe, 1)
    latents, family = latents_of(pipe), family_of(pipe.transformer)
    assert batch.x0.shape == (4, 4, 32 // latents.downscale, 32 // latents.downscale)
    states = family.encode(pipe, PROMPTS)["prompt_embeds"]
    for row in batch.cond["prompt_embeds"]:
        kept = row[row.abs().sum(1) > 0]
        assert min((kept - other[: len(kept)]).abs().max() for other in states) < 2e-3
    with pytest.raises(ValueError, match="--resolution 36 is not a multiple of 8, as the teacher's pipeline needs"):
        batches(replace(data, resolution=36), ask, pipe)
