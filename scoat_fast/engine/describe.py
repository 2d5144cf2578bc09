"""An engine as a table: what each step runs, moves and computes, and the least time that it could take here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..clock import copy_gb_per_s, matrix_tflop_per_s
from .cost import cost
from .plan import Step, summary, writes

if TYPE_CHECKING:
    from .runner import Engine

COLUMNS = f"{'step':>4} {'what':106}{'shape':>16}{'MB':>8}{'GFLOP':>8}{'floor us':>10}  kernel"


def describe(engine: Engine) -> str:
    """The plan for one slice of the engine's size, with floors from this machine's own copy and matrix rates."""
    height, width = engine.padded_size
    bandwidth, rate = rates(engine.device, engine.dtype)
    lines = [
        f"SCOATNet on {engine.device}: {engine.backend} backend, {str(engine.dtype)[6:]}, "
        f"batches of {', '.join(map(str, engine.batch_sizes))}, {height}x{width}",
        *(f"not {name}, which {reason}" for name, reason in engine.refusals.items()),
        *(
            []
            if engine.calibration_dice is None
            else [f"Dice of its masks against bfloat16 on the calibration slices: {engine.calibration_dice:.4f}"]
        ),
        f"floors: {bandwidth / 1e9:.4g} GB/s copied and {rate / 1e12:.3g} TFLOP/s multiplied here, for one slice",
        COLUMNS,
    ]
    totals = [0.0, 0.0, 0.0]
    for number, step in enumerate(engine.plan.steps):
        lines.append(f"{number:4} {_row(engine, step)}")
        totals = [a + b for a, b in zip(totals, figures(engine, step), strict=True)]
    lines.append(f"{'all':>4} {'':122}{totals[0]:8.1f}{totals[1]:8.2f}{totals[2]:10.1f}")
    lines.append(f"memory of the largest batch: {engine.memory_bytes / 2**20:.1f} MiB beside the weights")
    return "\n".join(lines)


def figures(engine: Engine, step: Step) -> Iterator[float]:
    """Megabytes, GFLOP and the floor in microseconds of a step on one slice."""
    found = cost(engine.plan, step, 1, *engine.padded_size, engine.dtype.itemsize)
    yield from (found.bytes / 1e6, found.flops / 1e9, found.seconds(*rates(engine.device, engine.dtype)) * 1e6)


def _row(engine: Engine, step: Step) -> str:
    height, width = engine.padded_size
    shape = f"{height >> step.level}x{width >> step.level}x{writes(step)[0].channels}"
    megabytes, gflop, floor = figures(engine, step)
    kernel = engine.kernel(step)
    return f"{summary(step):106}{shape:>16}{megabytes:8.1f}{gflop:8.2f}{floor:10.1f}  {kernel}"


@cache
def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy, read and written together, and operations a second of a matrix product."""
    return copy_gb_per_s(device, 0.1) * 1e9, matrix_tflop_per_s(device, dtype, 0.1) * 1e12
