"""The kernels of ``csrc``: CUDA on a GPU, OpenMP on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._layout import new_like


def why_not(*args) -> str | None:
    """For the arguments of the forward pass (y, attention, row, ...) and the backward (dout, dmeans, y, attention)."""
    if isinstance(args[2], Tensor):
        dout, _, y, attention = args
        return _native.why_not(y, [dout, attention])
    y, attention, row, _ = args
    return _native.why_not(y, [attention, *row])


def forward(y: Tensor, attention: Tensor, row: list[Tensor], return_means: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = y.shape
    channels = [*(x.shape[1] for x in row), c]
    out = new_like(y, sum(channels), 2 * h, 2 * w)
    sums = _native.Sums(out, sum(channels)) if return_means else None
    first = 0
    for x in row:
        place = out[:, first : first + x.shape[1]]
        if return_means:
            _native.affine(x, place, sums=sums, first=first, like=y)
        else:
            place.copy_(x)
        first += x.shape[1]
    _native.up_forward(y, attention, out[:, first:], sums, first)
    return out, sums.means() if return_means else torch.empty((n, 0), dtype=torch.float32, device=y.device)


def backward(dout: Tensor, dmeans: Tensor | None, y: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    before = dout.shape[1] - y.shape[1]
    shift = None if dmeans is None else dmeans / (dout.shape[2] * dout.shape[3])
    own_shift = None if shift is None else shift[:, before:]
    dy = new_like(y, *y.shape[1:])
    dattention = torch.empty_like(attention, memory_format=torch.contiguous_format)
    _native.up_backward(dout[:, before:], attention, own_shift, dy)
    _native.gate_backward(dout[:, before:], y, own_shift, dattention)
    drow = new_like(y, 0 if dmeans is None else before, *dout.shape[2:])
    if drow.numel():
        _native.affine(dout[:, :before], drow, shift=shift[:, :before], like=y)
    return dy, dattention, drow
