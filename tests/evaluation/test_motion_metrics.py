"""Metrics of motion on a bright square whose place in every frame is known."""

import pytest
import torch
from torch import Tensor

from cm_diffusers.evaluation import motion
from cm_diffusers.evaluation.features import extract_features
from cm_diffusers.models.classifier import ImageClassifier


def square_clip(corners: list[tuple[int, int]], side: int = 4, height: int = 32, width: int = 40) -> Tensor:
    """(1, F, 3, H, W): a white square on black with its corner (x, y) there; its centre is (side - 1) / 2 further."""
    clip = torch.zeros(1, len(corners), 3, height, width)
    for frame, (x, y) in zip(clip[0], corners, strict=True):
        frame[:, y : y + side, x : x + side] = 1
    return clip


def walk(x: int, y: int, dx: int, dy: int, frames: int = 5) -> list[tuple[int, int]]:
    return [(x + f * dx, y + f * dy) for f in range(frames)]


def velocity_of(clips: Tensor) -> tuple[Tensor, Tensor]:
    return motion.constant_velocity(motion.centroids(clips))


def test_centroids_are_exact_on_any_background() -> None:
    corners = [(0, 0), (36, 28), (10, 3)]
    expected = torch.tensor([[[x + 1.5, y + 1.5] for x, y in corners]], dtype=torch.float64)
    clip = square_clip(corners)
    for background in (0.0, 0.05, 0.5):
        torch.testing.assert_close(motion.centroids(background + (1 - background) * clip), expected)
    two = torch.zeros(1, 2, 3, 8, 8)
    two[0, :, 0, 2, 1], two[0, :, 2, 2, 5] = 1, 0.25  # colours count by their mean: x = (4 * 1 + 5) / 5
    torch.testing.assert_close(motion.centroids(two)[0, 0], torch.tensor([1.8, 2.0], dtype=torch.float64))


def test_a_uniform_frame_has_its_middle_for_a_centroid() -> None:
    clip = torch.stack([torch.zeros(3, 32, 40), torch.full((3, 32, 40), 0.7)])[None]
    expected = torch.tensor([19.5, 15.5], dtype=torch.float64).expand(1, 2, 2)
    torch.testing.assert_close(motion.centroids(clip), expected)


def test_constant_velocity_has_no_residual() -> None:
    clips = torch.cat([square_clip(walk(2, 20, 3, -2)), square_clip(walk(9, 9, 0, 0))])
    velocity, residual = velocity_of(clips)
    torch.testing.assert_close(velocity, torch.tensor([[3.0, -2.0], [0.0, 0.0]], dtype=torch.float64))
    assert residual.max() < 1e-12


def test_residual_of_a_bounce_by_hand() -> None:
    clip = square_clip([(4, 7), (5, 7), (6, 7), (5, 7)])  # line 0.4 + 0.4 f: residuals -0.4, 0.2, 0.8, -0.6
    velocity, residual = velocity_of(clip)
    torch.testing.assert_close(velocity, torch.tensor([[0.4, 0.0]], dtype=torch.float64))
    assert residual.item() == pytest.approx(0.3**0.5)
    both = square_clip([(4, 7), (5, 8), (6, 9), (5, 8)])  # the same along y: squares add up
    assert velocity_of(both)[1].item() == pytest.approx(0.6**0.5)


def test_prompts_name_their_last_direction() -> None:
    found = {
        "an ankle boot moving left": "left",
        "the left shoe, going Up.": "up",
        "a dress moving down, not right!": "right",
        "a copyright sign bouncing": None,
        "upright": None,
    }
    assert [motion.direction_in_prompt(prompt) for prompt in found] == list(found.values())
    assert [motion.is_turning(prompt) for prompt in ("a bag rotating", "a bag bouncing")] == [True, False]


def test_direction_accuracy() -> None:
    steps = {"left": (-2, 0), "right": (1, 0), "up": (0, -1), "down": (0, 2)}
    clips = torch.cat([square_clip(walk(16, 14, *step)) for step in steps.values()])
    velocity, names = velocity_of(clips)[0], list(steps)
    assert motion.direction_accuracy(velocity, names) == dict.fromkeys([*names, "all"], 1.0)
    assert motion.direction_accuracy(velocity, ["right", "left", "down", "up"])["all"] == 0
    half = motion.direction_accuracy(velocity, ["left", "left", "up", "down"])
    assert half == {"left": 0.5, "up": 1.0, "down": 1.0, "all": 0.75}
    assert motion.direction_accuracy(velocity, ["left", None, "down", None]) == {"left": 1.0, "down": 0.0, "all": 0.5}
    assert motion.direction_accuracy(velocity, [None] * 4) == {}


def test_a_direction_needs_speed_and_its_own_axis() -> None:
    velocity = torch.tensor([[0.29, 0.0], [0.31, 0.0], [1.0, 1.1], [1.0, -0.9], [1.0, 1.0]])
    hits = [motion.direction_accuracy(v[None], ["right"])["all"] for v in velocity]
    assert hits == [0, 1, 0, 1, 0]
    assert motion.direction_accuracy(velocity[:1], ["right"], min_speed=0.2)["all"] == 1


def test_chance_of_a_direction_is_a_quarter() -> None:
    generator = torch.Generator().manual_seed(0)
    angles = 2 * torch.pi * torch.rand(4000, generator=generator)
    velocity = torch.stack([angles.cos(), angles.sin()], 1)
    accuracy = motion.direction_accuracy(velocity, list(motion.DIRECTIONS) * 1000)
    assert all(share == pytest.approx(0.25, abs=0.05) for share in accuracy.values())
    assert accuracy["all"] == pytest.approx(0.25, abs=0.02)


