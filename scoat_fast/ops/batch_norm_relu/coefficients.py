"""What is the same for all pixels of a channel, from sums over them; shared by the kernels.

All [C]; computed in float64, but the statistics are rounded to float32, as which they are returned and kept: whoever
normalises by them again then gets the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPREAD = 8  # at least so many rows and columns of each image, where it has them


def pivot(x: Tensor) -> Tensor:
    """A value near each channel's mean, [C] in float32: squares of what lies around it lose no digits.

    The mean of pixels all over the images: a single one may lie apart from all others, as the corners of a slice do.
    """
    rows, columns = (max(size // SPREAD, 1) for size in x.shape[2:])
    return x[:, :, rows // 2 :: rows, columns // 2 :: columns].mean((0, 2, 3), dtype=torch.float32)


def statistics(sums: Tensor, pivot: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from the sums of ``x - pivot`` and of its square, [2 C], over ``count`` pixels."""
    first, second = sums.chunk(2)
    offset = first / count
    return (pivot + offset).float(), (second / count - offset.square()).clamp(min=0).float()


def forward(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The scale and the shift that normalise."""
    scale = weight.double() * (var.double() + eps).rsqrt()
    return scale, bias.double() - mean.double() * scale


def backward(
    sums: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scale, slope and shift of ``dx = g * scale + x * slope + shift``, and the gradients of weight and bias.

    ``sums``: of g, the gradient behind ReLU, and of ``g * (x - mean)``, [2 C].
    """
    dbias, second = sums.chunk(2)
    inverse = (var.double() + eps).rsqrt()
    dweight, scale = second * inverse, weight.double() * inverse
    slope = -scale * inverse * dweight / count
    return scale, slope, -scale * dbias / count - slope * mean.double(), dweight, dbias


def for_slices(values: Tensor, like: Tensor) -> Tensor:
    """[C] as float32 [N, C], as the kernels take it for ``like`` [N, C, H, W]."""
    return values.float().expand(like.shape[:2])


def count_of(x: Tensor) -> int:
    """Pixels of a channel in the whole batch."""
    return x.shape[0] * x.shape[2] * x.shape[3]
