"""Where the buffers of a plan lie in memory, and in which dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .plan import Convolve, Plan, Slice, Step, reads

FLOAT8 = torch.float8_e4m3fn
ALIGNMENT = 256  # bytes
CHANNELS_LAST = ("features", "wide", "sums", "scale", "weights")  # kinds of buffers whose channels come last


class Extents(Protocol):
    """What a backend decides about buffers: its functions of these names (see ``reference``)."""

    parts: Callable[[Step, int, int, torch.device, torch.dtype], int]
    rows: Callable[[Convolve, torch.dtype], int]


def has_float8(device: torch.device) -> bool:
    """Whether a GPU multiplies float8 numbers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def dtype_of(kind: str, dtype: torch.dtype) -> torch.dtype:
    """What buffers of a kind (see ``plan.KINDS``) hold in an engine of ``dtype``."""
    wide = torch.bfloat16 if dtype == FLOAT8 else dtype
    if kind in ("wide", "map"):
        return wide
    return {"features": dtype, "weights": dtype, "mask": torch.uint8}.get(
        kind, torch.promote_types(wide, torch.float32)
    )


def step_dtype(plan: Plan, step: Step, dtype: torch.dtype) -> torch.dtype:
    """What a step multiplies in: the dtype of the first thing that it reads."""
    return dtype_of(plan.buffers[reads(step)[0].buffer].kind, dtype)


@dataclass(frozen=True)
class Layout:
    """Where the buffers of a plan lie for one shape: offset in bytes, shape and dtype of each.

    Those that lie ``within`` channels of another have its offset, and its steps from pixel to pixel.
    """

    places: dict[str, tuple[int, tuple[int, ...], torch.dtype]]
    within: dict[str, Slice]
    bytes: int

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        """The buffers as views of ``memory``."""
        found = {
            name: memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (start, shape, dtype) in self.places.items()
            if name not in self.within
        }
        return found | {name: _channels(found[used.buffer], used) for name, used in self.within.items()}


def lay_out(
    plan: Plan, backend: Extents, n: int, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> Layout:
    """Places buffers so that those which live at the same time do not overlap, large ones first."""
    divided = {}
    for step in plan.steps:
        used = step_dtype(plan, step, dtype)
        if isinstance(sums := getattr(step, "sums", None), Slice):
            divided[sums.buffer] = backend.parts(step, height >> step.level, width >> step.level, device, used)
        if isinstance(step, Convolve) and step.scaled is not None:
            divided[step.scaled.buffer] = backend.rows(step, used)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, buffer in plan.buffers.items():
        if name not in plan.lifetimes:  # a node of which only taps are stored
            continue
        c, h, w = buffer.channels, height >> buffer.level, width >> buffer.level
        shape = {
            "features": (n, h, w, c),
            "wide": (n, h, w, c),
            "map": (n, h, w),
            "sums": (n, divided.get(name, 1), c),
            "scale": (n, c),
            "weights": (n, divided.get(name, 0), c),
            "logits": (n, c, h, w),
            "mask": (n, c, h, w),
            "threshold": (1,),
        }[buffer.kind]
        shapes[name] = shape, dtype_of(buffer.kind, dtype)
    sizes = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in shapes.items()}
    within = {name: buffer.within for name, buffer in plan.buffers.items() if buffer.within is not None}
    starts: dict[str, int] = {}
    for name in sorted(sizes.keys() - within.keys(), key=lambda name: (-sizes[name], name)):
        born, dead = plan.lifetimes[name]
        beside = [o for o in starts if plan.lifetimes[o][0] <= dead and plan.lifetimes[o][1] >= born]
        start = 0
        for other in sorted(beside, key=starts.__getitem__):
            if start + sizes[name] <= starts[other]:
                break
            start = max(start, -(-(starts[other] + sizes[other]) // ALIGNMENT) * ALIGNMENT)
        starts[name] = start
    size = max(start + sizes[name] for name, start in starts.items())
    starts |= {name: starts[used.buffer] for name, used in within.items()}
    return Layout({name: (starts[name], *shapes[name]) for name in sizes}, within, size)


def view_of(plan: Plan, tensors: dict[str, Tensor]) -> Callable[[Slice], Tensor]:
    """The memory of a slice, given that of all buffers."""

    def view(used: Slice) -> Tensor:
        whole = tensors[used.buffer]
        return _channels(whole, used) if plan.buffers[used.buffer].kind in CHANNELS_LAST else whole

    return view


def _channels(whole: Tensor, used: Slice) -> Tensor:
    return whole[..., used.first : used.first + used.channels]
