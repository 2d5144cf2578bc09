"""The speed of every implementation of every operation on the network's own shapes.

A row is checked before it is timed; one that fails has no number. Times are compared with those of stock torch in the
same layout: eager (as written, and on a CPU with preallocated outputs on both sides) and under torch.compile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ..clock import copy_gb_per_s, median_ms
from ..errors import ScoatFastError
from ..files import check_output
from ..ops._samples import Sample
from . import check, table
from .calls import DIRECTIONS, IMPLEMENTATIONS, call_of, gradients_of_outputs, minimal_bytes, refusal
from .machine import facts, save

BATCHES = {"cuda": (1, 8, 32), "cpu": (1,)}
DTYPES = {"cuda": ("bfloat16",), "cpu": ("float32",)}


@dataclass(frozen=True)
class Plan:
    """What to measure. None stands for what suits the device.

    Attributes:
        seconds: of runs for each row.
        names: of the operations.
    """

    device: torch.device
    batches: Sequence[int] | None = None
    dtypes: Sequence[str] | None = None
    layouts: Sequence[str] = ("contiguous",)
    directions: Sequence[str] = DIRECTIONS
    implementations: Sequence[str] | None = None
    names: Sequence[str] | None = None
    seconds: float = 0.5

    def chosen_implementations(self) -> list[str]:
        """In the order in which they run: first those that others are compared with. Raises ScoatFastError."""
        there = IMPLEMENTATIONS[self.device.type]
        if self.implementations is None:  # compiling for a CPU takes minutes
            return [name for name in there if (self.device.type, name) != ("cpu", "compile")]
        for name in self.implementations:
            if name not in there:
                raise ScoatFastError(f"on {self.device.type} the implementations are {', '.join(there)}, not {name}")
        return [name for name in there if name in self.implementations]

    def cases(self) -> Iterator[tuple[ops.Operation, Sample, dict]]:
        """Operations with samples, and what a row says about the sample."""
        for dtype in self.dtypes or DTYPES[self.device.type]:
            for batch in self.batches or BATCHES[self.device.type]:
                for layout in self.layouts:
                    about = {"dtype": dtype, "layout": layout, "batch": batch}
                    for op in ops.ALL:
                        if self.names is None or op.name in self.names:
                            made = op.samples(
                                "real", getattr(torch, dtype), self.device.type, batch=batch, layout=layout
                            )
                            yield from ((op, sample, about) for sample in made)


def run(plan: Plan, commit: str = "", output: Path | None = None) -> dict:
    """Measures, printing each row as it is done.

    Args:
        commit: what is measured, where there is no git.
        output: a JSON file, written anew after every few rows, so that a run that is stopped leaves what it has.

    Returns:
        What the file holds: the machine, ``copy_gb_per_s``, ``left_out`` (implementations that cannot run here, with
        the reason) and ``rows``; in a row without ``ms``, ``reason`` says why.

    Raises:
        ScoatFastError: for an implementation that the device does not have, OutputError for the file.
    """
    implementations = plan.chosen_implementations()
    if output is not None:
        check_output(output)
    copied = copy_gb_per_s(plan.device, plan.seconds)
    result = {**facts(plan.device, commit), "copy_gb_per_s": copied, "left_out": {}, "rows": []}
    print(table.head(result))
    for op, sample, about in plan.cases():
        able = []
        for name in implementations:
            reason = refusal(op, name, sample.args)
            if reason is None:
                able.append(name)
            elif f"{op.name} {name}" not in result["left_out"]:
                result["left_out"][f"{op.name} {name}"] = reason
                print(f"{op.name} has no {name} here: it {reason}")
        for direction in plan.directions if able else ():
            rows = measure(op, sample, direction, able, plan, result["copy_gb_per_s"])
            result["rows"] += [row | about for row in rows]
            print(*(table.line(row | about) for row in rows), sep="\n", flush=True)
            if output is not None:
                save(output, result)
    return result


def passed(result: dict) -> bool:
    """Whether every row of a run has its time."""
    return all(row["reason"] is None for row in result["rows"])


def measure(
    op: ops.Operation, sample: Sample, direction: str, implementations: list[str], plan: Plan, copy: float
) -> list[dict]:
    """One row for each implementation, with the ratios between them."""
    grads = gradients_of_outputs(op, sample.args)
    truth = check.truth(op, direction, sample.args, grads)
    rows = []
    for name in implementations:
        row = {"op": op.name, "implementation": name, "sample": sample.name, "shape": list(sample.args[0].shape)}
        row |= {"direction": direction} | _checked_then_timed(op, name, direction, sample, grads, truth, plan)
        moved = minimal_bytes(op.name, direction, sample.args)
        row["gb_per_s"] = None if row["ms"] is None else moved / row["ms"] / 1e6
        row["share_of_copy"] = None if row["ms"] is None else row["gb_per_s"] / copy
        rows.append(row)
    ms = {row["implementation"]: row["ms"] for row in rows}
    for row in rows:
        for other in ("eager", "compile"):
            known = row["ms"] is not None and ms.get(other) is not None
            row[f"ratio_to_{other}"] = ms[other] / row["ms"] if known else None
    return rows


def _checked_then_timed(
    op: ops.Operation,
    name: str,
    direction: str,
    sample: Sample,
    grads: list[Tensor],
    truth: check.Truth,
    plan: Plan,
) -> dict:
    own = name in ops._backend.IMPLEMENTATIONS
    row: dict = {"ms": None, "error": None, "reason": None}
    with ops.use_backend(name) if own else contextlib.nullcontext():
        try:
            with check.empty_is_nan() if own else contextlib.nullcontext():
                call = call_of(op, name, direction, sample.args, grads)
                verdict = check.judge(call(), truth)
            row |= {"error": verdict.error, "reason": verdict.reason}
            if verdict.reason is None:
                row["ms"] = median_ms(call, plan.device, plan.seconds)
        except Exception as failure:  # whatever breaks one row, the others keep their numbers
            text = str(failure).strip() or "no message"
            row["reason"] = f"{type(failure).__name__}: {text.splitlines()[0]}"
    return row
