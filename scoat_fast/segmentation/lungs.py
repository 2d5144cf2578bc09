"""The lungs in a chest CT, by thresholds and morphology: for numbers per lung where nobody gives a mask.

Air within the body, without airways and bowel, closed over vessels and over opacity, which is as dense as the chest
wall. No match for a trained lung segmentation, whose mask may be given instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from ..imaging.regions import regions

RIGHT, LEFT = 1, 2
PIXEL_MM = 2.0  # of the grid that this works on
AIR = -400  # HU: half-way between lung and soft tissue
SKIN_MM = 6.0  # what is thinner outside the body, as a blanket is, belongs to no body
AIRWAY = -920.0  # HU: airways and bowel gas are darker on the average, lungs are not
AIRWAY_MM2, BOWEL_ML = 800.0, 1500.0  # and no larger than this, in a slice and in all
LEAST_ML, SHARE = 20.0, 0.05  # of a lung; and of the largest, for a piece to count
CLOSING_MM = 14.0
ADDED = 0.25  # share of the lungs that closing and opacity may add without a warning


@dataclass
class Lungs:
    """``labels`` [slices, H, W], uint8: 1 in the patient's right lung, 2 in the left one; None where there are none.

    ``source``: "own" where this module found them, "given", or None.
    """

    labels: np.ndarray | None = None
    source: str | None = None
    warnings: list[str] = field(default_factory=list)


def find_lungs(hu: np.ndarray, opacity: np.ndarray, spacing: tuple[float, float, float]) -> Lungs:
    """Finds both lungs.

    Args:
        hu: [slices, H, W], slices from the feet up, rows to the back, columns to the patient's left.
        opacity: the same shape; what it marks within the body counts as lung.
        spacing: mm between slices, rows and columns.
    """
    small = _shrink(hu, spacing)
    pixel = tuple(mm * size / less for mm, size, less in zip(spacing[1:], hu.shape[1:], small.shape[1:], strict=True))
    voxel_ml = spacing[0] * pixel[0] * pixel[1] / 1000
    inside = _inside(small, pixel)
    air = _without_airways(inside & (small < AIR), small, pixel, voxel_ml)
    if air.sum() * voxel_ml < LEAST_ML:
        return Lungs(warnings=["no lungs were found: no share of the lung"])
    marked = np.zeros(small.shape, bool)
    involved = opacity.any(axis=(1, 2))
    marked[involved] = _resize(opacity[involved], small.shape[1:]) > 0.5
    lung = _close((air | marked) & inside, pixel) & inside
    sides = _sides(lung, air, _middle(small))
    found = _nearest(sides, hu.shape[1:])
    warnings = []
    added = 1 - air.sum() / (sides > 0).sum()
    if added > ADDED:
        warnings.append(
            f"{added:.0%} of the lungs are no air: they were closed over what is dense, and may be too large"
        )
    missing = [name for name, side in (("right", RIGHT), ("left", LEFT)) if not (sides == side).any()]
    warnings += [f"no {name} lung was found" for name in missing]
    return Lungs(found, "own", warnings)


def given_lungs(lung: np.ndarray, hu: np.ndarray | None = None) -> Lungs:
    """The sides of a lung mask [slices, H, W] that somebody gave; without ``hu``, of those of the image."""
    lung = lung.astype(bool)
    if not lung.any():
        return Lungs(warnings=["the lung mask is empty: no share of the lung"])
    return Lungs(_sides(lung, lung, (lung.shape[2] - 1) / 2 if hu is None else _middle(hu)), "given")


def _middle(hu: np.ndarray) -> float:
    """The column of the body's middle."""
    tissue = (hu >= AIR).sum(axis=(0, 1))
    return float(np.average(np.arange(len(tissue)), weights=tissue if tissue.any() else None))


def _inside(hu: np.ndarray, pixel: tuple[float, float]) -> np.ndarray:
    """The body with all that it encloses, slice by slice: without table, blankets and the air between them."""
    tissue = _open(hu >= AIR, pixel, SKIN_MM)
    if not tissue.any():
        return tissue
    labels, _ = regions(tissue, 6)
    body = labels == np.bincount(labels[tissue]).argmax()
    around = np.pad(~body, ((0, 0), (1, 1), (1, 1)), constant_values=True)  # air on all sides of a slice is one
    labels, _ = regions(around, 4)
    return (labels != labels[:, :1, :1])[:, 1:-1, 1:-1]


