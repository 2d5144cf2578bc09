"""What a hospital's disk holds: folders with several series, Enhanced CT, compressed pixels, zip archives."""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import stat
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from conftest import ASYMMETRIC
from dicom_series import write_series
from limits import BYTES, SECONDS, within
from nibabel.orientations import apply_orientation, inv_ornt_aff
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless
from test_imaging import ORIENTATIONS
from test_segment import rows_of, run

from scoat_fast import BadInputError
from scoat_fast.cli import EXIT_FAILED_CASES, EXIT_OK
from scoat_fast.imaging import archive, dicom
from scoat_fast.imaging.dicom import list_series, read_series
from scoat_fast.imaging.itk import read_itk
from scoat_fast.imaging.nifti import read_nifti
from scoat_fast.segmentation.cases import HEAD, Case, find_cases, read_volume


@pytest.fixture
def slices(phantom):
    return np.ascontiguousarray(phantom.transpose(2, 1, 0)).astype(float)


def study(folder: Path, slices: np.ndarray, **modalities: tuple[int, str]) -> Path:
    """One folder with a series for each name: its number and modality. Those of one look differ by a shift."""
    for k, (name, (number, modality)) in enumerate(modalities.items()):

        def change(_, slice, number=number, modality=modality):
            slice.SeriesNumber, slice.Modality = number, modality

        made = write_series(folder / name, slices + k, change=change)
        for path in sorted(made.iterdir()):
            shutil.move(path, folder / f"{name}_{path.name}.dcm")
        made.rmdir()
    return folder


# Several series


def test_every_ct_series_of_a_folder_is_a_case(slices, weights, tmp_path):
    folder = study(tmp_path / "scan", slices, a=(4, "CT"), b=(2, "CT"), c=(7, "MR"), d=(8, "SR"))
    assert [series.number for series in list_series(folder)] == [2, 4, 7, 8]
    out = tmp_path / "out"
    assert run("segment", folder, "-o", out, "--weights", weights, "--quiet") == EXIT_OK
    assert [row["case"] for row in rows_of(out)] == ["scan_2", "scan_4"]
    cases, errors = find_cases([folder], out)
    assert not errors
    for case, shift in zip(cases, (1, 0), strict=True):
        voxels = read_volume(case).voxels.transpose(2, 1, 0)
        np.testing.assert_allclose(voxels, slices + shift, atol=1)


def test_series_are_picked_by_number_or_uid(slices, tmp_path):
    folder = study(tmp_path / "scan", slices, a=(4, "CT"), b=(2, "CT"))
    uids = {series.number: series.uid for series in list_series(folder)}
    for wanted, expected in ((["4"], ["scan"]), ([uids[2]], ["scan"]), (["2", "4"], ["scan_2", "scan_4"])):
        cases, errors = find_cases([folder], tmp_path / "out", wanted)
        assert [case.name for case in cases] == expected and not errors
    assert find_cases([folder], tmp_path / "out", ["4"])[0][0].series == uids[4]
    cases, errors = find_cases([folder], tmp_path / "out", ["9"])
    assert not cases and "no such series in it" in errors[0].reason


def test_series_without_numbers_are_counted(slices, tmp_path):
    folder = study(tmp_path / "scan", slices, a=(3, "CT"), b=(3, "CT"))
    assert [case.name for case in find_cases([folder], tmp_path)[0]] == ["scan_1", "scan_2"]
    with pytest.raises(BadInputError, match="one series is wanted, got 2"):
        read_series(folder)


def test_one_series_beside_others_keeps_the_folders_name(slices, tmp_path):
    folder = study(tmp_path / "scan", slices, a=(3, "CT"), b=(5, "PT"))
    (case,) = find_cases([folder], tmp_path)[0]
    assert case.name == "scan"
    np.testing.assert_allclose(read_volume(case).voxels.transpose(2, 1, 0), slices, atol=1)
    only = study(tmp_path / "other", slices, a=(3, "MR"))
    with pytest.raises(BadInputError, match="modality MR"):
        read_volume(find_cases([only], tmp_path)[0][0])


# Enhanced CT


