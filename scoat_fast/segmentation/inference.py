"""From Hounsfield units to probabilities and masks, in memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..errors import BadInputError, ScoatFastError
from ..imaging.volume import Turn, check_affine, check_hu, check_mask, check_plane
from ..imaging.window import Window
from ..model import SCOATNet
from .lungs import find_lungs, given_lungs
from .statistics import check_min_mm3, measure, remove_small
from .stream import Job, Stream

DEFAULT_WEIGHTS = "scoat-w16"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Segmentation:
    """What was found in one volume, on the volume's own grid and in its axis order.

    ``mask``: uint8, 0 or 1. ``probabilities``: float32 in 0..1. ``attention``: name to map in 0..1, where asked for.
    ``statistics``: see ``statistics.measure``. ``lungs``: uint8, 1 in the right and 2 in the left one, as given or as
    found by thresholds (see ``lungs.find_lungs``); None where there are none.
    """

    mask: np.ndarray
    probabilities: np.ndarray
    statistics: dict
    warnings: list[str]
    attention: dict[str, np.ndarray]
    lungs: np.ndarray | None

    def __iter__(self) -> Iterator[np.ndarray | dict]:
        """``mask, probabilities, statistics = segment(...)``."""
        yield from (self.mask, self.probabilities, self.statistics)


class Segmenter:
    """A trained network on a device, ready for many volumes.

    Args:
        weights: the name of shipped weights, the path of a weights file, or a network with ``pretrained`` facts.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        batch_size: slices at once, or "auto". A batch that does not fit in the GPU's memory is halved.
        dtype: "float32", "bfloat16", "float16", or "auto" (bfloat16 on GPUs that have it, float32 elsewhere). The
            network runs in an engine of it (see ``scoat_fast.compile``); bfloat16 is fast on CPUs with AMX, too.

    Raises:
        WeightsError: if the weights cannot be used.
        ScoatFastError: if the device is not there, or for a batch size or dtype of another kind.
    """

    def __init__(
        self,
        weights: str | Path | SCOATNet = DEFAULT_WEIGHTS,
        device: str = "auto",
        batch_size: int | str = "auto",
        dtype: str = "auto",
    ):
        # a copy: whoever passes a network wants it back as it was
        net = copy.deepcopy(weights) if isinstance(weights, SCOATNet) else SCOATNet.from_pretrained(weights)
        if getattr(net, "pretrained", None) is None:
            raise ScoatFastError(
                "a network needs pretrained facts (window, size, threshold): see SCOATNet.from_pretrained"
            )
        if batch_size != "auto" and int(batch_size) < 1:
            raise ScoatFastError(f"the batch size must be at least 1, got {batch_size}")
        if dtype not in DTYPES:
            raise ScoatFastError(f"the dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        self.pretrained, self.window = net.pretrained, Window(*net.pretrained.window)
        most = None if batch_size == "auto" else int(batch_size)
        exactly = None if dtype == "auto" else getattr(torch, dtype)
        self.stream = Stream(net.float().eval(), find_device(device), most, exactly)

    def segment(
        self,
        volume_hu: np.ndarray,
        spacing: Sequence[float] | None = None,
        *,
        affine: np.ndarray | None = None,
        lung: np.ndarray | None = None,
        threshold: float | None = None,
        min_mm3: float = 0.0,
        attention: bool = False,
        name: str = "volume",
        quiet: bool = True,
    ) -> Segmentation:
        """Segments one CT volume; see ``scoat_fast.segment``."""
        check_min_mm3(min_mm3)
        volume_hu = np.asarray(volume_hu)
        turn = _turn(name, volume_hu, spacing, affine)
        warnings = check_plane(name, turn, turn.to_slices(volume_hu).shape)
        hu = as_hu(turn.to_slices(volume_hu))
        warnings += check_hu(name, hu)
        if lung is not None:
            lung = turn.to_slices(_checked_lung(name, np.asarray(lung), volume_hu))
        job = Job(hu, turn.spacing[1:], self.threshold(threshold), keeps_probabilities=True)
        self._finish(job, attention, quiet)
        mask = remove_small(job.mask, turn.voxel_mm3, min_mm3)
        lungs = find_lungs(hu, mask, turn.spacing) if lung is None else given_lungs(lung, hu)

        def back(slices: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(turn.from_slices(slices))

        return Segmentation(
            back(mask),
            back(job.probabilities),
            measure(mask, hu, turn.voxel_mm3, lungs.labels) | {"lung_mask": lungs.source},
            warnings + lungs.warnings,
            {key: back(found) for key, found in job.attention.items()},
            None if lungs.labels is None else back(lungs.labels),
        )

    def threshold(self, wanted: float | None) -> float:
        """The threshold of the probability: the given one, or that of the weights."""
        chosen = self.pretrained.threshold if wanted is None else float(wanted)
        if not 0 < chosen < 1:
            raise ScoatFastError(f"the threshold must lie between 0 and 1, got {chosen:g}")
        return chosen

    def mask(self, slices: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
        """The mask, uint8, of windowed slices [N, H, W] in 0..1, at the threshold of the weights."""
        job = Job(slices, spacing, self.threshold(None), windowed=True)
        self._finish(job)
        return job.mask

    def _finish(self, job: Job, attention: bool = False, quiet: bool = True) -> None:
        """Runs a job alone. Raises what it failed with."""
        with tqdm(total=len(job.slices), unit="slice", leave=False, disable=True if quiet else None) as bar:
            next(self.stream.run([job], attention, bar.update))
        if job.error is not None:
            raise job.error


def segment(
    volume_hu: np.ndarray,
    spacing: Sequence[float] | None = None,
    *,
    affine: np.ndarray | None = None,
    weights: str | Path | SCOATNet = DEFAULT_WEIGHTS,
    device: str = "auto",
    batch_size: int | str = "auto",
    dtype: str = "auto",
    lung: np.ndarray | None = None,
    threshold: float | None = None,
    min_mm3: float = 0.0,
    attention: bool = False,
) -> Segmentation:
    """Segments lung opacification in one CT volume.

    Args:
        volume_hu: [slices, rows, columns] in Hounsfield units, any real dtype; each slice as a radiologist sees it,
            spine down and the patient's right on the left. With ``affine``, any axes in any order.
        spacing: mm between slices, rows and columns. Not wanted with ``affine``.
        affine: [4, 4], from indices to right-anterior-superior mm, as nibabel and NIfTI have it.
        weights, device, batch_size, dtype: see ``Segmenter``, which is faster for more than one volume.
        lung: the lungs on the same grid; without, they are found by thresholds.
        threshold: of the probability, instead of the weights' own.
        min_mm3: leave out connected regions smaller than this.
        attention: also return the six attention maps of the paper's equation 1, on the grid of the volume.

    Raises:
        BadInputError: if the volume has NaN, is constant or is not a chest CT in HU, or its geometry is not usable.
    """
    segmenter = Segmenter(weights, device, batch_size, dtype)
    return segmenter.segment(
        volume_hu, spacing, affine=affine, lung=lung, threshold=threshold, min_mm3=min_mm3, attention=attention
    )


def find_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means here. Raises ScoatFastError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ScoatFastError(f"device auto, cpu, cuda or cuda:N is wanted, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"this PyTorch ({torch.__version__}) sees {torch.cuda.device_count()} CUDA GPUs"
        raise ScoatFastError(f"device {name} is not there: {seen}")
    return device


def _turn(name: str, volume: np.ndarray, spacing: Sequence[float] | None, affine: np.ndarray | None) -> Turn:
    if volume.ndim != 3 or 0 in volume.shape:
        raise BadInputError(name, f"three dimensions are wanted, got {volume.shape}")
    if volume.dtype.kind not in "iuf":
        raise BadInputError(name, f"voxels are wanted that are numbers, got {volume.dtype}")
    if (spacing is None) == (affine is None):
        raise ValueError("segment wants either the spacing in mm or the affine")
    if affine is None:
        mm = np.asarray(spacing, dtype=float)
        if mm.shape != (3,) or not np.isfinite(mm).all() or mm.min() <= 0:
            raise BadInputError(name, f"a spacing of three positive mm is wanted, got {spacing}")
        if volume.shape[0] == volume.shape[1] != volume.shape[2] and mm[0] == mm[1] != mm[2]:
            raise BadInputError(
                name,
                f"slices are wanted along the first axis; shape {volume.shape} and spacing {tuple(mm)} look as if they "
                "lay along the last: pass affine=, or transpose the volume",
            )
        # slices to the head, rows to the back, columns to the left
        affine = np.array([[0, 0, -mm[2], 0], [0, -mm[1], 0, 0], [mm[0], 0, 0, 0], [0, 0, 0, 1]])
    affine = np.asarray(affine, dtype=float)
    check_affine(name, affine)
    return Turn(affine)


def _checked_lung(name: str, lung: np.ndarray, volume: np.ndarray) -> np.ndarray:
    if lung.shape != volume.shape:
        raise BadInputError(name, f"a lung mask of {volume.shape} is wanted, as the volume has, got {lung.shape}")
    check_mask(name, lung, may_be_full=True)  # a crop may lie within the lung
    return lung


def as_hu(slices: np.ndarray) -> np.ndarray:
    """Voxels as int16 where that holds the same numbers, else as float32: contiguous, writable, in the machine's byte
    order. Scanners store whole numbers, and half of the bytes are to be moved.
    """
    if slices.dtype.kind == "i" and slices.itemsize == 2:
        return np.require(slices, np.int16, ["C", "W"])
    with np.errstate(over="ignore", invalid="ignore"):  # what is or becomes infinite is refused where HU are checked
        voxels = np.require(slices, np.float32, ["C", "W"])
        whole = np.empty(voxels.shape, np.int16)
        for image, kept in zip(voxels, whole, strict=True):
            kept[:] = image
            if (kept != image).any():
                return voxels
    return whole
