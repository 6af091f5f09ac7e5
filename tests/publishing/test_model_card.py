"""Cards that are true and whole: what they state is what was done, and their code runs."""

import ast
import html
import json
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import yaml
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image
from tiny import tiny_pipeline, tiny_unet
from tiny_xl import tiny_xl_pipeline
from transformers.hf_argparser import HfArg

import cm_diffusers
from cm_diffusers.data.sources import DataConfig, source_name
from cm_diffusers.engine.cli import parse_configs
from cm_diffusers.measured import Measured, read_measured, weights_digest
from cm_diffusers.models.students import StudentConfig
from cm_diffusers.models.teachers import TeacherConfig
from cm_diffusers.publishing.card import METHODS
from cm_diffusers.publishing.hub import HubConfig
from cm_diffusers.publishing.model_card import model_card
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record, lcm_scheduler, save_pipeline
from cm_diffusers.publishing.provenance import (
    PROVENANCE,
    Provenance,
    describe_run,
    public,
    read_license,
    read_provenance,
    write_provenance,
)
from cm_diffusers.publishing.sharing import ShareConfig, attach_evaluation, prepare
from cm_diffusers.publishing.student_kinds import LORA_WEIGHTS
from cm_diffusers.record import Record, read_record


RECORD = Record("lcm", "ada/teacher", "embedded", 2.0, 13.0, 8.0, 4, dict(LCMScheduler().config))
PROVENANCE_OF_IT = Provenance(
    name="ada/student",
    base_id="ada/teacher",
    family="stable-diffusion",
    data="ada/photos",
    license={"license": "creativeml-openrail-m"},
    command="python training/distill_lcm.py --seed 3",
    commit="abc1234",
    settings={"lora": False, "seed": 3, "dataset_name": "ada/photos", "validation_prompts": ["a red bag", "a coat"]},
)
LORA = replace(PROVENANCE_OF_IT, settings={**PROVENANCE_OF_IT.settings, "lora": True})
SETTING = {
    "num_images": 100, "seed": 0, "extractor": "inception", "reference": "ada/photos", "hardware": "a CPU",
    "dtype": "float32", "batch_size": 10, "coverage_ceiling": 0.9,
}  # fmt: skip


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def row(name: str, steps: int, fid: float, agreement: float | None = None) -> dict:
    return {
        "pipeline": name, "num_inference_steps": steps, "guidance_scale": 3.0, "fid": fid, "agreement": agreement,
    }  # fmt: skip


ROWS = [row("teacher", 50, 10.0), row("ours", 4, 12.34567, 0.75), row("other", 4, 99.0)]


def test_front_matter_of_a_student() -> None:
    assert front(model_card(RECORD, PROVENANCE_OF_IT)) == {
        "base_model": "ada/teacher",
        "base_model_relation": "finetune",
        "datasets": "ada/photos",
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "diffusers-training", "cm_diffusers", "lcm", "stable-diffusion"],
        "widget": [{"text": "a red bag"}, {"text": "a coat"}],
    }


def test_front_matter_of_an_xl_lora() -> None:
    matter = front(model_card(RECORD, replace(LORA, family="stable-diffusion-xl")))
    assert matter["base_model_relation"] == "adapter"
    assert matter["tags"][-3:] == ["lora", "template:sd-lora", "stable-diffusion-xl"]
    assert len(set(matter["tags"])) == len(matter["tags"])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_to_fill_in(method: str) -> None:
    provenance = LORA if method.endswith("-lora") else PROVENANCE_OF_IT
    card = model_card(replace(RECORD, method=method.removesuffix("-lora")), provenance)
    assert f"# {METHODS[method][0]} of ada/teacher" in card
    assert METHODS[method][2] in card
    assert "cm_diffusers at `abc1234`" in card
    assert "python training/distill_lcm.py --seed 3" in card
    assert "trained on ada/photos" in card
    assert not re.search(r"TODO|THIS_FOLDER|More Information|\{\w*\}", card)


def test_guidance_is_explained_as_the_student_takes_it() -> None:
    assert "an input of the network, trained on `guidance_scale` 3 to 14 (8 is" in model_card(RECORD, PROVENANCE_OF_IT)
    distilled = replace(RECORD, guidance="distilled", w_min=6.5, w_max=6.5, recommended_guidance_scale=1.0)
    assert "(`guidance_scale` 7.5) is in the weights: sample with `guidance_scale` 1." in model_card(distilled, LORA)
    assert "cannot be guided" in model_card(replace(RECORD, guidance="none"), PROVENANCE_OF_IT)


