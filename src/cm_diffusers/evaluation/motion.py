"""How things move and whether they stay what they are, from the pixels of clips (N, F, 3, H, W) in [0, 1] and F > 1.

Every metric is of one clip, (N,), so that clips need not be held together: means are taken over the results.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cm_diffusers.diffusion.process import as_like, doubled


DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
MIN_SPEED = 0.3  # px per frame; what is slower does not count as moving anywhere
HISTOGRAM_BINS = 32


def centroids(clips: Tensor) -> Tensor:
    """Centre of brightness (N, F, 2) of each frame: x to the right and y down, in pixels from the first pixel's centre.

    Brightness is the mean of the channels above the frame's lower quartile, which is the background's as long as the
    thing fills less than three quarters of the frame: a background that is not quite black does not draw the centre to the middle. A
    uniform frame has its own middle for a centre.
    """
    grey = doubled(clips).mean(2)
    background = grey.flatten(2).kthvalue(max(1, grey[0, 0].numel() // 4), dim=2).values
    mass = (grey - background[..., None, None]).clamp(min=0)
    total = mass.sum((2, 3))
    mass = torch.where((total > 0)[..., None, None], mass, torch.ones_like(mass))
    columns, rows = (
        torch.arange(size, dtype=mass.dtype, device=mass.device) for size in (mass.shape[3], mass.shape[2])
    )
    moments = torch.stack([(mass.sum(2) * columns).sum(2), (mass.sum(3) * rows).sum(2)], dim=2)
    return moments / mass.sum((2, 3))[..., None]


def constant_velocity(track: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares line through centroids (N, F, 2): its velocity (N, 2) in px per frame, and the residual (N,) in px.

    The residual is the root mean square over frames of the distance from the centroid to the line's point of that
    frame: 0 for constant velocity, unbounded above.
    """
    times = torch.arange(track.shape[1], dtype=track.dtype, device=track.device)
    times = times - times.mean()
    middle = track.mean(1, keepdim=True)
    velocity = torch.einsum("f,nfd->nd", times, track) / times.square().sum()
    off = track - middle - times[:, None] * velocity[:, None]
    return velocity, off.square().sum(2).mean(1).sqrt()


def direction_in_prompt(prompt: str) -> str | None:
    """The last word of the prompt that is left, right, up or down; None if there is none."""
    return next((word for word in reversed(_words(prompt)) if word in DIRECTIONS), None)


def is_turning(prompt: str) -> bool:
    """Whether the prompt asks for a rotation, which changes what features and classifiers see."""
    return "rotating" in _words(prompt)


def _words(prompt: str) -> list[str]:
    return re.findall(r"[a-z]+", prompt.lower())


def direction_accuracy(
    velocity: Tensor, directions: Sequence[str | None], min_speed: float = MIN_SPEED
) -> dict[str, float]:
    """Share of clips that move as told, in [0, 1], of all that are told a direction ("all") and of each direction.

    A clip does if the larger component of its velocity (N, 2) has the direction's axis and sign and is at least
    `min_speed` px per frame. Chance, for clips that move but do not listen to their prompt: 1/4; for static ones 0.
    """
    hits: dict[str, list[float]] = {}
    for (x, y), direction in zip(velocity.tolist(), directions, strict=True):
        if direction is not None:
            along_x, along_y = DIRECTIONS[direction]
            ahead = x * along_x + y * along_y
            hits.setdefault(direction, []).append(ahead >= min_speed and ahead > abs(x * along_y + y * along_x))
    if hits:
        hits["all"] = [hit for of_one in hits.values() for hit in of_one]
    return {direction: sum(of_one) / len(of_one) for direction, of_one in hits.items()}


def frame_change(clips: Tensor) -> Tensor:
    """Mean of `|x_{f+1} - x_f|` over frames, channels and pixels (N,), in [0, 1]; 0 for a static clip."""
    return clips.diff(dim=1).abs().mean((1, 2, 3, 4))


