"""A resume knows data and models by their content, and what older releases wrote."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scripts import data_flags, image_folder, models_folder, run_script
from tiny import tiny_pipeline
from toys import ToyObjective, forget_accelerate, source, toy_networks, toy_trainer

from cm_diffusers.data.found import Found
from cm_diffusers.data.sampler import Stream
from cm_diffusers.engine import identity
from cm_diffusers.engine.checkpoints import list_checkpoints, read_state
from cm_diffusers.engine.identity import place_fingerprint, run_identity
from cm_diffusers.engine.optimizers import OptimConfig


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


@dataclass
class Places:
    """Where things are, as scripts' flags have it."""

    pull: float = 0.5
    train_data_dir: str = "here"
    pretrained_teacher_model: str = "nowhere/x/y"
    lora_rank: int = 4
    prompts: list[str] = field(default_factory=lambda: ["a bag"])


def trained(folder: Path, data: str | None = "abc", resume: bool = True, **flags):
    objective = ToyObjective()
    objective.config = Places(**flags)
    options = {"resume_from_checkpoint": "latest"} if resume else {}
    trainer = toy_trainer(folder, toy_networks(), objective, max_train_steps=2, **options)
    trainer.fit(source() if data is None else Stream(source(), Found("toys"), data))
    trainer.end()


def edit_states(folder: Path, change) -> None:
    for path in list_checkpoints(folder):
        state = json.loads((path / "state.json").read_text())
        change(state["identity"])
        (path / "state.json").write_text(json.dumps(state))


def test_the_same_data_at_another_place_are_the_same(tmp_path) -> None:
    trained(tmp_path, resume=False)
    assert read_state(tmp_path / "checkpoint-2")["identity"]["fingerprints"] == {"data": "abc"} | {
        "prompts": place_fingerprint(["a bag"])
    }
    trained(tmp_path, train_data_dir="there")


def test_other_data_at_the_same_place_are_refused(tmp_path) -> None:
    trained(tmp_path, resume=False)
    with pytest.raises(
        ValueError, match=r"checkpoint-2 was trained on other data: .*; give what it was, or start afresh"
    ):
        trained(tmp_path, "another")


@pytest.mark.parametrize(("first", "then"), [(None, None), (None, "abc"), ("abc", None)])
def test_where_content_is_not_known_names_count(tmp_path, first, then) -> None:
    trained(tmp_path, first, resume=False)
    trained(tmp_path, then)
    with pytest.raises(ValueError, match=r"\(train_data_dir was 'here', now 'there'\)"):
        trained(tmp_path, then, train_data_dir="there")


def test_what_an_older_release_did_not_write_had_its_default(tmp_path) -> None:
    trained(tmp_path, resume=False)
    lacks = ("lora_rank", "student/max_grad_norm", "fingerprints", "ema_sigma_rels")
    edit_states(tmp_path, lambda saved: [saved.pop(name) for name in lacks] and saved.update(gone_since=3))
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"\(lora_rank was 4, now 8\)"):
        trained(tmp_path, lora_rank=8)


def model(folder: Path, **change: torch.Tensor) -> Path:
    """As a pipeline lies on a disk."""
    (folder / "unet").mkdir(parents=True)
    tensors = {"a": torch.arange(5000.0), "b": torch.ones(2, 3)} | change
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"} if change else None)
    (folder / "unet" / "config.json").write_text(json.dumps({"layers": 2, "_diffusers_version": str(len(change))}))
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_model_is_known_by_weights_and_settings(tmp_path) -> None:
    first = place_fingerprint(str(model(tmp_path / "first")))
    assert first == place_fingerprint(str(model(tmp_path / "again", a=torch.arange(5000.0))))  # another header
    assert first != place_fingerprint(str(model(tmp_path / "weights", b=torch.full((2, 3), 1.001))))
    assert first != place_fingerprint(str(model(tmp_path / "types", b=torch.ones(2, 3).half())))
    (tmp_path / "again" / "README.md").write_text("x")
    (tmp_path / "again" / "unet" / "notes.json").write_text("{}")
    assert first == place_fingerprint(str(tmp_path / "again"))
    (tmp_path / "again" / "unet" / "config.json").write_text(json.dumps({"layers": 3}))
    assert first != place_fingerprint(str(tmp_path / "again"))
    assert place_fingerprint("not/a/place") == ""
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert place_fingerprint(str(tmp_path / "pointer.safetensors"))


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch) -> None:
    asked = []

    def snapshot_download(repo: str, revision: str | None, local_files_only: bool) -> str:
        asked.append((repo, revision, local_files_only))
        return "/cache/models--a--b/snapshots/0123abc"

    monkeypatch.setattr(identity, "snapshot_download", snapshot_download)

    @dataclass
    class Config:
        pretrained_student_model: str = "a/b"
        student_revision: str = "v2"

    found = run_identity("Toy", 1, Config(), student=OptimConfig())
    assert found["fingerprints"] == {"pretrained_student_model": "0123abc"}
    assert asked == [("a/b", "v2", True)]


