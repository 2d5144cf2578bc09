"""Batch normalisation in training (S. Ioffe and C. Szegedy, arXiv:1502.03167), then a residual and ReLU.

One pass over ``x`` for its statistics, one to normalise, add and clip; backward, one for two sums and one for ``dx``.
What lies between normalisation and ReLU is never written, and nothing but ``x`` and the result is kept for the backward
pass, which the convolutions before and after keep anyway; ``normalize_again`` makes the result from ``x``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _layout
from .._backend import choose
from .._register import Operation, register
from . import reference


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """``relu((x - mean) / sqrt(var + eps) * weight + bias + residual)``, by the statistics of this batch.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64, with at least two values in a channel. Kernels compute
            in float32, their statistics in float64.
        weight, bias: [C], with the device of ``x`` and its dtype, or float32.
        residual: [N, C, H, W], with the dtype and device of ``x``.
        eps: is added to the variance.

    Returns:
        A new tensor with the shape and dtype of ``x``, channels-last where ``x`` is; and, without gradients, the mean
        and the biased variance of each channel, [C] in float32 (float64 for float64), for running statistics.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or a channel has fewer than two values.
    """
    return _forward(x, weight, bias, residual, eps)


def normalize_again(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The first of ``batch_norm_relu(x, weight, bias, None, eps)`` from the other two, bit for bit; no gradients."""
    return choose("batch_norm_relu", x, weight, bias, None, eps).normalize(x, weight, bias, None, mean, var, eps)


def check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> None:
    _checks.four_dimensional("batch_norm_relu", x=x)
    if x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise ValueError(f"batch_norm_relu: a channel of x must have two values or more, got x {list(x.shape)}")
    if weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise ValueError(
            f"batch_norm_relu: weight and bias must be [{x.shape[1]}] for x {list(x.shape)}, "
            f"got {list(weight.shape)} and {list(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"batch_norm_relu: residual must be {list(x.shape)} as x is, got {list(residual.shape)}")
    _checks.same_kind("batch_norm_relu", x=x, **({} if residual is None else {"residual": residual}))
    exact = weight.dtype == _layout.accumulator(x.dtype) and weight.device == x.device
    _checks.same_kind("batch_norm_relu", **({} if exact else {"x": x}), weight=weight, bias=bias)


def _outputs(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    statistics = [x.new_empty(x.shape[1:2], dtype=_layout.accumulator(x.dtype)) for _ in range(2)]
    return _layout.new_like(x, *x.shape[1:]), *statistics


def _outputs_backward(
    dout: Tensor, x: Tensor, out: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, has_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = _layout.new_like(x, *x.shape[1:])
    return (
        dx,
        torch.empty_like(weight),
        torch.empty_like(weight),
        torch.empty_like(dx) if has_residual else x.new_empty((0,)),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, residual, ctx.eps = inputs
    out, mean, var = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, out, weight, mean, var)
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None, None
    x, out, weight, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient that is itself differentiated runs in stock operators
        mean, var = reference.statistics(x)
        grads = reference.backward(dout, x, out, weight, mean, var, ctx.eps, ctx.has_residual)
    else:
        grads = _backward_overload(dout, x, out, weight, mean, var, ctx.eps, ctx.has_residual)
    return *grads[:3], grads[3] if ctx.has_residual else None, None


_forward, _overload, _backward_overload = register(
    "batch_norm_relu",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)",
    "(Tensor dout, Tensor x, Tensor out, Tensor weight, Tensor mean, Tensor var, float eps, bool has_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    check,
    _outputs,
    _outputs_backward,
    _setup_context,
    _backward,
    # as stock autocast, under which a normalisation keeps the dtype of its input
    lambda cast, x, weight, bias, residual, eps: (
        x,
        weight,
        bias,
        None if residual is None else residual.to(x.dtype),
        eps,
    ),
    reference.forward,
)


def _stock(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5):
    out = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    var, mean = torch.var_mean(x.detach().to(_layout.accumulator(x.dtype)), (0, 2, 3), correction=0)
    return F.relu(out if residual is None else out + residual), mean, var


OPERATION = Operation("batch_norm_relu", batch_norm_relu, _overload, _stock)
