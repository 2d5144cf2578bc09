"""The plan in C++ on a CPU, in float32: ``csrc/engine_cpu.cpp``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C  # an ImportError here is the reason that is printed
from ..ops import _native
from . import reference
from .pack import Weights
from .plan import Attend, Convolve, Excite, Gate, Head, Slice, Step

View = Callable[[Slice], Tensor]
LANES = _C.cpu.panel() // 2
# 3 rows of a kernel to 6 points: G of F(4x4, 3x3) in arXiv 1509.09308, for the points of csrc/winograd.h
A2, B2 = (A := 0.625) ** 2, (B := 1.375) ** 2
KERNEL_TO_POINTS = torch.tensor(
    [
        [1 / (A2 * B2), 0, 0],
        *([1 / n, p / n, p * p / n] for p, n in ((A, 2 * A2 * (A2 - B2)), (-A, 2 * A2 * (A2 - B2)))),
        *([1 / n, p / n, p * p / n] for p, n in ((B, 2 * B2 * (B2 - A2)), (-B, 2 * B2 * (B2 - A2)))),
        [0, 0, 1],
    ],
    dtype=torch.float64,
    device="cpu",  # whatever the default is where this is first imported
)
TILES, DEEP_TILES = 24, 72  # in a work item; more where the weights are many, so that they are read less often
DEEP = 256  # output channels from which on that is so


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run on a device in a dtype, or None where it can."""
    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    return None if dtype == torch.float32 else f"computes in float32, not in {str(dtype)[6:]}"


