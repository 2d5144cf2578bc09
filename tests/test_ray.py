"""The segment command on Ray: workers that die cost nothing but time, and a case that ends them only itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ASYMMETRIC
from test_cohort import files_of
from test_segment import rows_of, run

from scoat_fast.cli import EXIT_FAILED_CASES, EXIT_OK, EXIT_USAGE
from scoat_fast.segmentation import on_ray

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs of this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=on_ray.STORE, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def scans(phantom, tmp_path) -> Path:
    """Sixteen small volumes and a damaged one."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for k in range(16):
        nib.save(nib.Nifti1Image((phantom + k).astype(np.int16), ASYMMETRIC), folder / f"case{k:02}.nii.gz")
    (folder / "torn.nii.gz").write_bytes((folder / "case00.nii.gz").read_bytes()[:500])
    return folder


def test_a_killed_worker_loses_nothing(scans, weights, tmp_path, capfd):
    there, here = tmp_path / "there", tmp_path / "here"
    program = [Path(sys.executable).with_name("scoat-fast"), "segment", scans, "--weights", weights]
    on_ray = ["-o", there, "--engine", "ray", "--workers", 2, "--worker-cpus", 0.5]
    with subprocess.Popen(list(map(str, program + on_ray))) as running:
        killed = None
        while running.poll() is None and killed is None:
            time.sleep(0.01)
            if list(there.glob("case*.json")):  # in the middle of the run
                killed = _workers(running.pid)[0]
                os.kill(killed, signal.SIGKILL)
    assert killed is not None and running.returncode == EXIT_FAILED_CASES
    told = capfd.readouterr()
    assert told.out.count("mL of opacity") == 16 and "torn.nii.gz: " in told.err and "ray::" not in told.err
    assert run("segment", scans, "--weights", weights, "-o", here) == EXIT_FAILED_CASES
    assert files_of(there) == files_of(here)


def _workers(driver: int) -> list[int]:
    """The processes of Ray that answer cases, below a process."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue  # it has just ended

    def is_below(number: int) -> bool:
        return number == driver or (number in parents and is_below(parents[number]))

    return [number for number, name in names.items() if name.startswith(b"ray::MapWorker") and is_below(number)]


def test_a_case_that_ends_its_worker_each_time_fails_alone(cluster, scans, weights, tmp_path, monkeypatch, capsys):
    class Mortal(on_ray._Worker):
        def _answer(self, cases):
            if any(case.name == "case03" for case in cases):
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._answer(cases)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(on_ray, "_Worker", Mortal)
    monkeypatch.setattr(on_ray, "TRIES", 1)
    monkeypatch.setattr(on_ray, "SHARES", 2)  # so that groups have several cases
    arguments = ["segment", scans, "-o", tmp_path / "out", "--weights", weights, "--engine", "ray", "--workers", 2]
    assert run(*arguments, "--worker-cpus", 1) == EXIT_FAILED_CASES
    failed = [row for row in rows_of(tmp_path / "out") if row["status"] != "ok"]
    assert [row["case"] for row in failed] == ["case03", "torn"] and len(rows_of(tmp_path / "out")) == 17
    assert failed[0]["error"] == "its worker died, also in 1 tries of the case alone"
    assert "case03.nii.gz: its worker died" in capsys.readouterr().err


def test_results_that_are_elsewhere_are_no_results(cluster, scans, weights, tmp_path, monkeypatch):
    """A worker that sees another folder of the same name, as a machine without the common disk would."""

    class Elsewhere(on_ray._Worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._output = tmp_path / "elsewhere"
            self._output.mkdir(exist_ok=True)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(on_ray, "_Worker", Elsewhere)
    arguments = ["segment", scans / "case00.nii.gz", "-o", tmp_path / "out", "--weights", weights, "--engine", "ray"]
    assert run(*arguments, "--worker-cpus", 1) == EXIT_FAILED_CASES
    (row,) = rows_of(tmp_path / "out")
    assert row["status"] == "failed" and "workers must see the same folders" in row["error"]


def test_no_worker_waits_for_room_that_no_machine_has(cluster, scans, weights, tmp_path, capsys):
    arguments = ["segment", scans, "-o", tmp_path / "out", "--weights", weights]
    for wrong, reason in (
        (["--engine", "ray", "--worker-cpus", 3], "1 workers of 3 CPUs and 0 GPUs are wanted, the cluster has room"),
        (["--engine", "ray", "--workers", 3, "--worker-cpus", 1], "the cluster has room for 2: 2 CPUs and 0 GPUs"),
        (["--engine", "ray", "--device", "cuda"], "workers of 1 CPUs and 1 GPUs are wanted"),
        (["--engine", "ray", "--device", "cuda:1"], "workers want device auto, cpu or cuda"),
        (["--engine", "ray", "--worker-cpus", 1.5], "whole CPUs or a fraction"),
        (["--engine", "ray", "--worker-cpus", 0], "whole CPUs or a fraction"),
        (["--engine", "ray", "--worker-cpus", "nan"], "whole CPUs or a fraction"),
        (["--worker-cpus", 0], "belong to --engine ray"),
        (["--engine", "ray", "--devices", "0,1"], "--devices belongs to --engine local"),
        (["--workers", 2], "belong to --engine ray"),
    ):
        assert run(*arguments, *wrong) == EXIT_USAGE
        assert reason in capsys.readouterr().err
    assert run(*arguments, "--engine", "ray", "--worker-cpus", 0.5, "--threshold", 2) == EXIT_USAGE


def test_what_a_worker_had_finished_is_not_done_again(cluster, scans, weights, tmp_path, capsys):
    (scans / "torn.nii.gz").unlink()
    arguments = ["segment", scans, "-o", tmp_path / "out", "--weights", weights]
    assert run(*arguments) == EXIT_OK
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("case[0-9]*")}
    capsys.readouterr()
    assert run(*arguments, "--engine", "ray", "--worker-cpus", 0.5) == EXIT_OK
    assert capsys.readouterr().out.count("unchanged") == 16
    assert before == {path: path.stat().st_mtime_ns for path in before} and len(before) == 48
