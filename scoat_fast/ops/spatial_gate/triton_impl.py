"""The Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton_launch as kernels
from .._layout import new_like


def why_not(*args) -> str | None:
    """For the arguments of the forward pass (y, attention, row, ...) or of the backward (dout, dmeans, y, ...)."""
    if isinstance(args[2], Tensor):
        dout, dmeans, y, attention = args
        return kernels.why_not(y, [dout, dmeans, attention])
    y, attention, row, _ = args
    return kernels.why_not(y, [attention, *row])


def forward(y: Tensor, attention: Tensor, row: list[Tensor], return_means: bool) -> tuple[Tensor, Tensor]:
    channels = [*(x.shape[1] for x in row), y.shape[1]]
    out = new_like(y, sum(channels), *attention.shape[2:])
    *before, own = out.split(channels, 1)
    launches = [kernels.affine(x, place) for x, place in zip(row, before, strict=True)]
    launches.append(kernels.up_forward(y, attention, own))
    if return_means:
        return out, kernels.sums(*launches) / (out.shape[2] * out.shape[3])
    for launch in launches:
        launch.run()
    return out, torch.empty((len(y), 0), dtype=torch.float32, device=y.device)


def backward(dout: Tensor, dmeans: Tensor | None, y: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    before = dout.shape[1] - y.shape[1]
    shift = own_shift = None
    if dmeans is not None:
        shift = dmeans.contiguous() / (dout.shape[2] * dout.shape[3])
        own_shift = shift[:, before:]
    dy = new_like(y, *y.shape[1:])
    kernels.up_backward(dout[:, before:], attention, own_shift, dy).run()
    dattention = _gate_backward(dout[:, before:], own_shift, y, attention)
    drow = new_like(y, 0 if dmeans is None else before, *dout.shape[2:])
    if drow.shape[1]:
        kernels.affine(dout[:, :before], drow, shift=shift).run()
    return dy, dattention, drow


def _gate_backward(dout: Tensor, shift: Tensor | None, y: Tensor, attention: Tensor) -> Tensor:
    dattention = torch.empty_like(attention, memory_format=torch.contiguous_format)
    parts = kernels.gate_parts(y)
    if parts == 1:
        kernels.gate_backward(dout, shift, y, dattention[None]).run()
        return dattention
    partial = torch.empty((parts, *attention.shape), dtype=torch.float32, device=y.device)
    kernels.gate_backward(dout, shift, y, partial).run()
    return dattention.copy_(partial.sum(0))
