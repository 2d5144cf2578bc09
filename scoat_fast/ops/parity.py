"""How far an implementation is from float64, beside how far stock torch is: for tests, benchmarks and the doctor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._backend import use_backend
from ._register import Operation
from ._samples import Sample

SLACK = 2.0  # times stock torch's own error in the same dtype
FLOOR = 1e-6  # of the largest exact value: below, both are rounding


@dataclass(frozen=True)
class Parity:
    """The largest errors of one result (an output or a gradient) against float64, and the bound on ours."""

    error: float
    stock_error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # false for NaN


def measure(op: Operation, implementation: str, sample: Sample) -> list[Parity]:
    """Compares the outputs and the gradients of all inputs. Raises RuntimeError where the input is refused."""
    with use_backend(implementation):
        ours = outputs_and_gradients(op.function, sample.args)
    return compare(op, ours, sample)


def compare(op: Operation, ours: list[Tensor], sample: Sample) -> list[Parity]:
    """Compares what ``outputs_and_gradients`` gave with stock torch in the same dtype, and in float64."""
    stock = outputs_and_gradients(op.stock, sample.args)
    exact = outputs_and_gradients(op.stock, map_tensors(sample.args, Tensor.double))
    return [_parity(*three) for three in zip(ours, stock, exact, strict=True)]


def _parity(ours: Tensor, stock: Tensor, exact: Tensor) -> Parity:
    if ours.shape != exact.shape:
        raise AssertionError(f"{list(exact.shape)} is wanted, got {list(ours.shape)}")
    if not exact.numel():
        return Parity(0.0, 0.0, 0.0)
    error, stock_error = ((x.double() - exact).abs().max().item() for x in (ours, stock))
    return Parity(error, stock_error, SLACK * stock_error + FLOOR * max(exact.abs().max().item(), 1.0))


def outputs_and_gradients(function: Callable, args: tuple) -> list[Tensor]:
    """What a call returns, then the gradients of all its tensors for a fixed gradient of what it returns."""
    leaves = map_tensors(args, lambda x: x.detach().requires_grad_())
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    ends = [y for y in outputs if y.requires_grad]  # statistics have no gradients
    return [*outputs, *torch.autograd.grad(ends, tensors_of(leaves), [_gradient_for(y) for y in ends])]


def _gradient_for(output: Tensor) -> Tensor:
    """From -1 to 1, shifted by a few places: no symmetry hides a mistake. Laid out as the output."""
    values = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device).roll(7)
    return torch.empty_like(output).copy_(values.view(output.shape))


def map_tensors(args: tuple | list, change: Callable[[Tensor], Tensor]) -> list:
    """The arguments with every tensor changed, also those in lists."""
    return [change(a) if isinstance(a, Tensor) else [change(x) for x in a] if isinstance(a, list) else a for a in args]


def tensors_of(args: tuple | list) -> list[Tensor]:
    """All tensors among the arguments, also those in lists."""
    return list(_tensors(args))


def _tensors(args: tuple | list) -> Iterator[Tensor]:
    for a in args:
        yield from (x for x in (a if isinstance(a, list) else [a]) if isinstance(x, Tensor))
