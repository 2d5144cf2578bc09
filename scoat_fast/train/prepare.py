"""Volumes with masks to the folder of slices that training reads (see ``data.py``)."""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import BadInputError, ScoatFastError
from ..files import StagedFiles, make_folder, read_csv, write_csv
from ..imaging.nifti import SUFFIXES, read_nifti
from ..imaging.volume import Turn, Volume, check_hu, check_plane, mask_on_grid
from ..imaging.window import LUNG, Window
from ..segmentation.cases import Case, find_cases, read_volume
from .data import COLUMNS


@dataclass(frozen=True)
class Preparation:
    """Where volumes, their masks and the result lie, and which slices to take."""

    images: Sequence[Path]
    masks: Path
    output: Path
    lungs: Path | None = None
    patients: Path | None = None  # CSV with the columns volume, patient
    window: Window = LUNG
    empty_every: int = 1  # of the slices without opacity, take every so many
    quiet: bool = False


def prepare(what: Preparation) -> bool:
    """Writes images, masks and ``index.csv``; whether every volume could be used.

    A volume that cannot be used is named on standard error, and the others go on. Masks are NIfTI files with the
    names of the volumes, on the same grid up to the order and direction of its axes; any label counts as opacity.

    Raises:
        ScoatFastError: if the folder has an index already, or no volume could be used.
    """
    if (what.output / "index.csv").exists():
        raise ScoatFastError(f"{what.output} already holds an index.csv; prepare into another folder")
    kinds = ("images", "masks", "lungs")
    for folder in (what.output / kind for kind in kinds):
        if folder.is_dir() and any(folder.iterdir()):
            raise ScoatFastError(f"{folder} already holds files, without an index.csv: prepare into another folder")
    if what.empty_every < 1:
        raise ScoatFastError(f"--empty-every must be 1 or more, got {what.empty_every}")
    patients = _read_patients(what.patients) if what.patients else None
    cases, errors = find_cases(what.images, what.output)
    for kind in kinds:
        make_folder(what.output / kind)
    rows = []
    for case in tqdm(cases, unit="volume", disable=True if what.quiet else None):
        try:
            rows += _prepare(case, what, case.name if patients is None else _patient(what.patients, patients, case))
        except BadInputError as error:
            errors.append(error)
    for error in errors:
        with contextlib.suppress(OSError):  # nobody to read it
            print(f"scoat-fast: {error}", file=sys.stderr, flush=True)
    if not rows:
        raise ScoatFastError("no volume could be used")
    write_csv(what.output / "index.csv", COLUMNS, rows)
    return not errors


def _prepare(case: Case, what: Preparation, patient: str) -> list[dict]:
    """Writes the slices of one volume; their rows of the index."""
    if case.kind == "picture":
        raise BadInputError(case.path, "a volume is wanted (NIfTI or DICOM), not a picture")
    volume = read_volume(case)
    turn = Turn(volume.affine)
    hu = turn.to_slices(volume.voxels)
    check_plane(case.path, turn, hu.shape)
    check_hu(case.path, hu)
    folders = {"masks": what.masks} | ({"lungs": what.lungs} if what.lungs else {})
    masks = {
        kind: turn.to_slices(mask_on_grid(volume, _labels(folder, case.name), may_be_full=kind == "lungs"))
        for kind, folder in folders.items()
    }
    greys = (what.window.apply(hu) * 255).round().astype(np.uint8)
    opacity = masks["masks"].any(axis=(1, 2))
    empty = np.flatnonzero(~opacity)[:: what.empty_every]
    rows = []
    with StagedFiles() as files:
        for k in sorted([*np.flatnonzero(opacity), *empty]):
            id = f"{case.name}_z{k:03d}"
            paths = {kind: f"{kind}/{id}.png" for kind in ("images", *masks)}
            for kind, pixels in {"images": greys[k], **{kind: mask[k] for kind, mask in masks.items()}}.items():
                picture = _square_pixels(Image.fromarray(pixels), turn.spacing[1:])
                files.write(what.output / paths[kind], partial(picture.save, format="PNG"))
            rows.append(
                {
                    "id": id,
                    "set": "local",
                    "patient": patient,
                    "volume": case.name,
                    "slice": k,
                    "image": paths["images"],
                    "mask": paths["masks"],
                    "lung": paths.get("lungs", ""),
                    "opacity_fraction": f"{masks['masks'][k].mean():.6f}",
                    "window_low_hu": f"{what.window.low:g}",
                    "window_high_hu": f"{what.window.high:g}",
                }
            )
    return rows


def _labels(folder: Path, name: str) -> Volume:
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").exists():
            return read_nifti(folder / f"{name}{suffix}", labels=True)
    raise BadInputError(folder, f"no mask {name}.nii.gz or {name}.nii")


def _square_pixels(picture: Image.Image, spacing: tuple[float, float]) -> Image.Image:
    """Resized to the finer of the two spacings, where they differ: the index does not keep them."""
    if np.isclose(*spacing, rtol=1e-3):
        return picture
    finer = min(spacing)
    size = round(picture.width * spacing[1] / finer), round(picture.height * spacing[0] / finer)
    return picture.resize(size, Image.Resampling.NEAREST if picture.mode == "1" else Image.Resampling.BILINEAR)


def _patient(path: Path, patients: dict[str, str], case: Case) -> str:
    """The patient of a volume; slices of one patient must never be taken for those of two."""
    if not patients.get(case.name):
        raise BadInputError(case.path, f"{path} names no patient for the volume {case.name}")
    return patients[case.name]


def _read_patients(path: Path) -> dict[str, str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [tuple((row[name] or "").strip() for name in ("volume", "patient")) for row in read_csv(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInputError(path, f"cannot be read: {error}") from error
    except KeyError as error:
        raise BadInputError(path, f"lacks the column {error}") from error
    patients = dict(rows)
    for volume, patient in rows:
        if patients[volume] != patient:
            raise BadInputError(path, f"the volume {volume} has two patients, {patient} and {patients[volume]}")
    return patients
