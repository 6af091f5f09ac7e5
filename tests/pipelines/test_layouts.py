"""Folders that are no pipeline, or another kind than asked for: they load, or one sentence says which line does."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_unet, tiny_vae
from tiny_xl import tiny_xl_pipeline, tiny_xl_unet

from cm_diffusers.models.motion import adapter_at_root
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.pipelines import (
    ConsistencyImagesPipeline,
    ConsistencyImg2ImgPipeline,
    ConsistencyPipeline,
    ConsistencyVideoPipeline,
    layouts,
)
from cm_diffusers.schedulers import ConsistencyScheduler, EDMConsistencyScheduler
from pipelines.test_loras import ours, random_lora, sampled
from pipelines.test_pipelines import ip_adapter
from pipelines.test_pipelines_video import control_net, motion_adapter
from pipelines.test_pipelines_video import ours as our_clips


pytestmark = pytest.mark.filterwarnings("ignore:Nothing says that:UserWarning", "ignore:There is no safety checker")


def as_folder(make):
    def write(folder: Path) -> Path:
        make().save_pretrained(folder)
        return folder

    return write


def lora_file(folder: Path) -> Path:
    save_file(random_lora(tiny_unet()), folder / "lora.safetensors")
    return folder / "lora.safetensors"


def pixels() -> DDPMPipeline:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return DDPMPipeline(UNet2DModel(sample_size=8, norm_num_groups=4, **blocks), DDPMScheduler())


def unet_in_folder(folder: Path) -> Path:
    tiny_unet().save_pretrained(folder / "unet")
    return folder


def network_file(folder: Path) -> Path:
    tiny_unet().save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


def without_vae(folder: Path) -> Path:
    tiny_pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "vae"}))
    return folder


OTHERS = {
    "UNet": (
        as_folder(tiny_xl_unet),
        r"holds a UNet2DConditionModel alone; .*unet=UNet2DConditionModel.from_pretrained\(",
    ),
    "unet/": (unet_in_folder, r"unet=UNet2DConditionModel.from_pretrained\(.*, subfolder='unet'\)\)"),
    "VAE": (as_folder(tiny_vae), r"holds a AutoencoderKL alone; .*vae=AutoencoderKL.from_pretrained\("),
    "motion": (as_folder(motion_adapter), r"ConsistencyVideoPipeline.from_pretrained\(BASE_MODEL, motion_adapter="),
    "ControlNet": (as_folder(control_net), r"ConsistencyVideoPipeline.from_pretrained\(BASE_MODEL, controlnet="),
    "network file": (network_file, r"as a network alone, .*unet=UNet2DConditionModel.from_pretrained\(FOLDER\)"),
    "LoRA file": (lora_file, "as a LoRA, load its base model and call load_lora_weights"),
    "DDPM": (as_folder(pixels), "is a DDPMPipeline without vae, text_encoder"),
    "no VAE": (without_vae, "is a StableDiffusionPipeline without vae"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_pipeline_says_which_line_works(kind: str, tmp_path: Path) -> None:
    make, message = OTHERS[kind]
    source = make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        ConsistencyPipeline.from_pretrained(source)
    assert "\n" not in str(error.value)


def test_clips_are_no_images(tmp_path: Path) -> None:
    our_clips().save_pretrained(tmp_path / "clips")
    with pytest.raises(ValueError, match="is a AnimateDiffPipeline, which makes clips; load it with ConsistencyVideo"):
        ConsistencyPipeline.from_pretrained(tmp_path / "clips")
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel alone"):
        ConsistencyVideoPipeline.from_pretrained(as_folder(tiny_unet)(tmp_path / "unet"))


def test_a_part_that_is_given_is_not_missed(tmp_path: Path) -> None:
    folder = without_vae(tmp_path)
    assert isinstance(ConsistencyPipeline.from_pretrained(folder, vae=tiny_vae()).vae, AutoencoderKL)


def test_a_repository_of_one_model_says_which_line_works(monkeypatch, tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)

    def hub(source: str, name: str, **options) -> str:
        if (tmp_path / name).is_file():
            return str(tmp_path / name)
        raise EntryNotFoundError("404")

    monkeypatch.setattr(layouts, "hf_hub_download", hub)
    with pytest.raises(ValueError, match="'ada/lcm' holds a UNet2DConditionModel alone"):
        ConsistencyPipeline.from_pretrained("ada/lcm")


def test_offline_diffusers_says_what_is_not_there(monkeypatch) -> None:
    def hub(*args, **options) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(layouts, "hf_hub_download", hub)
    assert layouts.is_pipeline("ada/lcm", {}, has_record=False)
    assert not layouts.is_pipeline("ada/lcm", {}, has_record=True)


# Which files of weights


def plain_but(name: str, folder: Path) -> Path:
    """Of one part a variant alone, of the others weights without."""
    tiny_pipeline().save_pretrained(folder)
    (path,) = (folder / name).glob("*.safetensors")
    path.rename(path.with_suffix(".fp16.safetensors"))
    return folder


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}])
def test_a_variant_alone_is_read(options: dict, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "all", variant="fp16")
    for folder in (
        tmp_path / "all",
        plain_but("unet", tmp_path / "unet"),
        plain_but("text_encoder", tmp_path / "text"),
    ):
        assert ConsistencyPipeline.from_pretrained(folder, **options).unet is not None
    assert load_teacher(TeacherConfig(str(tmp_path / "all"))).unet is not None


def test_of_several_variants_one_must_be_chosen(tmp_path: Path) -> None:
    plain_but("unet", tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file(load_file(weights), tmp_path / "unet" / "diffusion_pytorch_model.bf16.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no safetensors but of bf16, fp16 for unet; .* variant='bf16'"):
        ConsistencyPipeline.from_pretrained(tmp_path)
    assert ConsistencyPipeline.from_pretrained(tmp_path, variant="bf16")


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"use_safetensors": None}])
def test_keywords_reach_motion_adapters_and_vaes(options: dict, tmp_path: Path) -> None:
    motion, vae, pickled = tmp_path / "motion", tmp_path / "vae", "use_safetensors" in options
    motion_adapter().save_pretrained(motion, variant=None if pickled else "fp16")
    if pickled:
        (path,) = motion.glob("*.safetensors")
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    save_file(random_lora(tiny_unet(), names=["to_q"]), motion / "lcm.safetensors")
    tiny_pipeline().save_pretrained(tmp_path / "base")
    parts = {"base_model": tmp_path / "base", "weight_name": "lcm.safetensors"}
    assert ConsistencyVideoPipeline.from_pretrained(motion, **parts, **options).motion_adapter is not None
    if not pickled:
        assert adapter_at_root(motion) is not None
        tiny_vae().save_pretrained(vae, variant="fp16")
        assert load_teacher(TeacherConfig(str(tmp_path / "base"), pretrained_vae_model_name_or_path=str(vae))).vae


# What a network's config does not say


def test_without_a_size_in_the_config_height_and_width_are_asked_for() -> None:
    pipe = ours(unet=tiny_unet(sample_size=None))
    assert sampled(pipe, height=32, width=64).shape == (1, 3, 32, 64)
    for options in ({}, {"height": 32}):
        with pytest.raises(ValueError, match=r"does not say the size .* give height and width"):
            sampled(pipe, **options)
    other = ConsistencyImg2ImgPipeline.from_pipe(pipe)
    for image in (torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 32, 32)):
        assert other("a bag", image, num_inference_steps=1, output_type="pt").images.shape == (1, 3, 32, 32)


def test_without_a_size_in_the_config_latents_say_that_of_images_without_prompts() -> None:
    pipe = ConsistencyImagesPipeline(pixels().unet, EDMConsistencyScheduler())
    pipe.unet.register_to_config(sample_size=None)
    assert pipe(latents=torch.randn(1, 3, 8, 16), output_type="pt").images.shape == (1, 3, 8, 16)
    with pytest.raises(ValueError, match="does not say its sample_size; give latents"):
        pipe()


# Betas of motion adapters


def test_a_motion_adapter_on_an_image_model_tells_whose_betas_are_taken(tmp_path: Path, recwarn) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    motion = {"motion_adapter": motion_adapter()}
    with pytest.warns(UserWarning, match=r"beta_schedule 'scaled_linear'\), but AnimateDiff's is linear"):
        pipe = ConsistencyVideoPipeline.from_pretrained(tmp_path, **motion)
    with pytest.warns(UserWarning, match="but AnimateDiff's is linear"):
        ConsistencyVideoPipeline.from_pipe(tiny_pipeline(), **motion)
    recwarn.clear()
    linear = ConsistencyScheduler.from_config(pipe.scheduler.config, beta_schedule="linear")
    ConsistencyVideoPipeline.from_pretrained(tmp_path, scheduler=linear, **motion)
    ConsistencyVideoPipeline.from_pipe(tiny_pipeline(scheduler=linear), **motion)
    ConsistencyVideoPipeline.from_pipe(pipe)
    assert not [one for one in recwarn if "AnimateDiff" in str(one.message)]


# Guidance that a callback ends


def ends(pipe, step, t, tensors) -> dict:
    """Cuts the embeddings and nothing else, as diffusers' guide shows."""
    if not pipe._guidance_scale:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}


