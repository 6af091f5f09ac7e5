"""The sweep from the command line on tiny pipelines: what it measures, keeps, writes and refuses."""

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import run_script
from tiny import FASHION_LABELS, tiny_clip

from cm_diffusers.evaluation import front_page, metrics, sweep
from cm_diffusers.evaluation.compared import draw
from cm_diffusers.evaluation.features import classify, extract_features, load_extractor
from cm_diffusers.evaluation.front_report import plots_of
from cm_diffusers.evaluation.reference import ReferenceConfig, load_reference
from cm_diffusers.evaluation.sampling import generate, generate_unprompted, load_pipeline, set_lora_scale
from cm_diffusers.rewards import load_reward
from evaluation.test_evaluation import image_folders, parts, write_reference  # noqa: F401 (fixtures)


NAME = '<b>"odd" & |name| $\\q$</b>'
PROMPTS, EACH = [f"a {label}" for label in FASHION_LABELS[:3]], 3


@pytest.fixture(scope="module")
def home(image_folders: Path) -> Path:  # noqa: F811
    """Pipelines of all kinds, and twelve real images of three captions; in `named` some whose captions name no class."""
    (image_folders / "three").mkdir()
    write_reference(image_folders / "three", [0, 1, 2] * 4)
    (image_folders / "named").mkdir()
    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number,) * 3).save(image_folders / "named" / f"{number}.png")
        (image_folders / "named" / f"{number}.txt").write_text(f"thing {number}")
    return image_folders


