"""LoRAs of any file on the consistency pipelines: every layer acts, a student's stays on, and what is broken is refused."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_unet
from tiny_xl import tiny_xl_pipeline
from torch import Tensor, nn

from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.families.unet import LCM_LORA_TARGETS
from cm_diffusers.models.ldm_layout import unet_name
from cm_diffusers.pipelines import ConsistencyImg2ImgPipeline, ConsistencyInpaintPipeline, ConsistencyPipeline
from cm_diffusers.pipelines.lora import load_lora
from pipelines.test_pipelines_loading import lora_folder, record
from pipelines.test_pipelines_video import ours as our_clips


pytestmark = pytest.mark.filterwarnings(
    "ignore:Nothing says:UserWarning", "ignore:There is no safety checker", "ignore:Already found a `peft_config`"
)
OFF = "The LoRA that makes this model a student does not act"


def ours(make=tiny_pipeline, cls=ConsistencyPipeline, **parts):
    pipe = cls.from_pipe(make(**parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def layers(network: nn.Module, names=LCM_LORA_TARGETS, motion: bool = False) -> dict[str, nn.Module]:
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and path.endswith(tuple(f".{name}" for name in names))
        and ("motion_modules" in path) <= motion
    }


def random_lora(network: nn.Module, rank: int = 4, **chosen) -> dict[str, Tensor]:
    """By bare PEFT names."""
    generator, state = torch.Generator().manual_seed(0), {}
    for path, module in layers(network, **chosen).items():
        kernel = module.weight.shape[2:]
        down, up = (rank, module.weight.shape[1], *kernel), (len(module.weight), rank, *[1] * len(kernel))
        for half, shape in (("A", down), ("B", up)):
            state[f"{path}.lora_{half}.weight"] = torch.randn(shape, generator=generator) * 0.1
    return state


def kohya(state: dict[str, Tensor], rename=lambda path: path) -> dict[str, Tensor]:
    parts = ((*key.split(".lora_"), value) for key, value in state.items())
    return {
        f"lora_unet_{rename(path).replace('.', '_')}.lora_{'down' if half[0] == 'A' else 'up'}.weight": value
        for path, half, value in parts
    }


def sampled(pipe, **options) -> Tensor:
    options = {"num_inference_steps": 1, "output_type": "pt", "generator": torch.Generator().manual_seed(0), **options}
    if isinstance(pipe, ConsistencyInpaintPipeline):
        options |= {"mask_image": torch.ones(1, 1, 32, 32)}
    if isinstance(pipe, ConsistencyImg2ImgPipeline | ConsistencyInpaintPipeline):
        options["image"] = torch.full((1, 3, 32, 32), 0.5)
    result = pipe("a photo of a bag", **options)
    return getattr(result, "images", None) if hasattr(result, "images") else result.frames


def merged(pipe, state: dict[str, Tensor], scale: float = 1.0) -> None:
    """W += scale * up @ down, in place, of bare PEFT names."""
    for path, module in layers(pipe.unet).items():
        down, up = (state[f"{path}.lora_{half}.weight"] for half in "AB")
        module.weight.data += scale * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)


def said(pipe, **options) -> str:
    """What it warns of when it samples."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampled(pipe, **options)
    return " ".join(str(one.message) for one in caught)


def renamed(state: dict[str, Tensor], change) -> dict[str, Tensor]:
    return {change(key): value for key, value in state.items()}


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every other layer by diffusers' names, the rest by kohya's."""
    paths = sorted({key.split(".lora_")[0] for key in state})[::2]
    one = {key: value for key, value in state.items() if key.split(".lora_")[0] in paths}
    other = {key: value for key, value in state.items() if key not in one}
    return {f"unet.{key}": value for key, value in convert_state_dict_to_diffusers(one).items()} | kohya(other)


def stability(state: dict[str, Tensor], config) -> dict[str, Tensor]:
    def change(key: str) -> str:
        path, half = key.split(".lora_")
        return f"diffusion_model.{unet_name(f'{path}.weight', config).removesuffix('.weight')}.lora_{half}"

    return renamed(state, change)


def old(key: str) -> str:
    """Of diffusers' first LoRAs, for attention alone."""
    path, half = key.split(".lora_")
    attention, _, name = path.replace("to_out.0", "to_out").rpartition(".")
    return f"unet.{attention}.processor.{name}_lora.{'down' if half[0] == 'A' else 'up'}.weight"


