"""The training scripts of models in EDM's coordinates: from data or a diffusion model to a published folder."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import load_file
from scripts import FOLDER, image_folder, run_script
from tiny import tiny_pipeline
from toys import assert_same, tensors

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.diffusion.views import EDMView, VPView, check_sigmas
from cm_diffusers.engine.averages import rebuild
from cm_diffusers.evaluation.sampling import generate
from cm_diffusers.models.dropout import DropoutConfig, set_dropout
from cm_diffusers.objectives.cd import CDConfig, CDObjective
from cm_diffusers.objectives.ct import CTConfig, CTObjective
from cm_diffusers.objectives.ect import ECTConfig, ECTObjective
from cm_diffusers.objectives.edm import EDMConfig, EDMObjective
from cm_diffusers.objectives.ict import ICTConfig, ICTObjective
from cm_diffusers.objectives.slct import SLCTConfig, SLCTObjective
from cm_diffusers.pipelines.latents import decode
from cm_diffusers.record import read_record
from cm_diffusers.tasks.image_models import StartConfig, load_image_model, load_vae


SMALL = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
COMMON = {"train_batch_size": 3, "max_train_steps": 4, "checkpointing_steps": 2, "report_to": "none", "resolution": 16}
FROM_DATA = {
    "train_edm": {},
    "train_ct": {"discretization_s_1": 6},
    "train_ict": {"discretization_s_0": 2, "discretization_s_1": 8},
    "train_slct": {"discretization_s_0": 2, "discretization_s_1": 8},
}
FROM_MODEL = {"distill_cd": {"num_scales": 6, "ema_decay": 0.9}, "tune_ect": {"stage_steps": 1, "q": 4}}
OBJECTIVES = {
    "train_edm": lambda view: EDMObjective(EDMConfig(), view),
    "train_ct": lambda view: CTObjective(CTConfig(), view),
    "train_ict": lambda view: ICTObjective(ICTConfig(), view),
    "train_slct": lambda view: SLCTObjective(SLCTConfig(), view),
    "distill_cd": lambda view: CDObjective(CDConfig(), view),
    "tune_ect": lambda view: ECTObjective(ECTConfig(), view),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Labelled images, the settings of a network, and diffusion models of three kinds."""
    home = tmp_path_factory.mktemp("images")
    image_folder(home / "data", 6, label=[0, 1, 2, 0, 1, 2])
    (home / "unet.json").write_text(json.dumps(SMALL))
    torch.manual_seed(0)
    tiny_pipeline().vae.save_pretrained(home / "vae")
    tiny_pipeline().save_pretrained(home / "text")
    unet = UNet2DModel(sample_size=16, in_channels=3, out_channels=3, **SMALL)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(home / "ddpm")
    run_script("train_edm", **of_data(home), **COMMON, output_dir=home / "edm")
    return home


def of_data(home: Path) -> dict:
    labels = {"label_column": "label", "num_classes": 3}
    return {"unet_config": home / "unet.json", "train_data_dir": home / "data", "validation_images": 0, **labels}


def of_model(home: Path, model: str) -> dict:
    labels = {"label_column": "label"} if model == "edm/pipeline" else {}
    return {
        "pretrained_teacher_model": home / model,
        "train_data_dir": home / "data",
        "validation_images": 0,
        **labels,
    }


def denoise(name: str, pipe: DiffusionPipeline, x: torch.Tensor, sigma: torch.Tensor, cond: dict) -> torch.Tensor:
    """As the objective of the script sees the student."""
    config = pipe.scheduler.config
    view = EDMView(config.sigma_data, config.noise_conditioning)
    objective = OBJECTIVES[name](view)
    called = objective.denoise if name == "train_edm" else objective.consistency
    return called(pipe.unet, x, sigma, cond)


@pytest.mark.parametrize("latents", [False, True], ids=["pixels", "latents"])
@pytest.mark.parametrize("name", FROM_DATA)
def test_from_data_to_a_published_student(home, tmp_path, name, latents) -> None:
    vae = {"pretrained_vae": home / "vae", "latent_cache_dir": home / "cache"} if latents else {}
    size = {"resolution": 32} if latents else {}
    run_script(name, **of_data(home), **FROM_DATA[name], **vae, **COMMON | size, output_dir=tmp_path / "run")
    pipe = ConsistencyPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    record = read_record(tmp_path / "run" / "pipeline")
    assert (record.method, record.base_model, record.guidance) == (name.removeprefix("train_"), "", "none")
    assert pipe.unet.config.num_class_embeds == 3
    assert (pipe.config.get("latents_std") is not None) == latents
    noise, sigma = torch.randn(2, *shape(pipe)), torch.tensor([80.0, 80.0], dtype=torch.float64)
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        expected = denoise(name, pipe, 80 * noise, sigma, {"class_labels": labels})
    if latents:
        mean, std = (torch.tensor(pipe.config[f"latents_{kind}"]).view(1, -1, 1, 1) for kind in ("mean", "std"))
        expected = expected * std / 0.5 + mean
    else:
        expected = expected.clamp(-1, 1)
    found = pipe(class_labels=labels, latents=noise, sigmas=[80.0], output_type="latent").images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def shape(pipe: DiffusionPipeline) -> tuple[int, int, int]:
    return pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size