def enhanced(folder: Path, slices: np.ndarray, slopes: list[tuple[float, float]], change=lambda image: None) -> Path:
    """All slices in one file, in an order that tells nothing."""
    source = write_series(folder / "single", slices, slopes=slopes)
    files = sorted((pydicom.dcmread(path) for path in source.iterdir()), key=lambda file: file.InstanceNumber)
    shutil.rmtree(source)
    image = files[0]
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"

    def part(**values) -> list[Dataset]:
        item = Dataset()
        for name, value in values.items():
            setattr(item, name, value)
        return [item]

    groups = []
    for file in files:
        groups += part(
            PlanePositionSequence=part(ImagePositionPatient=file.ImagePositionPatient),
            PixelValueTransformationSequence=part(
                RescaleSlope=file.RescaleSlope, RescaleIntercept=file.RescaleIntercept
            ),
        )
    image.SharedFunctionalGroupsSequence = part(
        PixelMeasuresSequence=part(PixelSpacing=image.PixelSpacing, SliceThickness=2.5),
        PlaneOrientationSequence=part(ImageOrientationPatient=image.ImageOrientationPatient),
    )
    image.PerFrameFunctionalGroupsSequence = groups
    image.NumberOfFrames, image.PixelData = len(files), b"".join(file.PixelData for file in files)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(image, name)
    change(image)
    folder.mkdir(exist_ok=True)
    image.save_as(folder / "enhanced.dcm", enforce_file_format=True)
    return folder


def test_frames_are_slices(slices, weights, tmp_path):
    slopes = [(1, -1024), (2, -1000), (1, 0), (0.5, -3000), (1, 100), (1, -8192)]
    volume = read_series(enhanced(tmp_path / "e", slices, slopes))
    expected = read_series(write_series(tmp_path / "s", slices, slopes=slopes))
    np.testing.assert_array_equal(volume.voxels, expected.voxels)
    np.testing.assert_allclose(volume.affine, expected.affine)
    assert run("segment", tmp_path / "e", "-o", tmp_path / "out", "--weights", weights, "--quiet") == EXIT_OK


def with_scout(image) -> None:
    """Adds a frame that is a localizer, and so no slice."""
    scout = copy.deepcopy(image.PerFrameFunctionalGroupsSequence[0])
    kind, plane = Dataset(), Dataset()
    kind.FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    plane.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    scout.CTImageFrameTypeSequence, scout.PlaneOrientationSequence = [kind], [plane]
    image.PerFrameFunctionalGroupsSequence.insert(1, scout)
    size = len(image.PixelData) // image.NumberOfFrames
    image.PixelData = image.PixelData[:size] + bytes(size) + image.PixelData[size:]
    image.NumberOfFrames += 1


def test_a_file_with_all_slices_is_a_case_and_has_a_segmentation(slices, weights, tmp_path):
    """Also where its frames are out of order, lie beside a localizer, and lack what they need not have."""

    def change(image):
        with_scout(image)
        measures = image.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
        del image.SharedFunctionalGroupsSequence
        for frame in image.PerFrameFunctionalGroupsSequence:
            frame.PixelMeasuresSequence = measures
            if "PlaneOrientationSequence" not in frame:
                frame.PlaneOrientationSequence = [Dataset()]
                frame.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]

    folder = enhanced(tmp_path / "e", slices, [(1, -1024)] * 6, change)
    expected = read_series(write_series(tmp_path / "s", slices))
    np.testing.assert_array_equal(read_series(folder).voxels, expected.voxels)
    out, options = tmp_path / "out", ("--weights", weights, "--threshold", 0.2, "--dicom-seg", "--quiet")
    assert run("segment", folder / "enhanced.dcm", folder, "-o", out, *options) == EXIT_OK
    mask = nib.load(out / "enhanced_mask.nii.gz")
    indices = np.argwhere(np.asarray(mask.dataobj))
    assert 0 < len(indices) < np.prod(mask.shape)
    for name in ("enhanced", "e"):
        seg = pydicom.dcmread(out / f"{name}_seg.dcm")
        assert seg.NumberOfFrames == 6 and seg.PatientName == "Doe^Jane"
        assert places_in_seg(seg) == {tuple(np.array(p) + 0.0) for p in millimetres(indices, mask.affine)}
        sources = [
            frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
            for frame in seg.PerFrameFunctionalGroupsSequence
        ]
        assert sorted(sources) == [1, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("change", "reason"), [
    (lambda image: setattr(image, "NumberOfFrames", 5), "5 frames are wanted, as it declares, got groups for 6"),
    (lambda image: image.PerFrameFunctionalGroupsSequence[2].__delattr__("PlanePositionSequence"),
     "ImagePositionPatient is missing"),
    (lambda image: image.SharedFunctionalGroupsSequence[0].__delattr__("PixelMeasuresSequence"),
     "PixelSpacing is missing"),
    (lambda image: image.__delattr__("PerFrameFunctionalGroupsSequence"), "holds several frames"),
    (lambda image: setattr(image, "PixelData", image.PixelData[:-9]), "cannot be decoded"),
], ids=["count", "place", "spacing", "groups", "cut"])  # fmt: skip
def test_frames_that_lack_something_are_refused(slices, tmp_path, change, reason):
    with pytest.raises(BadInputError, match=reason):
        read_series(enhanced(tmp_path / "e", slices, [(1, -1024)] * 6, change))


