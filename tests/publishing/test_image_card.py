"""Cards, provenance and sharing of students without prompts, and of those made from data alone."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from tiny import tiny_pipeline, tiny_unet
from tiny_xl import tiny_xl_pipeline, tiny_xl_unet

from cm_diffusers.measured import Measured
from cm_diffusers.publishing import hub
from cm_diffusers.publishing import provenance as module
from cm_diffusers.publishing.card import EDM_METHODS
from cm_diffusers.publishing.hub import HubConfig, push_folder
from cm_diffusers.publishing.images import images_record, text_pipeline
from cm_diffusers.publishing.model_card import model_card
from cm_diffusers.publishing.pipelines import save_pipeline
from cm_diffusers.publishing.provenance import (
    PROVENANCE,
    describe_run,
    is_path,
    read_license,
    read_provenance,
    write_provenance,
)
from cm_diffusers.publishing.sharing import ShareConfig, prepare
from cm_diffusers.publishing.student_kinds import PACKAGE_NEEDED
from cm_diffusers.record import Record
from publishing.test_model_card import PROVENANCE_OF_IT, SETTING, SomeConfig
from publishing.test_publish_images import CLASSES, saved, scheduler_of, student, unet2d, vp_view


PAPERS = {
    "cd": "2303.01469", "ct": "2303.01469", "ict": "2310.14189", "slct": "2502.01441", "ect": "2406.14548",
    "sct": "2410.11081", "scd": "2410.11081", "ctm": "2310.02279", "mean_flow": "2505.13447", "edm": "2206.00364",
}  # fmt: skip
STOCK = Record("cd", "ada/diffusion", "none", 0.0, 0.0, 1.0, 2, {"_class_name": "CMStochasticIterativeScheduler"})
OURS = replace(STOCK, scheduler={"_class_name": "EDMConsistencyScheduler", "recommended_sigmas": [80.0, 0.821]})
MADE = replace(
    PROVENANCE_OF_IT,
    base_id="ada/diffusion",
    family=None,
    command="python training/train_ict.py --seed 3",
    settings={"seed": 3, "dataset_name": "ada/photos"},
)
ALONE = replace(MADE, base_id=None, license={})
PIPELINES = Path(__file__).parents[2] / "pipelines"


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def codes(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_distribution_matching_is_named_where_it_acted() -> None:
    scd = replace(OURS, method="scd")
    for weight, named in ((0.01, True), (0.0, False)):
        text = model_card(scd, replace(MADE, settings={"dmd_weight": weight}))
        papers = "[rCM](https://arxiv.org/abs/2510.08431), [DMD](https://arxiv.org/abs/2311.18828), and trained on"
        assert (papers in text) == named


def test_a_student_of_segments_has_no_single_step() -> None:
    levels = {"_class_name": "TrigFlowConsistencyScheduler", "recommended_sigmas": [80.0, 0.5]}
    for gamma, one in ((1.0, True), (0.0, False)):
        record = replace(OURS, method="scd", scheduler=levels | {"gamma": gamma})
        assert ("num_inference_steps=1" in model_card(record, MADE)) == one


def test_a_grid_of_training_in_noise_levels_has_no_row_of_the_teacher() -> None:
    made = replace(MADE, family="stable-diffusion")
    for method, shown in (("scd", False), ("cd", False), ("lcm", True)):
        assert ("the teacher's row" in model_card(replace(OURS, method=method), made, grid="samples.png")) == shown


def test_front_matter() -> None:
    found = front(model_card(OURS, MADE))
    assert found == {
        "base_model": "ada/diffusion",
        "base_model_relation": "finetune",
        "datasets": "ada/photos",
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "pipeline_tag": "unconditional-image-generation",
        "tags": [
            "unconditional-image-generation", "diffusers", "diffusers-training", "cm_diffusers", "consistency-model",
            "cd",
        ],
    }  # fmt: skip
    alone = front(model_card(replace(OURS, base_model="", method="edm"), ALONE))
    assert not {"base_model", "base_model_relation", "license"} & alone.keys()
    assert alone["tags"][3:] == ["cm_diffusers", "edm"]
    assert ModelCard(model_card(OURS, MADE)).data.pipeline_tag == found["pipeline_tag"]


@pytest.mark.parametrize("method", EDM_METHODS)
def test_it_says_what_was_done(method: str) -> None:
    card = model_card(replace(OURS, method=method), MADE)
    how = "distilled" if method in ("cd", "scd", "ctm") else "tuned"
    assert f"# {EDM_METHODS[method][0]} of ada/diffusion\n" in card
    assert f"It was {how} from [ada/diffusion](https://huggingface.co/ada/diffusion) with cm_diffusers, after" in card
    assert f"https://arxiv.org/abs/{PAPERS[method]}), and trained on ada/photos.\n" in card
    alone = model_card(replace(OURS, method=method, base_model="", recommended_num_inference_steps=1), ALONE)
    assert f"# {EDM_METHODS[method][0]} of ada/photos\n" in alone
    assert "Makes images in about 1 step. It was trained on ada/photos with cm_diffusers, after [" in alone
    assert f"https://arxiv.org/abs/{PAPERS[method]}).\n" in alone
    for text in (card, alone):
        assert "cm_diffusers at `abc1234`" in text
        assert "python training/train_ict.py --seed 3" in text
        assert "| dataset_name | ada/photos |" in text
        assert not re.search(r"TODO|More Information|\{\w*\}|guid|prompt|\n\n\n", text, re.IGNORECASE)


def test_the_licence_is_that_of_the_model_or_of_the_data() -> None:
    assert "Licence: creativeml-openrail-m, that of the model it was made from." in model_card(OURS, MADE)
    unknown, data = replace(OURS, base_model=""), replace(ALONE, license={"license": "mit"})
    assert "The data it was trained on states no licence" in model_card(unknown, ALONE)
    assert "Licence: mit, that of the data it was trained on." in model_card(unknown, data)
    assert front(model_card(unknown, data))["license"] == "mit"


def test_classes_are_explained() -> None:
    assert "class" not in model_card(OURS, MADE)
    card = model_card(OURS, replace(MADE, num_classes=10))
    assert "It knows 10 classes: `class_labels` are numbers from 0 to 9" in card
    assert "pipe(class_labels=[0, 9]).images  # at the noise levels 80, 0.821\n" in card


def test_one_step_is_shown_where_it_is_another_call_and_makes_images() -> None:
    one = "num_inference_steps=1).images  # in one step"
    assert one in model_card(OURS, MADE)
    single = replace(OURS, scheduler={**OURS.scheduler, "recommended_sigmas": [80.0]})
    grid = replace(OURS, scheduler={**OURS.scheduler, "recommended_sigmas": None}, recommended_num_inference_steps=18)
    assert one not in model_card(single, MADE)
    assert one in model_card(grid, MADE)
    assert "pipe(batch_size=4).images  # in 18 steps" in model_card(grid, MADE)
    many = replace(grid, scheduler={**OURS.scheduler, "recommended_sigmas": [80.0 / 2**k for k in range(18)]})
    assert "pipe(batch_size=4).images  # in 18 steps" in model_card(many, MADE)
    assert one not in model_card(replace(grid, method="edm"), MADE)


def test_who_can_load_the_folder() -> None:
    for name in ("EDMConsistencyScheduler", "TrigFlowConsistencyScheduler"):
        ours = replace(OURS, scheduler={**OURS.scheduler, "_class_name": name})
        _, by_file = codes(model_card(ours, MADE))
        assert 'custom_pipeline="pipelines/consistency_images.py", trust_remote_code=True' in by_file
        assert f"{PACKAGE_NEEDED}, or its single file" in model_card(ours, MADE)
    assert PACKAGE_NEEDED not in model_card(STOCK, MADE)
    assert len(codes(model_card(STOCK, MADE))) == 2


def test_guidance_in_the_weights_is_told() -> None:
    """Of a mean flow, which was trained to it."""
    guided = replace(OURS, method="mean_flow", guidance="distilled", w_min=1.5, w_max=1.5)
    said = "Guidance is in the weights, at a scale of 2.5 where 1 is none: sampling takes no scale."
    assert f"\n\n{said}\n\n" in model_card(guided, MADE)
    assert "uidance" not in model_card(replace(guided, guidance="none", w_min=0.0, w_max=0.0), MADE)


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_the_code_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package, and with diffusers: alone, or by the single file of the checkout."""
    (tmp_path / "pipelines").symlink_to(PIPELINES)
    monkeypatch.chdir(tmp_path)
    pipe, _ = student(kind)
    record = images_record("ict", "", "none", 0.0, pipe.scheduler, 2)
    provenance = replace(ALONE, name="student", num_classes=CLASSES)
    save_pipeline(pipe, tmp_path / "student", False, record, provenance)
    found = codes((tmp_path / "student/README.md").read_text())
    assert len(found) == 2
    for code in found:
        names = {}
        exec(code, names)
        side = 32 if kind == "latents" else 8
        assert [image.size for image in names["images"]] == [(side, side)] * 2


