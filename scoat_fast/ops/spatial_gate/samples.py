"""Inputs ``(y, attention, row, return_means)``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._samples import AWKWARD, Maker, Sample, in_both_layouts


def tiny(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = Maker(dtype, device)
    y, attention = make.normal(2, 3, 3, 2), make.uniform(2, 1, 6, 4)
    yield Sample("alone", (y, attention, [], False))
    yield Sample("means", (y, attention, [make.normal(2, 1, 6, 4), make.normal(2, 2, 6, 4)], True))


def awkward(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    def samples(make: Maker) -> Iterator[Sample]:
        for k, (n, c, h, w) in enumerate(AWKWARD):
            y, attention = make.normal(n, c, h, w), make.uniform(n, 1, 2 * h, 2 * w)
            if (make.layout == "contiguous") == k % 2:  # every shape alone in one layout and joined in the other
                yield Sample(f"{n}x{c}x{h}x{w}", (y, attention, [], False))
            else:
                row = [make.normal(n, min(c, 5), 2 * h, 2 * w)]
                yield Sample(f"{n}x{c}x{h}x{w} means", (y, attention, row, True))
        y, attention = make.sliced(2, 8, 6, 5), make.sliced(2, 1, 12, 10)
        yield Sample("slices", (y, attention, [make.sliced(2, 4, 12, 10), make.sliced(2, 16, 12, 10)], True))
        y, attention = make.normal(2, 4, 3, 10), make.uniform(2, 1, 6, 20)
        yield Sample("a map", (y, attention, [make.normal(2, 1, 6, 20), make.normal(2, 2, 6, 20)], True))
        yield Sample("a map alone", (y, attention, [make.normal(2, 1, 6, 20)], True))

    yield from in_both_layouts(samples, dtype, device)


def real(dtype: torch.dtype, device: str, batch: int = 1, layout: str = "contiguous") -> Iterator[Sample]:
    """Width 32 at 512x512: the gated nodes x11, x21 and x31, joined and with means as in the network."""
    make = Maker(dtype, device, layout)
    for level in (1, 2, 3):
        c, size = 32 * 2**level, 512 // 2**level
        y, attention = make.normal(batch, 2 * c, size // 2, size // 2), make.uniform(batch, 1, size, size)
        yield Sample(f"level {level}", (y, attention, [], False))
        yield Sample(f"level {level} joined", (y, attention, [make.normal(batch, c, size, size)], True))
