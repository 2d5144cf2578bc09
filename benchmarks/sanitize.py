"""Runs every kernel once on a GPU, for compute-sanitizer to watch: the operations forwards and backwards, the engine.
Checks what they compute.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py
"""

from __future__ import annotations

import sys

import torch

import scoat_fast
from scoat_fast import ops
from scoat_fast.bench.contenders import BOUND, engine_for, engines
from scoat_fast.engine.layout import FLOAT8
from scoat_fast.ops import parity

FORMS = ({"width": 8}, {"width": 3, "equations": "paper"}, {"width": 32}, {"width": 64})


def main() -> int:
    failures = 0
    for implementation in ("cuda", "triton"):
        for op in ops.ALL:
            # float16 differs from bfloat16 in how values are converted, not in where they lie
            for dtype, size in ((torch.float32, "awkward"), (torch.bfloat16, "awkward"), (torch.float16, "tiny")):
                for sample in op.samples(size, dtype, "cuda"):
                    try:
                        wrong = [one for one in parity.measure(op, implementation, sample) if not one.holds]
                    except RuntimeError as refusal:
                        wrong = [refusal]
                    if wrong:
                        failures += 1
                        print(f"{op.name} {implementation} {dtype} {sample.name}: {wrong}")
    for form in FORMS:
        torch.manual_seed(0)
        net, x = scoat_fast.SCOATNet(**form).eval().cuda(), torch.rand(2, 1, 48, 80, device="cuda")
        for dtype in (torch.float32, torch.bfloat16, FLOAT8):
            for backend in engines(x.device).get(dtype, ()):
                found = engine_for(net, x, backend, dtype).parity(x)
                if not found.relative < BOUND[dtype]:
                    failures += 1
                    print(f"engine {backend} {form} {dtype}: {found}")
    torch.cuda.synchronize()
    print(f"{failures} failures")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
