"""Kills a run right after each of its renames, and one over 40 cases at random moments, until started again it is done.

python tests/kill_cohort.py [KILLS]      # at random moments; 200 by default

Each result that is ever there has to be whole, and in the end all bytes those of a run that nobody disturbed.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads would not survive the fork

import nibabel as nib
import numpy as np
import torch
from conftest import ASYMMETRIC

from scoat_fast import SCOATNet
from scoat_fast.pretrained import Pretrained
from scoat_fast.segmentation.inference import Segmenter
from scoat_fast.segmentation.pipeline import Options, segment_files

CASES, LONGEST = 40, 0.6  # seconds until a kill


def make_cohort(folder: Path, cases: int = CASES) -> tuple[Path, Segmenter]:
    """Small volumes that differ, and a network that is ready: kills shall hit the work, not its beginning."""
    torch.manual_seed(7)
    net = SCOATNet(width=3)
    net.pretrained = Pretrained("test", size=32)
    scans = folder / "scans"
    scans.mkdir(parents=True)
    random = np.random.default_rng(3)
    for k in range(cases):
        hu = random.normal(-700, 300, (20, 18, 2 + k % 3)).clip(-1000, 300)
        hu[4:9, 4:9] = 40
        nib.save(nib.Nifti1Image(hu.astype(np.int16), ASYMMETRIC), scans / f"case{k:02}.nii.gz")
    return scans, Segmenter(net, "cpu")


def start(
    scans: Path, segmenter: Segmenter, output: Path, renames: int | None = None, threshold: float | None = None
) -> int:
    """A run in a process of its own, which kills itself right after so many renames; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            if renames is not None:
                die_after(renames)
            done = segment_files([scans], output, segmenter, Options(threshold, quiet=True))
            code = 0 if done.all_well else 1
        finally:
            os._exit(code)
    return child


def die_after(renames: int) -> None:
    """Kills this process right after so many renames."""
    replace, count = os.replace, itertools.count(1)

    def deadly(*paths) -> None:
        replace(*paths)
        if next(count) == renames:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly


def end(child: int) -> int:
    """Waits for the end of a run; its status."""
    return os.waitpid(child, 0)[1]


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if not path.name.endswith(".part")}


def check_whole(output: Path, expected: dict[str, bytes]) -> dict[str, bytes]:
    """What is there after a kill: whole files, and reports that say that theirs are not all there."""
    there = contents(output) if output.exists() else {}
    for name, data in there.items():
        unfinished = name.endswith(".json") and json.loads(data).get("unfinished")
        assert unfinished or data == expected[name] or name == "cases.csv", f"{name} is not whole"
    return there


def check_renames(folder: Path) -> int:
    """Kills a run after each of its renames; their number. Raises AssertionError."""
    scans, segmenter = make_cohort(folder / "cohort", cases=1)
    whole, output, expected = folder / "whole", folder / "killed", {}
    for threshold in (0.5, 0.4):
        assert end(start(scans, segmenter, whole, threshold=threshold)) == 0
        expected[threshold] = contents(whole)
    assert expected[0.5]["case00.json"] != expected[0.4]["case00.json"]
    for renames in itertools.count(1):
        shutil.rmtree(output, ignore_errors=True)
        status = end(start(scans, segmenter, output, renames, 0.5))
        if status == 0:
            return renames - 1
        assert os.WIFSIGNALED(status)
        check_whole(output, expected[0.5])
        for threshold in (0.5, 0.4):  # of results that were half replaced, none are taken for the wrong ones
            assert end(start(scans, segmenter, output, threshold=0.5)) == 0, f"locked out after {renames} renames"
            assert contents(output) == expected[0.5]
            assert os.WIFSIGNALED(end(start(scans, segmenter, output, renames, 0.4)))
            assert end(start(scans, segmenter, output, threshold=threshold)) == 0
            assert contents(output) == expected[threshold]
    raise AssertionError("it ends")


def check(kills: int, folder: Path, seed: int = 0) -> int:
    """Kills ``kills`` times; the number of runs that came to their end. Raises AssertionError."""
    scans, segmenter = make_cohort(folder / "cohort")
    whole = folder / "whole"
    assert end(start(scans, segmenter, whole)) == 0
    expected, moments, done, finished = contents(whole), random.Random(seed), 0, 0
    assert len(expected) == 3 * CASES + 1
    output = folder / "killed"
    while done < kills:
        child = start(scans, segmenter, output)
        time.sleep(moments.uniform(0, LONGEST))
        os.kill(child, signal.SIGKILL)
        status = end(child)
        if os.WIFSIGNALED(status):
            done += 1
        else:
            assert status == 0, status
        there = check_whole(output, expected)
        if not os.WIFSIGNALED(status):
            assert there == expected, set(expected) ^ set(there)
            assert not list(output.glob(".*.part"))
            shutil.rmtree(output)
            finished += 1
    assert end(start(scans, segmenter, output)) == 0
    assert contents(output) == expected
    return finished + 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 200
        renames = check_renames(Path(scratch) / "renames")
        done = check(wanted, Path(scratch) / "random")
        print(f"{renames} renames and {wanted} kills, {done} runs done, all results whole and equal")
