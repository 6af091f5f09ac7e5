"""What ConsistencyPipeline loads, what it learns from records, and what it keeps."""

import json
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DModel,
)
from diffusers.pipelines import pipeline_utils
from huggingface_hub import ModelCard
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_unet
from tiny_xl import tiny_xl_pipeline, tiny_xl_unet

from cm_diffusers import record as record_module
from cm_diffusers.evaluation.sampling import load_pipeline
from cm_diffusers.pipelines import ConsistencyImagesPipeline, ConsistencyImg2ImgPipeline, ConsistencyPipeline, loading
from cm_diffusers.pipelines.manners import LCM_GUIDANCE_SCALE
from cm_diffusers.record import RECORD, Record, read_record, write_record
from cm_diffusers.schedulers import ConsistencyScheduler, EDMConsistencyScheduler
from pipelines.test_pipelines import ASSETS, LORA, PROMPTS, STUDENT, TEACHER, images, seeded


pytestmark = pytest.mark.filterwarnings("ignore:Nothing says:UserWarning", "ignore:There is no safety checker")
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def record(**changes) -> Record:
    scheduler = LCMScheduler(original_inference_steps=25, timestep_scaling=5.0)
    entry = {"_class_name": "LCMScheduler", **{k: v for k, v in scheduler.config.items() if k[0] != "_"}}
    return replace(Record("lcm", "base", "distilled", 2.0, 2.0, 1.2, 3, entry), **changes)


def published_lcm(folder: Path) -> Path:
    """The layout of the first published LCMs: no record."""
    stock = tiny_pipeline(unet=tiny_unet(time_cond_proj_dim=16))
    parts = stock.components | {"scheduler": LCMScheduler.from_config(stock.scheduler.config)}
    LatentConsistencyModelPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def lora_folder(folder: Path, pipe: DiffusionPipeline, entry: Record, alpha: int = 8) -> Path:
    """A LoRA with random weights and its record."""
    unet = pipe.unet.__class__.from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict())
    unet.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_k", "conv1"], init_lora_weights=False))
    layers, config = get_peft_model_state_dict(unet), unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    write_record(entry, folder)
    return folder


def test_a_student_is_sampled_as_its_record_says() -> None:
    pipe = ConsistencyPipeline.from_pretrained(STUDENT)
    assert pipe.record == read_record(STUDENT)
    assert (pipe.manners.guidance, pipe.manners.guidance_scale, pipe.manners.num_inference_steps) == (
        "embedded",
        3.0,
        4,
    )
    assert isinstance(pipe.scheduler, ConsistencyScheduler)
    assert pipe.scheduler.config.gamma == 1.0
    assert pipe.scheduler.config.original_inference_steps == 50
    default, explicit = (
        pipe(PROMPTS, generator=seeded(), output_type="np", **options).images
        for options in ({}, {"guidance_scale": 3.0, "num_inference_steps": 4})
    )
    np.testing.assert_array_equal(default, explicit)


def test_a_lora_folder_loads_its_base_model() -> None:
    pipe = ConsistencyPipeline.from_pretrained(LORA)
    assert pipe.record == read_record(LORA)
    assert pipe.config._name_or_path == pipe.record.base_model
    assert (pipe.manners.guidance, pipe.manners.guidance_scale, pipe.manners.num_inference_steps) == (
        "distilled",
        1.0,
        4,
    )
    assert pipe.get_active_adapters() == ["default_0"]
    assert pipe.unet.peft_config["default_0"].lora_alpha == 16


def test_a_lora_whose_base_model_is_gone_says_so(tmp_path: Path) -> None:
    lora_folder(tmp_path / "lora", tiny_pipeline(), record(base_model=str(tmp_path / "gone")))
    with pytest.raises(ValueError, match=r"belongs on '.*gone', which cannot be loaded .*load that base model"):
        ConsistencyPipeline.from_pretrained(tmp_path / "lora")