CONVENTIONS = {
    "peft": lambda s, c: renamed(s, lambda key: f"unet.{key}"),
    "bare": lambda s, c: s,
    "get_peft_model": lambda s, c: renamed(s, lambda key: f"base_model.model.{key}"),
    "pcm": lambda s, c: renamed(s, lambda key: f"unet.base_model.model.{key}"),
    "adapter names": lambda s, c: renamed(s, lambda key: f"unet.{key.replace('.weight', '.default.weight')}"),
    "diffusers": lambda s, c: renamed(
        s, lambda key: f"unet.{key.replace('lora_A', 'lora.down').replace('lora_B', 'lora.up')}"
    ),
    "mixed by diffusers": lambda s, c: renamed(convert_state_dict_to_diffusers(dict(s)), lambda key: f"unet.{key}"),
    "mixed by hand": lambda s, c: halved(s),
    "kohya": lambda s, c: kohya(s),
    "kohya, Stability": lambda s, c: kohya(s, lambda path: unet_name(f"{path}.weight", c).removesuffix(".weight")),
    "ComfyUI": stability,
    "linear as convolution": lambda s, c: {
        f"unet.{key}": value[:, :, None, None] if value.ndim == 2 else value for key, value in s.items()
    },
}


OF_XL = ("mixed by diffusers", "kohya, Stability", "ComfyUI")


@pytest.mark.parametrize(
    ("name", "make"), [(n, tiny_pipeline) for n in CONVENTIONS] + [(n, tiny_xl_pipeline) for n in OF_XL]
)
def test_every_convention_loads_every_layer(name: str, make) -> None:
    pipe, by_hand = ours(make), ours(make)
    state = random_lora(pipe.unet)
    pipe.load_lora_weights(CONVENTIONS[name](state, pipe.unet.config))
    assert sum(isinstance(module, BaseTunerLayer) for module in pipe.unet.modules()) == len(state) // 2
    merged(by_hand, state)
    torch.testing.assert_close(sampled(pipe), sampled(by_hand), atol=1e-4, rtol=0)


def test_names_of_the_first_loras_load() -> None:
    pipe = ours()
    state = random_lora(pipe.unet, names=["to_q", "to_k", "to_v", "to_out.0"])
    pipe.load_lora_weights(renamed(state, old))
    assert sum(isinstance(module, BaseTunerLayer) for module in pipe.unet.modules()) == len(state) // 2


def test_clips_take_every_layer_and_motion_modules_none() -> None:
    pipe = our_clips()
    state = random_lora(pipe.unet)
    pipe.load_lora_weights(halved(state))
    adapted = [path for path, module in pipe.unet.named_modules() if isinstance(module, BaseTunerLayer)]
    assert sorted(adapted) == sorted({key.split(".lora_")[0] for key in state})


def test_clips_take_motion_loras() -> None:
    pipe = our_clips()
    state = random_lora(pipe.unet, names=["to_q"], motion=True)
    pipe.load_lora_weights(renamed(state, old))
    adapted = {path for path, module in pipe.unet.named_modules() if isinstance(module, BaseTunerLayer)}
    assert any("motion_modules" in path for path in adapted)
    assert len(adapted) == len(state) // 2


