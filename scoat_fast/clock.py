"""The time of a call, and the bandwidth of a copy to hold it against."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch

FEWEST = 5  # runs that a median is taken of
FLUSH = 256 << 20  # bytes: more than the caches of a GPU, or of the cores of a small machine, hold
MATRIX = {"cuda": 8192, "cpu": 1536}  # rows and columns
COPIED = {"cuda": 1 << 30, "cpu": 256 << 20}  # bytes


def median_ms(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The median time of a call in ms, over about ``seconds`` of runs and at least five.

    Before every run the caches are filled with something else, by reading it, so that inputs come from memory and no
    writing is left over. On a GPU the runs are timed by events, on a CPU by the clock; what ``call`` runs on is the
    current stream of ``device``.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return _median_ms(call, device, seconds)


def _median_ms(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    flush = torch.ones(FLUSH // 4, device=device)  # written: pages that never were take no room in a cache
    runs = _gpu_runs if device.type == "cuda" else _cpu_runs
    call()
    until = time.perf_counter() + seconds
    times: list[float] = []
    while not times or time.perf_counter() < until:
        times += runs(call, flush)
    return statistics.median(times)


def copy_gb_per_s(device: torch.device, seconds: float) -> float:
    """The bandwidth of a large copy, bytes read and bytes written together, in GB/s."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), device, seconds) / 1e6


def matrix_tflop_per_s(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The rate of a large matrix product, in TFLOP/s; of float8, into bfloat16 on a GPU, and on a CPU of bfloat16."""
    size = MATRIX[device.type]
    if device.type == "cpu" and dtype.itemsize == 1:
        dtype = torch.bfloat16  # what the reference multiplies; no CPU multiplies float8, and PyTorch takes minutes
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> torch.Tensor:
        if dtype.itemsize == 1:
            return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)
        return a @ b

    return 2 * size**3 / median_ms(product, device, seconds) / 1e9


def _cpu_runs(call: Callable[[], object], flush: torch.Tensor) -> list[float]:
    times = []
    for _ in range(FEWEST):
        flush.sum()
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1000)
    return times


def _gpu_runs(call: Callable[[], object], flush: torch.Tensor) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(FEWEST)]
    for start, end in events:  # queued without waiting: the flush hides the time that a launch takes
        flush.sum()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]
