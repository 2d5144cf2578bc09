"""The speed of the whole network: eager and compiled PyTorch, ``SCOATNet``, the engine and, on CPUs, ONNX Runtime.

A row is checked against float64 before it is timed; one that fails has no number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clock import copy_gb_per_s, matrix_tflop_per_s, median_ms
from ..engine.cost import cost
from ..engine.layout import FLOAT8
from ..engine.plan import Convolve, build, summary
from ..engine.runner import MASK_DICE, dice
from ..files import check_output
from ..model import SCOATNet
from .contenders import Contender, baseline_of, contenders, engine_for, engines
from .machine import facts, reason_of, save
from .memory import peak_bytes

FLOAT8_DICE = 0.75  # with the exact mask of noise, whose logits are mostly near the threshold; chance is 0.5

COLUMNS = (
    f"{'name':42}{'width':>6}{'batch':>6}{'ms a batch':>12}{'us a slice':>13}{'slices/s':>10}{'of floor':>10}"
    f"{'peak MiB':>10}{'error':>9}"
)


def run(
    device: torch.device,
    widths: Sequence[int] = (32,),
    batches: Sequence[int] = (1,),
    size: int = 512,
    seconds: float = 3.0,
    compile: bool = False,
    commit: str = "",
    output: Path | None = None,
    details: bool = False,
    autotune: bool = False,
) -> dict:
    """Measures, printing each row as it is done, and writes ``output`` anew after each.

    Returns:
        What the file holds: the machine, ``copy_gb_per_s`` and ``matrix_tflop_per_s`` by dtype, and ``rows`` with
        ``name, width, batch, size, dtype, ms_per_batch, us_per_slice, peak_mib, error, percent_of_floor, reason``:
        times, the first of which is the latency, are null where ``reason`` is not, the peak for ONNX Runtime, too. On a
        CPU the peak is without weights and input. The floor is what those two rates leave for the bytes and operations
        of a direct convolution: Winograd's algorithm may be faster. With ``details`` also ``steps``, the engine's steps
        one by one, and ``convolutions``, what PyTorch's own reach at the network's shapes.
    """
    if output is not None:
        check_output(output)
    result = {**facts(device, commit), "copy_gb_per_s": copy_gb_per_s(device, 0.5)}
    dtypes = engines(device)
    result["matrix_tflop_per_s"] = {str(dtype)[6:]: matrix_tflop_per_s(device, dtype, 0.5) for dtype in dtypes}
    result |= {"steps": [], "convolutions": [], "rows": []}

    def keep(part: str, row: dict, text: str) -> None:
        result[part].append(row)
        print(text, flush=True)
        if output is not None:
            save(output, result)

    print(COLUMNS)
    for width in widths:
        torch.manual_seed(0)
        net = SCOATNet(width=width).eval()
        x = torch.rand(max(batches), 1, size, size)
        with torch.no_grad():
            baseline = baseline_of(net).double().to(device)
            exact = torch.cat([baseline(x[k : k + 1].double().to(device)).cpu() for k in range(len(x))])
            del baseline
        for batch in batches:
            for contender in contenders(device, compile, autotune):
                row = {"name": contender.name, "width": width, "batch": batch, "size": size}
                row |= {"dtype": str(contender.dtype)[6:]}
                row |= measure(contender, net, x[:batch].to(device), exact[:batch], seconds)
                row["percent_of_floor"] = _percent(net, row, result)
                keep("rows", row, line(row))
        if details:
            given = x.to(device)
            for dtype, backends in engines(device).items():
                for backend in backends if device.type == "cpu" or dtype == torch.bfloat16 else ():
                    print(f"the steps of engine {backend}")
                    for row in step_rows(net, given, backend, dtype, seconds / 10, _rates(result, str(dtype)[6:])):
                        keep("steps", row, f"{_rate(row)}{row['percent_of_floor']:6.0f} % of the floor")
            for row in convolution_rows(net, given, torch.bfloat16 if given.is_cuda else torch.float32, seconds / 10):
                keep("convolutions", row, _rate(row))
    return result


def _rate(row: dict) -> str:
    return f"{row['name']:106}{row['us_per_slice']:10.1f} us{row['gflop_per_s']:9.0f} GFLOP/s"


def measure(contender: Contender, net: SCOATNet, x: Tensor, exact: Tensor, seconds: float) -> dict:
    """Checks, then times. ``x`` [N, 1, H, W]; ``exact`` [N, 1, H, W] are its logits in float64, on the CPU."""
    row: dict = {"ms_per_batch": None, "us_per_slice": None, "peak_mib": None, "error": None, "reason": None}
    try:
        with torch.no_grad(), _tf32(contender.tf32):
            if x.is_cuda:
                torch.cuda.empty_cache()  # of the contender before
            call = contender.start(net, x)
            found = call().cpu().double()
            row["error"] = ((found - exact).abs().max() / exact.abs().max()).item()
            row["reason"] = wrong(contender, row["error"], found, exact, getattr(call, "mask", None))
            if row["reason"] is not None:
                return row
            if contender.in_torch:
                held = 0 if x.is_cuda else getattr(call, "held_bytes", 0)  # a GPU's peak has it in it
                row["peak_mib"] = (peak_bytes(call, x.device) + held) / 2**20
            row["ms_per_batch"] = median_ms(call, x.device, seconds)
            row["us_per_slice"] = row["ms_per_batch"] * 1000 / len(x)
    except Exception as failure:  # out of memory, say: the other rows keep their numbers
        row["reason"] = reason_of(failure)
    return row


def wrong(
    contender: Contender, error: float, found: Tensor, exact: Tensor, mask: Callable[[float], Tensor] | None
) -> str | None:
    """Why results get no number, or None: the logits of all slices, and the masks that some contenders make, too.

    The masks are of about half of the pixels, and held against the exact one and against that of ``found``.
    """
    if not error <= contender.bound:
        return f"its error is {error:.1e}, allowed is {contender.bound:.0e}"
    limit = exact.median().clamp(-4, 4)
    overlap = dice(found > limit, exact > limit)
    if contender.dtype == FLOAT8 and not overlap >= FLOAT8_DICE:
        return f"the Dice of its mask is {overlap:.4f}, wanted is {FLOAT8_DICE}"
    if mask is not None:
        overlap = dice(mask(limit.sigmoid().item()).bool().cpu(), found > limit)
        if not overlap >= MASK_DICE:
            return f"the Dice of its mask with its own logits is {overlap:.4f}, wanted is {MASK_DICE}"
    return None


def step_rows(
    net: SCOATNet, x: Tensor, backend: str, dtype: torch.dtype, seconds: float, rates: tuple[float, float]
) -> Iterator[dict]:
    """Every step of one of the engine's backends by itself: in a network it may find its input in a cache.

    ``rates`` are bytes and operations a second, for the floors.
    """
    engine = engine_for(net, x, backend, dtype)
    engine(x)
    for step, call in engine.calls(len(x)):
        spent = median_ms(call, x.device, seconds) * 1000 / len(x)
        found = cost(engine.plan, step, len(x), *engine.padded_size, dtype.itemsize)
        floor = found.seconds(*rates) * 1e6 / len(x)
        row = _detail(net.width, x, dtype, summary(step), spent) | {"backend": backend, "kernel": engine.kernel(step)}
        row |= {"gflop_per_s": found.flops / len(x) / spent / 1e3, "gb_per_s": found.bytes / len(x) / spent / 1e3}
        yield row | {"floor_us": floor, "percent_of_floor": 100 * floor / spent}


def convolution_rows(net: SCOATNet, x: Tensor, dtype: torch.dtype, seconds: float) -> Iterator[dict]:
    """PyTorch's own 3x3 convolution at each of the network's shapes, in channels_last."""
    threes = [step for step in build(net).steps if isinstance(step, Convolve) and step.size == 3]
    shapes = {(step.level, step.channels, step.out.channels) for step in threes}
    for level, channels, out in sorted(shapes):
        height, width = (size >> level for size in x.shape[2:])
        given = torch.rand(len(x), channels, height, width, device=x.device, dtype=dtype)
        weight = torch.rand(out, channels, 3, 3, device=x.device, dtype=dtype)
        given, weight = (t.contiguous(memory_format=torch.channels_last) for t in (given, weight))
        with torch.no_grad():
            spent = median_ms(lambda a=given, b=weight: F.conv2d(a, b, padding=1), x.device, seconds) * 1000 / len(x)
        name = f"{channels} -> {out} channels at {height}x{width}"
        rate = 2 * 9 * channels * out * height * width / spent / 1e3
        yield _detail(net.width, x, dtype, name, spent) | {"gflop_per_s": rate}


def _detail(width: int, x: Tensor, dtype: torch.dtype, name: str, us: float) -> dict:
    return {"name": name, "width": width, "batch": len(x), "dtype": str(dtype)[6:], "us_per_slice": us}


def _percent(net: SCOATNet, row: dict, result: dict) -> float | None:
    """The floor as a percentage of the time: for TF32, too, of the rate of float32."""
    if row["us_per_slice"] is None:
        return None
    plan, itemsize = build(net), getattr(torch, row["dtype"]).itemsize
    rates = _rates(result, row["dtype"])
    costs = (cost(plan, step, row["batch"], row["size"], row["size"], itemsize) for step in plan.steps)
    return sum(found.seconds(*rates) for found in costs) * 1e8 / row["batch"] / row["us_per_slice"]


def _rates(result: dict, dtype: str) -> tuple[float, float]:
    """Bytes copied and operations multiplied a second, as measured."""
    return result["copy_gb_per_s"] * 1e9, result["matrix_tflop_per_s"][dtype] * 1e12


def passed(result: dict) -> bool:
    """Whether every row of a run has its time."""
    return all(row["reason"] is None for row in result["rows"])


def line(row: dict) -> str:
    """One row, with the reason at the end where there is no time."""
    us, peak, error, percent = (row[key] for key in ("us_per_slice", "peak_mib", "error", "percent_of_floor"))
    numbers = (
        f"{'-' if us is None else format(row['ms_per_batch'], '.2f'):>12}"
        f"{'-' if us is None else format(us, '.1f'):>13}{'-' if us is None else format(1e6 / us, '.1f'):>10}"
        f"{'-' if percent is None else format(percent, '.0f') + ' %':>10}"
        f"{'-' if peak is None else format(peak, '.0f'):>10}{'-' if error is None else format(error, '.1e'):>9}"
    )
    reason = f"  no time: {row['reason']}" if row["reason"] else ""
    return f"{row['name']:42}{row['width']:>6}{row['batch']:>6}{numbers}{reason}"


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
