"""NIfTI volumes: read with every field checked that others trust, written on the grid of the input."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header, Nifti2Image
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from ..errors import BadInputError
from ..files import is_file
from .packing import DAMAGED, open_packed, pack
from .volume import Volume, check_affine, corners_apart

SUFFIXES = (".nii", ".nii.gz")
PADDING = 512  # bytes that may follow the voxels: writers fill blocks
LARGEST = 8 << 30  # bytes; a header that declares more is damaged, or means harm
HEADERS = {348: Nifti1Header, 540: Nifti2Header}
IMAGES = {Nifti1Header: Nifti1Image, Nifti2Header: Nifti2Image}
UNITS_MM = {1: 1000.0, 2: 1.0, 3: 0.001}  # by the code of the header's length unit: m, mm, um
DESCRIPTION = b"scoat_fast, research only"


def read_nifti(path: str | Path, labels: bool = False) -> Volume:
    """Reads a ``.nii`` or ``.nii.gz`` volume, scaled by its slope and intercept.

    Args:
        labels: keep the stored type, for masks; of other volumes only int16 is kept, the rest becomes float32.

    Raises:
        BadInputError: if the file is missing, truncated or damaged; is not one 3-D volume of numbers; or its
            spacing, affine, slope or intercept is not usable.
    """
    path = Path(path)
    if not is_file(path):
        raise BadInputError(path, "a NIfTI file is wanted, this is none")
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with open_packed(path) if packed else path.open("rb") as file:
            header = _read_header(path, file)
            stored = _read_voxels(path, file, header)
    except DAMAGED as error:
        raise BadInputError(path, f"truncated or damaged: {error}") from error
    except OSError as error:
        raise BadInputError(path, f"cannot be read: {error.strerror or error}") from error
    doubts = _valid_codes(header)
    affine, warnings = _affine(path, header)
    warnings = doubts + warnings
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite([slope, intercept]).all():
        raise BadInputError(path, f"slope {slope:g} and intercept {intercept:g} are not both finite")
    scaled = slope != 0 and (slope, intercept) != (1, 0)  # a slope of 0 means: not scaled
    is_int16 = stored.dtype.kind == "i" and stored.itemsize == 2
    if not scaled and (labels or is_int16):
        return Volume(path, stored, affine, header, warnings)
    with np.errstate(all="ignore"):  # whoever reads HU checks that they are finite
        voxels = stored.astype(np.float32)
        if scaled:
            voxels *= np.float32(slope)
            voxels += np.float32(intercept)
    return Volume(path, voxels, affine, header, warnings)


def nifti_bytes(voxels: np.ndarray, like: Nifti1Header) -> bytes:
    """A packed NIfTI file of ``voxels`` [I, J, K] with the geometry, units and format of the header ``like``.

    Free text of the input is not copied: it may name the patient.
    """
    header = like.copy()
    for field in ("descrip", "aux_file", "intent_name", "intent_code", "cal_min", "cal_max", "vox_offset"):
        header[field] = b"" if header[field].dtype.kind == "S" else 0
    if "db_name" in header.structarr.dtype.names:
        header["db_name"] = header["data_type"] = b""
    header["descrip"] = DESCRIPTION
    lengths = np.abs(header["pixdim"][1:4])  # signs and zeros beside an affine mean nothing
    header["pixdim"][1:4] = np.where(lengths > 0, lengths, 1)
    if abs(header["pixdim"][0]) != 1:
        header["pixdim"][0] = 1
    header["scl_slope"], header["scl_inter"] = 1, 0
    header.set_data_dtype(voxels.dtype)
    image = IMAGES[type(header)](voxels.reshape(header.get_data_shape()), None, header)
    return pack(image.to_bytes())


def new_header(affine: np.ndarray, shape: tuple[int, int, int]) -> Nifti1Header:
    """A header in mm for a grid that came from elsewhere than NIfTI; the affine is that of the scanner."""
    header = Nifti1Header()
    header.set_data_shape(shape)
    header.set_qform(affine, 1, strip_shears=True)
    header.set_sform(affine, 1)
    header.set_xyzt_units("mm")
    return header


def stem(path: Path) -> str:
    """The name of a file without ``.nii.gz`` or its last suffix."""
    suffix = next((suffix for suffix in reversed(SUFFIXES) if path.name.lower().endswith(suffix)), path.suffix)
    return path.name[: len(path.name) - len(suffix)]


def _read_header(path: Path, file: BinaryIO) -> Nifti1Header:
    start = file.read(540)
    if len(start) < 348:
        raise BadInputError(path, f"truncated: a header of 348 bytes is wanted, got {len(start)}")
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    size = next((size for size in HEADERS if size in sizes), None)
    if size is None or len(start) < size:
        raise BadInputError(path, "not a NIfTI file")
    try:
        header = HEADERS[size].from_fileobj(io.BytesIO(start[:size]), check=False)  # without what may follow it
        shape, itemsize = header.get_data_shape(), header.get_data_dtype().itemsize
    except (HeaderDataError, WrapStructError, ValueError, KeyError) as error:
        raise BadInputError(path, f"its header is damaged: {error}") from error
    if header["magic"].item() != type(header).single_magic:
        raise BadInputError(path, "a NIfTI file with header and voxels in one is wanted")
    if len(shape) < 3 or min(shape) < 1 or any(length > 1 for length in shape[3:]):
        raise BadInputError(path, f"one 3-D volume is wanted, got dimensions {shape}")
    if header.get_data_dtype().kind not in "iuf":
        raise BadInputError(path, f"voxels are wanted that are numbers, got {header.get_data_dtype()}")
    size = int(np.prod(shape, dtype=object)) * itemsize
    if size > LARGEST:
        raise BadInputError(path, f"declares {size / 2**30:.0f} GiB of voxels {shape}, more than {LARGEST >> 30}")
    offset = float(header["vox_offset"])
    if not (348 <= offset <= 64 << 20 and offset.is_integer()):
        raise BadInputError(path, f"its voxels cannot start at byte {offset:g}")
    return header


def _valid_codes(header: Nifti1Header) -> list[str]:
    """Takes codes of the affines that the standard does not have for 0, as nibabel does; warnings about that."""
    doubts = []
    for name in ("sform_code", "qform_code"):
        if not 0 <= int(header[name]) <= 5:
            doubts.append(f"its {name} {int(header[name])} is not valid and taken as 0")
            header[name] = 0
    return doubts


def _read_voxels(path: Path, file: BinaryIO, header: Nifti1Header) -> np.ndarray:
    """The stored voxels [I, J, K]. Reads on to the end of the file, which is where gzip checks its checksum."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    size = int(np.prod(shape)) * dtype.itemsize
    file.seek(int(header["vox_offset"]))
    stored = file.read(size)
    if len(stored) < size:
        raise BadInputError(path, f"truncated: {size} bytes of voxels are wanted, got {len(stored)}")
    if len(file.read(PADDING + 1)) > PADDING:  # a header with too few voxels would cut the patient into pieces
        raise BadInputError(path, f"goes on after the voxels {shape} that its header declares")
    return np.frombuffer(stored, dtype).reshape(shape[:3], order="F")