def parts(step: Step, height: int, width: int, device: torch.device, dtype: torch.dtype) -> int:
    """In how many parts a step leaves sums over ``height`` x ``width`` pixels."""
    if isinstance(step, Gate):
        return _C.cpu.tiles(height, width)
    return -(-(-(-height // 4) * -(-width // 4)) // _tiles(step))


rows = reference.rows  # features are scaled here, too


def fuses(step: Convolve, dtype: torch.dtype) -> bool:
    """Whether a plan for this backend may hold a convolution with a source ``below`` or ``taps``, such as this one."""
    return False


def kernel(step: Step, width: int, device: torch.device, dtype: torch.dtype) -> str:
    """What runs a step in rows of ``width`` pixels, for people to read."""
    match step:
        case Convolve(size=3):
            return f"convolve, Winograd F(4x4, 3x3), {_tiles(step)} tiles"
        case Head():
            return f"output, Winograd F(4x4, 3x3), {_tiles(step)} tiles"
        case Convolve():
            return "project"
        case Attend():
            return "attend"
        case Gate():
            return "up_forward"
        case _:
            return reference.kernel(step, width, device, dtype)


def prepare(step: Step, weights: Weights, device: torch.device, dtype: torch.dtype) -> Weights:
    """Weights as panels, by name; those of 3x3 convolutions at the 36 points of a tile."""
    if isinstance(step, Convolve):
        return {name: _packed(*weights[name]) for name in step.products}
    if isinstance(step, Head):
        return {step.weights: _packed(*weights[step.weights])}
    if isinstance(step, Attend):
        psi, bias = weights[step.weights]
        return {step.project: _packed(*weights[step.project]), step.weights: (psi.float().flatten(), bias.float())}
    return reference.prepare(step, weights, device, dtype)


def bind(step: Step, weights: Weights, view: View, pixels: int) -> Callable[[], None]:
    """A call that runs a step on the memory that ``view`` gives; a slice has ``pixels`` on the step's level."""
    if isinstance(step, Excite):
        return _excite(step, weights, view, pixels)
    if isinstance(step, Gate):
        return _gate(step, view)
    if isinstance(step, Convolve):
        kernel, arguments = ("convolve", _convolve(step, weights, view)) if step.size == 3 else (
            "project", _project(step, weights, view))  # fmt: skip
    else:
        kernel, arguments = ("attend", attend(step, weights, view)) if isinstance(step, Attend) else (
            "output", output(step, weights, view) | {"tiles": _tiles(step)})  # fmt: skip
    call = getattr(_C.cpu, kernel)

    def run(kept=(weights, view)) -> None:  # the arguments are addresses in these
        call(**arguments, threads=torch.get_num_threads())

    return run


def _convolve(step: Convolve, weights: Weights, view: View) -> dict:
    shortcut, out = step.shortcut, view(step.out)
    first, *second = (view(source) for source in step.sources)
    return {
        "size": out.shape[:3],
        "tiles": _tiles(step),
        "first": features(first),
        "second": features(second[0]) if second else None,
        "scale": 0 if step.scale is None else view(step.scale).data_ptr(),
        "packed": addresses(weights[step.weights]),
        "shortcut": (0, 0) if shortcut is None else addresses(weights[shortcut.weights]),
        "shortcut_scaled": shortcut is not None and shortcut.scaled,
        **results(step, view),
    }


def results(step: Convolve, view: View) -> dict:
    """What a convolution makes of its sums, and where: arguments of its kernel."""
    shortcut = step.shortcut
    return {
        "out": features(view(step.out)),
        "relu": step.relu,
        "residual_before": step.residual == "before",
        "residual_after": step.residual == "after",
        "pooled": None if step.pooled is None else features(view(step.pooled)),
        "sums": 0 if step.sums is None else view(step.sums).data_ptr(),
        "sum_channels": 0 if step.sums is None else view(step.sums).stride(1),
        "shortcut_out": None if shortcut is None else features(view(shortcut.out)),
        "shortcut_relu": shortcut is not None and shortcut.relu,
    }


def _project(step: Convolve, weights: Weights, view: View) -> dict:
    (source,), out = step.sources, view(step.out)
    packed = addresses(weights[step.weights])
    return {"size": out.shape[:3], "source": features(view(source)), "packed": packed, "out": features(out)}


def attend(step: Attend, weights: Weights, view: View) -> dict:
    """The arguments of the kernel for an attention map."""
    psi, bias = weights[step.weights]
    out = view(step.out)
    return {
        "size": out.shape,
        "row": features(view(step.row)),
        "below": features(view(step.below)),
        "packed": addresses(weights[step.project]),
        "psi": psi.data_ptr(),
        "bias": bias.item(),
        "each": step.each,
        "map": out.data_ptr(),
    }


def output(step: Head, weights: Weights, view: View) -> dict:
    """The arguments of the kernel for a head."""
    source, out = view(step.source), view(step.out).data_ptr()
    return {
        "size": source.shape[:3],
        "source": features(source),
        "classes": step.out.channels,
        "packed": addresses(weights[step.weights]),
        "logits": out if step.threshold is None else 0,
        "mask": 0 if step.threshold is None else out,
        "threshold": 0 if step.threshold is None else view(step.threshold).data_ptr(),
    }


def _gate(step: Gate, view: View) -> Callable[[], None]:
    y, out = (view(used).permute(0, 3, 1, 2) for used in (step.below, step.out))
    gate = None if step.attention is None else view(step.attention)[:, None]
    sums = None if step.sums is None else _native.Sums(out, out.shape[1], view(step.sums))
    return lambda: _native.up_forward(y, gate, out, sums)


def _excite(step: Excite, weights: Weights, view: View, pixels: int) -> Callable[[], None]:
    """A few thousand numbers, in stock PyTorch; slice by slice, since its bits depend on how many there are."""
    calls = [
        reference.bind(step, weights, lambda used, k=k: view(used)[k : k + 1], pixels)
        for k in range(len(view(step.out)))
    ]

    def run() -> None:
        for call in calls:
            call()

    return run


def _tiles(step: Convolve | Head) -> int:
    return DEEP_TILES if step.out.channels >= DEEP else TILES


def _packed(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in, k, k] -> panels [points, ceil(out / panel), in, panel], and the bias at that length, float32."""
    if weight.shape[2] == 3:
        weight = KERNEL_TO_POINTS @ weight @ KERNEL_TO_POINTS.T
    out, channels, rows, columns = weight.shape
    panel = 2 * LANES
    fill = -out % panel
    points = F.pad(weight.permute(2, 3, 1, 0).reshape(rows * columns, channels, out), (0, fill))
    panels = points.view(rows * columns, channels, -1, panel).transpose(1, 2)
    return panels.float().contiguous(), F.pad(bias, (0, fill)).float()


def features(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), *x.stride()[:3], x.shape[3]


def addresses(packed: tuple[Tensor, Tensor]) -> tuple[int, int]:
    return packed[0].data_ptr(), packed[1].data_ptr()
