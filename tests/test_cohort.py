"""Many cases in one run: batches across cases, faults that cost one case, runs that go on where they were stopped."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ASYMMETRIC
from dicom_series import write_series
from test_segment import rows_of, run

from scoat_fast import files
from scoat_fast.cli import EXIT_FAILED_CASES, EXIT_OK, EXIT_USAGE
from scoat_fast.engine.runner import compile as compile_network
from scoat_fast.errors import OutputError, ScoatFastError
from scoat_fast.imaging.volume import Turn
from scoat_fast.segmentation import journal, ledger, pipeline, reading, stream
from scoat_fast.segmentation.cases import Case, is_report
from scoat_fast.segmentation.inference import Segmenter
from scoat_fast.segmentation.quality import assess
from scoat_fast.segmentation.stream import Job


@pytest.fixture
def cohort(phantom, tmp_path) -> Path:
    """Five volumes of 2 to 6 slices, of different sizes."""
    folder = tmp_path / "cohort"
    folder.mkdir()
    for k in range(5):
        voxels = (phantom[: 40 - k, : 36 - 2 * k, : 6 - k] + k).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, ASYMMETRIC), folder / f"case{k}.nii.gz")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Batches


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_batches_are_filled_across_cases(net, batch_size, monkeypatch):
    random = np.random.default_rng(0)
    shapes = [(3, 40, 30), (1, 20, 20), (6, 33, 48), (2, 48, 48)]
    slices = [random.integers(-1000, 300, shape).astype(np.int16) for shape in shapes]
    alone = Segmenter(net, batch_size=1)
    expected = [next(alone.stream.run([Job(x, (0.7, 0.8), 0.5, keeps_probabilities=True)])) for x in slices]
    many, sizes = Segmenter(net, batch_size=batch_size).stream, []
    engine = many.engine
    monkeypatch.setattr(many, "engine", lambda x, return_attention: sizes.append(len(x)) or engine(x, return_attention))
    jobs = [Job(x, (0.7, 0.8), 0.5, keeps_probabilities=True, about=k) for k, x in enumerate(slices)]
    seen = []
    for job, one in zip(many.run(jobs, progress=seen.append), expected, strict=True):
        assert job.error is None
        if engine.backend == "reference":  # stock PyTorch, where nothing could be built: it rounds by batch
            np.testing.assert_allclose(job.probabilities, one.probabilities, atol=1e-5)
            continue
        np.testing.assert_array_equal(job.probabilities, one.probabilities)  # bit for bit
        np.testing.assert_array_equal(job.mask, one.mask)
    assert sizes == [batch_size] * (12 // batch_size) + [12 % batch_size] * (12 % batch_size > 0)
    assert sum(seen) == 12
    assert [job.about for job in jobs] == [0, 1, 2, 3]


def test_a_case_that_the_network_fails_on_costs_no_other(net, monkeypatch):
    segmenter = Segmenter(net, batch_size=5)
    engine = segmenter.stream.engine

    def moody(x, return_attention):
        if (x == 1).all((1, 2, 3)).any():
            raise RuntimeError("no such kernel")
        return engine(x, return_attention)

    monkeypatch.setattr(segmenter.stream, "engine", moody)
    grey = np.random.default_rng(0).random((3, 48, 48), np.float32)
    slices = [grey, np.ones((4, 48, 48), np.float32), grey, np.where(grey < 0, grey, np.nan), grey]
    jobs = list(segmenter.stream.run([Job(x, (1, 1), 0.5, windowed=True) for x in slices]))
    assert [type(job.error) for job in jobs] == [type(None), RuntimeError, type(None), ScoatFastError, type(None)]
    assert "answered with NaN" in str(jobs[3].error)
    for job in (jobs[0], jobs[2], jobs[4]):
        np.testing.assert_array_equal(job.mask, jobs[0].mask)


def test_a_gpu_that_is_too_small_hands_over_to_the_cpu(net, monkeypatch):
    """A device that calls itself CUDA, and never has room for an engine."""

    def compile_network(net, dtype, batch_sizes):
        if made.device.type == "cuda":
            raise torch.OutOfMemoryError("too much")
        return compile_on_cpu(net, dtype=dtype, batch_sizes=batch_sizes)

    compile_on_cpu, made = stream.compile_network, object.__new__(stream.Stream)
    monkeypatch.setattr(stream, "compile_network", compile_network)
    monkeypatch.setattr(net, "to", lambda device: net)
    with pytest.warns(UserWarning, match="the memory of cuda:0 is too small for one slice: the CPU goes on"):
        made.__init__(net, torch.device("cuda", 0), 4)
    assert made.device.type == "cpu" and made.batch_size == 1
    (job,) = made.run([Job(np.full((2, 20, 20), 40, np.int16), (1, 1), 0.5)])
    assert job.error is None


# Runs


def test_a_second_run_does_only_what_is_missing_or_changed(cohort, weights, tmp_path, monkeypatch, capsys):
    out, answered, finish = tmp_path / "out", [], pipeline.Run._finish

    def note(self, job):
        answered.append(job.about.case.name)
        return finish(self, job)

    monkeypatch.setattr(pipeline.Run, "_finish", note)

    def again(*options) -> list[str]:
        del answered[:]
        assert run("segment", cohort, "-o", out, "--weights", weights, *options) == EXIT_OK
        assert [row["status"] for row in rows_of(out)] == ["ok"] * 5
        return sorted(answered)

    everything = [f"case{k}" for k in range(5)]
    assert again() == everything
    before = files_of(out)
    capsys.readouterr()
    assert again() == []
    assert "case0: unchanged, " in capsys.readouterr().out
    os.utime(cohort / "case1.nii.gz", (1, 1))
    assert again() == []  # touched, not changed
    noted = files_of(out)
    assert noted.pop("case1.json") != before.pop("case1.json")  # and read only once for that
    assert noted == before
    before = files_of(out)
    monkeypatch.setattr(ledger, "input_facts", None)
    assert again() == []
    monkeypatch.undo()
    monkeypatch.setattr(pipeline.Run, "_finish", note)
    assert files_of(out) == before
    changed = nib.load(cohort / "case2.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(changed.dataobj) + np.int16(3), ASYMMETRIC), cohort / "case2.nii.gz")
    (out / "case3_mask.nii.gz").unlink()
    (out / "case4_overlay.png").write_bytes(b"cut")
    (out / "case0.json").write_bytes(before["case0.json"][:-20] + b"}")
    (out / "case0_mask.nii.gz").unlink()
    (out / "case0_overlay.png").unlink()
    (out / "case0.json").unlink()
    assert again() == ["case0", "case2", "case3", "case4"]
    assert again("--threshold", 0.4) == everything
    assert again("--threshold", 0.4, "--save-attention") == everything
    assert again("--threshold", 0.4, "--save-attention", "--redo") == everything
    assert again("--threshold", 0.4) == everything  # without the maps
    assert not list(out.glob("*attention*"))


def test_other_weights_or_lungs_are_another_result(ct, net, weights, phantom, tmp_path):
    out, lungs = tmp_path / "out", tmp_path / "lungs"
    lungs.mkdir()
    digests = []
    for k in (0, 1):
        nib.save(nib.Nifti1Image((phantom < -700 - 160 * k).astype(np.uint8), ASYMMETRIC), lungs / "ct.nii.gz")
        assert run("segment", ct, "-o", out, "--weights", weights, "--lung", lungs) == EXIT_OK
        digests.append(json.loads((out / "ct.json").read_text())["made_from"])
    assert digests[0]["input"] == digests[1]["input"]
    assert digests[0]["lung"]["sha256"] != digests[1]["lung"]["sha256"]
    assert digests[0]["weights"] == digests[1]["weights"]
    assert run("segment", ct, "-o", out, "--lung", lungs) == EXIT_OK
    assert json.loads((out / "ct.json").read_text())["made_from"]["weights"] != digests[0]["weights"]


def test_another_precision_is_another_result_and_another_device_is_none(ct, net, tmp_path, monkeypatch):
    """A GPU that computes in float32 as the CPU does goes on where the CPU was stopped; one in bfloat16 starts anew."""
    answered, finish = [], pipeline.Run._finish
    monkeypatch.setattr(pipeline.Run, "_finish", lambda self, job: answered.append(job) or finish(self, job))
    for dtype, count in ((torch.float32, 1), (torch.float32, 0), (torch.bfloat16, 1), (torch.bfloat16, 0)):
        segmenter = Segmenter(net, "cpu")
        segmenter.stream.engine = compile_network(net, dtype=dtype, backend="reference")
        answered.clear()
        assert pipeline.segment_files([ct], tmp_path / "out", segmenter, pipeline.Options(quiet=True)).all_well
        assert len(answered) == count


def test_the_dtype_can_be_chosen(ct, weights, tmp_path, capsys):
    for dtype, unchanged in (("auto", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)):
        assert run("segment", ct, "-o", tmp_path / "out", "--weights", weights, "--dtype", dtype) == EXIT_OK
        assert ("unchanged" in capsys.readouterr().out) == unchanged, dtype


def test_a_file_of_equal_size_and_an_older_time_is_another_input(ct, phantom, weights, tmp_path, capsys):
    """As ``cp -p`` and ``rsync -t`` replace it: a slice, and a lung mask."""
    slices = sorted(write_series(tmp_path / "series", phantom.transpose(2, 1, 0).astype(float)).iterdir())
    lung = tmp_path / "lung.nii"
    nib.save(nib.Nifti1Image((phantom < -700).astype(np.uint8), ASYMMETRIC), lung)
    for k, path in enumerate([*slices, lung, ct]):
        os.utime(path, (1000 + k, 1000 + k))

    def again(*arguments) -> bool:
        assert run("segment", *arguments, "-o", tmp_path / "out", "--weights", weights) == EXIT_OK
        return "unchanged" not in capsys.readouterr().out

    for path, arguments in ((slices[2], [slices[2].parent]), (lung, [ct, "--lung", lung])):
        assert again(*arguments) and not again(*arguments)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, (900, 900))
        assert again(*arguments) and not again(*arguments)


@pytest.fixture
def two_scans(phantom, tmp_path) -> list[Path]:
    """Files of one name, size and time of change, of two patients."""
    paths = [tmp_path / patient / "ct.nii" for patient in ("a", "b")]
    for k, path in enumerate(paths):
        path.parent.mkdir()
        nib.save(nib.Nifti1Image(phantom[:, :, k : k + 4], ASYMMETRIC), path)
        os.utime(path, (0, 0))
    assert paths[0].stat().st_size == paths[1].stat().st_size
    return paths


def test_a_scan_is_never_taken_for_another(two_scans, weights, tmp_path, capsys):
    """Nor is its result lost to one of the same name; what was moved is the same scan."""
    (one, other), out = two_scans, tmp_path / "out"
    assert run("segment", one, "-o", out, "--weights", weights) == EXIT_OK
    before = files_of(out)
    assert run("segment", other, "-o", out, "--weights", weights) == EXIT_FAILED_CASES
    assert f"the result of another scan is there, {one}: remove it, or choose" in capsys.readouterr().err
    del before["cases.csv"]
    assert before.items() <= files_of(out).items()
    assert run("report", out, "-o", tmp_path / "report", "--quiet") == EXIT_OK  # tells both
    assert sorted(path.name for path in (tmp_path / "report" / "cases").iterdir()) == ["ct (not done).html", "ct.html"]
    shutil.copytree(out, settled := tmp_path / "settled")
    (settled / "cases.csv").rename(settled / "cases-1-of-2.csv")
    os.utime(settled / "cases-1-of-2.csv", (1, 1))
    (settled / "latest.json").symlink_to("nowhere.json")
    for path in settled.glob("ct*"):
        path.unlink()
    assert run("segment", other, "-o", settled, "--weights", weights) == EXIT_OK
    assert run("report", settled, "-o", tmp_path / "later", "--quiet") == EXIT_OK
    assert [path.name for path in (tmp_path / "later" / "cases").iterdir()] == ["ct.html"]
    moved = one.rename(tmp_path / "ct.nii")
    assert run("segment", moved, "-o", out, "--weights", weights) == EXIT_OK
    assert "ct: unchanged, " in capsys.readouterr().out
    assert rows_of(out)[0]["input"] == json.loads((out / "ct.json").read_text())["input"] == str(moved)
    old = json.loads((out / "ct.json").read_text())
    for name in ("place", "series"):  # as before they were kept
        del old["made_from"]["input"][name]
    (out / "ct.json").write_text(json.dumps(old))
    assert run("segment", other, "-o", out, "--weights", weights) == EXIT_FAILED_CASES
    assert run("segment", moved, "-o", out, "--weights", weights) == EXIT_OK


def test_two_runs_at_once_write_one_scan_of_a_name(two_scans, weights, tmp_path, monkeypatch, capsys):
    """Both have looked when neither had written."""
    write, waiting = pipeline.write_results, threading.Barrier(2)

    def late(*arguments):
        waiting.wait(60)
        return write(*arguments)

    monkeypatch.setattr(pipeline, "write_results", late)
    codes: list[int] = []

    def segment(path: Path) -> None:
        codes.append(run("segment", path, "-o", tmp_path / "out", "--weights", weights))

    runs = [threading.Thread(target=segment, args=(path,)) for path in two_scans]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert sorted(codes) == [EXIT_OK, EXIT_FAILED_CASES]
    assert "the result of another scan is there" in capsys.readouterr().err


def test_a_link_may_lead_to_a_corrected_scan(two_scans, weights, tmp_path, capsys):
    """As in stores that name files by their contents."""
    link = tmp_path / "link.nii"
    for scan in two_scans:
        link.unlink(missing_ok=True)
        link.symlink_to(scan)
        assert run("segment", link, "-o", tmp_path / "out", "--weights", weights) == EXIT_OK
        assert "unchanged" not in capsys.readouterr().out
    (tmp_path / "linked").symlink_to(two_scans[0].parent)
    out = ("-o", tmp_path / "folders", "--weights", weights)
    assert run("segment", tmp_path / "linked" / "ct.nii", *out) == EXIT_OK
    shutil.copy(two_scans[1], two_scans[0])
    assert run("segment", two_scans[0], *out) == EXIT_OK
    assert "unchanged" not in capsys.readouterr().out


def test_equal_series_give_equal_segmentations_wherever_they_lie(phantom, weights, tmp_path):
    first = write_series(tmp_path / "a" / "ct", phantom.transpose(2, 1, 0).astype(float))
    other = shutil.copytree(first, tmp_path / "b" / "ct")
    for k, folder in enumerate((first, other)):
        assert run("segment", folder, "-o", tmp_path / f"{k}", "--weights", weights, "--dicom-seg") == EXIT_OK
    assert (tmp_path / "0" / "ct_seg.dcm").read_bytes() == (tmp_path / "1" / "ct_seg.dcm").read_bytes()


def test_a_file_that_was_replaced_with_its_time_is_another_input(two_scans, weights, tmp_path, capsys):
    one, other = two_scans
    for _ in range(2):
        assert run("segment", one, "-o", tmp_path / "out", "--weights", weights) == EXIT_OK
        assert "unchanged" not in capsys.readouterr().out
        one.write_bytes(other.read_bytes())
        os.utime(one, (0, 0))


def test_a_series_is_never_taken_for_another_of_its_folder(phantom, weights, tmp_path, capsys):
    (tmp_path / "ct").mkdir()
    for k in (1, 2):
        slices = write_series(
            tmp_path / f"{k}",
            phantom.transpose(2, 1, 0).astype(float),
            change=lambda _, slice, k=k: setattr(slice, "SeriesNumber", k),
        )
        for path in slices.iterdir():
            path.rename(tmp_path / "ct" / f"{k}{path.name}")
    arguments = ["segment", tmp_path / "ct", "-o", tmp_path / "out", "--weights", weights, "--series"]
    assert run(*arguments, 1) == EXIT_OK
    assert run(*arguments, 2) == EXIT_FAILED_CASES
    assert "the result of another scan is there" in capsys.readouterr().err
    assert run(*arguments, 1) == EXIT_OK
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "ct")
    arguments[1] = tmp_path / "zipped.zip"
    assert [run(*arguments, number) for number in (1, 2)] == [EXIT_OK, EXIT_FAILED_CASES]
    (tmp_path / "ct" / "README.txt").write_text("more")
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "ct")
    assert run(*arguments, 1) == EXIT_OK


def test_lungs_that_are_wanted_and_missing_are_told_of(cohort, weights, tmp_path, capsys):
    (tmp_path / "lungs").mkdir()
    arguments = ["segment", sorted(cohort.iterdir())[0], "-o", tmp_path / "out", "--weights", weights]
    for lungs, warned in (((), False), (("--lung", tmp_path / "lungs"), True), ((), False)):
        for how in ("", "unchanged, "):
            assert run(*arguments, *lungs) == EXIT_OK
            assert ("unchanged, " in capsys.readouterr().out) == bool(how)
            (report,) = (path for path in (tmp_path / "out").glob("*.json") if is_report(path))
            assert ("no lung mask for this case" in report.read_text()) == warned


def test_inputs_are_found_from_other_folders(cohort, weights, tmp_path, monkeypatch, capsys):
    scan = sorted(cohort.iterdir())[0]
    monkeypatch.chdir(scan.parent)
    assert run("segment", scan.name, "-o", tmp_path / "out", "--weights", weights) == EXIT_OK
    (report,) = (path for path in (tmp_path / "out").glob("*.json") if is_report(path))
    found = json.loads(report.read_text())
    assert found["input"] == rows_of(tmp_path / "out")[0]["input"] == str(scan)
    report.write_text(json.dumps(found | {"input": scan.name}))  # as earlier versions told of it
    monkeypatch.chdir(tmp_path)
    assert run("segment", scan, "-o", tmp_path / "out", "--weights", weights) == EXIT_OK
    assert "unchanged" in capsys.readouterr().out and json.loads(report.read_text())["input"] == str(scan)


def test_results_beside_the_slices_of_a_series_are_no_part_of_it(phantom, weights, tmp_path, capsys):
    write_series(tmp_path, phantom.transpose(2, 1, 0).astype(float))
    for how in ("", "unchanged, "):
        assert run("segment", tmp_path, "-o", tmp_path, "--weights", weights) == EXIT_OK
        assert f"{tmp_path.name}: {how}" in capsys.readouterr().out


def test_parts_share_the_cases(cohort, weights, tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    (cohort / "notes.nii").write_text("no NIfTI")
    assert run("segment", cohort, "-o", whole, "--weights", weights, "--quiet") == EXIT_FAILED_CASES
    names = []
    for part in (1, 2):
        options = ("--num-parts", 2, "--part", part, "--weights", weights, "--quiet")
        assert run("segment", cohort, "-o", shared, *options) == (EXIT_OK if part == 1 else EXIT_FAILED_CASES)
        rows = (shared / f"cases-{part}-of-2.csv").read_text().splitlines()[1:]
        names += [row.partition(",")[0] for row in rows]
    assert sorted(names) == ["case0", "case1", "case2", "case3", "case4", "notes"]
    ours = {"cases.csv", "failures.jsonl"}
    theirs = {"cases-1-of-2.csv", "cases-2-of-2.csv", "failures-2-of-2.jsonl"}
    one, other = files_of(whole), files_of(shared)
    assert {name: one[name] for name in one.keys() - ours} == {name: other[name] for name in other.keys() - theirs}
    assert run("segment", cohort, "-o", shared, "--num-parts", 2, "--part", 3, "--weights", weights) == EXIT_USAGE


def test_several_engines_share_the_cases(cohort, weights, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for output, count in ((one, 1), (two, 2)):
        segmenters = [Segmenter(weights, "cpu") for _ in range(count)]
        summary = pipeline.segment_files([cohort], output, segmenters, pipeline.Options(quiet=True))
        assert summary.all_well and summary.slices == 20
        assert [row["case"] for row in summary.rows] == [f"case{k}" for k in range(5)]
    assert files_of(one) == files_of(two)


def test_many_threads_read_and_write_at_once(cohort, weights, tmp_path, monkeypatch):
    """Each of three waits for the others at both ends; the results are those of one."""
    one, three = tmp_path / "one", tmp_path / "three"
    assert run("segment", cohort, "-o", one, "--weights", weights, "--quiet", "--threads", 1) == EXIT_OK
    for name in ("_load", "_finish"):
        meeting, step = threading.Barrier(3), getattr(pipeline.Run, name)

        def together(self, what, meeting=meeting, step=step):
            case = what if isinstance(what, Case) else what.about.case
            if case.name in ("case0", "case1", "case2"):
                meeting.wait(60)
            return step(self, what)

        monkeypatch.setattr(pipeline.Run, name, together)
    assert run("segment", cohort, "-o", three, "--weights", weights, "--quiet", "--threads", 3) == EXIT_OK
    assert files_of(one) == files_of(three)


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_does_not_grow_with_the_cases(phantom, weights, tmp_path, monkeypatch, threads):
    """Never more cases in memory than two for each pair of threads, and what the engine holds."""
    alive, most, folder = [], [], tmp_path / "cohort"
    folder.mkdir()
    for k in range(24):
        nib.save(nib.Nifti1Image(phantom[:, :, :2], ASYMMETRIC), folder / f"c{k:02}.nii")
    made = Job.__post_init__

    def watch(job) -> None:
        made(job)
        alive.append(weakref.ref(job.mask))
        most.append(sum(mask() is not None for mask in alive))

    monkeypatch.setattr(Job, "__post_init__", watch)
    gc.disable()  # nothing may wait for it
    try:
        options = ("-o", tmp_path / "out", "--weights", weights, "--quiet", "--threads", threads)
        assert run("segment", folder, *options) == EXIT_OK
    finally:
        gc.enable()
    assert len(most) == 24 and max(most) <= 2 * threads + 3


# Faults


def break_reading(monkeypatch, name: str, error: BaseException) -> None:
    read = reading.read_volume

    def broken(case):
        if case.name == name:
            raise error
        return read(case)

    monkeypatch.setattr(reading, "read_volume", broken)


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("a bug"), OSError(5, "Input/output error")])
def test_a_reader_that_breaks_costs_one_case(cohort, weights, tmp_path, monkeypatch, error, capsys):
    break_reading(monkeypatch, "case2", error)
    out = tmp_path / "out"
    assert run("segment", cohort, "-o", out, "--weights", weights) == EXIT_FAILED_CASES
    assert [row["status"] for row in rows_of(out)] == ["ok", "ok", "failed", "ok", "ok"]
    (failure,) = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert failure["case"] == "case2" and failure["kind"] == type(error).__name__ and str(error) in failure["reason"]
    monkeypatch.undo()
    assert run("segment", cohort, "-o", out, "--weights", weights) == EXIT_OK
    assert not (out / "failures.jsonl").exists()


def test_failures_are_added_one_by_one(tmp_path, monkeypatch, capsys):
    path, written, append = tmp_path / "failures.jsonl", [], files.append_text

    def moody(path, text):
        written.append(text.count("\n"))
        if len(written) == 2:
            raise OutputError(path, "No space left on device")
        append(path, text)

    monkeypatch.setattr(journal, "append_text", moody)
    path.write_text("of an earlier run")
    notes = journal.OpenJournal(path, quiet=False)
    for k in range(4):
        notes.fail({"case": f"{k}", "reason": "bad"}, f"{k}.nii")
    assert written == [1, 1, 2, 1]  # what could not be written waits
    assert [json.loads(line)["case"] for line in path.read_text().splitlines()] == list("0123")
    assert capsys.readouterr().err.count("No space left") == 1


def test_a_list_of_failures_that_cannot_be_begun_ends_the_run_in_a_line(ct, weights, tmp_path, monkeypatch, capsys):
    """As where the folder is mounted to be read."""

    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert run("segment", ct, "-o", tmp_path, "--weights", weights) == EXIT_USAGE
    assert "failures.jsonl: cannot be written: Read-only file system" in capsys.readouterr().err


def test_lists_that_were_cut_when_the_power_went_are_written_anew(ct, weights, tmp_path):
    (tmp_path / "out").mkdir()
    for name, data in (("cases.csv", b""), ("failures.jsonl", b'{"ca')):
        (tmp_path / "out" / name).write_bytes(data)
    assert run("segment", ct, "-o", tmp_path / "out", "--weights", weights) == EXIT_OK
    assert not (tmp_path / "out" / "failures.jsonl").exists() and len(rows_of(tmp_path / "out")) == 1


def test_a_stopped_run_ends_at_once_and_leaves_nothing_half_written(cohort, weights, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real, begun = pipeline.Run._write, threading.Event()

    def write(self, job):
        begun.set()
        return real(self, job)

    class Interrupted(Exception):
        pass

    def wait(futures, return_when):
        assert begun.wait(60)
        raise Interrupted

    monkeypatch.setattr(pipeline.Run, "_write", write)
    monkeypatch.setattr(pipeline, "wait", wait)  # Ctrl-C, while the first result is written
    with pytest.raises(Interrupted):
        run("segment", cohort, "-o", out, "--weights", weights, "--quiet")
    assert not list(out.glob(".*"))
    done = [row["case"] for row in rows_of(out)]
    assert 1 <= len(done) < 5 and all((out / f"{name}.json").exists() for name in done)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("reader", "engine", "writer"))]


def test_a_file_that_changes_while_it_is_read_fails(ct, weights, tmp_path, monkeypatch, capsys):
    read = reading.read_volume

    def touched(case):
        volume = read(case)
        os.utime(case.path, (5, 5))  # as whoever sets permissions, or makes a hard link
        return volume

    monkeypatch.setattr(reading, "read_volume", touched)
    assert run("segment", ct, "-o", tmp_path / "touched", "--weights", weights) == EXIT_OK

    def changed(case):
        volume = read(case)
        case.path.write_bytes(case.path.read_bytes()[:-1])
        return volume

    monkeypatch.setattr(reading, "read_volume", changed)
    assert run("segment", ct, "-o", tmp_path / "out", "--weights", weights) == EXIT_FAILED_CASES
    assert "was changed while it was read" in capsys.readouterr().err


def test_an_output_folder_that_goes_away_costs_its_cases(cohort, weights, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    real = pipeline.write_results

    def write(case, *rest):
        if case.name == "case1":
            shutil.rmtree(out)
        return real(case, *rest)

    monkeypatch.setattr(pipeline, "write_results", write)
    started = time.monotonic()
    assert (
        run("segment", cohort, "-o", out, "--weights", weights, "--quiet") == EXIT_USAGE
    )  # nor can the table be written
    assert time.monotonic() - started < 30
    assert "case1_mask.nii.gz: cannot be written: No such file or directory" in capsys.readouterr().err


def test_kills_lose_nothing():
    command = [sys.executable, Path(__file__).with_name("kill_cohort.py"), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# Quality


def test_quality_by_hand():
    turn = Turn(np.diag([0.7, 0.7, 5.0, 1.0]))
    mask = np.zeros((40, 8, 8), np.uint8)
    mask[3, 2, 2] = 1
    assert assess(mask, turn, []) == {"status": "pass", "reasons": []}
    assert assess(mask, turn, ["uneven"]) == {"status": "warn", "reasons": ["uneven"]}
    assert assess(mask[0], None, []) == {"status": "pass", "reasons": []}
    low = assess(mask[:20], turn, [])
    assert low["status"] == "warn" and "covers 100 mm" in low["reasons"][0]
    mask[0, 1, 1] = mask[-1, 1, 1] = 1
    assert "reaches the lowest and the highest slice" in assess(mask, turn, [])["reasons"][0]
    mask[0, 1, 1] = mask[-1, 1, 1] = 0
    for place, sides in (
        ((5, 0, 3), "front"),
        ((5, -1, 3), "back"),
        ((5, 3, 0), "right"),
        ((5, 0, -1), "front and the left"),
    ):
        cut = mask.copy()
        cut[place] = 1
        reason = f"opacity reaches the {sides} edge of slices: it may go on outside them"
        for found in (assess(cut, turn, []), assess(cut[5:6], None, [])):
            assert found == {"status": "warn", "reasons": [reason]}
    assert "12.0 mm apart" in assess(mask[:20], Turn(np.diag([0.7, 0.7, 12.0, 1.0])), [])["reasons"][0]
    angle = np.radians(20)
    tilted = np.eye(4)
    tilted[:3, :3] = [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
    tilted[:3, 2] *= 5
    assert "20 degrees from the patient's axes" in assess(mask, Turn(tilted), [])["reasons"][0]
    full = assess(np.ones_like(mask), turn, ["uneven"])
    assert full["status"] == "fail" and "100% of all voxels" in full["reasons"][0]


def test_quality_stands_in_report_and_table(ct, weights, tmp_path):
    assert run("segment", ct, "-o", tmp_path / "out", "--weights", weights) == EXIT_OK
    found = json.loads((tmp_path / "out" / "ct.json").read_text())["qc"]
    assert found["status"] == rows_of(tmp_path / "out")[0]["qc"] == "warn"
    assert any("covers 15 mm" in reason for reason in found["reasons"])


# Nothing leaves the machine

NO_SOCKETS = """
import sys
def refuse(event, arguments):
    if event.startswith("socket.") and event not in ("socket.gethostname", "socket.__new__"):
        if event != "socket.bind" or arguments[1] != ("::1", 0):  # urllib3, imported, asks so whether IPv6 is there
            raise SystemExit(f"{event} {arguments}")
sys.addaudithook(refuse)
from scoat_fast.cli import main
for arguments in ["segment", *sys.argv[1:3], "-o", sys.argv[3], "--save-attention"], ["doctor"]:
    assert main(arguments) == 0, arguments
"""


def test_no_command_uses_a_socket(ct, phantom, tmp_path):
    series = write_series(tmp_path / "series", phantom.transpose(2, 1, 0).astype(float))
    command = [sys.executable, "-c", NO_SOCKETS, ct, series, tmp_path / "out"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in rows_of(tmp_path / "out")} == {"ok"}
