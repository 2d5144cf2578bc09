"""NRRD and MetaImage volumes (.nrrd, .mha), as 3D Slicer and ITK write them.

Both are a text header and a block of voxels, which may be packed. They are read here, and by no library, since those
that read them inflate whatever a header declares, and give a damaged block for a volume.
Formats: https://teem.sourceforge.net/nrrd/format.html and https://itk.org/Wiki/ITK/MetaIO/Documentation.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import BadInputError
from ..files import is_file
from .nifti import LARGEST, PADDING, new_header
from .volume import Volume, check_affine

SUFFIXES = (".nrrd", ".mha")
HEADER = 1 << 20  # bytes; longer ones are none
CHUNK = 1 << 20
NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    "float": "f4",
    "double": "f8",
}
META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
TO_RAS = {  # what turns the space of an NRRD to right-anterior-superior
    "right-anterior-superior": (1, 1, 1), "RAS": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "LAS": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "LPS": (-1, -1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class _Block:
    """How the voxels lie after the header; ``affine`` as of a volume."""

    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray
    packed: bool
    warnings: list[str]


def read_itk(path: str | Path) -> Volume:
    """One 3-D volume [I, J, K] of numbers, float32 or int16 where they are stored so, with its place in space.

    Raises:
        BadInputError: if the file is missing, truncated or damaged; is not one 3-D volume of numbers; uses what the
            formats have beyond that; or its geometry is not usable.
    """
    path = Path(path)
    if not is_file(path):
        raise BadInputError(path, "an NRRD or MetaImage file is wanted, this is none")
    try:
        with path.open("rb") as file:
            block = _meta(path, file) if path.suffix.lower() == ".mha" else _nrrd(path, file)
            stored = _voxels(path, file, block)
    except OSError as error:
        raise BadInputError(path, f"cannot be read: {error.strerror or error}") from error
    is_int16 = stored.dtype.kind == "i" and stored.itemsize == 2
    voxels = stored if is_int16 else stored.astype(np.float32)
    return Volume(path, voxels, block.affine, new_header(block.affine, voxels.shape), block.warnings)


def _nrrd(path: Path, file: BinaryIO) -> _Block:
    if not re.fullmatch(rb"NRRD000\d", _line(path, file)):
        raise BadInputError(path, "not an NRRD file")
    fields: dict[str, str] = {}
    while line := _text(path, _line(path, file)):  # an empty one ends the header, or the end of a detached one
        name, colon, value = line.partition(":")
        if colon and not line.startswith("#") and not value.startswith("="):  # not a comment, nor a key of the user's
            fields[name.strip().lower()] = value.strip()
    shape = _shape(path, fields, "dimension", "sizes")
    for name in ("line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(name, "0") != "0":
            raise BadInputError(path, f"voxels that follow their header at once are wanted, got {name} {fields[name]}")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise BadInputError(path, f"raw or gzip encoding is wanted, got {encoding or 'none'}")
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", ""))) - {"mm", ""}
    if units:
        raise BadInputError(path, f"mm are wanted, got space units {', '.join(sorted(units))}")
    warnings: list[str] = []
    space = fields.get("space")
    if space is None:
        warnings.append("the header does not say how the patient lies; left-posterior-superior axes are assumed")
        spacing = _numbers(path, fields, "spacings", 3)
        directions, origin, signs = np.diag(spacing), np.zeros(3), TO_RAS["LPS"]
    else:
        signs = TO_RAS.get(space.upper() if len(space) == 3 else space.lower())
        if signs is None:
            raise BadInputError(path, f"a space of a patient in three dimensions is wanted, got {space}")
        directions = _numbers(path, fields, "space directions", 9).reshape(3, 3)
        origin = _numbers(path, fields, "space origin", 3) if "space origin" in fields else np.zeros(3)
    dtype = _dtype(path, NRRD_TYPES.get(fields.get("type", "").lower()), fields.get("type"))
    if dtype.itemsize > 1:
        if fields.get("endian", "") not in ("little", "big"):
            raise BadInputError(path, f"little or big endian is wanted, got {fields.get('endian', 'none')}")
        dtype = dtype.newbyteorder(fields["endian"])
    if "data file" in fields or "datafile" in fields:
        raise BadInputError(path, "its voxels lie in another file: one file with all of it is wanted")
    return _Block(shape, dtype, _affine(path, directions, origin, signs), encoding != "raw", warnings)


def _meta(path: Path, file: BinaryIO) -> _Block:
    fields: dict[str, str] = {}
    while "ElementDataFile" not in fields:
        line = _text(path, _line(path, file))
        name, equals, value = line.partition("=")
        if not equals:
            raise BadInputError(path, "not a MetaImage file, or its header ends before ElementDataFile")
        fields[name.strip()] = value.strip()
    for name, wanted in (
        ("ObjectType", "image"), ("BinaryData", "true"), ("ElementNumberOfChannels", "1"), ("HeaderSize", "0"),
        ("ElementToIntensityFunctionSlope", "1"), ("ElementToIntensityFunctionOffset", "0"),
    ):  # fmt: skip
        if fields.get(name, wanted).lower() != wanted:
            raise BadInputError(path, f"{name} {wanted} is wanted, got {fields[name]}")
    shape = _shape(path, fields, "NDims", "DimSize")
    spacing = _numbers(path, fields, "ElementSpacing" if "ElementSpacing" in fields else "ElementSize", 3)
    turns = next((name for name in ("TransformMatrix", "Rotation", "Orientation") if name in fields), None)
    cosines = np.eye(3) if turns is None else _numbers(path, fields, turns, 9).reshape(3, 3)
    place = next((name for name in ("Offset", "Position", "Origin") if name in fields), None)
    origin = np.zeros(3) if place is None else _numbers(path, fields, place, 3)
    dtype = _dtype(path, META_TYPES.get(fields.get("ElementType", "")), fields.get("ElementType"))
    big = _true(fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB")))
    if fields["ElementDataFile"].upper() != "LOCAL":
        raise BadInputError(path, "its voxels lie in another file: one file with all of it is wanted")
    return _Block(
        shape,
        dtype.newbyteorder("big" if big else "little"),
        _affine(path, cosines * spacing[:, None], origin, TO_RAS["LPS"]),
        _true(fields.get("CompressedData")),
        [],
    )


def _line(path: Path, file: BinaryIO) -> bytes:
    line = file.readline(HEADER)
    if file.tell() > HEADER:
        raise BadInputError(path, "its header is damaged: it does not end")
    return line.rstrip(b"\r\n")


def _text(path: Path, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise BadInputError(path, "its header is damaged: it is no text") from error


def _true(value: str | None) -> bool:
    return (value or "").lower() in ("true", "t", "1")


def _shape(path: Path, fields: dict[str, str], dimensions: str, sizes: str) -> tuple[int, ...]:
    if fields.get(dimensions) != "3":
        raise BadInputError(path, f"one 3-D volume is wanted, got {dimensions} {fields.get(dimensions, 'missing')}")
    shape = tuple(int(n) for n in fields.get(sizes, "").split() if re.fullmatch(r"\d{1,9}", n))
    if len(shape) != 3 or min(shape) < 1:
        raise BadInputError(path, f"three sizes from 1 up are wanted, got {sizes} {fields.get(sizes, 'missing')}")
    return shape


def _numbers(path: Path, fields: dict[str, str], name: str, count: int) -> np.ndarray:
    words = re.sub(r"[(),]", " ", fields.get(name, "")).split()
    try:
        numbers = np.array([float(word) for word in words])
    except ValueError:
        numbers = np.array([])
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise BadInputError(path, f"{name} is missing or not {count} finite numbers")
    return numbers


def _dtype(path: Path, code: str | None, said: str | None) -> np.dtype:
    if code is None:
        raise BadInputError(path, f"voxels are wanted that are numbers, got {said or 'no type'}")
    return np.dtype(code)


def _affine(path: Path, axes: np.ndarray, origin: np.ndarray, signs: tuple[int, ...]) -> np.ndarray:
    """``axes``: [3, 3], a row for each axis of the grid, its step in mm."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes.T, origin
    affine = np.diag([*signs, 1]) @ affine
    check_affine(path, affine)
    return affine


