"""Fronts, hypervolumes and intervals against brute force and closed forms; what is kept, and how it is known again."""

import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler
from matplotlib.axes import Axes
from tiny import tiny_pipeline

from cm_diffusers.data.sources import DataConfig
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation import metrics
from cm_diffusers.evaluation.front_columns import (
    COLUMNS,
    RealImages,
    by_prompt,
    chosen,
    known_columns,
    parse_axes,
    parse_point,
    variety,
    within,
)
from cm_diffusers.evaluation.front_plot import colours, plot
from cm_diffusers.evaluation.front_report import Front, Report
from cm_diffusers.evaluation.fronts import bootstrap, hypervolume, non_dominated, worst
from cm_diffusers.evaluation.kept import Kept, pipeline_digest, tensors_digest
from cm_diffusers.evaluation.reference import Pictures, Reference, repeated
from cm_diffusers.evaluation.sampling import load_pipeline, set_lora_scale
from cm_diffusers.measured import TEACHER
from evaluation.test_evaluation import save_tiny_lora


WAYS = {2: ("min", "max"), 3: ("max", "min", "max"), 4: ("max", "max", "min", "min")}


def on_front(values: np.ndarray, better: tuple[str, ...]) -> list[bool]:
    """By the definition, a row and an axis at a time."""
    found = []
    for row in values:
        beaten = False
        for other in values:
            gains = [b - a if way == "max" else a - b for a, b, way in zip(row, other, better, strict=True)]
            beaten |= all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)
        found.append(not beaten and not np.isnan(row).any())
    return found


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_the_front_is_that_of_its_definition(axes: int) -> None:
    for seed in range(8):
        values = np.random.default_rng(seed).integers(0, 5, (30, axes)).astype(float)  # with ties
        values[np.random.default_rng(seed + 100).random((30, axes)) < 0.05] = np.nan
        found = non_dominated(values, WAYS[axes])
        assert found.tolist() == on_front(values, WAYS[axes])
        assert 0 < found.sum() < 30


def test_order_and_monotone_scales_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    values, order = rng.normal(size=(40, 3)), rng.permutation(40)
    found = non_dominated(values, WAYS[3])
    assert (non_dominated(values[order], WAYS[3]) == found[order]).all()
    scaled = np.stack([np.exp(values[:, 0]), values[:, 1] ** 3, np.arctan(values[:, 2])], axis=1)
    assert (non_dominated(scaled, WAYS[3]) == found).all()
    assert (non_dominated(-values, ("min", "max", "min")) == found).all()


def test_rows_without_a_number_shift_no_mask_and_ties_stay() -> None:
    values = np.array([[np.nan, 9], [1, 1], [2, 2], [3, np.nan], [2, 2], [0, 3]], dtype=float)
    assert non_dominated(values, ("max", "max")).tolist() == [False, False, True, False, True, True]
    assert not non_dominated(values[[0, 3]], ("max", "max")).any()
    assert non_dominated(np.zeros((0, 2)), ("max", "max")).shape == (0,)


def union_of_boxes(corners: np.ndarray) -> float:
    """By inclusion and exclusion."""
    total = 0.0
    for size in range(1, len(corners) + 1):
        for some in itertools.combinations(corners, size):
            total += (-1) ** (size + 1) * np.prod(np.min(some, axis=0))
    return total


@pytest.mark.parametrize("axes", [2, 3])
def test_hypervolume_is_that_of_the_union(axes: int) -> None:
    signs = np.array([1 if way == "max" else -1 for way in WAYS[axes]])
    for seed in range(5):
        corners = np.random.default_rng(seed).integers(1, 6, (7, axes)).astype(float)
        reference = np.arange(10.0, 10 + axes)
        found = hypervolume(reference + signs * corners, WAYS[axes], reference)
        assert found == pytest.approx(union_of_boxes(corners), rel=1e-12)


def test_hypervolume_by_hand() -> None:
    reference, ways = np.array([0.0, 10.0]), ("max", "min")
    assert hypervolume(np.array([[3.0, 6.0]]), ways, reference) == 12
    assert hypervolume(np.array([[3.0, 6.0], [1.0, 2.0]]), ways, reference) == 12 + 4
    beyond = np.array([[3.0, 6.0], [-1.0, 0.0], [5.0, 11.0], [np.nan, 1.0], [2.0, 7.0]])
    assert hypervolume(beyond, ways, reference) == 12  # none of the others beats the point and adds
    assert hypervolume(np.zeros((0, 2)), ways, reference) == 0
    assert worst(beyond, ways).tolist() == [-1, 11]
    assert np.isnan(worst(np.full((2, 2), np.nan), ways)).all()


