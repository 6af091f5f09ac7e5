"""Stable Diffusion XL shaped teachers: what the network is told, and a distillation from end to end."""

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, LatentConsistencyModelPipeline, LCMScheduler
from diffusers import StableDiffusionXLPipeline as XLPipeline
from PIL import Image, features
from safetensors.torch import load_file
from scripts import CAPTIONS, captioned_folder, data_flags, image_folder, run_script
from tiny import tiny_pipeline, tiny_unet, tiny_vae
from tiny_xl import tiny_xl_pipeline, tiny_xl_unet

from cm_diffusers.data.encoders import Encoders, placed
from cm_diffusers.data.framing import Framing
from cm_diffusers.data.preprocessing import decode_image, preprocess, upright_size
from cm_diffusers.data.sampler import Position, batch_rows
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.diffusion.denoisers import as_denoiser
from cm_diffusers.diffusion.guidance import guidance_embedding, guide
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.models.families.unet import is_xl
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_scheduler
from cm_diffusers.tasks import callbacks


SHARED = {
    "max_train_steps": 2,
    "checkpointing_steps": 2,
    "learning_rate": 1e-2,
    "export_ema_decay": 0.5,
    "num_ddim_timesteps": 20,
    "proportion_empty_prompts": 0.2,
}
KINDS = {
    "full": {"unet_time_cond_proj_dim": 16},
    "lora": {"lora": True, "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.5},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("sdxl")
    image_folder(home / "data")
    tiny_xl_pipeline().save_pretrained(home / "teacher")
    return home


@pytest.fixture(scope="module", params=["full", "lora"])
def student(request, home) -> Path:
    flags = data_flags(home / "data", home / "cache") | {"pretrained_teacher_model": home / "teacher"}
    run_script("distill_lcm", **flags | SHARED | KINDS[request.param], output_dir=home / request.param)
    return home / request.param


@pytest.fixture
def teacher(home) -> XLPipeline:
    return load_teacher(TeacherConfig(str(home / "teacher")))


@pytest.fixture
def config(home, tmp_path) -> DataConfig:
    return DataConfig(
        train_data_dir=str(home / "data"),
        resolution=32,
        train_batch_size=6,
        latent_cache_dir=str(tmp_path / "latents"),
    )


def inputs(size: int = 2) -> dict:
    return {
        "sample": torch.randn(size, 4, 8, 8),
        "timestep": torch.tensor([19, 999][:size]),
        "encoder_hidden_states": torch.randn(size, 16, 56),
        "added_cond_kwargs": {"text_embeds": torch.randn(size, 20), "time_ids": 40 * torch.rand(size, 6)},
    }


@torch.no_grad()
def output(network, **values) -> torch.Tensor:
    return network(**values, return_dict=False)[0]


def image(pipe: DiffusionPipeline, guidance_scale: float) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    arguments = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "output_type": "np"}
    return pipe(CAPTIONS[0], generator=generator, **arguments).images[0]


def settings(kind: str) -> StudentConfig:
    return StudentConfig(**KINDS[kind])


def in_memory(student: Path, teacher: XLPipeline) -> XLPipeline:
    """The pipeline as it was when training ended, from the checkpoint's moving average."""
    network = make_networks(teacher.unet, settings(student.name)).student
    average = load_file(student / "checkpoint-2" / "export_ema.safetensors")
    assert not network.load_state_dict(average, strict=False).unexpected_keys
    return lcm_pipeline(teacher, network.eval(), lcm_scheduler(teacher, 20, 10.0))


def reloaded(student: Path, home: Path) -> XLPipeline:
    """As a user gets it, with diffusers alone."""
    if student.name == "full":
        return DiffusionPipeline.from_pretrained(student / "pipeline")
    pipe = XLPipeline.from_pretrained(home / "teacher")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=20)
    pipe.load_lora_weights(student / "lora")
    return pipe


