"""Gating by the spatial attention map, ``(1 + M) * up(y)`` (equation 2 of the paper), and the concatenation around it.

One pass writes the result and sums its channels, so that the recalibration that follows need not read it for its
means. The gradient of ``y`` gathers as in ``upsample``; that of the map is ``sum_c dout * up(y)``, with ``up(y)``
computed anew: neither it nor the gated features are saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _layout
from .._register import Operation, register
from . import reference


def spatial_gate(
    y: Tensor, attention: Tensor, row: Sequence[Tensor] = (), return_means: bool = False
) -> Tensor | tuple[Tensor, Tensor]:  # [N, C, h, w], [N, 1, 2h, 2w] -> [N, sum(R) + C, 2h, 2w]
    """Concatenates ``row`` and the gated ``y`` along the channels: ``torch.cat([*row, (1 + attention) * up(y)], 1)``.

    ``up`` is ``F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)``; without a row the result is
    the gated features alone.

    Args:
        y: [N, C, h, w], float32, float16, bfloat16 or float64; N may be 0. Kernels compute in float32.
        attention: the map M [N, 1, 2h, 2w], with the dtype and device of ``y``.
        row: tensors [N, R, 2h, 2w] of any R, with the dtype and device of ``y``.
        return_means: also return the means of the result over its pixels, [N, sum(R) + C], in float32 (float64 for
            float64): what ``channel_gate`` takes.

    Returns:
        A new tensor with the dtype of ``y``, channels-last where ``y`` is; with ``return_means`` that and the means.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    joined, means = _forward(y, attention, list(row), return_means)
    return (joined, means) if return_means else joined


def check(y: Tensor, attention: Tensor, row: list[Tensor], return_means: bool) -> None:
    _checks.four_dimensional("spatial_gate", y=y, attention=attention)
    wanted = (y.shape[0], 1, 2 * y.shape[2], 2 * y.shape[3])
    if tuple(attention.shape) != wanted:
        raise ValueError(
            f"spatial_gate: attention must be {list(wanted)} for y {list(y.shape)}, got {list(attention.shape)}"
        )
    _checks.row_fits("spatial_gate", row, y)
    _checks.same_kind("spatial_gate", y=y, attention=attention, **{f"row[{i}]": x for i, x in enumerate(row)})


def _outputs(y: Tensor, attention: Tensor, row: list[Tensor], return_means: bool) -> tuple[Tensor, Tensor]:
    channels = sum(x.shape[1] for x in row) + y.shape[1]
    joined = _layout.new_like(y, channels, 2 * y.shape[2], 2 * y.shape[3])
    return joined, y.new_empty((y.shape[0], channels if return_means else 0), dtype=_layout.accumulator(y.dtype))


def _outputs_backward(
    dout: Tensor, dmeans: Tensor | None, y: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    before = 0 if dmeans is None else dout.shape[1] - y.shape[1]
    dy = _layout.new_like(y, *y.shape[1:])
    return (
        dy,
        torch.empty_like(attention, memory_format=torch.contiguous_format),
        _layout.new_like(y, before, *dout.shape[2:]),
    )


def _setup_context(ctx, inputs, output) -> None:
    y, attention, row, ctx.with_means = inputs
    ctx.save_for_backward(y, attention)
    ctx.channels = [x.shape[1] for x in row]
    ctx.set_materialize_grads(False)


def _backward(
    ctx, dout: Tensor | None, dmeans: Tensor | None
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], None]:
    y, attention = ctx.saved_tensors
    if not ctx.with_means:  # traced, the empty output has an empty gradient
        dmeans = None
    channels = [*ctx.channels, y.shape[1]]
    if dout is None:
        if dmeans is None:
            return None, None, [None] * len(ctx.channels), None
        dout = _layout.new_like(y, sum(channels), *attention.shape[2:]).zero_()
    # a gradient that is itself differentiated runs in stock operators, which know their own
    run = reference.backward if torch.is_grad_enabled() else _backward_overload
    dy, dattention, drow = run(dout, dmeans, y, attention)
    if dmeans is None:
        *drow, _ = dout.split(channels, 1)
    else:
        drow = drow.split(ctx.channels, 1) if ctx.channels else []
    return dy, dattention, list(drow), None


_forward, _overload, _backward_overload = register(
    "spatial_gate",
    "(Tensor y, Tensor attention, Tensor[] row, bool return_means) -> (Tensor, Tensor)",
    "(Tensor dout, Tensor? dmeans, Tensor y, Tensor attention) -> (Tensor, Tensor, Tensor)",
    check,
    _outputs,
    _outputs_backward,
    _setup_context,
    _backward,
    lambda cast, y, attention, row, means: (cast(y), cast(attention), [cast(x) for x in row], means),
    reference.forward,
)


def _stock(
    y: Tensor, attention: Tensor, row: Sequence[Tensor] = (), return_means: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    joined = (1 + attention) * F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
    if row:
        joined = torch.cat([*row, joined], 1)
    return (joined, joined.mean((2, 3))) if return_means else joined


OPERATION = Operation("spatial_gate", spatial_gate, _overload, _stock)
