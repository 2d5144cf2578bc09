"""The plan in operators of PyTorch, on any device and in any dtype: the definition of what each step does.

float8 is only stored: what is multiplied are the same numbers in float32. A backend is a module with these seven
functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import FLOAT8
from .pack import Weights, in_units
from .plan import TAPS, Attend, Convolve, Excite, Gate, Head, Slice, Step

View = Callable[[Slice], Tensor]  # the memory of a slice; features as [N, H, W, C]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run on a device in a dtype, or None where it can."""
    return None


def parts(step: Step, height: int, width: int, device: torch.device, dtype: torch.dtype) -> int:
    """In how many parts a step leaves sums over ``height`` x ``width`` pixels."""
    return 1


def rows(step: Convolve, dtype: torch.dtype) -> int:
    """How many rows of weights a recalibrated step wants for each slice: none, as features are scaled here."""
    return 0


def fuses(step: Convolve, dtype: torch.dtype) -> bool:
    """Whether a plan for this backend may hold a convolution with a source ``below`` or ``taps``, such as this one."""
    return False


def kernel(step: Step, width: int, device: torch.device, dtype: torch.dtype) -> str:
    """What runs a step in rows of ``width`` pixels, for people to read."""
    return "operators of PyTorch"


def prepare(step: Step, weights: Weights, device: torch.device, dtype: torch.dtype) -> Weights:
    """What a step needs of the weights, laid out for this backend: once for all shapes."""
    products, others = [], []
    match step:
        case Convolve():
            products = [*step.products]
            others = [step.taps.weights] if step.taps else []
        case Attend():
            products, others = [step.project], [step.weights]
        case Excite() | Head():
            others = [step.weights]
    kind = torch.float32 if dtype == FLOAT8 else dtype
    prepared = {name: tuple(x.to(device, kind) for x in weights[name]) for name in (*products, *others)}
    if dtype == FLOAT8:
        for name in products:
            weight, bias = prepared[name]
            divided, unit = in_units(weight)
            prepared[name] = divided.to(FLOAT8).float() * unit, bias
    return prepared


def bind(step: Step, weights: Weights, view: View, pixels: int) -> Callable[[], None]:
    """A call that runs a step on the memory that ``view`` gives; a slice has ``pixels`` on the step's level."""
    if isinstance(step, Excite):
        return _excite(step, weights, view, pixels)
    return {Convolve: _convolve, Attend: _attend, Gate: _gate, Head: _head}[type(step)](step, weights, view)


def _convolve(step: Convolve, weights: Weights, view: View) -> Callable[[], None]:
    def run() -> None:
        below = [] if step.below is None else [gated(step, view)]
        given = torch.cat([*(_read(view(source)) for source in step.sources), *below], 1)
        x = given if step.scale is None else given * view(step.scale)[:, :, None, None].to(given.dtype)
        y = F.conv2d(x, *weights[step.weights], padding=step.size // 2)
        if step.residual == "before":
            y = y + _read(view(step.out))
        if step.relu:
            y = F.relu(y)
        if step.residual == "after":
            y = y + _read(view(step.out))
        if step.shortcut is not None:
            shortcut = F.conv2d(x if step.shortcut.scaled else given, *weights[step.shortcut.weights])
            _write(view(step.shortcut.out), F.relu(shortcut) if step.shortcut.relu else shortcut)
        if step.taps is None:
            _write(view(step.out), y)
        else:
            by_tap = weights[step.taps.weights][0].flatten(2).permute(2, 1, 0)[..., None]  # [9, C, 1, 1]
            stored = y.to(view(step.taps.out).dtype).to(y.dtype)
            _write(view(step.taps.out), F.pad(F.conv2d(stored, by_tap), (0, 0, 0, 0, 0, TAPS - 9)))
        if step.pooled is not None:
            _write(view(step.pooled), F.max_pool2d(y, 2))
        if step.sums is not None:
            _sum(y, view(step.sums))

    return run


def _attend(step: Attend, weights: Weights, view: View) -> Callable[[], None]:
    def run() -> None:
        from_row = F.conv2d(_read(view(step.row)), *weights[step.project])
        from_below = _up(_read(view(step.below)))
        joined = F.relu(from_row) + F.relu(from_below) if step.each else F.relu(from_row + from_below)
        view(step.out).copy_(F.conv2d(joined, *weights[step.weights]).sigmoid()[:, 0])

    return run


def _gate(step: Gate, weights: Weights, view: View) -> Callable[[], None]:
    def run() -> None:
        y = gated(step, view)
        if step.out is not None:
            _write(view(step.out), y)
        if step.sums is not None:
            _sum(y, view(step.sums))

    return run


def _excite(step: Excite, weights: Weights, view: View, pixels: int) -> Callable[[], None]:
    squeeze, stretch = weights[step.weights]

    def run() -> None:
        means = torch.cat([view(sums).sum(1) for sums in step.sums], 1) / pixels
        view(step.out).copy_(F.linear(F.relu(F.linear(means, squeeze)), stretch).sigmoid())

    return run


def _head(step: Head, weights: Weights, view: View) -> Callable[[], None]:
    weight, bias = weights[step.weights]
    if step.tapped:  # to be added up: each tap at its own place
        weight = torch.eye(TAPS, 9, dtype=weight.dtype, device=weight.device).view(1, TAPS, 3, 3)

    def run() -> None:
        logits = F.conv2d(_read(view(step.source)), weight, bias, padding=1)
        view(step.out).copy_(
            logits if step.threshold is None else ~(logits <= view(step.threshold))
        )  # NaN: no clean zero

    return run


def _sum(y: Tensor, sums: Tensor) -> None:  # [N, C, H, W], [N, parts, C]
    sums.zero_()
    sums[:, 0] = y.sum((2, 3), dtype=sums.dtype)


def gated(step: Convolve | Gate, view: View) -> Tensor:
    """What a step takes from below, [N, C, H, W]: (1 + attention) * up(below), or up(below) alone."""
    y = _up(_read(view(step.below)))
    return y if step.attention is None else y * (1 + view(step.attention)[:, None])


def _up(y: Tensor) -> Tensor:
    return F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)


def _read(x: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, C, H, W], to compute with."""
    x = x.permute(0, 3, 1, 2)
    return x.float() if x.dtype == FLOAT8 else x


def _write(to: Tensor, x: Tensor) -> None:  # [N, H, W, C], [N, C, H, W]
    if to.dtype == FLOAT8:  # what is too large becomes the largest number, not NaN
        limit = torch.finfo(FLOAT8).max
        x = x.float().clamp(-limit, limit)
    to.copy_(x.permute(0, 2, 3, 1))
