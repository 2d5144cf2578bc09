"""The memory that a call takes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that PyTorch's allocator has given out at once during a call.

    On a GPU with what was there before, such as weights and input, and with all that CUDA graphs keep for themselves:
    their replays allocate nothing. On a CPU what the call takes beside that.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            graphs = [segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] != (0, 0)]
            return torch.cuda.max_memory_allocated() + sum(s["total_size"] - s["allocated_size"] for s in graphs)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes a line when it starts and one at its end
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
