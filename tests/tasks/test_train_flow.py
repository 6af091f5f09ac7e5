"""Flow matching from scratch: two steps, a resume, and what is published."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from processes import run_worker
from safetensors.torch import load_file
from scripts import data_flags, image_folder, run_script
from scripts import flags as words
from tiny import tiny_pipeline
from toys import assert_same

from cm_diffusers.models.teachers import is_late, load_stock
from cm_diffusers.tasks import flow_models


SHAPE = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "pos_embed_max_size": 8}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("flow")
    image_folder(home / "data", 16)
    tiny_pipeline().save_pretrained(home / "base")
    return home


@pytest.fixture
def flags(home: Path, tmp_path: Path) -> dict[str, object]:
    config = tmp_path / "network.json"
    config.write_text(json.dumps(SHAPE | {"patch_size": 2, "qk_norm": "rms_norm"}))
    steps = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-3, "export_ema_decay": 0.5}
    base = {"pretrained_pipeline": home / "base", "transformer_config": config, "text_length": 8}
    return data_flags(home / "data", home / "cache") | base | steps | {"output_dir": tmp_path / "run"}


def test_the_network_of_the_base_is_not_read(flags: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    bases = []
    monkeypatch.setattr(flow_models, "load_stock", lambda *given: bases.append(load_stock(*given)) or bases[-1])
    config = flow_models.SmallFlowConfig(
        *(str(flags[name]) for name in ("pretrained_pipeline", "transformer_config")), 8
    )
    pipe = flow_models.new_flow_pipeline(config, 32, 1.0)
    assert is_late(bases[0].unet)
    assert not any(is_late(part) for part in (pipe.vae, pipe.text_encoder, pipe.transformer))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_stock_pipeline_comes_out_and_a_resume_makes_the_same(flags: dict[str, object], tmp_path: Path) -> None:
    run_script("train_flow", **flags, shift=3.0)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipe) is StableDiffusion3Pipeline
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipe.scheduler.config.shift == 3.0
    assert (pipe.vae.config.shift_factor, pipe.tokenizer_max_length) == (0.0, 8)
    assert not pipe.encode_prompt("a coat", None, None)[0][:, 8:].any()
    assert pipe.transformer.config.sample_size == 8
    image = pipe("a photo of a bag", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (32, 32, 3)
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    again = flags | {"output_dir": tmp_path / "again", "resume_from_checkpoint": "latest"}
    run_script("train_flow", **again, shift=3.0)
    resumed = weights(tmp_path / "again")
    assert all(torch.equal(resumed[name], value) for name, value in weights(tmp_path / "run").items())


def test_text_towers_are_the_given_one_and_its_first_layer(flags: dict[str, object], tmp_path: Path) -> None:
    run_script("train_flow", **flags, save_fp16=True)
    base, pipe = load_stock(str(flags["pretrained_pipeline"])), load_stock(str(tmp_path / "run" / "pipeline"))
    ids = pipe.tokenizer(["a bag", ""], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (2, 8)
    with torch.no_grad():
        given = base.text_encoder(ids, output_hidden_states=True)
        first, second = (tower(ids, output_hidden_states=True) for tower in (pipe.text_encoder, pipe.text_encoder_2))
    assert torch.equal(first.hidden_states[-2], given.hidden_states[-2])
    assert torch.equal(first.text_embeds, given.pooler_output)
    assert torch.equal(second.hidden_states[-1], given.hidden_states[1])
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.bfloat16}
    assert all(
        torch.equal(a, b.half().float()) for a, b in zip(pipe.vae.parameters(), base.vae.parameters(), strict=True)
    )
    assert pipe.transformer.dtype == torch.float32


def test_two_processes_learn_one_network_of_both_their_data(flags: dict[str, object], tmp_path: Path) -> None:
    """The other's noise and images count, and one of them publishes.

    One process with twice the batch draws other noise: a rank draws its own.
    """
    flags["export_ema_decay"] = 0
    run_script("train_flow", **flags | {"output_dir": tmp_path / "alone"})
    run_worker("flow_worker.py", tmp_path, *words(**flags))
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert_same(second, first)
    assert_same(weights(tmp_path / "run"), first)
    alone = weights(tmp_path / "alone")
    still = {name for name, value in alone.items() if torch.equal(value, first[name])}
    unread = {"add_q_proj.bias", "add_q_proj.weight", "norm_added_q.weight"}  # queries of the text in the last block
    assert still == {"pos_embed.pos_embed", *(f"transformer_blocks.1.attn.{name}" for name in unread)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sample_size": 8}, "sets sample_size, which follow from the pipeline and the data: leave them out"),
        ({"patch": 2}, "is no SD3Transformer2DModel"),
        ({"patch_size": 3}, "--resolution 32 is no multiple of the 12 pixels that the network takes as one"),
        (None, "cannot be read as JSON"),
    ],
)
def test_what_is_no_network_is_refused(
    settings: dict[str, int] | None, said: str, flags: dict[str, object], capsys: pytest.CaptureFixture
) -> None:
    flags["transformer_config"].write_text("{" if settings is None else json.dumps(SHAPE | settings))
    with pytest.raises(SystemExit) as ended:
        run_script("train_flow", **flags)
    assert said in f"{ended.value.code} {capsys.readouterr().err}"


def test_longer_text_than_the_tower_reads_is_refused(flags: dict[str, object], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script("train_flow", **flags | {"text_length": 17})
    assert "at most the 16 that the text tower reads" in f"{ended.value.code} {capsys.readouterr().err}"
