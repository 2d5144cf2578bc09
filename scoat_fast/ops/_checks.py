"""The checks that all operations share. They speak of what was wanted and what came."""

from __future__ import annotations

from torch import Tensor


def four_dimensional(op: str, **tensors: Tensor) -> None:
    """Raises ValueError unless all are [N, C, H, W] with at least one channel and one pixel."""
    for name, x in tensors.items():
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(f"{op}: {name} must be [N, C, H, W] with C, H and W of at least 1, got {tuple(x.shape)}")


def same_kind(op: str, **tensors: Tensor) -> None:
    """Raises ValueError unless all have one floating dtype and one device."""
    (first, x), *others = tensors.items()
    if not x.is_floating_point():
        raise ValueError(f"{op}: {first} must have a floating dtype, got {x.dtype}")
    for name, y in others:
        if y.dtype != x.dtype or y.device != x.device:
            raise ValueError(f"{op}: {name} must be {x.dtype} on {x.device} as {first} is, got {y.dtype} on {y.device}")


def row_fits(op: str, row: list[Tensor], y: Tensor) -> None:
    """Raises ValueError unless every tensor of ``row`` can stand before the upsampled ``y`` [N, C, h, w]."""
    n, _, h, w = y.shape
    for i, x in enumerate(row):
        four_dimensional(op, **{f"row[{i}]": x})
        if (x.shape[0], *x.shape[2:]) != (n, 2 * h, 2 * w):
            raise ValueError(
                f"{op}: row[{i}] must be [{n}, C, {2 * h}, {2 * w}] beside y {tuple(y.shape)}, got {tuple(x.shape)}"
            )