# Compressed pixels


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless, DeflatedExplicitVRLittleEndian], ids=lambda uid: uid.name
)
def test_compressed_slices(slices, tmp_path, syntax):
    def compress(k, slice):
        slice.PixelRepresentation = 0
        slice.PixelData = (slices[k] + 1024).round().astype("<u2").tobytes()
        slice.BitsStored, slice.HighBit = 12, 11
        if syntax == DeflatedExplicitVRLittleEndian:
            slice.file_meta.TransferSyntaxUID = syntax
        else:
            slice.compress(syntax, generate_instance_uid=False)

    packed = read_series(write_series(tmp_path / "packed", slices, change=compress))
    np.testing.assert_array_equal(packed.voxels, read_series(write_series(tmp_path / "plain", slices)).voxels)


def packed_part(path: Path) -> bytes:
    """The deflated data set of a file, with what follows it."""
    length = pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength
    return path.read_bytes()[128 + 4 + 12 + length :]  # what lies before the length, and its element


def test_deflated_slices_of_odd_lengths_end_with_a_pad_byte(tmp_path):
    hu = np.random.default_rng(0).integers(-1000, 400, (12, 200, 210)).astype(float)
    hu[:, 100:] = -1000  # half of it packs well

    def deflate(k, slice):
        slice.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        # with the random identifiers of every other test, all packed lengths would be odd, or even, once in a while
        slice.StudyInstanceUID = slice.SeriesInstanceUID = slice.FrameOfReferenceUID = "1.2.3"
        slice.SOPInstanceUID = slice.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k}"

    folder = write_series(tmp_path / "packed", hu, change=deflate)
    pads = set()
    for path in folder.iterdir():
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        assert len(stream.decompress(packed_part(path))) > dicom.CHUNK
        pads.add(stream.unused_data)
    assert pads == {b"", b"\0"}
    plain = read_series(write_series(tmp_path / "plain", hu)).voxels
    assert within(SECONDS, BYTES, lambda: np.array_equal(read_series(folder).voxels, plain))
    assert within(SECONDS, BYTES, lambda: len(list_series(folder))) == 1