@pytest.mark.parametrize("names", [["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], ["fc1"]])
@pytest.mark.parametrize("style", ["peft", "kohya", "mixed"])
def test_text_encoders_take_every_layer(style: str, names: list[str]) -> None:
    pipe = ours(tiny_xl_pipeline)
    state = {}
    for tower, short in (("text_encoder", "te1"), ("text_encoder_2", "te2")):
        for i, (key, value) in enumerate(random_lora(getattr(pipe, tower), names=names).items()):
            nested = key if key.startswith("text_model.") else f"text_model.{key}"
            by_kohya = style == "kohya" or (style == "mixed" and i % 4 < 2)
            path, half = nested.split(".lora_")
            down = "down" if half[0] == "A" else "up"
            name = f"lora_{short}_{path.replace('.', '_')}.lora_{down}.weight" if by_kohya else f"{tower}.{nested}"
            state[name] = value
    before = pipe.encode_prompt("a photo of a bag")[0]
    pipe.load_lora_weights(state)
    adapted = [
        m for t in (pipe.text_encoder, pipe.text_encoder_2) for m in t.modules() if isinstance(m, BaseTunerLayer)
    ]
    assert len(adapted) == len(state) // 2
    assert all(layer.scaling == {"default_0": 1.0} for layer in adapted)
    assert not torch.allclose(pipe.encode_prompt("a photo of a bag")[0], before)


def test_each_layer_is_scaled_as_the_file_says() -> None:
    """Ranks and alphas of its own for each, and none for one."""
    pipe, by_hand = ours(), ours()
    state, wanted = {}, {}
    for i, path in enumerate(layers(pipe.unet)):
        one = {k: v for k, v in random_lora(pipe.unet, rank=2 + i % 3).items() if k.startswith(f"{path}.lora")}
        state |= kohya(one)
        wanted[path] = 1.0
        if i:
            alpha = 1.0 + i % 5
            state[f"lora_unet_{path.replace('.', '_')}.alpha"] = torch.tensor(alpha)
            wanted[path] = alpha / (2 + i % 3)
        down, up = one[f"{path}.lora_A.weight"], one[f"{path}.lora_B.weight"]
        weight = by_hand.unet.get_submodule(path).weight
        weight.data += wanted[path] * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    pipe.load_lora_weights(state)
    torch.testing.assert_close(sampled(pipe), sampled(by_hand), atol=1e-4, rtol=0)


def test_a_folder_of_peft_is_scaled_by_its_config(tmp_path: Path) -> None:
    pipe, by_hand = ours(), ours()
    state = random_lora(pipe.unet)
    save_file(renamed(state, lambda key: f"base_model.model.{key}"), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 1, "target_modules": LCM_LORA_TARGETS}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pipe.load_lora_weights(tmp_path)
    merged(by_hand, state, 0.25)
    torch.testing.assert_close(sampled(pipe), sampled(by_hand), atol=1e-4, rtol=0)


def test_the_scales_of_a_dora_act() -> None:
    pipe, by_hand = ours(), ours()
    state = random_lora(pipe.unet)
    merged(by_hand, state)
    file = kohya(state)
    for path, module in layers(by_hand.unet).items():
        scale = torch.linspace(0.5, 1.5, len(module.weight)).reshape(-1, *[1] * (module.weight.ndim - 1))
        module.weight.data *= scale / module.weight.flatten(1).norm(dim=1).reshape(scale.shape)
        file[f"lora_unet_{path.replace('.', '_')}.dora_scale"] = scale
    pipe.load_lora_weights(file)
    torch.testing.assert_close(sampled(pipe), sampled(by_hand), atol=1e-3, rtol=0)


def test_a_linear_half_fits_a_convolution_of_one_pixel_and_the_other_way_round() -> None:
    for one, other in ((False, True), (True, False)):
        state = random_lora(tiny_unet(use_linear_projection=one))
        pipe = ours(unet=tiny_unet(use_linear_projection=other))
        pipe.load_lora_weights(kohya(state))
        assert sum(isinstance(module, BaseTunerLayer) for module in pipe.unet.modules()) == len(state) // 2


def dropping(text: str):
    return lambda s: {key: value for key, value in s.items() if text not in key}


def with_entry(name: str, value: Tensor):
    return lambda s: {**s, name: value}


CONV, QUERY = "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
BROKEN = {
    "no lora_A": (dropping(f"{QUERY}.lora_A"), f"'unet.{QUERY} without both halves'"),
    "no lora_B": (dropping(f"{QUERY}.lora_B"), f"'unet.{QUERY} without both halves'"),
    "alpha alone": (with_entry("unet.conv_in.alpha", torch.tensor(1.0)), "'unet.conv_in without both halves'"),
    "LoHa": (with_entry(f"unet.{QUERY}.hada_w1_a", torch.ones(2, 2)), "no layer can be made of, such as .*hada_w1_a"),
    "differences": (with_entry("lora_unet_conv_in.diff_b", torch.ones(2)), "such as 'lora_unet_conv_in.diff_b'"),
    "a core": (with_entry(f"unet.{QUERY}.lora_mid.weight", torch.ones(2, 2)), "such as .*lora_mid.weight"),
    "NaN": (with_entry(f"unet.{QUERY}.lora_A.weight", torch.full((4, 64), torch.nan)), "not finite, in .*to_q.lora_A"),
    "infinite alpha": (with_entry(f"unet.{QUERY}.alpha", torch.tensor(torch.inf)), "not finite, in .*alpha"),
    "twice": (with_entry(f"base_model.model.{QUERY}.lora_A.weight", torch.ones(4, 64)), "holds a layer twice"),
    "ranks": (with_entry(f"unet.{QUERY}.lora_A.weight", torch.ones(3, 64)), "have ranks 3 and 4"),
    "kernel": (with_entry(f"unet.{CONV}.lora_A.weight", torch.ones(4, 32, 1, 1)), r"has a kernel \(1, 1\).*\(3, 3\)"),
    "quantized": (with_entry(f"unet.{QUERY}.lora_A.weight", torch.ones(4, 64).to(torch.int8)), "is quantized"),
    "some DoRA": (with_entry(f"unet.{QUERY}.lora_magnitude_vector", torch.ones(64)), "for 1 of its 79 layers"),
    "empty": (lambda s: {}, "no layer for a UNet or a text encoder"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_lora_that_is_not_whole_is_refused_and_leaves_nothing(kind: str) -> None:
    pipe = ours()
    change, message = BROKEN[kind]
    state = renamed(random_lora(pipe.unet), lambda key: f"unet.{key}")
    with pytest.raises(ValueError, match=message) as error:
        pipe.load_lora_weights(change(state))
    assert "\n" not in str(error.value)
    assert pipe._adapters() == set()


def test_stock_pipelines_get_every_layer_too(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    state = random_lora(pipe.unet)
    save_file(halved(state), tmp_path / "pytorch_lora_weights.safetensors")
    load_lora(pipe, tmp_path)
    assert sum(isinstance(module, BaseTunerLayer) for module in pipe.unet.modules()) == len(state) // 2


# Which LoRA acts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lora_folder(tmp_path / "student", ours(), record(recommended_num_inference_steps=1))


def zeros() -> dict[str, Tensor]:
    return {f"unet.{key}": torch.zeros_like(value) for key, value in random_lora(tiny_unet(), names=["to_k"]).items()}


def student(folder: Path, cls=ConsistencyPipeline):
    pipe = our_clips() if cls is None else ours(cls=cls)
    pipe.load_lora_weights(folder, adapter_name="student")
    return pipe


@pytest.mark.parametrize("cls", [ConsistencyPipeline, ConsistencyImg2ImgPipeline, ConsistencyInpaintPipeline, None])
def test_a_students_lora_stays_on_beside_others_in_any_order(cls, folder: Path) -> None:
    pipe = student(folder, cls)
    options = {"num_frames": 2} if cls is None else {}
    expected = sampled(pipe, **options)
    pipe.load_lora_weights(zeros(), adapter_name="style")
    pipe.load_lora_weights(zeros())
    torch.testing.assert_close(sampled(pipe, **options), expected)
    assert OFF not in said(pipe, **options)
    pipe.delete_adapters("style")
    torch.testing.assert_close(sampled(pipe, **options), expected)
    other = our_clips() if cls is None else ours(cls=cls)
    other.load_lora_weights(zeros(), adapter_name="style")
    other.load_lora_weights(folder)
    torch.testing.assert_close(sampled(other, **options), expected)
    assert set(other.get_active_adapters()) == {"style", "default_0"}


def test_a_scale_that_was_set_is_kept(folder: Path) -> None:
    pipe = student(folder)
    pipe.set_adapters("student", 0.5)
    expected = sampled(pipe)
    pipe.load_lora_weights(zeros())
    torch.testing.assert_close(sampled(pipe), expected)


def test_loras_without_record_all_stay_on_where_any_may_make_the_student() -> None:
    pipe = ours()
    state = CONVENTIONS["peft"](random_lora(pipe.unet), None)
    pipe.load_lora_weights(state)
    expected = sampled(pipe)
    pipe.load_lora_weights(zeros())
    torch.testing.assert_close(sampled(pipe), expected)


def test_of_styles_on_a_whole_student_the_last_is_active_as_in_diffusers() -> None:
    pipe = ours()
    pipe.register_to_config(record=asdict(record()))
    for name in "ab":
        pipe.load_lora_weights(zeros(), adapter_name=name)
    assert pipe.get_active_adapters() == ["b"]


SWITCHES = {
    "others": (lambda p: p.set_adapters("style"), "others are active"),
    "disabled": (lambda p: p.disable_lora(), "LoRAs are disabled"),
    "on the UNet": (lambda p: p.unet.set_adapters("style"), "others are active"),
    "weight": (lambda p: p.set_adapters(["student", "style"], [0.0, 1.0]), "its scale is 0"),
    "fused others": (lambda p: p.fuse_lora(adapter_names=["style"]), "others are fused without it"),
    "fused and disabled": (lambda p: (p.fuse_lora(), p.disable_lora()), "LoRAs are disabled"),
    "deleted from the UNet": (lambda p: p.unet.delete_adapters("student"), "it is no longer loaded"),
    "unloaded by a sibling": (
        lambda p: ConsistencyImg2ImgPipeline.from_pipe(p).unload_lora_weights(),
        "it is no longer loaded",
    ),
}


@pytest.mark.parametrize("kind", SWITCHES)
def test_a_students_lora_that_is_off_is_told_of(kind: str, folder: Path) -> None:
    pipe = student(folder)
    pipe.load_lora_weights(zeros(), adapter_name="style")
    assert OFF not in said(pipe)
    change, reason = SWITCHES[kind]
    change(pipe)
    assert f"{OFF}, so the model underneath is sampled, undistilled: {reason}" in said(pipe)


def test_the_scale_of_a_call_can_switch_it_off(folder: Path) -> None:
    pipe = student(folder)
    assert "the scale of the call is 0" in said(pipe, cross_attention_kwargs={"scale": 0.0})
    assert OFF not in said(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.fuse_lora()
    assert OFF not in said(pipe, cross_attention_kwargs={"scale": 0.0})


RIGHT = {
    "fused": lambda p: p.fuse_lora(),
    "fused and unloaded": lambda p: (p.fuse_lora(), p.unload_lora_weights()),
    "fused and unfused": lambda p: (p.fuse_lora(), p.unfuse_lora()),
    "disabled and enabled": lambda p: (p.disable_lora(), p.enable_lora()),
    "beside another": lambda p: p.set_adapters(["student", "style"], [0.8, 0.0]),
    "without the other": lambda p: p.delete_adapters("style"),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_students_lora_that_acts_is_not_told_of(kind: str, folder: Path) -> None:
    pipe = student(folder)
    pipe.load_lora_weights(zeros(), adapter_name="style")
    RIGHT[kind](pipe)
    assert said(pipe) == ""
    assert pipe.record == record(recommended_num_inference_steps=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.delete_adapters("student"),
        lambda p: (p.fuse_lora(adapter_names=["style"]), p.unload_lora_weights()),
        lambda p: p.load_lora_weights(lora_of_same_shape(p), adapter_name="student", hotswap=True),
    ],
)
def test_without_its_lora_a_style_makes_no_student(change, folder: Path) -> None:
    pipe = student(folder)
    pipe.load_lora_weights(zeros(), adapter_name="style")
    change(pipe)
    assert pipe.record is None
    assert "Nothing says that this model was distilled" in said(pipe)


def lora_of_same_shape(pipe) -> dict[str, Tensor]:
    names = [k.removesuffix(".student.weight") for k in pipe.unet.state_dict() if k.endswith(".student.weight")]
    state = pipe.unet.state_dict()
    return {f"unet.{name}.weight": torch.zeros_like(state[f"{name}.student.weight"]) for name in names}


def test_a_lora_without_record_that_is_off_is_told_of_under_a_scheduler_for_few_steps() -> None:
    pipe = ours()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    assert "Nothing says" not in said(pipe)  # the caller's word, of a model that may be distilled
    pipe.load_lora_weights(CONVENTIONS["peft"](random_lora(pipe.unet), None), adapter_name="lcm")
    assert said(pipe) == ""
    for change in (lambda: pipe.disable_lora(), lambda: pipe.delete_adapters("lcm")):
        change()
        assert "Nothing says that this model was distilled" in said(pipe)


def test_a_former_students_lora_takes_over_again(tmp_path: Path) -> None:
    pipe = ours()
    for name, steps in (("a", 3), ("b", 5)):
        entry = record(recommended_num_inference_steps=steps)
        pipe.load_lora_weights(lora_folder(tmp_path / name, tiny_pipeline(), entry), name)
    assert (pipe.get_active_adapters(), pipe.manners.num_inference_steps) == (["b"], 5)
    pipe.delete_adapters("b")
    assert (pipe.get_active_adapters(), pipe.manners.num_inference_steps) == (["a"], 3)


def test_names_are_free_over_all_networks_and_after_deletions(folder: Path) -> None:
    """Once the second was called by the number of those on the first layer, which may have none."""
    pipe = ours()
    pipe.load_lora_weights(CONVENTIONS["peft"](random_lora(pipe.unet, names=["to_q"]), None))
    both = CONVENTIONS["peft"](random_lora(tiny_unet(), names=["conv1"]), None)
    text = {f"text_encoder.{key}": value for key, value in random_lora(pipe.text_encoder, names=["q_proj"]).items()}
    pipe.load_lora_weights({**both, **text})
    assert pipe.get_list_adapters() == {"unet": ["default_0", "default_1"], "text_encoder": ["default_1"]}
    pipe.delete_adapters("default_0")
    pipe.load_lora_weights(both)
    assert set(pipe.get_list_adapters()["unet"]) == {"default_0", "default_1"}


def test_a_student_whose_lora_another_pipeline_took_off_is_not_saved(folder: Path, tmp_path: Path) -> None:
    pipe = student(folder)
    ConsistencyImg2ImgPipeline.from_pipe(pipe).unload_lora_weights()
    with pytest.raises(ValueError, match="was taken off by another pipeline"):
        pipe.save_pretrained(tmp_path / "out")


# Values that are not finite


@pytest.mark.parametrize("output", ["pil", "np", "pt", "latent"])
def test_values_that_are_not_finite_are_refused_for_every_output(output: str) -> None:
    for pipe, options in ((ours(), {}), (our_clips(), {"num_frames": 1})):
        pipe.unet.conv_out.weight.data[0] = torch.nan
        with pytest.raises(ValueError, match="The sampled latents hold values that are not finite"):
            sampled(pipe, output_type=output, **options)


def test_a_vae_that_overflows_is_told_of() -> None:
    for pipe, options in ((ours().to(dtype=torch.bfloat16), {}), (our_clips(), {"num_frames": 1})):
        pipe.vae.decoder.conv_out.bias.data[0] = torch.inf
        with pytest.raises(ValueError, match="that the VAE made of finite latents hold values that are not finite"):
            sampled(pipe, **options)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_not_loaded(part: str, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    (path,) = (tmp_path / part).glob("*.safetensors")
    state = load_file(path)
    state[next(iter(state))].view(-1)[0] = torch.inf
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"holds 1 tensors that are not finite, such as {part}"):
        ConsistencyPipeline.from_pretrained(tmp_path)


def test_nothing_that_is_not_finite_is_fused(folder: Path) -> None:
    pipe = student(folder)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    next(value for name, value in pipe.unet.named_parameters() if "lora_B" in name).data[0] = torch.nan
    for options in ({}, {"lora_scale": float("nan")}):
        with pytest.raises(ValueError, match="is not finite, and would spoil the weights"):
            pipe.fuse_lora(**options)
    after = pipe.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "lora_" not in name)


# Names of layers to train


def test_every_target_module_must_fit() -> None:
    with pytest.raises(
        ValueError,
        match=r"no layer of the UNet2DConditionModel with to_key, to_out.0.0, attn1, norm1; .* end on .*to_q",
    ):
        add_lora(tiny_unet(), 4, 4.0, 0.0, ["to_q", "to_key", "to_out.0.0", "attn1", "norm1"])
    with pytest.raises(ValueError, match="names no layer; leave it out"):
        add_lora(tiny_unet(), 4, 4.0, 0.0, [])
    shallow = tiny_unet(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )
    add_lora(shallow, 4, 4.0, 0.0, LCM_LORA_TARGETS)  # which lacks some of the default ones