def static_threshold(change_of_real: Tensor) -> float:
    """Frame change below which a clip counts as static: half the 5th percentile of moving real clips (N,).

    A percentile and not the least, which one dim article would set; half of it, so that a pipeline which moves a
    little less than the slowest real clips is not called static.
    """
    return doubled(change_of_real).quantile(0.05).item() / 2


def mass_change(clips: Tensor) -> Tensor:
    """Mean of `|m_{f+1} - m_f|` over frames, m_f the frame's brightness, over the clip's mean of m_f: (N,), at least 0.

    Things that stay in the frame and keep their size have 0; a black clip too.
    """
    mass = doubled(clips).mean((2, 3, 4))
    return mass.diff(dim=1).abs().mean(1) / mass.mean(1).clamp(min=torch.finfo(mass.dtype).tiny)


def colour_drift(clips: Tensor) -> Tensor:
    """Mean distance of the colours of the frames 1 ... F - 1 to those of frame 0: (N,), in [0, 1].

    The distance is the share of pixels that would have to change their bin: half the L1 norm between histograms of
    32 equal bins of [0, 1], averaged over the channels. It does not depend on where things are.
    """
    bins = (clips * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1).flatten(3)
    counts = torch.zeros(*bins.shape[:3], HISTOGRAM_BINS, device=clips.device)
    shares = counts.scatter_add_(3, bins, torch.ones_like(bins, dtype=counts.dtype)) / bins.shape[3]
    return (shares[:, 1:] - shares[:, :1]).abs().sum(3).mean((1, 2)) / 2


def content_distances(features: Tensor) -> Tensor:
    """Cosine distance (N, F - 1), in [0, 2], of the features (N, F, D) of the frames 1 ... F - 1 to those of frame 0.

    Give features of `centred` frames: features of an ordinary network change with the place of the thing, so those of
    whole frames would be a measure of motion.
    """
    features = doubled(features)
    return 1 - F.cosine_similarity(features[:, 1:], features[:, :1], dim=2)


def content_drift(features: Tensor) -> Tensor:
    """Mean of `content_distances` over frames: (N,)."""
    return content_distances(features).mean(1)


def centred(clips: Tensor, zoom: float = 1.0) -> Tensor:
    """Frames of the same size with the centroid at their middle, enlarged by `zoom`; black beyond the border."""
    frames, (height, width) = clips.flatten(0, 1), clips.shape[-2:]
    centres = as_like(centroids(clips).flatten(0, 1), clips)
    sizes = torch.tensor([width, height], dtype=clips.dtype, device=clips.device)
    shift = (2 * centres + 1) / sizes - 1  # pixel centres to [-1, 1] between the frame's borders
    scale = torch.eye(2, dtype=clips.dtype, device=clips.device).expand(len(frames), 2, 2) / zoom
    grid = F.affine_grid(torch.cat([scale, shift[..., None]], 2), list(frames.shape), align_corners=False)
    return F.grid_sample(frames, grid, align_corners=False).view_as(clips)


def frame_differences(clips: Tensor) -> Tensor:
    """(1 + x_{f+1} - x_f) / 2 (N, F - 1, 3, H, W) in [0, 1]: an image of the motion between two frames, 0.5 without.

    Signed, because `|x_{f+1} - x_f|` is the same for a clip and for its reverse. For the Fréchet distance over that of
    real clips to each other, the signed one also rises more for ghosts (33 against 9) and slow motion, with features
    of the bundled classifier on moving articles; for flicker it rises less, which `mass_change` sees.
    """
    return (1 + clips.diff(dim=1)) / 2


def spread_frames(num_frames: int, count: int) -> list[int]:
    """At most `count` different frame numbers, evenly spread from the first to the last."""
    return torch.linspace(0, num_frames - 1, min(count, num_frames)).round().long().tolist()
