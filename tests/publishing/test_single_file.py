"""A student in one file of the original layout: its names are those of Stable Diffusion's files, and it comes back whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_text_encoder
from tiny_xl import tiny_xl_pipeline
from torch import nn

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.models import ldm_layout as ldm
from cm_diffusers.models.single_file import GUIDANCE, TELLING_BIAS, V_PREDICTION, ZERO_SNR, load_single_file
from cm_diffusers.models.stored import header
from cm_diffusers.models.students import make_student
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record, lcm_scheduler
from cm_diffusers.publishing.single_file import original_layout, write_single_file
from cm_diffusers.record import read_record


def version_2(**components) -> StableDiffusionPipeline:
    tower = tiny_text_encoder()
    tower.config.hidden_act = "gelu"
    for layer in getattr(tower, "text_model", tower).encoder.layers:  # transformers 5.6 made CLIPTextModel flat
        layer.mlp.activation_fn = nn.GELU()
    return tiny_pipeline(text_encoder=tower, **components)


MAKERS = {"1": tiny_pipeline, "2": version_2, "xl": tiny_xl_pipeline}


@pytest.fixture(scope="module", params=MAKERS)
def written(request, tmp_path_factory) -> tuple[StableDiffusionPipeline, Path, Path]:
    """A pipeline, its folder, and a student of it in one file."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = MAKERS[request.param]()
    pipe.save_pretrained(folder / "base")
    scheduler = lcm_scheduler(pipe, 50, 10.0)
    record = lcm_record(str(folder / "base"), "distilled", 6.5, 6.5, 1.0, scheduler)
    write_single_file(lcm_pipeline(pipe, pipe.unet, scheduler), folder / "student.safetensors", record)
    return pipe, folder / "base", folder / "student.safetensors"


def networks(pipe) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def assert_same(pipe, other) -> None:
    for name, network in networks(pipe).items():
        found = getattr(other, name).state_dict()
        assert found.keys() == network.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in network.state_dict().items()), name


def test_a_student_comes_back_from_its_file_and_knows_how_it_was_made(written) -> None:
    pipe, base, file = written
    assert_same(pipe, load_single_file(file, str(base)))
    ours = ConsistencyPipeline.from_single_file(file, config=str(base))
    assert_same(pipe, ours)
    assert ours.record == replace(read_record(file), base_model="base")
    assert ours.manners.guidance == "distilled"
    assert ours.scheduler.config.original_inference_steps == 50


def test_diffusers_alone_reads_it(written) -> None:
    pipe, base, file = written
    assert_same(pipe, type(pipe).from_single_file(str(file), config=str(base)))