def ends_alone(pipe, step, t, tensors) -> dict:
    pipe._guidance_scale = 0.0
    return {}


def calls_of(pipe, callback, **options) -> list[tuple[int, dict]]:
    """How many samples the UNet is called with in each of two steps, and what else."""
    calls = []
    hook = pipe.unet.register_forward_hook(lambda m, x, others, y: calls.append((len(x[0]), others)), with_kwargs=True)
    names = ["prompt_embeds"]
    pipe(
        num_inference_steps=2,
        guidance_scale=1.5,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
        output_type="latent",
        **options,
    )
    hook.remove()
    return calls


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
@pytest.mark.parametrize("kind", ["stock", ends, ends_alone])
def test_when_guidance_ends_the_conditional_half_of_all_stays(kind, make) -> None:
    pipe = ours(make)
    stock = SDXLCFGCutoffCallback if make is tiny_xl_pipeline else SDCFGCutoffCallback
    callback = stock(cutoff_step_ratio=None, cutoff_step_index=0) if kind == "stock" else kind
    expected, _, pooled, _ = pipe.encode_prompt(["a bag", "an ankle boot"])
    (both, _), (one, others) = calls_of(pipe, callback, prompt=["a bag", "an ankle boot"])
    assert (both, one) == (4, 2)
    torch.testing.assert_close(others["encoder_hidden_states"], expected)
    if make is tiny_xl_pipeline:
        torch.testing.assert_close(others["added_cond_kwargs"]["text_embeds"], pooled)
        assert len(others["added_cond_kwargs"]["time_ids"]) == 2