@pytest.mark.parametrize("model", ["edm/pipeline", "ddpm", "text"])
@pytest.mark.parametrize("name", FROM_MODEL)
def test_from_a_diffusion_model_to_a_published_student(home, tmp_path, name, model) -> None:
    bounds = {"edm/pipeline": {}, "ddpm": {"sigma_min": 0.011}, "text": {"sigma_min": 0.03, "sigma_max": 14.5}}[model]
    if model == "text":
        bounds |= {"resolution": 32, "latent_cache_dir": home / "cache"}
    settings = FROM_MODEL[name] | COMMON | bounds
    run_script(name, **of_model(home, model), **settings, output_dir=tmp_path / "run")
    pipe = ConsistencyPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    record = read_record(tmp_path / "run" / "pipeline")
    assert record.method == name.rpartition("_")[2]
    assert record.guidance == ("distilled" if model == "text" else "none")
    assert pipe.scheduler.config.boundary_scalings == {"distill_cd": "cm", "tune_ect": "edm"}[name]
    assert pipe.scheduler.config.network == ("edm" if model == "edm/pipeline" else "vp")
    assert pipe.scheduler.config.sigma_data == (1.0 if model == "text" else 0.5)
    asked = {"prompt": "a coat"} if model == "text" else {"batch_size": 1}
    image = pipe(**asked, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert image.shape == (1, 3, settings["resolution"], settings["resolution"])
    assert image.isfinite().all()


@pytest.mark.parametrize("name", FROM_MODEL)
def test_a_text_student_is_sampled_as_it_was_trained(home, tmp_path, name) -> None:
    settings = FROM_MODEL[name] | COMMON | {"sigma_min": 0.03, "sigma_max": 14.5, "resolution": 32}
    settings |= {"latent_cache_dir": home / "cache", "recommended_sigmas": [14.5, 2.0, 0.5]}
    run_script(name, **of_model(home, "text"), **settings, output_dir=tmp_path / "run")
    pipe = ConsistencyPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    view = load_image_model(StartConfig(str(home / "text"))).view
    objective = {
        "distill_cd": lambda: CDObjective(CDConfig(sigma_min=0.03, sigma_max=14.5), view),
        "tune_ect": lambda: ECTObjective(ECTConfig(sigma_min=0.03, sigma_max=14.5), view),
    }[name]()
    noise, sigma = torch.randn(2, 4, 8, 8), torch.full((2,), 14.5, dtype=torch.float64)
    states = pipe.encode_prompt(["a coat", "a bag"], "cpu", 1, False)[0]
    with torch.no_grad():
        expected = objective.consistency(pipe.unet, 14.5 * noise, sigma, {"encoder_hidden_states": states})
    found = pipe(["a coat", "a bag"], latents=noise, sigmas=[14.5], output_type="latent").images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    pipe("a coat", output_type="latent")
    assert pipe.scheduler.sigmas.tolist()[:3] == [14.5, 2.0, 0.5]
    for steps, levels in {3: [14.5, 2.0, 0.5], 1: [14.5]}.items():
        generate(pipe, ["a coat"], [0], steps, 1.0, 1)
        assert pipe.scheduler.sigmas.tolist()[:-1] == levels


def test_guidance_of_a_text_teacher_is_distilled_and_recorded(home, tmp_path) -> None:
    settings = FROM_MODEL["distill_cd"] | COMMON | {"sigma_min": 0.03, "sigma_max": 14.5, "resolution": 32}
    settings |= {"latent_cache_dir": home / "cache", "learning_rate": 1e-3}
    students = {}
    for w in (0.0, 3.0):
        run_script("distill_cd", **of_model(home, "text"), **settings, w=w, output_dir=tmp_path / f"{w}")
        record = read_record(tmp_path / f"{w}" / "pipeline")
        assert (record.guidance, record.w_min, record.w_max, record.recommended_guidance_scale) == (
            "distilled",
            w,
            w,
            1,
        )
        students[w] = load_file(tmp_path / f"{w}" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(value, students[3.0][name]) for name, value in students[0.0].items())


def test_a_student_starts_as_its_diffusion_model(home, tmp_path) -> None:
    """Without learning, one step of ECT's student is the diffusion model's denoiser."""
    run_script(
        "tune_ect", **of_model(home, "ddpm"), **COMMON, sigma_min=0.011, learning_rate=0, output_dir=tmp_path / "run"
    )
    pipe = ConsistencyPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    teacher = DDPMPipeline.from_pretrained(home / "ddpm")
    sigma, noise = 80.0, torch.randn(2, 3, 16, 16)
    found = pipe(latents=noise, sigmas=[sigma], output_type="latent").images
    alphas = teacher.scheduler.alphas_cumprod.double()
    ln_sigma = ((1 - alphas) / alphas).log() / 2
    above = int((ln_sigma > torch.tensor(sigma).log()).nonzero()[0])
    share = (torch.tensor(sigma).double().log() - ln_sigma[above - 1]) / (ln_sigma[above] - ln_sigma[above - 1])
    x = sigma * noise
    with torch.no_grad():
        epsilon = teacher.unet(x / (1 + sigma**2) ** 0.5, torch.tensor(above - 1 + share.item())).sample
    torch.testing.assert_close(found, (x - sigma * epsilon).clamp(-1, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*FROM_DATA, *FROM_MODEL])
def test_resume_is_bit_exact_across_stages(home, tmp_path, name) -> None:
    start = of_data(home) if name in FROM_DATA else of_model(home, "edm/pipeline")
    settings = (FROM_DATA | FROM_MODEL)[name] | start | COMMON | {"dropout": 0.2, "ema_sigma_rels": [0.1]}
    run_script(name, **settings, output_dir=tmp_path / "whole")
    run_script(
        name, **settings, output_dir=tmp_path / "again", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2"
    )
    assert_same(tensors(tmp_path / "again" / "checkpoint-4"), tensors(tmp_path / "whole" / "checkpoint-4"))


def test_a_student_of_pixels_loads_without_this_package(home, tmp_path) -> None:
    run_script("train_ict", **of_data(home), **FROM_DATA["train_ict"], **COMMON, output_dir=tmp_path / "run")
    folder = tmp_path / "run" / "pipeline"
    stock, noise = ConsistencyModelPipeline.from_pretrained(folder), torch.randn(1, 3, 16, 16)
    images = stock(class_labels=[1], latents=noise, output_type="pt").images
    ours = ConsistencyPipeline.from_pretrained(folder)
    assert list(ours.scheduler.config.recommended_sigmas) == [80.0, 0.821]
    torch.testing.assert_close(images, ours(class_labels=[1], latents=noise, sigmas=[80.0], output_type="pt").images)


def test_another_average_becomes_a_pipeline(home, tmp_path) -> None:
    settings = FROM_DATA["train_ict"] | COMMON | {"ema_sigma_rels": [0.05, 0.1]}
    run_script("train_ict", **of_data(home), **settings, output_dir=tmp_path / "run")
    run_script("export_average", run_dir=tmp_path / "run", sigma_rel=0.07, step=4, output_dir=tmp_path / "average")
    assert f'from_pretrained("{(tmp_path / "average").name}")' in (tmp_path / "average" / "README.md").read_text()
    rebuilt, _ = rebuild(tmp_path / "run", 0.07)
    last = load_file(tmp_path / "run" / "averages" / "step-4" / "0.1.safetensors")
    assert any(not torch.allclose(rebuilt[name], value, atol=1e-7) for name, value in last.items())
    found = ConsistencyPipeline.from_pretrained(tmp_path / "average").unet.state_dict()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in rebuilt.items())
    assert "| sigma_rel | 0.07 |" in (tmp_path / "average" / "README.md").read_text()


