"""The definition in stock operators, differentiable and clean in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout import accumulator, memory_format


def why_not(*args) -> None:
    return None


def forward(y: Tensor, attention: Tensor, row: list[Tensor], return_means: bool) -> tuple[Tensor, Tensor]:
    joined = (1 + attention) * F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
    if row:
        joined = torch.cat([*row, joined], 1)
    joined = joined.contiguous(memory_format=memory_format(y))
    exact = accumulator(y.dtype)
    means = joined.mean((2, 3), dtype=exact) if return_means else joined.new_empty((y.shape[0], 0), dtype=exact)
    return joined, means


def backward(dout: Tensor, dmeans: Tensor | None, y: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y and the map; and, where the means have one, of the channels before y, else none of these."""
    n, c, height, width = y.shape
    before = dout.shape[1] - c
    if dmeans is None:
        dout, before = dout[:, before:], 0
    else:
        dout = dout + (dmeans / (4 * height * width)).to(dout.dtype)[:, :, None, None]
    dgated = dout[:, before:]
    up = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
    dy = torch.ops.aten.upsample_bilinear2d_backward(
        dgated * (1 + attention), list(attention.shape[2:]), [n, c, height, width], True, 2.0, 2.0
    )
    dattention = (dgated * up).sum(1, keepdim=True)
    format = memory_format(y)
    return (
        dy.contiguous(memory_format=format),
        dattention.contiguous(),
        dout[:, :before].clone(memory_format=format),
    )
