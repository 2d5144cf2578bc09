"""The kernels of ``csrc`` on tensors: CUDA on a GPU, the same arithmetic with OpenMP on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _C  # an ImportError here is the reason that is printed
from ._layout import is_channels_last, why_no_kernel

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def why_not(main: Tensor, others: Iterable[Tensor | None] = ()) -> str | None:
    """Why the kernels cannot run on these tensors, which are read in the layout of ``main``."""
    if main.is_cuda:
        reason = why_no_cuda(main.device.index)
        if reason is not None:
            return reason
    return why_no_kernel([main, *(x for x in others if x is not None)], is_channels_last(main))


@functools.cache
def why_no_cuda(device: int) -> str | None:
    """Why the CUDA kernels of this build run on no tensor of a device: not built, no code for it, an old driver."""
    if not hasattr(_C, "cuda"):
        return "was built without nvcc (see scoat-fast doctor)"
    with torch.cuda.device(device):
        return _C.cuda.why_not() or None


class Sums:
    """Sums over the pixels of tensors [N, C, H, W], gathered tile by tile and always added in the same order."""

    def __init__(self, x: Tensor, channels: int, partial: Tensor | None = None):
        """For all ``channels`` of a concatenation with the height and width of ``x``.

        ``partial`` [N, tiles, channels] is where they go, if that is somebody else's memory.
        """
        tiles = _kernels(x).tiles(*x.shape[2:])
        self.pixels = x.shape[2] * x.shape[3]
        if partial is None:
            partial = torch.empty((len(x), tiles, channels), dtype=torch.float32, device=x.device)
        self.partial = partial

    def total(self) -> Tensor:  # [N, C]
        return self.partial.sum(1)

    def over_batch(self) -> Tensor:  # [C] in float64
        return self.partial.sum((0, 1), dtype=torch.float64)

    def means(self) -> Tensor:  # [N, C]
        return self.total() / self.pixels


def up_forward(y: Tensor, gate: Tensor | None, out: Tensor, sums: Sums | None = None, first: int = 0) -> None:
    """out = (1 + gate) * up(y), for the channels of a concatenation from ``first`` on."""
    _launch("up_forward", y.shape, y, a=y, gate=gate, out=out, sums=sums, first=first)


def up_backward(dout: Tensor, gate: Tensor | None, shift: Tensor | None, dy: Tensor) -> None:
    """dy = up^T((1 + gate) * (dout + shift))"""
    _launch("up_backward", dy.shape, dout, a=dout, gate=gate, shift=shift, out=dy)


def gate_backward(dout: Tensor, y: Tensor, shift: Tensor | None, dgate: Tensor) -> None:
    """dgate = sum over channels of (dout + shift) * up(y)"""
    _launch("gate_backward", y.shape, y, a=dout, b=y, shift=shift, out=dgate)


def affine(
    x: Tensor,
    out: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sums: Sums | None = None,
    first: int = 0,
    like: Tensor | None = None,
) -> None:
    """out = x * scale + shift, with a scale and a shift [N, C] in float32 for every channel.

    ``like`` has the layout of both, where they may be single channels, which do not tell.
    """
    _launch(
        "affine", x.shape, x if like is None else like, a=x, out=out, scale=scale, shift=shift, sums=sums, first=first
    )


def dot(a: Tensor, b: Tensor | None) -> Sums:
    """The sums of a * b, of a alone without b."""
    sums = Sums(a, a.shape[1])
    _launch("dot", a.shape, a, a=a, b=b, sums=sums)
    return sums


def moments(x: Tensor, pivot: Tensor) -> Sums:
    """The sums of x - pivot [N, C], then those of its square: for 2 C channels."""
    sums = Sums(x, 2 * x.shape[1])
    _launch("moments", x.shape, x, a=x, shift=pivot, sums=sums)
    return sums


def norm(x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = relu(x * scale + shift + residual)"""
    _launch("norm", x.shape, x, a=x, b=residual, scale=scale, shift=shift, out=out)


def norm_sums(dout: Tensor, y: Tensor, x: Tensor, mean: Tensor, out: Tensor | None) -> Sums:
    """out = dout where y > 0, else 0; its sums, then those of out * (x - mean): for 2 C channels."""
    sums = Sums(x, 2 * x.shape[1])
    _launch("norm_sums", x.shape, dout, a=dout, b=y, gate=x, shift=mean, out=out, sums=sums)
    return sums


def norm_backward(
    dout: Tensor, y: Tensor | None, x: Tensor, scale: Tensor, slope: Tensor, shift: Tensor, out: Tensor
) -> None:
    """out = g * scale + x * slope + shift, with g = dout where y > 0, else 0; g = dout without y."""
    _launch("norm_backward", x.shape, dout, a=dout, b=y, gate=x, scale=scale, slope=slope, shift=shift, out=out)


def _kernels(x: Tensor):
    return _C.cuda if x.is_cuda else _C.cpu


def _launch(
    kernel: str,
    shape: torch.Size,
    main: Tensor,
    *,
    a: Tensor,
    b: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    slope: Tensor | None = None,
    sums: Sums | None = None,
    first: int = 0,
) -> None:
    """Launches on the stream of PyTorch; ``main`` has the layout that the kernel walks in."""
    if 0 in shape:
        return
    scale, shift, slope = (None if t is None else t.contiguous() for t in (scale, shift, slope))  # until the launch
    where = torch.cuda.current_stream(main.device).cuda_stream if main.is_cuda else torch.get_num_threads()
    arguments = {
        "dtype": DTYPES[main.dtype],
        "channels_last": is_channels_last(main),
        "shape": tuple(shape),
        "a": _view(a),
        "b": _view(b),
        "gate": _view(gate),
        "out": _view(out),
        "scale": 0 if scale is None else scale.data_ptr(),
        "shift": 0 if shift is None else shift.data_ptr(),
        "slope": 0 if slope is None else slope.data_ptr(),
        "sums": 0 if sums is None else sums.partial[:, :, first:].data_ptr(),
        "sum_channels": 0 if sums is None else sums.partial.shape[2],
        "where": where,
    }
    if main.is_cuda:
        with torch.cuda.device(main.device):
            getattr(_C.cuda, kernel)(**arguments)
    else:
        getattr(_C.cpu, kernel)(**arguments)


def _view(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else (x.data_ptr(), *x.stride())