@pytest.mark.parametrize("tail", [b"", b"\0", b"\0\0", bytes(100_000), b"garbage" * 30])
@pytest.mark.parametrize("content", [b"", b"short", bytes(3 * dicom.CHUNK), bytes(range(256)) * 900])
def test_deflated_bytes_are_looked_at_up_to_their_end(tail, content, monkeypatch):
    """Wherever the end lies between chunks, and whether it is there."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = packer.compress(content) + packer.flush()

    def look():
        for chunk in (7, len(packed) - 1, len(packed), len(packed) + 1, dicom.CHUNK):
            monkeypatch.setattr(dicom, "CHUNK", max(chunk, 1))
            dicom._check_inflated("a", packed + tail)
        for length in range(0, len(packed), max(len(packed) // 9, 1)):
            dicom._check_inflated("a", packed[:length])
        monkeypatch.setattr(dicom, "SMALL", len(content) - 1)
        monkeypatch.setattr(dicom, "RATIO", 0)
        with pytest.raises(BadInputError, match="no scan packs so") if content else contextlib.nullcontext():
            dicom._check_inflated("a", packed + tail)

    within(SECONDS, BYTES, look)


# Archives


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as target:
        for name, data in files.items():
            target.writestr(name, data)
    return path


def test_a_scan_in_an_archive(ct, slices, weights, tmp_path):
    series = write_series(tmp_path / "series", slices)
    files = {f"Pati\u00ebnt/../x/{path.name}".replace("../", ""): path.read_bytes() for path in series.iterdir()}
    files |= {"README.txt": b"hello", "__MACOSX/._IM0001": b"\0\1", "empty/": b""}
    slice = next(series.iterdir()).read_bytes()
    files |= {next(iter(files)).replace("IM", ".IM"): slice, ".trash/IM0001": slice, "IM0001.dcm/.hidden": b""}
    dicom = zipped(tmp_path / "dicom.zip", files)
    nifti = zipped(tmp_path / "nifti.ZIP", {"deep/er/CT scan.nii.gz": ct.read_bytes()})
    expected = read_series(series)
    found = read_volume(Case("dicom", "zip", dicom))
    np.testing.assert_array_equal(found.voxels, expected.voxels)
    np.testing.assert_array_equal(found.affine, expected.affine)
    assert run("segment", dicom, nifti, "-o", tmp_path / "out", "--weights", weights, "--quiet") == EXIT_OK
    assert [row["case"] for row in rows_of(tmp_path / "out")] == ["dicom", "nifti"]
    assert nib.load(tmp_path / "out" / "nifti_mask.nii.gz").shape == (40, 36, 6)
    assert (nib.load(tmp_path / "out" / "nifti_mask.nii.gz").affine == nib.load(ct).affine).all()


def zipped_folder(path: Path, folder: Path, extra: dict[str, bytes] | None = None) -> Path:
    files = {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    return zipped(path, files | (extra or {}))


@pytest.mark.parametrize("late", [False, True], ids=["short headers", "a header longer than what is looked at"])
def test_several_scans_in_an_archive(ct, slices, weights, tmp_path, late):
    """Three series, two of them in one folder, and a NIfTI file: each is read as if it lay there by itself."""

    def numbered(number: int):
        def change(k, header):
            header.SeriesNumber = number
            if late:
                header.add_new(0x00090010, "LO", "SOMEBODY")
                header.add_new(0x00091001, "OB", bytes(2 * HEAD))

        return change

    scans, out = tmp_path / "scans", tmp_path / "out"
    write_series(scans / "a", slices, change=numbered(3))
    for file in write_series(scans / "more", slices[::-1], change=numbered(5)).iterdir():
        file.rename(scans / "a" / f"more_{file.name}")
    (scans / "more").rmdir()
    write_series(scans / "b", slices[1:], change=numbered(3))
    path = zipped_folder(tmp_path / "study.zip", scans, {"c/ct.nii.gz": ct.read_bytes()})
    found, errors = find_cases([path], out)
    assert not errors and [case.name for case in found] == [f"study_{k}" for k in (1, 2, 3, 4)]
    voxels = [read_volume(case).voxels for case in found]
    np.testing.assert_array_equal(voxels[0], voxels[1][:, :, ::-1])
    np.testing.assert_array_equal(voxels[2], voxels[0][:, :, 1:])
    assert voxels[3].shape == nib.load(ct).shape
    assert run("segment", path, "-o", out, "--weights", weights) == EXIT_OK
    assert [row["case"] for row in rows_of(out)] == [case.name for case in found]
    picked, _ = find_cases([path], out, ["5"])
    np.testing.assert_array_equal(read_volume(picked[0]).voxels, voxels[1])
    assert len(picked) == 2 and picked[1].series.endswith(".nii.gz")  # --series is about DICOM


def test_listing_opens_each_slice_twice(slices, tmp_path, monkeypatch):
    """To tell that it is one, and of which series."""
    folder, opened, open_path = write_series(tmp_path / "series", slices), [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *rest: opened.append(path.name) or open_path(path, *rest))
    assert len(find_cases([folder], tmp_path / "out")[0]) == 1
    assert sorted(opened) == sorted(2 * [file.name for file in folder.iterdir()])


def test_nothing_is_unpacked_that_a_scan_does_not_need(ct, slices, tmp_path, monkeypatch):
    """Nine scans, of which six are series in one folder, with a file that may belong to any of them."""
    scans = tmp_path / "scans"
    for number in range(6):
        for file in write_series(tmp_path / str(number), slices).iterdir():
            scans.mkdir(exist_ok=True)
            file.rename(scans / f"{number}_{file.name}")
    others = {f"{k}/ct.nii.gz": ct.read_bytes() for k in range(3)}
    path = zipped_folder(tmp_path / "study.zip", scans, others | {"note.txt": b"none"})
    found, errors = find_cases([path], tmp_path / "out")
    assert not errors and len(found) == 9
    extract, unpacked = archive._extract, []
    monkeypatch.setattr(archive, "_extract", lambda *rest: unpacked.append(rest[2].filename) or extract(*rest))
    for case in found:
        assert read_volume(case).voxels.shape[2] in (len(slices), 6)
    names = sorted(unpacked)
    assert set(names) == {*(file.name for file in scans.iterdir()), *others, "note.txt"}
    assert len(names) == 6 * len(slices) + 3 + 6  # the note once for each series beside it


def test_one_series_is_picked_from_an_archive(slices, tmp_path):
    for number in (3, 4):
        folder = tmp_path / "scans" / str(number)
        write_series(folder, slices[number - 3 :], change=lambda k, slice, n=number: setattr(slice, "SeriesNumber", n))
    path = zipped_folder(tmp_path / "study.zip", tmp_path / "scans")
    (case,), errors = find_cases([path], tmp_path / "out", ["4"])
    assert case.name == "study" and not errors
    assert read_volume(case).voxels.shape[2] == len(slices) - 1
    found, (error,) = find_cases([path], tmp_path / "out", ["7"])
    assert not found and str(error) == f"{path}: no such series in it"


def test_a_picture_beside_scans_in_an_archive_is_not_passed_over(ct, tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.nii.gz": ct.read_bytes(), "b.nii.gz": ct.read_bytes(), "c.png": b"x"})
    (case,), _ = find_cases([path], tmp_path / "out")
    with pytest.raises(BadInputError, match="and nothing else, are wanted in an archive, got nifti, nifti, picture"):
        read_volume(case)


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


def test_archives_that_mean_harm_are_refused(ct, weights, tmp_path, monkeypatch):
    good = ct.read_bytes()
    bad = {
        "names a parent": zipped(tmp_path / "parent.zip", {"../../evil.nii.gz": good}),
        "names a root": zipped(tmp_path / "root.zip", {"/tmp/evil.nii.gz": good}),
        "names a drive": zipped(tmp_path / "drive.zip", {"C:\\evil.nii.gz": good}),
        "is a bomb": zipped(tmp_path / "bomb.zip", {"bomb.nii": bytes(archive.SMALL + 1)}),
        "a scan and a picture": zipped(tmp_path / "two.zip", {"a.nii.gz": good, "b.png": good}),
        "a picture": zipped(tmp_path / "picture.zip", {"a.png": b"x"}),
        "nothing": zipped(tmp_path / "nothing.zip", {"notes.txt": b"hello"}),
        "an archive": zipped(tmp_path / "nested.zip", {"a.zip": (tmp_path / "two.zip").read_bytes()}),
        "packed by lzma": zipped(tmp_path / "lzma.zip", {"a.nii.gz": good}, zipfile.ZIP_LZMA),
        "a cut scan": zipped(tmp_path / "scan.zip", {"a.nii.gz": good[:200]}),
    }
    bad["no archive"] = tmp_path / "text.zip"
    bad["no archive"].write_text("hello")
    bad["cut"] = tmp_path / "cut.zip"
    bad["cut"].write_bytes(bad["a scan and a picture"].read_bytes()[:-40])
    flipped = bytearray(bad["a scan and a picture"].read_bytes())
    flipped[200] ^= 255
    bad["flipped"] = tmp_path / "flipped.zip"
    bad["flipped"].write_bytes(flipped)
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as target:
        target.writestr(link("a.nii.gz"), "/etc/passwd")
    bad["a link"] = tmp_path / "link.zip"
    monkeypatch.setattr(archive, "MEMBERS", 30)
    bad["crowded"] = zipped(tmp_path / "crowded.zip", {f"{k}.dcm": b"" for k in range(31)})
    before = {path.name for path in tmp_path.iterdir()}
    out = tmp_path / "out"
    assert run("segment", *bad.values(), ct, "-o", out, "--weights", weights) == EXIT_FAILED_CASES
    rows = {row["case"]: row for row in rows_of(out)}
    assert [name for name, row in rows.items() if row["status"] == "ok"] == ["ct"]
    for name, reason in {
        "parent": "leads out of it", "root": "leads out of it", "drive": "leads out of it", "bomb": "packs so well",
        "two": "got nifti, picture", "picture": "got picture", "nothing": "got none", "nested": "got none",
        "scan": "truncated or damaged", "text": "a damaged archive", "cut": "a damaged archive", "link": "holds a link",
        "crowded": "at most 30 files", "flipped": "damaged", "lzma": "stored or deflated",
    }.items():  # fmt: skip
        assert reason in rows[name]["error"], (name, rows[name]["error"])
    assert {path.name for path in tmp_path.iterdir()} - before == {"out"}


def test_more_than_an_entry_declares_is_not_written(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", {"a.nii": bytes(5000)})
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: io.BytesIO(bytes(6000)))
    (tmp_path / "to").mkdir()
    with pytest.raises(BadInputError, match="holds more than it declares"):
        archive.unpack(path, tmp_path / "to")


# DICOM SEG


def millimetres(indices: np.ndarray, affine: np.ndarray) -> set[tuple]:
    """Where voxels [N, 3] lie, right-anterior-superior."""
    return {tuple(point) for point in (indices @ affine[:3, :3].T + affine[:3, 3]).round(2)}


def places_in_seg(seg: pydicom.Dataset) -> set[tuple]:
    """Where the marked pixels of a segmentation lie, frame by frame, by what it says of each."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    measures, orientation = shared.PixelMeasuresSequence[0], shared.PlaneOrientationSequence[0].ImageOrientationPatient
    along_row, along_column = np.array(orientation, float).reshape(2, 3)
    between_rows, between_columns = map(float, measures.PixelSpacing)
    found = set()
    for frame, group in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        start = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in np.argwhere(frame):
            lps = start + row * between_rows * along_column + column * between_columns * along_row
            found.add(tuple((lps * [-1, -1, 1]).round(2) + 0.0))
    return found


