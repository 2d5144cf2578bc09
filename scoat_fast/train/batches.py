"""Batches out of slices that were decoded once, and how long the network waits for them."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .augment import augment

SHARE_OF_MEMORY = 0.5  # of what a GPU has left, for the slices; the rest is the network's


class Batches:
    """The slices of ``data.load``, on the device where they fit there, else in the host's memory."""

    def __init__(self, images: Tensor, masks: Tensor, device: torch.device):
        on_device = True
        if device.type == "cuda":
            on_device = images.nbytes + masks.nbytes <= SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0]
        self.device = device
        self.images, self.masks = (t.to(device) if on_device else t.pin_memory() for t in (images, masks))

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, chosen: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The slices of these numbers, [N, 1, S, S] in 0..1 and in 0 and 1, on the device; augmented by a generator."""
        chosen = chosen.to(self.images.device)
        images, masks = (t[chosen].to(self.device).float() for t in (self.images, self.masks))
        images /= 255
        return (images, masks) if generator is None else augment(images, masks, generator)


class Waiting:
    """The share of the device's time in which the network has no batch to work on.

    On a GPU by events in its stream, so that the time in which it has nothing to do counts, and nobody waits to know.
    """

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self) -> None:
        """By turns: a step ends (or the first begins), and its successor's batch is there."""
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self.device))
        else:
            mark = time.perf_counter()
        self.marks.append(mark)

    def share(self) -> float:
        """Of all time between the first mark and the last, in 0..1; 0 without any."""
        if len(self.marks) < 2:
            return 0.0
        if self.device.type == "cuda":
            self.marks[-1].synchronize()
        spans = [self._seconds(a, b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return sum(spans[::2]) / sum(spans)

    @staticmethod
    def _seconds(a, b) -> float:
        return b - a if isinstance(a, float) else a.elapsed_time(b) / 1000