def test_a_distilled_student_samples_as_in_memory(home, student, teacher) -> None:
    scale = 6.0 if student.name == "full" else 1.0
    untrained = image(lcm_pipeline(teacher, teacher.unet, lcm_scheduler(teacher, 20, 10.0)), 1.0)
    pipe = reloaded(student, home)
    assert type(pipe) is XLPipeline
    assert type(pipe.scheduler) is LCMScheduler
    assert pipe.config.force_zeros_for_empty_prompt
    found = image(pipe, scale)
    np.testing.assert_allclose(found, image(in_memory(student, teacher), scale), rtol=0, atol=1e-6)
    assert np.abs(found - untrained).max() > 1e-3


def test_guidance_is_an_input_of_the_full_student(home, teacher) -> None:
    network = make_networks(teacher.unet, settings("full")).student.eval()
    torch.nn.init.normal_(network.time_embedding.cond_proj.weight)
    pipe = lcm_pipeline(teacher, network, lcm_scheduler(teacher, 20, 10.0))
    assert np.abs(image(pipe, 2.0) - image(pipe, 8.0)).max() > 1e-5


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_student_starts_as_the_teacher(kind) -> None:
    unet = tiny_xl_unet().requires_grad_(False)
    given = inputs()
    expected = output(unet, **given)
    nets = make_networks(unet, settings(kind))
    strength = {"timestep_cond": guidance_embedding(torch.tensor([2.0, 14.0]), 16)} if kind == "full" else {}
    assert torch.equal(output(nets.student.eval(), **given, **strength), expected)
    with torch.no_grad():
        for p in nets.student.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    assert not torch.equal(output(nets.student, **given, **strength), expected)
    assert torch.equal(output(nets.teacher, **given), expected)


