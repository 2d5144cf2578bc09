"""A CT volume as it was stored, and the same as slices that a network understands."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from ..errors import BadInputError

SLICE_AXES = "SPL"  # slices from the feet up, rows to the back (spine down), columns to the patient's left
AIR, TISSUE = -500, -200  # HU: what lies below is air or lung, what lies above is tissue
SEEN = 0.002  # share of the voxels; less than this is noise, not anatomy
LEVELS = 8  # values that a phantom of some materials may have; a scan has more
HIGHEST = 5000  # HU; even metal is cut off at 3071 by most scanners
DENSE, MOSTLY = 700, 0.1  # HU, share of what is no air: only bone is denser, and less than this of a chest is bone
PLANE_MM, RATIO = (0.05, 20.0), 10.0  # between pixels of a slice, and of the larger to the smaller
APART_MM = 1000.0  # between slices, at most
WIDTH_MM = (80.0, 1500.0)  # of a slice; scanners make 100 to 850 mm
CROP, FINE_MM = 64, 0.3  # a slice of fewer pixels, or of coarser ones, may be narrow: it is cut from a wider one


@dataclass
class Volume:
    """Voxels on the grid they were stored on.

    ``voxels``: [I, J, K]; HU (float32, or int16 where they are stored so) for a CT, or labels. ``affine``: [4, 4], from
    indices to mm, right-anterior-superior. ``header``: what a result on the same grid is to be written with.
    """

    path: Path
    voxels: np.ndarray
    affine: np.ndarray
    header: Nifti1Header
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Turn:
    """How to turn a volume with this affine into slices, and back."""

    affine: np.ndarray

    def to_slices(self, voxels: np.ndarray) -> np.ndarray:
        """[I, J, K] -> [slices, H, W], cut along the axis nearest to superior-inferior, the spine down."""
        return apply_orientation(voxels, ornt_transform(self._stored, self._wanted))

    def from_slices(self, slices: np.ndarray) -> np.ndarray:
        """The inverse of ``to_slices``."""
        return apply_orientation(slices, ornt_transform(self._wanted, self._stored))

    def slices_affine(self, shape: tuple[int, ...]) -> np.ndarray:
        """The affine of the slices of a volume of ``shape``."""
        return self.affine @ inv_ornt_aff(ornt_transform(self._stored, self._wanted), shape)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between slices, rows and columns."""
        sizes = np.linalg.norm(self.affine[:3, :3], axis=0)
        order = np.argsort(ornt_transform(self._stored, self._wanted)[:, 0])  # the stored axis of each wanted one
        return tuple(float(size) for size in sizes[order])

    @property
    def oblique(self) -> float:
        """Degrees between the slices' normal and rows and the patient's own axes, whichever lie further apart."""
        axes = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(np.degrees(np.arccos(np.clip(np.abs(axes).max(axis=0), 0, 1)).max()))

    @property
    def voxel_mm3(self) -> float:
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def _stored(self) -> np.ndarray:
        return io_orientation(self.affine)

    @property
    def _wanted(self) -> np.ndarray:
        return axcodes2ornt(SLICE_AXES)


def check_affine(path: str | Path, affine: np.ndarray) -> None:
    """Raises BadInputError unless ``affine`` maps a grid to space."""
    if affine.shape != (4, 4):
        raise BadInputError(path, f"an affine [4, 4] is wanted, got {affine.shape}")
    if not np.isfinite(affine).all():
        raise BadInputError(path, "its affine has NaN or infinite entries")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() < 1e-6 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise BadInputError(path, "its affine is singular: the axes of the grid do not span space")


def check_plane(path: str | Path, turn: Turn, shape: Sequence[int]) -> list[str]:
    """Warnings about the plane of chest CT slices of a shape [slices, H, W].

    Raises:
        BadInputError: unless a scanner makes slices of that size, and pixels of that size and shape. The network would
            see a chest squeezed to a line, and find nothing in it. Slices that lie further apart than a patient is
            long, or a unit of cm for mm, would give millilitres without sense.
    """
    between, rows, columns = turn.spacing
    if between > APART_MM:
        raise BadInputError(path, f"slices at most {APART_MM:g} mm apart are wanted, got {between:.4g} mm")
    low, high = PLANE_MM
    if not low <= min(rows, columns) <= max(rows, columns) <= high or max(rows, columns) > RATIO * min(rows, columns):
        raise BadInputError(
            path,
            f"pixels of {low:g} to {high:g} mm are wanted, no more than {RATIO:g} times as long as wide, "
            f"got {rows:.4g} x {columns:.4g} mm",
        )
    low, high = WIDTH_MM
    height, width = shape[1] * rows, shape[2] * columns
    narrow = max(height, width) < low and min(shape[1:]) >= CROP
    if max(height, width) > high or (narrow and max(rows, columns) < FINE_MM):
        raise BadInputError(
            path,
            f"slices of {low:g} to {high:g} mm across are wanted, got {height:.4g} x {width:.4g} mm: is its unit mm?",
        )
    if not narrow:
        return []
    return [f"its slices are only {height:.4g} x {width:.4g} mm across: if its unit is not mm, volumes are wrong"]