def test_grids_show_the_student(home, tmp_path) -> None:
    settings = of_data(home) | FROM_DATA["train_ict"] | COMMON | {"validation_images": 3, "validation_steps": 2}
    run_script("train_ict", **settings, output_dir=tmp_path / "run")
    assert [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())] == [
        "step-000002.png",
        "step-000004.png",
    ]
    assert (tmp_path / "run" / "pipeline" / "samples.png").is_file()


def test_norm_scales_are_frozen_for_slct_only(home, tmp_path) -> None:
    for name, flags in {"frozen": {}, "free": {"norm_scales": True}}.items():
        run_script(
            "train_slct", **of_data(home), **FROM_DATA["train_slct"], **COMMON, **flags, output_dir=tmp_path / name
        )
    scales = {
        name: ConsistencyPipeline.from_pretrained(tmp_path / name / "pipeline").unet.conv_norm_out.weight
        for name in ("frozen", "free")
    }
    assert (scales["frozen"] == 1).all()
    assert (scales["free"] != 1).any()


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        ("train_ict", {"ema_decay": 0.9}, "--ema_decay has no effect with ict"),
        ("train_ct", {"ema_decay": 0.9}, "--ema_decay has no effect with ct"),
        ("train_ict", {"num_classes": 2}, "--label_column"),
        ("train_ict", {"sigma_min": 90}, "--sigma_min 90"),
        ("train_ict", {"dropout": 1}, "--dropout must be at least 0 and below 1, but it is 1"),
        ("train_ict", {"dropout_max_resolution": 8}, "both"),
        ("train_ict", {"dropout": 0.1, "dropout_max_resolution": 4}, "at least that"),
        ("train_slct", {"train_batch_size": 1}, "--train_batch_size 2"),
        ("train_ict", {"ema_sigma_rels": [0.5]}, "--ema_sigma_rels must be above 0 and below 0.2886"),
        ("train_ict", {"recommended_sigmas": [0.8, 80]}, "descend"),
        ("train_ict", {"validation_prompts": ["a coat"]}, "leave them out"),
        ("train_ict", {"validation_nfe": [1, 20]}, "more than the 9 points"),
        ("train_ict", {"validation_images": -1}, "must be at least 0"),
        ("train_ict", {"resolution": 17}, "halves 17 to fractions"),
    ],
)
def test_wrong_input_ends_with_one_sentence(home, tmp_path, name, flags, sentence) -> None:
    settings = of_data(home) | FROM_DATA[name] | COMMON | flags
    with pytest.raises(SystemExit) as ended:
        run_script(name, **settings, output_dir=tmp_path / "run")
    assert str(ended.value).startswith("error: ")
    assert sentence in str(ended.value)
    assert "\n" not in str(ended.value)


