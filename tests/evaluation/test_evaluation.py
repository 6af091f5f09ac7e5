"""Metrics against closed forms; sampling and tables on the tiny pipeline."""

import functools
import importlib.util
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    UNet2DModel,
)
from peft import LoraConfig
from PIL import Image, ImageFont
from tiny import FASHION_LABELS, tiny_clip, tiny_pipeline

from cm_diffusers import ConsistencyImagesPipeline, EDMConsistencyScheduler
from cm_diffusers.evaluation import compared, metrics
from cm_diffusers.evaluation.features import extract_features, load_extractor
from cm_diffusers.evaluation.grids import image_grid, wrapped
from cm_diffusers.evaluation.reference import ReferenceConfig, in_turns, load_reference, load_references
from cm_diffusers.evaluation.report import Setting, markdown_table, plot, row_names
from cm_diffusers.evaluation.sampling import generate, generate_unprompted, load_pipeline
from cm_diffusers.measured import distance_name, read_measured, weights_digest
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.objectives.classification import ClassificationConfig, ClassificationObjective
from cm_diffusers.publishing import pipelines as publish
from cm_diffusers.record import RECORD
from cm_diffusers.types import Batch, Networks, Progress


ROOT = Path(__file__).parents[2]


def with_moments(count: int, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Samples whose empirical mean and unbiased covariance are exactly those given."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_is_that_of_gaussians() -> None:
    zero, identity = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    variances = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    a = with_moments(50, zero, identity)
    b = with_moments(80, zero + 2, torch.diag(variances))
    expected = 3 * 2**2 + (variances.sqrt() - 1).square().sum().item()  # 12 + 0 + 1 + 4
    assert expected == 17
    assert metrics.frechet_distance(a, b) == pytest.approx(17, abs=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_unbiased_and_leaves_the_generator_alone() -> None:
    same = [metrics.kernel_distance(torch.randn(60, 8), torch.randn(60, 8), 4)[0] for _ in range(30)]
    spread = torch.tensor(same).std().item()
    assert abs(sum(same) / 30) < 3 * spread / 30**0.5
    assert min(same) < 0 < max(same)
    assert metrics.kernel_distance(torch.randn(60, 8), torch.randn(60, 8) + 1, 4)[0] > 5 * spread
    state = torch.get_rng_state()
    metrics.kernel_distance(torch.ones(9, 2), torch.zeros(9, 2), 2)
    assert torch.equal(state, torch.get_rng_state())


def test_kernel_distance_has_the_cubic_kernel_of_its_paper() -> None:
    """k(x, y) = (x y / d + 1)^3 (1801.01401, Eq. 3); where all features of a kind are alike, k(r, r) + k(f, f) - 2 k(r, f)."""
    real, fake = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = (14.25 / 4 + 1) ** 3 + (6 / 4 + 1) ** 3 - 2 * (-4 / 4 + 1) ** 3
    found, _ = metrics.kernel_distance(real.expand(20, 4), fake.expand(30, 4), 3)
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_ceiling_of_coverage_by_hand() -> None:
    """No fake image is among the 2 nearest of 5 other real and 3 fake ones: 5/8 times 4/7."""
    assert metrics.coverage_ceiling(6, 3, 2) == pytest.approx(1 - 5 / 8 * 4 / 7, rel=1e-12)
    assert metrics.coverage_ceiling(3, 6, 1) == pytest.approx(1 - 2 / 8, rel=1e-12)


def test_kernel_distance_leaves_the_generators_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "mps", "xpu"):
        module = getattr(torch, name)
        for function in ("manual_seed", "manual_seed_all"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, lambda seed: pytest.fail("re-seeded"))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("re-seeds all"))
    metrics.kernel_distance(torch.ones(9, 2), torch.zeros(9, 2), 2)


@pytest.mark.parametrize("size", [10, 1000])
def test_subsets_of_the_kernel_distance_differ(size: int) -> None:
    """Of a set as large as a subset the standard deviation was 1e-16."""
    real, fake = torch.randn(2, 40, 8)
    mean, std = metrics.kernel_distance(real, fake, 50, size)
    assert std > 0.01 * abs(mean)
    whole = metrics.kernel_distance(real.repeat(2, 1), fake.repeat(2, 1), 1, 40)[1]
    assert whole == 0  # of one subset


@pytest.mark.parametrize(("k", "limit"), [(3, 0.875), (5, 0.969), (10, 0.999)])
def test_coverage_of_real_by_real_has_its_ceiling(k: int, limit: float) -> None:
    assert metrics.coverage_ceiling(10**6, 10**6, k) == pytest.approx(limit, abs=5e-4)
    found = [metrics.neighbour_metrics(torch.randn(150, 4), torch.randn(150, 4), k)["coverage"] for _ in range(100)]
    assert sum(found) / 100 == pytest.approx(metrics.coverage_ceiling(150, 150, k), abs=0.012)