REAL = {  # of the configs of the published models
    "1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "xl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# Names, counts and shapes as they stand in v1-5-pruned-emaonly, v2-1_768-ema-pruned and sd_xl_base_1.0.
IN_FILES = {
    "1": (686, {"output_blocks.11.1.proj_out.weight": (320, 320, 1, 1), "output_blocks.8.2.conv.bias": (640,)}),
    "2": (686, {"output_blocks.11.1.proj_out.weight": (320, 320), "input_blocks.10.0.in_layers.2.bias": (1280,)}),
    "xl": (
        1680,
        {
            "label_emb.0.0.weight": (1280, 2816),
            "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
            "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
            "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        },
    ),
}
COMMON = {
    "time_embed.0.weight": (1280, 320),
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "middle_block.1.transformer_blocks.0.attn1.to_out.0.bias": (1280,),
    "middle_block.2.emb_layers.1.weight": (1280, 1280),
    "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "out.0.weight": (320,),
    "out.2.weight": (4, 320, 3, 3),
}


@pytest.mark.parametrize("version", REAL)
def test_names_of_networks_of_true_size(version: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **REAL[version])
    found = {ldm.unet_name(name, unet.config): value for name, value in unet.state_dict().items()}
    count, known = IN_FILES[version]
    assert len(found) == len(unet.state_dict()) == count
    assert {name: tuple(found[name].shape) for name in known | COMMON} == known | COMMON
    back = convert_ldm_unet_checkpoint(ldm.prefixed(ldm.UNET, found), unet.config)
    assert {name: value.shape for name, value in back.items()} == {
        name: value.shape for name, value in unet.state_dict().items()
    }
    assert all(back[name] is value for name, value in zip(unet.state_dict(), found.values(), strict=True))


def test_names_of_a_vae_of_true_size() -> None:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **kinds)
    weights = vae.state_dict()
    found = {ldm.vae_name(name, 4): ldm.as_convolution(name, value) for name, value in weights.items()}
    assert len(found) == len(weights) == 248
    assert tuple(found["encoder.mid.attn_1.q.weight"].shape) == (512, 512, 1, 1)
    assert tuple(found["decoder.up.0.block.0.nin_shortcut.weight"].shape) == (128, 256, 1, 1)
    assert {
        "encoder.down.2.downsample.conv.bias",
        "decoder.up.3.upsample.conv.bias",
        "quant_conv.weight",
    } < found.keys()
    back = convert_ldm_vae_checkpoint(ldm.prefixed(ldm.VAE, found), vae.config)
    assert {name: value.shape for name, value in back.items()} == {name: v.shape for name, v in weights.items()}


def test_an_embedding_of_guidance_has_no_place_there() -> None:
    pipe = tiny_pipeline()
    pipe.unet = make_student(pipe.unet, 16)
    with pytest.raises(
        ValueError, match=r"ComfyUI and A1111 have no input, so .* --unet_time_cond_proj_dim 0, or a LoRA"
    ):
        original_layout(pipe)


def test_a_latent_consistency_model_in_one_file(written, tmp_path) -> None:
    """Others write the embedding, too."""
    pipe, base, file = written
    weights = load_file(file)
    weights[GUIDANCE[0]] = torch.randn(weights[f"{ldm.UNET}time_embed.0.weight"].shape[1], 16)
    save_file(weights, tmp_path / "lcm.safetensors", {"format": "pt"})
    lcm = load_single_file(tmp_path / "lcm.safetensors", str(base))
    kind = StableDiffusionXLPipeline if isinstance(pipe, StableDiffusionXLPipeline) else LatentConsistencyModelPipeline
    assert type(lcm) is kind
    assert type(lcm.scheduler) is LCMScheduler
    assert lcm.unet.config.time_cond_proj_dim == 16
    assert torch.equal(lcm.unet.time_embedding.cond_proj.weight, weights[GUIDANCE[0]])
    with pytest.raises(ValueError, match="is a guidance-distilled student already"):
        load_teacher(TeacherConfig(str(tmp_path / "lcm.safetensors"), single_file_config=str(base)))
    assert (
        ConsistencyPipeline.from_pretrained(tmp_path / "lcm.safetensors", config=str(base)).manners.guidance
        == "embedded"
    )


def test_what_the_network_predicts_travels(tmp_path) -> None:
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipe = tiny_xl_pipeline()
    pipe.save_pretrained(tmp_path / "epsilon")
    pipe.scheduler = scheduler
    record = lcm_record("a/b", "distilled", 2.0, 2.0, 1.0, lcm_scheduler(pipe, 50, 10.0))
    write_single_file(pipe, tmp_path / "v.safetensors", record)
    entries, metadata = header(tmp_path / "v.safetensors")
    assert {V_PREDICTION, ZERO_SNR} < entries.keys()
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    for file in ("v", "bare"):  # by the metadata, and by ComfyUI's marks alone
        save_file(load_file(tmp_path / "v.safetensors"), tmp_path / "bare.safetensors")
        found = load_single_file(tmp_path / f"{file}.safetensors", str(tmp_path / "epsilon")).scheduler.config
        assert (found.prediction_type, found.rescale_betas_zero_snr) == ("v_prediction", True)


@pytest.mark.parametrize(("spread", "prediction"), [(0.2, "v_prediction"), (0.01, "epsilon")])
def test_version_2_shows_what_it_predicts(spread: float, prediction: str, tmp_path, monkeypatch) -> None:
    """Where neither metadata nor a folder of configs says so."""
    pipe = version_2()
    pipe.save_pretrained(tmp_path / "base")
    weights = original_layout(pipe) | {TELLING_BIAS: spread * torch.randn(1000)}
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "2.safetensors")
    monkeypatch.setitem(load_single_file.__globals__["CONFIGS"], "cond_stage_model.model.", str(tmp_path / "base"))
    assert load_single_file(tmp_path / "2.safetensors").scheduler.config.prediction_type == prediction


