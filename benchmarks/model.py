"""Times the forward pass of a network: eager in both memory layouts, and torch.compile on a GPU.

Each implementation is checked against float64 before it is timed; one that fails gets no time.

    python benchmarks/model.py --width 32 --size 512 --batch 1 8 32 -o benchmarks/results/GPU.json
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

import scoat_fast
from scoat_fast import SCOATNet

BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the largest logit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--commit", default="", help="what is measured, where there is no git")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = SCOATNet(width=args.width).eval().to(device)
    rows = [row for batch in args.batch for row in measure(net, batch, args.size, args.seconds)]
    result = {**machine(device, args.commit), "rows": rows}
    for row in rows:
        times = "failed its check" if row["ms_per_slice"] is None else f"{row['ms_per_slice']:9.3f} ms a slice"
        print(f"{row['implementation']:28} batch {row['batch']:3}  {times}  error {row['error']:.1e}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(net: SCOATNet, batch: int, size: int, seconds: float) -> list[dict]:
    """One row for each implementation at one batch size."""
    device = next(net.parameters()).device
    x = torch.rand(batch, 1, size, size, device=device)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x[:1].double())
    rows = []
    for name, dtype, layout, compiled in implementations(device):
        candidate = copy.deepcopy(net).to(dtype=dtype, memory_format=layout)
        call = torch.compile(candidate, mode="max-autotune") if compiled else candidate
        given = x.to(dtype=dtype, memory_format=layout)
        with torch.no_grad():
            error = ((call(given)[:1].double() - exact).abs().max() / exact.abs().max()).item()
            ms = clock(lambda: call(given), device, seconds) / batch if error <= BOUND[dtype] else None  # noqa: B023
        row = {"implementation": name, "dtype": str(dtype)[6:], "width": net.width, "shape": list(x.shape)}
        rows.append(row | {"batch": batch, "error": error, "ms_per_slice": ms})
    return rows


def implementations(device: torch.device):
    """Name, dtype, layout, and whether it is compiled."""
    yield "eager float32", torch.float32, torch.contiguous_format, False
    yield "eager float32 channels_last", torch.float32, torch.channels_last, False
    if device.type == "cuda":
        yield "eager bfloat16 channels_last", torch.bfloat16, torch.channels_last, False
        yield "compile bfloat16", torch.bfloat16, torch.channels_last, True


def clock(call, device: torch.device, seconds: float) -> float:
    """The median time of a call in ms."""
    times = []
    call()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 3:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def machine(device: torch.device, commit: str) -> dict:
    """Where and with what a measurement was made."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "scoat_fast": scoat_fast.__version__}
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": cpu,
        "versions": versions,
        "commit": commit or git.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
