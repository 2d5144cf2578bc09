"""Registers an operation with PyTorch: schema, implementations, shapes, autocast, gradients; in this order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor
from torch.library import Library

from ._backend import choose, stock_only, without_autocast
from ._samples import Sample

NAMESPACE = "scoat_fast"
_library = Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Operation:
    """An operation as the tests, the benchmarks and the doctor see it.

    Attributes:
        name: of the folder and of the function.
        function: the public function.
        overload: the registered operator under it, ``torch.ops.scoat_fast.NAME.default``.
        stock: the same in stock torch operators, as eager code would write it.
    """

    name: str
    function: Callable
    overload: torch._ops.OpOverload
    stock: Callable

    def samples(self, kind: str, dtype: torch.dtype, device: str = "cpu", **options) -> Iterator[Sample]:
        """Inputs by size: "tiny" (for gradcheck), "awkward" (edges), "real" (the network's own shapes)."""
        module = import_module(f"{__package__}.{self.name}.samples")
        return getattr(module, kind)(dtype, device, **options)


def register(
    name: str,
    schema: str,
    backward_schema: str,
    check: Callable,
    outputs: Callable,
    outputs_backward: Callable,
    setup_context: Callable,
    backward: Callable,
    autocast: Callable,
    reference: Callable,
) -> tuple[Callable, torch._ops.OpOverload, torch._ops.OpOverload]:
    """Registers ``name`` and ``name_backward``; returns what runs the former, and the overloads of both.

    Args:
        check: raises ValueError for arguments that do not fit; it runs inside the operator, behind autocast.
        outputs: arguments to uninitialised outputs, of which sizes, strides and dtypes are the operator's promise.
        autocast: takes the arguments and a function that casts a tensor to the dtype of the autocast region, and
            returns the arguments as stock torch would cast them for a convolution.
        reference: the same in standard operators, for where only those are known (see ``stock_only``).
    """

    def forward(*args):
        check(*args)
        return choose(name, *args).forward(*args)

    def fake(*args):
        check(*args)
        return outputs(*args)

    def run_backward(*args):
        with without_autocast(args[0].device.type):  # dtypes are those of the forward pass
            return choose(name, *args).backward(*args)

    for op, its_schema, run, its_fake in (
        (name, schema, forward, fake),
        (f"{name}_backward", backward_schema, run_backward, outputs_backward),
    ):
        _library.define(op + its_schema)
        _library.impl(op, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op}", its_fake, lib=_library)
    namespace = getattr(torch.ops, NAMESPACE)
    overload, overload_backward = (getattr(namespace, op).default for op in (name, f"{name}_backward"))
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(name, _with_autocast(overload, device, key, autocast), key)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)

    def run(*args):
        if not stock_only():
            return overload(*args)
        device = args[0].device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if casts:
            args = autocast(_cast_for(device), *args)
        if not torch.jit.is_tracing():  # sizes are tensors there, which a comparison would freeze
            check(*args)
        with without_autocast(device) if casts else contextlib.nullcontext():
            return reference(*args)

    return run, overload, overload_backward


def _with_autocast(overload, device: str, key: str, autocast: Callable) -> Callable:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(*args):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*autocast(_cast_for(device), *args))

    return run


def _cast_for(device: str) -> Callable:
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor | None) -> Tensor | None:
        # as stock autocast: doubles and other devices' tensors stay as they are
        lower = x is not None and x.is_floating_point() and x.dtype != torch.float64 and x.device.type == device
        return x.to(dtype) if lower else x

    return cast
