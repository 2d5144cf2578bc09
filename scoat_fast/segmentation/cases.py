"""Which cases the inputs of a command hold, and what their results are called."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import BadInputError
from ..imaging import dicom, nifti, pictures

OUTPUTS = ("_mask.nii.gz", "_probability.nii.gz", "_attention_", "_mask.png", "_overlay.png")


@dataclass(frozen=True)
class Case:
    """One volume or picture: ``kind`` is "nifti", "dicom" (a folder) or "picture"; ``name`` starts its results."""

    name: str
    kind: str
    path: Path


def find_cases(inputs: Sequence[str | Path], output: Path) -> tuple[list[Case], list[BadInputError]]:
    """The cases of files and folders, each with a name of its own, and what is no case.

    Folders are searched with all that lies below them, but for ``output`` and results in it. Equal names are told
    apart by the folders above them, and by their suffix.
    """
    cases: dict[Path, Case] = {}
    errors = []
    for given in map(Path, inputs):
        try:
            for case in _cases(given, output.resolve()):
                cases.setdefault(case.path.resolve(), case)
        except BadInputError as error:
            errors.append(error)
    return _tell_apart(list(cases.values())), errors


def _cases(given: Path, output: Path) -> list[Case]:
    if given.is_dir():
        found = sorted(_in_folder(given, output), key=lambda case: str(case.path))
        if not found:
            raise BadInputError(given, "an empty folder: no NIfTI file, DICOM series or picture in it")
        return found
    if not given.exists():
        raise BadInputError(given, "no such file or folder")
    kind = _kind(given)
    if kind == "dicom":
        raise BadInputError(given, "one DICOM file: give the folder of its series")
    if kind is None:
        raise BadInputError(given, "neither NIfTI, nor DICOM, nor a PNG, JPEG, WebP or TIFF picture")
    return [Case(_stem(given, kind), kind, given)]


def _in_folder(folder: Path, output: Path) -> Iterable[Case]:
    def refuse(error: OSError) -> None:
        raise BadInputError(error.filename or folder, f"cannot be read: {error.strerror}") from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        here = Path(root)
        folders[:] = [name for name in folders if not name.startswith(".") and (here / name).resolve() != output]
        own = here.resolve() == output
        series = False
        for name in sorted(names):
            if name.startswith(".") or (own and any(part in name for part in OUTPUTS)):
                continue
            kind = _kind(here / name)
            if kind == "dicom" and not series:
                series = True
                yield Case(_stem(here, kind), kind, here)
            elif kind in ("nifti", "picture"):
                yield Case(_stem(here / name, kind), kind, here / name)


def _kind(path: Path) -> str | None:
    if path.name.lower().endswith(nifti.SUFFIXES):
        return "nifti"
    if path.suffix.lower() in pictures.SUFFIXES:
        return "picture"
    return "dicom" if dicom.is_dicom(path) else None


def _stem(path: Path, kind: str) -> str:
    return path.resolve().name if kind == "dicom" else nifti.stem(path)


def _tell_apart(cases: list[Case]) -> list[Case]:
    """Gives equal names within a folder their suffixes, then those of different folders their folders."""
    within = Counter((case.path.resolve().parent, _key(case)) for case in cases)
    cases = [
        replace(case, name=case.path.name.replace(".", "_"))
        if within[case.path.resolve().parent, _key(case)] > 1
        else case
        for case in cases
    ]
    level = 0
    while repeated := {key for key, count in Counter(map(_key, cases)).items() if count > 1}:
        cases = [_with_parent(case, level) if _key(case) in repeated else case for case in cases]
        level += 1
    return cases


def _with_parent(case: Case, level: int) -> Case:
    parents = case.path.resolve().parents
    return replace(case, name=f"{parents[level].name}_{case.name}") if level < len(parents) else case


def _key(case: Case) -> str:
    return case.name.casefold()  # some file systems do not tell cases apart
