"""Evaluations of many images: what stays in memory, and several processes."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from processes import run_worker
from torch import Tensor

from cm_diffusers.combining.objective import ObjectiveConfig, make_bench
from cm_diffusers.engine.ranks import Ranks
from cm_diffusers.evaluation import comparison, seen, separability
from cm_diffusers.evaluation.comparison import Comparison, EvaluationConfig
from cm_diffusers.evaluation.features import extract_features, load_extractor
from cm_diffusers.evaluation.front_points import FrontsConfig
from cm_diffusers.evaluation.reference import ReferenceConfig, load_reference
from cm_diffusers.evaluation.sampling import generate, load_pipeline
from cm_diffusers.evaluation.seen import Look, Seen, by_all
from cm_diffusers.evaluation.separability import RankingConfig, pooled_features, rank_backbones, through_vae
from cm_diffusers.evaluation.sweep import Sweep
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.models.vision_critic import FeatureNetwork
from evaluation.test_evaluation import parts, write_reference  # noqa: F401 (a fixture)


def image_bytes() -> int:
    """Of the memory behind all images of 32 pixels that are held and were not frozen, views included."""
    held = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.ndim > 2 and x.shape[-2:] == (32, 32)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}.values())


class Holding:
    """Of images, whenever some are looked at."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def note(self) -> None:
        self.found.append(image_bytes())

    def most(self, looks: int, act: Callable[[int], object], count: int) -> int:
        """The most bytes that `act` of so many images holds."""
        self.found.clear()
        act(count)
        assert len(self.found) == looks
        return max(self.found)


@contextmanager
def only_new() -> Iterator[Holding]:
    """What other tests left behind does not count, and modules, among which to look takes long, are not looked at."""
    gc.collect()
    gc.freeze()
    try:
        yield Holding()
    finally:
        gc.unfreeze()


@pytest.fixture
def holding(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Holding]:  # noqa: F811
    """Batches of eight real images; 160 are in `data`."""
    (tmp_path / "data").mkdir()
    write_reference(tmp_path / "data", list(range(10)) * 16)
    extract = seen.extract_features
    for module in (seen, comparison):
        monkeypatch.setattr(module, "AT_ONCE", 8)
    with only_new() as holding:
        monkeypatch.setattr(seen, "extract_features", lambda *given: holding.note() or extract(*given))
        yield holding


def real_images(folder: Path) -> ReferenceConfig:
    return ReferenceConfig(train_data_dir=str(folder / "data"), label_column="label", resolution=32)


IMAGE = 3 * 32 * 32 * 4  # bytes


def test_no_more_images_are_held_of_more(parts: Path, tmp_path: Path, holding: Holding) -> None:  # noqa: F811
    """Real, other real and drawn ones."""

    def compare(count: int) -> None:
        config = EvaluationConfig(
            pipelines=[str(parts / "lora")], num_inference_steps=[1, 2], num_images=count, eval_batch_size=8,
            feature_extractor=str(parts / "net"),
        )  # fmt: skip
        compared = Comparison(config, real_images(tmp_path))
        assert [len(row) for row in (compared.run(), compared.strips)] == [3, 3]

    assert 0 < holding.most(40, compare, 80) == holding.most(12, compare, 24) < 70 * IMAGE


def test_a_sweep_holds_no_more_images_of_more(parts: Path, tmp_path: Path, holding: Holding) -> None:  # noqa: F811
    found = {}

    def sweep(each: int) -> None:
        """Of ten prompts."""
        config = FrontsConfig(
            pipelines=[str(parts / "lora")], num_inference_steps=[1], images_per_prompt=each, num_images=20 * each,
            eval_batch_size=8, feature_extractor=str(parts / "net"), output_dir=str(tmp_path / "out"),
        )  # fmt: skip
        judge = Brightness()
        one = Sweep(config, real_images(tmp_path), {"brightness": judge})
        (point,) = one.points
        found[each] = one._found(point) | {"real": one.real.found["features"]}
        found[each]["shown"] = found[each]["shown"].flatten().clone()  # not to be counted
        assert judge.prompts == one.asked.captions

    assert 0 < holding.most(23, sweep, 6) == holding.most(8, sweep, 2) < 40 * IMAGE
    reference = load_reference(real_images(tmp_path), 120)
    prompts = [prompt for prompt in reference.prompts[:10] for _ in range(6)]
    images, _ = generate(load_pipeline(str(parts / "lora")), prompts, range(60), 1, 1.5, 8, 32)
    extractor, near = load_extractor(str(parts / "net")), {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found[6]["features"], extract_features(extractor, images), **near)
    torch.testing.assert_close(found[6]["real"], extract_features(extractor, reference.images), **near)
    torch.testing.assert_close(found[6]["score_reward_brightness"], images.mean((1, 2, 3)), **near)
    few = images.unflatten(0, (10, 6))[:6, :2]
    assert torch.equal(found[6]["shown"], (few * 255).round().byte().flatten())


