"""A cohort end to end, from files to files, beside the engine's own speed, what the host can do where the network
costs nothing, and a plain loop over the same scans.

What has another answer than the plain loop gets no number.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from ..errors import BadInputError, ScoatFastError
from ..files import check_output
from ..imaging.grid import from_square, to_square
from ..imaging.nifti import read_nifti, stem
from ..imaging.volume import Turn
from ..model import SCOATNet
from ..pretrained import Pretrained
from ..segmentation.inference import Segmenter
from ..segmentation.pipeline import Options, Summary, segment_files
from ..segmentation.stream import Job, Stream
from .contenders import baseline_of
from .machine import facts, save

DICE = 0.995  # of the pipeline's masks with the loop's, which resizes with other bits
ROUNDED_DICE = 0.98  # of an engine in 16 bits; stock PyTorch in bfloat16 has 0.9915 on examples/ct.nii.gz
ENOUGH = 100  # cases of a round, to say how memory grows; and at most so many to say what the host alone can do
SAMPLED = 0.05  # seconds between two looks at the process's memory
NOISE = 12.0  # HU, standard deviation: without, volumes that were made larger would pack too well
MIB = 1 << 20


def run(
    scans: Sequence[Path],
    weights: str | Path | SCOATNet,
    device: str,
    copies: int,
    rounds: int = 5,
    seconds: float = 5.0,
    commit: str = "",
    output: Path | None = None,
    shape: tuple[int, int, int] | None = None,
    threads: int | None = None,
    dtype: str = "auto",
) -> dict:
    """Measures, prints and writes ``output``.

    Args:
        scans: NIfTI volumes, each of which stands for ``copies`` cases, or some more so that rounds are equal.
        rounds: in which cohort, engine and loop take turns; a machine may be faster at one time than at another.
        seconds: for the engine alone.
        shape: voxels [I, J, K] that each scan is resampled to first.
        threads: see ``Options``.
        dtype: see ``Segmenter``.

    Returns:
        What the file holds: the machine, ``cases``, ``slices``, ``shape``, the network's ``size`` and ``dtype``, and
        ``rows`` with ``name, slices_per_s, reason``: the cohort, the engine, the host and the loop. That of the cohort
        also has ``share_of_engine``, ``ratio_to_loop``, ``waited_for_reading`` and ``waited_for_writing`` (shares of
        the time that the engine stood still for), ``peak_mib`` and ``mib_per_100_cases`` of the last round (how the
        memory grows; null in rounds of fewer than a hundred).
    """
    if output is not None:
        check_output(output)
    segmenter = Segmenter(weights, device, dtype=dtype)
    where = segmenter.stream.device
    engine, cohort, host, loop, memory = _Pace(), _Pace(), _Pace(), _Pace(), _Memory()
    options = Options(quiet=True, threads=threads)
    idle = copy.copy(segmenter)
    idle.stream = _Free(segmenter.stream)
    both = marked = 0
    read = written = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        if shape is not None:
            scans = [_resample(scan, shape, Path(scratch)) for scan in scans]
        for k in range(rounds):
            cases = _copy(scans, Path(scratch) / f"cohort{k}", -(-copies // rounds))
            results = Path(scratch) / f"results{k}"
            engine.add(*_run_engine(segmenter, seconds / rounds))
            with memory if k == rounds - 1 else contextlib.nullcontext():
                summary = _well(segment_files(cases, results, segmenter, options))
            cohort.add(summary.slices, summary.seconds)
            read, written = read + summary.waited_for_reading, written + summary.waited_for_writing
            masks, *pace = _plain_loop(cases[: len(scans)], segmenter, where)
            loop.add(*pace)
            alone = _well(segment_files(cases[:ENOUGH], Path(scratch) / f"host{k}", idle, options))
            host.add(alone.slices, alone.seconds)
            for path, theirs in masks.items():
                ours = np.asarray(nib.load(results / f"{stem(path)}_mask.nii.gz").dataobj).astype(bool)
                both, marked = both + int((ours & theirs).sum()), marked + int(ours.sum() + theirs.sum())
            if k < rounds - 1:  # a disk may not hold all of them
                for folder in (cases[0].parent, results, Path(scratch) / f"host{k}"):
                    shutil.rmtree(folder)
        found = list(read_nifti(cases[0]).voxels.shape)
    dice = 2 * both / marked if marked else 1.0
    exactly = segmenter.stream.engine.dtype
    wanted = DICE if exactly == torch.float32 else ROUNDED_DICE
    reason = (
        None if dice >= wanted else f"its masks overlap with the loop's by a Dice of {dice:.4f}, wanted is {wanted}"
    )
    cases_done = rounds * len(cases)
    row = {
        "name": "scoat-fast segment",
        "slices_per_s": cohort.speed,
        "share_of_engine": cohort.speed / engine.speed,
        "ratio_to_loop": cohort.speed / loop.speed,
        "waited_for_reading": read / cohort.seconds,
        "waited_for_writing": written / cohort.seconds,
        "peak_mib": memory.peak / MIB,
        "mib_per_100_cases": memory.growth / MIB * 100 / len(cases) if len(cases) >= ENOUGH else None,
        "dice": dice,
        "reason": reason,
    }
    if reason is not None:
        row |= dict.fromkeys(("slices_per_s", "share_of_engine", "ratio_to_loop"))
    result = {
        **facts(where, commit),
        "cases": cases_done,
        "slices": cohort.slices,
        "shape": found,
        "size": segmenter.pretrained.size,
        "dtype": str(exactly).removeprefix("torch."),
        "batch": segmenter.stream.batch_size,
        "rows": [
            row,
            {"name": "the engine alone", "slices_per_s": engine.speed, "reason": None},
            {"name": "the host alone", "slices_per_s": host.speed, "reason": None},
            {"name": "nibabel, eager PyTorch, nibabel", "slices_per_s": loop.speed, "reason": None},
        ],
    }
    print(text(result))
    if output is not None:
        save(output, result)
    return result


def text(result: dict) -> str:
    """The numbers on a page."""
    cohort = result["rows"][0]
    lines = [
        f"{result['gpu'] or 'CPU ' + result['cpu']}; commit {result['commit'] or 'unknown'}, {result['date']}",
        f"{result['cases']} cases of {' x '.join(map(str, result['shape']))}, network at {result['size']}, "
        f"{result['dtype']}, batches of {result['batch']}",
    ]
    for row in result["rows"]:
        number = f"no number: {row['reason']}" if row["reason"] else f"{row['slices_per_s']:.2f} slices/s"
        lines.append(f"{row['name']:34}{number}")
    if cohort["reason"] is None:
        lines.append(f"{cohort['share_of_engine']:.0%} of the engine, {cohort['ratio_to_loop']:.2f} times the loop")
    per_100 = cohort["mib_per_100_cases"]
    growth = "" if per_100 is None else f", {per_100:+.2f} MiB in 100 cases"
    lines += [
        f"the engine stood still {cohort['waited_for_reading']:.1%} of the time for reading, "
        f"{cohort['waited_for_writing']:.1%} for writing",
        f"memory: {cohort['peak_mib']:.0f} MiB at most{growth}",
    ]
    return "\n".join(lines)


def untrained(width: int, size: int) -> SCOATNet:
    """A network that costs what a trained one does."""
    torch.manual_seed(0)
    net = SCOATNet(width=width).eval()
    net.pretrained = Pretrained(f"untrained, width {width}", size=size)
    return net


class _Free(Stream):
    """Stands in for a stream: answers at once, with the same block in each slice."""

    def __init__(self, stream: Stream):
        self.net, self.device, self.engine = stream.net, stream.device, stream.engine
        self.batch_size = stream.batch_size

    def run(
        self, jobs: Iterable[Job], attention: bool = False, progress: Callable[[int], object] = lambda slices: None
    ) -> Iterator[Job]:
        for job in jobs:
            count, height, width = job.mask.shape
            job.mask[:] = 0
            job.mask[:, height // 2 : height // 2 + height // 6, width // 5 : width // 5 + width // 6] = 1
            job.answered = count
            progress(count)
            yield job


def _well(summary: Summary) -> Summary:
    """Raises ScoatFastError where a case failed."""
    for row in summary.rows:
        if row["status"] != "ok":
            raise ScoatFastError(f"{row['input']}: {row['error']}")
    return summary


def _resample(scan: Path, shape: tuple[int, int, int], folder: Path) -> Path:
    """A scan of another shape that covers the same, with noise as a scanner's."""
    volume = read_nifti(scan)
    smooth = F.interpolate(torch.from_numpy(volume.voxels.astype(np.float32))[None, None], shape, mode="trilinear")
    noise = np.random.default_rng(0).normal(0, NOISE, shape).astype(np.float32)
    voxels = (smooth[0, 0].numpy() + noise).round().clip(-1024, 3071).astype(np.int16)
    larger = np.array(volume.voxels.shape) / shape
    place = folder / f"{stem(scan)}.nii.gz"
    nib.save(nib.Nifti1Image(voxels, volume.affine @ np.diag([*larger, 1.0])), place)
    return place


