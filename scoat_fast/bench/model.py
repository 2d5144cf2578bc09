"""The speed of the whole network: the baseline in eager and compiled PyTorch, and ``SCOATNet``.

A row is checked against float64 before it is timed; one that fails has no number.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..clock import copy_gb_per_s, median_ms
from ..model import SCOATNet
from .eager import EagerSCOATNet
from .machine import facts, save

# of the largest logit, against float64: what rounding through about forty layers may make of the dtype's precision
BOUND = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TF32_BOUND = 1e-2
COLUMNS = f"{'name':42}{'width':>6}{'batch':>6}{'us a slice':>13}{'slices/s':>10}{'peak MiB':>10}{'error':>9}"


@dataclass(frozen=True)
class Candidate:
    """One way to run the network. ``mode`` is that of torch.compile, None for eager."""

    name: str
    baseline: bool
    dtype: torch.dtype
    layout: torch.memory_format
    mode: str | None = None
    tf32: bool = False

    @property
    def bound(self) -> float:
        return TF32_BOUND if self.tf32 else BOUND[self.dtype]


def candidates(device: torch.device, compile: bool) -> Iterator[Candidate]:
    """What is compared on a device. Compiling for a CPU takes minutes, and is left out without ``compile``."""
    contiguous, last = torch.contiguous_format, torch.channels_last
    yield Candidate("eager float32", True, torch.float32, contiguous)
    yield Candidate("eager float32 channels_last", True, torch.float32, last)
    yield Candidate("SCOATNet float32", False, torch.float32, contiguous)
    yield Candidate("SCOATNet float32 channels_last", False, torch.float32, last)
    if device.type == "cuda":
        yield Candidate("eager TF32 channels_last", True, torch.float32, last, tf32=True)
        yield Candidate("eager bfloat16 channels_last", True, torch.bfloat16, last)
        yield Candidate("SCOATNet bfloat16 channels_last", False, torch.bfloat16, last)
        if compile:
            yield Candidate("compile bfloat16 channels_last", True, torch.bfloat16, last, "default")
            yield Candidate("compile max-autotune bfloat16 channels_last", True, torch.bfloat16, last, "max-autotune")
    elif compile:
        yield Candidate("compile float32", True, torch.float32, contiguous, "default")


def run(
    device: torch.device,
    widths: Sequence[int] = (32,),
    batches: Sequence[int] = (1,),
    size: int = 512,
    seconds: float = 3.0,
    compile: bool = False,
    commit: str = "",
    output: Path | None = None,
) -> dict:
    """Measures, printing each row as it is done, and writes ``output`` anew after each.

    Returns:
        What the file holds: the machine, ``copy_gb_per_s``, and ``rows`` with ``name, width, batch, size, dtype,
        us_per_slice, peak_mib, error, reason``; times are null where ``reason`` is not, the peak where not on a GPU.
    """
    result = {**facts(device, commit), "copy_gb_per_s": copy_gb_per_s(device, 0.5), "rows": []}
    print(COLUMNS)
    for width in widths:
        torch.manual_seed(0)
        net = SCOATNet(width=width).eval()
        baseline = EagerSCOATNet(width).eval()
        baseline.load_state_dict(net.state_dict())
        x = torch.rand(max(batches), 1, size, size)
        with torch.no_grad():
            exact = copy.deepcopy(baseline).double().to(device)(x[:1].double().to(device))
        for batch in batches:
            for candidate in candidates(device, compile):
                row = {"name": candidate.name, "width": width, "batch": batch, "size": size}
                row |= {"dtype": str(candidate.dtype)[6:]}
                row |= measure(candidate, baseline if candidate.baseline else net, x[:batch].to(device), exact, seconds)
                result["rows"].append(row)
                print(line(row), flush=True)
                if output is not None:
                    save(output, result)
    return result


def measure(candidate: Candidate, net: nn.Module, x: Tensor, exact: Tensor, seconds: float) -> dict:
    """Checks, then times. ``x`` [N, 1, H, W]; ``exact`` are the logits of its first slice in float64."""
    row: dict = {"us_per_slice": None, "peak_mib": None, "error": None, "reason": None}
    try:
        with torch.no_grad(), _tf32(candidate.tf32):
            call = _prepare(candidate, net, x)
            error = ((call()[:1].double() - exact).abs().max() / exact.abs().max()).item()
            row["error"] = error
            if not error <= candidate.bound:
                row["reason"] = f"its error is {error:.1e}, allowed is {candidate.bound:.0e}"
                return row
            if x.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            row["us_per_slice"] = median_ms(call, x.device, seconds) * 1000 / len(x)
            if x.is_cuda:
                row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    except Exception as failure:  # out of memory, say: the other rows keep their numbers
        row["reason"] = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
    return row


def passed(result: dict) -> bool:
    """Whether every row of a run has its time."""
    return all(row["reason"] is None for row in result["rows"])


def line(row: dict) -> str:
    """One row, with the reason at the end where there is no time."""
    us, peak, error = row["us_per_slice"], row["peak_mib"], row["error"]
    numbers = (
        f"{'-' if us is None else format(us, '.1f'):>13}{'-' if us is None else format(1e6 / us, '.1f'):>10}"
        f"{'-' if peak is None else format(peak, '.0f'):>10}{'-' if error is None else format(error, '.1e'):>9}"
    )
    reason = f"  no time: {row['reason']}" if row["reason"] else ""
    return f"{row['name']:42}{row['width']:>6}{row['batch']:>6}{numbers}{reason}"


def _prepare(candidate: Candidate, net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    net = copy.deepcopy(net).to(x.device, candidate.dtype, memory_format=candidate.layout)
    if candidate.mode is not None:
        torch._dynamo.reset()
        net = torch.compile(net, mode=candidate.mode, fullgraph=True, dynamic=False)
    given = x.to(candidate.dtype, memory_format=candidate.layout)
    return lambda: net(given)


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = on
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
