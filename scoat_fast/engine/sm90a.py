"""The plan's 3x3 convolutions on Hopper's tensor cores, in CUDA C++ (``csrc/hopper.cu``); all other steps in Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _native
from . import triton
from .layout import FLOAT8, dtype_of
from .pack import Weights, in_units
from .plan import Convolve, Gate, Head, Slice, Step, reads

View = Callable[[Slice], Tensor]
DTYPES = (torch.float16, torch.bfloat16, FLOAT8)
# In bfloat16: 8 channels beside each other in shared memory, without a swizzle, should that go wrong on some card.
planes = False


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run on a device in a dtype, or None where it can."""
    if dtype not in DTYPES:
        return f"computes in float16, bfloat16 or float8_e4m3fn, not in {str(dtype)[6:]}"
    if planes and dtype != torch.bfloat16:
        return "computes in bfloat16 alone while sm90a.planes is set"
    if device.type != "cuda":
        return f"needs CUDA tensors, got {device.type}"
    if not hasattr(_native._C, "hopper"):
        return "was built without an nvcc that knows sm_90a (see scoat-fast doctor)"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"needs compute capability 9.0, got {'.'.join(map(str, capability))}"
    if (reason := _native.why_no_cuda(device.index)) is not None:
        return reason
    with torch.cuda.device(device):
        return _native._C.hopper.why_not() or triton.why_not(device, dtype)


def why_triton(step: Step, dtype: torch.dtype) -> str | None:
    """Why a step of this dtype runs in Triton, or None where it runs here."""
    if (isinstance(step, Gate) and step.out is None) or (isinstance(step, Head) and step.tapped):
        return None
    if not isinstance(step, Convolve) or step.size != 3:
        return "is no 3x3 convolution"
    if not _native._C.hopper.has_kernel(step.out.channels, dtype.itemsize):
        counts = "32 and multiples of 64" if dtype == FLOAT8 else "16, 32 and multiples of 64"
        return f"gives {step.out.channels} channels, and there are kernels for {counts}"
    at_once = 16 // dtype.itemsize if step.scale is None else _cut(step).depth
    if any(used.channels % at_once for used in step.inputs):
        counts = " + ".join(str(used.channels) for used in step.inputs)
        return f"takes {counts} channels, and multiples of {at_once} are wanted"
    if step.sources[0].buffer == "input":  # of another dtype than what comes after it, in an engine of float8
        return "takes what the network is given"
    return None


