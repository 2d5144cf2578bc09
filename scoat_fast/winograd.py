"""The gradient of 3x3 weights on a CPU, by the adjoint of Winograd's algorithm: ``csrc/training_cpu.cpp``.

Where channels come last, stock PyTorch takes up to a multiple of the time for that gradient. Of sums over many pixels,
both round alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops._backend import disabled, stock_only

TILES = 24  # that are transformed at once
# Channels of the input and tiles of a batch from which on this is faster than stock PyTorch.
LEAST_CHANNELS, LEAST_TILES = 8, 64
PART = 96  # tiles of a part of the sums, of which there are as many as fit into MOST_BYTES and no more than MOST_PARTS
MOST_PARTS, MOST_BYTES = 64, 2**26
ROUNDINGS = 32


def why_not_here() -> str | None:
    """Why ``weight_gradient`` runs on no tensor of this machine, or None."""
    if (off := disabled("convolution", "cpu")) is not None:
        return off
    try:
        from . import _C
    except ImportError as error:
        return f"cannot be loaded: {error}"
    return None if hasattr(_C.cpu, "weight_gradient") else "is not in the extension, which was built before"


def why_not(x: Tensor) -> str | None:
    """Why ``weight_gradient`` does not run for an input, or None where it does."""
    if (reason := why_not_here()) is not None:
        return reason
    # it reads memory, and so nothing that stands for a tensor or records what is done to one
    plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not plain or torch._C._len_torch_dispatch_stack():
        return "wants a plain tensor"
    if stock_only():
        return "is no standard operator, which a transform or a trace wants"
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return f"wants float32 on cpu, got {str(x.dtype)[6:]} on {x.device}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "wants channels to come last"
    if x.shape[1] < LEAST_CHANNELS:
        return f"is faster from {LEAST_CHANNELS} channels on, got {x.shape[1]}"
    if (count := _tiles(x)) < LEAST_TILES:
        return f"is faster from {LEAST_TILES} tiles of 4x4 pixels on, got {count}"
    return None


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weights of a 3x3 convolution with a border of one zero: [D, C, 3, 3].

    Its bits depend on no number of threads. ``dy`` is [N, D, H, W] and ``x`` [N, C, H, W], plain float32 tensors on a
    CPU, ``x`` with channels last.
    """
    from . import _C

    dy = dy.contiguous(memory_format=torch.channels_last)
    (n, channels, height, width), out = x.shape, dy.shape[1]
    parts = min(-(-_tiles(x) // PART), MOST_PARTS, max(MOST_BYTES // (36 * channels * out * 4), 1))
    sums, result = (
        torch.empty(shape, dtype=torch.float32, device="cpu")
        for shape in ((parts, 36, channels, out), (3, 3, channels, out))
    )
    source, gradient = ((t.data_ptr(), t.stride(0), t.stride(2), t.stride(3), t.shape[1]) for t in (x, dy))
    _C.cpu.weight_gradient(
        size=(n, height, width),
        tiles=TILES,
        parts=parts,
        source=source,
        gradient=gradient,
        sums=sums.data_ptr(),
        out=result.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return result.permute(3, 2, 0, 1)


def rounding(dy: Tensor, x: Tensor) -> Tensor:
    """What rounding may take each gradient of ``weight_gradient`` from the exact one: float64 [D, C, 1, 1].

    Points have part in all nine taps, and so has what they round. Of the largest sum of magnitudes, errors were seen of
    up to 18 units of rounding.
    """
    shape = (dy.shape[1], x.shape[1], 3, 3)
    magnitudes = torch.nn.grad.conv2d_weight(x.abs().double(), shape, dy.abs().double(), padding=1)
    return ROUNDINGS * 2.0**-24 * magnitudes.amax((2, 3), keepdim=True)


def _tiles(x: Tensor) -> int:
    n, _, height, width = x.shape
    return n * -(-height // 4) * -(-width // 4)