def fronts(home: Path, output: Path, **changed: object) -> dict:
    """What the script writes as JSON; flags replace those below, and None leaves one out."""
    defaults = {
        "pipelines": [home / "lora"],
        "num_inference_steps": [1],
        "guidance_scales": [2.0],
        "train_data_dir": home / "three",
        "label_column": "label",
        "feature_extractor": home / "net",
        "resolution": 32,
        "images_per_prompt": EACH,
        "bootstrap_samples": 4,
        "output_dir": output,
    }
    run_script(
        "evaluate_fronts", **{name: value for name, value in {**defaults, **changed}.items() if value is not None}
    )
    return json.loads((output / "table.json").read_text("utf-8"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of each point that is drawn."""
    steps = []

    def counted(pipe, asked, seeds, count, *rest):
        steps.append(count)
        return draw(pipe, asked, seeds, count, *rest)

    monkeypatch.setattr(sweep, "draw", counted)
    return steps


@pytest.fixture(scope="module")
def swept(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("swept")
    flags = {"teacher": home / "teacher", "teacher_steps": [3, 2], "names": NAME, "lora_scales": [0.5, 1.0]}
    flags |= {"num_inference_steps": [2, 1], "rewards": ["jpeg_compressibility"], "guidance_scales": [2.0, 4.0]}
    return out, fronts(home, out, **flags, axes=["agreement,fid", "fid,vendi,reward_jpeg_compressibility"])


def knobs(row: dict) -> tuple:
    return tuple(row[key] for key in ("pipeline", "num_inference_steps", "guidance_scale", "gamma", "lora_scale"))


def test_every_combination_is_a_row(swept: tuple[Path, dict]) -> None:
    _, found = swept
    teacher = [("teacher", steps, scale, None, None) for steps in (2, 3) for scale in (2, 4)]
    student = [(NAME, steps, 1.5, None, scale) for steps in (1, 2) for scale in (0.5, 1)]  # its own guidance
    assert [knobs(row) for row in found["rows"]] == teacher + student
    assert found["setting"]["num_prompts"] == 3
    assert found["setting"]["num_real_images"] == 12


def test_columns_are_those_of_the_images(swept: tuple[Path, dict], home: Path) -> None:
    _, found = swept
    row = next(row for row in found["rows"] if knobs(row) == (NAME, 2, 1.5, None, 0.5))
    pipe, extractor = load_pipeline(str(home / "lora")), load_extractor(str(home / "net"))
    set_lora_scale(pipe, 0.5)
    prompts = [prompt for prompt in PROMPTS for _ in range(EACH)]
    images, _ = generate(pipe, prompts, range(9), 2, 1.5, 32, 32)
    features = extract_features(extractor, images)
    data = ReferenceConfig(train_data_dir=str(home / "three"), label_column="label", resolution=32)
    real = extract_features(extractor, load_reference(data).images)
    near = pytest.approx
    assert row["fid"] == near(metrics.frechet_distance(real, features), rel=1e-4)
    assert row["kid"] == near(metrics.kernel_distance(real, features)[0], rel=1e-4)
    for name, value in metrics.neighbour_metrics(real, features).items():
        assert row[name] == near(value)
    labels = [label for label in (0, 1, 2) for _ in range(EACH)]
    assert row["agreement"] == near(metrics.prompt_agreement(classify(extractor, features), labels))
    assert row["vendi"] == near(metrics.prompt_vendi_score(features, prompts, EACH), rel=1e-5)
    distances = [metrics.mean_pairwise_distance(group) for group in features.split(EACH)]
    assert row["pairwise_distance"] == near(sum(distances) / 3, rel=1e-4)
    reward = load_reward("jpeg_compressibility")(images, prompts)
    assert row["reward_jpeg_compressibility"] == near(reward.mean().item(), rel=1e-5)
    assert row["fid_low"] <= row["fid"] <= row["fid_high"]
    assert "ms_per_image_low" not in row


def test_tables_agree_and_name_the_fronts(swept: tuple[Path, dict]) -> None:
    out, found = swept
    assert [front["axes"] for front in found["fronts"]] == [
        ["agreement", "fid"],
        ["fid", "vendi", "reward_jpeg_compressibility"],
    ]
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text("utf-8"))))
    assert [row["pipeline"] for row in rows] == [row["pipeline"] for row in found["rows"]]
    assert [float(row["fid"]) for row in rows] == [row["fid"] for row in found["rows"]]
    lines = (out / "table.md").read_text("utf-8").splitlines()
    assert "LoRA scale | ms/image | agreement | FD-net | KID" in lines[0]
    assert lines[6].startswith('| &lt;b>"odd" & &#124;name&#124; $\\q$&lt;/b> | 1 |')
    for place, front in enumerate(found["fronts"], 1):
        on = [number for number, row in enumerate(rows) if row[f"front {place}"] == "1"]
        assert front["members"] == on != []
        assert [str(place) in line.split(" | ")[-1] for line in lines[2:10]] == [n in on for n in range(8)]
        assert (
            max(front["hypervolumes"].values()) <= front["hypervolume"] <= sum(front["hypervolumes"].values()) + 1e-9
        )
        worst = [min(row[key] for row in found["rows"]) if way == "max" else max(row[key] for row in found["rows"])
                 for key, way in zip(front["axes"], front["better"], strict=True)]  # fmt: skip
        assert front["reference_point"] == worst
        assert any(f"Front {place}: Hypervolume {front['hypervolume']:.4g} from" in line for line in lines)
    pictures = {"front_agreement_fid.png": 1, "front_fid_vendi_reward_jpeg_compressibility.png": 3}
    for name, panels in pictures.items():
        with Image.open(out / name) as picture:
            assert picture.size == (840 * panels, 750)


def test_the_page_is_whole_in_itself_and_shows_every_point(swept: tuple[Path, dict]) -> None:
    out, found = swept
    page = (out / "fronts.html").read_text("utf-8")
    assert re.findall(r"\w+://|<link|<iframe|@import|url\(", page) == []
    assert re.findall(r'(?:src|href)="', page) == []
    assert "<b>" not in page
    told = json.loads(re.search(r'id="rows">(.*?)</script>', page, re.DOTALL)[1])
    assert [one["name"] for one in told] == [row["pipeline"] for row in found["rows"]]
    points = [int(number) for number in re.findall(r'class="point" data-row="(\d+)" tabindex="0"', page)]
    assert sorted(points) == sorted(list(range(8)) * 4)  # of one panel, and of three
    for one in told:
        head, _, data = one["image"].partition(",")
        assert head == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (3 * 32, 2 * 32)  # two of three images of each prompt
    assert ["LoRA scale", "0.5"] in told[4]["knobs"]
    assert dict(told[0]["numbers"])["FD-net"].startswith(f"{found['rows'][0]['fid']:.2f} (")
    panel = page[page.index("<svg") : page.index("</figure>")]
    point = r'data-row="(\d+)".*?cx="(.*?)" cy="(.*?)" r="5" fill="(.*?)"'
    places = {int(n): (float(x), float(y), fill) for n, x, y, fill in re.findall(point, panel)}
    best = min(range(8), key=lambda number: found["rows"][number]["fid"])
    assert places[best][1] == min(y for _, y, _ in places.values())  # less is better, and better is up
    inside = {n: 52 < x < 420 - 52 and 52 < y < 340 - 52 for n, (x, y, _) in places.items()}
    assert {n: fill != "#ffffff" for n, (_, _, fill) in places.items()} == inside, "hollow at a border"
    assert all(inside[n] for n in range(8) if found["rows"][n]["pipeline"] != "teacher")


def test_a_point_far_beyond_the_others_stands_hollow_at_the_border():
    ends = np.array([[0.0, 10.0], [1.0, 20.0]])
    place_of = front_page._Scale(ends, [False, True])
    inside, beyond = place_of(np.array([[0.5, 15.0], [3.0, 15.0]]))
    assert inside.tolist() == [210, 170]
    assert 'cx="210.0" cy="170.0" r="5" fill="#111111"' in front_page._point(0, "a", inside, "#111111", False)
    assert 'cx="368.0" cy="170.0" r="5" fill="#ffffff" stroke="#111111"' in front_page._point(
        1, "b", beyond, "#111111", False
    )


def test_what_was_measured_is_not_drawn_again(home: Path, tmp_path: Path, drawn: list[int]) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    first = fronts(home, out, num_inference_steps=[2, 1])
    assert drawn == [1, 2]  # few steps first
    assert fronts(home, out, num_inference_steps=[2, 1])["rows"] == first["rows"]
    assert drawn == [1, 2]
    more = fronts(home, out, num_inference_steps=[3, 2, 1])
    assert drawn == [1, 2, 3]
    assert more["rows"][:2] == first["rows"]
    shutil.copytree(home / "lora", moved / "lora")
    shutil.copytree(home / "teacher", moved / "teacher")
    fronts(home, out, pipelines=[moved / "lora"], names="other", axes="fid,kid", rewards=None, eval_batch_size=4)
    assert drawn == [1, 2, 3]  # known by its content
    fronts(home, out, bootstrap_samples=2)
    assert drawn == [1, 2, 3]
    fronts(home, out, seed=1)
    fronts(home, out, num_prompts=2, rewards=["jpeg_compressibility"])
    assert drawn == [1, 2, 3, 1, 1]


def test_a_damaged_point_alone_is_measured_again(home: Path, tmp_path: Path, drawn: list[int]) -> None:
    first = fronts(home, tmp_path, num_inference_steps=[1, 2])
    largest = sorted((tmp_path / "points").iterdir(), key=lambda path: path.stat().st_size)[-1]
    largest.write_bytes(largest.read_bytes()[:-5])
    again = fronts(home, tmp_path, num_inference_steps=[1, 2])
    assert len(drawn) == 3
    timeless = [{key: value for key, value in row.items() if key != "ms_per_image"} for row in first["rows"]]
    assert [{key: value for key, value in row.items() if key != "ms_per_image"} for row in again["rows"]] == timeless


def test_a_sweep_that_ends_early_keeps_its_points(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fails(pipe, prompts, seeds, steps, *rest):
        asked.append(steps)
        if steps == 3:
            raise MemoryError
        return draw(pipe, prompts, seeds, steps, *rest)

    monkeypatch.setattr(sweep, "draw", fails)
    with pytest.raises(MemoryError):
        fronts(home, tmp_path, num_inference_steps=[1, 2, 3])
    assert not (tmp_path / "table.json").exists()
    rows = fronts(home, tmp_path, num_inference_steps=[1, 2])["rows"]
    assert len(rows) == 2
    assert asked == [1, 2, 3]


def test_plots_of_an_earlier_sweep_do_not_look_current(home: Path, tmp_path: Path) -> None:
    """Those that its record names; other files of such names are somebody's own."""
    fronts(home, tmp_path, axes=["fid,kid", "fid,recall", "kid,recall"])
    (tmp_path / "front_mine.png").write_text("mine")
    (tmp_path / "front_fid_density.png").write_text("mine, too")
    first = (tmp_path / "front_fid_kid.png").stat().st_mtime_ns
    (tmp_path / "front_kid_recall.png").unlink()
    fronts(home, tmp_path, axes=["fid,kid", "recall,fid"])
    names = ["front_fid_density.png", "front_fid_kid.png", "front_mine.png", "front_recall_fid.png"]
    assert sorted(path.name for path in tmp_path.glob("front_*")) == names
    assert (tmp_path / "front_fid_density.png").read_text() == "mine, too"
    assert (tmp_path / "front_fid_kid.png").stat().st_mtime_ns > first
    (tmp_path / "table.json").write_text('{"rows": []}')  # of something else
    fronts(home, tmp_path, axes="fid,kid")
    assert sorted(path.name for path in tmp_path.glob("front_*")) == names


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"fronts": 1}', '{"fronts": [{"axes": [1, 2]}]}', '{"fronts": ["x"]}']
)
def test_a_record_of_something_else_names_no_plots(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "table.json").write_text(text)
    assert plots_of(tmp_path / "table.json") == set()