def parts(step: Step, height: int, width: int, device: torch.device, dtype: torch.dtype) -> int:
    """In how many parts a step leaves sums over ``height`` x ``width`` pixels: one of each warpgroup for each tile."""
    if why_triton(step, dtype) is not None:
        return triton.parts(step, height, width, device, dtype)
    if isinstance(step, Gate):
        return -(-height * width // (4 * _native._C.hopper.SUMMED))
    cut = _cut(step)
    return -(-height // cut.height) * -(-width // cut.width) * _native._C.hopper.GROUPS


def rows(step: Convolve, dtype: torch.dtype) -> int:
    """How many rows of weights a recalibrated step wants for each slice: its own, then those of its shortcut."""
    if why_triton(step, dtype) is not None:
        return triton.rows(step, dtype)
    shortcut = step.shortcut is not None and step.shortcut.scaled
    return (3 * _cut(step).slots + shortcut) * step.out.channels


def fuses(step: Convolve, dtype: torch.dtype) -> bool:
    """Whether a plan for this backend may hold a convolution with a source ``below`` or ``taps``, such as this one."""
    if why_triton(step, dtype) is not None:
        return False
    if step.taps is not None:
        return _native._C.hopper.has_taps(step.out.channels) and not planes
    return step.shortcut is not None and _native._C.hopper.has_gate_sums(step.below.channels)


def kernel(step: Step, width: int, device: torch.device, dtype: torch.dtype) -> str:
    """What runs a step in rows of ``width`` pixels, for people to read: with its tile."""
    if (reason := why_triton(step, dtype)) is not None:
        name = triton.kernel(step, width, device, dtype)
        return f"{name} (not sm90a: it {reason})" if isinstance(step, Convolve) and step.size == 3 else name
    if isinstance(step, Gate):
        return "sum_gated"
    if isinstance(step, Head):
        return "sum_taps"
    cut = _cut(step)
    name = "scale, convolve_tiles" if step.scale is not None else "convolve_tiles"
    return f"{name} {cut.height}x{cut.width} pixels, {cut.depth} channels at once"


def prepare(step: Step, weights: Weights, device: torch.device, dtype: torch.dtype) -> Weights:
    """What a step needs of the weights: as ``csrc/hopper.cu`` lays them out, in float32 where they get scaled."""
    if why_triton(step, dtype) is not None:
        return triton.prepare(step, weights, device, dtype)
    if isinstance(step, Gate):
        return {}
    if isinstance(step, Head):
        return {step.weights: (weights[step.weights][1].to(device, torch.float32),)}
    packed = {}
    for name, scaled in step.products.items():
        weight, bias = weights[name]
        weight, unit = in_units(weight) if dtype == FLOAT8 else (weight, 1.0)
        laid_out = _packed(weight, [used.channels for used in step.inputs], _cut(step), 32 // dtype.itemsize)
        rounded = laid_out.to(device, torch.float32 if scaled else dtype)
        packed[name] = rounded, (bias / unit).to(device, torch.float32), unit
    if step.taps is not None:
        packed[step.taps.weights] = (_fragments(weights[step.taps.weights][0]).to(device, dtype_of("wide", dtype)),)
    return packed


def bind(step: Step, weights: Weights, view: View, pixels: int) -> Callable[[], None]:
    """A call that runs a step on the memory that ``view`` gives; a slice has ``pixels`` on the step's level."""
    if why_triton(step, view(reads(step)[0]).dtype) is not None:
        return triton.bind(step, weights, view, pixels)
    if isinstance(step, Gate):
        return _bound(
            [(_functions(view(step.below).dtype).gate_sums, _gate_sums(step, view))], weights, view, step.below
        )
    if isinstance(step, Head):
        return _bound(
            [(_functions(view(step.source).dtype).tap_sums, _tap_sums(step, weights, view))], weights, view, step.source
        )
    first = view(step.sources[0])
    dtype = first.dtype
    last = step.taps.out if step.taps else step.shortcut.out if step.shortcut else step.out
    calls, (main, shortcut) = _matrices(step, weights, view)
    sums = None if step.sums is None else view(step.sums)
    arguments = {
        "planes": planes,
        "wide": view(last).dtype != dtype,
        "size": tuple(first.shape[:3]),
        "first": _features(first),
        "second": _features(view(step.sources[1])) if len(step.sources) > 1 else None,
        "below": None if step.below is None else _features(view(step.below)),
        "attention": 0 if step.attention is None else view(step.attention).data_ptr(),
        "weights": main,
        "channels": step.out.channels,
        "out": None if step.taps else _features(view(step.out)),
        "relu": step.relu,
        "residual": _features(view(step.out)) if step.residual else None,
        "after": step.residual == "after",
        "pooled": None if step.pooled is None else _features(view(step.pooled)),
        "sums": 0 if sums is None else sums.data_ptr(),
        "sum_channels": 0 if sums is None else sums.stride(1),
        "shortcut": shortcut,
        "shortcut_out": None if step.shortcut is None else _features(view(step.shortcut.out)),
        "shortcut_relu": step.shortcut is not None and step.shortcut.relu,
        "taps": None if step.taps is None else _features(view(step.taps.out)),
        "tap_weights": 0 if step.taps is None else weights[step.taps.weights][0].data_ptr(),
    }
    return _bound([*calls, (_functions(dtype).convolve, arguments)], weights, view, step.sources[0])


def _bound(calls: list[tuple[Callable, dict]], weights: Weights, view: View, on: Slice) -> Callable[[], None]:
    device = view(on).device

    def run(kept=(weights, view)) -> None:  # the arguments are addresses in these
        on_gpu = device.type == "cuda"
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            stream = torch.cuda.current_stream().cuda_stream if on_gpu else 0
            for call, given in calls:
                call(**given, stream=stream)

    return run


def _gate_sums(step: Gate, view: View) -> dict:
    below, sums = view(step.below), view(step.sums)
    arguments = {"size": tuple(below.shape[:3]), "below": _features(below)}
    arguments |= {"attention": view(step.attention).data_ptr(), "sums": sums.data_ptr(), "sum_channels": sums.stride(1)}
    return arguments


def _tap_sums(step: Head, weights: Weights, view: View) -> dict:
    taps, out, masks = view(step.source), view(step.out).data_ptr(), step.threshold is not None
    arguments = {"size": tuple(taps.shape[:3]), "taps": taps.data_ptr(), "bias": weights[step.weights][0].data_ptr()}
    arguments |= {"threshold": view(step.threshold).data_ptr() if masks else 0}
    return arguments | {"logits": 0 if masks else out, "mask": out if masks else 0}


def _matrices(step: Convolve, weights: Weights, view: View) -> tuple[list, list[tuple[int, int, int, float]]]:
    """What scales weights for each slice, and the weights of a step and of its shortcut as the kernel takes them."""
    calls: list[tuple[Callable, dict]] = []
    room = None if step.scaled is None else view(step.scaled)  # [N, rows, C]
    first, found = 0, []
    for name, scaled in step.products.items():
        packed, bias, unit = weights[name]
        if not scaled:
            found.append((packed.data_ptr(), 0, bias.data_ptr(), unit))
            continue
        scale, to = view(step.scale), room[:, first:]
        _, chunks, taps, steps, halves, slots, out, count = packed.shape
        arguments = {"n": len(room), "weights": packed.data_ptr(), "vectors": packed.numel() // count}
        arguments |= {"inner": slots * out, "taps": taps, "pieces": steps * halves, "chunks": chunks}
        arguments |= {"factors": scale.data_ptr(), "factors_step": scale.stride(0)}
        arguments |= {"out": to.data_ptr(), "out_step": room.stride(0)}
        calls.append((_functions(room.dtype).scale, arguments))
        found.append((to.data_ptr(), room.stride(0) * room.itemsize, bias.data_ptr(), unit))
        first += packed.numel() // room.shape[2]
    return calls, found if step.shortcut else [*found, (0, 0, 0, 1.0)]


def _functions(dtype: torch.dtype) -> ModuleType:
    return getattr(_native._C.hopper, str(dtype)[6:])


class _Cut(tuple):
    """How a kernel cuts its work, from ``csrc/hopper.h``."""

    outputs, height, width, depth, slots, zeros = (property(lambda self, i=i: self[i]) for i in range(6))


def _cut(step: Convolve) -> _Cut:
    return _Cut(_native._C.hopper.cut(step.out.channels, step.shortcut is not None))


def _packed(weight: Tensor, counts: list[int], cut: _Cut, at_once: int) -> Tensor:
    """[out, in, k, k] as [blocks, chunks, horizontal taps, depth / at_once, 2, slots, out / blocks, at_once / 2].

    A product takes so many channels ``at_once``, 32 bytes of them. Each source has ``counts`` of them, and zeros to
    whole chunks. The last vertical tap comes first.
    """
    sources = weight.split(counts, 1)
    weight = torch.cat([F.pad(source, (0, 0, 0, 0, 0, -source.shape[1] % cut.depth)) for source in sources], 1)
    out, channels, size, _ = weight.shape
    if size == 3:
        zeros = weight.new_zeros(out, channels, cut.zeros, 3)
        weight = torch.cat([zeros, weight.flip(2), zeros], 2)
    blocks = weight.unflatten(0, (-1, cut.outputs))
    chunks = blocks.unflatten(2, (channels // cut.depth, cut.depth // at_once, 2, at_once // 2))
    return chunks.permute(0, 2, 7, 3, 4, 6, 1, 5).contiguous()


def _fragments(weight: Tensor) -> Tensor:
    """The taps of a head [1, C, 3, 3], as the threads of a warp hold matrices of 8 taps and 16 channels each.

    That is [C / 16, 2, 32 threads, 4], see ``mma.m16n8k16`` in PTX's manual.
    """
    taps = F.pad(weight[0].flatten(1).T, (0, 0, 0, 16 - 9))
    parts = taps.unflatten(1, (-1, 2, 4, 2)).unflatten(0, (2, 8))  # halves of pairs, of four threads; those of 8 taps
    return parts.permute(2, 0, 1, 4, 3, 5).reshape(-1, 2, 32, 4).contiguous()


def _features(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3], x.shape[3])