def _without_airways(air: np.ndarray, hu: np.ndarray, pixel: tuple[float, float], voxel_ml: float) -> np.ndarray:
    """Air that is lung: neither small dark holes of slices, nor what is dark as a whole, nor scattered pieces."""
    label, pixels, mean = _pieces(air, hu, 8)
    area = pixels * pixel[0] * pixel[1]
    airway = (mean < AIRWAY) & (area < AIRWAY_MM2)
    kept = air.copy()
    kept[air] = ~airway[label]
    label, voxels, mean = _pieces(kept, hu, 26)
    lung = (voxels >= SHARE * voxels.max()) & ((mean >= AIRWAY) | (voxels * voxel_ml > BOWEL_ML))
    kept[kept] = lung[label]
    return kept


def _pieces(mask: np.ndarray, hu: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The label of each voxel in the mask, and how many voxels, of what mean in HU, each label has; 0 has none."""
    labels, count = regions(mask, neighbours)
    label = labels[mask]
    voxels = np.bincount(label, minlength=count + 1)
    return label, voxels, np.bincount(label, hu[mask], minlength=count + 1) / voxels.clip(1)


def _sides(lung: np.ndarray, air: np.ndarray, middle: float) -> np.ndarray:
    """Right and left: pieces of a slice by their middle, those on both sides cut where they are thinnest."""
    sides = np.zeros(lung.shape, np.uint8)
    columns = np.flatnonzero(lung.any(axis=(0, 1)))
    width = 2 * max(middle - columns[0], columns[-1] - middle)
    labels, last = regions(lung, 8)[0], 0
    for k, image in enumerate(labels):
        first, last = last + 1, max(last, int(image.max()))
        for piece in range(first, last + 1):
            here = image == piece
            across = np.flatnonzero(here.any(axis=0))
            if across[0] < middle - width / 6 and across[-1] > middle + width / 6:
                near = slice(max(int(middle - width / 8), 0), int(middle + width / 8) + 2)
                cut = near.start + int((air[k][:, near] & here[:, near]).sum(axis=0).argmin())
                sides[k, :, :cut][here[:, :cut]] = RIGHT
                sides[k, :, cut:][here[:, cut:]] = LEFT
            else:
                centre = np.flatnonzero(here.sum(axis=0).cumsum() * 2 >= here.sum())[0]
                sides[k][here] = RIGHT if centre < middle else LEFT
    return sides


def _shrink(hu: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Means over about ``PIXEL_MM`` of each slice, float32."""
    shape = [min(size, max(round(size * mm / PIXEL_MM), 1)) for size, mm in zip(hu.shape[1:], spacing[1:], strict=True)]
    return _resize(hu, tuple(shape))


def _resize(slices: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if slices.shape[1:] == shape:
        return slices.astype(np.float32)
    found = np.empty((len(slices), *shape), np.float32)
    for k, image in enumerate(slices):
        found[k] = F.interpolate(torch.from_numpy(image.astype(np.float32))[None, None], shape, mode="area")[0, 0]
    return found


def _nearest(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = ((np.arange(size) * less) // size for size, less in zip(shape, labels.shape[1:], strict=True))
    return labels.take(columns, axis=2).take(rows, axis=1)


def _open(mask: np.ndarray, pixel: tuple[float, float], mm: float) -> np.ndarray:
    return ~_grow(_grow(~mask, pixel, mm / 2), pixel, mm / 2, shrink=True)


def _close(mask: np.ndarray, pixel: tuple[float, float]) -> np.ndarray:
    return _grow(_grow(mask, pixel, CLOSING_MM / 2), pixel, CLOSING_MM / 2, shrink=True)


def _grow(mask: np.ndarray, pixel: tuple[float, float], mm: float, shrink: bool = False) -> np.ndarray:
    """A mask grown, or shrunk, by a rectangle of ``mm`` around each pixel; beyond the image lies nothing new."""
    grown = mask != shrink
    for axis, size in enumerate(pixel, 1):
        before = np.moveaxis(grown, axis, 0)
        after = before.copy("K")
        for step in range(1, round(mm / size) + 1):
            after[step:] |= before[:-step]
            after[:-step] |= before[step:]
        grown = np.moveaxis(after, 0, axis)
    return grown != shrink
