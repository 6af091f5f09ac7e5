"""`train_motion.py` and `distill_animatelcm.py` end to end on random pipelines, and a stage in two processes."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import AnimateDiffPipeline, ControlNetModel, LCMScheduler, MotionAdapter, StableDiffusionPipeline
from huggingface_hub import ModelCard
from processes import run_worker
from safetensors.torch import load_file
from scripts import image_folder, run_script
from tiny import tiny_pipeline
from toys import assert_same, tensors

from cm_diffusers import ConsistencyVideoPipeline, ImageToVideoAdapter
from cm_diffusers.models.motion import MOTION
from cm_diffusers.publishing.provenance import read_provenance
from cm_diffusers.record import read_record


SHARED = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "learning_rate": 1e-2,
    "export_ema_decay": 0.5,
    "sample_n_frames": 3,
    "sample_stride": 1,
    "num_clips": 12,
    "resolution": 32,
    "train_batch_size": 2,
    "report_to": "none",
}
GRIDS = {
    "validation_prompts": ["a bag"],
    "validation_steps": 2,
    "validation_seeds": [0],
    "validation_nfe": [1],
    "validation_teacher_steps": 2,
}
W = {"w_min": 1.0, "w_max": 1.0}
LORA = {"lora_rank": 4, "lora_alpha": 4.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("video")
    image_folder(home / "images")
    tiny_pipeline().save_pretrained(home / "teacher")
    return home


def train(home: Path, script: str, name: str, **values: object) -> Path:
    shared = SHARED | {"moving_articles": home / "images", "latent_cache_dir": home / "cache"}
    shared |= {"pretrained_teacher_model": home / "teacher", "output_dir": home / name}
    run_script(script, **shared | values)
    return home / name


@pytest.fixture(scope="module")
def motion(home) -> Path:
    sizes = {"motion_num_attention_heads": 4, "motion_max_seq_length": 4}
    grids = {key: value for key, value in GRIDS.items() if key != "validation_teacher_steps"}
    return train(home, "train_motion", "motion", **sizes, **grids)


@pytest.fixture(scope="module")
def lora(home) -> Path:
    return train(home, "distill_animatelcm", "lora", stage="image_lora", **W, **LORA, **GRIDS)


def stage(home: Path, motion: Path, kind: str, name: str, **values: object) -> Path:
    adapter = motion / "motion_adapter"
    return train(home, "distill_animatelcm", name, stage=kind, pretrained_motion_adapter=adapter, **values)


@pytest.fixture(scope="module")
def student(home, motion, lora) -> Path:
    return stage(home, motion, "motion", "student", spatial_lora=lora / "lora", **W, **GRIDS)


def test_motion_modules_of_a_stock_pipeline(home, motion):
    adapter = MotionAdapter.from_pretrained(motion / "motion_adapter")
    assert adapter.config.motion_max_seq_length == 4
    outputs = [p for name, p in adapter.named_parameters() if name.endswith("proj_out.weight")]
    assert all(p.abs().max() > 0 for p in outputs)  # they started at zero
    assert LCMScheduler.from_pretrained(motion / "motion_adapter").config.beta_schedule == "linear"
    assert sorted(path.name for path in (motion / "samples").glob("*.png")) == ["step-000002.png", "step-000004.png"]
    pipe = StableDiffusionPipeline.from_pretrained(home / "teacher")
    clip = AnimateDiffPipeline.from_pipe(pipe, motion_adapter=adapter)(
        "a bag", num_frames=3, height=32, width=32, num_inference_steps=2, output_type="pt"
    ).frames
    assert clip.shape == (1, 3, 3, 32, 32)
    assert clip.isfinite().all()


def test_motion_modules_have_a_card_whose_code_runs(home, motion, monkeypatch):
    card = (motion / "motion_adapter" / "README.md").read_text("utf-8")
    front = ModelCard(card).data
    assert (front.pipeline_tag, front.library_name) == ("text-to-video", "diffusers")
    assert "clips of up to 4 frames" in card
    assert "`linear`" in card
    assert "python training/train_motion.py" in card
    assert read_provenance(motion / "motion_adapter").data == "images"
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(home)
    code = code.replace("num_frames=3", "num_frames=3, height=32, width=32, num_inference_steps=2")
    names = {}
    exec(code.replace('"motion_adapter"', '"motion/motion_adapter"'), names)
    assert len(names["frames"]) == 3


@pytest.mark.parametrize("kind", ["motion", "joint"])
def test_resume_is_bit_exact(home, motion, lora, student, kind):
    values = W | ({"spatial_lora": lora / "lora"} if kind == "motion" else LORA)
    whole = student if kind == "motion" else stage(home, motion, kind, "joint", **values)
    values |= GRIDS if kind == "motion" else {}
    resumed = {"resume_from_checkpoint": whole / "checkpoint-2"}
    again = stage(home, motion, kind, f"{kind}-again", **values, **resumed)
    expected = tensors(whole / "checkpoint-4")
    assert {name.split("/")[0] for name in expected} >= {"student", "target"}
    assert_same(tensors(again / "checkpoint-4"), expected)
    early = load_file(whole / "checkpoint-2" / "student.safetensors")
    assert any(not torch.equal(value, expected[f"student/{name}"]) for name, value in early.items())


def test_training_motion_resumes_bit_exactly(home, motion):
    sizes = {"motion_num_attention_heads": 4, "motion_max_seq_length": 4}
    again = train(home, "train_motion", "modules-again", **sizes, resume_from_checkpoint=motion / "checkpoint-2")
    expected = tensors(motion / "checkpoint-4")
    assert all(MOTION in name for name in expected if name.startswith("student/"))
    assert_same(tensors(again / "checkpoint-4"), expected)


def test_the_student_is_recorded_and_loads(home, student):
    folder = student / "student"
    record = read_record(folder)
    assert (record.method, record.guidance, record.w_max) == ("animatelcm", "distilled", 1.0)
    assert record.scheduler["beta_schedule"] == "linear"
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-to-video"
    assert 'ConsistencyVideoPipeline.from_pretrained("' in card.text
    assert (folder / "samples.png").is_file()
    assert "_name_or_path" not in (folder / "config.json").read_text()  # where the teacher's motion modules lay
    settings = read_provenance(folder).settings
    assert settings["stage"] == "motion"
    assert "lora_rank" not in settings  # the LoRA has one, but this stage did not set it
    pipe = ConsistencyVideoPipeline.from_pretrained(folder)
    asked = {"num_frames": 3, "height": 32, "width": 32, "output_type": "pt"}
    clips = [
        pipe("a bag", num_inference_steps=2, generator=torch.Generator().manual_seed(0), **asked).frames
        for _ in range(2)
    ]
    assert torch.equal(*clips)

    stock = AnimateDiffPipeline.from_pretrained(home / "teacher", motion_adapter=MotionAdapter.from_pretrained(folder))
    stock.scheduler = LCMScheduler.from_pretrained(folder)
    stock.load_lora_weights(folder)
    generator = torch.Generator().manual_seed(0)
    found = stock("a bag", num_inference_steps=2, guidance_scale=1.0, generator=generator, **asked).frames
    assert torch.allclose(found, clips[0], atol=2e-5)


@pytest.mark.parametrize(("condition", "kind"), [("image", ImageToVideoAdapter), ("edges", ControlNetModel)])
def test_an_adapter_for_the_student(home, student, condition, kind):
    base = {"pretrained_motion_adapter": student / "student", "spatial_lora": student / "student"}
    made = train(home, "distill_animatelcm", f"adapter-{condition}", stage="adapter", condition=condition, **base)
    folder = made / {"image": "image_adapter", "edges": "controlnet"}[condition]
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == ("image-to-video" if condition == "image" else "text-to-video")
    assert f"{kind.__name__}.from_pretrained(" in card.text
    assert not re.search(r"\{\w*\}", card.text)
    adapter = kind.from_pretrained(folder)
    asked = {"num_frames": 3, "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    if condition == "image":
        pipe = ConsistencyVideoPipeline.from_pretrained(student / "student", image_adapter=adapter)
        told = {"image": torch.rand(1, 3, 32, 32)}
    else:
        pipe = ConsistencyVideoPipeline.from_pretrained(student / "student", controlnet=adapter)
        told = {"conditioning_frames": torch.rand(3, 3, 32, 32)}
    clip = pipe("a bag", generator=torch.Generator().manual_seed(0), **asked, **told).frames
    plain = ConsistencyVideoPipeline.from_pretrained(student / "student")
    alone = plain("a bag", generator=torch.Generator().manual_seed(0), **asked).frames
    assert (clip - alone).abs().max() > 1e-4


def test_bad_input(home, motion, lora):
    def refused(sentence: str, kind: str = "motion", **values: object) -> None:
        with pytest.raises(SystemExit, match=sentence):
            stage(home, motion, kind, "bad", **values)

    refused("--sample_n_frames 5 is more than the 4 frames", spatial_lora=lora / "lora", sample_n_frames=5)
    refused("stage motion needs the LCM-LoRA")
    refused("--beta_schedule scaled_linear: the motion modules were trained on linear", beta_schedule="scaled_linear")
    refused("--validation_prompts has no effect in stage adapter", "adapter", spatial_lora=lora / "lora", **GRIDS)
    refused("--lora_rank has no effect in stage motion", spatial_lora=lora / "lora", lora_rank=8)
    refused("argument --stage: invalid choice: 'video'", "video")
    assert not (home / "bad").exists()


@pytest.mark.parametrize("condition", ["image", "edges"])
def test_gradient_checkpointing_changes_nothing(home, student, condition):
    base = {"pretrained_motion_adapter": student / "student", "spatial_lora": student / "student"}
    values = base | {"stage": "adapter", "condition": condition, "max_train_steps": 2}
    folders = [
        train(home, "distill_animatelcm", f"{condition}-{on}", gradient_checkpointing=on, **values)
        for on in (False, True)
    ]
    plain, checkpointed = (tensors(folder / "checkpoint-2") for folder in folders)
    student_of = [name for name in plain if name.startswith("student/")]
    assert student_of
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-5) for name in student_of)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_worker("video_worker.py", folder)
    return folder


@pytest.mark.parametrize("kind", ["motion", "joint", "adapter"])
def test_two_processes_agree_and_resume_bit_exactly(two_processes, kind):
    expected = tensors(two_processes / kind / "checkpoint-4")
    assert_same(tensors(two_processes / f"{kind}-resumed" / "checkpoint-4"), expected)
    ranks = [load_file(two_processes / f"rank-{rank}.safetensors") for rank in (0, 1)]
    one, two = ({name: value for name, value in found.items() if name.startswith(kind)} for found in ranks)
    assert one
    assert_same(two, one)
