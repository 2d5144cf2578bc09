"""Scales for float8 features, taken from real slices and moved into the weights.

Every slice of features is stored divided by a power of two. All steps between are linear or commute with that (ReLU,
maxima, upsampling), so the factors go into weights and biases, exactly, and no kernel knows of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ScoatFastError
from . import reference
from .layout import FLOAT8, lay_out, view_of
from .pack import Weights
from .plan import Attend, Convolve, Excite, Gate, Head, Plan, Slice, writes

Scales = dict[str, Tensor]  # by buffer: [channels], float64, powers of two
# Other slices than those of the calibration may reach further. A binade of seventeen is a small price.
HEADROOM = 2.0


def calibrate(plan: Plan, weights: Weights, batch: Tensor) -> Scales:
    """What each slice of features is divided by, from its largest value over a batch.

    Args:
        plan: with all of the network's heads.
        batch: [N, in_channels, H, W], float32 on any device, height and width multiples of 16; one slice of it runs
            at a time, in float32.

    Raises:
        ScoatFastError: if the network answers the batch with NaN or infinity.
    """
    largest = _largest(plan, weights, batch)
    scales = {name: torch.ones(buffer.channels, dtype=torch.float64) for name, buffer in plan.buffers.items()}
    for used, most in largest.items():
        if not math.isfinite(most):
            raise ScoatFastError(f"the calibration slices give NaN or infinity in {used}")
        if plan.buffers[used.buffer].kind == "features" and most > 0:
            _of(scales, used)[:] = 2.0 ** math.ceil(math.log2(HEADROOM * most / torch.finfo(FLOAT8).max))
    _join(plan, scales)
    return scales


def rescale(plan: Plan, weights: Weights, scales: Scales) -> Weights:
    """Weights that give and take features divided by ``scales``; heads, maps and what is wide stay as they are."""
    scaled = dict(weights)

    def convolution(name: str, given: Tensor, out: Tensor | None = None) -> None:
        weight, bias = weights[name]
        out = torch.ones_like(bias) if out is None else out
        scaled[name] = weight * given[None, :, None, None] / out[:, None, None, None], bias / out

    for step in plan.steps:
        match step:
            case Convolve():
                given = torch.cat([_of(scales, used) for used in step.inputs])
                convolution(step.weights, given, _of(scales, step.out))
                if step.shortcut is not None:
                    convolution(step.shortcut.weights, given, _of(scales, step.shortcut.out))
            case Attend():
                convolution(step.project, _of(scales, step.row))
            case Head() if not step.tapped:
                convolution(step.weights, _of(scales, step.source))
            case Excite():
                squeeze, stretch = weights[step.weights]
                given = torch.cat([_of(scales, sums) for sums in step.sums])
                scaled[step.weights] = squeeze * given, stretch
    return scaled


def _largest(plan: Plan, weights: Weights, batch: Tensor) -> dict[Slice, float]:
    """The largest absolute value of everything that the steps write."""
    device, dtype = batch.device, torch.float32
    height, width = batch.shape[2:]
    layout = lay_out(plan, reference, 1, height, width, device, dtype)
    tensors = layout.tensors(torch.zeros(layout.bytes, dtype=torch.uint8, device=device))
    view = view_of(plan, tensors)
    calls = [
        reference.bind(step, reference.prepare(step, weights, device, dtype), view, (height * width) >> 2 * step.level)
        for step in plan.steps
    ]
    largest: dict[Slice, float] = {}
    for image in batch:
        tensors["input"].copy_(image[None].permute(0, 2, 3, 1))
        for step, call in zip(plan.steps, calls, strict=True):
            call()
            written = [(used, view(used)) for used in writes(step)]
            if isinstance(step, Convolve) and step.below is not None:
                # nobody stores it, but it gets rounded, as what it is made from
                written.append((step.below, reference.gated(step, view)))
            for used, values in written:
                found = values.abs().max().item()
                largest[used] = max(largest.get(used, 0.0), found) if math.isfinite(found) else found
    return largest


def _join(plan: Plan, scales: Scales) -> None:
    """Gives what a step only passes on the scale of where it came from, and sums that of what they are sums of."""
    pairs = []
    for step in plan.steps:
        if isinstance(step, Gate) and step.out is not None:
            pairs.append((step.below, step.out))
        if isinstance(step, Convolve) and step.pooled is not None:
            pairs.append((step.out, step.pooled))
    before = None
    while before != (before := {name: scale.tolist() for name, scale in scales.items()}):
        for one, other in pairs:
            both = torch.maximum(_of(scales, one), _of(scales, other))
            _of(scales, one)[:] = both
            _of(scales, other)[:] = both
    for step in plan.steps:
        if isinstance(step, Convolve | Gate) and step.sums is not None:
            _of(scales, step.sums)[:] = _of(scales, step.below if step.out is None else step.out)


def _of(scales: Scales, used: Slice) -> Tensor:
    return scales[used.buffer][used.first : used.first + used.channels]
