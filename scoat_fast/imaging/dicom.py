"""A DICOM CT series: a folder with its slices, or one file with all of them."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    UID_dictionary,
)

from ..errors import BadInputError
from .nifti import LARGEST, new_header
from .volume import Volume, check_affine

SUFFIXES = (".dcm", ".ima")
NO_SLICES = {"DICOMDIR", "LOCKFILE", "VERSION", "README", "LICENSE", "LICENCE", "INDEX", "CHANGES", "MANIFEST"}
FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")  # what a DICOM file without a preamble begins with
USED = (
    "SOPClassUID", "SeriesInstanceUID", "ImageType", "Modality", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "Rows", "Columns",
    "RescaleSlope", "RescaleIntercept",
)  # fmt: skip
SERIES_NUMBER = 0x00200011  # the last tag that tells series apart
NUMBER_OF_FRAMES = 0x00280008
# of an Enhanced CT image: what holds for all frames, and what each has in its functional groups or shares
FRAME_KEEPS = (
    "SeriesInstanceUID", "ImageType", "Modality", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"
)  # fmt: skip
FRAME_PARTS = {
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "CTImageFrameTypeSequence": ("FrameType",),
}
PLAIN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
SMALL, RATIO = 64 << 20, 50  # bytes, times the packed size: what is larger and packs better is no scan, but a bomb
CHUNK = 1 << 16
JPEG_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers before the size, that of JPEG-LS the last
EVEN = 0.02  # share of the spacing by which gaps between slices may differ
TILT = 1.0  # degrees between the slices' normal and the way from one to the next


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its suffix or by how it begins. Raises BadInputError if it cannot be read."""
    return path.suffix.lower() in SUFFIXES or _begins_as_dicom(path, _start(path))


def _begins_as_dicom(path: Path, start: bytes) -> bool:
    if start[128:] == b"DICM":
        return path.name.upper() != "DICOMDIR"
    return len(start) == 132 and start[:2] in FIRST_GROUPS and not _suffix(path)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(132)
    except OSError as error:  # it may be a slice, and a volume must not lack one quietly
        raise BadInputError(path, f"cannot be read: {error.strerror}") from error


def _suffix(path: Path) -> str:
    """The suffix of a slice. IM0004 has none, and of a UID the last number is none."""
    return "" if path.suffix.lstrip(".").isdigit() else path.suffix.lower()


def _is_damaged_slice(path: Path) -> bool:
    """Whether a file that is not DICOM, but named like one, stands where a slice should: it is no text."""
    if path.name.upper() in NO_SLICES:
        return False
    start = _start(path)
    return not start or not all(byte >= 32 or byte in b"\t\n\r" for byte in start)


def has_frames(path: Path) -> bool:
    """Whether a DICOM file holds several slices, and so may be a series by itself. Raises BadInputError."""
    with warnings.catch_warnings(action="ignore"), _damage_named(path), _File(path) as file:
        start = file.peek(132)[:132]
        header = read_partial(file, lambda tag, *_: tag > NUMBER_OF_FRAMES, force=start[128:] != b"DICM")
        return int(header.get("NumberOfFrames", None) or 1) > 1


class _File(io.BufferedReader):
    """A file for pydicom, which takes a deflated data set all at once and inflates it without a bound."""

    def __init__(self, path: Path):
        super().__init__(path.open("rb", 0))

    def read(self, size: int | None = -1) -> bytes:
        """As of any file. Raises BadInputError for the rest of it, where that is a bomb."""
        data = super().read(size)
        if size is None or size < 0:
            _check_inflated(self.name, data)
        return data


def _check_inflated(path: str, packed: bytes) -> None:
    """Raises BadInputError where deflated bytes hold too much. What is damaged, pydicom finds."""
    most, total = min(LARGEST, max(SMALL, RATIO * len(packed))), 0
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    file = io.BytesIO(packed)
    with contextlib.suppress(zlib.error):
        # a pad byte may follow the end, and zlib would give it back as not consumed again and again
        while total <= most and not stream.eof and (chunk := stream.unconsumed_tail or file.read(CHUNK)):
            total += len(stream.decompress(chunk, CHUNK))
    if total > most:
        raise BadInputError(path, f"holds more than {most} bytes in {len(packed)} deflated ones: no scan packs so")


