"""The C++ kernels with preallocated outputs: what each operation's ``native_impl`` does, less its allocations.

The functions are as those of ``stock_out``. Importing this fails where the extension was not built.
"""

from __future__ import annotations

from torch import Tensor

from ..ops import _native
from ..ops.batch_norm_relu import coefficients as per_channel
from ..ops.channel_gate.excite import excite, excite_backward
from .stock_out import Call, blank


def upsample_forward(y: Tensor, row: list[Tensor]) -> Call:
    joined, places, own = _joined(y, row)

    def call() -> list[Tensor]:
        for x, place in zip(row, places, strict=True):
            place.copy_(x)
        _native.up_forward(y, None, own)
        return [joined]

    return call


def upsample_backward(grads: list[Tensor], y: Tensor, row: list[Tensor]) -> Call:
    *drow, dup = grads[0].split([*(x.shape[1] for x in row), y.shape[1]], 1)
    dy = blank(y, *y.shape[1:])

    def call() -> list[Tensor]:
        _native.up_backward(dup, None, None, dy)
        return [dy, *drow]

    return call


def spatial_gate_forward(y: Tensor, attention: Tensor, row: list[Tensor], return_means: bool) -> Call:
    joined, places, own = _joined(y, row)
    sums = _native.Sums(joined, joined.shape[1]) if return_means else None

    def call() -> list[Tensor]:
        first = 0
        for x, place in zip(row, places, strict=True):
            if return_means:
                _native.affine(x, place, sums=sums, first=first, like=y)
            else:
                place.copy_(x)
            first += x.shape[1]
        _native.up_forward(y, attention, own, sums, first)
        return [joined, sums.means()] if return_means else [joined]

    return call


def spatial_gate_backward(
    grads: list[Tensor], y: Tensor, attention: Tensor, row: list[Tensor], return_means: bool
) -> Call:
    dout, before = grads[0], sum(x.shape[1] for x in row)
    dy, dattention = blank(y, *y.shape[1:]), blank(attention, *attention.shape[1:])
    drow = blank(y, before, *dout.shape[2:]) if return_means else dout[:, :before]

    def call() -> list[Tensor]:
        shift = grads[1].float() / (dout.shape[2] * dout.shape[3]) if return_means else None
        own_shift = None if shift is None else shift[:, before:]
        _native.up_backward(dout[:, before:], attention, own_shift, dy)
        _native.gate_backward(dout[:, before:], y, own_shift, dattention)
        if return_means and before:
            _native.affine(dout[:, :before], drow, shift=shift[:, :before], like=y)
        return [dy, dattention, *(drow.split([x.shape[1] for x in row], 1) if row else ())]

    return call


def channel_gate_forward(x: Tensor, w1: Tensor, w2: Tensor, means: Tensor | None) -> Call:
    out = blank(x, *x.shape[1:])

    def call() -> list[Tensor]:
        known = _native.dot(x, None).means() if means is None else means
        _native.affine(x, out, excite(known, w1, w2))
        return [out]

    return call


def channel_gate_backward(grads: list[Tensor], x: Tensor, w1: Tensor, w2: Tensor, means: Tensor | None) -> Call:
    dout, dx = grads[0], blank(x, *x.shape[1:])
    known = _native.dot(x, None).means() if means is None else means

    def call() -> list[Tensor]:
        dmeans, dw1, dw2 = excite_backward(_native.dot(dout, x).total(), known, w1, w2)
        shift = dmeans / (x.shape[2] * x.shape[3]) if means is None else None
        _native.affine(dout, dx, excite(known, w1, w2), shift)
        return [dx, dw1, dw2] if means is None else [dx, dw1, dw2, dmeans]

    return call


def batch_norm_relu_forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> Call:
    out = blank(x, *x.shape[1:])

    def call() -> list[Tensor]:
        pivot = per_channel.pivot(x)
        sums = _native.moments(x, per_channel.for_slices(pivot, x)).over_batch()
        mean, var = per_channel.statistics(sums, pivot, per_channel.count_of(x))
        scale, shift = (per_channel.for_slices(each, x) for each in per_channel.forward(weight, bias, mean, var, eps))
        _native.norm(x, residual, scale, shift, out)
        return [out, mean, var]

    return call


def batch_norm_relu_backward(
    grads: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> Call:
    y, mean, var = (t.clone() for t in batch_norm_relu_forward(x, weight, bias, residual, eps)())
    dx, masked = blank(x, *x.shape[1:]), None if residual is None else blank(x, *x.shape[1:])

    def call() -> list[Tensor]:
        sums = _native.norm_sums(grads[0], y, x, per_channel.for_slices(mean, x), masked).over_batch()
        *three, dweight, dbias = per_channel.backward(sums, weight, mean, var, eps, per_channel.count_of(x))
        gradient, mask = (grads[0], y) if masked is None else (masked, None)
        _native.norm_backward(gradient, mask, x, *(per_channel.for_slices(each, x) for each in three), dx)
        return [dx, dweight.to(weight.dtype), dbias.to(bias.dtype), *([] if masked is None else [masked])]

    return call


CALLS = {
    ("upsample", "forward"): upsample_forward,
    ("upsample", "backward"): upsample_backward,
    ("spatial_gate", "forward"): spatial_gate_forward,
    ("spatial_gate", "backward"): spatial_gate_backward,
    ("channel_gate", "forward"): channel_gate_forward,
    ("channel_gate", "backward"): channel_gate_backward,
    ("batch_norm_relu", "forward"): batch_norm_relu_forward,
    ("batch_norm_relu", "backward"): batch_norm_relu_backward,
}


def _joined(y: Tensor, row: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """The result, the places of the row in it and that of the upsampled ``y``."""
    channels = [*(x.shape[1] for x in row), y.shape[1]]
    joined = blank(y, sum(channels), 2 * y.shape[2], 2 * y.shape[3])
    *places, own = joined.split(channels, 1)
    return joined, tuple(places), own