def test_another_base_is_refused_and_the_same_elsewhere_is_not(tmp_path) -> None:
    flags = {"pretrained_teacher_model": str(model(tmp_path / "base"))}
    trained(tmp_path / "run", resume=False, **flags)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    trained(tmp_path / "run", pretrained_teacher_model=str(tmp_path / "moved"))
    model(tmp_path / "base", b=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"began with other content of --pretrained_teacher_model, which has changed"):
        trained(tmp_path / "run", **flags)


def test_prompts_in_a_file_are_known_by_what_it_holds(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a bag")
    trained(tmp_path / "run", resume=False, prompts=[str(tmp_path / "a.txt")])
    shutil.copy(tmp_path / "a.txt", tmp_path / "b.txt")
    trained(tmp_path / "run", prompts=[str(tmp_path / "b.txt")])
    (tmp_path / "b.txt").write_text("a coat")
    with pytest.raises(ValueError, match="other content of --prompts"):
        trained(tmp_path / "run", prompts=[str(tmp_path / "b.txt")])


def replace_image(data: Path) -> None:
    shutil.copy(data / "1.png", data / "0.png")


def append_row(data: Path) -> None:
    with (data / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "1.png", "text": "a coat"}) + "\n")


def change_caption(data: Path) -> None:
    text = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(text.replace("an ankle boot", "a boot"))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> Path:
    """Of a LoRA, by the script, after two steps; its data and base beside it."""
    folder = models_folder(tmp_path_factory.mktemp("distilled"))
    image_folder(folder / "data")
    run_script("distill_lcm", **flags(folder))
    return folder


def flags(folder: Path, **change: object) -> dict[str, object]:
    mine = {"pretrained_teacher_model": folder / "teacher", "output_dir": folder / "run", "lora": True, "lora_rank": 2}
    of_data = data_flags(folder / "data", folder / "cache")
    steps = {"max_train_steps": 2, "checkpointing_steps": 1, "lr_warmup_steps": 0}
    return mine | of_data | steps | change


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.name != ".lock")  # which goes at the process's end


@pytest.mark.parametrize("change", [replace_image, append_row, change_caption])
def test_changed_data_are_refused(distilled, tmp_path, change) -> None:
    data = shutil.copytree(distilled / "data", tmp_path / "data")
    change(data)
    before = files(distilled / "run")
    resumed = {"resume_from_checkpoint": "latest", "train_data_dir": data, "max_train_steps": 3}
    with pytest.raises(SystemExit, match="checkpoint-2 was trained on other data"):
        run_script("distill_lcm", **flags(distilled, **resumed))
    assert files(distilled / "run") == before


def test_a_changed_base_is_refused(distilled, tmp_path) -> None:
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "teacher")
    resumed = {"resume_from_checkpoint": "latest", "pretrained_teacher_model": tmp_path / "teacher"}
    with pytest.raises(SystemExit, match="other content of --pretrained_teacher_model"):
        run_script("distill_lcm", **flags(distilled, **resumed))


def test_data_and_base_that_have_moved_are_taken(distilled, tmp_path) -> None:
    for name in ("data", "teacher", "run"):
        shutil.copytree(distilled / name, tmp_path / name)
    moved = flags(tmp_path, resume_from_checkpoint="latest", max_train_steps=3, latent_cache_dir=distilled / "cache")
    run_script("distill_lcm", **moved)
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