@pytest.mark.parametrize("axes", [2, 3])
def test_a_point_more_never_lowers_the_hypervolume(axes: int) -> None:
    values, reference = np.random.default_rng(1).normal(size=(15, axes)), np.zeros(axes)
    volumes = [hypervolume(values[:count], ("max",) * axes, reference) for count in range(16)]
    assert volumes == sorted(volumes)
    assert volumes[0] == 0 < volumes[-1]
    front = values[non_dominated(values, ("max",) * axes)]
    assert hypervolume(front, ("max",) * axes, reference) == pytest.approx(volumes[-1], rel=1e-12)


def test_intervals_of_a_mean_are_those_of_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    mean = values.mean()
    (low, high) = bootstrap(lambda rows: {"x": values[rows].mean()}, {"x": mean}, 400, 2000)["x"]
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.06)
    assert (low + high) / 2 == pytest.approx(mean, abs=0.02)


def test_intervals_lie_about_the_estimate_of_a_statistic_that_repetition_lowers() -> None:
    """A resample has 63 % of the prompts: percentiles as they are would never hold the number of all."""
    (low, high) = bootstrap(lambda rows: {"x": float(len(set(rows)))}, {"x": 50.0}, 50, 300)["x"]
    assert low < 50 < high
    assert high - low < 12


def test_what_gives_no_interval() -> None:
    def never(rows: np.ndarray) -> dict[str, float]:
        raise AssertionError

    assert bootstrap(never, {"x": 1.0}, 1, 50) == bootstrap(never, {"x": 1.0}, 9, 0) == {}
    found = bootstrap(lambda rows: {"x": 1.0, "y": math.nan}, {"x": 1.0, "y": math.nan}, 9, 4)
    assert found == {"x": (1.0, 1.0)}


def test_the_gaussian_discrepancy_of_points() -> None:
    """Of two points at a distance d: 1000 (2 - 2 exp(-d^2 / 200))."""
    real, fake = torch.zeros(3, 4), torch.tensor([[3.0, 0, 4, 0]]).expand(5, 4)
    assert metrics.gaussian_discrepancy(real, fake) == pytest.approx(2000 * (1 - math.exp(-25 / 200)), rel=1e-12)
    assert metrics.gaussian_discrepancy(fake, fake) == pytest.approx(0, abs=1e-9)
    halves = torch.cat([torch.zeros(1, 4), fake[:1]])
    expected = 1000 * (1 + (2 + 2 * math.exp(-1 / 8)) / 4 - (1 + math.exp(-1 / 8)))
    assert metrics.gaussian_discrepancy(real, halves) == pytest.approx(expected, rel=1e-9)