def test_density_of_real_by_real_is_one_and_far_samples_score_nothing() -> None:
    real = torch.randn(1500, 2)  # more than one chunk
    found = metrics.neighbour_metrics(real, torch.randn(1500, 2))
    assert found["density"] == pytest.approx(1, abs=0.06)
    assert min(found["precision"], found["recall"]) > 0.9
    assert set(metrics.neighbour_metrics(real, torch.randn(20, 2) + 1000).values()) == {0}


def test_neighbour_metrics_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [10.0]])  # nearest neighbours at 1, 1 and 9
    fake = torch.tensor([[0.5], [50.0]])  # each 49.5 from the other
    found = metrics.neighbour_metrics(real, fake, k=1)
    # 0.5 lies in the balls of 0 and 1, not in that of 10 (9.5 > 9); 50 in none; the ball of 0.5 holds all real points
    assert found == {"precision": 0.5, "recall": 1.0, "density": 1.0, "coverage": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="need more than 5 images, got 3 and 2"):
        metrics.neighbour_metrics(real, fake)


def test_vendi_counts_distinct_samples() -> None:
    assert metrics.vendi_score(torch.ones(7, 5)) == pytest.approx(1, abs=1e-6)
    assert metrics.vendi_score(3 * torch.eye(6)) == pytest.approx(6)
    assert metrics.vendi_score(torch.eye(2).repeat(5, 1)) == pytest.approx(2)
    features = torch.cat([torch.eye(2), torch.ones(2, 2), torch.ones(1, 2)])
    assert metrics.prompt_vendi_score(features, ["a", "a", "b", "b", "c"], 2) == pytest.approx(1.5)
    assert metrics.prompt_vendi_score(features[[0, 1, 2, 3, 0]], ["a"] * 5, 2) == pytest.approx(1.5)  # two groups
    assert metrics.prompt_vendi_score(features, list("vwxyz"), 2) is None


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("an elephant", "elephant"), ("an ant", "ant"), ("Ants", None), ("the ant's leg", "ant"), ("(ant)", "ant"),
        ("a giant", None), ("an ant on an elephant", "elephant"), ("a bathtub", None), ("a tub, a bath", "bath"),
        ("a Golden  Retriever", "golden_retriever"), ("a retriever", None), ("a hot dog", "hot dog"), ("", None),
        ("a dog-like thing", None), ("an élan", "élan"), ("African elephant", "African elephant"), ("a plan", None),
    ],
)  # fmt: skip
def test_labels_are_whole_words(prompt: str, found: str | None) -> None:
    labels = ["ant", "elephant", "African elephant", "bath", "golden_retriever", "hot dog", "élan", "", " "]
    place = metrics.label_in_prompt(prompt, labels)
    assert found == (None if place is None else labels[place])


def test_features_that_are_not_finite_are_refused() -> None:
    images = torch.rand(5, 3, 8, 8)
    images[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="Features of 1 of 5 images are not finite"):
        extract_features(ImageClassifier(["a", "b"], (4, 8), 8, 6).eval(), images)


def test_prompts_name_their_longest_label() -> None:
    labels = ["shirt", "t-shirt", "ankle boot"]
    prompts = ["a photo of a T-shirt", "a shirt", "an ankle boot", "a hat"]
    assert [metrics.label_in_prompt(prompt, labels) for prompt in prompts] == [1, 0, 2, None]
    assert metrics.label_in_prompt("a T-shirt", ["shirt", "coat"]) is None  # a word of its own
    logits = torch.eye(3)[[1, 2, 2, 0]]
    assert metrics.prompt_agreement(logits, [1, 0, 2, None]) == pytest.approx(2 / 3)
    assert metrics.prompt_agreement(logits, [None] * 4) is None


