"""What launches the Triton kernels of the fused operations: their tiles, their arguments, and what they cannot take."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from . import _triton_kernels as kernels
from ._layout import is_channels_last, why_no_kernel

INTERPRETED = triton.knobs.runtime.interpret  # as triton.jit sees it: kernels then run on CPU tensors, for tests
WARPS = 4
WALK_WARPS = 8  # of contiguous tensors: a row of gates is then smaller than the program, and each thread reads its own
HALF = 32  # bytes a thread has of each of three tensors or four: so many values in float32 fill its registers
WALK_CHANNELS = 2  # of contiguous tensors, in a thread: they share its gates and weights
ENOUGH = 1024  # programs that keep any GPU busy


@dataclass(frozen=True)
class Launch:
    """A kernel with what it is launched with; ``tiles`` of pixels have their own sums."""

    kernel: triton.JITFunction
    programs: int
    tiles: int
    arguments: dict
    constants: dict
    warps: int = WARPS

    def into(self, sums: Tensor) -> Launch:
        """The same, which also writes its sums over pixels: float32 [N, tiles, C]."""
        return replace(self, arguments=self.arguments | _arguments({"sums": sums}))

    def run(self) -> None:
        if self.programs:
            with torch.cuda.device_of(next(iter(self.arguments.values()))):
                self.kernel[(self.programs,)](
                    **self.arguments, **self.constants, num_warps=self.warps, num_stages=1, enable_fp_fusion=True
                )


def up_forward(y: Tensor, gate: Tensor | None, out: Tensor, rows: int | None = None) -> Launch:
    """out [N, C, 2h, 2w] = (1 + gate [N, 1, 2h, 2w]) * up(y [N, C, h, w])

    With ``rows`` of y for each program, the tiles of an image are the same whatever N is.
    """
    return _walk(kernels.up_forward, y.shape, is_channels_last(y), rows, y=y, gate=gate, out=out, sums=None)


def up_backward(dout: Tensor, gate: Tensor | None, shift: Tensor | None, dy: Tensor) -> Launch:
    """dy [N, C, h, w] = up^T((1 + gate [N, 1, 2h, 2w]) * (dout [N, C, 2h, 2w] + shift [N, C]))"""
    return _walk(kernels.up_backward, dy.shape, is_channels_last(dout), None, dout=dout, gate=gate, shift=shift, dy=dy)


def _walk(kernel, shape, channels_last: bool, rows: int | None, **tensors: Tensor | None) -> Launch:
    (n, c, h, w), itemsize = shape, next(iter(tensors.values())).itemsize
    block_c, block_k = _walk_tile(shape, itemsize, channels_last)
    blocks, across = n * triton.cdiv(c, block_c), triton.cdiv(w, block_k)
    # long walks read fewer rows twice, short ones keep a GPU busy with few images
    if rows is None:
        rows = next((r for r in (16, 8, 4) if blocks * triton.cdiv(h, r) * across >= ENOUGH), 2)
    tiles = triton.cdiv(h, rows) * across
    arguments = _arguments(tensors, C=c, h=h, w=w, rows=rows)
    constants = {"CHANNELS_LAST": channels_last, "BLOCK_C": block_c, "BLOCK_K": block_k}
    return Launch(kernel, blocks * tiles, tiles, arguments, constants, WARPS if channels_last else WALK_WARPS)


def walk_tiles(shape, itemsize: int, rows: int) -> int:
    """Tiles of an image that ``up_forward`` cuts y [N, C, h, w] in channels-last into, given ``rows``."""
    return triton.cdiv(shape[2], rows) * triton.cdiv(shape[3], _walk_tile(shape, itemsize, True)[1])


def _walk_tile(shape, itemsize: int, channels_last: bool) -> tuple[int, int]:
    """Channels and columns of a tile of y. A thread has 16 bytes: of channels, or of the outputs in a row."""
    if channels_last:
        block_c = _block(shape[1], 128 // itemsize, 64 // itemsize)
        return block_c, 32 * WARPS * 16 // itemsize // block_c
    block_k = _block(shape[3], 64, 16)
    return WALK_CHANNELS * 32 * WALK_WARPS * 8 // itemsize // block_k, block_k


def gate_backward(dout: Tensor, shift: Tensor | None, y: Tensor, dgates: Tensor) -> Launch:
    """dgates [parts, N, 1, 2h, 2w] = the sum over a part of the channels of (dout + shift) * up(y [N, C, h, w])"""
    tensors = {"dout": dout, "shift": shift, "y": y, "dgate": dgates}
    if is_channels_last(y):
        return _walk(kernels.gate_backward_channels_last, y.shape, True, None, **tensors)
    (n, c, h, w), (rows, block_k) = y.shape, _gate_tile(y)
    tiles, channels = triton.cdiv(h, rows) * triton.cdiv(w, block_k), triton.cdiv(c, len(dgates))
    arguments = _arguments(tensors, C=c, h=h, w=w, channels=channels)
    constants = {"CHANNELS_LAST": False, "ROWS": rows, "BLOCK_K": block_k}
    return Launch(kernels.gate_backward_contiguous, n * tiles * len(dgates), tiles, arguments, constants, WARPS)


def gate_parts(y: Tensor) -> int:
    """Into how many parts ``gate_backward`` divides the channels, each with a map of its own."""
    n, c, h, w = y.shape
    if is_channels_last(y):
        return triton.cdiv(c, _walk_tile(y.shape, y.itemsize, True)[0])
    rows, block_k = _gate_tile(y)
    programs = max(n * triton.cdiv(h, rows) * triton.cdiv(w, block_k), 1)
    # so that few pixels still keep a GPU busy; but a map of float32 should be little beside its channels
    parts = min(triton.cdiv(ENOUGH, programs), triton.cdiv(c, 32))
    return triton.cdiv(c, triton.cdiv(c, parts))


def _gate_tile(y: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile of a contiguous tensor."""
    block_k = _block(y.shape[3], 64, 16)
    return 32 * WARPS * 8 // y.itemsize // block_k, block_k