def test_measurements_name_no_guidance() -> None:
    rows = [
        {"pipeline": "ours", "num_inference_steps": steps, "guidance_scale": None, "fid": fid}
        for steps, fid in ((1, 9.0), (2, 8.125))
    ]
    for guidance in (None, 1.0):
        measured = Measured(SETTING, [{**row, "guidance_scale": guidance} for row in rows])
        card = model_card(replace(OURS, base_model=""), ALONE, measured, "evaluation/grid.png")
        assert "| pipeline | NFE | FID to data |" in card
        assert "| ours | 2 | 8.12 |" in card
        assert "baseline" not in card
        assert "samples of the evaluated pipelines for the same seeds." in card
        (result,) = front(card)["model-index"][0]["results"]
        assert result["task"] == {"type": "unconditional-image-generation"}
        assert result["metrics"][1] == {
            "type": "fid",
            "value": 8.125,
            "name": "FID; 2 steps",
            "args": {"num_inference_steps": 2, "num_images": 100, "seed": 0, "dtype": "float32"},
        }
    teacher = Measured(SETTING, [{**rows[0], "pipeline": "teacher"}, *rows])
    assert "The teacher's rows are the baseline." in model_card(OURS, MADE, teacher)


class TestText:
    def test_a_student_with_prompts_keeps_its_card(self) -> None:
        record = replace(OURS, guidance="distilled", w_min=2.0, w_max=2.0)
        card = model_card(record, PROVENANCE_OF_IT)
        assert front(card)["tags"] == [
            "text-to-image", "diffusers", "diffusers-training", "cm_diffusers", "consistency-model", "cd",
            "stable-diffusion",
        ]  # fmt: skip
        assert front(card)["widget"] == [{"text": "a red bag"}, {"text": "a coat"}]
        assert "(`guidance_scale` 3) is in the weights: sample with `guidance_scale` 1." in card
        assert PACKAGE_NEEDED in card
        assert ['pipe("your prompt")' in code for code in codes(card)] == [True, True]

    def test_one_without_guidance_says_so(self) -> None:
        record = replace(OURS, guidance="distilled")
        assert "Trained without guidance: sample with `guidance_scale` 1." in model_card(record, PROVENANCE_OF_IT)

    def test_its_code_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "pipelines").symlink_to(PIPELINES)
        monkeypatch.chdir(tmp_path)
        pipe = text_pipeline(tiny_pipeline(), tiny_unet(), scheduler_of(vp_view()))
        record = images_record("cd", "ada/teacher", "distilled", 0.0, pipe.scheduler, 1)
        save_pipeline(pipe, tmp_path / "student", False, record, replace(PROVENANCE_OF_IT, name="student"))
        found = codes((tmp_path / "student/README.md").read_text())
        assert len(found) == 2
        for code in found:
            names = {}
            exec(code, names)
            assert names["image"].size == (32, 32)


