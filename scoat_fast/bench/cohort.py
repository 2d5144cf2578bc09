"""A cohort end to end, from files to files, beside the engine's own speed and a plain loop over the same scans.

What has another answer than the plain loop gets no number.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from ..errors import BadInputError, ScoatFastError
from ..imaging.grid import from_square, to_square
from ..imaging.nifti import read_nifti, stem
from ..imaging.volume import Turn
from ..segmentation.inference import Segmenter
from ..segmentation.pipeline import Options, segment_files
from .contenders import baseline_of
from .machine import facts, save

DICE = 0.995  # of the pipeline's masks with the loop's; they resize with other bits, and a GPU computes in bfloat16
ENOUGH = 100  # cases of a round, to say how memory grows
SAMPLED = 0.05  # seconds between two looks at the process's memory
MIB = 1 << 20


def run(
    scans: Sequence[Path],
    weights: str | Path,
    device: str,
    copies: int,
    rounds: int = 5,
    seconds: float = 5.0,
    commit: str = "",
    output: Path | None = None,
) -> dict:
    """Measures, prints and writes ``output``.

    Args:
        scans: NIfTI volumes, each of which stands for ``copies`` cases, or some more so that rounds are equal.
        rounds: in which cohort, engine and loop take turns; a machine may be faster at one time than at another.
        seconds: for the engine alone.

    Returns:
        What the file holds: the machine, ``cases``, ``slices``, ``shape`` and the network's ``size``, and ``rows`` with
        ``name, slices_per_s, reason``; that of the cohort also has ``share_of_engine``, ``ratio_to_loop``,
        ``waited_for_reading`` and ``waited_for_writing`` (shares of the time that the engine stood still for),
        ``peak_mib`` and ``mib_per_100_cases`` of the last round (how the memory grows; null in rounds of fewer than
        a hundred).
    """
    segmenter = Segmenter(weights, device)
    where = segmenter.stream.device
    engine, cohort, loop, memory = _Pace(), _Pace(), _Pace(), _Memory()
    both = marked = 0
    read = written = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for k in range(rounds):
            cases = _copy(scans, Path(scratch) / f"cohort{k}", -(-copies // rounds))
            results = Path(scratch) / f"results{k}"
            engine.add(*_run_engine(segmenter, seconds / rounds))
            with memory if k == rounds - 1 else contextlib.nullcontext():
                summary = segment_files(cases, results, segmenter, Options(quiet=True))
            if not summary.all_well:
                failed = next(row for row in summary.rows if row["status"] != "ok")
                raise ScoatFastError(f"{failed['input']}: {failed['error']}")
            cohort.add(summary.slices, summary.seconds)
            read, written = read + summary.waited_for_reading, written + summary.waited_for_writing
            masks, *pace = _plain_loop(cases[: len(scans)], segmenter, where)
            loop.add(*pace)
            for path, theirs in masks.items():
                ours = np.asarray(nib.load(results / f"{stem(path)}_mask.nii.gz").dataobj).astype(bool)
                both, marked = both + int((ours & theirs).sum()), marked + int(ours.sum() + theirs.sum())
        shape = list(read_nifti(cases[0]).voxels.shape)
    dice = 2 * both / marked if marked else 1.0
    reason = None if dice >= DICE else f"its masks overlap with the loop's by a Dice of {dice:.4f}, wanted is {DICE}"
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
        "shape": shape,
        "size": segmenter.pretrained.size,
        "batch": segmenter.stream.batch_size,
        "rows": [
            row,
            {"name": "the engine alone", "slices_per_s": engine.speed, "reason": None},
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
        f"batches of {result['batch']}",
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