def test_an_unknown_licence_is_said_and_not_made_up() -> None:
    card = model_card(RECORD, replace(PROVENANCE_OF_IT, license={}))
    assert "license" not in front(card)
    assert "states no licence" in card


def test_a_named_licence_is_linked() -> None:
    fields = {"license": "other", "license_name": "the-licence", "license_link": "https://example.org/licence"}
    card = model_card(RECORD, replace(PROVENANCE_OF_IT, license=fields))
    assert fields.items() <= front(card).items()
    assert "[the-licence](https://example.org/licence)" in card


def test_a_teacher_that_is_a_folder_is_no_hub_id() -> None:
    card = model_card(replace(RECORD, base_model="/somewhere/teacher"), replace(LORA, base_id=None))
    assert not {"base_model", "base_model_relation"} & front(card).keys()
    assert "/somewhere" not in card
    assert "`teacher` is not on the Hub" in card


@pytest.mark.parametrize("provenance", [PROVENANCE_OF_IT, LORA], ids=["student", "lora"])
def test_the_code_is_code(provenance: Provenance) -> None:
    blocks = re.findall(r"```python\n(.*?)```", model_card(RECORD, provenance), re.DOTALL)
    assert blocks
    for code in blocks:
        ast.parse(code)


def test_the_code_without_the_package_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = tiny_pipeline()
    scheduler = lcm_scheduler(teacher, 20, 10.0)
    student = lcm_pipeline(teacher, tiny_unet(time_cond_proj_dim=8), scheduler)
    record = lcm_record("ada/teacher", "embedded", 0.0, 4.0, 3.0, scheduler)
    save_pipeline(student, tmp_path / "student", False, record, replace(PROVENANCE_OF_IT, name="student"))
    codes = re.findall(r"```python\n(.*?)```", (tmp_path / "student/README.md").read_text(), re.DOTALL)
    (code,) = [code for code in codes if "cm_diffusers" not in code]
    names = {}
    exec(code, names)
    assert names["image"].size == (32, 32)


def test_numbers_are_named_as_they_were_computed() -> None:
    measured = Measured(SETTING, ROWS[:2])
    fid, agreement = measured.results()
    assert (fid.metric_type, fid.metric_value) == ("fid", 12.3457)
    assert fid.metric_name == "FID; 4 steps, guidance scale 3"
    protocol = {"num_inference_steps": 4, "guidance_scale": 3.0, "num_images": 100, "seed": 0, "dtype": "float32"}
    assert fid.metric_args == protocol
    assert (agreement.metric_type, agreement.metric_value) == ("prompt_agreement", 0.75)
    own = next(Measured({**SETTING, "extractor": "assets/classifier"}, ROWS[:2]).results())
    assert (own.metric_type, own.metric_name) == (
        "frechet_distance",
        "FD-classifier (Fréchet distance, features of assets/classifier); 4 steps, guidance scale 3",
    )


def test_measurements_and_grid_stand_in_the_card() -> None:
    card = model_card(RECORD, PROVENANCE_OF_IT, Measured(SETTING, ROWS[:2]), "evaluation/grid.png")
    assert "| ours | 4 | 3 | 12.35 |" in card
    assert "100 images, seed 0, extractor inception, reference ada/photos." in card
    assert "![Sample grid](evaluation/grid.png)" in card
    (index,) = front(card)["model-index"]
    assert index["name"] == "ada/student"
    assert [metric["value"] for metric in index["results"][0]["metrics"]] == [12.3457, 0.75]


CLIPS = {
    "num_clips": 24, "num_frames": 8, "resolution": 32, "seed": 0, "extractor": "assets/classifier", "video_extractor": None,
    "crop_zoom": 1.3, "frames_per_clip": 4, "min_speed": 0.3, "static_threshold": 0.01, "reference": "moving",
    "hardware": "a machine", "dtype": "float32", "batch_size": 8,
}  # fmt: skip
CLIP_ROWS = [
    {"pipeline": "other real clips", "num_inference_steps": None, "guidance_scale": None, "direction_accuracy": 1.0},
    {
        "pipeline": "my clips",
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "direction_accuracy": 0.9,
        "fd_frames": 7.0,
    },
]


