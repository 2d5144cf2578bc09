"""The definition in stock operators, differentiable and clean in float64."""

from __future__ import annotations

from torch import Tensor

from .._layout import accumulator, memory_format
from .excite import excite, excite_backward


def why_not(*args) -> None:
    return None


def forward(x: Tensor, w1: Tensor, w2: Tensor, means: Tensor | None) -> tuple[Tensor, Tensor]:
    exact = accumulator(x.dtype)
    known = x.mean((2, 3), dtype=exact) if means is None else means
    out = x * excite(known, w1, w2).to(x.dtype)[:, :, None, None]
    return out.contiguous(memory_format=memory_format(x)), known if means is None else known.new_empty((x.shape[0], 0))


def backward(
    dout: Tensor, x: Tensor, w1: Tensor, w2: Tensor, means: Tensor, given: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dscale = (dout.to(means.dtype) * x.to(means.dtype)).sum((2, 3))
    dmeans, dw1, dw2 = excite_backward(dscale, means, w1, w2)
    dx = dout * excite(means, w1, w2).to(x.dtype)[:, :, None, None]
    if not given:
        dx = dx + (dmeans / (x.shape[2] * x.shape[3])).to(x.dtype)[:, :, None, None]
    return (
        dx.contiguous(memory_format=memory_format(x)),
        dw1,
        dw2,
        dmeans if given else dmeans.new_empty((x.shape[0], 0)),
    )
