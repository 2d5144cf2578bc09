"""The plan in Triton kernels on a GPU, in float32, float16, bfloat16 or float8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops import _triton_launch as pointwise
from . import _triton_kernels as kernels
from .layout import FLOAT8, has_float8
from .pack import Weights, in_units
from .plan import Attend, Convolve, Excite, Gate, Head, Slice, Step
from .tune import chosen

View = Callable[[Slice], Tensor]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, FLOAT8)
GATE_ROWS = 8  # that a program walks down: the same for any batch, so that sums are
POINTS = 128  # pixels of a tile in the kernels that only move data

# Pixels of a tile, warps and stages of the pipeline, by GPU family and block of output channels. All but "sm80" read
# boxes through tensor descriptors, from which Hopper multiplies without registers; "sm80" reads by pointers. "sm90" is
# for 10.x, too, with 227 KiB of shared memory.
TILES = {
    "sm80": {16: (128, 4, 3), 32: (128, 4, 3), 64: (128, 4, 3), 128: (64, 4, 3)},
    "sm90": {16: (128, 4, 4), 32: (128, 4, 4), 64: (128, 4, 4), 128: (128, 8, 4)},
    "sm120": {16: (128, 4, 3), 32: (128, 4, 3), 64: (128, 4, 3), 128: (128, 8, 2)},  # 99 KiB
}
# Of float32 in every family: no tensor core multiplies it exactly, and what plain instructions multiply waits in
# registers.
FLOAT32_TILES = {16: (128, 4, 4), 32: (128, 8, 4), 64: (64, 4, 4), 128: (32, 8, 4)}
FLOAT32_DEPTH = 16
forced: str | None = None  # for tests: the family whose tiles are used


@dataclass(frozen=True)
class Tile:
    """How a matrix product is cut: ``pixels`` x ``channels``, ``depth`` at a time, and that ``rows`` times."""

    boxes: bool
    swap: bool
    rows: int
    pixels: int
    channels: int
    depth: int
    warps: int
    stages: int

    def count(self, height: int, width: int) -> int:
        """Tiles of an image."""
        if self.boxes or self.rows == 2:
            return height // self.rows * triton.cdiv(width, self.pixels)
        return triton.cdiv(height * width, self.pixels)

    @property
    def constants(self) -> dict:
        return {"BOXES": self.boxes, "BP": self.pixels, "BN": self.channels, "BK": self.depth, "STAGES": self.stages}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run on a device in a dtype, or None where it can."""
    if dtype not in DTYPES:
        return f"computes in float32, float16, bfloat16 or float8_e4m3fn, not in {str(dtype)[6:]}"
    if dtype == FLOAT8 and device.type == "cuda" and not has_float8(device):
        return f"needs compute capability 8.9 for float8, got {'.'.join(map(str, pointwise.capability(device)))}"
    return pointwise.why_not_device(device)