def test_measurements_of_clips_stand_in_the_card() -> None:
    measured = Measured(CLIPS, CLIP_ROWS)
    card = model_card(replace(RECORD, method="animatelcm"), PROVENANCE_OF_IT, measured, "evaluation/clips.gif")
    assert "| my clips | 4 | 1 | 0.900 |" in card
    assert "FD-classifier are Fréchet distances on the features of `assets/classifier`" in card
    assert "![Sample grid](evaluation/clips.gif)" in card
    direction, distance = measured.results()
    assert (direction.task_type, direction.metric_type, direction.metric_value) == (
        "text-to-video",
        "direction_accuracy",
        0.9,
    )
    assert distance.metric_name == (
        "FD-classifier of frames (Fréchet distance, features of assets/classifier); 4 steps, guidance scale 1"
    )
    assert direction.metric_args["num_clips"] == 24


def test_clips_of_the_student_travel_with_its_numbers(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "table.json").write_text(json.dumps({"setting": CLIPS, "rows": CLIP_ROWS}))
    (folder / "my_clips.gif").write_bytes(b"frames")
    attach_evaluation(finished, folder, None)
    assert (finished / "evaluation" / "clips.gif").read_bytes() == b"frames"
    assert read_measured(finished / "evaluation") == Measured(CLIPS, CLIP_ROWS)


@dataclass
class SomeConfig:
    seed: int = HfArg(default=0)
    train_data_dir: str | None = HfArg(default=None)
    prompts: list[str] = HfArg(default_factory=list)
    flip: bool = HfArg(default=True)
    output_dir: str = HfArg(default="runs/x")


def test_a_run_is_described_without_token_and_machine_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/training/distill_lcm.py"])
    config = SomeConfig(3, "/somewhere/photos", ["a bag", "a coat"], False, "/somewhere/run")
    hub = HubConfig(push_to_hub=True, hub_token="hf_secret")
    with mock.patch.dict("os.environ", {"WORLD_SIZE": "2"}):
        found = describe_run(
            [config, hub], tiny_xl_pipeline(), "/somewhere/teacher", "/somewhere/photos", "/somewhere/r"
        )
    assert "somewhere" not in str(found)
    assert "hf_secret" not in str(found)
    assert found.settings == {"seed": 3, "train_data_dir": "photos", "prompts": ["a bag", "a coat"], "flip": False}
    assert (found.name, found.data, found.base_id, found.license) == ("r", "photos", None, {})
    assert found.family == "stable-diffusion-xl"
    launched, script, *flags = found.command.partition(" training/")
    assert launched == "accelerate launch --num_processes 2"
    parsed = parse_configs((SomeConfig,), "", shlex.split(flags[0])[1:])
    assert parsed == (replace(config, train_data_dir="photos", output_dir="runs/x"),)


def test_no_secret_of_a_data_address_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["training/distill_lcm.py"])
    address = "https://ada:hunter2@data.org/shards/{00..12}.tar?X-Signature=swordfish,/sesame&X-Token=mellon#friend"
    data = DataConfig(train_shards_path_or_url=address)
    found = describe_run([data], tiny_pipeline(), "ada/teacher", source_name(data), "runs/x")
    write_provenance(found, tmp_path)
    told = model_card(RECORD, found) + (tmp_path / PROVENANCE).read_text()
    assert told.count("https://data.org/shards/{00..12}.tar") == 6  # data, setting and command, each in card and JSON
    assert [
        secret for secret in ("ada:", "hunter2", "X-", "swordfish", "sesame", "mellon", "friend") if secret in told
    ] == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("file:///mnt/photos", "photos"),
        ("C:\\Users\\ada\\photos", "photos"),
        ("D:/ada/photos/", "photos"),
        ("../../ada/photos", "photos"),
        ("/mnt/a/0.tar,/mnt/b/{1,2}.tar, ~/3.tar", "0.tar,{1,2}.tar,3.tar"),
        ("https://ada:x@a.org/0.tar?k=1,https://b.org/1.tar?k=2", "https://a.org/0.tar,https://b.org/1.tar"),
        ("s3://bucket/0.tar", "s3://bucket/0.tar"),
        ("hf://datasets/ada/x@main/0.tar", "hf://datasets/ada/x@main/0.tar"),
        ("a bag, half/half, is it red?", "a bag, half/half, is it red?"),
        ("assets/photos", "assets/photos"),
        ("classifier:/mnt/ada/judge", "classifier:judge"),
        ("clip_score:~/models/clip@main", "clip_score:clip@main"),
        ("classifier:../../ada/judge", "classifier:judge"),
        ("classifier:assets/judge", "classifier:assets/judge"),
        ("multi_view:package.module:render", "multi_view:package.module:render"),
    ],
)
def test_what_is_told_of_a_place(given: str, told: str) -> None:
    assert public(given) == told
    assert public([given, 3]) == [told, 3]