def test_settings_of_the_network_are_checked(home, tmp_path) -> None:
    for content, sentence in {
        "{": "JSON",
        '{"sample_size": 3}': "leave them out",
        '{"odd": 1}': "is no UNet2DModel",
    }.items():
        (tmp_path / "unet.json").write_text(content)
        with pytest.raises(SystemExit, match=sentence):
            run_script(
                "train_ict",
                **of_data(home) | {"unet_config": tmp_path / "unet.json"},
                **COMMON,
                output_dir=tmp_path / "run",
            )


def test_models_that_cannot_be_started_from_are_refused(home, tmp_path) -> None:
    with pytest.raises(ValueError, match="neither a pipeline folder here nor a Hub id"):
        load_image_model(StartConfig(str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"--sigma_data is 0.7, but .* was trained with 0.5"):
        load_image_model(StartConfig(str(home / "edm" / "pipeline"), sigma_data=0.7))
    learned = UNet2DModel(sample_size=16, in_channels=3, out_channels=6, **SMALL)
    DDPMPipeline(learned, DDPMScheduler()).save_pretrained(tmp_path / "learned")
    with pytest.raises(ValueError, match="as many channels as it sees"):
        load_image_model(StartConfig(str(tmp_path / "learned")))
    grey = UNet2DModel(sample_size=16, in_channels=1, out_channels=1, **SMALL)
    DDPMPipeline(grey, DDPMScheduler()).save_pretrained(tmp_path / "grey")
    with pytest.raises(ValueError, match="sees 1 channels, but images have 3"):
        load_image_model(StartConfig(str(tmp_path / "grey")))
    DDPMPipeline(UNet2DModel(None, 3, 3, **SMALL), DDPMScheduler()).save_pretrained(tmp_path / "any")
    with pytest.raises(ValueError, match="no square sample_size"):
        load_image_model(StartConfig(str(tmp_path / "any")))
    unet, vqvae = UNet2DModel(16, 3, 3, **SMALL), VQModel(block_out_channels=(8,), norm_num_groups=4)
    LDMPipeline(vqvae, unet, DDIMScheduler()).save_pretrained(tmp_path / "ldm")
    with pytest.raises(ValueError, match="which also has vqvae"):
        load_image_model(StartConfig(str(tmp_path / "ldm")))
    run_script("train_ict", **of_data(home), **FROM_DATA["train_ict"], **COMMON, output_dir=tmp_path / "student")
    with pytest.raises(ValueError, match="a consistency model already"):
        load_image_model(StartConfig(str(tmp_path / "student" / "pipeline")))


@pytest.mark.parametrize(
    ("model", "flags", "sentence"),
    [
        ("ddpm", {"label_column": "label", "sigma_min": 0.011}, "takes no classes: leave out"),
        ("edm/pipeline", {"num_classes": 4}, "has 3 classes: leave out --num_classes."),
        ("ddpm", {"resolution": 32, "sigma_min": 0.011}, "give --resolution 16"),
        ("ddpm", {}, "--sigma_min 0.002 is less noise than the network knows; give at least 0.01"),
        ("text", {"sigma_min": 0.03}, "--sigma_max 80.0 is more noise than the network knows; give at most 14.6"),
    ],
)
def test_what_a_start_cannot_do_is_said(home, tmp_path, model, flags, sentence) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script("tune_ect", **of_model(home, model) | COMMON | flags, output_dir=tmp_path / "run")
    assert sentence in str(ended.value)


@pytest.mark.parametrize("recipe", ["cd_cifar10", "ect_cifar10"])
def test_recipes_stay_within_what_their_start_knows(recipe) -> None:
    """google/ddpm-cifar10-32 has diffusers' default schedule."""
    words = shlex.split((FOLDER / "recipes" / f"{recipe}.args").read_text(), comments=True)
    low, high = (float(words[words.index(f"--sigma_{name}") + 1]) for name in ("min", "max"))
    check_sigmas(VPView(DiscreteVP.from_scheduler(DDPMScheduler()), "epsilon", 0.5), low, high)


def test_a_curriculum_that_spans_the_training_keeps_its_length(home, tmp_path) -> None:
    settings = of_data(home) | FROM_DATA["train_ict"] | COMMON
    run_script("train_ict", **settings, output_dir=tmp_path / "run")
    longer = settings | {"max_train_steps": 8, "resume_from_checkpoint": "latest"}
    with pytest.raises(SystemExit, match="max_train_steps was 4, now 8"):
        run_script("train_ict", **longer, output_dir=tmp_path / "run")


def test_a_pipeline_is_never_exported_over_something(home, tmp_path) -> None:
    settings = FROM_DATA["train_ict"] | COMMON | {"ema_sigma_rels": [0.1]}
    run_script("train_ict", **of_data(home), **settings, output_dir=tmp_path / "run")
    with pytest.raises(SystemExit, match="exists already: give a new folder"):
        run_script("export_average", run_dir=tmp_path / "run", sigma_rel=0.1, output_dir=tmp_path / "run")


@pytest.mark.parametrize("layout", ["alone", "in a pipeline"])
def test_a_vae_is_found_alone_and_in_a_pipeline(home, layout) -> None:
    path = {"alone": home / "vae", "in a pipeline": home / "text"}[layout]
    assert load_vae(str(path)).config.latent_channels == 4


def test_a_vae_that_normalises_channels_is_refused(tmp_path) -> None:
    vae = tiny_pipeline().vae
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="normalises every channel"):
        load_vae(str(tmp_path / "vae"))


