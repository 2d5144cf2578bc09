"""DICOM series to volumes."""

from __future__ import annotations

import shutil

import numpy as np
import pydicom
import pytest
from dicom_series import write_series

from scoat_fast import BadInputError
from scoat_fast.cli import EXIT_FAILED_CASES, main
from scoat_fast.imaging.dicom import list_series, read_series, sorted_headers
from scoat_fast.imaging.volume import Turn
from scoat_fast.segmentation.cases import find_cases


@pytest.fixture
def slices(phantom):
    return np.ascontiguousarray(phantom.transpose(2, 1, 0)).astype(float)


def test_slices_are_sorted_by_place_and_scaled_each_by_its_own(slices, tmp_path):
    slopes = [(1, -1024), (2, -1000), (1, 0), (0.5, -3000), (1, 100), (1, -8192)]
    volume = read_series(write_series(tmp_path / "s", slices, slopes=slopes))
    turn = Turn(volume.affine)
    np.testing.assert_allclose(turn.to_slices(volume.voxels), slices, atol=1)
    np.testing.assert_allclose(turn.spacing, (2.5, 0.8, 0.9))
    assert volume.warnings == []
    # the first voxel of the first slice, in right-anterior-superior mm
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], [30, 20, 100, 1])
    np.testing.assert_allclose(volume.affine @ [1, 2, 1, 1], [30 - 0.9, 20 - 1.6, 102.5, 1])
    np.testing.assert_allclose(volume.header.get_best_affine(), volume.affine, atol=1e-5)
    assert volume.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]], ids=["coronal", "sagittal"])
def test_other_planes_are_turned(slices, tmp_path, orientation):
    """The same anatomy, acquired in another plane, gives the same slices."""
    along_row, along_column = np.array(orientation, float).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    # LPS indices of the phantom [k, j, i] -> slices of the other plane
    axes = [int(np.abs(v).argmax()) for v in (normal, along_column, along_row)]
    lps = slices.transpose(2, 1, 0)  # left, posterior, superior
    turned = lps.transpose(axes)
    for axis, vector in enumerate((normal, along_column, along_row)):
        if vector.sum() < 0:
            turned = np.flip(turned, axis)

    def place(k, slice):
        slice.ImageOrientationPatient = orientation
        slice.ImagePositionPatient = list(normal * k * 2.0)
        slice.PixelSpacing = [0.5, 0.7]

    volume = read_series(write_series(tmp_path / "s", np.ascontiguousarray(turned), change=place))
    np.testing.assert_allclose(Turn(volume.affine).to_slices(volume.voxels), slices, atol=1)


def test_a_single_slice(slices, tmp_path):
    def thick(k, slice):
        slice.SliceThickness = 3

    volume = read_series(write_series(tmp_path / "s", slices[:1], change=thick))
    assert Turn(volume.affine).spacing == pytest.approx((3, 0.8, 0.9))
    volume = read_series(write_series(tmp_path / "t", slices[:1]))
    assert "assume 1 mm" in volume.warnings[0]


def test_uneven_gaps_and_tilt_are_warned_about(slices, tmp_path):
    def gap(k, slice):
        slice.ImagePositionPatient = [0, 0, k * 2.5 + (k > 3) * 2.5]

    def tilt(k, slice):
        slice.ImagePositionPatient = [0, k * 1.0, k * 2.5]

    assert "uneven gaps" in read_series(write_series(tmp_path / "g", slices, change=gap)).warnings[0]
    assert "tilted by 21.8 degrees" in read_series(write_series(tmp_path / "t", slices, change=tilt)).warnings[0]


def test_localizers_and_other_files_are_passed_over(slices, tmp_path):
    folder = write_series(tmp_path / "s", slices)

    def scout(k, slice):
        slice.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    write_series(tmp_path / "scout", slices[:1], change=scout)
    (tmp_path / "scout" / "IM0000").rename(folder / "scout.dcm")
    (folder / "readme.txt").write_text("hello")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    assert read_series(folder).voxels.shape == (40, 36, 6)