def test_what_a_user_writes_breaks_no_table() -> None:
    prompts = ["portrait | sharp", "a <lora:style:1> bag", "line\nbreak", "<script>x</script>", "*a* `b` [c](d) &lt;"]
    settings = {**PROVENANCE_OF_IT.settings, "validation_prompts": prompts, "prompts": "x\ny | z"}
    command = shlex.join(["python", "train.py", "--validation_prompts", "```", *prompts])
    told = replace(PROVENANCE_OF_IT, data="my <b>|photos", command=command, settings=settings)
    card = model_card(RECORD, told)
    assert [one["text"] for one in front(card)["widget"]] == prompts
    table = [line for line in card.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in table} == {3}
    shown = html.unescape("".join(table))
    assert all(text in shown for text in ("portrait | sharp", "<lora:style:1>", "x y | z", "*a* `b` [c](d) &lt;"))
    outside = re.sub(r"(`{3,})bash\n.*?\n\1", "", card.split("---\n", 2)[2], flags=re.DOTALL)
    assert not re.search(r"<\w|\*a\*|\]\(d\)", outside)
    assert f"````bash\n{command}\n````" in card


def test_settings_that_do_not_act_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["training/finetune_lcf.py"])
    found = describe_run([SomeConfig(3)], tiny_pipeline(), "ada/x", "ada/photos", "runs/x", left_out=["flip"])
    assert found.settings == {"seed": 3, "train_data_dir": None, "prompts": []}


def test_a_command_repeats_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["training/distill_lcm.py"])
    configs = (TeacherConfig("ada/teacher"), StudentConfig(lora=True, lora_rank=8, lora_target_modules=["to_q"]))
    command = describe_run(configs, tiny_pipeline(), "ada/teacher", "ada/photos", "runs/x").command
    assert command.startswith("python training/distill_lcm.py --pretrained_teacher_model ada/teacher")
    assert parse_configs((TeacherConfig, StudentConfig), "", shlex.split(command)[2:]) == configs


def test_a_command_of_an_installed_script_names_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(Path(cm_diffusers.__file__).parent / "training" / "distill_lcm.py")])
    run = [SomeConfig(3)], tiny_pipeline(), "ada/x", "ada/photos", "runs/x"
    assert describe_run(*run).command == "python -m cm_diffusers.training.distill_lcm --seed 3"
    monkeypatch.setenv("WORLD_SIZE", "2")
    launched = "accelerate launch --num_processes 2 -m cm_diffusers.training.distill_lcm --seed 3"
    assert describe_run(*run).command == launched


def test_the_licence_is_read_from_a_folders_card(tmp_path: Path) -> None:
    assert read_license(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\ntags: [x]\n---\nA card.")
    assert read_license(str(tmp_path)) == {"license": "openrail++"}
    (tmp_path / "README.md").write_text("No front matter.")
    assert read_license(str(tmp_path)) == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"---\nlicense: [unclosed\n---\n", "is malformed (while parsing a flow sequence"),
        (b"---\nlicense: mit\n\ttags: [x]\n---\n", "is malformed ("),
        (b"---\nlicense: caf\xe9\n---\n", "is malformed ('utf-8' codec can't decode"),
        (b"---\n- license\n- mit\n---\n", "is malformed (repo card metadata block should be a dict"),
        (b"---\nlicense: 2.0\n---\n", "gives no text as license"),
        (b"---\nlicense: {name: mit}\n---\n", "gives no text as license"),
        (b"---\nlicense: [2]\n---\n", "gives no text as license"),
        (b"---\nlicense: mit\nlicense_link: 3\n---\n", "gives no text as license_link"),
    ],
)
def test_a_malformed_readme_gives_no_licence_and_a_warning(content: bytes, said: str, tmp_path: Path, caplog) -> None:
    """It once ended the run after training, before anything was published."""
    (tmp_path / "README.md").write_bytes(content)
    assert read_license(str(tmp_path)) == {}
    (line,) = caplog.messages
    assert said in line
    assert "\n" not in line


