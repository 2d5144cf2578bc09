"""Which cases the inputs of a command hold, and what their results are called."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import BadInputError
from ..files import is_file
from ..imaging import archive, dicom, itk, nifti, pictures
from ..imaging.volume import Volume

HEAD = 1 << 14  # bytes of each file in an archive that are looked at, to tell the scans in it
INSIDE = "#"  # between the place of a scan in an archive and its series
RESULT = re.compile(r"(.+)_(mask|overlay|probability|lungs|seg|attention_x\d\d)\.(nii\.gz|png|dcm)")


@dataclass(frozen=True)
class Case:
    """One volume or picture; ``name`` starts its results.

    ``kind`` is "nifti", "itk" (NRRD or MetaImage), "dicom" (a folder, or one file with all slices; ``series`` is the
    UID of one of several in a folder), "zip" (``series`` tells one of several scans in it, ``members`` what is to be
    unpacked for it: nothing else is) or "picture".
    """

    name: str
    kind: str
    path: Path
    series: str | None = None
    members: Sequence[str] = ()


def read_volume(case: Case) -> Volume:
    """Reads a case that is no picture. Raises BadInputError."""
    if case.kind == "zip":
        return _read_archive(case)
    if case.kind == "dicom":
        return dicom.read_series(case.path, case.series)
    return itk.read_itk(case.path) if case.kind == "itk" else nifti.read_nifti(case.path)


def _read_archive(case: Case) -> Volume:
    """The scan in an archive that ``_archive_cases`` named, or its only one."""
    path, series = case.path, case.series
    with tempfile.TemporaryDirectory(prefix="scoat_fast") as scratch:
        folder = Path(scratch)
        archive.unpack(path, folder, wanted=set(case.members) or None)
        try:
            if series is None:
                scan = _only_scan(path, folder)
            else:
                place, _, uid = series.partition(INSIDE)
                there = folder / place
                scan = Case("", "dicom" if there.is_dir() else _kind(there), there, uid or None)
            volume = read_volume(scan)
        except BadInputError as error:
            raise BadInputError(path, error.reason) from error
        return replace(volume, path=path)


def _only_scan(path: Path, folder: Path) -> Case:
    errors: list[BadInputError] = []
    cases = _unpacked(folder, errors)
    if errors:
        raise BadInputError(path, errors[0].reason)
    if len(cases) != 1 or cases[0].kind == "picture":
        found = ", ".join(sorted(case.kind for case in cases)) or "none"
        raise BadInputError(path, f"scans, and nothing else, are wanted in an archive, got {found}: unpack it")
    return cases[0]


def _unpacked(folder: Path, errors: list[BadInputError], wanted: Sequence[str] = ()) -> list[Case]:
    """The cases in what was an archive; archives in it are none."""
    found = _in_folder(folder, folder / "results", errors, wanted, archives=False)
    return sorted(found, key=lambda case: str(case.path))


def _archive_cases(path: Path, wanted: Sequence[str] = ()) -> list[Case]:
    """A case for each scan in an archive. For the archive as it is where there are not several, or where anything is
    wrong: who reads it says what.
    """
    name = _stem(path, "zip")
    for most in (HEAD, None):
        errors: list[BadInputError] = []
        with tempfile.TemporaryDirectory(prefix="scoat_fast") as scratch:
            folder = Path(scratch)
            try:
                archive.unpack(path, folder, most)
            except BadInputError:
                return [Case(name, "zip", path)]
            if most and not all(map(_says_enough, folder.glob("*/*"))):
                continue  # a series must not be lost because its files say it late
            scans = _unpacked(folder, errors, wanted)
            found = _places(folder, scans)
        if errors or any(case.kind == "picture" for case in scans) or (len(scans) < 2 and not wanted):
            return [Case(name, "zip", path)]
        if len(found) == 1:
            return [Case(name, "zip", path, *found[0])]
        return [Case(f"{name}_{k}", "zip", path, *one) for k, one in enumerate(found, 1)]
    raise AssertionError("unpacked in full, an archive says all it has to say")


def _places(folder: Path, scans: Sequence[Case]) -> list[tuple[str, tuple[str, ...]]]:
    """For each scan of an archive where it lies in it, and the files that it needs: of a folder with several series
    those of its own, and those that do not say to which they belong, which may be damaged slices of it.
    """
    uids: dict[Path, dict[Path, str]] = {}
    found = []
    for scan in scans:
        place, files = str(scan.path.relative_to(folder)), [scan.path]
        if scan.path.is_dir():
            if scan.path not in uids:
                uids[scan.path] = {file: dicom.series_uid(file) for file in sorted(scan.path.iterdir())}
            files = [file for file, uid in uids[scan.path].items() if not scan.series or uid in (scan.series, "")]
        if scan.series:
            place += INSIDE + scan.series
        found.append((place, tuple(str(file.relative_to(folder)) for file in files)))
    return found


def _says_enough(head: Path) -> bool:
    return head.stat().st_size < HEAD or not dicom.is_dicom(head) or dicom.series_uid(head) != ""


def find_cases(
    inputs: Sequence[str | Path], output: Path, series: Sequence[str] = ()
) -> tuple[list[Case], list[BadInputError]]:
    """The cases of files and folders, each with a name of its own, and what is no case.

    Folders are searched with all that lies below them, also behind links, but for ``output`` and for results. Equal
    names are told apart by the folders above them, and by their suffix. A folder with several CT series gives a case
    for each.

    Args:
        series: UIDs or numbers of the DICOM series to take; all by default.
    """
    cases: dict[tuple, Case] = {}
    errors: list[BadInputError] = []
    for given in map(Path, inputs):
        try:
            for case in _cases(given, _real(output), errors, series):
                cases.setdefault((_real(case.path), case.series), case)
        except BadInputError as error:
            errors.append(error)
        except OSError as error:
            errors.append(BadInputError(given, f"cannot be read: {error.strerror}"))
    return _tell_apart(list(cases.values())), errors


def _cases(given: Path, output: Path, errors: list[BadInputError], series: Sequence[str]) -> list[Case]:
    if stat.S_ISDIR(given.stat().st_mode):
        before = len(errors)
        found = sorted(_in_folder(given, output, errors, series), key=lambda case: str(case.path))
        if not found and len(errors) == before:
            what = "such series" if series else "NIfTI file, DICOM series or picture"
            raise BadInputError(given, f"an empty folder: no {what} in it")
        return found
    if not is_file(given):
        raise BadInputError(given, "a file or a folder is wanted, this is neither")
    kind = _kind(given)
    if kind == "dicom" and not dicom.has_frames(given):
        raise BadInputError(given, "one DICOM file with one slice: give the folder of its series")
    if kind is None:
        raise BadInputError(
            given, "neither NIfTI, NRRD, MetaImage or DICOM, nor a zip of these, nor a PNG, JPEG, WebP or TIFF picture"
        )
    if kind == "zip":
        found = _archive_cases(given, series)
        if not found:
            raise BadInputError(given, "no such series in it")
        return found
    return [Case(_stem(given, kind), kind, given)]


def _in_folder(
    folder: Path, output: Path, errors: list[BadInputError], wanted: Sequence[str] = (), archives: bool = True
) -> Iterable[Case]:
    """The cases below a folder; what cannot be read is added to ``errors``."""

    def note(error: OSError) -> None:
        errors.append(BadInputError(error.filename or folder, f"cannot be read: {error.strerror}"))

    seen = {_real(folder), output}  # links may lead in circles
    for root, folders, names in os.walk(folder, onerror=note, followlinks=True):
        here = Path(root)
        folders[:] = [name for name in sorted(folders) if _is_new(here / name, seen)]
        series = False
        for name in sorted(names):
            if name.startswith(".") or is_result(here / name) or not is_file(here / name):
                continue
            try:
                kind = _kind(here / name)
            except BadInputError as error:
                errors.append(error)
                continue
            if kind == "dicom" and not series:
                series = True
                yield from _series_cases(here, wanted)
            elif kind == "zip" and archives:
                yield from _archive_cases(here / name, wanted)
            elif kind in ("nifti", "itk", "picture"):
                yield Case(_stem(here / name, kind), kind, here / name)


def _series_cases(folder: Path, wanted: Sequence[str]) -> list[Case]:
    """A case for each CT series in a folder; for the folder as it is where there are not several series."""
    name, found = _stem(folder, "dicom"), dicom.list_series(folder)
    if wanted:
        found = [one for one in found if one.uid in wanted or str(one.number) in wanted]
        if not found:
            return []
    scans = [one for one in found if one.modality in ("CT", "")] or found
    if len(scans) == len(found) <= 1 and not wanted:
        return [Case(name, "dicom", folder)]
    if len(scans) == 1:
        return [Case(name, "dicom", folder, scans[0].uid)]
    numbers = [one.number for one in scans]
    named = None not in numbers and len(set(numbers)) == len(numbers)
    labels = numbers if named else range(1, len(scans) + 1)
    return [Case(f"{name}_{k}", "dicom", folder, one.uid) for k, one in zip(labels, scans, strict=True)]


def _is_new(folder: Path, seen: set[Path]) -> bool:
    """Whether a folder is to be searched: not hidden, and not ``seen``; it is seen afterwards."""
    real = _real(folder)
    if folder.name.startswith(".") or real in seen:
        return False
    seen.add(real)
    return True


def _real(path: Path) -> Path:
    """The path without links; ``Path.resolve`` raises on those that lead to themselves."""
    return Path(os.path.realpath(path))


def is_result(path: Path) -> bool:
    """Whether a file is a result of this program: named as one, and with the program's report of its case beside it."""
    match = RESULT.fullmatch(path.name)
    return match is not None and is_report(path.parent / f"{match[1]}.json")


