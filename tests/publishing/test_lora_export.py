"""A LoRA in both published forms gives the network that was trained; upstream's conversions would not."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import lora_base
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_unet
from tiny_xl import tiny_xl_pipeline
from torch import Tensor

from cm_diffusers.evaluation.sampling import load_pipeline
from cm_diffusers.models.families.unet import LCM_LORA_TARGETS
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.pipelines.lora import load_lora
from cm_diffusers.publishing.lora_export import Lora
from cm_diffusers.publishing.pipelines import lcm_record, save_lora


TOP = "pytorch_lora_weights.safetensors"


def tiny_v2_pipeline(**components: object) -> StableDiffusionPipeline:
    """Stable Diffusion 2's: linear projections, velocities."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = tiny_unet(use_linear_projection=True)
    return tiny_pipeline(prediction_type="v_prediction", unet=unet, **components)


PIPELINES = {"sd": tiny_pipeline, "sd2": tiny_v2_pipeline, "sdxl": tiny_xl_pipeline}
RANK, ALPHA = 4, 8
ALL = pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
Make = Callable[[], StableDiffusionPipeline]


@pytest.fixture(autouse=True)
def _peft_warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # peft's sign of keys that found no place
        yield


def adapted(make: Make, **config: object) -> StableDiffusionPipeline:
    """Every layer LCM-LoRA adapts, neither at its initial zero nor with alpha = rank."""
    pipe = make()
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": LCM_LORA_TARGETS, "init_lora_weights": False}
    pipe.unet.add_adapter(LoraConfig(**{**settings, **config}))
    pipe.unet.eval()
    return pipe


def published(pipe: StableDiffusionPipeline, folder: Path, base: str = "somebody/base", fp16: bool = False) -> Path:
    scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    save_lora(pipe.unet, folder, lcm_record(base, "distilled", 3.0, 3.0, 1.0, scheduler), fp16=fp16)
    return folder


def output(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 16, unet.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.randn(1, 20, generator=generator), "time_ids": torch.full((1, 6), 32.0)}
    x = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([500]), states, added_cond_kwargs=added).sample


def loaded(make: Make, source: Path, **options: object) -> UNet2DConditionModel:
    pipe = make()
    pipe.load_lora_weights(source, **options)
    return pipe.unet.eval()


@ALL
def test_a_plain_load_of_the_folder_gives_the_trained_network_in_silence(make: Make, tmp_path: Path) -> None:
    pipe = adapted(make)
    folder = published(pipe, tmp_path / "lora")
    wanted = output(pipe.unet)
    assert (output(make().unet) - wanted).abs().max() > 1e-2
    with mock.patch.object(lora_base.logger, "warning") as warning:
        unet = loaded(make, folder)
    assert not [call for call in warning.call_args_list if "more than one weights file" in call.args[0]]
    torch.testing.assert_close(output(unet), wanted, atol=1e-6, rtol=1e-6)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        TOP,
        "peft/adapter_model.safetensors",
        "peft/adapter_config.json",
        "cm_diffusers.json",
    }


def test_peft_reads_its_own_form(tmp_path: Path) -> None:
    pipe = adapted(tiny_pipeline, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 3})
    folder = published(pipe, tmp_path / "lora", fp16=True)
    unet = PeftModel.from_pretrained(tiny_pipeline().unet, folder / "peft").base_model.model
    assert torch.equal(output(unet.eval()), output(pipe.unet))


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_ours_take_the_exact_form_and_others_half_precision(make: Make, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "base")
    pipe = adapted(make)
    folder = published(pipe, tmp_path / "lora", str(tmp_path / "base"), fp16=True)
    tensors = load_file(folder / TOP)
    kinds = {(name.rpartition(".")[2], value.dtype) for name, value in tensors.items()}
    assert kinds == {("weight", torch.float16), ("alpha", torch.float32)}
    wanted = output(pipe.unet)
    apart = (output(loaded(make, folder)) - wanted).abs().max()
    assert 0 < apart < 2e-3
    ours = ConsistencyPipeline.from_pretrained(folder, requires_safety_checker=False)
    stock = make()
    load_lora(stock, folder)
    for unet in (ours.unet, stock.unet, load_pipeline(str(folder)).unet):
        assert torch.equal(output(unet.eval()), wanted)
    ours.unload_lora_weights()
    ours.load_lora_weights(folder, weight_name=TOP)  # asked for by name
    assert 0 < (output(ours.unet.eval()) - wanted).abs().max() < 2e-3