def _affine(path: Path, header: Nifti1Header) -> tuple[np.ndarray, list[str]]:
    """Indices to mm: the sform where it is set, else the qform, else the spacing alone; and warnings."""
    spacing = np.asarray(header["pixdim"][1:4], dtype=float)
    written = " x ".join(f"{mm:.4g}" for mm in spacing)
    if not np.isfinite(spacing).all():
        raise BadInputError(path, f"its spacing is not finite: {written}")
    if int(header["sform_code"]) == 0 and spacing.min() <= 0:
        raise BadInputError(path, f"its spacing is not positive: {written}")
    if header["pixdim"][0] == 0:
        header = header.copy()
        header["pixdim"][0] = 1  # as the standard has it: 0 means 1
    try:
        affine = header.get_best_affine()
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        raise BadInputError(path, f"its affine cannot be used: {error}") from error
    check_affine(path, affine)
    scale = UNITS_MM.get(int(header["xyzt_units"]) & 7, 1.0)  # mm where the header does not say
    warnings = []
    if int(header["sform_code"]) == int(header["qform_code"]) == 0:
        warnings.append("the header does not say how the patient lies; left-anterior-superior axes are assumed")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(lengths, spacing, rtol=0.01):
        used = " x ".join(f"{mm:.4g}" for mm in lengths)
        warnings.append(f"the header's spacing {written} differs from that of its affine, {used}; the affine is used")
    if int(header["sform_code"]) > 0 and int(header["qform_code"]) > 0:
        warnings += _disagreement(header, affine, scale)
    return np.diag([scale, scale, scale, 1.0]) @ affine, warnings


def _disagreement(header: Nifti1Header, sform: np.ndarray, scale: float) -> list[str]:
    """A warning where the qform, which some viewers go by, places a corner of the volume more than a voxel away."""
    try:
        with np.errstate(all="ignore"):  # a qform may hold any values
            qform = header.get_qform()
            apart = corners_apart(header.get_data_shape()[:3], qform, sform)
            mirrored = np.linalg.det(qform[:3, :3]) * np.linalg.det(sform[:3, :3]) < 0
    except (HeaderDataError, ValueError):
        apart = np.nan
    if apart <= np.linalg.norm(sform[:3, :3], axis=0).max():
        return []
    if not np.isfinite(apart):
        return ["its qform, which some viewers go by, cannot be used; the sform is used"]
    how = "mirror each other (left and right may be swapped)" if mirrored else f"lie up to {apart * scale:.4g} mm apart"
    return [f"its sform and qform {how}: the sform is used, and some viewers go by the qform"]
