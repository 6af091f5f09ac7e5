"""Sharing, with real `huggingface_hub` calls against a Hub on this machine."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hub_server import READ, WRITE, Hub, running_hub
from hub_worker import image
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import LoraConfig
from scripts import data_flags, flags, image_folder
from tiny import tiny_pipeline, tiny_unet

from cm_diffusers.publishing import hub as sharing
from cm_diffusers.publishing.hub import HubConfig, check_hub, push_folder
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record, lcm_scheduler, save_lora, save_pipeline
from cm_diffusers.publishing.provenance import describe_run
from cm_diffusers.record import base_model_of, read_record


WRONG = "hf_wrongToken"
SINGLE_FILE = Path(__file__).parents[2] / "pipelines" / "consistency_text_to_image.py"
LEFTOVERS = (
    "checkpoint-5/optimizer.safetensors unet/weights.bin .cache/x.json logs/events.txt notes.txt me.png a.json".split()
)
Run = Callable[..., str]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@contextmanager
def worker(hub: Hub, folder: Path, **environment: str) -> Iterator[Callable[[dict], str]]:
    """A process that talks to the local Hub; its stderr goes to a file in the folder."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    with (folder / "stderr").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, Path(__file__).parents[1] / "hub_worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=kept | settings | environment,
            text=True,
        )

        def ask(task: dict) -> str:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
            assert reply, (folder / "stderr").read_text()
            return json.loads(reply)

        with process:
            yield ask
            process.stdin.close()


@pytest.fixture(scope="module")
def results(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a student, `pipeline`, and a LoRA, `lora`, whose teacher is on the Hub, with a licence."""
    run = tmp_path_factory.mktemp("run")
    teacher = tiny_pipeline()
    teacher.save_pretrained(run / "teacher")
    (run / "teacher/README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    hub.add("ada/teacher", run / "teacher")
    scheduler = lcm_scheduler(teacher, 20, 10.0)
    provenance = describe_run([HubConfig(hub_token=WRITE)], teacher, "ada/teacher", "some/images", str(run))
    student = lcm_pipeline(teacher, tiny_unet(time_cond_proj_dim=8), scheduler)
    record = lcm_record("ada/teacher", "embedded", 0.0, 4.0, 1.0, scheduler)
    save_pipeline(student, run / "pipeline", False, record, provenance)
    (run / "pipeline/clips.gif").write_bytes(b"GIF89a")
    for leftover in LEFTOVERS:
        (run / "pipeline" / leftover).parent.mkdir(exist_ok=True)
        (run / "pipeline" / leftover).write_text("not to be shared")
    adapter = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False)
    teacher.unet.add_adapter(adapter)
    save_lora(teacher.unet, run / "lora", lcm_record("ada/teacher", "distilled", 2, 2, 1.0, scheduler), provenance)
    return run


@pytest.fixture(scope="module")
def run(hub: Hub, results: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a script of training/ and returns what it printed or ended with; afterwards no token may be found in anything it printed or left behind."""
    printed, folder = [], tmp_path_factory.mktemp("worker")
    with worker(hub, folder) as ask:

        def run(name: str, **values: object) -> str:
            printed.append(ask({"script": name, "argv": flags(**values)}))
            return printed[-1]

        yield run
    pushed = [content for repo in hub.repos.values() for content in repo.files.values()]
    local = [path.read_bytes() for path in results.rglob("*") if path.is_file()]
    said = ["\n".join(printed).encode(), (folder / "stderr").read_bytes()]
    for token in (WRITE, READ, WRONG):
        assert not any(token.encode() in content for content in [*pushed, *local, *said])


@pytest.fixture(scope="module")
def share(run: Run) -> Run:
    """Calls training/share.py on a folder, with a token or without."""

    def call(folder: Path, token: str | None = WRITE, **values: object) -> str:
        given = {"hub_token": token} if token else {}
        return run("share", folder=folder, push_to_hub=True, **given, **values)

    return call


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_push_is_whole_private_and_idempotent(hub: Hub, share: Run, results: Path) -> None:
    for _ in range(2):
        printed = share(results / "pipeline", WRITE, hub_model_id="tiny-lcm", hub_private_repo=True)
        assert printed == f"{hub.url}/ada/tiny-lcm"
    repo = hub.repos["ada/tiny-lcm"]
    assert repo.private
    assert repo.commits == 1
    wanted = {"README.md", "model_index.json", "cm_diffusers.json", "training.json", "scheduler/scheduler_config.json"}
    assert wanted | {"unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"} <= set(repo.files)
    assert "clips.gif" in repo.files  # the cards of clips show it
    assert set(repo.files).isdisjoint(LEFTOVERS)
    card = repo.files["README.md"].decode()
    assert 'from_pretrained("ada/tiny-lcm")' in card
    assert "license: creativeml-openrail-m" in card  # read from the teacher's card on the Hub
    assert "base_model: ada/teacher\n" in card
    assert "base_model_relation: finetune\n" in card
    assert "hub_token" not in card


def test_an_interrupted_push_is_tried_again(hub: Hub, share: Run, results: Path) -> None:
    hub.trouble[:] = [500, "drop", 503]
    assert share(results / "lora", WRITE, hub_model_id="tiny-lora") == f"{hub.url}/ada/tiny-lora"
    assert hub.trouble == []
    assert {"pytorch_lora_weights.safetensors", "peft/adapter_model.safetensors", "peft/adapter_config.json"} <= set(
        hub.repos["ada/tiny-lora"].files
    )


def test_a_push_that_fails_for_good_says_how_to_go_on(hub: Hub, share: Run, results: Path) -> None:
    share(results / "pipeline", WRITE, hub_model_id="tiny-broken")
    (results / "pipeline/model_index.json").touch()
    before = digest(results)
    hub.repos["ada/tiny-broken"].files.clear()
    hub.trouble[:] = [500] * 4
    message = share(results / "pipeline", WRITE, hub_model_id="tiny-broken")
    assert "the Hub answered with status 500" in message
    assert f"untouched in {results / 'pipeline'}" in message
    command = f"python training/share.py --folder {results / 'pipeline'} --push_to_hub --hub_model_id ada/tiny-broken"
    assert command in message
    assert digest(results) == before
    assert share(results / "pipeline", WRITE, hub_model_id="tiny-broken").startswith("http")


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (WRONG, "tiny-new", "the Hub does not accept the token"),
        (READ, "tiny-new", "the token may not write to tiny-new"),
        (READ, "ada/teacher", "the token may not write to ada/teacher"),  # create_repo alone is content here
        (WRITE, "bob/teacher", "the token may not write to bob/teacher"),
        (WRITE, "not a name", "not a name is no name for a repository"),
        (None, "tiny-new", "needs a token; get one with `hf auth login`"),
    ],
)
def test_what_cannot_work_fails_at_once_in_one_sentence(
    hub: Hub, share: Run, results: Path, token: str | None, name: str, message: str
) -> None:
    before, repos = digest(results), set(hub.repos)
    said = share(results / "pipeline", token, hub_model_id=name)
    assert said.startswith("error: --push_to_hub ")
    assert message in said
    assert "\n" not in said
    assert (digest(results), set(hub.repos)) == (before, repos)


