"""A case as the network wants it: its slices, and what the writer of its results must know."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header

from ..errors import BadInputError
from ..imaging.nifti import read_nifti
from ..imaging.pictures import check_windowed, read_mask, read_picture
from ..imaging.volume import Turn, check_hu, check_plane, mask_on_grid
from ..imaging.window import Window
from .cases import Case, read_volume
from .inference import as_hu


@dataclass
class Read:
    """What is known of a case beside its slices, for the writer. ``turn`` and ``header`` are None for a picture."""

    case: Case
    turn: Turn | None
    header: Nifti1Header | None
    lung: np.ndarray | None  # [slices, H, W]
    warnings: list[str]
    made_from: dict = field(default_factory=dict)


def read_case(case: Case, lung: Path | None) -> tuple[Read, np.ndarray]:
    """A case with its lung mask, checked, and its slices: HU, or the grey values of a picture. Raises BadInputError."""
    return (_read_picture if case.kind == "picture" else _read_volume)(case, lung)


def _read_volume(case: Case, lung_path: Path | None) -> tuple[Read, np.ndarray]:
    """The facts of a volume, and its slices in HU."""
    volume = read_volume(case)
    turn = Turn(volume.affine)
    doubts = check_plane(case.path, turn, turn.to_slices(volume.voxels).shape)
    lung = None
    if lung_path is not None:  # a crop may lie within the lung
        lung = turn.to_slices(mask_on_grid(volume, read_nifti(lung_path, labels=True), may_be_full=True))
    slices = as_hu(turn.to_slices(volume.voxels))
    warnings = volume.warnings + doubts + check_hu(case.path, slices)
    return Read(case, turn, volume.header, lung, warnings), slices


def _read_picture(case: Case, lung_path: Path | None) -> tuple[Read, np.ndarray]:
    """The facts of a picture, and its grey values as one slice."""
    grey = read_picture(case.path)
    check_windowed(case.path, grey)
    lung = None
    if lung_path is not None:
        lung = read_mask(lung_path)[None]
        if lung.shape[1:] != grey.shape:
            wanted = f"a lung mask of {grey.shape} is wanted, as the picture"
            raise BadInputError(lung_path, f"{wanted}, got {lung.shape[1:]}")
    return Read(case, None, None, lung, []), grey[None]


def lung_path(case: Case, lung: Path) -> Path | None:
    """The lung mask of a case: the file that was given, or the one with the case's name in the folder."""
    if not lung.is_dir():
        return lung
    suffixes = (".png",) if case.kind == "picture" else (".nii.gz", ".nii")
    return next((path for suffix in suffixes if (path := lung / f"{case.name}{suffix}").exists()), None)


class Windowed:
    """The grey values of slices in HU, made one by one when they are looked at."""

    def __init__(self, slices: np.ndarray, window: Window):
        self._slices, self._window = slices, window

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, k: int) -> np.ndarray:
        return self._window.apply(self._slices[k].astype(np.float32))