def test_clip_score_is_the_cosine_of_the_towers(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images, prompts = (torch.rand(3, 3, 32, 32) * 255).round() / 255, ["a bag", "a photo of a coat", "a dress"]
    score = metrics.clip_scores(metrics.load_clip(str(tmp_path)), images, prompts).mean().item()
    mean, std = torch.tensor(processor.image_processor.image_mean), torch.tensor(processor.image_processor.image_std)
    pixels = (images - mean[:, None, None]) / std[:, None, None]
    tokens = processor.tokenizer(prompts, padding=True, return_tensors="pt")
    cosines = model(pixel_values=pixels, **tokens).logits_per_image.diagonal() / model.logit_scale.exp()
    assert score == pytest.approx(100 * cosines.mean().item(), abs=1e-3)
    assert cosines.std() > 1e-3


def test_classifier_round_trip_and_sizes(tmp_path: Path) -> None:
    model = ImageClassifier(labels=["a", "b"], channels=(4, 8), image_size=8, num_features=6).eval()
    images = torch.rand(3, 3, 8, 8)
    model.save_pretrained(tmp_path)
    again = load_extractor(str(tmp_path))
    assert again.labels == ["a", "b"]
    assert torch.equal(again(images), model(images))
    assert model.features(images).shape == (3, again.num_features) == (3, 6)
    large = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    constant = torch.full((1, 3, 5, 9), 0.25)
    assert model(large).shape == (3, 2)
    torch.testing.assert_close(model(constant), model(torch.full((1, 3, 8, 8), 0.25)))
    with pytest.raises(ValueError, match="need a multiple of 4"):
        ImageClassifier(labels=["a"], channels=(4, 8), image_size=6)


class Constant(torch.nn.Module):
    """Logits that say class 0 with probability 3/4, of two."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.min() == 0  # pixels -1 arrive as 0
        return torch.tensor([3.0, 1.0]).log().expand(len(images), 2)


def test_classification_loss_by_hand() -> None:
    batch = Batch(-torch.ones(4, 3, 2, 2), {"class_labels": torch.tensor([0, 0, 0, 1])})
    objective = ClassificationObjective(ClassificationConfig(label_smoothing=0.0))
    loss = objective(Networks(Constant()), batch, Progress(0, 1))
    probabilities = torch.tensor([0.75, 0.75, 0.75, 0.25])
    torch.testing.assert_close(loss.value, -probabilities.log().mean())
    assert loss.logs["accuracy"] == 0.75
    smooth = ClassificationObjective(ClassificationConfig(label_smoothing=1.0))
    flat = smooth(Networks(Constant()), batch, Progress(0, 1))
    torch.testing.assert_close(flat.value, -probabilities[-2:].log().mean())
    some = ClassificationObjective(ClassificationConfig(label_smoothing=0.2))(
        Networks(Constant()), batch, Progress(0, 1)
    )
    torch.testing.assert_close(some.value, 0.8 * loss.value + 0.2 * flat.value)  # 1512.00567, Eq. 5 and 6


def test_images_do_not_depend_on_the_batch() -> None:
    pipe = tiny_pipeline()
    prompts = [f"a photo of a {label}" for label in FASHION_LABELS[:5]]
    alone, seconds = generate(pipe, prompts, range(5), 3, 4.0, 1)
    together, _ = generate(pipe, prompts, range(5), 3, 4.0, 4)
    assert (alone - together).abs().max() <= 1 / 255 + 1e-6  # what rounding may do
    assert (alone == together).float().mean() > 0.99
    assert seconds > 0
    assert alone.shape == (5, 3, 32, 32)
    assert torch.equal((alone * 255).round() / 255, alone)
    other, _ = generate(pipe, prompts[:1], [9], 3, 4.0, 1)
    assert not torch.equal(other[0], alone[0])


def save_tiny_lora(folder: Path, base: Path) -> None:
    """An adapter that changes the output, in the form the package publishes."""
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
    )
    scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=20, timestep_scaling=7.0)
    record = publish.lcm_record(str(base), "distilled", 3.0, 3.0, 1.5, scheduler)
    publish.save_lora(pipe.unet, folder, record)


def test_a_lora_folder_is_its_base_model_with_adapter_and_scheduler(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    save_tiny_lora(tmp_path / "lora", tmp_path / "base")
    pipe = load_pipeline(str(tmp_path / "lora"))
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert (pipe.scheduler.config.original_inference_steps, pipe.scheduler.config.timestep_scaling) == (20, 7.0)
    assert pipe.scheduler.config.beta_end == 0.012
    x, t, states = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 32)
    plain = tiny_pipeline().unet(x, t, states).sample
    assert (pipe.unet(x, t, states).sample - plain).abs().max() > 1e-3
    (tmp_path / "lora" / RECORD).unlink()
    with pytest.raises(ValueError, match="does not name its base model"):
        load_pipeline(str(tmp_path / "lora"))


def test_reference_takes_classes_in_turn(tmp_path: Path) -> None:
    assert in_turns([1, 1, 0, 2, 0, 1]) == [2, 0, 3, 4, 1, 5]
    assert in_turns([None, None, None]) == [0, 1, 2]
    write_reference(tmp_path, [2, 2, 0, 6])
    config = ReferenceConfig(train_data_dir=str(tmp_path), label_column="label", resolution=32)
    reference = load_reference(config, 3)
    assert reference.prompts == ["a t-shirt", "a pullover", "a shirt"]
    assert reference.labels == [0, 2, 6]
    torch.testing.assert_close(reference.images.mean((1, 2, 3)), torch.tensor([2.0, 0.0, 3.0]) * 20 / 255)
    assert reference.class_names == list(FASHION_LABELS)
    with pytest.raises(ValueError, match="num_images is 5 but the reference set holds 4"):
        load_reference(config, 5)


def test_references_are_disjoint(tmp_path: Path) -> None:
    write_reference(tmp_path, [2, 2, 0, 6, 0])
    config = ReferenceConfig(train_data_dir=str(tmp_path), label_column="label", resolution=32)
    one, two = load_references(config, 2, 3)
    assert (one.prompts, two.prompts) == (["a t-shirt", "a pullover"], ["a shirt", "a t-shirt"])
    assert two.labels == [6, 0]
    torch.testing.assert_close(two.images.mean((1, 2, 3)), torch.tensor([3.0, 4.0]) * 20 / 255)
    assert len(load_references(config, 2, 1)) == len(load_references(config, 3, 2)) == 1


def write_reference(folder: Path, labels: list[int]) -> None:
    """Grey images, 20 levels brighter from row to row."""
    rows = {"image": [], "text": [[f"a {FASHION_LABELS[label]}", "other"] for label in labels], "label": labels}
    for level in range(len(labels)):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (20 * level,) * 3).save(buffer, format="PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": f"{level}.png"})
    columns = {
        "image": datasets.Image(),
        "text": datasets.List(datasets.Value("string")),
        "label": datasets.ClassLabel(names=list(FASHION_LABELS)),
    }
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).to_parquet(folder / "rows.parquet")


def test_grid_holds_its_images_and_labels() -> None:
    grid = image_grid([torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)], ["black", "white"], ["a long label", "b"])
    found = torch.tensor(list(grid.get_flattened_data())).reshape(grid.height, grid.width, 3)
    assert (found[-104 - 96 : -104, -100:-4] == 0).all()  # second column of the first row
    assert (found[-96:-4] == 255).all(-1).float().mean() > 0.9
    assert (found[:20] < 128).any()  # a column label
    assert (found[:, :30] < 128).any()  # a row label


def test_rows_are_named_after_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("runs/a/pipeline", "runs/b/lora", "runs/c/student", "runs/d"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    sources = ["runs/a/pipeline", str(tmp_path / "runs/b/lora"), "runs/c/student/", "runs/d", "ada/lora", "ada/x"]
    assert row_names(sources, None) == ["a", "b", "c", "d", "lora", "x"]
    assert row_names(sources, list("uvwxyz")) == list("uvwxyz")
    monkeypatch.chdir("runs/a/pipeline")
    assert row_names(["."], None) == ["a"]
    with pytest.raises(ValueError, match="Two rows would be called a: give each pipeline a name of its own"):
        row_names([".", "../pipeline"], None)


def test_table_drops_empty_columns_and_names_its_setting() -> None:
    setting = Setting(8, 3, "net", "data", "a machine", "float32", 4, 0.9693)
    rows = [{"pipeline": "x", "num_inference_steps": 2, "fid": 1.234, "clip_score": None, "agreement": 0.5}]
    rows.append(rows[0] | {"agreement": None})
    lines = markdown_table(rows, setting).splitlines()
    assert lines[0] == "| pipeline | NFE | FD-net to data | agreement |"
    assert lines[2:4] == ["| x | 2 | 1.23 | 0.500 |", "| x | 2 | 1.23 | – |"]
    assert lines[5].startswith("**Only 8 images were measured: Fréchet distances of fewer than 1,000 are too large")
    assert "8 images, seed 3, extractor net" in lines[7]
    assert "0.969" in lines[7]
    assert "**" not in markdown_table(rows, replace(setting, num_images=1000))
    rows = [row | {"guidance_scale": None} for row in rows]
    assert "too few" in plot(rows, setting).get_suptitle()
    assert plot(rows, replace(setting, num_images=1000)).get_suptitle() == ""


@pytest.mark.parametrize(
    ("shape", "cell"), [((32, 32), (96, 96)), ((1024, 1024), (320, 320)), ((512, 1024), (320, 160)), ((200, 200),) * 2]
)
def test_cells_of_grids_are_bounded(shape: tuple[int, int], cell: tuple[int, int]) -> None:
    height, width = shape
    prompts = ["an astronaut rides a horse through a field of sunflowers at dusk, " * 9, "pneumono" * 40, *"abcdef"]
    images = torch.zeros(1, 3, height, width).expand(8, -1, -1, -1)
    grid, more = (image_grid([images[:count]] * 2, ["teacher, 50", "1"], prompts[:count]) for count in (2, 3))
    assert (more.width - grid.width, more.height - grid.height) == (cell[0] + 4, 0)
    assert grid.height == pytest.approx(2 * (cell[1] + 4), abs=100)


def test_labels_are_cut_where_they_do_not_fit() -> None:
    font = ImageFont.load_default(size=13)
    lines = wrapped("an astronaut rides a horse through a field of sunflowers", 90, font)
    assert lines[0] == "an astronaut"
    assert lines[-1].endswith("…")
    assert len(lines) == 3
    assert all(font.getlength(line) <= 90 for line in [*lines, *wrapped("w" * 50, 90, font)])
    assert "".join(wrapped("w" * 12, 90, font)) == "w" * 12
    assert wrapped("a bag", 90, font) == ["a bag"]
    assert wrapped("", 90, font) == [""]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("inception", "FID"),
        ("assets/fashion_classifier", "FD-fashion"),
        ("runs/birds/classifier", "FD-birds"),
        ("runs/birds_classifier/classifier", "FD-birds"),
        ("assets/classifier", "FD-classifier"),  # of no run
        ("classifier", "FD-classifier"),
    ],
)
def test_distances_are_named_after_the_classifier(folder: str, name: str) -> None:
    assert distance_name(folder) == name


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny_pipeline().save_pretrained(folder / "teacher")
    save_tiny_lora(folder / "lora", folder / "teacher")
    ImageClassifier(labels=list(FASHION_LABELS), channels=(4, 8), num_features=6).save_pretrained(folder / "net")
    (folder / "data").mkdir()
    write_reference(folder / "data", list(range(10)))
    for name in ("empty", "cut"):
        shutil.copytree(folder / "teacher", folder / name)
    (folder / "empty" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    weights = folder / "cut" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def evaluate(folder: Path, monkeypatch: pytest.MonkeyPatch, **flags: str) -> None:
    """Runs training/evaluate.py; flags replace the defaults below."""
    defaults = {
        "pipelines": f"{folder / 'lora'}",
        "train_data_dir": f"{folder / 'data'}",
        "feature_extractor": f"{folder / 'net'}",
        "label_column": "label",
        "num_images": "8",
        "resolution": "32",
        "eval_batch_size": "8",
        "output_dir": f"{folder / 'out'}",
    }
    chosen = {name: value.split() for name, value in {**defaults, **flags}.items()}
    pairs = [[f"--{name}", *words] for name, words in chosen.items() if words]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(word for pair in pairs for word in pair)])
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "training" / "evaluate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main()


def test_evaluate_end_to_end(parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    flags = {"num_inference_steps": "1 2", "reference_steps": "3", "guidance_scales": "2.0 4.0"}
    both = f"{parts / 'lora'} {parts / 'teacher'}"
    evaluate(parts, monkeypatch, teacher=f"{parts / 'teacher'}", pipelines=both, names="student again", **flags)
    table = (parts / "out" / "table.md").read_text("utf-8")
    assert capsys.readouterr().out == table + "\n"
    found = json.loads((parts / "out" / "table.json").read_text("utf-8"))
    rows = {(r["pipeline"], r["num_inference_steps"], r["guidance_scale"]): r for r in found["rows"]}
    teacher = [("teacher", n, g) for g in (2.0, 4.0) for n in (3, 1, 2)]
    student = [("student", n, 1.5) for n in (1, 2)]  # its own guidance, not the flag
    again = [("again", n, g) for g in (2.0, 4.0) for n in (1, 2)]
    assert list(rows) == teacher + student + again
    for steps in (1, 2):
        for key in ("fid", "fid_teacher", "kid", "agreement", "coverage"):
            assert rows["again", steps, 4.0][key] == rows["teacher", steps, 4.0][key]
    assert rows["teacher", 3, 2.0]["fid_teacher"] is None
    assert rows["teacher", 1, 2.0]["fid_teacher"] > 0
    assert rows["student", 1, 1.5]["fid"] != rows["student", 2, 1.5]["fid"]
    assert rows["student", 1, 1.5]["images_per_second"] * rows["student", 1, 1.5]["ms_per_image"] == pytest.approx(
        1000
    )
    assert found["setting"]["num_images"] == 8
    assert "8 images, seed 0" in table
    with Image.open(parts / "out" / "grid.png") as grid, Image.open(parts / "out" / "plot.png") as plot:
        assert grid.height > 13 * 96
        assert plot.size == (900, 600)
    assert sorted(p.name for p in (parts / "out").iterdir()) == ["grid.png", "plot.png", "table.json", "table.md"]
    assert found["weights"] == {"student": weights_digest(parts / "lora"), "again": weights_digest(parts / "teacher")}
    assert (found["setting"]["extractor"], found["setting"]["reference"]) == ("net", "data")
    for written in ("table.md", "table.json"):
        assert str(parts) not in (parts / "out" / written).read_text("utf-8")


def test_real_images_are_measured_where_there_are_enough(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (parts / "more").mkdir()
    write_reference(parts / "more", list(range(10)) + list(range(6)))
    evaluate(
        parts, monkeypatch, train_data_dir=f"{parts / 'more'}", num_inference_steps="1", output_dir=f"{parts / 'r'}"
    )
    real, student = json.loads((parts / "r" / "table.json").read_text("utf-8"))["rows"]
    assert (real["pipeline"], real["num_inference_steps"], real["guidance_scale"]) == ("other real images", None, None)
    extractor = load_extractor(str(parts / "net"), torch.device("cpu"))
    config = ReferenceConfig(train_data_dir=str(parts / "more"), label_column="label", resolution=32)
    images = load_reference(config).images
    reference, other = (extract_features(extractor, images[part]) for part in (slice(0, 8), slice(8, 16)))
    assert real["fid"] == pytest.approx(metrics.frechet_distance(reference, other))
    assert {"recall", "coverage", "agreement"} <= {key for key, value in real.items() if value is not None}
    assert student["fid"] != real["fid"]
    first = (parts / "r" / "table.md").read_text("utf-8").splitlines()[2]
    assert first.startswith("| other real images | – | – | ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pipelines": "{parts}/data"}, "is no pipeline folder: it has neither model_index.json nor"),
        ({"pipelines": "nobody/nothing"}, "neither a pipeline folder here nor a Hub id in reach"),
        ({"num_images": "11"}, "--num_images is 11 but the reference set holds 10 rows"),
        ({"num_images": "5"}, "the metrics need more than 5"),
        ({"feature_extractor": "resnet"}, "Unknown feature extractor 'resnet'"),
        ({"names": "a b"}, "2 names for 1 pipelines"),
        ({"names": "teacher"}, "'teacher' is what a baseline's rows are called: give another name by --names"),
        (
            {"pipelines": "a/x b/x", "feature_extractor": "none"},
            "Two rows would be called x: give each pipeline a name",
        ),
        ({"pipelines": ""}, "Nothing to evaluate"),
        ({"clip_model": "nobody/nothing"}, "CLIP model 'nobody/nothing' could not be loaded"),
        ({"pipelines": "{parts}/lora nobody/nothing"}, "nothing' is neither a pipeline folder here nor a Hub id"),
        ({"pipelines": "{parts}/lora {parts}/empty"}, "has no weights for unet"),
        ({"pipelines": "{parts}/lora {parts}/cut"}, "safetensors cannot be read .*; get or make it anew"),
        ({"num_inference_steps": "1 51"}, "lora cannot be sampled in 51 steps"),
        ({"num_inference_steps": "0"}, "--num_inference_steps must be at least 1, but it is 0"),
        ({"teacher": "{parts}/nowhere"}, "neither a pipeline folder here nor a Hub id in reach"),
        ({"train_data_dir": "{parts}/nowhere"}, "nowhere"),
        ({"output_dir": "{parts}/data/rows.parquet/out"}, "cannot be written, for .* is a file: give another folder"),
    ],
)
def test_wrong_input_gets_one_sentence(
    parts: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, str], message: str
) -> None:
    """Before anything is drawn."""
    monkeypatch.setattr(compared, "generate", None)
    with pytest.raises(ValueError, match=message) as error:
        evaluate(parts, monkeypatch, **{name: value.format(parts=parts) for name, value in flags.items()})
    assert "\n" not in str(error.value)


def test_images_are_as_large_as_the_student_s_training(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = shutil.copytree(parts / "lora", parts / "wide")
    content = json.loads((student / RECORD).read_text("utf-8"))
    (student / RECORD).write_text(json.dumps(content | {"resolution": 48}), "utf-8")
    flags = {"pipelines": f"{student} {parts / 'teacher'}", "names": "wide narrow"}
    flags |= {"num_inference_steps": "1", "guidance_scales": "2"}
    evaluate(parts, monkeypatch, **flags, resolution="", output_dir=f"{parts / 'sizes'}")
    table = (parts / "sizes" / "table.md").read_text("utf-8")
    assert [line.split(" | ")[-1] for line in table.splitlines()[2:4]] == ["48 |", "32 |"]
    assert "Rows have images of different sizes (px)" in table
    evaluate(parts, monkeypatch, **flags, resolution="32", output_dir=f"{parts / 'sizes'}")
    assert "different sizes" not in (parts / "sizes" / "table.md").read_text("utf-8")
    rows = json.loads((parts / "sizes" / "table.json").read_text("utf-8"))["rows"]
    assert [row["resolution"] for row in rows] == [32, 32]


def test_rows_of_an_evaluation_that_fails_are_kept(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(pipe, prompts, seeds, steps, *rest):
        if steps == 2:
            raise MemoryError
        return generate(pipe, prompts, seeds, steps, *rest)

    monkeypatch.setattr(compared, "generate", fails)
    with pytest.raises(MemoryError):
        evaluate(parts, monkeypatch, num_inference_steps="1 2", output_dir=f"{parts / 'failed'}")
    assert [path.name for path in (parts / "failed").iterdir()] == ["partial"]
    (row,) = read_measured(parts / "failed" / "partial").rows
    assert row["num_inference_steps"] == 1
    monkeypatch.undo()
    evaluate(parts, monkeypatch, num_inference_steps="1", output_dir=f"{parts / 'failed'}")
    assert not (parts / "failed" / "partial").exists()


def test_labels_of_another_classifier_are_refused(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ImageClassifier(labels=["cat", "dog"], channels=(4, 8), num_features=6).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="are not those of --label_column"):
        evaluate(parts, monkeypatch, feature_extractor=str(tmp_path))


def test_inception_without_its_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(ValueError, match=r'pip install "cm_diffusers\[metrics\]"'):
        load_extractor("inception")


# ---- without prompts


def image_unet(**config) -> UNet2DModel:
    """Of 16x16 images."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(sample_size=16, layers_per_block=1, norm_num_groups=4, **blocks, **config).eval()


def image_pipelines() -> dict[str, DiffusionPipeline]:
    return {
        "plain": ConsistencyImagesPipeline(image_unet(), EDMConsistencyScheduler(recommended_sigmas=[80.0, 0.5])),
        "classes": ConsistencyModelPipeline(image_unet(num_class_embeds=10), CMStochasticIterativeScheduler()),
        "diffusion": DDIMPipeline(image_unet(), DDIMScheduler()),
    }


@pytest.fixture(scope="module")
def image_folders(parts: Path) -> Path:
    """Beside the parts: three pipelines, and real images without captions, with classes and, in `bare`, without."""
    for name, pipe in image_pipelines().items():
        pipe.save_pretrained(parts / name)
    images = datasets.Dataset.from_parquet(str(parts / "data" / "rows.parquet"))
    for name, dropped in {"captionless": ["text"], "bare": ["text", "label"]}.items():
        (parts / name).mkdir()
        datasets.concatenate_datasets([images.remove_columns(dropped)] * 2).to_parquet(parts / name / "rows.parquet")
    return parts


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("name", ["plain", "classes", "diffusion"])
def test_unprompted_images_do_not_depend_on_the_batch(name: str) -> None:
    pipe = image_pipelines()[name]
    pipe.set_progress_bar_config(disable=True)
    labels = [3, 1, 4, 1, 5] if name == "classes" else None
    alone, _ = generate_unprompted(pipe, range(5), 3, 1, labels)
    together, seconds = generate_unprompted(pipe, range(5), 3, 4, labels)
    assert (alone - together).abs().max() <= 1 / 255 + 1e-6  # what rounding may do
    assert alone.shape == (5, 3, 16, 16)
    assert seconds > 0
    last, _ = generate_unprompted(pipe, [4], 3, 1, labels and [5])
    assert torch.equal(last[0], alone[4])
    assert not torch.equal(alone[3], alone[4])


@pytest.mark.parametrize(
    ("steps", "asked"),
    [(1, {"sigmas": [80.0]}), (2, {"sigmas": [80.0, 0.5]}), (4, {"num_inference_steps": 4})],
)
def test_recommended_noise_levels_are_taken_where_they_are_so_many(steps: int, asked: dict) -> None:
    pipe = image_pipelines()["plain"]
    pipe.set_progress_bar_config(disable=True)
    found, _ = generate_unprompted(pipe, [7, 8], steps, 2)
    expected = pipe(generator=seeded(7, 8), output_type="pt", **asked).images
    assert torch.equal(found, (expected * 255).round() / 255)
    others = pipe(generator=seeded(7, 8), output_type="pt", num_inference_steps=2).images
    assert (found - others).abs().max() > 0.05


def test_grey_images_get_three_channels() -> None:
    unet = image_unet(in_channels=1, out_channels=1)
    pipe = ConsistencyImagesPipeline(unet, EDMConsistencyScheduler())
    pipe.set_progress_bar_config(disable=True)
    found, _ = generate_unprompted(pipe, range(3), 1, 2)
    assert found.shape == (3, 3, 16, 16)
    assert torch.equal(found[:, 0], found[:, 2])


def test_published_consistency_models_are_loaded_as_ours(image_folders: Path) -> None:
    for name, steps in {"plain": [80.0, 0.5], "classes": None}.items():
        pipe = load_pipeline(str(image_folders / name))
        assert type(pipe) is ConsistencyImagesPipeline
        assert isinstance(pipe.scheduler, EDMConsistencyScheduler)
        assert pipe.scheduler.config.recommended_sigmas == steps
    assert type(load_pipeline(str(image_folders / "diffusion"))) is DDIMPipeline


def rows_of(folder: Path) -> dict[tuple, dict]:
    rows = json.loads((folder / "table.json").read_text("utf-8"))["rows"]
    return {(row["pipeline"], row["num_inference_steps"]): row for row in rows}


def test_evaluate_without_prompts(image_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = image_folders / "unprompted"
    flags = {"train_data_dir": f"{image_folders / 'captionless'}", "num_images": "10", "output_dir": f"{out}"}
    flags |= {"teacher": f"{image_folders / 'diffusion'}", "num_inference_steps": "1 2", "reference_steps": "3"}
    evaluate(image_folders, monkeypatch, pipelines=f"{image_folders / 'plain'} {image_folders / 'classes'}", **flags)
    rows = rows_of(out)
    teacher = [("teacher", n) for n in (3, 1, 2)]
    students = [(name, n) for name in ("plain", "classes") for n in (1, 2)]
    assert list(rows) == [("other real images", None), *teacher, *students]
    assert {row["guidance_scale"] for row in rows.values()} == {None}
    for key in [*teacher, *students[:2]]:
        assert (rows[key]["vendi"], rows[key]["agreement"], rows[key]["clip_score"]) == (None, None, None)
        assert rows[key]["fid"] > 0
    assert rows["plain", 1]["fid_teacher"] > 0
    assert rows["teacher", 3]["fid_teacher"] is None

    extractor = load_extractor(str(image_folders / "net"))
    drawn, _ = generate_unprompted(load_pipeline(str(image_folders / "classes")), range(10), 2, 8, list(range(10)))
    features = extract_features(extractor, drawn)
    data = ReferenceConfig(train_data_dir=str(image_folders / "captionless"), label_column="label", resolution=32)
    real = extract_features(extractor, load_reference(data, 10).images)
    row = rows["classes", 2]
    assert row["fid"] == pytest.approx(metrics.frechet_distance(real, features))
    agreed = (extractor.head(features).argmax(1) == torch.arange(10)).float().mean().item()
    assert row["agreement"] == pytest.approx(agreed)
    table = (out / "table.md").read_text("utf-8").splitlines()
    assert "guidance" not in table[0]
    assert table[4].startswith("| teacher | 1 | ")
    assert " | – | " in table[4]


def test_classes_are_those_of_the_real_images(image_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ConsistencyImagesPipeline, "__call__", spy(ConsistencyImagesPipeline.__call__, asked))
    folder, out = image_folders / "repeated", image_folders / "few"
    folder.mkdir()
    write_reference(folder, [2, 2, 0, 6, 0, 6, 2])
    flags = {"train_data_dir": f"{folder}", "num_images": "7", "num_inference_steps": "1", "output_dir": f"{out}"}
    evaluate(image_folders, monkeypatch, pipelines=f"{image_folders / 'classes'}", **flags)
    assert [call["class_labels"] for call in asked[1:]] == [[0, 2, 6, 0, 2, 6, 2]]  # each in turn; the first warms up


def spy(call, asked: list[dict]):
    @functools.wraps(call)
    def wrapped(self, **arguments):
        asked.append(arguments)
        return call(self, **arguments)

    return wrapped


def test_variety_is_measured_within_a_class(image_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = image_folders / "two", image_folders / "variety"
    folder.mkdir()
    write_reference(folder, [3] * 10 + [8] * 10)
    flags = {"num_images": "20", "num_inference_steps": "1", "output_dir": f"{out}", "train_data_dir": f"{folder}"}
    evaluate(image_folders, monkeypatch, pipelines=f"{image_folders / 'classes'}", **flags)
    drawn, _ = generate_unprompted(load_pipeline(str(image_folders / "classes")), range(20), 1, 8, [3, 8] * 10)
    features = extract_features(load_extractor(str(image_folders / "net")), drawn)
    expected = (metrics.vendi_score(features[::2]) + metrics.vendi_score(features[1::2])) / 2
    assert rows_of(out)["classes", 1]["vendi"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pipelines": "{parts}/classes", "label_column": ""}, "classes draws classes, but the reference names none"),
        (
            {"pipelines": "{parts}/teacher", "names": "it"},
            "The data has no column named text: choose from the columns found: image",
        ),
        (
            {"train_data_dir": "{parts}/bare"},
            "The data has no column named label: choose from the columns found: image",
        ),
    ],
)
def test_a_reference_that_lacks_what_is_asked_gets_one_sentence(
    image_folders: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, str], message: str
) -> None:
    flags = {"train_data_dir": "{parts}/captionless", "num_inference_steps": "1", **flags}
    with pytest.raises(ValueError, match=message) as error:
        evaluate(
            image_folders, monkeypatch, **{name: value.format(parts=image_folders) for name, value in flags.items()}
        )
    assert "\n" not in str(error.value)


def test_neither_captions_nor_classes(image_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = image_folders / "nothing"
    flags = {"train_data_dir": f"{image_folders / 'bare'}", "label_column": "", "output_dir": f"{out}"}
    evaluate(image_folders, monkeypatch, pipelines=f"{image_folders / 'plain'}", num_inference_steps="1", **flags)
    rows = rows_of(out)
    assert list(rows) == [("other real images", None), ("plain", 1)]
    assert {(row["vendi"], row["agreement"]) for row in rows.values()} == {(None, None)}
