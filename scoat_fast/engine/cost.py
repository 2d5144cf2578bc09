"""What the steps of a plan cost: operations and bytes, and the least time that these leave."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .plan import Attend, Buffer, Convolve, Gate, Head, Plan, Slice, Step, reads, writes


@dataclass(frozen=True)
class Cost:
    """What a step must do for a batch: floating-point operations, and bytes read and written once each.

    ``ideal_bytes`` are those of a step that takes what it reads from below at low resolution, and so needs no buffer
    for it: the floor that a figure of percent refers to.
    """

    flops: int
    bytes: int
    ideal_bytes: int

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The least time on a machine, whichever of the two takes longer."""
        return max(self.ideal_bytes / bytes_per_second, self.flops / flops_per_second)


def cost(plan: Plan, step: Step, n: int, height: int, width: int, itemsize: int) -> Cost:
    """The cost of a step for ``n`` slices of ``height`` x ``width``, with features of ``itemsize`` bytes."""
    pixels = n * math.prod(size >> step.level for size in (height, width))
    gates = (other for other in plan.steps if isinstance(other, Gate) and other.out is not None)
    upsampled = {gate.out.buffer: gate.below for gate in gates}

    def size_of(slices: list[Slice]) -> Iterator[tuple[int, int]]:
        for used in slices:
            buffer, low = plan.buffers[used.buffer], upsampled.get(used.buffer)
            whole = _bytes(buffer, used, n, height, width, itemsize)
            yield whole, whole if low is None else _bytes(plan.buffers[low.buffer], low, n, height, width, itemsize)

    flops = parameters = 0
    match step:
        case Convolve():
            parameters = (step.size**2 + bool(step.shortcut)) * step.channels * step.out.channels
            parameters += 9 * step.out.channels if step.taps else 0
            flops = 2 * pixels * parameters
        case Attend():
            parameters = step.row.channels**2
            flops = 2 * pixels * (parameters + 5 * step.row.channels)
        case Gate():
            flops = 2 * pixels * 4 * step.below.channels
        case Head() if step.tapped:
            flops = pixels * 9
        case Head():
            parameters = 9 * step.source.channels * step.out.channels
            flops = 2 * pixels * parameters
    read, written = list(size_of(reads(step))), list(size_of(writes(step)))
    whole, ideal = (sum(pair[which] for pair in [*read, *written]) for which in (0, 1))
    if isinstance(step, Gate):
        ideal = 0
    return Cost(flops, whole + parameters * itemsize, ideal + parameters * itemsize)


def _bytes(buffer: Buffer, used: Slice, n: int, height: int, width: int, itemsize: int) -> int:
    pixels = (height >> buffer.level) * (width >> buffer.level)
    wide = max(itemsize, 2) * pixels
    size = {"features": itemsize * pixels, "wide": wide, "map": wide, "logits": 4 * pixels, "mask": pixels}
    return n * used.channels * size.get(buffer.kind, 4)
