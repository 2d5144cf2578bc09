"""The numbers of one mask."""

from __future__ import annotations

import math

import numpy as np

from ..errors import ScoatFastError
from .lungs import LEFT, RIGHT

# HU of ground glass; what is denser is consolidation, what is darker is neither
GROUND_GLASS = (-750.0, -300.0)


def measure(
    mask: np.ndarray,
    hu: np.ndarray | None = None,
    voxel_mm3: float | None = None,
    lungs: np.ndarray | None = None,
) -> dict:
    """What a mask [slices, H, W] says, as plain data. What cannot be known is None.

    ``mm3`` and ``ml`` need the volume of a voxel, ``hu_mean`` and ``hu_sd`` (population) the HU under the mask, and
    something in it. ``ground_glass_ml``, ``consolidation_ml`` and ``other_ml`` divide the
    opacity by HU (see ``GROUND_GLASS``). ``slices`` counts those with opacity.

    With ``lungs``, labels 1 in the right and 2 in the left one: ``lung_ml`` is their volume, ``share_of_lung`` the part
    of it that is opacified, within 0..1, and ``right_ml``, ``right_share``, ``left_ml``, ``left_share`` the opacity in
    either and its part of it.
    """
    mask = mask.astype(bool)
    voxels = int(mask.sum())
    inside = hu[mask].astype(np.float64) if hu is not None else None

    def ml(count: int) -> float | None:
        return None if voxel_mm3 is None else int(count) * voxel_mm3 / 1000

    numbers = {
        "voxels": voxels,
        "mm3": None if voxel_mm3 is None else voxels * voxel_mm3,
        "ml": ml(voxels),
        "hu_mean": float(inside.mean()) if inside is not None and voxels else None,
        "hu_sd": float(inside.std()) if inside is not None and voxels else None,
        "slices": int(mask.any(axis=(1, 2)).sum()),
    }
    if inside is not None:
        low, high = GROUND_GLASS
        numbers["ground_glass_ml"] = ml(((inside >= low) & (inside <= high)).sum())
        numbers["consolidation_ml"] = ml((inside > high).sum())
        numbers["other_ml"] = ml((inside < low).sum())
    else:
        numbers |= dict.fromkeys(("ground_glass_ml", "consolidation_ml", "other_ml"))
    whole = None if lungs is None else lungs > 0
    numbers["lung_ml"] = None if whole is None else ml(whole.sum())
    numbers["share_of_lung"] = _share(mask, whole)
    for name, side in (("right", RIGHT), ("left", LEFT)):
        here = None if lungs is None else lungs == side
        numbers[f"{name}_ml"] = None if here is None else ml((mask & here).sum())
        numbers[f"{name}_share"] = _share(mask, here)
    return numbers


def _share(mask: np.ndarray, lung: np.ndarray | None) -> float | None:
    total = 0 if lung is None else int(lung.sum())
    return int((mask & lung).sum()) / total if total else None


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
