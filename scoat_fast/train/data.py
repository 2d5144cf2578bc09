"""A folder of slices with masks, and who is trained on.

The folder holds ``index.csv`` with the columns ``id, set, patient, volume, slice, image, mask, lung,
opacity_fraction, window_low_hu, window_high_hu``. ``image`` and ``mask`` (and ``lung``, which training does not
use) are paths of pictures in the folder, spine down; grey 0..255 spans ``window_low_hu..window_high_hu``, or what
the weights' own window spans where these are empty. A slice without ``patient`` is trained on, never validated.
"""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import BadInputError
from ..files import read_csv
from ..imaging.grid import SQUARE_PIXELS, to_square
from ..imaging.pictures import read_mask, read_picture
from ..imaging.window import Window

COLUMNS = (
    "id", "set", "patient", "volume", "slice", "image", "mask", "lung", "opacity_fraction",
    "window_low_hu", "window_high_hu",
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """One row of the index: where its pictures are, and the HU that its greys stand for, where known."""

    id: str
    patient: str
    image: Path
    mask: Path
    window: Window | None

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Grey values [H, W] in 0..1 for ``window``, float32, and the mask [H, W], bool. Raises BadInputError."""
        image, mask = read_picture(self.image), read_mask(self.mask)
        if image.shape != mask.shape:
            raise BadInputError(self.mask, f"a mask of {image.shape} is wanted, as its image has, got {mask.shape}")
        if self.window is not None and self.window != window:
            image = window.apply(self.window.invert(image))
        return image, mask


def read_index(folder: str | Path) -> list[Slice]:
    """The slices that ``index.csv`` lists, in its order. Raises BadInputError."""
    folder = Path(folder)
    path = folder / "index.csv"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = read_csv(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInputError(path, f"not a readable index of slices: {error}") from error
    if not rows:
        raise BadInputError(path, "lists no slices")
    missing = [column for column in COLUMNS if column not in rows[0]]
    if missing:
        raise BadInputError(path, f"lacks the columns {', '.join(missing)}")
    slices = [_slice(path, folder, row) for row in rows]
    if len({slice.id for slice in slices}) < len(slices):
        raise BadInputError(path, "lists an id twice")
    return slices


def _slice(index: Path, folder: Path, row: dict[str, str]) -> Slice:
    try:
        low, high = row["window_low_hu"], row["window_high_hu"]
        window = Window(float(low), float(high)) if low and high else None
    except (TypeError, ValueError) as error:
        raise BadInputError(index, f"slice {row['id']}: {error}") from error
    paths = []
    for column in ("image", "mask"):
        path = folder / (row[column] or "")
        if not path.is_file():
            raise BadInputError(index, f"slice {row['id']}: its {column} {row[column]!r} is not there")
        paths.append(path)
    if not can_name_a_file(row["id"]):
        raise BadInputError(index, f"slice {row['id']!r}: an id is wanted that can be the name of a file")
    return Slice(row["id"], (row["patient"] or "").strip(), *paths, window)


def can_name_a_file(text: str) -> bool:
    """Without leading out of the file's folder."""
    return Path(text).name == text


def data_digest(folder: str | Path, slices: Sequence[Slice]) -> str:
    """Of the index and of the pictures of some of its slices. Raises BadInputError."""
    return digest([Path(folder) / "index.csv", *(path for slice in slices for path in (slice.image, slice.mask))])


def digest(paths: Sequence[Path]) -> str:
    """One digest of the contents of several files, in their order. Raises BadInputError."""
    whole = hashlib.sha256()
    for path in paths:
        try:
            whole.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise BadInputError(path, f"cannot be read: {error.strerror}") from error
    return whole.hexdigest()


def of_patients(slices: Sequence[Slice], patients: Sequence[str]) -> list[Slice]:
    """The slices of these patients. Raises ValueError for a patient that is not there."""
    known = {slice.patient for slice in slices if slice.patient}
    unknown = sorted({*patients} - known)
    if unknown:
        raise ValueError(f"no slices of patient {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [slice for slice in slices if slice.patient in {*patients}]


def split(
    slices: Sequence[Slice], validate: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[Slice], list[Slice]]:
    """Training and validation slices, by patient. Raises ValueError for patients that are not there, or in both."""
    both = sorted({*validate} & {*exclude})
    if both:
        raise ValueError(f"patient {', '.join(both)} cannot be both validated on and excluded")
    left_out = {slice.id for slice in of_patients(slices, [*validate, *exclude])}
    train = [slice for slice in slices if slice.id not in left_out]
    if not train:
        raise ValueError("no slices are left to train on")
    return train, of_patients(slices, validate)


def fold_patients(slices: Sequence[Slice], fold: int, folds: int, seed: int, exclude: Sequence[str] = ()) -> list[str]:
    """The patients of one of ``folds`` parts (counted from 0), each patient being in exactly one."""
    patients = sorted({slice.patient for slice in slices if slice.patient} - {*exclude})
    if not 0 <= fold < folds <= len(patients):
        raise ValueError(f"fold {fold + 1}/{folds} is wanted, but there are only {len(patients)} patients")
    random.Random(seed).shuffle(patients)
    return sorted(patients[fold::folds])


def load(slices: Sequence[Slice], size: int, window: Window, quiet: bool = False) -> tuple[Tensor, Tensor]:
    """Images and masks [N, 1, size, size] as uint8: greys 0..255, and 0 or 1. Raises BadInputError.

    Everything stays in memory: 2 * N * size**2 bytes.
    """
    images, masks = (torch.empty(len(slices), 1, size, size, dtype=torch.uint8) for _ in range(2))

    def one(k: int) -> None:
        image, mask = slices[k].read(window)
        both = torch.from_numpy(np.stack([image, mask.astype(np.float32)]))[None]
        both = to_square(both, SQUARE_PIXELS, size)[0]
        images[k], masks[k] = (both[:1] * 255).round(), both[1:] > 0.5

    with ThreadPoolExecutor() as pool:
        done = pool.map(one, range(len(slices)))
        for _ in tqdm(done, "slices", len(slices), disable=True if quiet else None, leave=False):
            pass
    return images, masks
