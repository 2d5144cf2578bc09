"""The check that every number stands behind: as accurate as stock torch, against float64."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Operation
from ..ops.parity import FLOOR, SLACK, map_tensors, tensors_of
from .calls import call_of_function

SHARED = {"channel_gate": (1, 2)}  # arguments without a batch: weights
MIXED = {"batch_norm_relu"}  # what becomes of a sample depends on all of them
CPU_ROOM = 4 << 30  # bytes for float64 on a CPU
COPIES = 4  # how many tensors of each size a check in float64 holds at a time


@dataclass(frozen=True)
class Truth:
    """What a call should return.

    Attributes:
        exact: in float64, for the whole batch or for its first and last sample.
        allowed: for each tensor the largest error that passes.
        whole: whether that is the whole batch.
    """

    exact: list[Tensor]
    allowed: list[float]
    whole: bool


@dataclass(frozen=True)
class Verdict:
    """``error`` relative to the largest exact value, None if not finite; ``reason`` is None if the check passed."""

    error: float | None
    reason: str | None


def truth(op: Operation, direction: str, args: tuple, grads: list[Tensor]) -> Truth:
    """The results of stock torch in float64, and the errors that stock torch itself makes in the arguments' dtype."""
    whole = op.name in MIXED or _fits([*tensors_of(args), *grads])
    if not whole:
        shared = SHARED.get(op.name, ())
        args = [a if i in shared else map_tensors([a], _ends)[0] for i, a in enumerate(args)]
        grads = [_ends(grad) for grad in grads]
    exact = _run(op.stock, direction, map_tensors(args, Tensor.double), map_tensors(grads, Tensor.double))
    usual = _run(op.stock, direction, args, grads)
    allowed = [SLACK * _error(a, b) + FLOOR * _largest(b) for a, b in zip(usual, exact, strict=True)]
    return Truth(exact, allowed, whole)


def judge(results: list[Tensor], truth: Truth) -> Verdict:
    """Compares what a call returned with what it should. NaN never passes."""
    worst, reason = 0.0, None
    for i, (ours, exact, allowed) in enumerate(zip(results, truth.exact, truth.allowed, strict=True)):
        if not truth.whole:
            if ours.shape == exact.shape:  # a gradient of weights: a sum over the whole batch
                continue
            ours = _ends(ours)
        if ours.shape != exact.shape:
            return Verdict(None, f"result {i} is {list(ours.shape)} instead of {list(exact.shape)}")
        error = _error(ours, exact)
        if not error <= allowed:
            reason = reason or f"result {i} has the error {error:.1e}, allowed is {allowed:.1e}"
        worst = max(worst, error / (_largest(exact) or 1.0)) if math.isfinite(error) else math.inf
    return Verdict(worst if math.isfinite(worst) else None, reason)


@contextlib.contextmanager
def empty_is_nan() -> Iterator[None]:
    """Tensors that this package allocates without writing them are full of NaN, so that what is left out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that have no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _run(function: Callable, direction: str, args, grads) -> list[Tensor]:
    return call_of_function(function, direction, args, grads)()


def _fits(tensors: list[Tensor]) -> bool:
    device = tensors[0].device
    room = CPU_ROOM
    if device.type == "cuda":
        torch.cuda.empty_cache()
        room = torch.cuda.mem_get_info(device)[0]
    return COPIES * 8 * sum(x.numel() for x in tensors) <= room


def _ends(x: Tensor) -> Tensor:
    return x[[0, -1]]


def _error(ours: Tensor, exact: Tensor) -> float:
    return (ours.double() - exact).abs().max().item() if exact.numel() else 0.0


def _largest(exact: Tensor) -> float:
    return exact.abs().max().item() if exact.numel() else 0.0