def test_pairwise_distance_by_hand() -> None:
    assert metrics.mean_pairwise_distance(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)
    assert metrics.mean_pairwise_distance(torch.eye(4) * 7) == pytest.approx(1)
    assert metrics.mean_pairwise_distance(torch.tensor([[1.0, 0], [2, 0], [0, 1]])) == pytest.approx(2 / 3)
    assert metrics.mean_pairwise_distance(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(2)


def test_scores_of_images_and_of_prompts_are_means_of_prompts() -> None:
    found = {"score_a": torch.tensor([1.0, 0, 1, math.nan, math.nan, math.nan]), "score_b": torch.tensor([4.0, 6, 8])}
    values = by_prompt(found | {"features": torch.rand(6, 2)}, 3)
    assert values["a"][:2].tolist() == [0.5, 1.0]
    assert values["a"][2].isnan()
    assert values["b"].tolist() == [4, 6, 8]
    features = torch.tensor([[1.0, 0], [0, 1], [3, 3], [1, 1]])
    assert {name: tensor.tolist() for name, tensor in variety(features, 2).items()} == {
        "score_vendi": pytest.approx([2, 1], abs=1e-5),
        "score_pairwise_distance": pytest.approx([1, 0], abs=1e-6),
    }
    assert variety(features, 1) == {}


def test_a_resample_takes_all_images_of_its_prompts_and_their_real_ones() -> None:
    features = torch.arange(6.0)[:, None]
    assert chosen({"features": features, "score_a": features}, 3, np.array([2, 0, 2])).keys() == {"features"}
    drawn = chosen({"features": features}, 3, np.array([2, 0, 2]))["features"].flatten()
    assert drawn.tolist() == [4, 5, 0, 1, 4, 5]
    real = RealImages.of({"features": torch.arange(5.0)}, ["b", "a", "x", "b", "c"], ["a", "b", "c"])
    assert real.chosen(np.array([1, 1, 2]))["features"].tolist() == [2, 0, 3, 0, 3, 4]  # x is of no prompt, and stays
    assert sorted(real.chosen(np.arange(3))["features"].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fid"], "--axes fid: give two or three different columns"),
        (["fid,fid"], "two or three different"),
        (["fid,recall,kid,vendi"], "two or three different"),
        (["fid,fud"], "'fud', which is no column: choose from num_inference_steps, ms_per_image, agreement"),
        (["fid,recall", "fid,cmmd"], "names cmmd, which needs --cmmd_model"),
        (["fid,vendi"], "names vendi, which needs pipelines that are asked .* --images_per_prompt of 2 or more"),
    ],
)
def test_axes_that_cannot_be_drawn_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_axes(words, COLUMNS, {"fid", "recall", "kid"})


def test_axes_and_reference_points_are_read() -> None:
    columns = known_columns(["tidy"], "FID")
    assert columns["fid"].heading == "FID"
    assert parse_axes(["fid,recall", "reward_tidy, fid,recall"], columns, {"fid", "recall", "reward_tidy"}) == [
        ("fid", "recall"),
        ("reward_tidy", "fid", "recall"),
    ]
    measured = {"fid", "kid", "recall", "vendi", "clip_score", "agreement", "num_inference_steps"}
    assert parse_axes(None, columns, measured) == [("agreement", "fid", "vendi")]
    assert parse_axes(None, columns, {"fid", "kid", "recall"}) == [("fid", "recall")]
    assert parse_point(["fid=60", "recall=-0.5"], [("fid", "recall")]) == {"fid": 60, "recall": -0.5}
    for word in ("fid", "fid=x", "kid=3", "fid=nan"):
        with pytest.raises(
            UserError, match=f"--reference_point {word}: give COLUMN=NUMBER, of a column in fid, recall"
        ):
            parse_point([word], [("fid", "recall")])
    assert within((-0.2, 1.3), COLUMNS["recall"]) == [0, 1]
    assert within((-0.2, 1.3), COLUMNS["kid"]) == [-0.2, 1.3]
    assert within((), COLUMNS["kid"]) == []


def reference(captions: list[str] | None, labels: list[int | None]) -> Reference:
    pictures = Pictures(Dataset.from_list([]), range(len(labels)), DataConfig())
    return Reference(pictures, captions, labels, ["x", "y", "z"], "none")


def test_prompts_are_the_first_different_ones() -> None:
    asked = repeated(reference(["b", "a", "b", "c"], [1, 0, 1, 2]), 2, 2)
    assert (asked.captions, asked.labels) == (["b", "b", "a", "a"], [1, 1, 0, 0])
    assert repeated(reference(None, [2, 0, 2]), None, 1).labels == [2, 0]
    assert repeated(reference(None, [None] * 4), 3, 2).labels == [None] * 6
    with pytest.raises(UserError, match="--num_prompts is 4, but the reference set has 3 different"):
        repeated(reference(["b", "a", "b", "c"], [0] * 4), 4, 2)
    with pytest.raises(UserError, match="neither captions nor classes to count prompts by: give --num_prompts"):
        repeated(reference(None, [None] * 4), None, 2)


def test_what_is_kept_is_made_once_and_again_when_damaged(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    kept, made = Kept(tmp_path / "points"), []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"x": torch.arange(64.0), "flag": torch.tensor(True)}

    what = {"steps": 1, "prompts": ["a", "b"]}
    for _ in range(2):
        found = kept.get(what, make)
        assert found["x"].tolist() == list(range(64))
        assert found["flag"]
    assert len(made) == 1
    kept.get({**what, "prompts": ["a", "c"]}, make)
    assert len(made) == 2
    path = kept.path(what)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1  # of a number: the file still opens
    for damaged in (whole[:-10], bytes(flipped), b"", b"no tensors at all"):
        path.write_bytes(damaged)
        assert kept.get(what, make)["x"].tolist() == list(range(64))
        assert path.read_bytes() == whole
    assert len(made) == 6
    assert caplog.text.count("is damaged: what it held is measured again") == 4
    assert {file.suffix for file in (tmp_path / "points").iterdir()} == {".safetensors"}


