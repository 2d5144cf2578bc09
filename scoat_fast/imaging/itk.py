"""NRRD and MetaImage volumes, which 3D Slicer and ITK write: read by SimpleITK."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..errors import BadInputError, ScoatFastError
from ..files import is_file
from .nifti import LARGEST, new_header
from .volume import Volume, check_affine

SUFFIXES = (".nrrd", ".mha")
ELSEWHERE = re.compile(rb"^data ?file *:|^ElementDataFile *=(?! *LOCAL\s)", re.MULTILINE | re.IGNORECASE)
HEADER = 1 << 16  # bytes that a header is looked for in


def read_itk(path: str | Path) -> Volume:
    """Reads one 3-D volume of numbers, with its place in space.

    Raises:
        BadInputError: if the file is missing, damaged, declares too much or is no such volume. ScoatFastError: without
            SimpleITK.
    """
    path = Path(path)
    try:
        import SimpleITK
    except ImportError as error:
        raise ScoatFastError("NRRD and MetaImage need SimpleITK: pip install 'scoat-fast[itk]'") from error
    if not is_file(path):
        raise BadInputError(path, "an image file is wanted, this is none")
    _check_whole(path)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # its errors come as exceptions, too
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()  # before a voxel is inflated
        shape, channels = reader.GetSize(), reader.GetNumberOfComponents()
        if len(shape) != 3 or channels != 1 or min(shape) < 1:
            raise BadInputError(path, f"one 3-D volume of numbers is wanted, got {shape} of {channels} components")
        if np.prod(shape, dtype=object) * 8 > 4 * LARGEST:
            raise BadInputError(path, f"declares {shape} voxels, more than {LARGEST >> 30} GiB")
        image = reader.Execute()
    except RuntimeError as error:
        raise BadInputError(path, f"cannot be read: {str(error).strip().splitlines()[-1]}") from error
    voxels = SimpleITK.GetArrayFromImage(image).transpose()  # [I, J, K]
    if voxels.dtype.kind not in "iuf":
        raise BadInputError(path, f"voxels are wanted that are numbers, got {voxels.dtype}")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK counts to the left and to the back
    check_affine(path, affine)
    is_int16 = voxels.dtype.kind == "i" and voxels.itemsize == 2
    return Volume(path, voxels if is_int16 else voxels.astype(np.float32), affine, new_header(affine, voxels.shape))


def _check_whole(path: Path) -> None:
    """Raises BadInputError for a header whose voxels lie in another file: nobody gave that one."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER)
    except OSError as error:
        raise BadInputError(path, f"cannot be read: {error.strerror}") from error
    if ELSEWHERE.search(header.partition(b"\n\n")[0] if header.startswith(b"NRRD") else header):
        raise BadInputError(path, "its voxels lie in another file: one file with all of it is wanted")
