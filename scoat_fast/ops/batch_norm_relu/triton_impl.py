"""The Triton kernels."""

from __future__ import annotations

from torch import Tensor

from .. import _triton_launch as kernels
from .._layout import new_like
from . import coefficients as per_channel


def why_not(main: Tensor, *others) -> str | None:
    """For the arguments of the forward pass (x, ...) and of the backward (dout, x, ...)."""
    return kernels.why_not(main, [x for x in others if isinstance(x, Tensor)])


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    pivot = per_channel.pivot(x)
    sums = kernels.two_sums(kernels.moments(x, per_channel.for_slices(pivot, x)))
    mean, var = per_channel.statistics(sums, pivot, per_channel.count_of(x))
    return normalize(x, weight, bias, residual, mean, var, eps), mean, var


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    scale, shift = per_channel.forward(weight, bias, mean, var, eps)
    out = new_like(x, *x.shape[1:])
    kernels.norm(x, residual, per_channel.for_slices(scale, x), per_channel.for_slices(shift, x), out).run()
    return out


def backward(
    dout: Tensor, x: Tensor, out: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, has_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient = new_like(x, *x.shape[1:]) if has_residual else None
    sums = kernels.two_sums(kernels.norm_sums(dout, out, x, per_channel.for_slices(mean, x), gradient))
    *three, dweight, dbias = per_channel.backward(sums, weight, mean, var, eps, per_channel.count_of(x))
    three, dx = [per_channel.for_slices(each, x) for each in three], new_like(x, *x.shape[1:])
    if has_residual:
        kernels.norm_backward(gradient, None, x, *three, dx).run()
    else:
        kernels.norm_backward(dout, out, x, *three, dx).run()
    dresidual = gradient if has_residual else x.new_empty((0,))
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), dresidual