def parts(step: Step, height: int, width: int, device: torch.device, dtype: torch.dtype) -> int:
    """In how many parts a step leaves sums over ``height`` x ``width`` pixels: its tiles."""
    if isinstance(step, Gate):
        below = (1, step.out.channels, height // 2, width // 2)
        return pointwise.walk_tiles(below, dtype.itemsize, GATE_ROWS)
    return _tile_of(step, width, device, dtype).count(height, width)


def rows(step: Convolve, dtype: torch.dtype) -> int:
    """How many rows of weights a recalibrated step wants for each slice: its own, then those of its shortcut."""
    taps = step.size**2 + (step.shortcut is not None and step.shortcut.scaled)
    return taps * _padded(step.out.channels)


def fuses(step: Convolve, dtype: torch.dtype) -> bool:
    """Whether a plan for this backend may hold a convolution with a source ``below`` or ``taps``, such as this one."""
    return False


def kernel(step: Step, width: int, device: torch.device, dtype: torch.dtype) -> str:
    """What runs a step in rows of ``width`` pixels, for people to read: with its tile, and how it is read."""
    match step:
        case Convolve() | Attend():
            tile = _tile_of(step, width, device, dtype)
            name = "attend" if isinstance(step, Attend) else "convolve"
            name = f"scale_weights, {name}" if isinstance(step, Convolve) and step.scale is not None else name
            cut = f"{f'{tile.rows} x ' if tile.rows > 1 else ''}{tile.pixels}x{tile.channels}x{tile.depth}"
            read = "boxes" if tile.boxes else "pointers"
            return f"{name} {cut} by {read}, {tile.warps} warps, {tile.stages} stages"
        case Gate():
            return "up_forward"
        case Excite():
            return "means, excite"
        case Head():
            return f"head {POINTS} pixels"


def prepare(step: Step, weights: Weights, device: torch.device, dtype: torch.dtype) -> Weights:
    """Weights by name: those of products with features as ``_packed`` gives them."""
    if isinstance(step, Gate):
        return {}
    if isinstance(step, Excite):
        return {step.weights: tuple(x.to(device, torch.float32).contiguous() for x in weights[step.weights])}
    if isinstance(step, Head):
        weight, bias = weights[step.weights]
        by_tap = weight.permute(0, 2, 3, 1).reshape(len(weight), 9, -1)
        return {step.weights: (by_tap.to(device, torch.float32).contiguous(), bias.to(device, torch.float32))}
    if isinstance(step, Attend):
        psi, bias = (x.to(device, torch.float32).flatten() for x in weights[step.weights])
        return {step.project: _packed(*weights[step.project], device, dtype), step.weights: (psi, bias)}
    return {name: _packed(*weights[name], device, dtype, scaled) for name, scaled in step.products.items()}


def bind(step: Step, weights: Weights, view: View, pixels: int) -> Callable[[], None]:
    """A call that runs a step on the memory that ``view`` gives; a slice has ``pixels`` on the step's level."""
    ready = launches(step, weights, view, pixels)

    def run() -> None:
        for launch in ready:
            launch.run()

    return run


@dataclass(frozen=True)
class Launch:
    """A kernel with what it is launched with."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict
    warps: int = 4

    def run(self) -> None:
        if 0 not in self.grid:
            with torch.cuda.device_of(next(x for x in self.arguments.values() if isinstance(x, Tensor))):
                self.kernel[self.grid](**self.arguments, num_warps=self.warps)


def launches(step: Step, weights: Weights, view: View, pixels: int) -> list[Launch | pointwise.Launch]:
    """What a step launches, one after the other."""
    match step:
        case Convolve():
            return _convolve(step, weights, view)
        case Attend():
            return [_attend(step, weights, view)]
        case Gate():
            return [_gate(step, view)]
        case Excite():
            return _excite(step, weights, view, pixels)
        case Head():
            return [_head(step, weights, view)]


def _convolve(step: Convolve, weights: Weights, view: View) -> list[Launch]:
    sources, out = [view(source) for source in step.sources], view(step.out)
    (n, height, width, channels), dtype = out.shape, sources[0].dtype
    tile = _tile_of(step, width, out.device, dtype)
    found: list[Launch] = []
    room = None if step.scaled is None else view(step.scaled).flatten(0, 1)  # [n * rows, channels]

    def scaled(packed: tuple[Tensor, ...], first: int) -> tuple[Tensor, int]:
        """Weights of all slices as rows, and the step in rows from slice to slice; they begin at a row of the room."""
        weight = packed[0].flatten(0, 1)  # [rows, channels]
        rows, depth = weight.shape
        result = room[first : first + n * rows]
        grid = (triton.cdiv(rows, 32), n, triton.cdiv(depth, 64))
        arguments = {"w": weight, "scale": view(step.scale), "out": result, "rows": rows, "C": depth}
        found.append(Launch(kernels.scale_weights, grid, arguments | {"BC": 64, "ROWS": 32}))
        return result, rows

    shortcut, packed = step.shortcut, weights[step.weights]
    w, w_rows = (packed[0].flatten(0, 1), 0) if step.scale is None else scaled(packed, 0)
    more = {"shortcut_w": w, "shortcut_rows": 0, "shortcut_out": out, "SHORTCUT_RELU": False}
    more |= {"shortcut_bias": None, "shortcut_unit": None}
    if shortcut is not None:
        packed = weights[shortcut.weights]
        rows, step_of_rows = scaled(packed, n * w_rows) if shortcut.scaled else (packed[0].flatten(0, 1), 0)
        more = {"shortcut_w": rows, "shortcut_rows": step_of_rows, "shortcut_bias": packed[1]}
        more |= {"shortcut_unit": packed[2], "shortcut_out": view(shortcut.out), "SHORTCUT_RELU": shortcut.relu}
    second = sources[1] if len(sources) > 1 else sources[0]
    sums = None if step.sums is None else view(step.sums)
    arguments = {
        **_operand("x0", sources[0], tile),
        **_operand("x1", second, tile),
        "w": _rows(w, tile),
        "w_rows": w_rows,
        "bias": weights[step.weights][1],
        "unit": weights[step.weights][2],
        "out": out,
        "out_strides": out.stride(),
        "pooled": None if step.pooled is None else view(step.pooled),
        "pooled_strides": (0, 0, 0) if step.pooled is None else view(step.pooled).stride(),
        "sums": sums,
        "sums_strides": (0, 0, 1) if sums is None else sums.stride(),
        "H": height,
        "W": width,
        "TAPS": step.size**2,
        "C0": sources[0].shape[3],
        "C1": second.shape[3] if len(sources) > 1 else 0,
        "OUT": channels,
        "RELU": step.relu,
        "RESIDUAL": step.residual,
        "SHORTCUT": shortcut is not None,
        "SWAP": tile.swap,
        "ROWS": tile.rows,
        **more,
        "shortcut_w": _rows(more["shortcut_w"], tile),
        "shortcut_strides": more["shortcut_out"].stride(),
        **tile.constants,
    }
    grid = (n * tile.count(height, width) * triton.cdiv(channels, tile.channels),)
    return [*found, Launch(kernels.convolve, grid, arguments, tile.warps)]


def _attend(step: Attend, weights: Weights, view: View) -> Launch:
    row, below, out = view(step.row), view(step.below), view(step.out)
    (n, height, width), channels = out.shape, row.shape[3]
    tile = _tile_of(step, width, row.device, row.dtype)
    (psi, psi_bias), (weight, bias, unit) = weights[step.weights], weights[step.project]
    arguments = {
        **_operand("row", row, tile),
        "below": below,
        "below_strides": below.stride(),
        "w": _rows(weight.flatten(0, 1), tile),
        "bias": bias,
        "unit": unit,
        "psi": psi,
        "psi_bias": psi_bias,
        "out": out,
        "H": height,
        "W": width,
        "h_inverse": 1 / (height - 1),
        "w_inverse": 1 / (width - 1),
        "C": channels,
        "EACH": step.each,
        **tile.constants,
    }
    return Launch(kernels.attend, (n * tile.count(height, width),), arguments, tile.warps)


def _gate(step: Gate, view: View) -> pointwise.Launch:
    y, out = (view(used).permute(0, 3, 1, 2) for used in (step.below, step.out))
    gate = None if step.attention is None else view(step.attention)[:, None]
    launch = pointwise.up_forward(y, gate, out, GATE_ROWS)
    return launch if step.sums is None else launch.into(view(step.sums))


def _excite(step: Excite, weights: Weights, view: View, pixels: int) -> list[Launch]:
    (squeeze, stretch), out, found = weights[step.weights], view(step.out), []
    means = torch.empty_like(out)
    first = 0
    for sums in map(view, step.sums):
        n, count, channels = sums.shape
        arguments = {"sums": sums, "strides": sums.stride(), "out": means[:, first:], "out_stride": means.stride(0)}
        arguments |= {"parts": count, "pixels": pixels, "C": channels, "BC": 32}
        found.append(Launch(kernels.means, (n, triton.cdiv(channels, 32)), arguments))
        first += channels
    arguments = {"means": means, "w1": squeeze, "w2": stretch, "out": out, "C": out.shape[1], "R": len(squeeze)}
    arguments |= {"BC": 64, "BR": _power(len(squeeze), 1, 1024)}
    return [*found, Launch(kernels.excite, (len(out),), arguments)]


def _head(step: Head, weights: Weights, view: View) -> Launch:
    x, out = view(step.source), view(step.out)
    n, height, width, channels = x.shape
    weight, bias = weights[step.weights]
    arguments = {
        "x": x,
        "x_strides": x.stride(),
        "w": weight,
        "bias": bias,
        "logits": out if step.threshold is None else None,
        "mask": None if step.threshold is None else out,
        "threshold": None if step.threshold is None else view(step.threshold),
        "H": height,
        "W": width,
        "C": channels,
        "OUT": out.shape[1],
        "BC": _power(channels, 1, 1024),
        "BP": POINTS,
    }
    return Launch(kernels.head, (n * triton.cdiv(height * width, POINTS),), arguments)


def tile_key(
    step: Convolve | Attend, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[str, tuple[int, int, int]]:
    """What the tile of a step may depend on, and what the table has for it: pixels, warps and stages."""
    counts, out = _product(step)
    what = "attend" if isinstance(step, Attend) else "convolve and pool" if step.pooled else "convolve"
    key = f"{what} {' + '.join(map(str, counts))} -> {out}, {width} wide, {str(dtype)[6:]}"
    family = _family(device) if _boxed(step, device, dtype) else "sm80"
    return key, (FLOAT32_TILES if dtype == torch.float32 else TILES[family])[_power(out, 16, 128)]


def _tile_of(step: Convolve | Attend, width: int, device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile of a step in rows of ``width`` pixels. It depends on no batch size."""
    counts, out = _product(step)
    key, table = tile_key(step, width, device, dtype)
    pixels, warps, stages = chosen.get().get(key, table)
    channels, rows = _power(out, 16, 128), 2 if isinstance(step, Convolve) and step.pooled else 1
    pixels //= rows  # a row waits in registers for the next
    least = _least_depth(dtype)
    depth = next((k for k in (64, 32, 16) if k >= least and all(count % k == 0 for count in counts)), least)
    if dtype == torch.float32:
        depth = FLOAT32_DEPTH
    if not _boxed(step, device, dtype):
        return Tile(False, False, rows, pixels, channels, min(depth, 32), warps, stages)
    pixels = _power(width, 16, pixels)
    depth = min(depth, 128 // dtype.itemsize)  # bytes of a row that shared memory is swizzled in
    swap = isinstance(step, Convolve) and pixels < 64 <= channels
    return Tile(True, swap, rows, pixels, channels, depth, warps, stages)


def _product(step: Convolve | Attend) -> tuple[list[int], int]:
    """The channels of each source of a product, and those of its result."""
    if isinstance(step, Attend):
        return [step.row.channels], step.row.channels
    return [source.channels for source in step.sources], step.out.channels


def _boxed(step: Convolve | Attend, device: torch.device, dtype: torch.dtype) -> bool:
    counts, out = _product(step)
    return _family(device) != "sm80" and why_no_boxes([*counts, out], dtype) is None


def _family(device: torch.device) -> str:
    if forced is not None or device.type != "cuda":
        return forced or "sm90"
    major, _ = pointwise.capability(device)
    return "sm80" if major < 9 else "sm90" if major < 12 else "sm120"


def why_no_boxes(channels: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why slices cannot be read through tensor descriptors, or None where they can.

    ``channels`` are all that a step reads and writes: what slices begin at, and how many channels the buffers have
    that they lie in, are multiples of one of these.
    """
    if any(count * dtype.itemsize % 16 for count in channels):
        return "needs addresses and steps that are multiples of 16 bytes"
    if any(count % _least_depth(dtype) for count in channels) and dtype == FLOAT8:
        return f"needs multiples of {_least_depth(dtype)} channels for float8"
    return None


def _least_depth(dtype: torch.dtype) -> int:
    """The fewest channels of a box: what one instruction multiplies of 16 bits, or of 8."""
    return 32 if dtype == FLOAT8 else 16


def _operand(name: str, x: Tensor, tile: Tile) -> dict:
    """A source as the kernels take it: boxes of pixels of one row, or a pointer with its steps."""
    given = TensorDescriptor.from_tensor(x, [1, 1, tile.pixels, tile.depth]) if tile.boxes else x
    return {name: given, f"{name}_strides": x.stride()}


def _rows(weights: Tensor, tile: Tile) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(weights, [tile.channels, tile.depth]) if tile.boxes else weights


def _packed(
    weight: Tensor, bias: Tensor, device: torch.device, dtype: torch.dtype, scaled: bool = False
) -> tuple[Tensor, Tensor, float | None]:
    """Weights, bias and unit of a product: [out, in, k, k] becomes [k * k, out padded to whole blocks, in].

    The unit is what sums in float8 are multiplied by; None for other dtypes. Weights that a recalibration scales stay
    in float32: they are rounded once, after it.
    """
    weight, unit = in_units(weight) if dtype == FLOAT8 else (weight, None)
    out, channels, rows, columns = weight.shape
    by_tap = weight.permute(2, 3, 0, 1).reshape(rows * columns, out, channels)
    padding = torch.zeros(rows * columns, _padded(out) - out, channels, dtype=weight.dtype)
    padded = torch.cat([by_tap, padding], 1).to(device, torch.float32 if scaled else dtype)
    return padded.contiguous(), bias.to(device, torch.float32), unit


def _padded(channels: int) -> int:
    """Channels of a result in whole blocks."""
    return channels + -channels % _power(channels, 16, 128)


def _power(size: int, least: int, most: int) -> int:
    """The smallest power of two from ``size`` on, within bounds."""
    return max(least, min(most, triton.next_power_of_2(size)))