@dataclass(frozen=True)
class Series:
    """A series of images in a folder, but for localizers: its UID, its number (None without), and its modality."""

    uid: str
    number: int | None
    modality: str


def list_series(folder: str | Path) -> list[Series]:
    """The series of images in a folder, by their numbers. Reads the first few elements of each file.

    A file that cannot be read is left to ``read_series``, which names it.
    """
    found: dict[str, Series] = {}
    with warnings.catch_warnings(action="ignore"):
        for path in _within(Path(folder)):
            with contextlib.suppress(BadInputError):
                series = _series_of(path) if path.is_file() else None
                if series is not None:
                    found.setdefault(series.uid, series)
    return sorted(found.values(), key=lambda series: (series.number is None, series.number or 0, series.uid))


def series_uid(path: Path) -> str:
    """The UID of the series of images that what there is of a file belongs to; "" where it does not tell."""
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(BadInputError):
        series = _series_of(path)
        return "" if series is None else series.uid
    return ""


def _may_be_of(path: Path, uid: str) -> bool:
    """Whether an image belongs to a series, or does not say to which: one that is damaged may be a slice of it."""
    try:
        series = _series_of(path)
    except BadInputError:
        return True
    return series is not None and series.uid in (uid, "")


def _series_of(path: Path) -> Series | None:
    """The series of an image, None for what is none; from what stands before its pixels. Raises BadInputError."""
    with _damage_named(path), _File(path) as file:
        start = file.peek(132)[:132]
        if path.suffix.lower() not in SUFFIXES and not _begins_as_dicom(path, start):
            return None
        header = read_partial(file, lambda tag, *_: tag > SERIES_NUMBER, force=start[128:] != b"DICM")
        if not _names_image(header) or _is_localizer(header):
            return None
        number = str(header.get("SeriesNumber", None) or "")
        uid, modality = (str(header.get(name, None) or "") for name in ("SeriesInstanceUID", "Modality"))
        return Series(uid, int(number) if number.isdigit() else None, modality)


def read_series(folder: str | Path, uid: str | None = None) -> Volume:
    """The CT series in ``folder``: HU through each slice's own slope and intercept.

    Slices are sorted by their position along their normal. Uneven gaps and a tilted gantry are warned about. Slices are
    files of their own, or frames of one (Enhanced CT). Localizers are passed over.

    Args:
        folder: with the series; or the one file that holds all its slices.
        uid: of the series, where the folder holds several.

    Raises:
        BadInputError: if a file is damaged, the folder holds no CT slice or more than one series, or the slices do
            not form one volume.
    """
    with warnings.catch_warnings(action="ignore"):  # pydicom's, about values that are checked here
        return _read_series(Path(folder), uid)


def _read_series(folder: Path, uid: str | None) -> Volume:
    # a link to a slice that is gone is read, too, and its error names it: the volume would lack that slice quietly
    there = [path for path in _within(folder) if path.is_file() or (path.is_symlink() and not path.exists())]
    files = [path for path in there if is_dicom(path)]
    suffixes = {_suffix(path) for path in files}
    for path in sorted(set(there) - set(files)):
        if _suffix(path) in suffixes and _is_damaged_slice(path):
            raise BadInputError(path, "damaged: among slices with such names it should be one, and is not DICOM")
    read = [_read(path) for path in files if uid is None or _may_be_of(path, uid)]
    for slice in read if uid is not None else []:
        if str(slice.get("SeriesInstanceUID", "")) != uid:  # its volume must not lack it quietly
            raise BadInputError(slice.filename, "damaged: it does not say which of the folder's series it belongs to")
    images = [slice for slice in read if _is_image(slice)]
    _check_sizes(folder, images)
    slices = [frame for slice in images for frame in _frames(slice) if not _is_localizer(frame)]
    if not slices:
        raise BadInputError(folder, "no DICOM file with an image")
    series = {str(slice.get("SeriesInstanceUID", "")) for slice in slices}
    if len(series) > 1:
        raise BadInputError(folder, f"one series is wanted, got {len(series)}: give each a folder of its own")
    for slice in slices:
        with _damage_named(slice.filename):
            _check(slice)
    first = slices[0]
    for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        for slice in slices:
            values = [np.asarray(each[name].value, dtype=float) for each in (slice, first)]
            if not np.allclose(*values, atol=1e-3):
                raise BadInputError(slice.filename, f"{name} differs from that of {Path(first.filename).name}")
    for slice in slices:
        if ("RescaleIntercept" in slice) != ("RescaleIntercept" in first):
            raise BadInputError(folder, "some slices have a RescaleIntercept and some none: they are not all in HU")

    slices, positions, normal = _sorted(slices)
    rows_to, columns_to = np.asarray(first.ImageOrientationPatient, float).reshape(2, 3)
    step, doubts = _step(folder, slices, positions, normal)

    affine = np.eye(4)
    affine[:3, 0] = rows_to * float(first.PixelSpacing[1])  # along a row, from column to column
    affine[:3, 1] = columns_to * float(first.PixelSpacing[0])
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM counts to the left and to the back
    check_affine(folder, affine)
    voxels = np.stack([_hounsfield(slice).T for slice in slices], axis=2)
    return Volume(folder, voxels, affine, new_header(affine, voxels.shape), doubts)