def test_a_folder_without_pipeline_or_record_says_so(tmp_path: Path) -> None:
    shutil.copy(LORA / LORA_WEIGHTS, tmp_path)
    with pytest.raises(ValueError, match=r"neither a model_index\.json nor the record of a LoRA"):
        ConsistencyPipeline.from_pretrained(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    message = "has no weights for unet; make or download them, its README.md may say how"
    for kind in (ConsistencyPipeline, ConsistencyImg2ImgPipeline):
        with pytest.raises(ValueError, match=message):
            kind.from_pretrained(tmp_path)
    ConsistencyPipeline.from_pretrained(tmp_path, unet=tiny_unet())
    for kind in (ConsistencyPipeline, ConsistencyImagesPipeline):
        with pytest.raises(ValueError, match="fashion_cd' has no weights for unet, vae; make"):
            kind.from_pretrained(ASSETS / "fashion_cd")


def test_a_published_lcm_works_without_a_record(tmp_path: Path) -> None:
    pipe = ConsistencyPipeline.from_pretrained(published_lcm(tmp_path))
    assert pipe.record is None
    assert (pipe.manners.guidance, pipe.manners.lowest) == ("embedded", None)
    stock = LatentConsistencyModelPipeline.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = pipe(PROMPTS, generator=seeded(), output_type="np").images
    expected = images(stock, num_inference_steps=4, guidance_scale=LCM_GUIDANCE_SCALE)
    np.testing.assert_allclose(mine, expected, atol=1e-4)


def test_an_lcm_unet_on_a_base_model_is_embedded(tmp_path: Path) -> None:
    tiny_xl_pipeline().save_pretrained(tmp_path)
    unet = tiny_xl_unet(time_cond_proj_dim=16)
    pipe = ConsistencyPipeline.from_pretrained(tmp_path, unet=unet)
    assert pipe.unet is unet
    assert pipe.manners.guidance == "embedded"
    assert isinstance(pipe.scheduler, ConsistencyScheduler)


def test_an_sdxl_base_model_loads_with_its_own_parts(tmp_path: Path) -> None:
    tiny_xl_pipeline().save_pretrained(tmp_path)
    pipe = ConsistencyPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert pipe.is_xl
    assert pipe.config.force_zeros_for_empty_prompt is True
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder_2.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "gamma", "scalings"), [(TCDScheduler, 0.3, "none"), (EulerDiscreteScheduler, 1, "lcm")]
)
def test_the_scheduler_follows_the_index(kind, gamma: float, scalings: str, tmp_path: Path) -> None:
    stock = tiny_pipeline(prediction_type="v_prediction")
    stock.scheduler = kind.from_config(stock.scheduler.config, beta_end=0.02)
    stock.save_pretrained(tmp_path)
    config = ConsistencyPipeline.from_pretrained(tmp_path).scheduler.config
    assert (config.gamma, config.boundary_scalings) == (gamma, scalings)
    assert (config.prediction_type, config.beta_end, config.beta_schedule) == ("v_prediction", 0.02, "scaled_linear")


def test_fields_left_at_another_schedulers_default_are_kept() -> None:
    """`from_config` alone drops what a scheduler was not told explicitly, and takes its own default."""
    stock = tiny_xl_pipeline(scheduler=DDIMScheduler())
    config = ConsistencyPipeline.from_pipe(stock).scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("linear", 0.0001, 0.02)
    assert config.clip_sample is False  # latents are no pixels


@pytest.mark.parametrize("kind", [LCMScheduler, ConsistencyScheduler])
def test_a_scheduler_of_the_caller_is_kept(kind) -> None:
    mine = kind.from_pretrained(STUDENT, subfolder="scheduler")
    assert ConsistencyPipeline.from_pretrained(STUDENT, scheduler=mine).scheduler is mine
    pipe = ConsistencyPipeline.from_pretrained(TEACHER, scheduler=mine)
    pipe.load_lora_weights(LORA)
    assert pipe.scheduler is mine
    pipe = ConsistencyPipeline.from_pretrained(TEACHER)
    pipe.scheduler = mine
    pipe.load_lora_weights(LORA)
    assert pipe.scheduler is mine
    assert ConsistencyPipeline.from_pipe(pipe, scheduler=mine).scheduler is mine


