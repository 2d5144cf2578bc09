"""The evaluate command: masks against true ones, in the paper's metrics."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ASYMMETRIC
from PIL import Image
from test_segment import run

from scoat_fast.cli import EXIT_FAILED_CASES, EXIT_OK, EXIT_USAGE

EXAMPLES = Path(__file__).parents[1] / "examples"


def volume(path: Path, mask: np.ndarray, affine=ASYMMETRIC) -> Path:
    path.parent.mkdir(exist_ok=True)
    nib.Nifti1Image(mask.astype(np.uint8), affine).to_filename(path)
    return path


@pytest.fixture
def masks(tmp_path):
    """Two cases: one of two regions, of which one was found, and one more that is none; and one without opacity."""
    truth = np.zeros((10, 9, 4), bool)
    truth[1:5, 1:4, 1] = truth[7:9, 6:8, 3] = True
    found = np.zeros_like(truth)
    found[1:5, 1:3, 1] = found[7, 1, 0] = True
    for name, ours, theirs in (("a", found, truth), ("b", truth & False, truth & False)):
        volume(tmp_path / "found" / f"{name}_mask.nii.gz", ours)
        volume(tmp_path / "truth" / f"{name}.nii.gz", theirs)
    return tmp_path / "found", tmp_path / "truth"


EXPECTED = {
    "DSC": 2 * 8 / (9 + 16), "SEN": 8 / 16, "PPV": 8 / 9, "VA": 1 - 2 * 7 / 25, "RLP": 1 / 2, "RLR": 1 / 2,
    "RLP 3-D": 1 / 2, "RLR 3-D": 1 / 2, "predicted mL": 9 * 1.8e-3, "true mL": 16 * 1.8e-3,
}  # fmt: skip


def test_a_folder_of_cases(masks, tmp_path, capsys):
    files = [tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")]
    options = ("--json", files[0], "--csv", files[1], "--figure", files[2], "--quiet")
    assert run("evaluate", *masks, *options) == EXIT_OK
    printed = capsys.readouterr().out
    assert "| a | 64.00 | 50.00 | 88.89 | 44.00 | 50.00 | 50.00 |" in printed
    found = json.loads(files[0].read_text())
    assert found["cases"]["a"] == pytest.approx(EXPECTED)
    assert found["cases"]["b"] == {**dict.fromkeys(EXPECTED, 1.0), "predicted mL": 0.0, "true mL": 0.0}
    assert found["mean"]["DSC"] == pytest.approx((0.64 + 1) / 2) and found["pooled"]["DSC"] == pytest.approx(0.64)
    rows = {row["case"]: row for row in csv.DictReader(files[1].open())}
    assert list(rows) == ["a", "b", "mean", "pooled"] and float(rows["a"]["SEN"]) == 0.5
    assert Image.open(files[2]).size[0] > 400
    drawn = files[2].read_bytes()
    assert run("evaluate", *masks, *options, "--empty", "skip") == EXIT_OK
    assert json.loads(files[0].read_text())["cases"]["b"]["DSC"] is None and files[2].read_bytes() != drawn
    assert json.loads(files[0].read_text())["mean"]["DSC"] == pytest.approx(0.64)


def test_the_same_anatomy_on_another_order_of_axes(masks, tmp_path):
    """What lies where in space counts, not how it is stored."""
    path = masks[1] / "a.nii.gz"
    stored = nib.load(path)
    turned = nib.as_closest_canonical(stored)
    assert not np.array_equal(np.asarray(turned.dataobj), np.asarray(stored.dataobj))
    turned.to_filename(path)
    assert run("evaluate", *masks, "--json", tmp_path / "out.json", "--quiet") == EXIT_OK
    assert json.loads((tmp_path / "out.json").read_text())["cases"]["a"] == pytest.approx(EXPECTED)


def test_what_lacks_its_counterpart_or_its_grid_is_named(masks, tmp_path, capsys):
    found, truth = masks
    volume(truth / "missed.nii.gz", np.eye(9)[..., None])
    volume(found / "invented_mask.nii.gz", np.eye(9)[..., None])
    away = np.array([[0, 0, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    for name, affine in (("moved", ASYMMETRIC + away), ("other", ASYMMETRIC)):
        volume(found / f"{name}_mask.nii.gz", np.eye(9)[..., None])
        volume(truth / f"{name}.nii.gz", np.eye(9 if name == "moved" else 8)[..., None], affine)
    assert run("evaluate", *masks, "--json", tmp_path / "out.json", "--quiet") == EXIT_FAILED_CASES
    told = capsys.readouterr().err
    for reason in ("missed.nii.gz: no prediction of it", "invented_mask.nii.gz: no truth of this name",
                   "moved.nii.gz: lies elsewhere", "other.nii.gz: the grid of"):  # fmt: skip
        assert reason in told
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["cases"]) == ["a", "b"] and len(result["left_out"]) == 4


def test_a_closed_pipe_costs_no_file(masks, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "scoat_fast.cli", "evaluate", *masks, "--json", tmp_path / "out.json", "--quiet"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (EXIT_OK, "") and "pooled" in json.loads(
        (tmp_path / "out.json").read_text()
    )


def test_a_case_may_be_called_as_a_total_is(masks, tmp_path, capsys):
    for folder, suffix in zip(masks, ("_mask", ""), strict=True):
        (folder / f"a{suffix}.nii.gz").rename(folder / f"mean{suffix}.nii.gz")
    assert run("evaluate", *masks, "--csv", tmp_path / "out.csv", "--quiet") == EXIT_OK
    printed = capsys.readouterr().out
    assert "| mean | 64.00 |" in printed and "| mean | 82.00 |" in printed
    rows = [(row["case"], float(row["DSC"])) for row in csv.DictReader((tmp_path / "out.csv").open())]
    assert [name for name, _ in rows] == ["b", "mean", "mean", "pooled"] and rows[1][1] == 0.64


def test_pictures_and_single_files(tmp_path, capsys):
    for folder, mask in (("found", np.eye(20)), ("truth", np.eye(20) + np.eye(20, k=1))):
        (tmp_path / folder).mkdir()
        Image.fromarray((mask * 255).astype(np.uint8)).save(tmp_path / folder / "a.png")
    assert run("evaluate", tmp_path / "found", tmp_path / "truth", "--quiet") == EXIT_OK
    assert f"| a | {200 * 20 / 59:.2f} | {100 * 20 / 39:.2f} | 100.00 |" in capsys.readouterr().out
    assert run("evaluate", tmp_path / "found" / "a.png", tmp_path / "truth" / "a.png", "--quiet") == EXIT_OK
    assert "mL" not in capsys.readouterr().out
    assert run("evaluate", tmp_path / "found" / "a.png", tmp_path / "truth", "--quiet") == EXIT_USAGE
    probabilities = np.linspace(0, 255, 400).reshape(20, 20).astype(np.uint8)
    for pixels, reason in ((probabilities, "got 256"), (np.full((20, 20), 255, np.uint8), "every voxel is set")):
        Image.fromarray(pixels).save(tmp_path / "found" / "a.png")
        assert run("evaluate", tmp_path / "found", tmp_path / "truth", "--quiet") == EXIT_USAGE
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "same"), [(1.0002, True), (1.05, False)])
def test_a_grid_is_another_where_voxels_lie_beside_their_counterparts(masks, factor, same, capsys):
    """Half of one away at most: affines are rounded when they are written."""
    volume(masks[0] / "a_mask.nii.gz", nib.load(masks[0] / "a_mask.nii.gz").get_fdata(), ASYMMETRIC * factor)
    assert run("evaluate", *masks, "--quiet") == (EXIT_OK if same else EXIT_FAILED_CASES)
    assert same or "a.nii.gz: lies elsewhere in space" in capsys.readouterr().err


def test_the_example_is_what_validation_says(tmp_path, capsys):
    assert run("segment", EXAMPLES / "ct.nii.gz", "-o", tmp_path, "--quiet") == EXIT_OK
    pair = (tmp_path / "ct_mask.nii.gz", EXAMPLES / "ct_truth.nii.gz")
    assert run("evaluate", *pair, "--json", tmp_path / "out.json", "--quiet") == EXIT_OK
    ours, theirs = (np.asarray(nib.load(path).dataobj) > 0 for path in pair)
    case = json.loads((tmp_path / "out.json").read_text())["cases"]["ct"]
    assert case["DSC"] == pytest.approx(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))
    assert 0.5 < case["DSC"] < 1 and 0 < case["RLP"] <= 1


def test_masks_of_a_run_that_was_stopped_are_left_out(masks, capsys):
    claim = {"case": "a", "scoat_fast": "0.1.0", "unfinished": True}
    (masks[0] / "a.json").write_text(json.dumps(claim))
    assert run("evaluate", *masks, "--quiet") == EXIT_FAILED_CASES
    said = capsys.readouterr()
    assert "a_mask.nii.gz: a run was stopped before all results were there" in said.err and "| b |" in said.out
    (masks[0] / "a.json").write_text(json.dumps(claim | {"unfinished": False}))
    assert run("evaluate", *masks, "--quiet") == EXIT_OK


@pytest.mark.parametrize(
    ("option", "name", "reason"),
    [
        ("--figure", "out.jpg", ".png, .pdf, .svg is wanted, got 'out.jpg'"),
        ("--figure", "nowhere/out.png", "out.png: cannot be written: No such file"),
        ("--json", "nowhere/out.json", "out.json: cannot be written: No such file"),
        ("--csv", "found", "found: cannot be written: Is a directory"),
    ],
)
def test_outputs_that_cannot_be_written_cost_no_work(masks, tmp_path, capsys, monkeypatch, option, name, reason):
    monkeypatch.setattr("scoat_fast.study.evaluate._pairs", None)
    assert run("evaluate", *masks, option, tmp_path / name, "--quiet") == EXIT_USAGE
    assert reason in capsys.readouterr().err