def test_no_record_names_a_plot_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"fronts": [{"axes": ["../../x", "/y"]}]}')
    assert plots_of(tmp_path / "table.json") == {"front_..-..-x_-y.png"}


def test_classes_gammas_and_pipelines_that_are_asked_for_nothing(home: Path, tmp_path: Path) -> None:
    flags = {
        "pipelines": [home / "classes", home / "plain"],
        "train_data_dir": home / "captionless",
        "resolution": None,
    }
    flags |= {"num_inference_steps": [2], "gammas": [0.0, 1.0], "num_prompts": 4, "guidance_scales": None}
    found = fronts(home, tmp_path, **flags)
    assert [knobs(row) for row in found["rows"]] == [
        (name, 2, None, gamma, None) for name in ("classes", "plain") for gamma in (0, 1)
    ]
    assert {row["resolution"] for row in found["rows"]} == {16}
    assert found["fronts"][0]["axes"] == ["agreement", "fid", "vendi"]
    assert set(found["fronts"][0]["members"]) <= {0, 1}
    for row in found["rows"][2:]:
        assert {"vendi", "pairwise_distance", "agreement"} & row.keys() == set()
    pipe, extractor = load_pipeline(str(home / "classes")), load_extractor(str(home / "net"))
    pipe.scheduler.register_to_config(gamma=1.0)
    labels = [label for label in range(4) for _ in range(EACH)]
    images, _ = generate_unprompted(pipe, range(12), 2, 32, labels)
    features = extract_features(extractor, images)
    assert found["rows"][1]["vendi"] == pytest.approx(metrics.prompt_vendi_score(features, labels, EACH), rel=1e-5)
    assert found["rows"][0]["fid"] != found["rows"][1]["fid"]