def test_static_clips_are_found() -> None:
    real = torch.cat([square_clip(walk(4, 4, 1 + n % 3, 0)) for n in range(20)])
    change = motion.frame_change(real)
    pixels = 32 * 40
    torch.testing.assert_close(change[:3], torch.tensor([8.0, 16.0, 24.0]) / pixels)  # columns that go and come
    threshold = motion.static_threshold(change)
    assert threshold == pytest.approx(4 / pixels)
    still = square_clip(walk(4, 4, 0, 0))
    flicker = still * torch.tensor([1, 0.9, 1, 0.9, 1]).view(1, 5, 1, 1, 1)  # 16 pixels by 0.1
    assert (motion.frame_change(torch.cat([still, flicker])) < threshold).all()
    assert not (change < threshold).any()


def test_mass_change_by_hand() -> None:
    clip = square_clip(walk(4, 4, 2, 0, 4))
    assert motion.mass_change(clip).item() == 0
    fading = clip * torch.tensor([1.0, 0.5, 0.5, 1.0]).view(1, 4, 1, 1, 1)  # (0.5 + 0 + 0.5) / 3 over 0.75
    assert motion.mass_change(fading).item() == pytest.approx(4 / 9)
    assert motion.mass_change(torch.zeros(1, 3, 3, 8, 8)).item() == 0


def test_colour_drift_by_hand() -> None:
    clip = square_clip(walk(4, 4, 2, 1, 3))
    assert motion.colour_drift(clip).item() == 0  # wherever it goes
    darker, redder = clip.clone(), clip.clone()
    darker[:, 2] *= 0.5
    redder[:, 1:, 1:] *= 0.5
    share = 16 / (32 * 40)  # of the pixels change their bin
    assert motion.colour_drift(darker).item() == pytest.approx(share / 2)  # in one of two frames
    assert motion.colour_drift(redder).item() == pytest.approx(share * 2 / 3)  # in two of three channels
    inverted = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])[None]
    assert motion.colour_drift(inverted).item() == 1


def test_content_drift_is_a_cosine_to_the_first_frame() -> None:
    features = torch.tensor([[[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]]])
    expected = torch.tensor([(0 + 1) / 2, (2 + 1 - 0.5**0.5) / 2], dtype=torch.float64)
    torch.testing.assert_close(motion.content_drift(features), expected)


def test_centred_frames_forget_the_place() -> None:
    clip = square_clip(walk(5, 6, 3, 1))
    middle = square_clip([(18, 14)] * 5)
    torch.testing.assert_close(motion.centred(clip), middle, atol=1e-5, rtol=0)
    large = motion.centred(clip, 2.0)
    torch.testing.assert_close(motion.centroids(large), motion.centroids(middle), atol=1e-4, rtol=0)
    torch.testing.assert_close(large.sum((2, 3, 4)), 4 * middle.sum((2, 3, 4)), atol=0.01, rtol=0)
    assert large[0, :, :, 12:20, 16:24].min() > 0.5  # 8 pixels wide


def test_content_drift_of_centred_frames_is_none_for_pure_motion() -> None:
    torch.manual_seed(0)
    net = ImageClassifier(["a", "b"], channels=(4, 8), num_features=6).eval()
    clip = square_clip(walk(3, 5, 5, 3), side=6, width=32)
    drifts = [
        motion.content_drift(extract_features(net, frames[0])[None]).item() for frames in (clip, motion.centred(clip))
    ]
    assert drifts[1] < 1e-6 < 1e-3 < drifts[0]


def test_differences_tell_a_clip_from_its_reverse() -> None:
    clip = square_clip(walk(4, 4, 1, 0, 3))
    difference = motion.frame_differences(clip)
    assert difference.shape == (1, 2, 3, 32, 40)
    assert difference[0, 0, 0, 4, [3, 4, 6, 8]].tolist() == [0.5, 0.0, 0.5, 1.0]
    torch.testing.assert_close(motion.frame_differences(clip.flip(1)), 1 - difference.flip(1))
    assert (motion.frame_differences(square_clip([(3, 3)] * 2)) == 0.5).all()


@pytest.mark.parametrize(
    ("frames", "count", "expected"), [(8, 4, [0, 2, 5, 7]), (3, 4, [0, 1, 2]), (16, 2, [0, 15]), (9, 1, [0])]
)
def test_frames_are_spread(frames: int, count: int, expected: list[int]) -> None:
    assert motion.spread_frames(frames, count) == expected


def test_a_thing_that_fills_most_of_the_frame_has_its_own_centre():
    clip = torch.full((1, 2, 3, 32, 32), 0.1)
    clip[0, 0, :, 1:29, 2:24] = torch.linspace(0.2, 1.0, 22)  # 60 percent, brighter to the right
    clip[0, 1, :, 1:29, 5:27] = clip[0, 0, :, 1:29, 2:24]
    first, second = motion.centroids(clip)[0]
    weights = torch.linspace(0.1, 0.9, 22, dtype=torch.float64)
    assert first[0].item() == pytest.approx(2 + ((weights * torch.arange(22)).sum() / weights.sum()).item(), abs=1e-4)
    assert (second - first).tolist() == pytest.approx([3, 0], abs=1e-6)