def edited(file: Path, path: Path, edit) -> Path:
    weights = load_file(file)
    edit(weights)
    save_file(weights, path)
    return path


def drop(weights: dict, beginning: str) -> None:
    for name in [name for name in weights if name.startswith(beginning)]:
        del weights[name]


FAULTS = {
    "lacks weights of its network or VAE; get a whole": lambda w: w.pop(f"{ldm.UNET}out.2.bias"),
    "lacks weights of its network or VAE": lambda w: w.pop(f"{ldm.VAE}quant_conv.bias"),
    "lacks weights of its text_encoder (1, ": lambda w: w.pop(f"{ldm.CLIP}final_layer_norm.bias"),
    "is no whole Stable Diffusion 1, 2 or XL checkpoint": lambda w: drop(w, ldm.UNET),
    "give one with network, VAE and text encoder": lambda w: drop(w, "cond_stage_model."),
    "has quantized weights (1, such as model.diffusion_model.out.2.bias)": lambda w: w.update(
        {f"{ldm.UNET}out.2.bias": w[f"{ldm.UNET}out.2.bias"].char()}
    ),
    "does not fit the architecture": lambda w: w.update({f"{ldm.UNET}out.2.bias": torch.zeros(3)}),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("one")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "base")
    weights = {name: value.contiguous() for name, value in original_layout(pipe).items()}
    save_file(weights, folder / "model.safetensors")
    return folder / "base", folder / "model.safetensors"


@pytest.mark.parametrize("sentence", FAULTS)
def test_a_wrong_file_gets_a_sentence(one, tmp_path, sentence: str) -> None:
    path = edited(one[1], tmp_path / "wrong.safetensors", FAULTS[sentence])
    with pytest.raises(ValueError) as error:  # noqa: PT011 compared below
        load_single_file(path, str(one[0]))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_configs_out_of_reach(one) -> None:
    message = (
        "needs the configs and tokenizers of stable-diffusion-v1-5/stable-diffusion-v1-5, which are not in reach .*fetch "
        r"them with `hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include '\*.json' '\*.txt'`, or name"
    )
    with pytest.raises(ValueError, match=message):
        load_single_file(one[1])


@pytest.mark.parametrize(
    ("name", "sentence"),
    {
        "model.ckpt": "is a pickle by its name",
        "no.safetensors": "There is no file",
        "notes.txt": "no .safetensors",
    }.items(),
)
def test_other_files(name: str, sentence: str, tmp_path) -> None:
    if name != "no.safetensors":
        (tmp_path / name).write_bytes(b"text")
    with pytest.raises(ValueError, match=sentence):
        load_teacher(TeacherConfig(str(tmp_path / name)))


def test_a_teacher_in_one_file(one) -> None:
    base, file = one
    teacher = load_teacher(TeacherConfig(str(file), single_file_config=str(base)))
    assert_same(load_teacher(TeacherConfig(str(base))), teacher)
    assert not any(p.requires_grad for network in networks(teacher).values() for p in network.parameters())
    with pytest.raises(ValueError, match=r"--single_file_config is for a .safetensors file, but .*base is none"):
        load_teacher(TeacherConfig(str(base), single_file_config=str(base)))
    with pytest.raises(ValueError, match="is a single file, which has no revision or variant fp16"):
        load_teacher(TeacherConfig(str(file), single_file_config=str(base), teacher_variant="fp16"))
