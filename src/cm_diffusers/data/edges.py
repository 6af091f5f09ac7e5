"""Edges of frames: a condition for a ControlNet that needs no model."""

import numpy as np
import torch
from scipy.ndimage import correlate1d
from torch import Tensor


LUMINANCE = (0.299, 0.587, 0.114)  # Rec. 601


def edges(clips: Tensor) -> Tensor:
    """Sobel magnitude of the luminance of clips (N, F, 3, H, W), over each clip's largest: as many, in [0, 1]."""
    grey = torch.einsum("nfchw,c->nfhw", clips.double(), torch.tensor(LUMINANCE, dtype=torch.float64)).numpy()
    magnitude = np.hypot(_slope(grey, -1, -2), _slope(grey, -2, -1))
    largest = magnitude.max((1, 2, 3), keepdims=True)
    found = torch.from_numpy(magnitude / np.where(largest > 0, largest, 1)).float()
    return found[:, :, None].repeat(1, 1, 3, 1, 1)


def _slope(grey: np.ndarray, along: int, across: int) -> np.ndarray:
    """Sobel's filter along one axis, smoothed across the other alone: `ndimage.sobel` would smooth over frames too."""
    return correlate1d(correlate1d(grey, [-1, 0, 1], along), [1, 2, 1], across)
