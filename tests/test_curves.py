"""Plots of what trainings logged."""

import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import curves

from cm_diffusers.errors import UserError


def logged(folder: Path, parts: list[dict[int, float]]) -> Path:
    for part, values in enumerate(parts):
        with SummaryWriter(folder / "cm_diffusers" / str(part)) as writer:
            for step, value in values.items():
                writer.add_scalar("loss", value, step)
    return folder


def test_a_resumed_training_is_one_curve(tmp_path: Path) -> None:
    folder = logged(tmp_path, [{10: 3.0, 20: 2.0, 30: 9.0}, {30: 1.0, 40: 0.5}])
    assert curves.read_scalars(str(folder)) == {"loss": ([10, 20, 30, 40], [3.0, 2.0, 1.0, 0.5])}


def test_the_plot_has_a_panel_for_each_tag_and_a_line_for_each_training() -> None:
    scalars = {"a": {"loss": ([1, 2], [3.0, 4.0])}, "b": {"loss": ([1], [5.0]), "warmup": ([1, 2], [0.0, 1.0])}}
    loss, warmup = curves.draw(scalars, ["loss", "warmup"]).axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[3.0, 4.0], [5.0]]
    assert [line.get_label() for line in warmup.lines] == ["b"]


def test_what_was_not_logged_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = logged(tmp_path / "run", [{1: 1.0}])
    output = tmp_path / "new" / "curves.png"

    def call(*tags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["curves", "--runs", str(folder), "--tags", *tags, "--output", str(output)])
        curves.main()

    with pytest.raises(UserError, match="--tags size: nothing of this was logged; known are loss"):
        call("size", "loss")
    with pytest.raises(UserError, match="has no TensorBoard file"):
        curves.read_scalars(str(tmp_path / "new"))
    call("loss")
    assert output.read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in output.parent.iterdir()] == ["curves.png"]
