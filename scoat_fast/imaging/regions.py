"""Connected regions of masks, from runs of pixels along their rows: in NumPy alone, which lets other threads work."""

from __future__ import annotations

import numpy as np

# of a run: which rows it may touch before its own, in (slices, rows) back; and how far beyond its ends
TOUCHES = {
    4: ((0, 1, 0),),
    8: ((0, 1, 1),),
    6: ((0, 1, 0), (1, 0, 0)),
    18: ((0, 1, 1), (1, 0, 1), (1, -1, 0), (1, 1, 0)),
    26: ((0, 1, 1), (1, 0, 1), (1, -1, 1), (1, 1, 1)),
}


def regions(mask: np.ndarray, neighbours: int) -> tuple[np.ndarray, int]:
    """Labels, int32, 0 outside and 1 to the count of regions inside in the order of their first pixels; and that count.

    Args:
        mask: [H, W] or [slices, H, W], true where it is not 0.
        neighbours: of a pixel, 4 or 8, which keeps each slice to itself; of a voxel, 6, 18 or 26.
    """
    inside = mask.astype(bool, copy=False)
    depth, height, width = (1,) * (3 - mask.ndim) + mask.shape
    # an empty pixel between rows, and an empty row between slices, so that what is next in memory does not touch
    padded = np.zeros((depth, height + 1, width + 1), bool)
    padded[:, :height, :width] = inside
    flat = padded.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], edges]) if flat[:1].any() else edges
    starts, ends = edges[::2], edges[1::2]
    root = np.arange(len(starts))
    for slices, rows, beyond in TOUCHES[neighbours]:
        back = (slices * (height + 1) + rows) * (width + 1)
        first = np.searchsorted(ends, starts - back - beyond, "right")
        count = np.searchsorted(starts, ends - back + beyond, "left") - first
        count = count.clip(0)
        runs = np.repeat(np.arange(len(starts)), count)
        touched = np.arange(len(runs)) + np.repeat(first - (count.cumsum() - count), count)
        root = _join(root, runs, touched)
    is_first = root == np.arange(len(root))
    number = is_first.cumsum(dtype=np.int32)[root]
    labels = np.zeros(mask.shape, np.int32)
    labels[inside] = np.repeat(number, ends - starts)
    return labels, int(is_first.sum())


def _join(root: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The first member of each run's set, once ``one`` and ``other`` are joined pair by pair."""
    while len(one):
        a, b = root[one], root[other]
        apart = a != b
        one, other, a, b = one[apart], other[apart], a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, further := root[root]):
            root = further
    return root
