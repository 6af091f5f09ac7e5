"""A LoRA in both published forms gives the network that was trained; upstream's conversions would not."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import lora_base
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline
from tiny_xl import tiny_xl_pipeline
from torch import Tensor

from cm_diffusers.models.adapters import LCM_LORA_TARGETS
from cm_diffusers.publishing.lora_export import kohya_metadata, kohya_state_dict
from cm_diffusers.publishing.pipelines import lcm_record, save_lora


PEFT_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "comfyui/lcm_lora_base.safetensors"
PIPELINES = {"sd": tiny_pipeline, "sdxl": tiny_xl_pipeline}
RANK, ALPHA = 4, 8
BOTH = pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
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


def published(pipe: StableDiffusionPipeline, folder: Path) -> Path:
    scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    save_lora(pipe.unet, folder, lcm_record("somebody/base", "distilled", 3.0, 3.0, 1.0, scheduler))
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


@BOTH
@pytest.mark.parametrize("file", [PEFT_FILE, KOHYA_FILE])
def test_both_files_give_the_trained_network(make: Make, file: str, tmp_path: Path) -> None:
    pipe = adapted(make)
    folder = published(pipe, tmp_path / "lora")
    wanted = output(pipe.unet)
    assert (output(make().unet) - wanted).abs().max() > 1e-2
    path = folder / file
    torch.testing.assert_close(output(loaded(make, path.parent, weight_name=path.name)), wanted, atol=1e-5, rtol=1e-4)


def test_a_plain_load_of_the_folder_takes_the_peft_file_in_silence(tmp_path: Path) -> None:
    pipe = adapted(tiny_pipeline)
    folder = published(pipe, tmp_path / "lora")
    with mock.patch.object(lora_base.logger, "warning") as warning:
        unet = loaded(tiny_pipeline, folder)
    assert not [call for call in warning.call_args_list if "more than one weights file" in call.args[0]]
    torch.testing.assert_close(output(unet), output(pipe.unet), atol=1e-5, rtol=1e-4)


def test_every_layer_has_the_alpha_that_gives_its_scale() -> None:
    pipe = adapted(tiny_pipeline, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 3})
    tensors = kohya_state_dict(pipe.unet)
    alphas = {name: value.item() for name, value in tensors.items() if name.endswith(".alpha")}
    ranks = {name.split(".")[0]: len(value) for name, value in tensors.items() if "lora_down" in name}
    assert {name: alpha for name, alpha in alphas.items() if not name.endswith("conv1.alpha")} == {
        name: float(ALPHA) for name in alphas if not name.endswith("conv1.alpha")
    }
    assert {alpha for name, alpha in alphas.items() if name.endswith("conv1.alpha")} == {3.0}
    assert {rank for name, rank in ranks.items() if name.endswith("to_q")} == {2}
    assert {rank for name, rank in ranks.items() if not name.endswith("to_q")} == {RANK}
    described = kohya_metadata(pipe.unet, "a title", "epsilon")
    assert (described["ss_network_dim"], described["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    root = kohya_state_dict(adapted(tiny_pipeline, use_rslora=True).unet)
    assert {value.item() for name, value in root.items() if name.endswith(".alpha")} == {ALPHA * RANK**0.5}


def test_patterns_survive_both_files(tmp_path: Path) -> None:
    pipe = adapted(tiny_pipeline, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 3})
    folder = published(pipe, tmp_path / "lora")
    for path in (folder / PEFT_FILE, folder / KOHYA_FILE):
        unet = loaded(tiny_pipeline, path.parent, weight_name=path.name)
        torch.testing.assert_close(output(unet), output(pipe.unet), atol=1e-5, rtol=1e-4)


def test_layers_are_named_and_shaped_as_kohya_does(tmp_path: Path) -> None:
    pipe = adapted(tiny_pipeline)
    folder = published(pipe, tmp_path / "lora")
    tensors = load_file(folder / KOHYA_FILE)
    linear = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert tensors[f"{linear}.lora_down.weight"].shape == (RANK, 64)
    assert tensors[f"{conv}.lora_down.weight"].shape == (RANK, 32, 3, 3)
    assert tensors[f"{conv}.lora_up.weight"].shape == (32, RANK, 1, 1)
    assert len(tensors) == 3 * len(get_peft_model_state_dict(pipe.unet)) / 2
    with safe_open(folder / KOHYA_FILE, "pt") as file:
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
def test_the_base_model_is_told_by_its_width(width: int, version: str, architecture: str) -> None:
    unet = adapted(tiny_pipeline).unet
    unet.register_to_config(cross_attention_dim=width)
    metadata = kohya_metadata(unet, "a title", "v_prediction")
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_v2"] == str(version == "sd_v2")
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.prediction_type"] == "v"
    assert all(isinstance(value, str) for value in metadata.values())


def test_upstreams_conversion_to_diffusers_names_loses_the_attention_layers(tmp_path: Path) -> None:
    """Why save_lora keeps PEFT's names. When this fails, upstream has mended it."""
    pipe = adapted(tiny_pipeline)
    names = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    save_file({f"unet.{name}": value.contiguous() for name, value in names.items()}, tmp_path / PEFT_FILE)
    with pytest.warns(RuntimeWarning):
        unet = loaded(tiny_pipeline, tmp_path, weight_name=PEFT_FILE)
    assert (output(unet) - output(pipe.unet)).abs().max() > 1e-2


def test_upstreams_conversion_to_kohya_takes_the_rank_for_alpha() -> None:
    """Why kohya_state_dict is ours. When this fails, upstream has mended it."""
    pipe = adapted(tiny_pipeline)
    state = {f"unet.{name}": value for name, value in get_peft_model_state_dict(pipe.unet).items()}
    theirs = convert_state_dict_to_kohya(state)
    assert {value.item() for name, value in theirs.items() if name.endswith(".alpha")} == {RANK}
    ours = kohya_state_dict(pipe.unet)
    assert {value.item() for name, value in ours.items() if name.endswith(".alpha")} == {ALPHA}