def _copy(scans: Sequence[Path], folder: Path, copies: int) -> list[Path]:
    """The cohort: files of their own, so that each is read."""
    folder.mkdir()
    made = []
    for k in range(copies):
        for scan in scans:
            suffix = scan.name[len(stem(scan)) :]
            try:
                made.append(Path(shutil.copy(scan, folder / f"{stem(scan)}_{k:05}{suffix}")))
            except OSError as error:
                raise BadInputError(scan, f"cannot be copied: {error.strerror}") from error
    return made


@dataclass
class _Pace:
    slices: int = 0
    seconds: float = 0.0

    def add(self, slices: int, seconds: float) -> None:
        self.slices, self.seconds = self.slices + slices, self.seconds + seconds

    @property
    def speed(self) -> float:
        return self.slices / self.seconds


def _run_engine(segmenter: Segmenter, seconds: float) -> tuple[int, float]:
    """Slices and seconds of the engine alone, batch after batch, with its input on the device."""
    stream, size = segmenter.stream, segmenter.pretrained.size
    batch = torch.rand(stream.batch_size, stream.net.in_channels, size, size, device=stream.device)
    stream.engine(batch)
    answered, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds or not answered:
        for _ in range(8):
            stream.engine(batch)
            answered += len(batch)
        if stream.device.type == "cuda":
            torch.cuda.synchronize(stream.device)
    return answered, time.perf_counter() - began