def test_clip_models_give_their_columns(home: Path, tmp_path: Path) -> None:
    for part in tiny_clip():
        part.save_pretrained(tmp_path / "clip")
    flags = {"clip_model": tmp_path / "clip", "cmmd_model": tmp_path / "clip", "axes": "clip_score,cmmd"}
    (row,) = fronts(home, tmp_path / "out", **flags)["rows"]
    images, _ = generate(
        load_pipeline(str(home / "lora")), [p for p in PROMPTS for _ in range(EACH)], range(9), 1, 1.5, 32, 32
    )
    clip = metrics.load_clip(str(tmp_path / "clip"))
    score = metrics.clip_scores(clip, images, [p for p in PROMPTS for _ in range(EACH)]).mean().item()
    assert row["clip_score"] == pytest.approx(score, abs=1e-3)
    data = ReferenceConfig(train_data_dir=str(home / "three"), label_column="label", resolution=32)
    real, fake = (metrics.clip_embeddings(clip, some) for some in (load_reference(data).images, images))
    torch.testing.assert_close(fake.norm(dim=1), torch.ones(9))
    squared = torch.cdist(real.double(), fake.double()).square()
    kernels = [
        torch.exp(-torch.cdist(a.double(), b.double()).square() / 200).mean() for a, b in ((real, real), (fake, fake))
    ]
    expected = 1000 * (sum(kernels) - 2 * torch.exp(-squared / 200).mean()).item()
    assert row["cmmd"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_images_of_different_sizes_are_told(home: Path, tmp_path: Path) -> None:
    flags = {"pipelines": [home / "plain", home / "teacher"], "names": ["small", "large"], "resolution": None}
    found = fronts(home, tmp_path, **flags)
    assert [row["resolution"] for row in found["rows"]] == [16, 32]
    lines = (tmp_path / "table.md").read_text("utf-8").splitlines()
    assert [line.split(" | ")[-2] for line in lines[2:4]] == ["16", "32"]
    assert lines[5].startswith("**Rows have images of different sizes (px)")


def test_a_reference_point_that_is_given_is_taken(home: Path, tmp_path: Path) -> None:
    found = fronts(
        home, tmp_path, axes="fid,recall", reference_point=["fid=1000", "recall=-1"], num_inference_steps=[1, 2]
    )
    (front,) = found["fronts"]
    assert front["reference_point"] == [1000, -1]
    boxes = sorted((1000 - row["fid"], row["recall"] + 1) for row in found["rows"])
    (a, b), (c, d) = boxes
    assert front["hypervolume"] == pytest.approx(a * b + c * d - min(a, c) * min(b, d))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"axes": "fid,fud"}, "--axes names 'fud', which is no column: choose from num_inference_steps"),
        ({"axes": "fid,clip_score"}, "--axes names clip_score, which needs --clip_model"),
        ({"axes": "fid,vendi", "images_per_prompt": 1, "num_prompts": None, "train_data_dir": "{home}/data"}, "vendi, which needs .* --images_per_prompt of 2"),
        ({"images_per_prompt": 1}, "--images_per_prompt 1 of 3 prompts makes 3 images: the metrics need more than 5"),
        ({"num_images": 4}, "the reference set makes 4 images: the metrics need more than 5"),
        ({"num_images": 13}, "--num_images is 13 but the reference set holds 12"),
        ({"num_prompts": 4}, "--num_prompts is 4, but the reference set has 3 different"),
        ({"reference_point": "kid=1"}, "--reference_point kid=1: give COLUMN=NUMBER"),
        ({"pipelines": "{home}/teacher", "names": "it", "lora_scales": 0.5}, "--lora_scales has no effect on these pipelines"),
        ({"gammas": 0.5}, "--gammas has no effect on these pipelines, which have none"),
        ({"rewards": "beauty"}, "There is no reward 'beauty'"),
        ({"rewards": "classifier:{home}/net", "label_column": None, "train_data_dir": "{home}/named"}, "names no class of the classifier"),
        ({"pipelines": "{home}/plain", "train_data_dir": "{home}/captionless", "rewards": "jpeg_compressibility"}, "--rewards has no effect on pipelines that are asked for nothing"),
        ({"pipelines": "{home}/plain", "train_data_dir": "{home}/bare", "label_column": None}, "neither captions nor classes to count prompts by: give --num_prompts"),
        ({"pipelines": None}, "Nothing to sweep: give --pipelines, --teacher or both"),
        ({"pipelines": "{home}/cut"}, "safetensors cannot be read"),
        ({"num_inference_steps": 51}, "lora cannot be sampled in 51 steps"),
        ({"output_dir": "{home}/data/rows.parquet/out"}, "cannot be written"),
        ({"lora_scales": "nan"}, "--lora_scales must be"),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_sentence(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict, message: str
) -> None:
    """Before anything is drawn."""
    monkeypatch.setattr(sweep, "draw", None)
    given = {name: value.format(home=home) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(SystemExit, match=f"error: .*{message}") as error:
        fronts(home, tmp_path, **given)
    assert "\n" not in str(error.value)
