"""The only place that chooses which implementation of an operation runs.

``SCOAT_FAST_DISABLE`` switches implementations off: a comma-separated list of implementations (``triton``), of
operations (``upsample``; ``convolution`` and ``engine`` count as such), of pairs (``upsample.triton``), or ``all``. The
reference cannot be switched off. Any other name is an error, since whoever mistyped one would measure, or trust, what
was to be off.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch.autograd import forward_ad

from ..errors import ScoatFastError
from . import _verdict

# Tried in this order. On a CPU, Triton only has its interpreter: for tests that ask for it by name.
ORDER = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
IMPLEMENTATIONS = ("reference", "triton", "cuda", "cpu")
OPERATIONS = ("upsample", "spatial_gate", "channel_gate", "batch_norm_relu", "convolution", "engine")
_MODULES = {"reference": "reference", "triton": "triton_impl", "cuda": "native_impl", "cpu": "native_impl"}
_forced: str | None = None  # a plain global: autograd runs CUDA backwards on another thread, which sees no ContextVar


@dataclass(frozen=True)
class Choice:
    """What runs an operation for some input, and why nothing that comes before it does."""

    implementation: str
    refusals: dict[str, str]


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces all operations to one implementation, in all threads; None lifts that.

    An input that the implementation cannot take raises RuntimeError: a forced backend never falls back.

    Raises:
        ValueError: for a name that is not one of "reference", "triton", "cuda", "cpu".
    """
    global _forced
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"use_backend wants one of {IMPLEMENTATIONS}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def stock_only() -> bool:
    """Whether what runs now is written down or transformed by what knows standard operators alone.

    That is a program of ``torch.export``, a trace of ``torch.jit`` (and so the older ONNX exporter), a transform of
    ``torch.func`` such as ``vmap``, or a derivative forwards.
    """
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag  # is_exporting() is true of torch.compile, too, in PyTorch 2.11
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or torch.jit.is_tracing()


def records() -> bool:
    """Whether autograd records what runs now, and may be given a backward pass that it does not know.

    Within ``torch.inference_mode`` it records nothing, whoever enables gradients.
    """
    if torch.compiler.is_compiling() or stock_only():
        return False
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Within, dtypes stay as they are, also on a device that has no autocast, such as "meta"."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def choose(op: str, *args) -> ModuleType:
    """The module that runs ``op`` on these arguments: the forced one, or the first that can."""
    device = args[0].device.type
    refusals = {}
    for name in ORDER.get(device, ("reference",)) if _forced is None else (_forced,):
        module, refusal = _consider(op, name, args)
        if refusal is None:
            return module
        refusals[name] = refusal
    raise RuntimeError(f"{op}: {'; '.join(f'{name} {reason}' for name, reason in refusals.items())}")


def explain(op: str, *args) -> Choice:
    """What would run ``op`` on these arguments, and the reasons against what comes before it."""
    refusals = {}
    for name in ORDER.get(args[0].device.type, ("reference",)):
        _, refusal = _consider(op, name, args)
        if refusal is None:
            return Choice(name, refusals)
        refusals[name] = refusal
    raise RuntimeError(f"{op}: nothing runs: {refusals}")


def why_not(op: str, name: str, *args) -> str | None:
    """Why an implementation cannot run ``op`` on these arguments, or None where it can."""
    return _consider(op, name, args)[1]


def disabled(op: str, name: str) -> str | None:
    """Why an implementation is switched off: by ``SCOAT_FAST_DISABLE``, or by ``scoat-fast doctor``.

    Raises ScoatFastError for a name in ``SCOAT_FAST_DISABLE`` that is none.
    """
    if name == "reference":
        return None
    text = os.environ.get("SCOAT_FAST_DISABLE", "")
    if text and {"all", name, op, f"{op}.{name}"} & _names(text):
        return f"is switched off by SCOAT_FAST_DISABLE={text}"
    return _verdict.reason(op, name)


@cache
def _names(text: str) -> set[str]:
    """The names in a value of ``SCOAT_FAST_DISABLE``."""
    names = {part.strip() for part in text.split(",")} - {""}
    kernels = [name for name in IMPLEMENTATIONS if name != "reference"]
    known = {"all", *kernels, *OPERATIONS, *(f"{op}.{name}" for op in OPERATIONS for name in kernels)}
    if unknown := sorted(names - known):
        wanted = f"all, one of {', '.join(kernels)}, one of {', '.join(OPERATIONS)}, or a pair like upsample.cpu"
        raise ScoatFastError(f"SCOAT_FAST_DISABLE wants {wanted}, got {', '.join(map(repr, unknown))}")
    return names


def _consider(op: str, name: str, args: tuple) -> tuple[ModuleType | None, str | None]:
    off = disabled(op, name)
    if off is not None:
        return None, off
    device = args[0].device.type
    if name in ("cuda", "cpu") and device != name:
        return None, f"needs tensors on {name}, got {device}"
    try:
        module = importlib.import_module(f"{__package__}.{op}.{_MODULES[name]}")
    except ImportError as error:  # Triton or the extension is not here
        return None, f"cannot be loaded: {error}"
    return module, module.why_not(*args)
