"""The paper's metrics: overlap of voxels (equation 8) and of connected regions (equations 9 and 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ..imaging.regions import regions

METRICS = ("DSC", "SEN", "PPV", "VA", "RLP", "RLR")
EMPTY, CENTRES = ("score", "skip"), ("prediction", "truth")
NEIGHBOURS = {2: 8, 3: 26}  # regions touch at corners, too


@dataclass(frozen=True)
class Counts:
    """What the metrics of a case are made of. Those of its parts add up: ``a + b``."""

    overlap: int = 0  # voxels
    predicted: int = 0
    true: int = 0
    predicted_regions: int = 0  # N_a of equation 9
    right_regions: int = 0  # N_p: of these, whose centre lies in the truth
    true_regions: int = 0  # N_b
    found_regions: int = 0  # N_t: of these, in which such a centre lies

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def count(
    found: np.ndarray,
    truth: np.ndarray,
    dims: int = 2,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    centre_of: str = "prediction",
) -> Counts:
    """Counts voxels and regions.

    Args:
        found, truth: [slices, H, W] of bool, on one grid.
        dims: 2 for regions within each slice, as the paper draws them; 3 for regions of the volume.
        spacing: mm between slices, rows and columns; of the distances in equation 10.
        centre_of: the paper says twice "the number of real opacity regions predicted by the model". A true region is
            found if the centre of a predicted one lies in it ("prediction"), or if its own centre was predicted
            ("truth").

    Raises:
        ValueError: for shapes that differ, or an option that is none.
    """
    if found.shape != truth.shape or found.ndim != 3:
        raise ValueError(f"two masks [slices, H, W] are wanted, got {found.shape} and {truth.shape}")
    if dims not in NEIGHBOURS or centre_of not in CENTRES:
        raise ValueError(f"dims {tuple(NEIGHBOURS)} and centre_of {CENTRES} are wanted, got {dims} and {centre_of!r}")
    found, truth = found.astype(bool), truth.astype(bool)
    voxels = Counts(int((found & truth).sum()), int(found.sum()), int(truth.sum()))
    if dims == 3:
        return voxels + _count_regions(found, truth, spacing, centre_of)
    seen = np.flatnonzero((found | truth).any(axis=(1, 2)))
    return sum((_count_regions(found[k], truth[k], spacing[1:], centre_of) for k in seen), voxels)


def scores(counts: Counts, empty: str = "score") -> dict[str, float | None]:
    """The six metrics, by the names in ``METRICS``.

    A ratio of nothing to nothing is 1 where neither mask has anything, 0 where one of them has; with ``empty="skip"``
    it is None. VA of one empty mask is -1, as equation 8 has it.
    """
    if empty not in EMPTY:
        raise ValueError(f"empty must be one of {EMPTY}, got {empty!r}")
    c, both = counts, counts.predicted + counts.true

    def ratio(part: float, whole: int) -> float | None:
        if whole:
            return part / whole
        return None if empty == "skip" else float(both == 0)

    return {
        "DSC": ratio(2 * c.overlap, both),
        "SEN": ratio(c.overlap, c.true),
        "PPV": ratio(c.overlap, c.predicted),
        "VA": ratio(both - 2 * abs(c.predicted - c.true), both),
        "RLP": ratio(c.right_regions, c.predicted_regions),
        "RLR": ratio(c.found_regions, c.true_regions),
    }


def centre(points: np.ndarray, spacing: Sequence[float]) -> int:
    """Equation 10: which point of a region has the least distance to the point of its edge that is farthest from it.

    A centre is a point of the region, whatever its holes and bends; of several, it is the first.

    Args:
        points: [N, D], indices in the order of the array (as from ``np.argwhere``).
        spacing: [D], mm.

    Only few points of the edge matter: the search keeps those that were the farthest from some candidate, which
    bounds each point's distance from below, and ends when the bound of the best candidate is its true distance. The
    ends of the region's rows hold all that may be farthest.
    """
    spacing = np.asarray(spacing, float)
    first = np.ones(len(points), bool)
    first[1:] = (points[1:, :-1] != points[:-1, :-1]).any(axis=1)
    ends = points[first | np.append(first[1:], True)]
    bound, at = np.full(len(points), -1.0), len(points) // 2
    while True:
        distances = _squares(ends, points[at], spacing)
        far = int(distances.argmax())
        if distances[far] <= bound[at]:
            return at
        bound = np.maximum(bound, _squares(points, ends[far], spacing))
        at = int(bound.argmin())


def _squares(points: np.ndarray, to: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    return (((points - to) * spacing) ** 2).sum(axis=1)


def _count_regions(found: np.ndarray, truth: np.ndarray, spacing: Sequence[float], centre_of: str) -> Counts:
    (ours, our_count), (theirs, their_count) = (regions(mask, NEIGHBOURS[mask.ndim]) for mask in (found, truth))
    hit = _at_centres(theirs, ours, spacing)
    met = np.unique(hit[hit > 0]) if centre_of == "prediction" else np.flatnonzero(_at_centres(ours, theirs, spacing))
    return Counts(0, 0, 0, our_count, int((hit > 0).sum()), their_count, len(met))


def _at_centres(values: np.ndarray, labels: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """The values at the centres of labelled regions."""
    inside = np.flatnonzero(labels)
    of = labels.reshape(-1)[inside]
    order = np.argsort(of, kind="stable")
    points = np.stack(np.unravel_index(inside[order], labels.shape), axis=1)
    each = np.split(points, np.flatnonzero(np.diff(of[order])) + 1) if len(points) else []
    return np.array([values[tuple(region[centre(region, spacing)])] for region in each], dtype=np.int64)
