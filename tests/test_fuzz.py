"""Headers with bytes changed at random: one clear error, or a volume that can be trusted; never a crash."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from conftest import ASYMMETRIC
from dicom_series import write_series
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import BYTES, SECONDS, within

from scoat_fast import BadInputError
from scoat_fast.imaging.dicom import list_series, read_series
from scoat_fast.imaging.nifti import nifti_bytes, read_nifti
from scoat_fast.imaging.volume import Turn, check_hu, check_plane

LONGEST = 120  # seconds for all examples: one that hangs is ended
FUZZ = settings(max_examples=250, deadline=SECONDS * 1000, derandomize=True, suppress_health_check=list(HealthCheck))
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6)


def changed(data: bytes, changes: list[tuple[int, int]], limit: int) -> bytes:
    """Bytes of the first ``limit`` replaced."""
    copy = bytearray(data)
    for place, value in changes:
        copy[place % min(limit, len(copy))] = value
    return bytes(copy)


def nifti() -> bytes:
    voxels = np.random.default_rng(0).normal(-600, 300, (9, 8, 5)).astype(np.int16)
    return nib.Nifti1Image(voxels, ASYMMETRIC).to_bytes()


def test_nifti_headers():
    within(LONGEST, BYTES, check_nifti_headers)


@FUZZ
@given(CHANGES)
def check_nifti_headers(changes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.nii"
        path.write_bytes(changed(nifti(), changes, 352))
        try:
            volume = read_nifti(path)
            turn = Turn(volume.affine)
            check_plane(path, turn, turn.to_slices(volume.voxels).shape)
            check_hu(path, turn.to_slices(volume.voxels))
        except BadInputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert volume.voxels.ndim == 3 and np.isfinite(volume.voxels).all()
            assert np.isfinite(volume.affine).all() and 0 < turn.voxel_mm3 < np.inf
            mask = turn.from_slices((turn.to_slices(volume.voxels) > 0).astype(np.uint8))
            again = nib.Nifti1Image.from_bytes(gzip.decompress(nifti_bytes(mask, volume.header)))
            assert np.array_equal(again.dataobj, mask)


with tempfile.TemporaryDirectory() as scratch:
    SERIES = {
        path.name: path.read_bytes()
        for path in write_series(Path(scratch) / "s", np.random.default_rng(1).normal(-600, 300, (3, 8, 9))).iterdir()
    }


def test_dicom_headers():
    within(LONGEST, BYTES, check_dicom_headers)


@FUZZ
@given(CHANGES, st.integers(0, 2), st.integers(0, 3))
def check_dicom_headers(changes, which, cut):
    with tempfile.TemporaryDirectory() as folder:
        for k, (name, data) in enumerate(sorted(SERIES.items())):
            if k == which:
                data = changed(data, changes, len(data))
                data = data[: len(data) - cut * 40]
            (Path(folder) / name).write_bytes(data)
        list_series(folder)
        try:
            volume = read_series(folder)
        except BadInputError as error:
            assert folder in str(error) and "\n" not in str(error)
        else:
            assert volume.voxels.shape[2] in (2, 3) and np.isfinite(volume.affine).all()
            if volume.voxels.shape[2] == 2:  # a file that says it is a localizer, or no image, is no slice
                assert any(not_a_slice(path) for path in Path(folder).iterdir())


def not_a_slice(path: Path) -> bool:
    header = pydicom.dcmread(path, force=True)
    return "LOCALIZER" in str(header.get("ImageType", "")) or "PixelData" not in header