@torch.inference_mode()
def _plain_loop(
    cases: Sequence[Path], segmenter: Segmenter, device: torch.device
) -> tuple[dict[Path, np.ndarray], int, float]:
    """The masks of what a script would do, and its slices and seconds; it writes beside the cases."""
    net = baseline_of(segmenter.stream.net).to(device)
    threshold, size, at_once = segmenter.threshold(None), segmenter.pretrained.size, segmenter.stream.batch_size
    masks, slices, began = {}, 0, time.perf_counter()
    for path in cases:
        image = nib.load(path)
        turn = Turn(image.affine)
        hu = np.ascontiguousarray(turn.to_slices(image.get_fdata(dtype=np.float32)))
        found = []
        for batch in torch.from_numpy(segmenter.window.apply(hu))[:, None].split(at_once):
            squares = to_square(batch.to(device), turn.spacing[1:], size)
            probabilities = from_square(net(squares).sigmoid(), hu.shape[1:], turn.spacing[1:])
            found.append((probabilities[:, 0] > threshold).to(torch.uint8).cpu().numpy())
        mask = turn.from_slices(np.concatenate(found))
        nib.save(nib.Nifti1Image(mask, image.affine), path.with_name(f"loop_{path.name}"))
        masks[path], slices = mask.astype(bool), slices + len(hu)
    return masks, slices, time.perf_counter() - began


class _Memory:
    """Looks at the resident memory of this process while its ``with`` blocks run.

    ``peak``: the most there was, in bytes. ``growth``: what the last quarter holds more than the second, by their
    medians, brought to the length of the whole.
    """

    def __init__(self) -> None:
        self._seen: list[int] = []

    def __enter__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self._seen.append(_resident())
            if self._done.wait(SAMPLED):
                return

    @property
    def peak(self) -> int:
        return max(self._seen)

    @property
    def growth(self) -> float:
        quarters = np.array_split(np.array(self._seen, float), 4)
        return 2 * (np.median(quarters[3]) - np.median(quarters[1])) if len(self._seen) >= 8 else 0.0


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
