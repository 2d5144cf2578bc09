"""Inputs ``(x, w1, w2, means)``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._layout import accumulator
from .._samples import AWKWARD, Maker, Sample, in_both_layouts


def _weights(make: Maker, channels: int, squeezed: int) -> tuple[Tensor, Tensor]:
    return make.normal(squeezed, channels) / channels**0.5, make.normal(channels, squeezed)


def _means(x: Tensor) -> Tensor:
    return x.mean((2, 3), dtype=accumulator(x.dtype))


def tiny(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = Maker(dtype, device)
    x = make.normal(2, 6, 3, 5)
    yield Sample("alone", (x, *_weights(make, 6, 4), None))
    yield Sample("means", (x, *_weights(make, 6, 4), _means(x)))


def awkward(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    def samples(make: Maker) -> Iterator[Sample]:
        for n, c, h, w in AWKWARD:
            x, weights = make.normal(n, c, h, w), _weights(make, c, -(-c // 16))
            yield Sample(f"{n}x{c}x{h}x{w}", (x, *weights, None))
            yield Sample(f"{n}x{c}x{h}x{w} means", (x, *weights, _means(x)))
        yield Sample("slices", (make.sliced(2, 24, 6, 5), *_weights(make, 24, 3), None))

    yield from in_both_layouts(samples, dtype, device)


def real(dtype: torch.dtype, device: str, batch: int = 1, layout: str = "contiguous") -> Iterator[Sample]:
    """Width 32 at 512x512: the recalibration of the nodes x11, x21 and x31, with and without known means."""
    make = Maker(dtype, device, layout)
    for level in (1, 2, 3):
        c, size = 3 * 32 * 2**level, 512 // 2**level
        x, weights = make.normal(batch, c, size, size), _weights(make, c, c // 16)
        yield Sample(f"level {level}", (x, *weights, None))
        yield Sample(f"level {level} means", (x, *weights, _means(x)))