class TestProvenance:
    @pytest.fixture(autouse=True)
    def script(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.argv", ["training/train_ict.py"])

    def test_of_a_network_trained_from_data_alone(self, tmp_path: Path) -> None:
        found = describe_run([SomeConfig(3)], None, None, "ada/photos", "runs/x", num_classes=10)
        assert (found.base_id, found.family, found.license, found.num_classes) == (None, None, {}, 10)
        assert found.command == "python training/train_ict.py --seed 3"
        write_provenance(found, tmp_path)
        assert read_provenance(tmp_path) == found

    def test_a_teacher_without_text_has_no_family(self) -> None:
        teacher = DDPMPipeline(unet2d(num_class_embeds=None), DDPMScheduler())
        found = describe_run([SomeConfig()], teacher, "ada/diffusion", "ada/photos", "runs/x")
        assert (found.base_id, found.family) == ("ada/diffusion", None)

    def test_older_files_are_read(self, tmp_path: Path) -> None:
        write_provenance(PROVENANCE_OF_IT, tmp_path)
        content = json.loads((tmp_path / PROVENANCE).read_text())
        del content["num_classes"]
        (tmp_path / PROVENANCE).write_text(json.dumps(content))
        assert read_provenance(tmp_path) == PROVENANCE_OF_IT
        del content["family"]
        (tmp_path / PROVENANCE).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="does not tell how the student was trained"):
            read_provenance(tmp_path)

    @pytest.mark.parametrize(
        ("stated", "found"),
        [("mit", {"license": "mit"}), ("[mit]", {"license": "mit"}), ("[mit, gpl-3.0]", {}), ("", {})],
    )
    def test_the_licence_of_the_data(self, stated: str, found: dict, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(f"---\nlicense: {stated}\ntags: [x]\n---\nImages.")
        assert describe_run([SomeConfig()], None, None, str(tmp_path), "runs/x").license == found

    def test_on_the_hub_it_is_asked_of_a_data_set(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "card.md").write_text("---\nlicense:\n- mit\n---\n")
        asked = []

        def download(*args, **options) -> str:
            asked.append((args, options))
            return str(tmp_path / "card.md")

        monkeypatch.setattr(module, "hf_hub_download", download)
        assert read_license("ada/photos", "dataset") == {"license": "mit"}
        assert asked == [(("ada/photos", "README.md"), {"repo_type": "dataset"})]

    def test_what_cannot_be_a_place_has_no_licence(self) -> None:
        assert read_license("https://data.org/0.tar?token=" + "x" * 500, "dataset") == {}

    def test_no_teacher_is_no_path(self, tmp_path: Path) -> None:
        assert not is_path("")
        assert is_path(str(tmp_path))


class TestSharing:
    @pytest.fixture
    def stock(self, tmp_path: Path) -> Path:
        return self.finished("pixels", tmp_path)

    @staticmethod
    def finished(kind: str, folder: Path) -> Path:
        path = saved(student(kind)[0], folder / kind / "pipeline")
        write_provenance(replace(ALONE, num_classes=CLASSES), path)
        return path

    @pytest.mark.parametrize("kind", ["pixels", "latents"])
    def test_again_with_a_name(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "README.md").write_text("---\nlicense: not-of-the-student\n---\n")
        monkeypatch.chdir(tmp_path)  # where "", the name of no teacher, leads as a path
        folder = self.finished(kind, tmp_path)
        prepare(ShareConfig(str(folder), teacher_license="mit"), "ada/other-name")
        card = (folder / "README.md").read_text()
        assert front(card)["license"] == "mit"
        assert card.count('from_pretrained("ada/other-name")') == (2 if kind == "pixels" else 1)
        prepare(ShareConfig(str(folder)))
        assert (folder / "README.md").read_text() == card
        assert read_provenance(folder).num_classes == CLASSES

    def test_a_contradicting_licence(self, stock: Path) -> None:
        write_provenance(replace(ALONE, license={"license": "mit"}), stock)
        with pytest.raises(ValueError, match="--teacher_license gpl contradicts the data's card, which gives 'mit'"):
            prepare(ShareConfig(str(stock), teacher_license="gpl"))

    def test_a_teacher_cannot_be_named_where_there_was_none(self, stock: Path) -> None:
        with pytest.raises(ValueError, match="trained from data alone, so --base_model names nothing; leave it out"):
            prepare(ShareConfig(str(stock), base_model="ada/diffusion"))

    def test_no_teacher_is_missed_on_the_hub(self, stock: Path, caplog: pytest.LogCaptureFixture) -> None:
        with mock.patch.object(hub.HfApi, "upload_folder") as upload:
            push_folder(stock, "ada/x", HubConfig())
        assert upload.call_args.kwargs["folder_path"] == stock
        assert "cm_diffusers.json" in upload.call_args.kwargs["allow_patterns"]  # it goes up as it is
        assert "base model" not in caplog.text

    def test_a_single_file_that_serves(self, stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(stock.parent)
        name = "diffusers_modules.local.pipeline"  # diffusers runs every pipeline.py in the same module
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        prepare(ShareConfig("pipeline", pipeline_file=str(PIPELINES / "consistency_editing.py")), "pipeline")
        *_, code = codes((stock / "README.md").read_text())
        names = {}
        exec(code, names)
        assert type(names["pipe"]).__name__ == "ConsistencyEditingPipeline"
        assert set(names["pipe"].components) == {"unet", "scheduler"}

    def test_one_that_does_not_fit(self, stock: Path) -> None:
        message = "consistency_text_to_image.py needs text_encoder, tokenizer, vae, which .* has not; leave it out"
        with pytest.raises(ValueError, match=message):
            prepare(ShareConfig(str(stock), pipeline_file=str(PIPELINES / "consistency_text_to_image.py")))

    @staticmethod
    def text(folder: Path, pipe=None) -> Path:
        pipe = pipe or text_pipeline(tiny_pipeline(), tiny_unet(), scheduler_of(vp_view()))
        record = images_record("cd", "ada/teacher", "distilled", 0.0, pipe.scheduler, 1)
        xl = getattr(pipe, "text_encoder_2", None) is not None
        provenance = replace(PROVENANCE_OF_IT, family="stable-diffusion-xl" if xl else "stable-diffusion")
        save_pipeline(pipe, folder, False, record, provenance)
        return folder

    @pytest.mark.parametrize("kind", ["latents", "text"])
    def test_one_that_replaces_the_package(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = self.text(tmp_path / "text") if kind == "text" else self.finished(kind, tmp_path)
        file = {"latents": "consistency_images.py", "text": "consistency_text_to_image.py"}[kind]
        monkeypatch.chdir(folder.parent)
        name = "diffusers_modules.local.pipeline"  # diffusers runs every pipeline.py in the same module
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        prepare(ShareConfig(folder.name, pipeline_file=str(PIPELINES / file)), folder.name)
        card = (folder / "README.md").read_text()
        assert PACKAGE_NEEDED not in card
        package, beside = codes(card)
        assert "cm_diffusers" in package
        names = {}
        exec(beside, names)
        assert type(names["pipe"]).__name__.startswith("Portable")
        images = [names["image"]] if kind == "text" else names["images"]
        assert {image.size for image in images} == {(32, 32)}
        if kind == "latents":
            assert len(images) == 2

    @pytest.mark.parametrize(
        ("kind", "file", "message"),
        [
            ("latents", "editing", "leaves out vae of .*; give another"),
            ("latents", "text_to_image", "needs text_encoder, tokenizer, which"),
            ("text", "images", "leaves out text_encoder, tokenizer of"),
            ("xl", "text_to_image", "leaves out text_encoder_2, tokenizer_2 of"),
            ("epsilon", "editing", "asks for task, image, but .* needs one that samples, for diffusers alone cannot"),
        ],
    )
    def test_none_that_does_not_serve(self, kind: str, file: str, message: str, tmp_path: Path) -> None:
        if kind in ("text", "xl"):
            xl = text_pipeline(tiny_xl_pipeline(), tiny_xl_unet(), scheduler_of(vp_view())) if kind == "xl" else None
            folder = self.text(tmp_path / kind, xl)
        else:
            folder = self.finished(kind, tmp_path)
        with pytest.raises(ValueError, match=message):
            prepare(ShareConfig(str(folder), pipeline_file=str(PIPELINES / f"consistency_{file}.py")))
        assert not (folder / "pipeline.py").exists()

    def test_none_for_a_folder_that_names_our_scheduler(self, tmp_path: Path) -> None:
        folder = self.text(tmp_path / "text")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["cm_diffusers.schedulers.scheduling_edm_consistency", "EDMConsistencyScheduler"]
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="without this package, which cannot load the scheduler of"):
            prepare(ShareConfig(str(folder), pipeline_file=str(PIPELINES / "consistency_text_to_image.py")))

    def test_what_samples_a_student_that_has_no_file(self, tmp_path: Path) -> None:
        xl = text_pipeline(tiny_xl_pipeline(), tiny_xl_unet(), scheduler_of(vp_view()))
        read = "code that runs on your machine, so read it first:\n\n```python"
        end = {
            "latents": f", or its single file `pipelines/consistency_images.py`, {read}",
            "text": f", or its single file `pipelines/consistency_text_to_image.py`, {read}",
            "xl": ".\n",
        }
        latents = self.finished("latents", tmp_path)
        prepare(ShareConfig(str(latents)))
        folders = {"latents": latents, "text": self.text(tmp_path / "text"), "xl": self.text(tmp_path / "xl", xl)}
        for kind, folder in folders.items():
            assert f"\n\n{PACKAGE_NEEDED}{end[kind]}\n" in (folder / "README.md").read_text()
