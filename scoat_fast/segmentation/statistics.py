"""The numbers of one mask."""

from __future__ import annotations

import math

import numpy as np

from ..errors import ScoatFastError


def measure(
    mask: np.ndarray,
    hu: np.ndarray | None = None,
    voxel_mm3: float | None = None,
    lung: np.ndarray | None = None,
) -> dict:
    """What a mask [slices, H, W] says, as plain data.

    ``mm3`` and ``ml`` need the volume of a voxel, ``hu_mean`` and ``hu_sd`` (population) the HU under the mask: they
    are None without, and where nothing is segmented. ``slices`` counts those with opacity. With a lung mask,
    ``lung_ml`` is its volume and ``share_of_lung`` the part of it that is opacified, within 0..1.
    """
    mask = mask.astype(bool)
    voxels = int(mask.sum())
    inside = hu[mask].astype(np.float64) if hu is not None and voxels else None
    numbers = {
        "voxels": voxels,
        "mm3": None if voxel_mm3 is None else voxels * voxel_mm3,
        "ml": None if voxel_mm3 is None else voxels * voxel_mm3 / 1000,
        "hu_mean": None if inside is None else float(inside.mean()),
        "hu_sd": None if inside is None else float(inside.std()),
        "slices": int(mask.any(axis=(1, 2)).sum()),
    }
    if lung is not None:
        lung = lung.astype(bool)
        total = int(lung.sum())
        numbers["lung_ml"] = None if voxel_mm3 is None else total * voxel_mm3 / 1000
        numbers["share_of_lung"] = int((mask & lung).sum()) / total if total else None
    return numbers


def check_min_mm3(min_mm3: float) -> None:
    """Raises ScoatFastError unless ``min_mm3`` can be the volume of the smallest region to keep."""
    if not (math.isfinite(min_mm3) and min_mm3 >= 0):
        raise ScoatFastError(f"the smallest region in mm3 must be 0 or more, got {min_mm3}")


def remove_small(mask: np.ndarray, voxel_mm3: float, min_mm3: float) -> np.ndarray:
    """The mask [slices, H, W] without connected regions (over faces, edges and corners) below ``min_mm3``."""
    import cc3d

    fewest = math.ceil(min_mm3 / voxel_mm3 - 1e-9)
    if fewest <= 1:
        return mask
    return cc3d.dust(mask.astype(np.uint8), threshold=fewest, connectivity=26).astype(mask.dtype)
