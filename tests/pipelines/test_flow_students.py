"""Students of flows: stock pipelines with the manners of a student, and folders that need no package."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_flow import tiny_sd3
from tiny_flow_a import tiny_sana, tiny_wan
from tiny_flow_b import tiny_flux, tiny_qwen_image, tiny_z_image
from torch import Tensor

from cm_diffusers import ConsistencyImg2ImgPipeline, ConsistencyPipeline, FlowConsistencyScheduler
from cm_diffusers.evaluation.sampling import load_pipeline
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record, save_lora, save_pipeline
from cm_diffusers.record import RECORD, Record, read_record


SHIFT = 3.0
SMALL = {"height": 32, "width": 32}
SIZES = {
    tiny_wan: {"height": 64, "width": 64, "num_frames": 5},
    tiny_sana: {**SMALL, "use_resolution_binning": False},
}
Make = Callable[[], DiffusionPipeline]


def record_of(scheduler: FlowConsistencyScheduler, guidance: str = "distilled", scale: float = 1.0) -> Record:
    return lcm_record("somebody/base", guidance, 1.0, 4.0, scale, scheduler)


def published(make: Make, folder: Path, gamma: float = 1.0, record: Record | None = None) -> DiffusionPipeline:
    """The pipeline that a training samples its student in, saved."""
    scheduler = FlowConsistencyScheduler(shift=SHIFT, gamma=gamma)
    teacher = make()
    pipe = lcm_pipeline(teacher, make(seed=5).transformer, scheduler)
    save_pipeline(pipe, folder, False, record or record_of(scheduler))
    return pipe


def adapter(make: Make, folder: Path, base: Path) -> DiffusionPipeline:
    """The same with a LoRA, with its base model beside it."""
    teacher, scheduler = make(), FlowConsistencyScheduler(shift=SHIFT)
    teacher.save_pretrained(base)
    network = add_lora(teacher.transformer, 4, 8.0, 0.0).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, value in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.2)
    save_lora(network, folder, replace(record_of(scheduler), base_model=str(base)))
    return lcm_pipeline(teacher, network, scheduler)


def draw(pipe: DiffusionPipeline, seed: int = 0, **asked: object) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a bag", generator=torch.Generator().manual_seed(seed), output_type="pt", **asked)[0]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionPipeline, Path]:
    folder = tmp_path_factory.mktemp("sd3") / "student"
    return published(tiny_sd3, folder), folder


def test_a_folder_names_nothing_of_this_package(student: tuple[DiffusionPipeline, Path]) -> None:
    index = json.loads((student[1] / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    stock = DiffusionPipeline.from_pretrained(student[1])
    assert type(stock) is StableDiffusion3Pipeline
    assert (stock.scheduler.config.shift, stock.scheduler.config.stochastic_sampling) == (SHIFT, True)
    stock.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(stock.scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_the_student_is_sampled_as_it_was_trained(student: tuple[DiffusionPipeline, Path]) -> None:
    trained, folder = student
    assert (trained.text_encoder_3, trained.tokenizer_3, trained.config.text_encoder_3) == (None, None, (None, None))
    pipe = ConsistencyPipeline.from_pretrained(folder)
    assert isinstance(pipe, StableDiffusion3Pipeline)
    assert type(pipe.scheduler) is FlowConsistencyScheduler
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.gamma) == (SHIFT, 1.0)
    assert pipe.record == read_record(folder)
    wanted = draw(trained, num_inference_steps=4, guidance_scale=1.0)
    assert torch.equal(draw(pipe), wanted)
    assert torch.equal(draw(pipe), wanted)  # the noise between the steps comes from the start
    assert not torch.equal(draw(pipe, num_inference_steps=2), wanted)
    assert torch.equal(draw(pipe, sigmas=[1.0, 0.75, 0.5, 0.25]), wanted)
    measured = load_pipeline(str(folder))
    found = draw(measured, num_inference_steps=4, guidance_scale=1.0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)  # equal zeros of the text are one there
    assert not torch.equal(draw(pipe, guidance_scale=1.5), wanted)


def test_one_step_needs_no_package(student: tuple[DiffusionPipeline, Path]) -> None:
    stock = DiffusionPipeline.from_pretrained(student[1])
    ours = ConsistencyPipeline.from_pretrained(student[1])
    plain = draw(stock, sigmas=[1.0], guidance_scale=1.0)
    assert torch.equal(draw(ours, num_inference_steps=1), plain)


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux, tiny_z_image], ids=lambda make: make.__name__)
def test_without_fresh_noise_the_stock_scheduler_draws_the_same(make: Make, tmp_path: Path) -> None:
    guidance = ("embedded", 2.0) if make is tiny_flux else ("distilled", 1.0)
    scheduler = FlowConsistencyScheduler(shift=SHIFT, gamma=0.0)
    trained = published(make, tmp_path / "student", 0.0, record_of(scheduler, *guidance))
    stock = DiffusionPipeline.from_pretrained(tmp_path / "student")
    kind = FlowMapEulerDiscreteScheduler if make is tiny_sd3 else FlowMatchEulerDiscreteScheduler
    assert type(stock.scheduler) is kind
    ours = ConsistencyPipeline.from_pretrained(tmp_path / "student")
    none = {"guidance_scale": 0.0 if make is tiny_z_image else guidance[1], **SMALL}
    for steps in (1, 2, 4):
        plain = draw(stock, num_inference_steps=steps, **none)
        torch.testing.assert_close(draw(ours, num_inference_steps=steps, **none), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(draw(trained, num_inference_steps=4, **none), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny_sana, tiny_qwen_image, tiny_wan, tiny_flux], ids=lambda make: make.__name__)
def test_students_of_other_families(make: Make, tmp_path: Path) -> None:
    guidance = ("embedded", 3.0) if make is tiny_flux else ("distilled", 1.0)
    record = record_of(FlowConsistencyScheduler(shift=SHIFT), *guidance)
    trained = published(make, tmp_path / "student", record=record)
    pipe = ConsistencyPipeline.from_pretrained(tmp_path / "student")
    size = SIZES.get(make, SMALL)
    name = "true_cfg_scale" if make is tiny_qwen_image else "guidance_scale"
    wanted = draw(trained, num_inference_steps=4, **{name: guidance[1]}, **size)
    assert torch.equal(draw(pipe, **size), wanted)
    assert pipe.stock_class() is type(trained)
    with pytest.raises(ValueError, match="negative prompt"):
        draw(pipe, negative_prompt="a coat", **size)


def test_images_are_as_large_as_in_training(student: tuple[DiffusionPipeline, Path], tmp_path: Path) -> None:
    record = replace(record_of(FlowConsistencyScheduler(shift=SHIFT)), resolution=16)
    published(tiny_sd3, tmp_path / "student", record=record)
    pipe = ConsistencyPipeline.from_pretrained(tmp_path / "student")
    assert draw(pipe).shape[-2:] == (16, 16)
    assert draw(pipe, height=32).shape[-2:] == (32, 32)
    assert draw(pipe, latents=torch.ones(1, 4, 8, 8)).shape[-2:] == (32, 32)


def test_half_precision_of_transformers_is_bfloat16(tmp_path: Path) -> None:
    pipe = tiny_wan()
    pipe.transformer.proj_out.bias.data.fill_(1e6)  # which float16 has not
    save_pipeline(pipe, tmp_path, True)
    stored = load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors")
    assert (stored["proj_out.bias"] == 1e6 * torch.ones(1, dtype=torch.bfloat16)).all()
    whole = {name for name, value in stored.items() if value.dtype == torch.float32}
    assert all({"time_embedder", "scale_shift_table", "norm2"} & {*name.split(".")} for name in whole)
    assert whole  # what diffusers keeps in float32 in whatever precision it loads the rest
    assert {value.dtype for name, value in stored.items() if name not in whole} == {torch.bfloat16}
    vae = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in vae.values()} == {torch.float16}


def test_a_saved_student_is_the_same_folder(student: tuple[DiffusionPipeline, Path], tmp_path: Path) -> None:
    pipe = ConsistencyPipeline.from_pretrained(student[1])
    pipe.save_pretrained(tmp_path / "again")
    files = {path.relative_to(student[1]) for path in student[1].rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    }
    assert all((student[1] / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    assert type(pipe.scheduler) is FlowConsistencyScheduler


def test_image_to_image_goes_on_with_the_scheduler(student: tuple[DiffusionPipeline, Path]) -> None:
    pipe = ConsistencyPipeline.from_pretrained(student[1])
    image = draw(pipe)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other) is StableDiffusion3Img2ImgPipeline
    assert type(other.scheduler) is FlowConsistencyScheduler
    weak, strong = (
        draw(other, image=image, strength=share, num_inference_steps=4, guidance_scale=1.0) for share in (0.25, 1.0)
    )
    assert weak.shape == image.shape
    assert not torch.equal(weak, strong)
    with pytest.raises(ValueError, match="AutoPipelineForImage2Image"):
        ConsistencyImg2ImgPipeline.from_pretrained(student[1])


def test_a_stock_pipeline_is_taken_up(student: tuple[DiffusionPipeline, Path]) -> None:
    stock = DiffusionPipeline.from_pretrained(student[1])
    pipe, loaded = ConsistencyPipeline.from_pipe(stock), ConsistencyPipeline.from_pretrained(student[1])
    assert (type(pipe), pipe.record, pipe.training) == (type(loaded), loaded.record, loaded.training)
    assert type(pipe.scheduler) is FlowConsistencyScheduler
    assert dict(pipe.scheduler.config) == dict(loaded.scheduler.config)
    assert torch.equal(draw(pipe), draw(loaded))
    assert type(stock.scheduler) is FlowMatchEulerDiscreteScheduler  # it stays as it was
    edited = AutoPipelineForImage2Image.from_pipe(pipe)
    again = ConsistencyPipeline.from_pipe(edited, scheduler=FlowConsistencyScheduler(shift=5.0))
    assert (again.record, again.scheduler.config.shift) == (loaded.record, 5.0)
    with pytest.raises(ValueError, match="The pipeline is a StableDiffusion3Pipeline; give it to ConsistencyPipeline"):
        ConsistencyImg2ImgPipeline.from_pipe(stock)


def test_a_stock_pipeline_without_record_stays_as_it_is() -> None:
    stock = tiny_flux()
    stock.transformer.to(torch.bfloat16)
    pipe = ConsistencyPipeline.from_pipe(stock)
    assert (pipe.record, pipe.scheduler) == (None, stock.scheduler)
    assert (pipe.transformer, pipe.transformer.dtype) == (stock.transformer, torch.bfloat16)
    assert ConsistencyPipeline.from_pipe(pipe, dtype=torch.float32).transformer.dtype == torch.float32
    asked = {"num_inference_steps": 2, **SMALL}
    assert torch.equal(draw(pipe, **asked), draw(stock, **asked))


def test_what_a_lora_brought_goes_from_pipe_to_pipe(tmp_path: Path) -> None:
    adapter(tiny_sd3, tmp_path / "lora", tmp_path / "base")
    pipe = ConsistencyPipeline.from_pipe(ConsistencyPipeline.from_pretrained(tmp_path / "lora"))
    assert pipe.record == read_record(tmp_path / "lora")
    pipe.unload_lora_weights()
    assert (pipe.record, type(pipe.scheduler)) == (None, FlowMatchEulerDiscreteScheduler)


def test_negative_prompts_need_a_branch(student: tuple[DiffusionPipeline, Path]) -> None:
    pipe = ConsistencyPipeline.from_pretrained(student[1])
    with pytest.raises(
        ValueError, match="At guidance_scale 1 there is no guidance, so a negative prompt has no branch"
    ):
        draw(pipe, negative_prompt="a coat")
    plain = draw(pipe, guidance_scale=1.5)
    assert not torch.equal(draw(pipe, guidance_scale=1.5, negative_prompt="a coat"), plain)
    with pytest.warns(UserWarning, match="burns the images") as told:
        draw(pipe, guidance_scale=5.0)
    assert told[0].filename == __file__


@pytest.mark.parametrize(("make", "name", "scale", "said"), [
    (tiny_qwen_image, "true_cfg_scale", 5.0, "true_cfg_scale 5 adds to .* use 1 to 2"),
    (tiny_z_image, "guidance_scale", 4.0, "guidance_scale 4 adds to .* use 0 to 1"),
])  # fmt: skip
def test_guidance_is_named_as_the_caller_gives_it(
    make: Make, name: str, scale: float, said: str, tmp_path: Path
) -> None:
    published(make, tmp_path)
    pipe = ConsistencyPipeline.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=said):
        draw(pipe, **{name: scale}, num_inference_steps=1, **SMALL)
    pipe.record = replace(pipe.record, guidance="none")
    least = "0" if make is tiny_z_image else "1"
    with pytest.raises(ValueError, match=rf"neither {name} above {least} \(found {scale:g}\)"):
        draw(pipe, **{name: scale}, **SMALL)


def test_a_compiled_network_has_the_same_manners(student: tuple[DiffusionPipeline, Path]) -> None:
    pipe = ConsistencyPipeline.from_pretrained(student[1])
    wanted = draw(pipe, num_inference_steps=1)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch.testing.assert_close(draw(pipe, num_inference_steps=1), wanted, atol=1e-5, rtol=1e-5)


def test_another_shift_is_told(student: tuple[DiffusionPipeline, Path], tmp_path: Path) -> None:
    pipe = published(tiny_sd3, tmp_path / "student")
    file = tmp_path / "student/scheduler/scheduler_config.json"
    file.write_text(file.read_text().replace('"shift": 3.0', '"shift": 5.0'))
    with pytest.warns(UserWarning, match=r"shift is 5\.0, in training it was 3\.0"):
        draw(ConsistencyPipeline.from_pretrained(tmp_path / "student"))
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(tmp_path / "student/scheduler")  # with nothing of ours
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mended = draw(ConsistencyPipeline.from_pretrained(tmp_path / "student"))
    assert torch.equal(mended, draw(pipe, num_inference_steps=4, guidance_scale=1.0))


def test_a_record_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    published(tiny_sd3, tmp_path / "student", record=record_of(FlowConsistencyScheduler(shift=SHIFT), "embedded", 3.0))
    with pytest.raises(ValueError, match="guidance is 'embedded', but this network takes no embedding"):
        ConsistencyPipeline.from_pretrained(tmp_path / "student")
    file = tmp_path / "student" / RECORD
    file.write_text(file.read_text().replace('"shift": 3.0', '"shift": null'))
    with pytest.raises(ValueError, match="shift of a FlowConsistencyScheduler must be above 0"):
        ConsistencyPipeline.from_pretrained(tmp_path / "student")


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux], ids=lambda make: make.__name__)
def test_the_folder_of_a_lora_is_a_student(make: Make, tmp_path: Path) -> None:
    trained = adapter(make, tmp_path / "lora", tmp_path / "base")
    if make is tiny_flux:
        record = read_record(tmp_path / "lora")
        content = json.dumps(vars(record) | {"guidance": "embedded", "recommended_guidance_scale": 3.0})
        (tmp_path / "lora" / RECORD).write_text(content)
    asked = {"num_inference_steps": 4, "guidance_scale": 3.0 if make is tiny_flux else 1.0, **SMALL}
    wanted = draw(trained, **asked)
    pipe = ConsistencyPipeline.from_pretrained(tmp_path / "lora")
    assert torch.equal(draw(pipe, **SMALL), wanted)
    measured = load_pipeline(str(tmp_path / "lora"))
    torch.testing.assert_close(draw(measured, **asked), wanted, atol=1e-5, rtol=1e-5)
    stock = make()
    stock.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    stock.scheduler = FlowConsistencyScheduler(shift=SHIFT)
    torch.testing.assert_close(draw(stock, **asked), wanted, atol=1e-5, rtol=1e-5)


def test_a_lora_comes_and_goes_with_its_record(tmp_path: Path) -> None:
    adapter(tiny_sd3, tmp_path / "lora", tmp_path / "base")
    pipe = ConsistencyPipeline.from_pretrained(tmp_path / "base")
    assert (pipe.record, type(pipe.scheduler)) == (None, FlowMatchEulerDiscreteScheduler)
    plain = draw(pipe, num_inference_steps=2)
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="student")
    assert pipe.record == read_record(tmp_path / "lora")
    student = draw(pipe)
    with pytest.raises(ValueError, match="A LoRA is on the network"):
        pipe.save_pretrained(tmp_path / "no")
    pipe.disable_lora()
    with pytest.warns(UserWarning, match=r"does not act.*call enable_lora\(\)"):
        draw(pipe)
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert (pipe.record, type(pipe.scheduler)) == (None, FlowMatchEulerDiscreteScheduler)
    assert torch.equal(draw(pipe, num_inference_steps=2), plain)
    pipe.load_lora_weights(tmp_path / "lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    fused = ConsistencyPipeline.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(draw(fused), student, atol=1e-5, rtol=1e-5)


def style(make: Make, folder: Path) -> Path:
    """A LoRA of somebody else, as diffusers saves it."""
    pipe = make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


@pytest.mark.parametrize("first", ["student", "style"])
def test_a_style_on_a_student(first: str, tmp_path: Path) -> None:
    adapter(tiny_sd3, tmp_path / "student", tmp_path / "base")
    style(tiny_sd3, tmp_path / "style")
    stock, pipe = tiny_sd3(), ConsistencyPipeline.from_pretrained(tmp_path / "base")
    for name in (first, {"student": "style", "style": "student"}[first]):
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        stock.load_lora_weights(tmp_path / name, adapter_name=name, weight_name="pytorch_lora_weights.safetensors")
    scheduler, asked = stock.scheduler, {"num_inference_steps": 4, "guidance_scale": 1.0}
    stock.set_adapters(["student", "style"])
    stock.scheduler = FlowConsistencyScheduler(shift=SHIFT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        both = draw(pipe)
    torch.testing.assert_close(both, draw(stock, **asked), atol=1e-5, rtol=1e-5)
    pipe.set_adapters(["student", "style"], [1.0, 0.0])
    assert not torch.equal(draw(pipe), both)
    pipe.set_adapters(["student", "style"])
    pipe.delete_adapters("student")
    assert (pipe.record, type(pipe.scheduler)) == (None, FlowMatchEulerDiscreteScheduler)
    stock.set_adapters("style")
    stock.scheduler = scheduler
    torch.testing.assert_close(draw(pipe, **asked), draw(stock, **asked), atol=1e-5, rtol=1e-5)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, **asked), draw(tiny_sd3(), **asked))


def test_without_a_student_the_last_lora_acts_as_in_diffusers(tmp_path: Path) -> None:
    pipe, folder = ConsistencyPipeline.from_pipe(tiny_sd3()), style(tiny_sd3, tmp_path / "style")
    for name in ("one", "two"):
        pipe.load_lora_weights(folder, adapter_name=name)
    assert pipe.get_active_adapters() == ["two"]


def test_a_lora_of_another_network_is_refused(tmp_path: Path) -> None:
    adapter(tiny_flux, tmp_path / "lora", tmp_path / "base")
    pipe = ConsistencyPipeline.from_pretrained(published_folder(tmp_path))
    with pytest.raises(ValueError, match="another architecture"):
        pipe.load_lora_weights(tmp_path / "lora")
    assert not pipe.get_list_adapters()


def published_folder(place: Path) -> Path:
    published(tiny_sd3, place / "student")
    return place / "student"