@pytest.mark.parametrize("callback", [SDCFGCutoffCallback(None, 0), ends, ends_alone])
def test_when_guidance_of_clips_ends_each_keeps_its_prompt(callback) -> None:
    pipe, prompts = our_clips(), ["a bag", "an ankle boot"]
    (both, _), (one, others) = calls_of(pipe, callback, prompt=prompts, num_frames=2)
    assert (both, one) == (4, 2)
    expected = pipe.encode_prompt(prompts)[0].repeat_interleave(2, dim=0)
    torch.testing.assert_close(others["encoder_hidden_states"], expected)


def test_when_guidance_ends_ip_adapters_read_the_conditional_half() -> None:
    stock = tiny_pipeline()
    stock.load_ip_adapter(ip_adapter(stock.unet, 24), subfolder="", weight_name="", image_encoder_folder=None)
    pipe, image = ConsistencyPipeline.from_pipe(stock), torch.randn(2, 1, 24)
    options = {"prompt": ["a bag", "an ankle boot"], "ip_adapter_image_embeds": [image]}
    (_, before), (one, after) = calls_of(pipe, SDCFGCutoffCallback(None, 0), **options)
    (before,), (after,) = (others["added_cond_kwargs"]["image_embeds"] for others in (before, after))
    assert (len(before), len(after), one) == (4, 2, 2)
    torch.testing.assert_close(after, image[1:].expand(2, -1, -1))
