"""Runs every kernel once on a GPU, forwards and backwards, for compute-sanitizer to watch; checks what they compute.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py
"""

from __future__ import annotations

import sys

import torch

from scoat_fast import ops
from scoat_fast.ops import parity


def main() -> int:
    failures = 0
    for implementation in ("cuda", "triton"):
        for op in ops.ALL:
            for dtype in (torch.float32, torch.bfloat16):
                for sample in op.samples("awkward", dtype, "cuda"):
                    try:
                        wrong = [one for one in parity.measure(op, implementation, sample) if not one.holds]
                    except RuntimeError as refusal:
                        wrong = [refusal]
                    if wrong:
                        failures += 1
                        print(f"{op.name} {implementation} {dtype} {sample.name}: {wrong}")
    torch.cuda.synchronize()
    print(f"{failures} failures")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
