"""Inputs ``(x, weight, bias, residual, eps)``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._layout import accumulator
from .._samples import AWKWARD, Maker, Sample, in_both_layouts

EPS = 1e-5


def _per_channel(make: Maker, channels: int) -> tuple[Tensor, Tensor]:
    return make.uniform(channels) + 0.5, make.normal(channels)


def _exact_per_channel(make: Maker, channels: int) -> list[Tensor]:
    return [each.to(accumulator(make.dtype)) for each in _per_channel(make, channels)]


def tiny(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = Maker(dtype, device)
    x = make.normal(2, 3, 3, 5)
    yield Sample("alone", (x, *_per_channel(make, 3), None, EPS))
    yield Sample("residual", (x, *_per_channel(make, 3), x.detach().flip(1) / 2, EPS))


def awkward(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    def samples(make: Maker) -> Iterator[Sample]:
        for n, c, h, w in AWKWARD:
            if n * h * w < 2:
                continue  # no variance
            x = make.normal(n, c, h, w)
            yield Sample(f"{n}x{c}x{h}x{w}", (x, *_per_channel(make, c), None if c % 2 else x.flip(1) / 2, EPS))
        far = make.normal(2, 16, 6, 7) + 30  # a mean that is large beside the deviation
        yield Sample("far", (far, *_per_channel(make, 16), None, EPS))
        yield Sample("mixed", (make.normal(2, 5, 6, 7), *_exact_per_channel(make, 5), None, EPS))
        yield Sample("slices", (make.sliced(2, 24, 6, 5), *_per_channel(make, 24), make.sliced(2, 24, 6, 5).neg(), EPS))

    yield from in_both_layouts(samples, dtype, device)


def real(dtype: torch.dtype, device: str, batch: int = 1, layout: str = "contiguous") -> Iterator[Sample]:
    """Width 32 at 512x512: the first normalisation of a block, and the last, on levels 0 to 2; weights in float32."""
    make = Maker(dtype, device, layout)
    for level in (0, 1, 2):
        c, size = 32 * 2**level, 512 // 2**level
        x = make.normal(batch, c, size, size) + make.normal(c)[:, None, None]
        weights = _exact_per_channel(make, c)
        yield Sample(f"level {level}", (x, *weights, None, EPS))
        yield Sample(f"level {level} residual", (x, *weights, x.flip(1), EPS))