def test_digests_tell_values_names_shapes_and_dtypes_apart() -> None:
    x = torch.arange(4.0)
    others = [{"y": x}, {"x": x + 1}, {"x": x.view(2, 2)}, {"x": x.int()}, {"x": x, "z": x[:0]}, {"x": x.bfloat16()}]
    digests = {tensors_digest(one) for one in [{"x": x}, *others]}
    assert len(digests) == 7
    assert tensors_digest({"x": torch.arange(8.0)[::2] / 2}) == tensors_digest({"x": x})


def test_a_pipeline_is_known_by_its_content(tmp_path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "moved")
    save_tiny_lora(tmp_path / "lora", tmp_path / "base")
    pipe = load_pipeline(str(tmp_path / "base"))
    digest = pipeline_digest(pipe)
    assert pipeline_digest(load_pipeline(str(tmp_path / "moved"))) == digest
    assert pipeline_digest(load_pipeline(str(tmp_path / "lora"))) != digest
    weight = pipe.vae.decoder.conv_out.bias
    weight.data[0] += 1
    assert pipeline_digest(pipe) != digest
    weight.data[0] -= 1
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.013)
    assert pipeline_digest(pipe) != digest


def test_a_lora_counts_by_its_scale(tmp_path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    save_tiny_lora(tmp_path / "lora", tmp_path / "base")
    pipe = load_pipeline(str(tmp_path / "lora"))
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 32)
    plain, whole = tiny_pipeline().unet(*inputs).sample, pipe.unet(*inputs).sample
    set_lora_scale(pipe, 0)
    torch.testing.assert_close(pipe.unet(*inputs).sample, plain)
    set_lora_scale(pipe, 0.5)
    assert (pipe.unet(*inputs).sample - whole).abs().max() > 1e-4
    set_lora_scale(pipe, 1)
    assert torch.equal(pipe.unet(*inputs).sample, whole)


@pytest.mark.parametrize("count", [7, 8, 20])
def test_no_two_pipelines_have_one_colour(count: int) -> None:
    rows = [{"pipeline": name} for name in [TEACHER, *(f"student {place}" for place in range(count))]]
    assert len(set(colours(rows).values())) == count + 1


def drawn(rows: list[dict]) -> Axes:
    """The panel of agreement and FID."""
    axes = ("agreement", "fid")
    front = Front.of(rows, axes, COLUMNS, {})
    return plot(Report(rows, [], [], COLUMNS, [front], {}, {}), front).get_axes()[0]


def settings(name: str, points: list[tuple[float, float]]) -> list[dict]:
    """Rows that differ in steps, guidance and columns."""
    knobs = [{"num_inference_steps": i, "guidance_scale": i / 2} for i in range(1, len(points) + 1)]
    same = {"pipeline": name, "gamma": None, "lora_scale": None}
    return [same | own | {"agreement": x, "fid": y} for own, (x, y) in zip(knobs, points, strict=True)]


def test_knobs_stand_beside_points_where_there_is_room() -> None:
    crowd = [(0.9 + i / 1e5, 10 + i / 1e3) for i in range(40)]  # each better in one column: all on the front
    axes = drawn(settings("LCM", [(0.8, 5.0), *crowd, (0.99, 20.0)]))
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    found = {text.get_text() for text in axes.texts}
    assert {"1 g0.5", "42 g21"} <= found
    assert len(found) < 10


def test_a_teacher_that_is_far_away_does_not_press_the_students_together() -> None:
    teacher = settings(TEACHER, [(0.1, 150.0), (0.85, 12.0)])
    axes = drawn([*teacher, *settings("LCM", [(0.8, 9.0), (0.9, 10.0)])])
    assert axes.get_xlim() == pytest.approx((0.792, 0.908))
    assert axes.get_ylim() == pytest.approx((10.08, 8.92))  # less is better: upside down
    assert drawn(teacher).get_ylim()[0] > 150  # alone it is seen whole
