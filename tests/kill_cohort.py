"""Kills a run over 40 cases at random moments, starts it again until it is done, and compares the results.

python tests/kill_cohort.py [KILLS]      # 200 by default

Each result that is ever there has to be whole, and in the end all bytes those of a run that nobody disturbed.
"""

from __future__ import annotations

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
from scoat_fast.cli import main
from scoat_fast.pretrained import Pretrained, save

CASES, LONGEST = 40, 0.6  # seconds until a kill


def make_cohort(folder: Path) -> tuple[Path, Path]:
    """Forty small volumes that differ, and weights."""
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    save(SCOATNet(width=3), folder / "w.safetensors", Pretrained("test", size=32))
    scans = folder / "scans"
    scans.mkdir()
    random = np.random.default_rng(3)
    for k in range(CASES):
        hu = random.normal(-700, 300, (20, 18, 2 + k % 3)).clip(-1000, 300)
        hu[4:9, 4:9] = 40
        nib.save(nib.Nifti1Image(hu.astype(np.int16), ASYMMETRIC), scans / f"case{k:02}.nii.gz")
    return scans, folder / "w.safetensors"


def start(scans: Path, weights: Path, output: Path) -> int:
    """A run in a process of its own; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = main(["segment", str(scans), "-o", str(output), "--weights", str(weights), "--quiet"])
        finally:
            os._exit(code)
    return child


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if not path.name.endswith(".part")}


def check(kills: int, folder: Path, seed: int = 0) -> int:
    """Kills ``kills`` times; the number of runs that came to their end. Raises AssertionError."""
    scans, weights = make_cohort(folder / "cohort")
    whole = folder / "whole"
    assert os.waitpid(start(scans, weights, whole), 0)[1] == 0
    expected, moments, done, finished = contents(whole), random.Random(seed), 0, 0
    assert len(expected) == 3 * CASES + 1
    output = folder / "killed"
    while done < kills:
        child = start(scans, weights, output)
        time.sleep(moments.uniform(0, LONGEST))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            done += 1
        else:
            assert status == 0, status
        there = contents(output) if output.exists() else {}
        for name, data in there.items():
            assert data == expected[name] or name == "cases.csv", f"{name} is not whole after {done} kills"
        if not os.WIFSIGNALED(status):
            assert there == expected, set(expected) ^ set(there)
            assert not list(output.glob(".*.part"))
            shutil.rmtree(output)
            finished += 1
    assert os.waitpid(start(scans, weights, output), 0)[1] == 0
    assert contents(output) == expected
    return finished + 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 200
        print(f"{wanted} kills, {check(wanted, Path(scratch))} runs done, all results whole and equal")