def test_older_folders_still_load(tmp_path: Path) -> None:
    """PEFT's tensors at the top, kohya's in `comfyui/`: as all folders were written once."""
    tiny_pipeline().save_pretrained(tmp_path / "base")
    pipe = adapted(tiny_pipeline)
    folder = published(pipe, tmp_path / "lora", str(tmp_path / "base"))
    (folder / "comfyui").mkdir()
    (folder / TOP).rename(folder / "comfyui/lcm_lora_base.safetensors")
    shutil.rmtree(folder / "peft")
    lora = Lora.of(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=lora.tensors, unet_lora_adapter_metadata=lora.config
    )
    ours = ConsistencyPipeline.from_pretrained(folder, requires_safety_checker=False)
    for unet in (ours.unet, load_pipeline(str(folder)).unet, loaded(tiny_pipeline, folder)):
        assert torch.equal(output(unet.eval()), output(pipe.unet))


def kohya(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    return Lora.of(pipe.unet).kohya(torch.float32)


def test_every_layer_has_the_alpha_that_gives_its_scale() -> None:
    pipe = adapted(tiny_pipeline, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 3})
    tensors = kohya(pipe)
    alphas = {name: value.item() for name, value in tensors.items() if name.endswith(".alpha")}
    ranks = {name.split(".")[0]: len(value) for name, value in tensors.items() if "lora_down" in name}
    assert {name: alpha for name, alpha in alphas.items() if not name.endswith("conv1.alpha")} == {
        name: float(ALPHA) for name in alphas if not name.endswith("conv1.alpha")
    }
    assert {alpha for name, alpha in alphas.items() if name.endswith("conv1.alpha")} == {3.0}
    assert {rank for name, rank in ranks.items() if name.endswith("to_q")} == {2}
    assert {rank for name, rank in ranks.items() if not name.endswith("to_q")} == {RANK}
    described = Lora.of(pipe.unet).header
    assert (described["ss_network_dim"], described["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    root = kohya(adapted(tiny_pipeline, use_rslora=True))
    assert {value.item() for name, value in root.items() if name.endswith(".alpha")} == {ALPHA * RANK**0.5}


@ALL
def test_patterns_survive(make: Make, tmp_path: Path) -> None:
    pipe = adapted(make, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 3})
    folder = published(pipe, tmp_path / "lora")
    torch.testing.assert_close(output(loaded(make, folder)), output(pipe.unet), atol=1e-6, rtol=1e-6)


def test_layers_are_named_and_shaped_as_kohya_does(tmp_path: Path) -> None:
    pipe = adapted(tiny_pipeline)
    folder = published(pipe, tmp_path / "lora")
    tensors = load_file(folder / TOP)
    linear = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert tensors[f"{linear}.lora_down.weight"].shape == (RANK, 64)
    assert tensors[f"{conv}.lora_down.weight"].shape == (RANK, 32, 3, 3)
    assert tensors[f"{conv}.lora_up.weight"].shape == (32, RANK, 1, 1)
    assert len(tensors) == 3 * len(get_peft_model_state_dict(pipe.unet)) / 2
    with safe_open(folder / TOP, "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(RANK), str(ALPHA))
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": str(RANK), "conv_alpha": str(ALPHA)}
    assert metadata["modelspec.title"] == "lcm_lora_base"


@pytest.mark.parametrize(
    ("width", "version", "architecture"),
    [
        (768, "sd_v1", "stable-diffusion-v1/lora"),
        (1024, "sd_v2", "stable-diffusion-v2-512/lora"),
        (2048, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_base_model_is_told_by_its_width(width: int, version: str, architecture: str, tmp_path: Path) -> None:
    unet = adapted(tiny_pipeline).unet
    unet.register_to_config(cross_attention_dim=width)
    Lora.of(unet).writer("a title", "v_prediction")(tmp_path)
    with safe_open(tmp_path / TOP, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_v2"] == str(version == "sd_v2")
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.prediction_type"] == "v"


def test_upstreams_conversion_to_diffusers_names_loses_the_attention_layers(tmp_path: Path) -> None:
    """Why `Lora` keeps PEFT's names, and writes kohya's. When this fails, upstream has mended it."""
    pipe = adapted(tiny_pipeline)
    names = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    save_file({f"unet.{name}": value.contiguous() for name, value in names.items()}, tmp_path / TOP)
    with pytest.warns(RuntimeWarning):
        unet = loaded(tiny_pipeline, tmp_path, weight_name=TOP)
    assert (output(unet) - output(pipe.unet)).abs().max() > 1e-2


def test_upstreams_conversion_to_kohya_takes_the_rank_for_alpha() -> None:
    """Why `Lora.kohya` is ours. When this fails, upstream has mended it."""
    pipe = adapted(tiny_pipeline)
    state = {f"unet.{name}": value for name, value in get_peft_model_state_dict(pipe.unet).items()}
    theirs = convert_state_dict_to_kohya(state)
    assert {value.item() for name, value in theirs.items() if name.endswith(".alpha")} == {RANK}
    ours = kohya(pipe)
    assert {value.item() for name, value in ours.items() if name.endswith(".alpha")} == {ALPHA}