def test_latents_of_a_shifted_vae_come_back(home) -> None:
    pipe = tiny_pipeline()
    pipe.vae.register_to_config(shift_factor=0.5, scaling_factor=0.7)
    pipe.is_xl = False
    raw = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(decode(pipe, (raw - 0.5) * 0.7), pipe.vae.decode(raw).sample)


def test_dropout_acts_where_it_should() -> None:
    unet = UNet2DModel(sample_size=16, in_channels=3, out_channels=3, **SMALL)
    set_dropout(unet, DropoutConfig(0.3, 8))
    rates = lambda block: {resnet.dropout.p for resnet in block.resnets}  # noqa: E731
    assert [rates(block) for block in unet.down_blocks] == [{0.0}, {0.3}]
    assert [rates(block) for block in unet.up_blocks] == [{0.3}, {0.0}]
    assert rates(unet.mid_block) == {0.3}
    for size, least in (((16, 8), {0.0}), ([4, 16], {0.0}), ((8, 8), {0.3})):  # by the longer side
        unet.register_to_config(sample_size=size)
        set_dropout(unet, DropoutConfig(0.3, 8))
        assert [rates(block) for block in unet.down_blocks] == [least, {0.3}]
    unet.register_to_config(sample_size=None)
    set_dropout(unet, DropoutConfig(0.2))
    assert [rates(block) for block in unet.down_blocks] == [{0.2}, {0.2}]
    with pytest.raises(ValueError, match="config has no sample_size: leave the flag out, or write sample_size there"):
        set_dropout(unet, DropoutConfig(0.3, 8))