def test_both_towers_are_frozen(teacher) -> None:
    parts = [part for part in teacher.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 4
    assert not any(p.requires_grad or part.training for part in parts for p in part.parameters())


@pytest.mark.parametrize("script", ["distill_lcm", "finetune_lcf"])
def test_validation_has_the_training_resolution(home, tmp_path, monkeypatch, script) -> None:
    """Not the teacher's default, 32 x 32."""
    shown = []
    monkeypatch.setattr(callbacks, "image_grid", lambda rows, *_: shown.extend(rows) or Image.new("RGB", (8, 8)))
    flags = data_flags(home / "data", tmp_path / "cache") | {"resolution": 16, "max_train_steps": 1}
    start = {"pretrained_teacher_model": home / "teacher", "lora": True, "lora_rank": 2, "validation_teacher_steps": 2}
    if script == "finetune_lcf":
        teacher = load_teacher(TeacherConfig(str(home / "teacher")))
        lcm_pipeline(teacher, teacher.unet, lcm_scheduler(teacher, 20, 10.0)).save_pretrained(tmp_path / "student")
        start = {"pretrained_student_model": tmp_path / "student"}
    grid = {"validation_prompts": ["a coat"], "validation_steps": 1, "validation_nfe": [1], "validation_seeds": [0]}
    run_script(script, **flags | start | grid, output_dir=tmp_path / "run")
    assert [tuple(images.shape) for images in shown] == [(1, 3, 16, 16)] * (2 if script == "distill_lcm" else 1)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_stock_pipeline_keeps_the_unconditional_branch(zeros) -> None:
    teacher = tiny_xl_pipeline()
    teacher.register_to_config(force_zeros_for_empty_prompt=zeros)
    pipe = lcm_pipeline(teacher, teacher.unet, lcm_scheduler(teacher, 50, 10.0))
    assert (type(pipe), pipe.config.force_zeros_for_empty_prompt) == (XLPipeline, zeros)


def test_an_embedded_student_of_another_shape_keeps_lcms_pipeline() -> None:
    teacher = tiny_pipeline()
    scheduler = lcm_scheduler(teacher, 50, 10.0)
    assert type(lcm_pipeline(teacher, tiny_unet(time_cond_proj_dim=16), scheduler)) is LatentConsistencyModelPipeline
    assert type(lcm_pipeline(teacher, teacher.unet, scheduler)) is type(teacher)
    assert not is_xl(teacher.unet)


def test_the_published_scheduler() -> None:
    """Stable Diffusion XL ships Euler's; the process and the student's scheduler must come out of it."""
    euler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    teacher = tiny_xl_pipeline()
    expected = DiscreteVP.from_scheduler(teacher.scheduler)
    teacher.scheduler = euler
    scheduler = lcm_scheduler(teacher, 20, 10.0)
    for found in (DiscreteVP.from_scheduler(euler), DiscreteVP.from_scheduler(scheduler)):
        torch.testing.assert_close(found.alphas_cumprod, expected.alphas_cumprod)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


# ---- what the network is told


@pytest.mark.parametrize("zeros", [True, False])
def test_guided_teacher_is_the_pipelines(zeros, monkeypatch) -> None:
    """Equal to the noise that StableDiffusionXLPipeline gives its scheduler, in the first of five steps."""
    pipe, seen = tiny_xl_pipeline(), {}
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    stock = pipe.scheduler.step

    def spy(noise, t, sample, **kwargs):
        seen.setdefault("noise", (noise, t, sample))
        return stock(noise, t, sample, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", spy)
    sizes = {"original_size": (72, 50), "crops_coords_top_left": (8, 3), "target_size": (32, 32)}
    pipe(
        list(CAPTIONS[:2]),
        num_inference_steps=5,
        guidance_scale=6.0,
        height=32,
        width=32,
        output_type="latent",
        **sizes,
    )
    expected, t, sample = seen["noise"]
    encode, ids = Encoders.from_pipeline(pipe).encode_prompts, torch.tensor([[72.0, 50, 8, 3, 32, 32]] * 2)
    cond, uncond = ({**encode(prompts), "time_ids": ids} for prompts in (list(CAPTIONS[:2]), ["", ""]))
    denoise = as_denoiser(pipe.unet, DiscreteVP.from_scheduler(pipe.scheduler), "epsilon")
    with torch.no_grad():
        found = guide(denoise, cond, uncond, torch.full((2,), 5.0))(sample, t.repeat(2)).noise
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def first(config: DataConfig, pipe: DiffusionPipeline, count: int = 1, **position) -> list:
    return list(islice(text_image_batches(config, Encoders.from_pipeline(pipe), 0, **position)(0), count))


def test_batches_carry_what_the_unet_takes(config, teacher) -> None:
    batch = first(config, teacher)[0]
    shapes = {name: tuple(value.shape) for name, value in batch.cond.items()}
    assert shapes == {"encoder_hidden_states": (6, 16, 56), "text_embeds": (6, 20), "time_ids": (6, 6)}
    assert {name: tuple(value.shape) for name, value in batch.uncond.items()} == shapes
    assert not batch.uncond["encoder_hidden_states"].any()
    assert not batch.uncond["text_embeds"].any()
    assert torch.equal(batch.uncond["time_ids"], batch.cond["time_ids"])
    assert batch.cond["time_ids"].dtype == torch.float32
    stock = teacher.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    order = [row % len(CAPTIONS) for row in batch_rows(0, 6, 6, Position(0))]
    torch.testing.assert_close(batch.cond["encoder_hidden_states"], stock[0][order], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch.cond["text_embeds"], stock[2][order], rtol=1e-3, atol=1e-3)


def test_dropped_captions_are_the_unconditional_branch(config, teacher) -> None:
    config.proportion_empty_prompts = 1.0
    batch = first(config, teacher)[0]
    for name in ("encoder_hidden_states", "text_embeds"):
        assert not batch.cond[name].any()


def test_without_forced_zeros_the_empty_prompt_is_encoded(config, teacher) -> None:
    zeros = first(config, teacher)[0]
    teacher.register_to_config(force_zeros_for_empty_prompt=False)
    batch = first(config, teacher)[0]
    expected = teacher.encode_prompt("a", negative_prompt="")
    torch.testing.assert_close(batch.uncond["encoder_hidden_states"][:1], expected[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch.uncond["text_embeds"][:1], expected[3], rtol=1e-3, atol=1e-3)
    assert torch.equal(batch.cond["encoder_hidden_states"], zeros.cond["encoder_hidden_states"])


def encoded(width: int, height: int, kind: str = "PNG", orientation: int | None = None) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format=kind, exif=exif)
    return buffer.getvalue()


def framed(tmp_path: Path, files: list[bytes], **values) -> tuple[Framing, list[dict]]:
    folder = str(captioned_folder(tmp_path / "set", files))
    config = DataConfig(train_data_dir=folder, resolution=32, **values)
    dataset = load_image_text(config)
    return Framing.of(dataset, config, sized=True), dataset["image"][:]


def test_time_ids_of_centre_crops(tmp_path) -> None:
    """Height and width of the file when upright, top and left after resizing, 32 x 32."""
    files = [encoded(64, 96), encoded(40, 36), encoded(100, 50, "JPEG", orientation=6), encoded(20, 16)]
    framing, _ = framed(tmp_path, files, center_crop=True)
    assert framing.time_ids(np.arange(4), np.zeros(4, int)).tolist() == [
        [96, 64, 8, 0, 32, 32],  # resized to 48 x 32
        [36, 40, 0, 2, 32, 32],  # to 32 x 36
        [100, 50, 16, 0, 32, 32],  # lies on its side in the file; to 64 x 32
        [16, 20, 0, 4, 32, 32],  # enlarged to 32 x 40
    ]


def test_time_ids_say_where_the_crop_is_in_what_the_network_sees(tmp_path) -> None:
    """Every variant's pixels are found at its top and left in the resized image, mirrored as the variant is."""
    framing, records = framed(tmp_path, [encoded(44, 32), encoded(32, 57)], random_flip=True, num_crops=4)
    assert framing.variants == 8
    corners = set()
    for row, record in enumerate(records):
        whole = torch.from_numpy(np.array(decode_image(record))).permute(2, 0, 1).float().div(127.5).sub(1)
        for variant in range(8):
            ids = framing.time_ids(np.array([row]), np.array([variant]))[0].int().tolist()
            top, left = ids[2:4]
            assert ids[:2] == list(whole.shape[1:])
            shown = whole.flip(-1) if framing.view(row, variant).flip else whole
            seen = preprocess(decode_image(record), framing.config, framing.view(row, variant))
            assert torch.equal(shown[:, top : top + 32, left : left + 32], seen)
            corners.add((row, top, left))
    assert len(corners) > 10


def test_mirrored_crops_count_from_the_other_side(tmp_path) -> None:
    framing, _ = framed(tmp_path, [encoded(44, 32)], random_flip=True, num_crops=3)
    ids = framing.time_ids(np.zeros(6, int), np.arange(6))
    assert torch.equal(ids[0::2, 3] + ids[1::2, 3], torch.full((3,), 12.0))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "MPO", "AVIF"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_sizes_come_from_headers(kind, orientation, monkeypatch) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow lacks it")
    record = {"bytes": encoded(9, 5, kind, orientation), "path": None}
    size = decode_image(record).size[::-1]
    assert size == ((9, 5) if (orientation or 1) > 4 else (5, 9))
    if not (kind == "PNG" and orientation):
        monkeypatch.setattr(Image.Image, "load", None)
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert upright_size(record) == size


def test_files_without_a_size() -> None:
    assert upright_size({"bytes": b"not an image", "path": None}) is None
    assert upright_size(None) is None


def test_time_ids_pass_through_the_cache(config, teacher, tmp_path) -> None:
    config.random_flip, config.num_crops = True, 2
    batches = first(config, teacher, 3)
    again = first(config, teacher, 3)
    config.cache_latents = False
    for one, two, three in zip(batches, again, first(config, teacher, 3), strict=True):
        for other in (two, three):
            assert torch.equal(one.x0, other.x0)
            assert all(torch.equal(one.cond[name], other.cond[name]) for name in one.cond)
    assert len({tuple(row) for batch in batches for row in batch.cond["time_ids"].tolist()}) > 2


def test_two_resolutions_share_a_cache_folder(config, teacher) -> None:
    def sizes() -> tuple:
        batch = first(config, teacher)[0]
        return batch.x0.shape[-1], batch.cond["time_ids"][0, 4:].tolist()

    assert sizes() == (8, [32, 32])
    config.resolution = 16
    assert sizes() == (4, [16, 16])
    config.resolution = 32
    assert sizes() == (8, [32, 32])


# ---- what teachers are on disk


def test_half_precision_on_disk_is_float32_in_memory(tmp_path, config) -> None:
    half = tiny_xl_pipeline()
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(half, name).half()
    half.save_pretrained(tmp_path / "half", variant="fp16")
    teacher = load_teacher(TeacherConfig(str(tmp_path / "half"), teacher_variant="fp16"))
    parts = {name: part for name, part in teacher.components.items() if isinstance(part, torch.nn.Module)}
    assert parts.keys() == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert {p.dtype for part in parts.values() for p in part.parameters()} == {torch.float32}
    for name, part in parts.items():
        stored = getattr(half, name).state_dict()
        assert all(torch.equal(value, stored[key].float()) for key, value in part.state_dict().items())
    assert all(value.dtype == torch.float32 for value in first(config, teacher)[0].cond.values())


def test_another_vae(home, tmp_path, config, teacher) -> None:
    torch.manual_seed(5)
    tiny_vae().half().save_pretrained(tmp_path / "vae")
    path = str(home / "teacher")
    other = load_teacher(TeacherConfig(path, pretrained_vae_model_name_or_path=str(tmp_path / "vae")))
    assert {p.dtype for p in other.vae.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in other.vae.parameters())
    assert not torch.allclose(first(config, other)[0].x0, first(config, teacher)[0].x0)
    with pytest.raises(ValueError, match=r"--pretrained_vae_model_name_or_path .*nowhere does not load: "):
        load_teacher(TeacherConfig(path, pretrained_vae_model_name_or_path=str(tmp_path / "nowhere")))


def test_a_vae_that_overflows_in_half_precision(config) -> None:
    pipe = tiny_xl_pipeline()
    with torch.no_grad():  # 1e5 inside the encoder and back, as published XL VAEs do
        pipe.vae.encoder.conv_out.weight.mul_(1e6)
        pipe.vae.encoder.conv_out.bias.mul_(1e6)
        pipe.vae.quant_conv.weight.mul_(1e-6)
    assert first(config, pipe)[0].x0.isfinite().all()
    config.vae_dtype = "float16"
    with pytest.raises(ValueError, match="latents are not finite in float16: pass --vae_dtype float32"):
        first(config, pipe)


def refusal(folder: Path, **values) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 the caller compares the message
        load_teacher(TeacherConfig(str(folder), **values))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_teacher_without_its_first_tower(tmp_path) -> None:
    """As the XL refiner is."""
    tiny_xl_pipeline(text_encoder=None, tokenizer=None).save_pretrained(tmp_path)
    assert refusal(tmp_path) == (
        f"{tmp_path} is a StableDiffusionXLPipeline without text_encoder; give a text-to-image pipeline."
    )


def test_a_teacher_for_inpainting(tmp_path) -> None:
    tiny_xl_pipeline(unet=tiny_xl_unet(in_channels=9)).save_pretrained(tmp_path)
    assert "takes 9 channels and its VAE makes 4; give a text-to-image pipeline" in refusal(tmp_path)


def test_a_vae_that_normalises_channels(tmp_path) -> None:
    pipe = tiny_xl_pipeline()
    pipe.vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    pipe.save_pretrained(tmp_path)
    assert "normalises every channel (latents_mean, latents_std in its config)" in refusal(tmp_path)


def test_a_variant_that_is_not_there(home) -> None:
    assert refusal(home / "teacher", teacher_variant="fp16").startswith(f"{home / 'teacher'} does not load: ")


def test_pickled_weights_are_not_read(home, tmp_path) -> None:
    pipe = tiny_xl_pipeline()
    pipe.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").rename(
        tmp_path / "unet" / "diffusion_pytorch_model.bin"
    )
    assert "does not load" in refusal(tmp_path)


class Tower(torch.nn.Linear):
    def to(self, device):
        self.places = [*getattr(self, "places", []), str(device)]
        return self


def test_towers_run_where_they_are_put_and_come_back(teacher) -> None:
    tower = Tower(2, 2)
    with pytest.raises(KeyError), placed((tower,), "cuda:1"):  # noqa: PT012
        assert tower.places == ["cuda:1"]
        raise KeyError
    assert tower.places == ["cuda:1", "cpu"]
    assert Encoders.from_pipeline(teacher).towers == (teacher.text_encoder, teacher.text_encoder_2)
