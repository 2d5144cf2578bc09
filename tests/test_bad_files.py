"""Files made bad by hand, one fault each: every one is refused in one clear line, in seconds, without much memory."""

from __future__ import annotations

import gc
import gzip
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import ASYMMETRIC
from dicom_series import write_series
from limits import BYTES, SECONDS, within
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from scoat_fast.cli import EXIT_USAGE, main
from scoat_fast.errors import BadInputError
from scoat_fast.segmentation.cases import find_cases
from scoat_fast.segmentation.reading import read_case

CHEST = np.random.default_rng(0).normal(-600, 300, (4, 20, 18)).clip(-1000, 400)
BAD: dict[str, Callable[[Path], Path]] = {}  # makes a bad file below a folder, and gives its path


def nifti(name: str, voxels: np.ndarray | None = None, cut: slice = slice(None), **fields) -> None:
    def make(folder: Path) -> Path:
        image = nib.Nifti1Image((CHEST.T if voxels is None else voxels), ASYMMETRIC)
        image.header.set_data_dtype(np.float32 if voxels is None else voxels.dtype)
        raw = bytearray(image.to_bytes())
        layout = nib.Nifti1Header().structarr.dtype.fields
        for field, value in fields.items():
            kind, offset = layout[field][:2]
            data = np.asarray(value, kind.base).tobytes()
            raw[offset : offset + len(data)] = data
        path = folder / "scan.nii"
        path.write_bytes(bytes(raw)[cut])
        return path

    BAD[f"NIfTI: {name}"] = make


def with_voxel(value: float, dtype=np.float32) -> np.ndarray:
    voxels = CHEST.T.astype(dtype)
    voxels[3, 4, 2] = value
    return voxels


nifti("a NaN voxel", with_voxel(np.nan))
nifti("an infinite voxel", with_voxel(np.inf))
nifti("a voxel beyond float32", with_voxel(1e300, np.float64))
nifti("all voxels equal", np.full((18, 20, 4), -500, np.int16))
nifti("air alone", np.full((18, 20, 4), -1000, np.int16) + np.arange(18, dtype=np.int16)[:, None, None] % 3)
nifti("grey values of a picture", ((CHEST.T + 1000) / 1400 * 255).astype(np.uint8))
nifti("values in 0..1", ((CHEST.T + 1000) / 1400).astype(np.float32))
nifti("stored values without their offset", (CHEST.T + 1024).astype(np.int16))
nifti("a mask", (CHEST.T > -600).astype(np.uint8))
nifti("HU times ten", (CHEST.T * 10).astype(np.int16))
nifti("a size of the header that is no size", sizeof_hdr=1)
nifti("a magic of another format", magic=b"abc")
nifti("no magic", magic=b"")
nifti("zero voxels along an axis", dim=[3, 0, 20, 4, 1, 1, 1, 1])
nifti("more voxels than the file has", dim=[3, 18, 20, 400, 1, 1, 1, 1])
nifti("fewer voxels than the file has", dim=[3, 18, 20, 1, 1, 1, 1, 1])
nifti("seven dimensions", dim=[7, 18, 20, 2, 2, 1, 1, 1])
nifti("terabytes", dim=[3, 32767, 32767, 2000, 1, 1, 1, 1])
nifti("no type", datatype=0)
nifti("bits alone", datatype=1, bitpix=1)
nifti("128 bit floats", datatype=1536, bitpix=128)
nifti("a type and a size that differ", datatype=4, bitpix=8)
nifti("a negative offset", vox_offset=-352)
nifti("an offset behind the end", vox_offset=1e7)
nifti("an infinite offset", vox_offset=np.inf)
nifti("an infinite spacing", sform_code=0, qform_code=0, pixdim=[1, 1, np.inf, 1, 0, 0, 0, 0])
nifti("a tiny spacing", srow_x=[1e-20, 0, 0, 0])
nifti("kilometres between slices", srow_z=[0, 0, 1e6, 0])
nifti("an infinite affine", srow_y=[0, np.inf, 0, 0])
nifti("an affine of zeros", srow_x=[0, 0, 0, 0], srow_y=[0, 0, 0, 0], srow_z=[0, 0, 0, 0])
nifti("a NaN origin", srow_x=[-0.9, 0, 0, np.nan])
nifti("a NaN quaternion", sform_code=0, qform_code=1, quatern_b=np.nan)
nifti("a NaN intercept", scl_slope=1, scl_inter=np.nan)
nifti("a slope that overflows", scl_slope=1e38, scl_inter=0)
nifti("a header cut at its magic", cut=slice(0, 346))
nifti("a header and nothing else", cut=slice(0, 352))
nifti("one byte too few", cut=slice(0, -1))