def sorted_headers(folder: Path, uid: str | None = None) -> tuple[list[pydicom.FileDataset], list[pydicom.Dataset]]:
    """What lies before the pixels of a series that ``read_series`` can read: of its files, and of its slices in its
    order. The files are in that order, too, where each is a slice. Raises BadInputError.
    """
    files, slices = [], []
    with warnings.catch_warnings(action="ignore"):
        for path in _within(Path(folder)):
            if path.is_file() and is_dicom(path):
                file = _read(path, with_pixels=False)
                ours = uid is None or str(file.get("SeriesInstanceUID", "")) == uid
                frames = _frames(file, with_pixels=False) if ours and _names_image(file) else []
                frames = [frame for frame in frames if not _is_localizer(frame)]
                if frames:
                    files.append(file)
                    slices += frames
        slices = _sorted(slices)[0]
    return (files if any(isinstance(slice, _Frame) for slice in slices) else slices), slices


def _check_sizes(folder: Path, images: list[pydicom.FileDataset]) -> None:
    """Raises BadInputError where images declare more pixels than can be read, or than their packed ones can hold."""
    whole = unpacked = packed = 0
    for image in images:
        with _damage_named(image.filename):
            size = -(-int(image.BitsAllocated) // 8)
            for name in ("NumberOfFrames", "SamplesPerPixel", "Rows", "Columns"):
                size *= max(int(image.get(name, 1) or 1), 1)
        whole += size
        if _is_packed(image):
            unpacked, packed = unpacked + size, packed + len(image.PixelData)
    if whole > LARGEST:
        raise BadInputError(folder, f"declares {whole / 2**30:.0f} GiB of pixels, more than {LARGEST >> 30}")
    if unpacked > SMALL and unpacked > RATIO * packed:
        raise BadInputError(folder, f"declares {unpacked} bytes of pixels in {packed} packed ones: no scan packs so")


def _is_packed(slice: pydicom.FileDataset) -> bool:
    return slice.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian) not in PLAIN