def affine(x: Tensor, out: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Launch:
    """out = x * scale + shift, for [N, C, H, W] and float32 [N, C]"""
    x, out = _flat(x, out)
    return _point(kernels.affine, x=x, scale=scale, shift=shift, out=out, sums=None)


def dot(a: Tensor, b: Tensor | None) -> Launch:
    """The sums over pixels of a * b, of a alone without b, for ``sums``."""
    a, *others = _flat(a) if b is None else _flat(a, b)
    return _point(kernels.dot, a=a, b=others[0] if others else None, sums=None)


def moments(x: Tensor, pivot: Tensor) -> Launch:
    """The sums over pixels of x - pivot [N, C], then of its square, for ``two_sums``."""
    (x,) = _flat(x)
    return _point(kernels.moments, x=x, shift=pivot, sums=None)


def norm(x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, out: Tensor) -> Launch:
    """out = relu(x * scale + shift + residual), for [N, C, H, W] and float32 [N, C]"""
    x, residual, out = _flat(x, residual, out)
    return _point(kernels.norm, x=x, residual=residual, scale=scale, shift=shift, out=out, bytes=HALF)


def norm_sums(dout: Tensor, y: Tensor, x: Tensor, mean: Tensor, out: Tensor | None) -> Launch:
    """out = dout where y > 0, else 0; for ``two_sums`` its sums over pixels, then those of out * (x - mean)."""
    dout, y, x, out = _flat(dout, y, x, out)
    return _point(kernels.norm_sums, dout=dout, y=y, x=x, shift=mean, out=out, sums=None, bytes=HALF)


def norm_backward(
    dout: Tensor, y: Tensor | None, x: Tensor, scale: Tensor, slope: Tensor, shift: Tensor, out: Tensor
) -> Launch:
    """out = g * scale + x * slope + shift, with g = dout where y > 0, else 0; g = dout without y."""
    dout, y, x, out = _flat(dout, y, x, out)
    return _point(
        kernels.norm_backward, dout=dout, y=y, x=x, scale=scale, slope=slope, shift=shift, out=out, bytes=HALF
    )


def _point(kernel, bytes: int = 64, **tensors: Tensor | None) -> Launch:
    """``bytes`` of each tensor a thread."""
    main = next(iter(tensors.values()))
    (n, c, h, w), itemsize = main.shape, main.itemsize
    elements = 32 * WARPS * bytes // itemsize
    if is_channels_last(main):
        block_c = _block(c, 256 // itemsize, 64 // itemsize)
        block_k = elements // block_c
    else:
        block_k = _block(w, elements, 16)
        block_c = elements // block_k
    tiles = h * triton.cdiv(w, block_k)
    constants = {"CHANNELS_LAST": is_channels_last(main), "BLOCK_C": block_c, "BLOCK_K": block_k}
    return Launch(kernel, n * triton.cdiv(c, block_c) * tiles, tiles, _arguments(tensors, C=c, h=h, w=w), constants)


def _flat(*tensors: Tensor | None) -> list[Tensor | None]:
    """Images as single rows of pixels, where that is how all of them lie in memory."""
    n, _, h, w = tensors[0].shape
    if h * w < 2**30 and all(x is None or x.stride(2) == w * x.stride(3) for x in tensors):
        return [None if x is None else x.view(n, x.shape[1], 1, h * w) for x in tensors]
    return list(tensors)


def sums(*launches: Launch) -> Tensor:
    """Runs launches that each write some channels of a concatenation; its sums over pixels, float32 [N, C]."""
    first = launches[0].arguments
    x = next(iter(first.values()))
    tiles, channels = max(each.tiles for each in launches), [each.arguments["C"] for each in launches]
    partial = torch.zeros((len(x), tiles, sum(channels)), dtype=torch.float32, device=x.device)
    for each, place in zip(launches, partial.split(channels, 2), strict=True):
        each.into(place).run()
    return partial.sum(1)


def two_sums(launch: Launch) -> Tensor:
    """Runs a launch that writes two sums for each channel; both over batch and pixels, float64 [2 C]."""
    x, channels = next(iter(launch.arguments.values())), launch.arguments["C"]
    partial = torch.empty((len(x), launch.tiles, 2 * channels), dtype=torch.float32, device=x.device)
    launch.into(partial).run()
    return partial.sum((0, 1), dtype=torch.float64)


def why_not(main: Tensor, others: Iterable[Tensor | None]) -> str | None:
    """Why the kernels cannot run on these tensors, which are read in the layout of ``main``."""
    tensors = [main, *(x for x in others if x is not None)]
    for x in tensors:
        if x.device != main.device:
            return f"needs all tensors on one device, got {main.device} and {x.device}"
    reason = why_not_device(main.device)
    return reason or why_no_kernel([x for x in tensors if x.ndim == 4], is_channels_last(main))


def why_not_device(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device, or None where they can."""
    if device.type != "cuda":
        return None if INTERPRETED and device.type == "cpu" else f"needs CUDA tensors, got {device.type}"
    if capability(device) < (8, 0):
        return f"needs compute capability 8.0, got {'.'.join(map(str, capability(device)))}"
    if not _can_build_launchers():
        return "needs a C compiler and Python's headers: Triton builds the launchers of its kernels with them"
    return None


capability = cache(torch.cuda.get_device_capability)


@cache
def _can_build_launchers() -> bool:
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return headers.is_file() and any(shutil.which(name) for name in compilers if name)


def _arguments(tensors: dict[str, Tensor | None], **sizes: int) -> dict:
    """Every tensor with its strides, in the order of the kernels' parameters."""
    arguments = {}
    for name, x in tensors.items():
        arguments[name] = x
        stride = None if x is None else x.stride()
        if name in ("scale", "shift", "slope"):
            arguments[f"{name}_stride"] = stride and stride[0]
        else:
            arguments[f"{name}_strides"] = stride
    return arguments | sizes


def _block(size: int, largest: int, smallest: int) -> int:
    """The largest power of two that wastes less than an eighth on ``size``."""
    block = largest
    while block > smallest and triton.cdiv(size, block) * block > 1.125 * size:
        block //= 2
    return block
