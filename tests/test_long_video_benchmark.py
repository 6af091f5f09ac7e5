"""The benchmark of long videos: what it measures, and that every way it compares draws."""

import sys
from pathlib import Path

import pytest
import torch
from evaluation.test_evaluate_video import animate_diff


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import long_video  # noqa: E402


def test_a_seam_is_seen():
    """Frames that move by 0.1 each, and by 0.4 from the fourth to the fifth."""
    levels = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0])
    videos = levels.view(1, 8, 1, 1, 1).expand(2, 8, 3, 4, 4)
    assert long_video.seams(videos, 4) == pytest.approx(4.0)
    assert long_video.seams(torch.linspace(0, 1, 8).view(1, 8, 1, 1, 1).expand(1, 8, 3, 4, 4), 4) == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore:Nothing says:UserWarning")
def test_all_ways_draw_what_they_are_asked_for(tmp_path, monkeypatch):
    """On a tiny random student: as long as asked, apart by seed, and with other noise than without sharing it."""
    monkeypatch.chdir(ROOT)
    animate_diff().save_pretrained(tmp_path)
    config = long_video.LongVideoConfig(student=str(tmp_path), num_frames=12, num_inference_steps=1, num_videos=2)
    comparison = long_video.LongVideoComparison(config)
    assert all(prompt.split()[-1] in ("bouncing", "rotating") for prompt in comparison.prompts)
    assert len(comparison.prompts) == 2
    ways = long_video.ways(config)
    assert {name: calls for name, (calls, _) in ways.items()}["co-denoising"] == 2
    found = {name: draw(comparison.prompts, range(2)) for name, (_, draw) in ways.items()}
    for video in found.values():
        assert video.shape == (2, 12, 3, 32, 32)
        assert not torch.equal(video[0], video[1])
    assert not torch.equal(found["co-denoising"], found["co-denoising, shared noise"])