def spoil(**values):
    """Changes slice 2 of a series; None takes a value away."""

    def change(k, slice):
        for name, value in values.items():
            if k == 2 and value is None:
                delattr(slice, name)
            elif k == 2:
                setattr(slice, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil(Modality="MR"), "a CT is wanted, got modality MR"),
        (spoil(RescaleSlope=0), "slope 0"),
        (spoil(RescaleIntercept=float("inf")), "slope 1.0 and intercept inf"),
        (spoil(PixelSpacing=[0.8, 1.9]), "PixelSpacing differs"),
        (spoil(PixelSpacing=None), "PixelSpacing is missing"),
        (spoil(ImagePositionPatient=None), "ImagePositionPatient is missing"),
        (spoil(ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), "ImageOrientationPatient differs"),
        (spoil(Rows=18, Columns=80), "Rows differs"),
        (spoil(ImagePositionPatient=[-30, -20, 100]), "lie in the same place"),
        (spoil(PhotometricInterpretation="RGB"), "MONOCHROME2"),
        (spoil(NumberOfFrames=3), "several frames"),
        (spoil(SeriesInstanceUID="1.2.3"), "one series is wanted, got 2"),
        (spoil(PixelData=b"\0\0"), "cannot be decoded"),
        (lambda k, slice: setattr(slice, "PixelSpacing", [0, 1]), "not positive"),
        (lambda k, slice: setattr(slice, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), "two perpendicular"),
        (lambda k, slice: setattr(slice, "ImageOrientationPatient", [2, 0, 0, 0, 2, 0]), "two perpendicular"),
        (spoil(RescaleIntercept=""), "slope 1.0 and intercept None cannot be used"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_series_that_are_no_volume_are_refused(slices, tmp_path, change, reason):
    with pytest.raises(BadInputError, match=reason):
        read_series(write_series(tmp_path / "s", slices, change=change))


def test_a_damaged_file_is_not_passed_over(slices, tmp_path):
    """Leaving out a slice would be a quiet gap in the volume."""
    folder = write_series(tmp_path / "s", slices)
    (folder / "IM0003").rename(folder / "IM0003.dcm")
    (folder / "IM0003.dcm").write_bytes(b"junk" * 100)
    with pytest.raises(BadInputError, match=r"IM0003\.dcm: not a DICOM file"):
        read_series(folder)
    (folder / "IM0003.dcm").unlink()
    truncated = (folder / "IM0004").read_bytes()
    (folder / "IM0004").write_bytes(truncated[: len(truncated) // 2])
    with pytest.raises(BadInputError, match="IM0004"):
        read_series(folder)


def test_no_cut_loses_a_slice_quietly(slices, tmp_path):
    """Wherever a file is cut off, the series is refused."""
    folder = write_series(tmp_path / "s", slices)
    whole = (folder / "IM0002").read_bytes()
    for length in range(140, 1100, 13):
        (folder / "IM0002").write_bytes(whole[:length])
        with pytest.raises(BadInputError, match="IM0002"):
            read_series(folder)


def test_reports_beside_the_slices_are_passed_over(slices, tmp_path):
    def report(k, slice):
        slice.SOPClassUID = slice.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.22"
        del slice.PixelData

    folder = write_series(tmp_path / "s", slices)
    (write_series(tmp_path / "sr", slices[:1], change=report) / "IM0000").rename(folder / "report")
    assert read_series(folder).voxels.shape == (40, 36, 6)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="no DICOM file with an image"):
        read_series(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: bytes(len(data)), lambda data: data[:100]])
@pytest.mark.parametrize("which", [0, -1])
def test_a_damaged_slice_without_a_suffix_is_not_passed_over(slices, tmp_path, damage, which):
    files = sorted(write_series(tmp_path / "s", slices).iterdir())
    files[which].write_bytes(damage(files[which].read_bytes()))
    with pytest.raises(BadInputError, match=f"{files[which].name}: damaged"):
        read_series(tmp_path / "s")


def test_other_files_beside_slices_are_no_slices(slices, tmp_path):
    folder = write_series(tmp_path / "s", slices)
    for name, data in (
        ("README", b"about this"), ("notes", b"text"), ("DICOMDIR", b"\0" * 200), (".DS_Store", b"\0\1"),
        ("Thumbs.db", b"\0\1"), ("a.txt", b"\0"), ("dicomdir", b"\0" * 128 + b"DICM"),
    ):  # fmt: skip
        (folder / name).write_bytes(data)
    assert read_series(folder).voxels.shape[2] == len(slices)


@pytest.mark.parametrize("suffix", ["", ".dcm"])
@pytest.mark.parametrize("name", ["scan", ".scan"])
def test_hidden_files_beside_slices_are_no_slices(slices, tmp_path, suffix, name):
    """macOS keeps what its disks cannot hold of a file in a second one, beside it and under its suffix."""
    folder = write_series(tmp_path / name, slices)
    files = [path.rename(f"{path}{suffix}") for path in sorted(folder.iterdir())]
    expected, listed = read_series(folder), list_series(folder)
    for path in files:
        (folder / f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4072))
    shutil.copy(files[0], folder / f".{files[0].name}")
    (folder / f".gone{suffix}").symlink_to(tmp_path / "nowhere")
    for uid in (None, listed[0].uid):
        np.testing.assert_array_equal(read_series(folder, uid).voxels, expected.voxels)
        assert len(sorted_headers(folder, uid)[0]) == len(slices)
    assert list_series(folder) == listed and len(listed) == 1
    (case,), errors = find_cases([folder], tmp_path / "out")
    assert not errors and (case.path, case.series) == (folder, None)