def _voxels(path: Path, file: BinaryIO, block: _Block) -> np.ndarray:
    """The stored voxels [I, J, K], neither fewer nor more than the header declares."""
    size = int(np.prod(block.shape, dtype=object)) * block.dtype.itemsize
    if size > LARGEST:
        raise BadInputError(path, f"declares {size / 2**30:.0f} GiB of voxels {block.shape}, more than {LARGEST >> 30}")
    stored = _inflated(path, file, size) if block.packed else file.read(size + PADDING + 1)
    if len(stored) < size:
        raise BadInputError(path, f"truncated: {size} bytes of voxels are wanted, got {len(stored)}")
    if len(stored) > size + PADDING:  # a header with too few voxels would cut the patient into pieces
        raise BadInputError(path, f"goes on after the voxels {block.shape} that its header declares")
    return np.frombuffer(stored, block.dtype, count=size // block.dtype.itemsize).reshape(block.shape, order="F")


def _inflated(path: Path, file: BinaryIO, size: int) -> bytearray:
    """What zlib or gzip packed, up to a little more than ``size`` bytes; its checksum holds."""
    stream, out = zlib.decompressobj(zlib.MAX_WBITS | 32), bytearray()
    try:
        while not stream.eof and len(out) <= size + PADDING:
            chunk = stream.unconsumed_tail or file.read(CHUNK)
            if not chunk:
                raise BadInputError(path, f"truncated: {size} bytes of voxels are wanted, got {len(out)}")
            out += stream.decompress(chunk, size + PADDING + 1 - len(out))
    except zlib.error as error:
        raise BadInputError(path, f"truncated or damaged: {error}") from error
    return out
