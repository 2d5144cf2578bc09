"""The cases of ``scoat-fast bench ops`` under pytest-benchmark, at batch 1: each is checked, then timed.

pytest benchmarks/test_ops.py --benchmark-group-by=group
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from scoat_fast import ops
from scoat_fast.bench import check
from scoat_fast.bench.calls import DIRECTIONS, IMPLEMENTATIONS, call_of, gradients_of_outputs, refusal

pytest.importorskip("pytest_benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NAMES = [name for name in IMPLEMENTATIONS[DEVICE] if name != "compile"]  # which compiles for longer than it runs
CASES = [  # a batch of none has the names of the samples without their data
    pytest.param(op, sample.name, layout, direction, name, id=f"{op.name}-{sample.name}-{layout}-{direction}-{name}")
    for op in ops.ALL
    for sample in op.samples("real", DTYPE, batch=0)
    for layout in ("contiguous", "channels_last")
    for direction in DIRECTIONS
    for name in NAMES
]


@pytest.mark.parametrize(("op", "sample", "layout", "direction", "name"), CASES)
def test_speed(op, sample, layout, direction, name, benchmark):
    args = next(s.args for s in op.samples("real", DTYPE, DEVICE, layout=layout) if s.name == sample)
    reason = refusal(op, name, args)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    grads = gradients_of_outputs(op, args)
    own = name != "eager"
    with ops.use_backend(name) if own else contextlib.nullcontext():
        with check.empty_is_nan() if own else contextlib.nullcontext():
            call = call_of(op, name, direction, args, grads)
            assert check.judge(call(), check.truth(op, direction, args, grads)).reason is None

        def run() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{op.name}, {sample}, {layout}, {direction}"
        benchmark(run)