def test_slices_without_a_preamble(slices, tmp_path):
    folder = write_series(tmp_path / "s", slices)
    expected = read_series(folder).voxels
    files = sorted(folder.iterdir())
    for path in files:
        slice = pydicom.dcmread(path)
        bare = pydicom.Dataset()
        bare.update(slice)
        bare.save_as(path, implicit_vr=path.name != files[0].name, little_endian=True, enforce_file_format=False)
        assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(read_series(folder).voxels, expected)


def test_stored_values_without_an_intercept_are_not_taken_for_hu(phantom, weights, tmp_path):
    def forget(k, slice):
        pixels = slice.pixel_array.copy()
        pixels[:3, :3] = -2000  # padding
        slice.PixelData = pixels.tobytes()
        del slice.RescaleSlope, slice.RescaleIntercept

    folder = write_series(tmp_path / "s", phantom.transpose(2, 1, 0).astype(float), change=forget)
    assert main(["segment", str(folder), "-o", str(tmp_path / "out"), "--weights", str(weights)]) == EXIT_FAILED_CASES


@pytest.mark.parametrize("suffix", [".dicom", ".dcm", ".0001"])
def test_a_damaged_slice_of_any_suffix_is_not_passed_over(slices, tmp_path, suffix):
    files = [path.rename(f"{path}{suffix}") for path in sorted(write_series(tmp_path / "s", slices).iterdir())]
    assert read_series(tmp_path / "s").voxels.shape[2] == len(slices)
    files[0].write_bytes(bytes(1000))
    with pytest.raises(BadInputError, match=rf"{files[0].name}: .*damaged"):
        read_series(tmp_path / "s")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"\x28\0\x10\0US", b"\x28\0\x10\0XX"),  # Rows
        (b"\x28\0\x10\0US", b"\x28\0\x10\0LO"),
        (b"\x28\0\x30\0DS", b"\x28\0\x30\0\x80\1"),  # PixelSpacing
        (b"\x28\0\x08\0IS", b"\x28\0\x08\0SH"),  # NumberOfFrames
        (b"\x08\0\x16\0UI", b"\x08\0\x16\0SQ"),  # SOPClassUID
    ],
)
def test_damaged_values_are_an_error_of_their_file(slices, tmp_path, before, after):
    def change(k, slice):
        slice.NumberOfFrames = "1"

    path = sorted(write_series(tmp_path / "s", slices, change=change).iterdir())[0]
    data = path.read_bytes()
    assert before in data
    path.write_bytes(data.replace(before, after).replace(b"\x28\0\x08\0SH\x02\x001 ", b"\x28\0\x08\0SH\x02\0ab"))
    with pytest.raises(BadInputError, match=path.name):
        read_series(tmp_path / "s")


def test_slices_of_which_some_lack_their_intercept_are_refused(slices, tmp_path):
    def forget(k, slice):
        if k == 2:
            del slice.RescaleIntercept

    with pytest.raises(BadInputError, match="some slices have a RescaleIntercept and some none"):
        read_series(write_series(tmp_path / "s", slices, change=forget))


@pytest.mark.parametrize("name", ["IM9999", "last.dcm"])
def test_a_link_to_a_slice_that_is_gone_is_not_passed_over(slices, tmp_path, name):
    folder = write_series(tmp_path / "s", slices)
    (folder / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInputError, match=f"{name}: cannot be read"):
        read_series(folder)
