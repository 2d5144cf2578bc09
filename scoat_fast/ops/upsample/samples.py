"""Inputs ``(y, row)``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._samples import AWKWARD, Maker, Sample, in_both_layouts


def tiny(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = Maker(dtype, device)
    yield Sample("alone", (make.normal(2, 3, 3, 2), []))
    yield Sample("row", (make.normal(1, 2, 1, 3), [make.normal(1, 1, 2, 6), make.normal(1, 3, 2, 6)]))


def awkward(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    def samples(make: Maker) -> Iterator[Sample]:
        for n, c, h, w in AWKWARD:
            yield Sample(f"{n}x{c}x{h}x{w}", (make.normal(n, c, h, w), []))
        yield Sample("row", (make.normal(2, 16, 5, 8), [make.normal(2, 8, 10, 16), make.normal(2, 3, 10, 16)]))
        yield Sample("slices", (make.sliced(2, 8, 6, 5), [make.sliced(2, 4, 12, 10)]))

    yield from in_both_layouts(samples, dtype, device)


def real(dtype: torch.dtype, device: str, batch: int = 1, layout: str = "contiguous") -> Iterator[Sample]:
    """Width 32 at 512x512: features of level 1 for row 0, and the attention's projection on level 1."""
    make = Maker(dtype, device, layout)
    yield Sample("level 0", (make.normal(batch, 64, 256, 256), []))
    yield Sample("level 1", (make.normal(batch, 64, 128, 128), []))
    yield Sample("level 0 joined", (make.normal(batch, 64, 256, 256), [make.normal(batch, 32, 512, 512)]))
