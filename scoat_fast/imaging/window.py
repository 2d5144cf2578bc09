"""Hounsfield units to the network's grey values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A CT window: ``low`` HU becomes 0, ``high`` HU becomes 1, what lies outside is cut off."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"a window needs low < high, got {self.low} and {self.high} HU")

    def apply(self, hu):
        """Grey values in 0..1 of an array or tensor of HU, of the same type."""
        return ((hu - self.low) / (self.high - self.low)).clip(0, 1)

    def invert(self, grey):
        """Approximate HU of grey values in 0..1."""
        return self.low + grey * (self.high - self.low)


LUNG = Window(-1250.0, 250.0)  # that of the data which the shipped weights were trained on