def check_hu(path: str | Path, slices: np.ndarray) -> list[str]:
    """Warnings about a chest CT [slices, H, W].

    Raises:
        BadInputError: if voxels are NaN or infinite, or the values cannot be Hounsfield units of a chest. The
            network would answer with an empty mask, which would look like a healthy patient.
    """
    lows, highs = slices.min(axis=(1, 2)), slices.max(axis=(1, 2))  # a NaN anywhere is either
    finite = np.isfinite(lows) & np.isfinite(highs)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        count = slices[bad].size - np.isfinite(slices[bad]).sum()
        raise BadInputError(path, f"{count} voxels are NaN or infinite, in {len(bad)} of {len(slices)} slices")
    low, high = float(lows.min()) + 0.0, float(highs.max()) + 0.0  # without a negative zero
    if low == high:
        raise BadInputError(path, f"every voxel is {low:g}: nothing to segment")
    found = f"its values span {low:g} to {high:g}"
    least = SEEN * slices.size
    if not _reaches(least, slices, lambda image: image < AIR):
        raise BadInputError(path, f"not in Hounsfield units of a chest: no air or lung below {AIR:g} HU; {found}")
    padding = _padding(slices)  # which may pass for air
    if not _reaches(least, slices, lambda image: (image < AIR) & ~np.isin(image, padding)):
        seen = slices[~np.isin(slices, padding)]
        if seen.size > 0 and seen.min() >= 0 and len(np.unique(seen)) > LEVELS:
            raise BadInputError(
                path, f"not in Hounsfield units of a chest: no air, lung or fat below 0 HU but for the padding; {found}"
            )
    if not _reaches(least, slices, lambda image: image > TISSUE):
        raise BadInputError(path, f"not in Hounsfield units of a chest: no tissue above {TISSUE:g} HU; {found}")
    if high > HIGHEST and np.count_nonzero(slices > HIGHEST) > least:
        raise BadInputError(path, f"not in Hounsfield units: many voxels above {HIGHEST:g}; {found}")
    # padding that was interpolated passes for air all the same
    dense = np.count_nonzero(slices > DENSE) / np.count_nonzero(slices > AIR)
    if dense > MOSTLY:
        raise BadInputError(
            path,
            f"not in Hounsfield units of a chest: {dense:.0%} of what is no air lies above {DENSE:g} HU, as stored "
            f"values without their intercept do; {found}",
        )
    blank = [int(i) for i in np.flatnonzero(lows == highs)]
    return [f"{len(blank)} blank slices, counted from the feet: {_some(blank)}"] if blank else []


def _reaches(least: float, slices: np.ndarray, is_seen: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether so many voxels are seen; what is not needed for the answer is not looked at."""
    found = 0
    return any((found := found + np.count_nonzero(is_seen(image))) >= least for image in slices)


def _padding(slices: np.ndarray) -> np.ndarray:
    """The values of what lies outside the scan: the lowest, and those in the corners of the volume.

    Air that a scanner or a window cut off at one value goes with it; the lung and the rim of the body remain.
    """
    corners = slices[:: max(len(slices) - 1, 1), :: max(slices.shape[1] - 1, 1), :: max(slices.shape[2] - 1, 1)]
    return np.unique([slices.min(), *corners.ravel()])


def check_mask(path: str | Path, voxels: np.ndarray, may_be_full: bool = False) -> None:
    """Raises BadInputError unless ``voxels`` can be a mask: labels from 0 up that, as a rule, leave something out."""
    if not np.isfinite(voxels).all() or voxels.min() < 0 or (voxels != np.round(voxels)).any():
        raise BadInputError(path, "a mask is wanted: whole numbers from 0 up")
    if voxels.all() and not may_be_full:
        raise BadInputError(path, "a mask is wanted: here every voxel is set")


def corners_apart(shape: Sequence[int], one: np.ndarray, other: np.ndarray) -> float:
    """How far apart two affines place the same corner of a volume [I, J, K], at most."""
    corners = np.array([*itertools.product(*((0, length - 1) for length in shape), [1])])
    return np.linalg.norm(corners @ (one - other)[:3].T, axis=1).max()


def mask_on_grid(volume: Volume, mask: Volume, may_be_full: bool = False) -> np.ndarray:
    """A mask as bool on the grid of ``volume``, from labels on the same grid up to the order and direction of axes.

    Raises:
        BadInputError: if it lies on another grid, or is no mask.
    """
    check_mask(mask.path, mask.voxels, may_be_full)
    ours, theirs = Turn(volume.affine), Turn(mask.affine)
    slices = theirs.to_slices(mask.voxels)
    shape = ours.to_slices(volume.voxels).shape
    if slices.shape != shape:
        raise BadInputError(mask.path, f"the grid of {volume.path.name} is wanted, {shape}, got {slices.shape}")
    apart = corners_apart(shape, ours.slices_affine(volume.voxels.shape), theirs.slices_affine(mask.voxels.shape))
    if not apart <= min(ours.spacing) / 2:
        raise BadInputError(
            mask.path, f"lies elsewhere in space than {volume.path.name}, up to {apart:.4g} mm: their affines differ"
        )
    return ours.from_slices(slices != 0)


def _some(numbers: list[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