def test_a_lora_lists_no_settings_of_a_full_student_and_the_reverse() -> None:
    settings = {"unet_time_cond_proj_dim": 256, "ema_decay": 0.95, "lora_rank": 64, "lora_target_modules": ["to_q"]}
    for provenance, absent in ((PROVENANCE_OF_IT, "lora_"), (LORA, "unet_time_cond_proj_dim"), (LORA, "ema_decay")):
        full = provenance is PROVENANCE_OF_IT
        card = model_card(RECORD, replace(provenance, settings=provenance.settings | settings))
        assert f"| {absent}" not in card
        assert ("| ema_decay | 0.95 |" in card) == full
        assert ("| lora_rank | 64 |" in card) != full


def test_a_lora_on_an_embedded_student_is_not_offered_to_comfyui() -> None:
    """Which has no input for guidance; the card once recommended CFG 3."""
    card = model_card(RECORD, LORA)
    assert "ComfyUI and A1111 cannot sample this one" in card
    assert "CFG" not in card
    card = model_card(replace(RECORD, guidance="distilled", recommended_guidance_scale=1.0), LORA)
    assert "the same file, `pytorch_lora_weights.safetensors`, with the sampler `lcm`, 4 steps, CFG 1" in card


def test_a_lora_that_is_told_where_it_jumps_is_not_recommended_to_comfyui() -> None:
    scheduler = {"_class_name": "TCDScheduler", "gamma": 0.3}
    record = replace(RECORD, method="tcd", guidance="distilled", scheduler=scheduler)
    assert "For ComfyUI" in model_card(record, LORA)
    told = model_card(replace(record, target_dim=8), LORA)
    assert "ComfyUI" not in told
    assert "but not as it was trained" in told


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run that ended with a student; its last validation grid is red."""
    teacher = tiny_pipeline()
    scheduler = lcm_scheduler(teacher, 20, 10.0)
    (tmp_path / "run/samples").mkdir(parents=True)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "run/samples/step-000005.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "run/samples/step-000010.png")
    record = lcm_record("nowhere/teacher", "embedded", 0.0, 4.0, 1.0, scheduler)
    provenance = replace(PROVENANCE_OF_IT, license={})
    save_pipeline(teacher, tmp_path / "run/pipeline", False, record, provenance)
    return tmp_path / "run/pipeline"


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "table.json").write_text(json.dumps({"setting": SETTING, "rows": ROWS}))
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    return folder


def test_a_result_carries_its_last_grid(finished: Path) -> None:
    assert Image.open(finished / "samples.png").getpixel((0, 0)) == (255, 0, 0)
    assert "![Sample grid](samples.png)" in (finished / "README.md").read_text()
    assert read_provenance(finished) == replace(PROVENANCE_OF_IT, license={})


def test_preparing_puts_measurements_and_licence_in_and_can_be_repeated(finished: Path, evaluation: Path) -> None:
    config = ShareConfig(str(finished), str(evaluation), "ours", "ada/base", "openrail++")
    prepare(config, "ada/other-name")
    card = (finished / "README.md").read_text()
    assert front(card)["license"] == "openrail++"
    assert front(card)["base_model"] == read_record(finished).base_model == "ada/base"
    assert "| ours | 4 |" in card
    assert "| other |" not in card
    assert (finished / "evaluation/grid.png").is_file()
    assert 'from_pretrained("ada/other-name")' in card
    for again in (config, ShareConfig(str(finished))):
        prepare(again, "ada/other-name")
        assert (finished / "README.md").read_text() == card
    assert not list(finished.rglob(".*"))


SINGLE_FILE = Path(__file__).parents[2] / "pipelines" / "consistency_text_to_image.py"


def test_a_single_file_pipeline_travels_beside_the_weights(finished: Path) -> None:
    assert "custom_pipeline" not in (finished / "README.md").read_text()
    for file in (SINGLE_FILE.name, str(SINGLE_FILE), None):  # and stays
        prepare(ShareConfig(str(finished), pipeline_file=file), "ada/student")
        assert (finished / "pipeline.py").read_bytes() == SINGLE_FILE.read_bytes()
        use = 'from_pretrained("ada/student", custom_pipeline="ada/student", trust_remote_code=True)'
        assert use in (finished / "README.md").read_text()
    folder = str(finished)
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    assert type(pipe).__name__ == "PortableConsistencyPipeline"


ONE = "class {}(DiffusionPipeline): pass\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from diffusers import DiffusionPipeline", "but it holds none; give a file such as"),
        (f"from diffusers import DiffusionPipeline\n{ONE.format('A')}{ONE.format('B')}", "but it holds A, B; give"),
        ("1 / 0", "does not run: ZeroDivisionError"),
        (None, "is not a Python file that exists"),
    ],
)
def test_a_single_file_holds_one_pipeline(finished: Path, tmp_path: Path, code: str | None, message: str) -> None:
    if code:
        (tmp_path / "file.py").write_text(code)
    with pytest.raises(ValueError, match=message):
        prepare(ShareConfig(str(finished), pipeline_file=str(tmp_path / "file.py")))
    assert not (finished / "pipeline.py").exists()


def test_a_single_file_is_not_for_a_lora(finished: Path) -> None:
    (finished / "model_index.json").rename(finished / LORA_WEIGHTS)
    with pytest.raises(ValueError, match="holds a LoRA; leave it out"):
        prepare(ShareConfig(str(finished), pipeline_file=str(SINGLE_FILE)))


def test_of_several_students_one_must_be_named(finished: Path, evaluation: Path) -> None:
    with pytest.raises(
        ValueError, match=r"measured ours, other, but no --evaluation_name is given; give one of them\."
    ):
        read_measured(evaluation)
    with pytest.raises(ValueError, match="but --evaluation_name is 'mine'"):
        read_measured(evaluation, "mine")
    with pytest.raises(ValueError, match=r"holds no table\.json"):
        read_measured(finished)


def measured_as(evaluation: Path, weights: dict[str, str | None], **changes: object) -> None:
    content = {"setting": SETTING | changes, "rows": ROWS, "weights": weights}
    (evaluation / "table.json").write_text(json.dumps(content))


def test_a_card_gets_the_numbers_of_its_own_weights(finished: Path, evaluation: Path) -> None:
    measured_as(evaluation, {"ours": "0" * 64, "other": weights_digest(finished)})
    prepare(ShareConfig(str(finished), str(evaluation)))  # found without a name
    card = (finished / "README.md").read_text()
    assert "| other | 4 |" in card
    assert "| ours |" not in card
    with pytest.raises(
        ValueError, match=r"measured as ours other weights than those in .*; give --evaluation_name 'ot"
    ):
        prepare(ShareConfig(str(finished), str(evaluation), "ours"))
    measured_as(evaluation, {"ours": "0" * 64})  # the other is a Hub id
    with pytest.raises(ValueError, match=r"measured as ours other weights than those in .*; measure that folder"):
        prepare(ShareConfig(str(finished), str(evaluation), "ours"))
    prepare(ShareConfig(str(finished), str(evaluation), "other"))
    assert (finished / "README.md").read_text() == card


def test_two_students_of_one_name_are_not_told_apart(finished: Path, evaluation: Path) -> None:
    rows = [row("pipeline", 4, 12.0), row("pipeline", 4, 99.0)]
    (evaluation / "table.json").write_text(json.dumps({"setting": SETTING, "rows": rows}))
    with pytest.raises(ValueError, match="several rows of pipeline for the same steps and guidance; measure it anew"):
        prepare(ShareConfig(str(finished), str(evaluation), "pipeline"))


def test_weights_are_known_wherever_they_lie(finished: Path, tmp_path: Path) -> None:
    known = weights_digest(finished)
    assert weights_digest(finished.rename(tmp_path / "moved")) == known
    (tmp_path / "moved/unet/diffusion_pytorch_model.safetensors").write_bytes(b"others")
    assert weights_digest(tmp_path / "moved") not in (None, known)
    assert weights_digest("ada/student") is None


def test_no_path_of_an_older_evaluation_gets_into_a_card(finished: Path, evaluation: Path) -> None:
    measured_as(evaluation, {}, extractor="/srv/ada/net_classifier", reference="/srv/ada/photos")
    prepare(ShareConfig(str(finished), str(evaluation), "ours"))
    for written in ("README.md", "evaluation/table.json"):
        assert "/srv/ada" not in (finished / written).read_text()
        assert "net_classifier" in (finished / written).read_text()


def test_a_result_without_provenance_is_refused(finished: Path) -> None:
    (finished / PROVENANCE).unlink()
    with pytest.raises(ValueError, match="does not tell how the student was trained"):
        prepare(ShareConfig(str(finished)))