def raw(kind: str, name: str, file: str, content: bytes) -> None:
    def make(folder: Path) -> Path:
        (folder / file).write_bytes(content)
        return folder / file

    BAD[f"{kind}: {name}"] = make


PACKED = gzip.compress(nib.Nifti1Image(CHEST.T.astype(np.int16), ASYMMETRIC).to_bytes(), mtime=0)
raw("gzip", "the magic alone", "scan.nii.gz", PACKED[:2])
raw("gzip", "its header alone", "scan.nii.gz", PACKED[:10])
raw("gzip", "a wrong checksum", "scan.nii.gz", PACKED[:-8] + bytes(4) + PACKED[-4:])
raw("gzip", "a wrong length", "scan.nii.gz", PACKED[:-4] + bytes(4))
raw("gzip", "a second member", "scan.nii.gz", PACKED + PACKED)
raw("gzip", "packed twice", "scan.nii.gz", gzip.compress(PACKED))
raw("gzip", "an unknown method", "scan.nii.gz", PACKED[:2] + b"\x07" + PACKED[3:])
raw(
    "gzip",
    "a gigabyte of zeros behind 350 bytes",
    "scan.nii.gz",
    gzip.compress(gzip.decompress(PACKED) + bytes(1 << 27)),
)
raw("gzip", "text", "scan.nii.gz", gzip.compress(b"hello"))


def dicom(name: str, which: int | None = None, **tags) -> None:
    """A series of which one slice, or all, have other values; None removes one."""

    def change(k: int, header: Dataset) -> None:
        for tag, value in tags.items() if which in (None, k) else ():
            if value is None:
                delattr(header, tag)
            elif tag == "TransferSyntaxUID":
                header.file_meta.TransferSyntaxUID = value
            else:
                setattr(header, tag, value)

    BAD[f"DICOM: {name}"] = lambda folder: write_series(folder / "series", CHEST, change=change)


dicom("ultrasound", Modality="US")
dicom("one slice of another modality", 1, Modality="PT")
dicom("no rows", Rows=0)
dicom("no columns", 1, Columns=0)
dicom("rows missing", Rows=None)
dicom("more rows than pixels", Rows=60000, Columns=60000)
dicom("three samples a pixel", SamplesPerPixel=3)
dicom("colours by a palette", PhotometricInterpretation="PALETTE COLOR")
dicom("inverted grey", PhotometricInterpretation="MONOCHROME1")
dicom("bits that do not fit", BitsAllocated=8)
dicom("odd bits", BitsAllocated=13)
dicom("no bits", BitsAllocated=None)
dicom("a slope that is NaN", RescaleSlope="nan")
dicom("a slope that overflows", RescaleSlope="1e300")
dicom("a slope of zero in one slice", 2, RescaleSlope=0)
dicom("an infinite place", 1, ImagePositionPatient=[0, 0, "inf"])
dicom("a place that is NaN", 1, ImagePositionPatient=["nan", 0, 0])
dicom("two slices in one place", 1, ImagePositionPatient=[-30, -20, 100])
dicom("a place missing", 3, ImagePositionPatient=None)
dicom("no orientation", ImageOrientationPatient=None)
dicom("an orientation of zeros", ImageOrientationPatient=[0, 0, 0, 0, 0, 0])
dicom("an orientation that is NaN", ImageOrientationPatient=["nan", 0, 0, 0, 1, 0])
dicom("an oblique and a straight slice", 2, ImageOrientationPatient=[1, 0, 0, 0, 0.8, 0.6])
dicom("a spacing of zero", PixelSpacing=[0, 0])
dicom("a negative spacing", PixelSpacing=[-1, 1])
dicom("an infinite spacing", PixelSpacing=["inf", 1])
dicom("no spacing", PixelSpacing=None)
dicom("a slice of half the size", 1, Rows=10, PixelData=bytes(10 * 18 * 2))
dicom("a slice without pixels", 1, PixelData=b"")
dicom("a slice with half of its pixels", 1, PixelData=bytes(20 * 18))
dicom("no pixels", PixelData=None)
dicom("an unknown transfer syntax", TransferSyntaxUID=UID("1.2.3.4"))
dicom("values without an intercept", RescaleSlope=None, RescaleIntercept=None)