def _within(folder: Path) -> list[Path]:
    """What lies in a folder, but for what is hidden, such as what macOS writes beside a file; of a file, the file."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else [folder]


def _sorted(slices: list[pydicom.Dataset]) -> tuple[list[pydicom.Dataset], np.ndarray, np.ndarray]:
    """Slices by their place along their normal, their places [N, 3], and the normal."""
    normal = np.cross(*np.asarray(slices[0].ImageOrientationPatient, float).reshape(2, 3))
    positions = np.array([np.asarray(slice.ImagePositionPatient, float) for slice in slices])
    order = np.argsort(positions @ normal, kind="stable")
    return [slices[i] for i in order], positions[order], normal


def _frames(slice: pydicom.FileDataset, with_pixels: bool = True) -> list[pydicom.Dataset]:
    """The frames of an Enhanced CT image as slices, each with its own place, slope and intercept; or the one slice."""
    if "PerFrameFunctionalGroupsSequence" not in slice:
        return [slice]
    with _damage_named(slice.filename):
        count, groups = int(slice.NumberOfFrames), slice.PerFrameFunctionalGroupsSequence
        shared = slice.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
        if len(groups) != count:
            raise BadInputError(
                slice.filename, f"{count} frames are wanted, as it declares, got groups for {len(groups)}"
            )
        pixels = _stored(slice).reshape(-1, slice.Rows, slice.Columns) if with_pixels else [None] * count
        if len(pixels) != count:
            raise BadInputError(slice.filename, f"{count} frames are wanted, as it declares, got {len(pixels)}")
        frames = []
        for k, group in enumerate(groups):
            frame = _Frame()
            frame.filename, frame.stored = slice.filename, pixels[k]
            for name in FRAME_KEEPS:
                if name in slice:
                    frame[name] = slice[name]
            for sequence, names in FRAME_PARTS.items():
                item = (group.get(sequence) or shared[0].get(sequence) or [pydicom.Dataset()])[0]
                for name in names:
                    if name in item:
                        frame[name] = item[name]
            frames.append(frame)
        return frames


class _Frame(pydicom.Dataset):
    """A frame as if it were a file, with the values that are ``stored`` for its pixels."""

    filename: str
    stored: np.ndarray | None


def _read(path: Path, with_pixels: bool = True) -> pydicom.FileDataset:
    with _damage_named(path), _File(path) as file:
        bare = file.peek(132)[128:132] != b"DICM" and not _suffix(path)
        slice = pydicom.dcmread(file, force=bare, stop_before_pixels=not with_pixels)
        if bare and "TransferSyntaxUID" not in slice.file_meta:
            implicit, _ = slice.original_encoding
            slice.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        for name in USED:
            slice.get(name)  # parses it
        return slice


@contextlib.contextmanager
def _damage_named(path: str | Path) -> Iterator[None]:
    """Raises BadInputError about ``path`` for whatever pydicom raises on damaged data."""
    try:
        yield
    except BadInputError:
        raise
    except InvalidDicomError as error:
        raise BadInputError(path, "not a DICOM file, or damaged at its start") from error
    except OSError as error:
        raise BadInputError(path, f"cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise BadInputError(path, f"damaged: {error}") from error


def _is_image(slice: pydicom.FileDataset) -> bool:
    """Whether this is an image, and not a report, say. Raises BadInputError if it should be one and is cut off."""
    if "PixelData" in slice:
        return True
    if not _names_image(slice):
        return False
    raise BadInputError(slice.filename, "truncated: an image is wanted, got no pixels")


def _names_image(slice: pydicom.Dataset) -> bool:
    """Whether this says that it is an image, or says nothing that is known."""
    kind = UID(str(slice.get("SOPClassUID") or getattr(slice, "file_meta", {}).get("MediaStorageSOPClassUID")))
    return kind not in UID_dictionary or "Image Storage" in kind.name


def _is_localizer(slice: pydicom.Dataset) -> bool:
    kinds = [kind for name in ("ImageType", "FrameType") for kind in slice.get(name, None) or []]
    return "LOCALIZER" in [str(kind).upper() for kind in kinds]


def _check(slice: pydicom.FileDataset) -> None:
    """Raises BadInputError unless this is one CT slice with a place in space."""
    path = slice.filename
    if str(slice.get("Modality", "") or "CT") != "CT":
        raise BadInputError(path, f"a CT is wanted, got modality {slice.Modality}")
    if int(slice.get("NumberOfFrames", 1) or 1) != 1:
        raise BadInputError(path, "one slice in each file is wanted, this one holds several frames")
    if int(slice.get("SamplesPerPixel", 1)) != 1 or slice.get("PhotometricInterpretation") != "MONOCHROME2":
        raise BadInputError(path, f"grey pixels (MONOCHROME2) are wanted, got {slice.get('PhotometricInterpretation')}")
    for name, count in (("PixelSpacing", 2), ("ImageOrientationPatient", 6), ("ImagePositionPatient", 3)):
        try:
            values = np.asarray(slice.get(name), dtype=float)
        except (TypeError, ValueError):
            values = np.array([np.nan])
        if values.shape != (count,) or not np.isfinite(values).all():
            raise BadInputError(path, f"{name} is missing or not {count} finite numbers")
    cosines = np.asarray(slice.ImageOrientationPatient, float).reshape(2, 3)
    if not np.allclose(cosines @ cosines.T, np.eye(2), atol=1e-2):
        raise BadInputError(path, "ImageOrientationPatient is not two perpendicular directions of length 1")
    if min(float(mm) for mm in slice.PixelSpacing) <= 0:
        raise BadInputError(path, f"PixelSpacing is not positive: {list(slice.PixelSpacing)}")
    for name in ("Rows", "Columns"):
        if not isinstance(slice.get(name), int):
            raise BadInputError(path, f"{name} is missing or not one number")


def _step(folder: Path, slices, positions: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The vector from one slice to the next in mm, and warnings about how even that is."""
    if len(slices) == 1:
        for name in ("SpacingBetweenSlices", "SliceThickness"):
            with _damage_named(slices[0].filename):
                thickness = float(slices[0].get(name) or 0)
            if np.isfinite(thickness) and thickness > 0:
                return normal * thickness, []
        return normal, ["a single slice without a thickness: volumes assume 1 mm"]
    gaps = np.diff(positions @ normal)
    if gaps.min() < 1e-3:
        at = int(gaps.argmin())
        names = " and ".join(Path(slice.filename).name for slice in slices[at : at + 2])
        raise BadInputError(folder, f"{names} lie in the same place")
    step, doubts = (positions[-1] - positions[0]) / (len(slices) - 1), []
    if np.ptp(gaps) > EVEN * np.median(gaps):
        doubts.append(
            f"uneven gaps between slices, {gaps.min():.4g} to {gaps.max():.4g} mm: slices may be missing, "
            "volumes use the mean"
        )
    tilt = np.degrees(np.arccos(min(step @ normal / np.linalg.norm(step), 1.0)))
    if tilt > TILT:
        doubts.append(f"the gantry was tilted by {tilt:.1f} degrees")
    return step, doubts