def test_distillation_ends_on_the_hub_or_does_not_start(hub: Hub, run: Run, results: Path, tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    settings = data_flags(tmp_path / "data", tmp_path / "cache") | {
        "pretrained_teacher_model": results / "teacher",
        "output_dir": tmp_path / "tiny-distilled",
        "max_train_steps": 1,
        "lora": True,
        "lora_rank": 2,
        "push_to_hub": True,
    }
    assert "the Hub does not accept the token" in run("distill_lcm", **settings, hub_token=WRONG)
    assert not (tmp_path / "tiny-distilled").exists()
    assert run("distill_lcm", **settings, hub_token=WRITE) == f"{hub.url}/ada/tiny-distilled"
    files = hub.repos["ada/tiny-distilled"].files
    assert not [path for path, content in files.items() if str(results).encode() in content]
    assert json.loads(files["cm_diffusers.json"])["base_model"] == "teacher"
    local = read_record(tmp_path / "tiny-distilled/lora")
    assert not Path(local.base_model).is_absolute()
    assert base_model_of(local, tmp_path / "tiny-distilled/lora") == str(results / "teacher")
    assert {"README.md", "pytorch_lora_weights.safetensors", "peft/adapter_model.safetensors"} <= set(files)
    card = files["README.md"].decode()
    assert 'load_lora_weights("ada/tiny-distilled"' in card
    assert "license: creativeml-openrail-m" in card
    assert str(tmp_path) not in card + files["training.json"].decode()
    for path in (tmp_path / "tiny-distilled").rglob("*"):  # tracker, run.json, checkpoints
        assert path.is_dir() or WRITE.encode() not in path.read_bytes()


def test_a_public_repository_is_not_taken_for_a_private_one(share: Run, results: Path) -> None:
    said = share(results / "lora", WRITE, hub_model_id="ada/teacher", hub_private_repo=True)
    assert "ada/teacher exists already and is public" in said


def test_no_network(hub: Hub, share: Run, results: Path) -> None:
    hub.unreachable = True
    try:
        assert f"the Hub at {hub.url} cannot be reached" in share(results / "lora", WRITE)
    finally:
        hub.unreachable = False


def test_a_folder_without_a_result_is_refused(share: Run, results: Path) -> None:
    assert "holds no pipeline or LoRA with its cm_diffusers.json" in share(results, WRITE, hub_model_id="tiny-run")
    contradiction = share(results / "lora", WRITE, hub_model_id="tiny-lora", teacher_license="mit")
    assert "contradicts the teacher's card, which gives 'creativeml-openrail-m'" in contradiction


def test_reload_by_id_without_and_with_the_package(hub: Hub, share: Run, results: Path, tmp_path: Path) -> None:
    share(results / "pipeline", WRITE, hub_model_id="tiny-lcm", hub_private_repo=True, pipeline_file=SINGLE_FILE)
    share(results / "lora", WRITE, hub_model_id="tiny-lora")
    files = [tmp_path / f"{i}.npy" for i in range(6)]
    student, lora = {"repo_id": "ada/tiny-lcm"}, {"repo_id": "ada/teacher", "lora": "ada/tiny-lora"}
    with worker(hub, tmp_path, HF_TOKEN=WRITE) as ask:
        ask({"push": str(results / "pipeline"), "repo_id": "ada/tiny-pushed"})
    pushed = hub.repos["ada/tiny-pushed"].files
    assert {"README.md", "cm_diffusers.json", "training.json"} <= set(pushed)
    assert 'from_pretrained("ada/tiny-pushed")' in pushed["README.md"].decode()
    assert not [path for path, content in pushed.items() if str(results).encode() in content]
    with worker(hub, tmp_path, HF_TOKEN=READ) as ask:
        ask({"package": False, "repo_id": "ada/tiny-pushed", "to": str(files[5])})
        ask({"package": False, "custom": "PortableConsistencyPipeline", "to": str(files[4]), **student})
        for i, (package, what) in enumerate(((False, student), (False, lora), (True, student), (True, lora))):
            ask({"package": package, "to": str(files[i]), **what})
    loaded = [np.load(path) for path in files]
    from diffusers import DiffusionPipeline, LCMScheduler

    here = DiffusionPipeline.from_pretrained(results / "pipeline")
    np.testing.assert_allclose(loaded[0], image(here), atol=1e-5)
    here = tiny_pipeline()
    here.scheduler = LCMScheduler.from_config(here.scheduler.config, original_inference_steps=20)
    plain = image(here)
    here.load_lora_weights(results / "lora", weight_name="pytorch_lora_weights.safetensors")
    np.testing.assert_allclose(loaded[1], image(here), atol=1e-5)
    assert np.abs(loaded[1] - plain).max() > 1e-3
    np.testing.assert_allclose(loaded[2], loaded[0], atol=1e-4)
    np.testing.assert_allclose(loaded[3], loaded[1], atol=1e-4)
    np.testing.assert_allclose(loaded[4], loaded[0], atol=1e-4)
    np.testing.assert_array_equal(loaded[5], loaded[0])  # by `push_to_hub` of our pipeline


@pytest.mark.parametrize(
    ("error", "offline", "tries", "message"),
    [
        (PermissionError(13, "Permission denied", "run/unet/x"), False, 1, "run/unet/x cannot be used: Permission"),
        (FileNotFoundError(2, "No such file", "run/x"), False, 1, "run/x cannot be used: No such file"),
        (OSError("torn"), False, 1, "a file cannot be used: torn"),
        (TimeoutError(), False, 4, "cannot be reached (TimeoutError)"),
        (ConnectionResetError(), False, 4, "cannot be reached (ConnectionResetError)"),
        (OfflineModeIsEnabled(), True, 1, "HF_HUB_OFFLINE is set; unset it to push"),
    ],
)
def test_only_what_may_pass_is_tried_again(
    error: Exception, offline: bool, tries: int, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sharing, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(sharing.constants, "HF_HUB_OFFLINE", offline)
    with (
        mock.patch.object(sharing.HfApi, "upload_folder", side_effect=error) as upload,
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        push_folder(tmp_path, "ada/x", HubConfig())
    assert upload.call_count == tries


def test_a_token_is_in_no_repr_and_not_given_to_wandb() -> None:
    config = HubConfig(push_to_hub=True, hub_token=WRITE)
    assert WRITE not in repr(config)
    with pytest.raises(ValueError, match=r"--hub_token would be recorded by wandb") as caught:
        check_hub(config, "runs/x", "wandb")
    assert WRITE not in str(caught.value)


def test_a_line_tells_what_is_not_uploaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("config.json", "peft/adapter_config.json", *(f"note {i}.txt" for i in range(12))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with mock.patch.object(sharing.HfApi, "upload_folder") as upload, caplog.at_level("INFO"):
        push_folder(tmp_path, "ada/x", HubConfig())
    assert upload.call_args.kwargs["allow_patterns"] == ["config.json", "peft/adapter_config.json"]
    (line,) = [one.getMessage() for one in caplog.records if "Not uploaded" in one.getMessage()]
    assert line.startswith("Not uploaded, as no script of this package wrote it: note 0.txt, note 1.txt, note 10.txt")
    assert line.endswith("and 2 more.")


def test_nothing_is_asked_of_the_hub_without_the_flag() -> None:
    assert check_hub(HubConfig(hub_model_id="x"), "runs/x") is None