@pytest.mark.parametrize("relative", [None, ConsistencyImg2ImgPipeline, AutoPipelineForImage2Image])
@pytest.mark.parametrize("part", [lambda p: p.unload_lora_weights(), lambda p: p.delete_adapters("default_0")])
def test_a_lora_brings_its_record_and_takes_it_away(relative, part, tmp_path: Path) -> None:
    pipe = ConsistencyPipeline.from_pipe(tiny_pipeline())
    before, scheduler = record(recommended_num_inference_steps=7), pipe.scheduler
    pipe.register_to_config(record=asdict(before))
    pipe.load_lora_weights(lora_folder(tmp_path, pipe, record()))
    assert pipe.record == record()
    assert pipe.scheduler.config.original_inference_steps == 25
    assert (pipe.manners.guidance_scale, pipe.manners.num_inference_steps) == (1.2, 3)
    pipe = pipe if relative is None else relative.from_pipe(pipe)
    part(pipe)
    assert pipe.record == before
    assert pipe.scheduler is scheduler
    pipe.load_lora_weights(tmp_path / LORA_WEIGHTS)
    assert pipe.record == record()


def test_a_fused_lora_stays_on_record() -> None:
    pipe = ConsistencyPipeline.from_pretrained(LORA)
    expected = images(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert pipe.record == read_record(LORA)
    np.testing.assert_allclose(images(pipe), expected, atol=1e-4)


def test_only_the_last_of_several_loras_takes_the_record_away() -> None:
    pipe = ConsistencyPipeline.from_pretrained(TEACHER)
    for name in "ab":
        pipe.load_lora_weights(LORA, adapter_name=name)
    pipe.delete_adapters("a")
    assert pipe.record == read_record(LORA)
    pipe.delete_adapters("b")
    assert pipe.record is None


def test_a_fused_lora_survives_another_one_and_changes_of_class() -> None:
    pipe = ConsistencyPipeline.from_pretrained(LORA)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    sibling = ConsistencyImg2ImgPipeline.from_pipe(pipe)
    assert sibling.num_fused_loras == 1
    sibling.load_lora_weights(LORA, adapter_name="z")
    sibling.unload_lora_weights()
    assert sibling.record == read_record(LORA)


@pytest.mark.parametrize("kind", [ConsistencyPipeline, StableDiffusionPipeline])
def test_a_fused_lora_without_record_is_not_taken_for_a_base_model(kind, tmp_path: Path) -> None:
    pipe = kind.from_pretrained(TEACHER)
    shutil.copy(LORA / LORA_WEIGHTS, tmp_path)
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe = ConsistencyPipeline.from_pipe(pipe)
    relatives = [pipe, ConsistencyImg2ImgPipeline.from_pipe(pipe), AutoPipelineForImage2Image.from_pipe(pipe)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for relative, extra in zip(relatives, [{}, *[{"image": torch.rand(1, 3, 32, 32)}] * 2], strict=True):
            relative(PROMPTS, num_inference_steps=1, **extra)


@pytest.mark.parametrize(
    ("width", "wrong", "guidance"),
    [(16, "distilled", "embedded"), (16, "none", "embedded"), (None, "embedded", "distilled")],
)
def test_a_lora_that_contradicts_the_unet_about_guidance(width, wrong: str, guidance: str, tmp_path: Path) -> None:
    """A "distilled" record once switched off the guidance embedding of an embedded student."""
    pipe = ConsistencyPipeline.from_pipe(tiny_pipeline(unet=tiny_unet(time_cond_proj_dim=width)))
    pipe.register_to_config(record=asdict(record(guidance=guidance)))
    before, manners = pipe.record, pipe.manners
    with pytest.warns(UserWarning, match=f"The record says that guidance is '{wrong}', but this network takes"):
        pipe.load_lora_weights(lora_folder(tmp_path, pipe, record(guidance=wrong)))
    assert (pipe.record, pipe.manners) == (before, manners)
    pipe.register_to_config(record=asdict(record(guidance=wrong)))
    assert pipe.manners.guidance == guidance


@pytest.mark.parametrize("fuse", [False, True])
def test_a_loaded_lora_is_not_saved_in_a_pipeline_folder(fuse: bool, tmp_path: Path) -> None:
    pipe = ConsistencyPipeline.from_pretrained(LORA)
    if fuse:
        pipe.fuse_lora()
    with pytest.raises(
        ValueError, match=r"call fuse_lora\(\) and then unload_lora_weights\(\), or .* save_lora_weights"
    ):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_a_kohya_lora_keeps_its_alpha(make, tmp_path: Path) -> None:
    pipe = ConsistencyPipeline.from_pipe(make())
    lora_folder(tmp_path / "peft", pipe, record(), alpha=2)
    kohya = {}
    for key, value in load_file(tmp_path / "peft" / LORA_WEIGHTS).items():
        path, part = key.removeprefix("unet.").split(".lora_")
        name = f"lora_unet_{path.replace('.', '_')}"
        kohya[f"{name}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value
        kohya[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    plain = images(pipe, num_inference_steps=1, guidance_scale=1.0)
    pipe.load_lora_weights(tmp_path / "peft")
    expected = images(pipe, num_inference_steps=1, guidance_scale=1.0)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "kohya.safetensors")
    np.testing.assert_allclose(images(pipe, num_inference_steps=1, guidance_scale=1.0), expected, atol=1e-4)
    assert not np.allclose(plain, expected, atol=1e-2)


def foreign_loras(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    other = tiny_unet(block_out_channels=(16, 32), cross_attention_dim=32)
    other.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    narrower = {f"unet.{name}": value for name, value in get_peft_model_state_dict(other).items()}
    return {
        "narrower": narrower,
        "deeper": {key.replace("down_blocks.1", "down_blocks.7"): value for key, value in narrower.items()},
        "transformer": {key.replace("unet", "transformer"): value for key, value in narrower.items()},
        "last layer": {**_fitting(), **dict(list(narrower.items())[-2:])},
        "text encoder": {**_fitting(), **_for_text_encoder("layers.0.self_attn.q_proj", 8)},
        "text layer": {**_fitting(), **_for_text_encoder("layers.9.self_attn.q_proj", 32)},
        "towers": {**_fitting(), "text_encoder_2.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 24)},
    }


def _for_text_encoder(layer: str, width: int) -> dict[str, torch.Tensor]:
    name = f"text_encoder.text_model.encoder.{layer}.lora_"
    return {f"{name}A.weight": torch.zeros(4, width), f"{name}B.weight": torch.zeros(width, 4)}


def _fitting() -> dict[str, torch.Tensor]:
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=4, target_modules=["conv1"]))
    return {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("narrower", "another architecture: its layer .* reads 32 features, the UNet's 64"),
        ("deeper", "another architecture: the UNet has no layer 'down_blocks.7"),
        ("transformer", "layers for transformer, which this pipeline does not have"),
        ("last layer", "another architecture"),
        ("text encoder", "its layer '(text_model.)?encoder.*q_proj' reads 8 features, the text_encoder's 32"),
        ("text layer", "the text_encoder has no layer '(text_model.)?encoder.layers.9"),
        ("towers", "layers for text_encoder_2, which this pipeline does not have"),
    ],
)
def test_a_lora_of_another_architecture_leaves_nothing_behind(kind: str, message: str, tmp_path: Path) -> None:
    save_file(foreign_loras(tmp_path)[kind], tmp_path / LORA_WEIGHTS)
    pipe = ConsistencyPipeline.from_pipe(tiny_pipeline())
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tmp_path)
    assert pipe._adapters() == set()
    after = pipe.unet.state_dict()
    assert {name for name in after if "lora" in name} == set()
    assert all(
        torch.equal(value, after.get(name, after.get(name.replace("conv1.", "conv1.base_layer."))))
        for name, value in before.items()
    )


def test_a_broken_lora_says_so(tmp_path: Path) -> None:
    (tmp_path / LORA_WEIGHTS).write_bytes((LORA / LORA_WEIGHTS).read_bytes()[:-100])
    pipe = ConsistencyPipeline.from_pretrained(TEACHER)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        pipe.load_lora_weights(tmp_path)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (LORA, {"weight_name": "nope.safetensors"}, "There is no nope.safetensors in '.*fashion_lcm_lora'"),
        (LORA, {"subfolder": "nope"}, "There is no safetensors file in '.*nope'"),
        (LORA / "gone", {}, "There is no LoRA '.*gone': neither such a folder nor such a file"),
        ("gone.safetensors", {}, "There is no LoRA 'gone.safetensors'"),
        ("pickled", {"weight_name": "x.bin"}, "'x.bin' is no safetensors file.*use_safetensors=False"),
        ("pickled/x.bin", {}, "'x.bin' is no safetensors file"),
        ("pickled", {}, "There is no safetensors file in 'pickled'"),
    ],
)
def test_a_lora_that_cannot_be_read_says_so(source, options: dict, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pickled").mkdir()
    torch.save({}, "pickled/x.bin")
    with pytest.raises(ValueError, match=message):
        ConsistencyPipeline.from_pipe(tiny_pipeline()).load_lora_weights(source, **options)


@pytest.mark.parametrize("place", ["elsewhere", "beside"])
def test_a_base_model_is_found_from_the_lora(place: str, tmp_path: Path, monkeypatch) -> None:
    """Its record says "assets/fashion_teacher"."""
    monkeypatch.chdir(tmp_path)
    lora = LORA
    if place == "beside":
        lora = tmp_path / "moved" / "lora"
        shutil.copytree(LORA, lora)
        shutil.copytree(TEACHER, tmp_path / "moved" / TEACHER.name)
    pipe = ConsistencyPipeline.from_pretrained(lora)
    assert Path(pipe.config._name_or_path) == lora.parent / TEACHER.name


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_an_sdxl_lora_on_stable_diffusion_is_refused(make, tmp_path: Path) -> None:
    other = {tiny_pipeline: tiny_xl_pipeline, tiny_xl_pipeline: tiny_pipeline}[make]()
    folder = lora_folder(tmp_path, other, record())
    with pytest.raises(ValueError, match="another architecture"):
        ConsistencyPipeline.from_pipe(make()).load_lora_weights(folder)


def test_saving_loses_nothing(tmp_path: Path) -> None:
    pipe = ConsistencyPipeline.from_pretrained(STUDENT)
    expected = images(pipe)
    pipe.save_pretrained(tmp_path)
    assert read_record(tmp_path) == pipe.record
    again = ConsistencyPipeline.from_pretrained(tmp_path)
    assert again.record == pipe.record
    np.testing.assert_array_equal(images(again), expected)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_a_pipeline_without_record_survives_saving(make, tmp_path: Path) -> None:
    pipe = ConsistencyPipeline.from_pipe(make())
    expected = images(pipe)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / RECORD).exists()
    np.testing.assert_array_equal(images(ConsistencyPipeline.from_pretrained(tmp_path)), expected)