def series_with(name: str, change: Callable[[bytes], bytes]) -> None:
    def make(folder: Path) -> Path:
        series = write_series(folder / "series", CHEST)
        victim = sorted(series.iterdir())[1]
        victim.write_bytes(change(victim.read_bytes()))
        return series

    BAD[f"DICOM: {name}"] = make


series_with("an emptied file", lambda data: b"")
series_with("zeros", lambda data: bytes(len(data)))
series_with("a preamble alone", lambda data: data[:132])
series_with("no tags behind the meta information", lambda data: data[:300])
series_with("a cut in the pixels", lambda data: data[:-100])
series_with("a magic of another format", lambda data: data[:128] + b"MCID" + data[132:])
series_with("an unknown type of value", lambda data: data.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00ZZ"))
series_with(
    "a length beyond the end", lambda data: data.replace(b"\x10\x00\x10\x00PN\x08\x00", b"\x10\x00\x10\x00PN\xf0\xff")
)


def packed_series(name: str, syntax: UID, change: Callable[[bytes], bytes] = bytes, **tags) -> None:
    """A compressed series whose tags say something else, or whose packed pixels were changed."""
    slices = np.random.default_rng(1).normal(-600, 300, (2, 64, 64)).clip(-1000, 400)

    def pack(k: int, header: Dataset) -> None:
        header.compress(syntax, generate_instance_uid=False)
        header.PixelData = encapsulate([change(next(generate_frames(header.PixelData, number_of_frames=1)))])
        for tag, value in tags.items():
            setattr(header, tag, value)

    BAD[f"DICOM: {name}"] = lambda folder: write_series(folder / "series", slices, change=pack)


def sized(marker: bytes, *places: tuple[int, str]) -> Callable[[bytes], bytes]:
    """Changes a stream to declare 20,000 rows and columns, at places after a marker."""

    def change(frame: bytes) -> bytes:
        frame, start = bytearray(frame), frame.index(marker)
        for place, layout in places:
            struct.pack_into(layout, frame, start + place, 20_000, 20_000)
        return bytes(frame)

    return change


HUGE = {"Rows": 20_000, "Columns": 20_000}
J2K, JLS = sized(b"\xff\x4f\xff\x51", (8, ">2I"), (24, ">2I")), sized(b"\xff\xf7", (5, ">2H"))
packed_series("gigabytes of RLE", RLELossless, **HUGE)
packed_series("gigabytes of RLE as far as it packs", RLELossless, lambda frame: frame + bytes(12_500_000), **HUGE)
packed_series("RLE that is cut", RLELossless, lambda frame: frame[:300])
packed_series("gigabytes of JPEG 2000", JPEG2000Lossless, J2K, **HUGE)
packed_series("gigabytes in a JPEG 2000 stream alone", JPEG2000Lossless, J2K)
packed_series("gigabytes in a JPEG-LS stream alone", JPEGLSLossless, JLS)
packed_series("JPEG-LS that is none", JPEGLSLossless, lambda frame: b"hello" * 100)


def deflated(name: str, tail: bytes) -> None:
    """A slice whose deflated data set is ``tail``."""

    def make(folder: Path) -> Path:
        series = write_series(folder / "series", CHEST)
        victim = sorted(series.iterdir())[1]
        meta = pydicom.dcmread(victim).file_meta
        meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        with victim.open("wb") as file:
            file.write(bytes(128) + b"DICM")
            write_file_meta_info(file, meta)
            file.write(tail)
        return series

    BAD[f"DICOM: {name}"] = make


def zeros(mebibytes: int) -> bytes:
    """Deflated; one stretch over and over, since packing gigabytes takes long."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packer.compress(b"")
    stretch = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return stretch * mebibytes + packer.flush()


deflated("a deflated slice that is none", b"hello")
deflated("gigabytes behind 2.6 deflated megabytes", zeros(2600))
raw("DICOM", "one file that is text", "slice.dcm", b"hello" * 100)
raw("DICOM", "one file that is empty", "slice.dcm", b"")


def archive(name: str, change: Callable[[zipfile.ZipFile], None], spoil: Callable[[bytes], bytes] = bytes) -> None:
    def make(folder: Path) -> Path:
        path = folder / "scan.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            change(target)
        path.write_bytes(spoil(path.read_bytes()))
        return path

    BAD[f"zip: {name}"] = make


def holds(*names: str, content: bytes = PACKED) -> Callable[[zipfile.ZipFile], None]:
    return lambda target: [target.writestr(name, content) for name in names]


archive("nothing at all", holds())
archive("only a folder", lambda target: target.writestr("folder/", b""))
archive("a name that climbs out", holds("a/../../b.nii.gz"))
archive("a name with backslashes that climbs out", holds("..\\..\\b.nii.gz"))
archive("an absolute name", holds("/b.nii.gz"))
archive("a name on a share", holds("\\\\host\\b.nii.gz"))
archive("a damaged scan", holds("a.nii.gz", content=PACKED[:100]))
archive("an empty scan", holds("a.nii.gz", content=b""))
archive("text", holds("a.txt", content=b"hello"))
archive("cut behind its entries", holds("a.nii.gz"), lambda data: data[: len(data) - 60])
archive("cut at the start", holds("a.nii.gz"), lambda data: data[50:])
archive(
    "an entry that is encrypted",
    holds("a.nii.gz"),
    lambda data: data.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"),
)
archive("a checksum that differs", holds("a.nii.gz"), lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:])
archive(
    "an entry that says too little",
    holds("a.nii.gz"),
    lambda data: data.replace(struct.pack("<I", len(PACKED)), struct.pack("<I", 100)),
)
archive("a bomb", holds("a.nii", content=bytes(1 << 28)))

NRRD = b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 18 20 4\n" + (
    b"space directions: (0.9,0,0) (0,0.8,0) (0,0,2.5)\nendian: little\nencoding: raw\nspace origin: (0,0,0)\n\n"
)
VOXELS = CHEST.astype("<i2").tobytes()
for name, old, new in (
    ("no space", b"space: left-posterior-superior\n", b""),
    ("a negative size", b"sizes: 18", b"sizes: -18"),
    ("petabytes", b"sizes: 18 20 4", b"sizes: 1000000 1000000 1000"),
    ("two sizes", b"sizes: 18 20 4", b"sizes: 18 20"),
    ("text for a size", b"sizes: 18", b"sizes: many"),
    ("four dimensions", b"dimension: 3", b"dimension: 4"),
    ("an unknown type", b"type: short", b"type: shirt"),
    ("an unknown encoding", b"encoding: raw", b"encoding: zip"),
    ("a NaN direction", b"(0.9,0,0)", b"(nan,0,0)"),
    ("directions that fall together", b"(0,0.8,0)", b"(0.8,0,0)"),
    ("voxels in another file", b"encoding: raw", b"encoding: raw\ndata file: /etc/passwd"),
    ("a header without an end", b"\n\n", b"\n"),
):
    raw("NRRD", name, "scan.nrrd", NRRD.replace(old, new) + VOXELS)
raw("NRRD", "voxels missing", "scan.nrrd", NRRD + VOXELS[:-2])
raw("NRRD", "the magic alone", "scan.nrrd", b"NRRD0004\n")

MHA = b"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n" + (
    b"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 0.9 0.8 2.5\nDimSize = 18 20 4\n"
    b"ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
)
for name, old, new in (
    ("text for voxels", b"BinaryData = True", b"BinaryData = False"),
    ("no spacing", b"ElementSpacing = 0.9 0.8 2.5\n", b""),
    ("a spacing of zero", b"ElementSpacing = 0.9", b"ElementSpacing = 0"),
    ("an infinite spacing", b"ElementSpacing = 0.9", b"ElementSpacing = inf"),
    ("petabytes", b"DimSize = 18 20 4", b"DimSize = 1000000 1000000 1000"),
    ("an unknown type", b"MET_SHORT", b"MET_SHIRT"),
    ("two channels", b"ElementType", b"ElementNumberOfChannels = 2\nElementType"),
    ("voxels in another file", b"= LOCAL", b"= /etc/passwd"),
    ("a matrix of zeros", b"1 0 0 0 1 0 0 0 1", b"0 0 0 0 0 0 0 0 0"),
    ("packed, and it is not", b"CompressedData = False", b"CompressedData = True"),
):
    raw("MetaImage", name, "scan.mha", MHA.replace(old, new) + VOXELS)
raw("MetaImage", "voxels missing", "scan.mha", MHA + VOXELS[:-2])


def picture(name: str, file: str, image: Image.Image, spoil: Callable[[bytes], bytes] = bytes) -> None:
    def make(folder: Path) -> Path:
        image.save(folder / file)
        (folder / file).write_bytes(spoil((folder / file).read_bytes()))
        return folder / file

    BAD[f"picture: {name}"] = make


GREY = Image.fromarray(((CHEST[0] + 1000) / 1400 * 255).clip(0, 255).astype(np.uint8))
picture("a cut PNG", "slice.png", GREY, lambda data: data[:-40])
picture("a PNG whose checksum differs", "slice.png", GREY, lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:])
picture("a cut JPEG", "slice.jpg", GREY, lambda data: data[:200])
picture("a cut TIFF", "slice.tif", GREY, lambda data: data[: len(data) // 2])
picture("all one grey", "slice.png", Image.new("L", (20, 20), 90))
picture(
    "a PNG of terapixels", "slice.png", GREY, lambda data: data[:16] + struct.pack(">II", 1 << 20, 1 << 20) + data[24:]
)
raw("picture", "text", "slice.png", b"hello")
raw("picture", "nothing", "slice.jpg", b"")
raw("input", "a kind that nobody knows", "scan.xyz", b"hello")


def refusals(path: Path, output: Path) -> list[tuple[str, str]]:
    """The errors about a file, as text, and their reasons."""
    cases, errors = find_cases([path], output)
    for case in cases:
        with pytest.raises(BadInputError) as error:
            read_case(case, None)
        errors.append(error.value)
    for cause in errors:
        while cause is not None:  # memory that this machine lacks, another has
            assert not isinstance(cause, MemoryError)
            cause = cause.__cause__ or cause.__context__
    return [(str(error), error.reason) for error in errors]


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore")  # of pydicom, about what it is given here
def test_is_refused(name, tmp_path, capfd):
    path = BAD[name](tmp_path)
    errors = within(SECONDS, BYTES, refusals, path, tmp_path / "out")
    assert errors
    for error, reason in errors:
        assert error.startswith(str(path)) and "\n" not in error and len(reason) > 8
    assert not list(tmp_path.glob("out*")) and not capfd.readouterr().out


def test_the_limits_can_fail():
    for most, function, said in (
        (BYTES, lambda: time.sleep(9), "more than 0.2 s"),
        (1 << 25, lambda: np.ones(1 << 24).sum(), "took .* bytes"),
        (BYTES, lambda: {}[3], "KeyError"),
    ):
        with pytest.raises(AssertionError, match=said):
            within(0.2 if most == BYTES else SECONDS, most, function)


def test_what_others_left_hides_no_memory():
    gc.disable()
    try:
        garbage = [np.ones(1 << 24)]
        garbage.append(garbage)
        del garbage
        with pytest.raises(AssertionError, match=r"took .* bytes"):
            within(SECONDS, 1 << 25, lambda: (gc.collect(), np.ones(1 << 24).sum()))
    finally:
        gc.enable()
    np.ones(30 << 17)  # from now on the heap keeps what is smaller
    free = [np.ones(24 << 17) for _ in range(8)]
    after = np.ones(20 << 17)
    del free
    with pytest.raises(AssertionError, match=r"took .* bytes"):
        within(SECONDS, 1 << 25, lambda: np.ones(1 << 24).sum())
    del after


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"{}", b'{"case": 3}', b"\xff\xfe", b'{"a": NaN}']
)
def test_reports_that_are_none_are_refused(content, tmp_path, capsys):
    """JSON that a page is to be made of."""
    report = tmp_path / "out" / "ct.json"
    report.parent.mkdir()
    report.write_bytes(content)
    assert main(["followup", f"2026-01-31={report}", "-o", str(tmp_path / "page.html")]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert str(report) in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