@pytest.mark.parametrize("orientation", [
    [1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], [0, 1, 0, 1, 0, 0], [0, -1, 0, 1, 0, 0], [1, 0, 0, 0, 0, -1],
    [-1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1], [0, -1, 0, 0, 0, -1], [1, 0, 0, 0, 0.96, 0.28],
])  # fmt: skip
def test_a_segmentation_lies_where_its_mask_lies(slices, weights, tmp_path, orientation):
    normal = np.cross(*np.array(orientation, float).reshape(2, 3))

    def place(k, slice):
        slice.ImageOrientationPatient = orientation
        slice.ImagePositionPatient = list(np.array([-30.0, -20, 100]) + normal * k * 2.5)
        slice.PatientName = "Doe^Jane"

    folder, out = write_series(tmp_path / "scan", slices, change=place), tmp_path / "out"
    options = ("--weights", weights, "--threshold", 0.2, "--dicom-seg", "--quiet")
    assert run("segment", folder, "-o", out, *options) == EXIT_OK
    seg = pydicom.dcmread(out / "scan_seg.dcm")
    assert seg.Modality == "SEG" and seg.PatientName == "Doe^Jane" and seg.NumberOfFrames == 6
    source = pydicom.dcmread(next(folder.iterdir()))
    assert seg.StudyInstanceUID == source.StudyInstanceUID != seg.SeriesInstanceUID
    assert seg.FrameOfReferenceUID == source.FrameOfReferenceUID
    mask = nib.load(out / "scan_mask.nii.gz")
    indices = np.argwhere(np.asarray(mask.dataobj))
    assert 0 < len(indices) < np.prod(mask.shape)
    expected = {tuple(np.array(point) + 0.0) for point in millimetres(indices, mask.affine)}
    assert places_in_seg(seg) == expected
    before = (out / "scan_seg.dcm").read_bytes()
    assert run("segment", folder, "-o", out, *options, "--redo") == EXIT_OK
    assert (out / "scan_seg.dcm").read_bytes() == before