def test_the_record_is_saved_after_the_weights_and_never_a_stale_one(tmp_path: Path, monkeypatch) -> None:
    student = ConsistencyPipeline.from_pretrained(STUDENT)
    student.save_pretrained(tmp_path)
    ConsistencyPipeline.from_pretrained(TEACHER).save_pretrained(tmp_path)
    assert ConsistencyPipeline.from_pretrained(tmp_path).record is None
    monkeypatch.setattr(student.vae, "save_pretrained", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        student.save_pretrained(tmp_path)
    assert not [*tmp_path.glob("cm_diffusers*")]


def test_an_upload_holds_the_record(tmp_path: Path, monkeypatch) -> None:
    uploaded = []
    monkeypatch.setattr(pipeline_utils, "create_repo", lambda repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(pipeline_utils, "load_or_create_model_card", lambda *args, **options: ModelCard("---\n---\n"))
    monkeypatch.setattr(
        ConsistencyPipeline,
        "_upload_folder",
        lambda self, folder, *args, **options: uploaded.append(read_record(folder)),
    )
    ConsistencyPipeline.from_pretrained(STUDENT).save_pretrained(str(tmp_path), push_to_hub=True)
    assert uploaded == [read_record(STUDENT)]


def test_from_pipe_shares_parts_record_and_dtypes() -> None:
    """In diffusers it casts every shared component to float32."""
    pipe = ConsistencyPipeline.from_pretrained(STUDENT)
    pipe.unet.to(torch.bfloat16)
    sibling = ConsistencyImg2ImgPipeline.from_pipe(pipe)
    assert sibling.unet is pipe.unet
    assert (sibling.unet.dtype, sibling.vae.dtype) == (torch.bfloat16, torch.float32)
    assert sibling.record == pipe.record


def test_from_pipe_of_a_stock_pipeline_finds_the_record() -> None:
    stock = DiffusionPipeline.from_pretrained(STUDENT)
    pipe = ConsistencyPipeline.from_pipe(stock)
    assert pipe.record == read_record(STUDENT)
    expected = images(ConsistencyPipeline.from_pretrained(STUDENT), guidance_scale=None)
    np.testing.assert_array_equal(images(pipe, guidance_scale=None), expected)
    lora = LatentConsistencyModelPipeline.from_pipe(ConsistencyPipeline.from_pretrained(LORA))
    assert ConsistencyPipeline.from_pipe(lora).record == read_record(LORA)  # although its folder is the base model's


def test_from_pipe_asks_no_hub(monkeypatch) -> None:
    stock, asked = tiny_pipeline(), []
    stock.register_to_config(_name_or_path="someone/student")
    monkeypatch.setattr(
        record_module, "hf_hub_download", lambda *args, **options: asked.append(options) or LORA / RECORD
    )
    assert ConsistencyPipeline.from_pipe(stock).record == read_record(LORA)
    assert [options["local_files_only"] for options in asked] == [True]


def test_from_pipe_keeps_a_consistency_scheduler() -> None:
    stock = DiffusionPipeline.from_pretrained(STUDENT)
    stock.scheduler = ConsistencyScheduler.from_config(stock.scheduler.config, gamma=0.0)
    stock.scheduler.noise_sampler = lambda shape, *where: torch.zeros(shape)
    assert ConsistencyPipeline.from_pipe(stock).scheduler is stock.scheduler


def test_a_sibling_made_by_hand_knows_as_much() -> None:
    """AutoPipeline's `from_pipe` makes siblings so."""
    pipe = ConsistencyPipeline.from_pretrained(TEACHER)
    sibling = ConsistencyImg2ImgPipeline(**pipe.components, **pipe.parameters)
    with pytest.warns(UserWarning, match="Nothing says that this model was distilled"):
        sibling(PROMPTS, image=torch.rand(1, 3, 32, 32), num_inference_steps=1)
    sibling.load_lora_weights(LORA)
    assert sibling.record == read_record(LORA)
    assert sibling.scheduler is not pipe.scheduler


def test_only_safetensors_are_read_unless_the_caller_says_otherwise(tmp_path: Path) -> None:
    folder = published_lcm(tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no safetensors but pickles for unet.*use_safetensors=False"):
        ConsistencyPipeline.from_pretrained(folder)


def test_a_variant_is_passed_on(tmp_path: Path) -> None:
    folder = published_lcm(tmp_path)
    LatentConsistencyModelPipeline.from_pretrained(folder).save_pretrained(folder, variant="fp16")
    for weights in folder.glob("*/*model.safetensors"):
        weights.unlink()
    assert ConsistencyPipeline.from_pretrained(folder, variant="fp16").manners.guidance == "embedded"


def test_a_newer_record_with_more_fields_is_read(tmp_path: Path) -> None:
    shutil.copytree(STUDENT, tmp_path / "student")
    content = json.loads((STUDENT / RECORD).read_text())
    (tmp_path / "student" / RECORD).write_text(json.dumps(content | {"invented": 1}))
    assert ConsistencyPipeline.from_pretrained(tmp_path / "student").record == read_record(STUDENT)


def test_the_stock_classes_take_a_stock_folder_with_our_record(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    write_record(record(recommended_guidance_scale=1.0), tmp_path)
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path), StableDiffusionPipeline)
    pipe = ConsistencyPipeline.from_pretrained(tmp_path)
    assert pipe.record.recommended_num_inference_steps == 3
    assert pipe.scheduler.config.timestep_scaling == 5.0


def test_a_base_model_is_found_from_a_folder_above_the_lora(tmp_path: Path, monkeypatch) -> None:
    """Its record says "assets/fashion_teacher"; a folder of that name that holds no pipeline is passed over."""
    shutil.copytree(LORA, tmp_path / "project/runs/mine/lora")
    shutil.copytree(TEACHER, tmp_path / "project/assets/fashion_teacher")
    (tmp_path / "elsewhere/assets/fashion_teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    pipe = ConsistencyPipeline.from_pretrained(tmp_path / "project/runs/mine/lora")
    assert Path(pipe.config._name_or_path) == tmp_path / "project/assets/fashion_teacher"


@pytest.mark.parametrize("load", [ConsistencyPipeline.from_pretrained, lambda lora: load_pipeline(str(lora))])
@pytest.mark.parametrize("own", [True, False])
def test_a_lora_on_itself_or_on_another_is_refused(load, own: bool, tmp_path: Path) -> None:
    for name, base in (("a", "a" if own else "b"), ("b", "a")):
        shutil.copytree(LORA, tmp_path / name)
        write_record(replace(read_record(LORA), base_model=str(tmp_path / base)), tmp_path / name)
    with pytest.raises(ValueError, match="as the base model, which is no pipeline; name one") as error:
        load(tmp_path / "a")
    assert "\n" not in str(error.value)


def test_a_repository_that_is_its_own_base_model_is_refused(monkeypatch) -> None:
    record = replace(read_record(LORA), base_model="ada/b")
    monkeypatch.setattr(loading, "read_record", lambda *args, **kwargs: record)
    monkeypatch.setattr(loading, "is_pipeline", lambda *args: False)
    with pytest.raises(ValueError, match="'ada/b' as the base model, which is no pipeline"):
        ConsistencyPipeline.from_pretrained("ada/b")
    with pytest.raises(ValueError, match=r"belongs on 'ada/b', which cannot be loaded \(that is a LoRA as well\)"):
        ConsistencyPipeline.from_pretrained("ada/a")


@pytest.mark.parametrize("kind", ["unprompted", "through ConsistencyPipeline", "lora"])
def test_a_base_model_that_nothing_takes_is_refused(kind: str, tmp_path: Path) -> None:
    cls, source = ConsistencyPipeline, LORA
    if kind != "lora":
        cls = ConsistencyImagesPipeline if kind == "unprompted" else ConsistencyPipeline
        source = tmp_path
        shape = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        unet = UNet2DModel(8, layers_per_block=1, norm_num_groups=2, add_attention=False, **shape)
        ConsistencyImagesPipeline(unet, EDMConsistencyScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="base_model is taken by ConsistencyVideoPipeline alone; leave it out"):
        cls.from_pretrained(source, base_model=str(TEACHER))