def is_report(path: Path) -> bool:
    """Whether a file is a report of this program about the case that it is named after."""
    try:
        report = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(report, dict) and "scoat_fast" in report and report.get("case") == path.stem


def _kind(path: Path) -> str | None:
    if path.name.lower().endswith(nifti.SUFFIXES):
        return "nifti"
    if path.suffix.lower() in pictures.SUFFIXES:
        return "picture"
    if path.suffix.lower() in itk.SUFFIXES:
        return "itk"
    if path.suffix.lower() == archive.SUFFIX:
        return "zip"
    return "dicom" if dicom.is_dicom(path) else None


def _stem(path: Path, kind: str) -> str:
    if kind == "dicom":
        real = _real(path)
        return real.stem if real.suffix.lower() in dicom.SUFFIXES and not real.is_dir() else real.name
    return nifti.stem(path)


def _tell_apart(cases: list[Case]) -> list[Case]:
    """Gives equal names their suffixes within a folder, then their folders' names, and at last numbers."""
    places = [(_real(case.path).parent, _key(case)) for case in cases]
    crowded = Counter(places)
    names = [
        case.path.name.replace(".", "_") if crowded[place] > 1 else case.name
        for case, place in zip(cases, places, strict=True)
    ]
    parents = [[parent.name for parent in _real(case.path).parents] for case in cases]
    for level in range(max(map(len, parents), default=0)):
        repeated = _repeated(names)
        names = [
            f"{above[level]}_{name}" if name.casefold() in repeated and level < len(above) and above[level] else name
            for name, above in zip(names, parents, strict=True)
        ]
    repeated = _repeated(names)  # only names that differ by case alone, in one folder
    names = [f"{name}-{i + 1}" if name.casefold() in repeated else name for i, name in enumerate(names)]
    return [replace(case, name=name) for case, name in zip(cases, names, strict=True)]


def _repeated(names: list[str]) -> set[str]:
    return {name for name, count in Counter(map(str.casefold, names)).items() if count > 1}


def _key(case: Case) -> str:
    return case.name.casefold()  # some file systems do not tell cases apart
