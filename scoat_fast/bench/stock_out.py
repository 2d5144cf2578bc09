"""Stock torch with preallocated outputs: each step of an operation's ``stock``, in its ``out=`` variant.

A function takes the arguments of the operation and, backwards, the gradients of its outputs before them. It returns
the call to time, which writes into the same tensors every time and returns them. What autograd would have saved in
the forward pass is there before the call. Vectors of a few kilobytes are allocated as they come.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops._layout import new_like
from ..ops.channel_gate.excite import excite

Call = Callable[[], list[Tensor]]
aten = torch.ops.aten


def blank(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A tensor laid out as ``x`` and full of NaN, so that what a call leaves out shows."""
    return new_like(x, channels, height, width).fill_(torch.nan)


def upsample_forward(y: Tensor, row: list[Tensor]) -> Call:
    up = _upsampled(y)
    joined = _joined(up, row)

    def call() -> list[Tensor]:
        _up(y, up)
        return [torch.cat([*row, up], 1, out=joined) if row else up]

    return call


def upsample_backward(grads: list[Tensor], y: Tensor, row: list[Tensor]) -> Call:
    *drow, dup = _split(grads[0], row, y)
    dy = blank(y, *y.shape[1:])
    return lambda: [_up_backward(dup, dy), *drow]


def spatial_gate_forward(y: Tensor, attention: Tensor, row: list[Tensor], return_means: bool) -> Call:
    up, gated, gate = _upsampled(y), _upsampled(y), torch.empty_like(attention)
    joined = _joined(gated, row)
    means = y.new_full(joined.shape[:2], torch.nan)

    def call() -> list[Tensor]:
        _up(y, up)
        torch.add(attention, 1, out=gate)
        torch.mul(gate, up, out=gated)
        if row:
            torch.cat([*row, gated], 1, out=joined)
        return [joined, torch.mean(joined, (2, 3), out=means)] if return_means else [joined]

    return call


def spatial_gate_backward(
    grads: list[Tensor], y: Tensor, attention: Tensor, row: list[Tensor], return_means: bool
) -> Call:
    dout = grads[0]
    gate, up = 1 + attention, _up(y, _upsampled(y))
    dgated_up, product = _upsampled(y), _upsampled(y)
    dy, dattention = blank(y, *y.shape[1:]), blank(attention, *attention.shape[1:])
    whole = blank(dout, *dout.shape[1:]) if return_means else dout
    *drow, dgated = _split(whole, row, y)

    def call() -> list[Tensor]:
        if return_means:
            torch.add(dout, _per_channel(grads[1] / _pixels(dout)), out=whole)
        torch.mul(dgated, gate, out=dgated_up)
        _up_backward(dgated_up, dy)
        torch.mul(dgated, up, out=product)
        torch.sum(product, 1, keepdim=True, out=dattention)
        return [dy, dattention, *drow]

    return call


def channel_gate_forward(x: Tensor, w1: Tensor, w2: Tensor, means: Tensor | None) -> Call:
    out, own = blank(x, *x.shape[1:]), x.new_empty(x.shape[:2])

    def call() -> list[Tensor]:
        known = torch.mean(x, (2, 3), out=own) if means is None else means.to(x.dtype)
        return [torch.mul(x, _per_channel(excite(known, w1, w2)), out=out)]

    return call


def channel_gate_backward(grads: list[Tensor], x: Tensor, w1: Tensor, w2: Tensor, means: Tensor | None) -> Call:
    dout = grads[0]
    known = x.mean((2, 3)) if means is None else means.to(x.dtype)
    small = [leaf.detach().requires_grad_() for leaf in (known, w1, w2)]
    scale = excite(*small)
    dscale, dx, product = torch.empty_like(known), blank(x, *x.shape[1:]), blank(x, *x.shape[1:])

    def call() -> list[Tensor]:
        torch.mul(dout, x, out=product)
        torch.sum(product, (2, 3), out=dscale)
        dmeans, dw1, dw2 = torch.autograd.grad(scale, small, dscale, retain_graph=True)
        torch.mul(dout, _per_channel(scale), out=dx)
        if means is not None:
            return [dx, dw1, dw2, dmeans]
        return [dx.add_(_per_channel(dmeans / _pixels(x))), dw1, dw2]

    return call


def batch_norm_relu_forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> Call:
    normalized, total, out = (blank(x, *x.shape[1:]) for _ in range(3))
    mean, inverse = torch.empty_like(weight), torch.empty_like(weight)

    def call() -> list[Tensor]:
        whole, known = {"out": normalized, "save_mean": mean, "save_invstd": inverse}, (None, None, True, 0.1, eps)
        aten.native_batch_norm.out(x, weight, bias, *known, **whole)
        if residual is not None:
            torch.add(normalized, residual, out=total)
        aten.relu.out(normalized if residual is None else total, out=out)
        return [out, mean, inverse**-2 - eps]

    return call


def batch_norm_relu_backward(
    grads: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> Call:
    y, mean, var = (t.clone() for t in batch_norm_relu_forward(x, weight, bias, residual, eps)())
    inverse, masked, dx = (var + eps).rsqrt(), blank(x, *x.shape[1:]), blank(x, *x.shape[1:])
    outputs = {"out0": dx, "out1": torch.empty_like(weight), "out2": torch.empty_like(bias)}

    def call() -> list[Tensor]:
        aten.threshold_backward.grad_input(grads[0], y, 0, grad_input=masked)
        known = (None, None, mean, inverse, True, eps, (True, True, True))
        aten.native_batch_norm_backward.out(masked, x, weight, *known, **outputs)
        return [*outputs.values(), *([] if residual is None else [masked])]

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


def _upsampled(y: Tensor) -> Tensor:
    return blank(y, y.shape[1], 2 * y.shape[2], 2 * y.shape[3])


def _joined(up: Tensor, row: list[Tensor]) -> Tensor:
    return blank(up, sum(x.shape[1] for x in row) + up.shape[1], *up.shape[2:]) if row else up


def _split(joined: Tensor, row: list[Tensor], y: Tensor) -> tuple[Tensor, ...]:
    return joined.split([*(x.shape[1] for x in row), y.shape[1]], 1)


def _up(y: Tensor, out: Tensor) -> Tensor:
    return aten.upsample_bilinear2d.out(y, out.shape[2:], True, out=out)


def _up_backward(dup: Tensor, dy: Tensor) -> Tensor:
    return aten.upsample_bilinear2d_backward.grad_input(dup, dup.shape[2:], dy.shape, True, grad_input=dy)


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def _per_channel(x: Tensor) -> Tensor:
    return x[:, :, None, None]