def _stored(slice: pydicom.Dataset) -> np.ndarray:
    """The pixels as they are stored. Raises BadInputError."""
    if isinstance(slice, _Frame):
        return slice.stored
    if _is_packed(slice) and slice.file_meta.TransferSyntaxUID != RLELossless:
        _check_packed(slice)
    try:
        return slice.pixel_array
    except Exception as error:  # decoders raise many kinds on damaged or compressed data
        syntax = slice.file_meta.TransferSyntaxUID.name if "TransferSyntaxUID" in slice.file_meta else "unknown"
        raise BadInputError(
            slice.filename,
            f"its pixels ({syntax}) cannot be decoded; compressed ones need pip install 'scoat-fast[dicom]': {error}",
        ) from error


def _check_packed(slice: pydicom.FileDataset) -> None:
    """Raises BadInputError where a packed frame says another size than its header: decoders make what it says."""
    names = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
    offsets = tuple(slice[name].value for name in names) if all(name in slice for name in names) else None
    with _damage_named(slice.filename):
        wanted = (slice.Rows, slice.Columns, slice.get("SamplesPerPixel", 1))
        count = int(slice.get("NumberOfFrames", 1) or 1)
        for frame in generate_frames(slice.PixelData, number_of_frames=count, extended_offsets=offsets):
            found = _packed_size(frame)
            if found != wanted:
                raise BadInputError(
                    slice.filename, f"{wanted} rows, columns and samples are wanted, as it declares, its packed pixels "
                    f"say {found or 'nothing'}"
                )  # fmt: skip


def _packed_size(frame: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and samples of a JPEG, JPEG-LS or JPEG 2000 stream; None where it does not say them at once."""
    if frame[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000
        right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
        return bottom - top, right - left, *struct.unpack_from(">H", frame, 40)
    at = 2
    while frame[:2] == b"\xff\xd8" and frame[at : at + 1] == b"\xff" and frame[at + 1 : at + 2] not in b"\xda\xde":
        if frame[at + 1] in JPEG_FRAMES:
            return struct.unpack_from(">HHB", frame, at + 5)
        fill = frame[at + 1] == 0xFF
        at += 1 if fill else 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return None


def _hounsfield(slice: pydicom.Dataset) -> np.ndarray:  # [rows, columns] float32
    stored = _stored(slice)
    if stored.shape != (slice.Rows, slice.Columns):
        raise BadInputError(slice.filename, f"{slice.Rows} x {slice.Columns} pixels are wanted, got {stored.shape}")
    said = slice.get("RescaleSlope", 1), slice.get("RescaleIntercept", 0)
    try:
        slope, intercept = map(float, said)
    except (TypeError, ValueError):
        slope = np.nan
    if not (np.isfinite(slope) and np.isfinite(intercept) and slope != 0):
        raise BadInputError(slice.filename, f"slope {said[0]} and intercept {said[1]} cannot be used")
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
