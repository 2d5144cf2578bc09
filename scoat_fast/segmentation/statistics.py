"""The numbers of one mask."""

from __future__ import annotations

import math

import numpy as np

from ..errors import ScoatFastError
from ..imaging.regions import regions
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
    voxels = int(np.count_nonzero(mask))
    inside = hu[mask].astype(np.float64) if hu is not None else None

    def ml(count: int) -> float | None:
        return None if voxel_mm3 is None else int(count) * voxel_mm3 / 1000

    numbers = {
        "voxels": voxels,
        "mm3": None if voxel_mm3 is None else voxels * voxel_mm3,
        "ml": ml(voxels),
        "hu_mean": float(inside.mean()) if inside is not None and voxels else None,
        "hu_sd": float(inside.std()) if inside is not None and voxels else None,
        "slices": int(np.count_nonzero(mask.any(axis=(1, 2)))),
    }
    if inside is not None:
        low, high = GROUND_GLASS
        numbers["ground_glass_ml"] = ml(np.count_nonzero((inside >= low) & (inside <= high)))
        numbers["consolidation_ml"] = ml(np.count_nonzero(inside > high))
        numbers["other_ml"] = ml(np.count_nonzero(inside < low))
    else:
        numbers |= dict.fromkeys(("ground_glass_ml", "consolidation_ml", "other_ml"))
    if lungs is None:
        return numbers | dict.fromkeys(("lung_ml", "share_of_lung", "right_ml", "right_share", "left_ml", "left_share"))
    marked = lungs[mask]
    numbers["lung_ml"] = ml(np.count_nonzero(lungs))
    numbers["share_of_lung"] = _share(np.count_nonzero(marked), np.count_nonzero(lungs))
    for name, side in (("right", RIGHT), ("left", LEFT)):
        here = np.count_nonzero(marked == side)
        numbers[f"{name}_ml"] = ml(here)
        numbers[f"{name}_share"] = _share(here, np.count_nonzero(lungs == side))
    return numbers


def _share(marked: int, lung: int) -> float | None:
    return int(marked) / int(lung) if lung else None


def check_min_mm3(min_mm3: float) -> None:
    """Raises ScoatFastError unless ``min_mm3`` can be the volume of the smallest region to keep."""
    if not (math.isfinite(min_mm3) and min_mm3 >= 0):
        raise ScoatFastError(f"the smallest region in mm3 must be 0 or more, got {min_mm3}")


def remove_small(mask: np.ndarray, voxel_mm3: float, min_mm3: float) -> np.ndarray:
    """The mask [slices, H, W] without connected regions (over faces, edges and corners) below ``min_mm3``."""
    fewest = math.ceil(min_mm3 / voxel_mm3 - 1e-9)
    if fewest <= 1:
        return mask
    marked = mask != 0
    label = regions(mask, 26)[0][marked]
    kept = np.zeros_like(mask)
    kept[marked] = np.bincount(label)[label] >= fewest
    return kept
