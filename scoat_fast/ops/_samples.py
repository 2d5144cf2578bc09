"""Inputs for tests, benchmarks and the doctor, drawn from a seed that their size fixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# [N, C, h, w]: a pixel, a row, a column, an empty batch, channels that fill no register and that fill four and more,
# and rows of whole vectors that are longer than a tile of sums; small, for the sake of interpreters
AWKWARD = ((1, 1, 1, 1), (2, 3, 1, 5), (1, 16, 3, 1), (0, 4, 3, 3), (1, 35, 3, 5), (1, 67, 2, 3), (1, 16, 3, 20))


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of an operator, and what to call it."""

    name: str
    args: tuple


@dataclass(frozen=True)
class Maker:
    """Makes tensors of one dtype, device and memory layout."""

    dtype: torch.dtype
    device: str
    layout: str = "contiguous"

    def normal(self, *size: int) -> Tensor:
        return self._laid_out(torch.randn(size, generator=self._generator(size)))

    def uniform(self, *size: int) -> Tensor:
        return self._laid_out(torch.rand(size, generator=self._generator(size)))

    def sliced(self, *size: int) -> Tensor:
        """A slice of a larger tensor of the same layout, on every axis; a map keeps its dense rows of pixels."""
        n, c, h, w = size
        first = 0 if c == 1 else 2
        return self.normal(n + 1, first + c, h + 2, w + 5)[1:, first:, 1 : 1 + h, 1 : 1 + w]

    def _generator(self, size: tuple[int, ...]) -> torch.Generator:
        return torch.Generator().manual_seed(hash(size) % 2**31)

    def _laid_out(self, x: Tensor) -> Tensor:
        x = x.to(self.device, self.dtype)
        return x.contiguous(memory_format=LAYOUTS[self.layout]) if x.ndim == 4 else x


def in_both_layouts(make: Callable[[Maker], Iterator[Sample]], dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """The samples that ``make`` makes, in either memory layout."""
    for layout in LAYOUTS:
        for sample in make(Maker(dtype, device, layout)):
            yield Sample(f"{sample.name} {layout}", sample.args)
