"""Between a slice's own grid and the square one that a network was trained on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

SQUARE_PIXELS = (1.0, 1.0)  # the spacing of pictures, which have none


def to_square(slices: Tensor, spacing: tuple[float, float], size: int) -> Tensor:
    """[N, C, H, W] with pixels of ``spacing`` (row, column) mm -> [N, C, size, size] with square pixels.

    The shorter side is padded with 0 (air, once windowed) around the slice, so that anatomy keeps its shape.
    """
    top, bottom, left, right = _padding(slices.shape[-2:], spacing)
    padded = F.pad(slices, (left, right, top, bottom))
    return F.interpolate(padded, (size, size), mode="bilinear", antialias=True)


def from_square(maps: Tensor, shape: tuple[int, int], spacing: tuple[float, float]) -> Tensor:
    """The inverse of ``to_square``: [N, C, size, size] -> [N, C, H, W] for ``shape`` = (H, W)."""
    top, bottom, left, right = _padding(shape, spacing)
    height, width = shape
    padded = F.interpolate(maps, (top + height + bottom, left + width + right), mode="bilinear", antialias=True)
    return padded[:, :, top : top + height, left : left + width]


def _padding(shape: tuple[int, int], spacing: tuple[float, float]) -> tuple[int, int, int, int]:
    """Pixels to add at the top, bottom, left and right to cover a physical square."""
    (height, width), (row_mm, column_mm) = shape, spacing
    side = max(height * row_mm, width * column_mm)
    rows, columns = max(round(side / row_mm) - height, 0), max(round(side / column_mm) - width, 0)
    return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2
