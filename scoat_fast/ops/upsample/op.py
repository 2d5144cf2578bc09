"""Bilinear upsampling by two, aligned corners: ``F_U`` of equation 1 of the paper, and the concatenation around it.

Along an axis of ``h`` pixels, output ``2k + 1`` is ``((h + k) y[k] + (h - 1 - k) y[k + 1]) / (2h - 1)`` and output
``2k + 2`` is ``((k + 1) y[k] + (2h - 2 - k) y[k + 1]) / (2h - 1)``: the positions ``o (h - 1) / (2h - 1)`` that
``align_corners=True`` asks for, without a rounded coordinate. So four outputs along an axis read an input, with
weights in closed form, and the backward pass gathers them: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _layout
from .._register import Operation, register
from . import reference


def upsample(y: Tensor, row: Sequence[Tensor] = ()) -> Tensor:  # [N, C, h, w] -> [N, sum(R) + C, 2h, 2w]
    """Concatenates ``row`` and the upsampled ``y`` along the channels: ``torch.cat([*row, up(y)], 1)``.

    ``up`` is ``F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)``; without a row the result is
    that alone. The kernels write it straight into its slice of the result.

    Args:
        y: [N, C, h, w], float32, float16, bfloat16 or float64; N may be 0. Kernels compute in float32.
        row: tensors [N, R, 2h, 2w] of any R, with the dtype and device of ``y``.

    Returns:
        A new tensor with the dtype of ``y``, channels-last where ``y`` is.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    return _forward(y, list(row))


def check(y: Tensor, row: list[Tensor]) -> None:
    _checks.four_dimensional("upsample", y=y)
    _checks.row_fits("upsample", row, y)
    _checks.same_kind("upsample", y=y, **{f"row[{i}]": x for i, x in enumerate(row)})


def _outputs(y: Tensor, row: list[Tensor]) -> Tensor:
    channels = sum(x.shape[1] for x in row) + y.shape[1]
    return _layout.new_like(y, channels, 2 * y.shape[2], 2 * y.shape[3])


def _outputs_backward(dout: Tensor) -> Tensor:
    return _layout.new_like(dout, dout.shape[1], dout.shape[2] // 2, dout.shape[3] // 2)


def _setup_context(ctx, inputs, output) -> None:
    y, row = inputs
    ctx.channels = [*(x.shape[1] for x in row), y.shape[1]]


def _backward(ctx, dout: Tensor) -> tuple[Tensor, list[Tensor]]:
    *drow, dup = dout.split(ctx.channels, 1)
    # a gradient that is itself differentiated runs in stock operators, which know their own
    dy = reference.backward(dup) if torch.is_grad_enabled() else _backward_overload(dup)
    return dy, drow


_forward, _overload, _backward_overload = register(
    "upsample",
    "(Tensor y, Tensor[] row) -> Tensor",
    "(Tensor dout) -> Tensor",
    check,
    _outputs,
    _outputs_backward,
    _setup_context,
    _backward,
    lambda cast, y, row: (cast(y), [cast(x) for x in row]),
    reference.forward,
)


def _stock(y: Tensor, row: Sequence[Tensor] = ()) -> Tensor:
    up = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
    return torch.cat([*row, up], 1) if row else up


OPERATION = Operation("upsample", upsample, _overload, _stock)