class Brightness:
    """A reward."""

    digest = "brightness"

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def check(self, prompts: Sequence[str]) -> None:
        """Any will do."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.prompts += prompts
        return images.mean((1, 2, 3))


def test_a_sheet_holds_no_more_images_of_more(parts: Path, tmp_path: Path, holding: Holding) -> None:  # noqa: F811
    """On which combinations of weights are measured: real images of the search and of the hold-out, and drawn ones."""
    found = {}

    def sheet(count: int) -> None:
        config = ObjectiveConfig(
            num_images=count, num_inference_steps=[1], eval_batch_size=8, feature_extractor=str(parts / "net")
        )
        bench = make_bench(config, real_images(tmp_path), parts / "lora")
        found[count] = bench.search.real, bench.search.draw()[1]

    assert 0 < holding.most(24, sheet, 64) == holding.most(6, sheet, 16) < 40 * IMAGE
    reference, extractor = load_reference(real_images(tmp_path), 64), load_extractor(str(parts / "net"))
    images, _ = generate(load_pipeline(str(parts / "lora")), reference.prompts, range(64), 1, 1.5, 8, 32)
    for features, known in zip(found[64], (reference.images, images), strict=True):
        torch.testing.assert_close(features, extract_features(extractor, known), rtol=1e-6, atol=1e-6)


def test_a_ranking_of_critics_holds_no_more_images_of_more(
    parts: Path,  # noqa: F811
    tmp_path: Path,
    holding: Holding,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every network looks at a batch before the next one is read or drawn."""
    torch.manual_seed(0)
    networks = {
        str(width): FeatureNetwork(Maps(width, holding), [width], [0.5] * 3, [1.0] * 3, None) for width in (4, 6)
    }
    monkeypatch.setattr(separability, "load_backbone", networks.get)
    probed = {}
    monkeypatch.setattr(separability, "probe", lambda *both: (probed.update({both[0].shape: both[:2]}), (0.5, 0.7))[1])

    def rank(count: int) -> None:
        config = RankingConfig(str(parts / "lora"), [*networks], num_images=count, eval_batch_size=8)
        rank_backbones(config, real_images(tmp_path))

    assert 0 < holding.most(32, rank, 64) == holding.most(8, rank, 16) < 40 * IMAGE
    reference, pipe = load_reference(real_images(tmp_path), 64), load_pipeline(str(parts / "lora"))
    images, _ = generate(pipe, reference.prompts, range(64), 1, 1.5, 8, 32)
    both = torch.cat([through_vae(pipe.vae, part) for part in reference.images.split(8)]), images
    for name, network in networks.items():
        for features, known in zip(probed[64, int(name)], both, strict=True):
            torch.testing.assert_close(features, pooled_features(network, known), rtol=1e-6, atol=1e-6)


class Maps(torch.nn.Conv2d):
    """One map of features."""

    def __init__(self, width: int, holding: Holding) -> None:
        super().__init__(3, width, 3)
        self.holding = holding

    def forward(self, images: Tensor) -> list[Tensor]:
        self.holding.note()
        return [super().forward(images)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_image_is_seen_once_in_the_batches_of_one_process(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """26 images in batches of 4, the last of 2; of eight processes one has none."""
    monkeypatch.setattr(seen, "extract_features", lambda extractor, images: images.flatten(1)[:, :2])
    batches, told = [], []

    def see(rows: list[int]) -> Seen:
        look = Look(torch.nn.Identity(), lambda images, part: {"twice": 2.0 * torch.tensor(rows[part])})
        numbers = [torch.tensor(rows[start : start + 4]) for start in range(0, len(rows), 4)]
        batches.extend(tuple(part.tolist()) for part in numbers)
        return look.seen(
            torch.cat([look(part[:, None, None, None].expand(-1, 3, 2, 2).float()) for part in numbers]), 1.0
        )

    class Told(Ranks):
        """Runs the processes one after the other."""

        def each(self, act):
            told.append(act())
            return told

    for rank in range(ranks):
        found = by_all(Told(rank, ranks), 26, 4, see)
    assert sorted(batches) == [tuple(range(start, min(start + 4, 26))) for start in range(0, 26, 4)]
    torch.testing.assert_close(found.features, torch.arange(26.0)[:, None].expand(-1, 2))
    torch.testing.assert_close(found.shown[:, 0, 0, 0], torch.arange(10.0))
    torch.testing.assert_close(found.scores["twice"], 2 * torch.arange(26.0))
    assert found.seconds == min(ranks, 7)


def test_two_processes_make_the_table_of_one(tmp_path: Path) -> None:
    run_worker("evaluation_worker.py", tmp_path)
    one, two = (json.loads((tmp_path / name / "table.json").read_text("utf-8")) for name in ("one", "two"))
    assert len(one["rows"]) == len(two["rows"]) == 4
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert row.keys() == other.keys()
        different = {key for key in row if row[key] != other[key]} - {"images_per_second", "ms_per_image"}
        assert [row[key] for key in different] == pytest.approx([other[key] for key in different], rel=1e-6)
    assert one["rows"][-1]["clip_score"] is not None
    assert one["rows"][-1]["fid_teacher"] > 0
    assert {key: value for key, value in one.items() if key != "rows"} == {
        key: value for key, value in two.items() if key != "rows"
    }
    assert (tmp_path / "one" / "grid.png").read_bytes() == (tmp_path / "two" / "grid.png").read_bytes()
    assert json.loads((tmp_path / "shares.json").read_text()) == {"0": 34, "1": 16}


def test_images_that_are_no_numbers_are_refused() -> None:
    """Inception would take them for black."""
    look = Look(ImageClassifier(["a"], (4, 8), 8, 6).eval())
    with pytest.raises(ValueError, match="Some of the images are not finite"):
        look(torch.full((2, 3, 8, 8), torch.nan))
