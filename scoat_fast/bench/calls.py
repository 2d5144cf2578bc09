"""What is timed: one call of one implementation on one sample in one direction, and the bytes that it has to move."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from ..ops import Operation
from ..ops._backend import why_not
from ..ops.parity import map_tensors, tensors_of

Call = Callable[[], list[Tensor]]
DIRECTIONS = ("forward", "backward")
# first those that others are compared with
IMPLEMENTATIONS = {"cuda": ("eager", "compile", "triton", "cuda"), "cpu": ("eager", "compile", "cpu")}
# on a CPU, where allocating a large tensor takes as long as filling it, both sides write into tensors that exist
PREALLOCATED = {("cpu", "eager"): "stock_out", ("cpu", "cpu"): "native_out"}


def refusal(op: Operation, implementation: str, args: tuple) -> str | None:
    """Why an implementation cannot run ``op`` on these arguments, or None where it can."""
    return None if implementation in ("eager", "compile") else why_not(op.name, implementation, *args)


def call_of(op: Operation, implementation: str, direction: str, args: tuple, grads: list[Tensor]) -> Call:
    """A call without arguments that runs ``op`` and returns its outputs or, backwards, the gradients of its inputs.

    On a GPU it is the public function with its allocations; ``ops.use_backend`` chooses what runs inside it. What has
    to happen once, such as the forward pass before a backward one, happens here.

    Args:
        implementation: "eager" and "compile" are ``op.stock`` as it is and under torch.compile.
        grads: the gradients of the outputs.
    """
    prepared = PREALLOCATED.get((args[0].device.type, implementation))
    if prepared:
        prepare = import_module(f"{__package__}.{prepared}").CALLS[op.name, direction]
        return _without_gradients(prepare(*args) if direction == "forward" else prepare(grads, *args))
    if implementation == "compile":
        return call_of_function(_compiled(op), direction, args, grads)
    return call_of_function(op.stock if implementation == "eager" else op.function, direction, args, grads)


def call_of_function(function: Callable, direction: str, args: tuple, grads: list[Tensor]) -> Call:
    """As ``call_of``, for any function of the arguments."""
    if direction == "forward":
        return _without_gradients(lambda: as_list(function(*args)))
    leaves = map_tensors(args, lambda x: x.detach().requires_grad_())
    outputs = as_list(function(*leaves))
    given = [grad.to(y.dtype) for grad, y in zip(grads, outputs, strict=True) if y.requires_grad]
    ends, wanted = [y for y in outputs if y.requires_grad], tensors_of(leaves)  # statistics have no gradients
    return lambda: list(torch.autograd.grad(ends, wanted, given, retain_graph=True))


def gradients_of_outputs(op: Operation, args: tuple) -> list[Tensor]:
    """Gradients to start a backward pass from: random, laid out as the outputs, in the dtype of the arguments.

    Those of the means are so much larger that they show beside the gradients of single pixels.
    """
    with torch.no_grad():
        outputs = as_list(op.stock(*args))
    generator = torch.Generator(args[0].device).manual_seed(1)
    height = outputs[0].shape[2]
    return [torch.empty_like(y).normal_(0, 1 if y.ndim == 4 else height, generator=generator) for y in outputs]


def minimal_bytes(op: str, direction: str, args: tuple) -> int:
    """The bytes of the maps [N, C, H, W] that have to be read and written.

    Each input is read once and each output written once; only where a sum over all of a map decides what becomes of
    its pixels, in a recalibration without known means and in a normalisation, it is read twice. Vectors and weights
    are left out, and so are gradients of a row that are slices of the gradient of the result.
    """
    if op == "upsample":
        y, row = args
        return {"forward": 5 * y.nbytes + 2 * _nbytes(row), "backward": 5 * y.nbytes}[direction]
    if op == "spatial_gate":
        y, attention, row, return_means = args
        forward = 5 * y.nbytes + attention.nbytes + 2 * _nbytes(row)
        backward = 6 * y.nbytes + 2 * attention.nbytes + 2 * _nbytes(row) * return_means
        return {"forward": forward, "backward": backward}[direction]
    if op == "batch_norm_relu":  # backwards with a residual, what the first pass writes saves the second a read
        x, _, _, residual, _ = args
        return {"forward": 3 + (residual is not None), "backward": 7}[direction] * x.nbytes
    x, _, _, means = args
    return ({"forward": 2, "backward": 3}[direction] + (means is None)) * x.nbytes


def as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _without_gradients(call: Call) -> Call:
    return torch.no_grad()(call)


def _compiled(op: Operation) -> Callable:
    import torch._functorch.config

    torch._dynamo.reset()  # after a few shapes of one function it would quietly run the eager code
    torch._functorch.config.donated_buffer = False  # donated, they allow a single backward pass alone
    return torch.compile(op.stock, fullgraph=True, dynamic=False)
