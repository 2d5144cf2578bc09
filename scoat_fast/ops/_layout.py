"""Memory layouts and dtypes: what a result has, and what the kernels read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # float64 is the reference's alone


def is_channels_last(x: Tensor) -> bool:
    """Whether neighbouring channels lie side by side, also in a slice of a larger tensor."""
    return x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of a result that is laid out as ``x``."""
    if torch.jit.is_tracing():  # sizes are tensors there, and not to be looked at
        dense = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return torch.channels_last if dense else torch.contiguous_format
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def new_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised tensor [N, channels, height, width] of the dtype, device and layout of ``x``."""
    size = (x.shape[0], channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over a tensor of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def why_no_kernel(tensors: Iterable[Tensor], channels_last: bool) -> str | None:
    """Why no kernel takes these [N, C, H, W] tensors, or None: their dtype, or strides that would be read wrongly.

    Kernels want rows without gaps, of channels in channels-last and of pixels otherwise; a slice of a larger tensor
    of that layout is read as it is. Maps of one channel want rows of pixels in both. What is broadcast over pixels is
    not channels-last: what is laid out like it would not be, either.
    """
    for x in tensors:
        if x.dtype not in KERNEL_DTYPES:
            return f"needs float32, float16 or bfloat16, got {x.dtype}"
        size, stride = x.shape, x.stride()
        if channels_last and size[1] > 1:
            fits = is_channels_last(x) or (size[2] == size[3] == stride[1] == 1)
        else:
            fits = size[3] == 1 or stride[3] == 1
        if x.numel() and not fits:
            layout = "channels-last" if channels_last else "contiguous"
            return f"needs {layout} tensors or slices of such, got {list(size)} with strides {list(stride)}"
    return None
