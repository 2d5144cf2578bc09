"""Squeeze and excitation (equations 4 and 5 of the paper; Hu et al., doi 10.1109/CVPR.2018.00745).

Given the means it reads ``x`` once and writes the result once. The two small products in between are computed in
float32; their results, of a few kilobytes, are computed anew in the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _layout
from .._register import Operation, register
from . import reference


def channel_gate(x: Tensor, w1: Tensor, w2: Tensor, means: Tensor | None = None) -> Tensor:
    """Scales every channel of ``x`` by ``sigmoid(w2 @ relu(w1 @ mean(x)))``.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64; N may be 0. Kernels compute in float32.
        w1: [R, C], with the dtype and device of ``x``.
        w2: [C, R], likewise.
        means: the means of ``x`` over its pixels, [N, C] in float32 (float64 for float64), where they are known:
            from ``spatial_gate``. They are then an input like the others, with a gradient of their own.

    Returns:
        A new tensor with the shape and dtype of ``x``, channels-last where ``x`` is.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    return _forward(x, w1, w2, means)[0]


def check(x: Tensor, w1: Tensor, w2: Tensor, means: Tensor | None) -> None:
    _checks.four_dimensional("channel_gate", x=x)
    n, c = x.shape[:2]
    if w1.ndim != 2 or w1.shape[1] != c or w2.shape != w1.shape[::-1]:
        raise ValueError(
            f"channel_gate: w1 and w2 must be [R, {c}] and [{c}, R] for x {list(x.shape)}, "
            f"got {list(w1.shape)} and {list(w2.shape)}"
        )
    _checks.same_kind("channel_gate", x=x, w1=w1, w2=w2)
    if means is not None:
        exact = _layout.accumulator(x.dtype)
        if means.shape != (n, c) or means.dtype != exact or means.device != x.device:
            raise ValueError(
                f"channel_gate: means must be [{n}, {c}] in {exact} on {x.device}, "
                f"got {list(means.shape)} in {means.dtype} on {means.device}"
            )


def _outputs(x: Tensor, w1: Tensor, w2: Tensor, means: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and the means where they were not given: for the backward pass."""
    channels = x.shape[1] if means is None else 0
    return _layout.new_like(x, *x.shape[1:]), x.new_empty((x.shape[0], channels), dtype=_layout.accumulator(x.dtype))


def _outputs_backward(
    dout: Tensor, x: Tensor, w1: Tensor, w2: Tensor, means: Tensor, given: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = _layout.new_like(x, *x.shape[1:])
    return dx, torch.empty_like(w1), torch.empty_like(w2), means.new_empty(means.shape if given else (x.shape[0], 0))


def _setup_context(ctx, inputs, output) -> None:
    x, w1, w2, means = inputs
    ctx.given = means is not None
    ctx.save_for_backward(x, w1, w2, means if ctx.given else output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, _) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None
    x, w1, w2, means = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient that is itself differentiated runs in stock operators
        means = means if ctx.given else x.mean((2, 3), dtype=means.dtype)
        *grads, dmeans = reference.backward(dout, x, w1, w2, means, ctx.given)
    else:
        *grads, dmeans = _backward_overload(dout, x, w1, w2, means, ctx.given)
    return *grads, dmeans if ctx.given else None


_forward, _overload, _backward_overload = register(
    "channel_gate",
    "(Tensor x, Tensor w1, Tensor w2, Tensor? means) -> (Tensor, Tensor)",
    "(Tensor dout, Tensor x, Tensor w1, Tensor w2, Tensor means, bool given) -> (Tensor, Tensor, Tensor, Tensor)",
    check,
    _outputs,
    _outputs_backward,
    _setup_context,
    _backward,
    lambda cast, x, w1, w2, means: (cast(x), cast(w1), cast(w2), means),
    reference.forward,
)


def _stock(x: Tensor, w1: Tensor, w2: Tensor, means: Tensor | None = None) -> Tensor:
    means = x.mean((2, 3)) if means is None else means.to(x.dtype)
    return x * torch.sigmoid(F.linear(F.relu(F.linear(means, w1)), w2))[:, :, None, None]


OPERATION = Operation("channel_gate", channel_gate, _overload, _stock)
