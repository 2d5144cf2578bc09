"""The definition in stock operators, differentiable and clean in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout import memory_format


def why_not(*args) -> None:
    return None


def forward(y: Tensor, row: list[Tensor]) -> Tensor:
    up = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
    return torch.cat([*row, up], 1).contiguous(memory_format=memory_format(y)) if row else up


def backward(dout: Tensor) -> Tensor:
    n, c, height, width = dout.shape
    dy = torch.ops.aten.upsample_bilinear2d_backward(
        dout, [height, width], [n, c, height // 2, width // 2], True, 2.0, 2.0
    )
    return dy.contiguous(memory_format=memory_format(dout))
