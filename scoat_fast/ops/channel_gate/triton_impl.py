"""The Triton kernels."""

from __future__ import annotations

from torch import Tensor

from .. import _triton_launch as kernels
from .._layout import new_like
from .excite import excite, excite_backward


def why_not(main: Tensor, *others) -> str | None:
    """For the arguments of the forward pass (x, ...) and of the backward (dout, x, ...)."""
    return kernels.why_not(main, [x for x in others if isinstance(x, Tensor)])


def forward(x: Tensor, w1: Tensor, w2: Tensor, means: Tensor | None) -> tuple[Tensor, Tensor]:
    known = kernels.sums(kernels.dot(x, None)) / (x.shape[2] * x.shape[3]) if means is None else means
    out = new_like(x, *x.shape[1:])
    kernels.affine(x, out, excite(known, w1, w2)).run()
    return out, known if means is None else known.new_empty((len(x), 0))


def backward(
    dout: Tensor, x: Tensor, w1: Tensor, w2: Tensor, means: Tensor, given: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dscale = kernels.sums(kernels.dot(dout, x))
    dmeans, dw1, dw2 = excite_backward(dscale, means, w1, w2)
    dx = new_like(x, *x.shape[1:])
    shift = None if given else dmeans / (x.shape[2] * x.shape[3])
    kernels.affine(dout, dx, excite(means, w1, w2), shift).run()
    return dx, dw1, dw2, dmeans if given else dmeans.new_empty((len(x), 0))