def test_segmentations_of_slices_that_agree_within_the_tolerance_name_nobody(slices, weights, tmp_path, capfd):
    def shake(k, slice):
        slice.ImageOrientationPatient = [1, 0, 1e-5 * k, 0, 1, 0]
        slice.PixelSpacing = [0.8 + 1e-5 * k, 0.9]
        slice.PatientName = "Doe Jane Doe"  # highdicom finds that odd

    folder, out = write_series(tmp_path / "scan", slices, change=shake), tmp_path / "out"
    assert run("segment", folder, "-o", out, "--weights", weights, "--dicom-seg") == EXIT_OK
    assert (out / "scan_seg.dcm").exists()
    assert "Doe" not in "".join(capfd.readouterr())


LACKS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
)


@pytest.mark.parametrize("lacks", LACKS)
def test_a_segmentation_of_a_series_that_lacks_something(slices, weights, tmp_path, lacks):
    """What refers to nothing is refused; what the file says elsewhere, or what may stay open, is no hindrance."""

    def forget(k, slice):
        delattr(slice, lacks)

    out = tmp_path / "out"
    code = run("segment", write_series(tmp_path / "scan", slices, change=forget), "-o", out, "--weights", weights,
               "--dicom-seg", "--quiet")  # fmt: skip
    if lacks in ("StudyInstanceUID", "SeriesInstanceUID"):
        assert code == EXIT_FAILED_CASES
        assert f"{lacks} is missing, by which a DICOM SEG would be filed" in rows_of(out)[0]["error"]
    else:
        assert code == EXIT_OK
        seg = pydicom.dcmread(out / "scan_seg.dcm")
        named = {item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
        files = [pydicom.dcmread(path) for path in (tmp_path / "scan").iterdir()]
        assert named == {file.file_meta.MediaStorageSOPInstanceUID for file in files}


def test_a_segmentation_of_the_example(tmp_path):
    folder = Path(__file__).parents[1] / "examples" / "dicom"
    assert run("segment", folder, "-o", tmp_path, "--dicom-seg", "--quiet") == EXIT_OK
    assert pydicom.dcmread(tmp_path / "dicom_seg.dcm").NumberOfFrames == 2


def test_a_series_reads_its_own_files_and_names_the_damaged(slices, tmp_path, monkeypatch):
    folder = study(tmp_path / "scan", slices, a=(4, "CT"), b=(2, "CT"))
    read, real = [], dicom._read
    monkeypatch.setattr(dicom, "_read", lambda path, *rest: read.append(path.name) or real(path, *rest))
    read_series(folder, list_series(folder)[0].uid)
    assert len(read) == 6 and all(name.startswith("b_") for name in read)
    monkeypatch.undo()
    path = next(folder.glob("b_*"))
    path.write_bytes(path.read_bytes()[:300])  # whose slice that was is not known any more
    for series in list_series(folder):
        with pytest.raises(BadInputError, match=path.name):
            read_series(folder, series.uid)


def test_segmentations_without_opacity_or_without_a_series(ct, slices, weights, tmp_path):
    folder, out = write_series(tmp_path / "scan", slices), tmp_path / "out"
    many = enhanced(tmp_path / "many", slices, [(1, -1024)] * 6)
    half = pydicom.dcmread(many / "enhanced.dcm")
    for group in half.PerFrameFunctionalGroupsSequence:
        group.PlanePositionSequence[0].ImagePositionPatient[2] += 15
    half.save_as(many / "upper_half.dcm")
    options = ("--weights", weights, "--threshold", 0.9999, "--dicom-seg", "--quiet")
    assert run("segment", folder, ct, many, "-o", out, *options) == EXIT_FAILED_CASES
    seg = pydicom.dcmread(out / "scan_seg.dcm")
    assert seg.NumberOfFrames == 6 and not seg.pixel_array.any()
    rows = {row["case"]: row for row in rows_of(out)}
    assert "no DICOM SEG: the input is no DICOM series" in rows["ct"]["warnings"]
    assert "names one Enhanced CT file as its source, here are 2" in rows["many"]["error"]
    assert not (out / "ct_seg.dcm").exists()
    assert run("segment", folder, "-o", out, *options[:-2], "--quiet") == EXIT_OK
    assert not (out / "scan_seg.dcm").exists()


# NRRD and MetaImage


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("orientation", ORIENTATIONS[::11], ids=lambda o: "".join(f"{int(a)}{int(s):+d}" for a, s in o))
def test_itk_volumes_lie_where_the_same_nifti_lies(phantom, tmp_path, suffix, orientation):
    voxels = apply_orientation(phantom, orientation)
    affine = ASYMMETRIC @ inv_ornt_aff(orientation, phantom.shape)
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "a.nii")
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path / "a.nii")), str(tmp_path / f"a{suffix}"))
    found, expected = read_itk(tmp_path / f"a{suffix}"), read_nifti(tmp_path / "a.nii")
    np.testing.assert_array_equal(found.voxels, expected.voxels)
    assert found.voxels.dtype == np.int16
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("packed", [True, False])
def test_damaged_itk_volumes_are_refused(phantom, tmp_path, suffix, packed):
    image = SimpleITK.GetImageFromArray(np.random.default_rng(0).integers(-1000, 300, (6, 36, 40)).astype(np.int16))
    path = tmp_path / f"a{suffix}"
    SimpleITK.WriteImage(image, str(path), useCompression=packed)
    np.testing.assert_array_equal(read_itk(path).voxels, SimpleITK.GetArrayFromImage(image).transpose())
    good = path.read_bytes()
    for length in (10, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(BadInputError):
            read_itk(path)
    path.write_bytes(good + bytes(1000))
    if not packed:
        with pytest.raises(BadInputError, match="goes on after the voxels"):
            read_itk(path)
        return
    start = len(good) - len(good) * 3 // 4
    for place in (start, len(good) // 2, len(good) - 200, len(good) - 2):
        damaged = bytearray(good)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(BadInputError, match=r"damaged|truncated"):
            read_itk(path)


@pytest.mark.parametrize(("old", "new", "reason"), [
    (b"type: short", b"type: block", "voxels are wanted that are numbers, got block"),
    (b"dimension: 3", b"dimension: 4", "one 3-D volume is wanted"),
    (b"sizes: 4 5 6", b"sizes: 4 5", "three sizes from 1 up"),
    (b"sizes: 4 5 6", b"sizes: 99999 99999 99999", "declares .* GiB"),
    (b"sizes: 4 5 6", b"sizes: 4 5 7", "truncated"),
    (b"encoding: raw", b"encoding: bzip2", "raw or gzip encoding"),
    (b"endian: little", b"endian: middle", "little or big endian"),
    (b"space directions: (1,0,0)", b"space directions: (nan,0,0)", "space directions is missing or not 9 finite"),
    (b"space directions: (1,0,0)", b"space directions: (0,0,0)", "singular"),
    (b"space: left-posterior-superior", b"space: scanner-xyz", "a space of a patient"),
    (b"NRRD0004", b"NRRX0004", "not an NRRD file"),
])  # fmt: skip
def test_nrrd_headers_that_say_too_little(tmp_path, old, new, reason):
    SimpleITK.WriteImage(SimpleITK.Image(4, 5, 6, SimpleITK.sitkInt16), str(tmp_path / "a.nrrd"), useCompression=False)
    data = (tmp_path / "a.nrrd").read_bytes()
    assert old in data
    (tmp_path / "a.nrrd").write_bytes(data.replace(old, new))
    with pytest.raises(BadInputError, match=reason):
        read_itk(tmp_path / "a.nrrd")


@pytest.mark.parametrize(("old", "new", "reason"), [
    (b"ElementType = MET_SHORT", b"ElementType = MET_STRING", "voxels are wanted that are numbers"),
    (b"NDims = 3", b"NDims = 2", "one 3-D volume is wanted"),
    (b"DimSize = 4 5 6", b"DimSize = 4 5 60000000", "declares .* GiB|truncated"),
    (b"ElementSpacing = 1 1 1", b"ElementSpacing = 1 inf 1", "ElementSpacing is missing or not 3 finite"),
    (b"TransformMatrix = 1 0 0 0 1 0 0 0 1", b"TransformMatrix = 1 0 0 1 0 0 0 0 1", "singular"),
    (b"BinaryData = True", b"BinaryData = False", "BinaryData true is wanted"),
    (b"ObjectType = Image", b"ObjectType = Tube", "ObjectType image is wanted"),
    (b"ElementDataFile = LOCAL", b"ElementDataFile LOCAL", "not a MetaImage file"),
])  # fmt: skip
def test_metaimage_headers_that_say_too_little(tmp_path, old, new, reason):
    SimpleITK.WriteImage(SimpleITK.Image(4, 5, 6, SimpleITK.sitkInt16), str(tmp_path / "a.mha"), useCompression=False)
    data = (tmp_path / "a.mha").read_bytes()
    assert old in data, data[:600]
    (tmp_path / "a.mha").write_bytes(data.replace(old, new))
    with pytest.raises(BadInputError, match=reason):
        read_itk(tmp_path / "a.mha")


def test_itk_volumes_are_segmented(ct, weights, tmp_path):
    (tmp_path / "in").mkdir()
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(ct)), str(tmp_path / "in" / "scan.nrrd"))
    (tmp_path / "in" / "bad.mha").write_text("ObjectType = Image\nNDims = 3\n")
    (tmp_path / "in" / "text.nrrd").write_text("hello")
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(ct)), str(tmp_path / "apart.nhdr"))
    shutil.copy(tmp_path / "apart.nhdr", tmp_path / "in" / "apart.nrrd")
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(ct)), str(tmp_path / "header.mhd"))
    shutil.copy(tmp_path / "header.mhd", tmp_path / "in" / "header.mha")
    SimpleITK.WriteImage(SimpleITK.Image(4, 5, SimpleITK.sitkInt16), str(tmp_path / "in" / "flat.nrrd"))
    out = tmp_path / "out"
    assert run("segment", tmp_path / "in", ct, "-o", out, "--weights", weights, "--quiet") == EXIT_FAILED_CASES
    rows = {row["case"]: row for row in rows_of(out)}
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {"scan", "ct"}
    assert "one 3-D volume is wanted" in rows["flat"]["error"]
    for name in ("apart", "header"):
        assert "its voxels lie in another file" in rows[name]["error"]
    masks = [nib.load(out / f"{name}_mask.nii.gz") for name in ("scan", "ct")]
    assert np.array_equal(masks[0].dataobj, masks[1].dataobj)
    np.testing.assert_allclose(masks[0].affine, masks[1].affine, atol=1e-4)
