"""Evaluations of many images: what stays in memory, and several processes."""

import gc
import json
from pathlib import Path

import pytest
import torch
from processes import run_worker

from cm_diffusers.engine.ranks import Ranks
from cm_diffusers.evaluation import seen
from cm_diffusers.evaluation.comparison import Comparison, EvaluationConfig
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.evaluation.seen import Look, Seen, by_all
from cm_diffusers.models.classifier import ImageClassifier
from evaluation.test_evaluation import parts, write_reference  # noqa: F401 (a fixture)


def image_bytes() -> int:
    """Of the memory behind all images of 32 pixels that are held, views included."""
    held = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.ndim > 2 and x.shape[-2:] == (32, 32)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}.values())


def test_no_more_images_are_held_of_more(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Real, other real and drawn ones."""
    write_reference(tmp_path, list(range(10)) * 16)
    gc.collect()  # what other tests left behind
    extract, held, others = seen.extract_features, [], image_bytes()
    monkeypatch.setattr(
        seen, "extract_features", lambda *given: held.append(image_bytes() - others) or extract(*given)
    )
    monkeypatch.setattr("cm_diffusers.evaluation.comparison.AT_ONCE", 8)

    def most(count: int) -> int:
        held.clear()
        config = EvaluationConfig(
            pipelines=[str(parts / "lora")], num_inference_steps=[1, 2], num_images=count, eval_batch_size=8,
            feature_extractor=str(parts / "net"),
        )  # fmt: skip
        comparison = Comparison(
            config, ReferenceConfig(train_data_dir=str(tmp_path), label_column="label", resolution=32)
        )
        assert [len(row) for row in (comparison.run(), comparison.strips)] == [3, 3]
        assert len(held) == 4 * count // 8
        return max(held)

    assert most(80) == most(24) < 70 * 3 * 32 * 32 * 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_image_is_seen_once_in_the_batches_of_one_process(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """26 images in batches of 4, the last of 2; of eight processes one has none."""
    monkeypatch.setattr(seen, "extract_features", lambda extractor, images: images.flatten(1)[:, :2])
    batches, told = [], []

    def see(rows: list[int]) -> Seen:
        look = Look(torch.nn.Identity())
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
    torch.testing.assert_close(found.first[:, 0, 0, 0], torch.arange(10.0))
    assert (len(found.scores), found.seconds) == (0, min(ranks, 7))


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
