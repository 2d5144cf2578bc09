"""The plan in C++ on a CPU with AMX, in bfloat16: ``csrc/amx.cpp``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C  # an ImportError here is the reason that is printed
from . import cpu, reference
from .cpu import features
from .pack import Weights
from .plan import Attend, Convolve, Excite, Gate, Head, Slice, Step

View = Callable[[Slice], Tensor]
EDGE, WIDE, NARROW = 16, 32, 16  # outputs of a tile of weights, and channels of a chunk: as in csrc/amx.cpp
TILE = EDGE * WIDE


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run on a device in a dtype, or None where it can."""
    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    if dtype != torch.bfloat16:
        return f"computes in bfloat16, not in {str(dtype)[6:]}"
    return _C.amx.why_not() if hasattr(_C, "amx") else "was left out of the build: its compiler knows no AMX"


def parts(step: Step, height: int, width: int, device: torch.device, dtype: torch.dtype) -> int:
    """In how many parts a step leaves sums over ``height`` x ``width`` pixels."""
    if isinstance(step, Gate):
        return cpu.parts(step, height, width, device, dtype)
    return _C.amx.parts(height, width)


def rows(step: Convolve, dtype: torch.dtype) -> int:
    """How many rows of weights a recalibrated step wants for each slice: all of its tiles, in whole cache lines."""
    products = sum(_products(step, taps) for taps in (3, 1)[: 1 + (step.shortcut is not None and step.shortcut.scaled)])
    count = -(-step.out.channels // EDGE) * products * TILE
    return -(-count // (2 * step.channels)) * 2


def fuses(step: Convolve, dtype: torch.dtype) -> bool:
    """Whether a plan for this backend may hold a convolution with a source ``below`` or ``taps``, such as this one."""
    return step.below is not None and step.attention is None and step.scale is None


def kernel(step: Step, width: int, device: torch.device, dtype: torch.dtype) -> str:
    """What runs a step in rows of ``width`` pixels, for people to read."""
    match step:
        case Convolve():
            return "scale_weights, convolve" if step.scale is not None else "convolve"
        case Head():
            return "output"
        case _:
            return cpu.kernel(step, width, device, dtype)


def prepare(step: Step, weights: Weights, device: torch.device, dtype: torch.dtype) -> Weights:
    """Weights as tiles, by name: in float32 where they get scaled for each slice."""
    if isinstance(step, Convolve):
        channels = [used.channels for used in step.inputs]
        return {name: _packed(*weights[name], channels, scaled) for name, scaled in step.products.items()}
    if isinstance(step, Head):
        return {step.weights: _packed(*weights[step.weights], [step.source.channels])}
    if isinstance(step, Attend):
        psi, bias = weights[step.weights]
        project = _packed(*weights[step.project], [step.row.channels])
        return {step.project: project, step.weights: (_padded(psi.flatten()).float(), bias.float())}
    return reference.prepare(step, weights, device, dtype)


def bind(step: Step, weights: Weights, view: View, pixels: int) -> Callable[[], None]:
    """A call that runs a step on the memory that ``view`` gives; a slice has ``pixels`` on the step's level."""
    if isinstance(step, Gate | Excite):
        return cpu.bind(step, weights, view, pixels)
    match step:
        case Convolve():
            call, arguments = _C.amx.convolve, _convolve(step, weights, view)
        case Attend():
            call, arguments = _C.amx.attend, cpu.attend(step, weights, view)
        case Head():
            call, arguments = _C.amx.output, cpu.output(step, weights, view)

    def run(kept=(weights, view)) -> None:  # the arguments are addresses in these
        call(**arguments, threads=torch.get_num_threads())

    return run


def _convolve(step: Convolve, weights: Weights, view: View) -> dict:
    shortcut = step.shortcut
    first, *second = (features(view(source)) for source in step.inputs)
    scaled = None if step.scale is None else view(step.scaled)
    own = weights[step.weights]
    beside = (None, None) if shortcut is None else weights[shortcut.weights]
    return {
        "size": view(step.out).shape[:3],
        "first": first,
        "second": second[0] if second else None,
        "below": step.below is not None,
        "taps": step.size,
        "scale": 0 if step.scale is None else view(step.scale).data_ptr(),
        "scaling": (
            0 if scaled is None else own[0].data_ptr(),
            beside[0].data_ptr() if shortcut and shortcut.scaled else 0,
        ),
        "channels": 0 if step.scale is None else view(step.scale).stride(0),
        "scaled": 0 if scaled is None else scaled.data_ptr(),
        "scaled_step": 0 if scaled is None else scaled.stride(0),
        "packed": cpu.addresses(own),
        "shortcut": (0, 0) if shortcut is None else cpu.addresses(beside),
        **cpu.results(step, view),
    }


def _chunks(channels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Of the channels of some sources: the first of them all, how many there are, and for how many there is room."""
    found, first = [], 0
    for count in channels:
        for start in range(0, count, WIDE):
            some = min(WIDE, count - start)
            found.append((first + start, some, NARROW if some <= NARROW else WIDE))
        first += count
    return found


def _products(step: Convolve, taps: int) -> int:
    """Tiles of inputs that 16 pixels are multiplied from."""
    rooms = [room for _, _, room in _chunks([used.channels for used in step.inputs])]
    return sum(1 if taps == 1 else 9 if room == WIDE else 6 for room in rooms)


def _packed(weight: Tensor, bias: Tensor, channels: Sequence[int], scaled: bool = False) -> tuple[Tensor, Tensor]:
    """[out, in, k, k] -> tiles as csrc/amx.cpp wants them, and the bias at their length."""
    padded = _padded(weight)
    products = []  # [out, ..., 32]
    for first, count, room in _chunks(channels):
        part = F.pad(padded[:, first : first + count], (0, 0, 0, 0, 0, room - count)).permute(0, 2, 3, 1)
        if part.shape[1] == 3 and room == NARROW:
            part = F.pad(part, (0, 0, 0, 1))  # to four taps in a row, as two products
        if part.shape[1] == 1:
            part = F.pad(part, (0, WIDE - room))
        products.append(part.reshape(len(padded), -1, WIDE))
    tiles = torch.cat(products, 1).unflatten(0, (-1, EDGE)).unflatten(3, (-1, 2))  # [tiles, 16, products, 16, 2]
    tiles = tiles.permute(0, 2, 3, 1, 4)
    pairs = len(tiles) // 2 * 2
    blocks = tiles[:pairs].unflatten(0, (-1, 2)).transpose(1, 2).flatten(), tiles[pairs:].flatten()
    return torch.cat(blocks).to(torch.float32 if scaled else torch.bfloat16), _padded(bias).float()


def _padded(x: Tensor) -> Tensor:
    """With zeros up to whole tiles of outputs, the first dimension."""
    return torch.cat([x, x.new_zeros(-len(x) % EDGE, *x.shape[1:])])
