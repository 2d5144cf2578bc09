"""The definition in stock operators, differentiable and clean in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import accumulator, memory_format


def why_not(*args) -> None:
    return None


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, [C]."""
    var, mean = torch.var_mean(x.to(accumulator(x.dtype)), (0, 2, 3), correction=0)
    return mean, var


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = statistics(x)
    return normalize(x, weight, bias, residual, mean, var, eps), mean.detach(), var.detach()


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    out = _normalized(x, mean, var, eps) * _of_channels(weight.to(mean.dtype)) + _of_channels(bias.to(mean.dtype))
    if residual is not None:
        out = out + residual
    return out.relu().to(x.dtype).contiguous(memory_format=memory_format(x))


def backward(
    dout: Tensor, x: Tensor, out: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, has_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient = torch.where(out <= 0, 0, dout).to(mean.dtype)
    normalized = _normalized(x, mean, var, eps)
    dbias, dweight = gradient.sum((0, 2, 3)), (gradient * normalized).sum((0, 2, 3))
    count = x.shape[0] * x.shape[2] * x.shape[3]
    centred = gradient - _of_channels(dbias / count) - normalized * _of_channels(dweight / count)
    dx = centred * _of_channels(weight.to(mean.dtype) * (var + eps).rsqrt())
    dresidual = gradient.to(x.dtype) if has_residual else x.new_empty((0,))
    laid_out = [t.to(x.dtype).contiguous(memory_format=memory_format(x)) if t.ndim == 4 else t for t in (dx, dresidual)]
    return laid_out[0], dweight.to(weight.dtype), dbias.to(weight.dtype), laid_out[1]


def _of_channels(values: Tensor) -> Tensor:
    return values[:, None, None]


def _normalized(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (x.to(mean.dtype) - _of_channels(mean)) * _of_channels((var + eps).rsqrt())
