"""The main job: as a function, and as a command on files."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ASYMMETRIC
from dicom_series import write_series
from nibabel.orientations import apply_orientation, inv_ornt_aff
from PIL import Image
from test_imaging import ORIENTATIONS, broken_nifti

import scoat_fast
from scoat_fast import BadInputError, ScoatFastError
from scoat_fast.cli import EXIT_FAILED_CASES, EXIT_OK, EXIT_USAGE, main
from scoat_fast.engine import runner
from scoat_fast.imaging.dicom import read_series
from scoat_fast.imaging.pictures import read_mask
from scoat_fast.segmentation.cases import Case, find_cases
from scoat_fast.segmentation.inference import Segmenter, as_hu
from scoat_fast.segmentation.lungs import LEFT, RIGHT, find_lungs
from scoat_fast.segmentation.overlay import FOUND, TRUTH, contact_sheet
from scoat_fast.segmentation.reading import read_case
from scoat_fast.segmentation.statistics import measure, remove_small
from scoat_fast.segmentation.stream import Job


@pytest.fixture(scope="module")
def level(net, phantom):
    """A threshold that splits the phantom's probabilities in halves, so that masks are not trivial."""
    found = scoat_fast.segment(phantom, affine=ASYMMETRIC, weights=net)
    assert found.probabilities.std() > 1e-3
    return float(np.median(found.probabilities))


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


def rows_of(output: Path) -> list[dict]:
    with (output / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# As a function


def test_segment_is_what_the_network_says(net, phantom, level):
    """Against a plain computation at the network's own size, where nothing is resized."""
    volume = np.kron(phantom.transpose(2, 1, 0)[:, :24, :24], np.ones((1, 2, 2)))  # [6, 48, 48], and 48 is the size
    found = scoat_fast.segment(volume, (2.0, 0.7, 0.7), weights=net, threshold=level, device="cpu")
    grey = torch.from_numpy(((volume + 1250) / 1500).clip(0, 1)).float()[:, None]
    with torch.no_grad():
        expected = net(grey)[:, 0].sigmoid().numpy()
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    np.testing.assert_array_equal(found.mask, found.probabilities > level)
    assert found.mask.dtype == np.uint8
    inside = found.mask.astype(bool)
    assert 0 < inside.sum() < inside.size
    numbers = found.statistics
    assert numbers["voxels"] == inside.sum()
    assert numbers["mm3"] == pytest.approx(inside.sum() * 2 * 0.7 * 0.7)
    assert numbers["ml"] == pytest.approx(numbers["mm3"] / 1000)
    assert numbers["hu_mean"] == pytest.approx(volume[inside].mean(), abs=1e-3)
    assert numbers["hu_sd"] == pytest.approx(volume[inside].std(), abs=1e-3)
    assert numbers["slices"] == inside.any((1, 2)).sum()


@pytest.mark.parametrize("orientation", ORIENTATIONS[::5], ids=lambda o: "".join(f"{int(a)}{int(s):+d}" for a, s in o))
def test_the_result_turns_with_the_volume(net, phantom, level, orientation):
    found = scoat_fast.segment(phantom, affine=ASYMMETRIC, weights=net, threshold=level)
    affine = ASYMMETRIC @ inv_ornt_aff(orientation, phantom.shape)
    turned = scoat_fast.segment(
        apply_orientation(phantom, orientation), affine=affine, weights=net, threshold=level, attention=True
    )
    np.testing.assert_array_equal(turned.mask, apply_orientation(found.mask, orientation))
    np.testing.assert_array_equal(turned.probabilities, apply_orientation(found.probabilities, orientation))
    assert turned.statistics == found.statistics
    assert turned.attention["x11"].shape == turned.mask.shape


def test_spacing_and_affine_say_the_same(net, phantom):
    by_affine = scoat_fast.segment(phantom, affine=ASYMMETRIC, weights=net)
    by_spacing = scoat_fast.segment(phantom.transpose(2, 1, 0), (2.5, 0.8, 0.9), weights=net)
    np.testing.assert_array_equal(by_spacing.mask, by_affine.mask.transpose(2, 1, 0))
    assert by_spacing.statistics["ml"] == pytest.approx(by_affine.statistics["ml"])


def test_batch_size_does_not_change_the_result(net, phantom):
    one, many = (scoat_fast.segment(phantom, affine=ASYMMETRIC, weights=net, batch_size=n) for n in (1, 5))
    np.testing.assert_allclose(one.probabilities, many.probabilities, atol=1e-5)  # torch resizes batches differently
    np.testing.assert_array_equal(one.mask, many.mask)


def test_the_dtype_is_what_was_asked_for(net, phantom):
    exact, found = (Segmenter(net, dtype=dtype) for dtype in ("auto", "bfloat16"))
    assert (exact.stream.engine.dtype, found.stream.engine.dtype) == (torch.float32, torch.bfloat16)
    exact, found = (segmenter.segment(phantom, affine=ASYMMETRIC).probabilities for segmenter in (exact, found))
    assert 0 < np.abs(found - exact).max() < 0.05
    with pytest.raises(ScoatFastError, match="must be one of auto, float32, bfloat16, float16, got int8"):
        Segmenter(net, dtype="int8")


NO_MEMORY = [
    torch.OutOfMemoryError("too much"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error).split("\n")[0])
@pytest.mark.parametrize("at_once", [True, False], ids=["when made", "when run"])
def test_memory_that_runs_out_halves_the_batch(net, phantom, monkeypatch, at_once, error):
    def run_out(prepared, given, threshold):
        if len(prepared._input) > 2:
            raise error
        return whole(prepared, given, threshold)

    def allocate(size, device):
        if at_once and size > 2 * one.stream.engine.memory_bytes:
            raise error
        return zeros(size, device)

    one, whole, zeros = Segmenter(net, batch_size=1), runner._Prepared.__call__, runner._zeros
    monkeypatch.setattr(runner, "_zeros", allocate)
    segmenter = Segmenter(net, batch_size=6)
    if not at_once:
        monkeypatch.setattr(runner._Prepared, "__call__", run_out)
    assert segmenter.stream.batch_size == (1 if at_once else 6)
    found = segmenter.segment(phantom, affine=ASYMMETRIC)
    assert segmenter.stream.batch_size == 1  # 6, 3, 1
    np.testing.assert_array_equal(found.mask, one.segment(phantom, affine=ASYMMETRIC).mask)


def test_whole_numbers_travel_as_int16(net, phantom):
    """Whatever they are stored as; the results are those of float32, bit for bit."""
    slices = phantom.transpose(2, 1, 0)
    for dtype in (np.int16, ">i2", np.int32, np.float32, np.float64):
        whole = as_hu(slices.astype(dtype))
        assert whole.dtype == np.int16 and whole.flags.c_contiguous and whole.flags.writeable
        np.testing.assert_array_equal(whole, slices)
    for other in (slices + 0.25, slices + 40_000.0, np.where(slices > 0, np.nan, slices), np.full((1, 2, 2), np.inf)):
        kept = as_hu(other)
        assert kept.dtype == np.float32
        np.testing.assert_array_equal(kept, other)
    jobs = [Job(x, (0.8, 0.9), 0.5, keeps_probabilities=True) for x in (whole, slices.astype(np.float32))]
    one, other = Segmenter(net).stream.run(jobs)
    np.testing.assert_array_equal(one.probabilities, other.probabilities)
    lungs = [find_lungs(job.slices, job.mask, (2.5, 0.8, 0.9)).labels for job in jobs]
    numbers = [measure(job.mask, job.slices, 2.0, labels) for job, labels in zip(jobs, lungs, strict=True)]
    assert numbers[0] == numbers[1]


def test_a_series_travels_as_int16(phantom, tmp_path):
    """Where slope and intercept of its slices keep its values whole."""
    hu = phantom.transpose(2, 1, 0).astype(float)
    of_each = [(1, -1024 + k) for k in range(6)]
    for slopes, dtype in ((None, np.int16), (of_each, np.int16), ([(0.5, -1024)] * 6, np.float32)):
        folder = write_series(
            tmp_path / f"{dtype.__name__}{slopes is None}", hu + 0.5 * (dtype == np.float32), slopes=slopes
        )
        read, slices = read_case(Case("series", "dicom", folder), None)
        assert slices.dtype == dtype
        np.testing.assert_array_equal(slices, read.turn.to_slices(read_series(folder).voxels))


def test_memory_that_one_slice_is_too_much_for_is_an_error(net, phantom, monkeypatch):
    def run_out(prepared, given, threshold):
        raise torch.OutOfMemoryError("too much")

    segmenter = Segmenter(net, batch_size=3)
    monkeypatch.setattr(runner._Prepared, "__call__", run_out)
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        segmenter.segment(phantom, affine=ASYMMETRIC)


def test_threshold_and_small_regions(net, phantom, level):
    masks = [
        scoat_fast.segment(phantom, affine=ASYMMETRIC, weights=net, threshold=level, min_mm3=volume).mask
        for volume in (0, 500, 1e9)
    ]
    assert masks[0].sum() >= masks[1].sum() > masks[2].sum() == 0
    with pytest.raises(ScoatFastError, match="between 0 and 1"):
        scoat_fast.segment(phantom, affine=ASYMMETRIC, weights=net, threshold=1.5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "either the spacing"),
        ({"spacing": (1, 1, 1), "affine": np.eye(4)}, "either the spacing"),
        ({"spacing": (1, 1)}, "three positive mm"),
        ({"spacing": (1, np.nan, 1)}, "three positive mm"),
        ({"spacing": (1, 0, 1)}, "three positive mm"),
        ({"affine": np.full((4, 4), np.nan)}, "NaN or infinite"),
        ({"affine": np.zeros((4, 4))}, "singular"),
        ({"spacing": (1, 1, 1), "lung": np.zeros((2, 2, 2))}, "lung mask"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(net, phantom, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        scoat_fast.segment(phantom, weights=net, **arguments)


def test_volumes_that_make_no_sense_are_refused(net, phantom):
    with pytest.raises(BadInputError, match="three dimensions"):
        scoat_fast.segment(phantom[0], (1, 1, 1), weights=net)
    with pytest.raises(BadInputError, match="numbers"):
        scoat_fast.segment(phantom.astype(complex), (1, 1, 1), weights=net)
    with pytest.raises(BadInputError, match="along the first axis"):
        scoat_fast.segment(np.zeros((64, 64, 9)), (0.7, 0.7, 5), weights=net)
    with pytest.raises(BadInputError, match="NaN or infinite, in 1 of 6 slices"):
        scoat_fast.segment(np.where(phantom == phantom.max(), np.nan, phantom), affine=ASYMMETRIC, weights=net)


def test_cuda_is_refused_where_there_is_none(net):
    if torch.cuda.is_available():
        assert Segmenter(net, "cuda").stream.batch_size >= 1
    else:
        with pytest.raises(ScoatFastError, match="sees 0 CUDA GPUs"):
            Segmenter(net, "cuda")


# Numbers


def test_measure_by_hand():
    mask = np.zeros((3, 4, 5), np.uint8)
    mask[1, 1, 1:4] = 1
    hu = np.arange(60.0).reshape(3, 4, 5)
    lung = np.zeros_like(mask)
    lung[1, :, :2], lung[1, :, 2] = RIGHT, LEFT
    assert measure(mask, hu, 2.5, lung) == {
        "voxels": 3,
        "mm3": 7.5,
        "ml": 0.0075,
        "hu_mean": 27.0,
        "hu_sd": pytest.approx((2 / 3) ** 0.5),
        "slices": 1,
        "ground_glass_ml": 0.0,
        "consolidation_ml": 0.0075,
        "other_ml": 0.0,
        "lung_ml": 0.03,
        "share_of_lung": 2 / 12,
        "right_ml": 0.0025,
        "right_share": 1 / 8,
        "left_ml": 0.0025,
        "left_share": 1 / 4,
    }
    for value, kind in ((-751, "other"), (-750, "ground_glass"), (-300, "ground_glass"), (-299, "consolidation")):
        parts = measure(mask, np.full_like(hu, value), 2.5)
        assert {name: parts[f"{name}_ml"] for name in ("other", "ground_glass", "consolidation")} == {
            "other": 0, "ground_glass": 0, "consolidation": 0, kind: 0.0075
        }  # fmt: skip
    empty = measure(mask * 0, hu, 2.5, lung * 0)
    assert empty["voxels"] == empty["mm3"] == empty["slices"] == 0
    assert empty["hu_mean"] is empty["hu_sd"] is empty["share_of_lung"] is empty["left_share"] is None
    unknown = measure(mask)
    assert unknown["voxels"] == 3 and unknown["slices"] == 1
    assert all(value is None for name, value in unknown.items() if name not in ("voxels", "slices"))


def test_small_regions_are_counted_over_corners_and_slices():
    mask = np.zeros((3, 6, 6), np.uint8)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 2, 2] = 1  # joined by corners
    mask[0, 5, 5] = mask[0, 5, 4] = 1
    kept = remove_small(mask, voxel_mm3=2.0, min_mm3=6.0)
    assert kept.sum() == 3
    assert kept[1, 1, 1] == 1
    np.testing.assert_array_equal(remove_small(mask, 2.0, 4.0), mask)
    assert remove_small(mask, 2.0, 6.1).sum() == 0


def test_contact_sheet_shows_contours():
    greys, mask, truth = np.full((15, 60, 50), 0.5, np.float32), np.zeros((15, 60, 50)), np.zeros((15, 60, 50))
    mask[4, 20:40, 20:30] = 1
    truth[14, 10:20, 20:30] = 1
    sheet = np.asarray(contact_sheet(greys, mask, (0.8, 0.8), "title", truth))
    for colour in (FOUND, TRUTH):
        assert (sheet == colour).all(-1).sum() > 50
    assert not (np.asarray(contact_sheet(greys, mask * 0, (0.8, 0.8), "title")) == FOUND).all(-1).any()


# As a command


def test_nifti_to_mask_overlay_and_numbers(ct, weights, level, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("segment", ct, "-o", out, "--weights", weights, "--threshold", level) == EXIT_OK
    assert {p.name for p in out.iterdir()} == {"ct_mask.nii.gz", "ct_overlay.png", "ct.json", "cases.csv"}
    source, mask = nib.load(ct), nib.load(out / "ct_mask.nii.gz")
    assert (mask.affine == source.affine).all()
    assert mask.get_data_dtype() == np.uint8
    found = scoat_fast.segment(np.asarray(source.dataobj), affine=source.affine, weights=weights, threshold=level)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), found.mask)
    report = json.loads((out / "ct.json").read_text())
    assert report["statistics"] == found.statistics
    assert report["weights"] == "test"
    (row,) = rows_of(out)
    assert (row["case"], row["status"], int(row["voxels"])) == ("ct", "ok", found.statistics["voxels"])
    assert "mL of opacity" in capsys.readouterr().out


def test_quiet_says_nothing(ct, weights, tmp_path, capsys):
    assert run("segment", ct, "-o", tmp_path / "out", "--weights", weights, "--quiet") == EXIT_OK
    assert capsys.readouterr() == ("", "")


def test_dicom_series_and_the_same_as_nifti_agree(phantom, weights, level, tmp_path):
    series = write_series(tmp_path / "in" / "series7", phantom.transpose(2, 1, 0).astype(float))
    assert run("segment", series, "-o", tmp_path / "out", "--weights", weights, "--threshold", level) == EXIT_OK
    mask = nib.load(tmp_path / "out" / "series7_mask.nii.gz")
    found = scoat_fast.segment(phantom, affine=ASYMMETRIC, weights=weights, threshold=level)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), found.mask)
    np.testing.assert_allclose(mask.affine[:3, :3], ASYMMETRIC[:3, :3], atol=1e-5)
    assert not any("Doe" in p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix in (".json", ".csv"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_pictures(phantom, weights, level, tmp_path, suffix):
    grey = ((phantom[:, :, 2].T + 1250) / 1500).clip(0, 1)
    Image.fromarray((grey * 255).astype(np.uint8)).save(tmp_path / f"slice.{suffix}")
    options = ("--weights", weights, "--threshold", level, "--save-probabilities", "--save-attention")
    assert run("segment", tmp_path / f"slice.{suffix}", "-o", tmp_path / "out", *options) == EXIT_OK
    mask = np.asarray(Image.open(tmp_path / "out" / "slice_mask.png"))
    assert mask.shape == (36, 40)
    assert set(np.unique(mask)) == {0, 255}
    probability = np.asarray(Image.open(tmp_path / "out" / "slice_probability.png")) / 255
    assert (mask[probability > level + 0.01] == 255).all()
    assert (mask[probability < level - 0.01] == 0).all()
    assert len(list((tmp_path / "out").glob("slice_attention_x*.png"))) == 6
    report = json.loads((tmp_path / "out" / "slice.json").read_text())
    assert report["statistics"]["voxels"] == (mask > 0).sum()
    assert report["statistics"]["mm3"] is None


def test_probabilities_and_attention_lie_on_the_grid_of_the_input(ct, weights, tmp_path):
    out = tmp_path / "out"
    options = ("--weights", weights, "--save-probabilities", "--save-attention")
    assert run("segment", ct, "-o", out, *options) == EXIT_OK
    names = ["probability", *(f"attention_{name}" for name in ("x11", "x21", "x31", "x12", "x22", "x13"))]
    for name in names:
        image = nib.load(out / f"ct_{name}.nii.gz")
        assert (image.affine == nib.load(ct).affine).all()
        values = image.get_fdata()
        assert values.shape == (40, 36, 6)
        assert 0 <= values.min() < values.max() <= 1


def test_share_of_the_lung(ct, phantom, weights, level, tmp_path):
    lungs = tmp_path / "lungs"
    lungs.mkdir()
    nib.save(nib.Nifti1Image((phantom < -700).astype(np.uint8), ASYMMETRIC), lungs / "ct.nii.gz")
    options = ("--weights", weights, "--threshold", level)
    for lung in (lungs, lungs / "ct.nii.gz"):
        out = tmp_path / f"out{lung.is_dir()}"
        assert run("segment", ct, "-o", out, "--lung", lung, *options) == EXIT_OK
        mask = np.asarray(nib.load(out / "ct_mask.nii.gz").dataobj).astype(bool)
        expected = (mask & (phantom < -700)).sum() / (phantom < -700).sum()
        assert json.loads((out / "ct.json").read_text())["statistics"]["share_of_lung"] == pytest.approx(expected)
    flipped = ASYMMETRIC @ np.array([[-1, 0, 0, 39], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image((phantom < -700)[::-1].astype(np.uint8), flipped), lungs / "ct.nii.gz")
    assert run("segment", ct, "-o", tmp_path / "flipped", "--lung", lungs, *options) == EXIT_OK
    assert json.loads((tmp_path / "flipped" / "ct.json").read_text())["statistics"]["share_of_lung"] == pytest.approx(
        expected
    )
    for voxels, affine, reason in [
        (np.zeros((40, 36, 6), np.uint8), np.eye(4), "lies elsewhere"),
        (np.zeros((40, 36, 5), np.uint8), ASYMMETRIC, "the grid of ct.nii.gz is wanted"),
        (phantom, ASYMMETRIC, "a mask is wanted"),
    ]:
        nib.save(nib.Nifti1Image(voxels, affine), lungs / "ct.nii.gz")
        assert run("segment", ct, "-o", tmp_path / "bad", "--lung", lungs, *options) == EXIT_FAILED_CASES
        assert reason in rows_of(tmp_path / "bad")[0]["error"]
    nib.save(nib.Nifti1Image(np.zeros((40, 36, 6), np.uint8), ASYMMETRIC), lungs / "ct.nii.gz")
    assert run("segment", ct, "-o", tmp_path / "empty", "--lung", lungs, *options) == EXIT_OK
    assert "the lung mask is empty" in rows_of(tmp_path / "empty")[0]["warnings"]
    assert run("segment", ct, "-o", tmp_path / "no", "--lung", tmp_path / "nowhere", *options) == EXIT_USAGE


def test_folders_are_searched_and_equal_names_told_apart(ct, phantom, weights, tmp_path):
    root = tmp_path / "cohort"
    for patient in ("a", "b"):
        write_series(root / patient / "CT", phantom.transpose(2, 1, 0).astype(float)[:2])
    shutil.copy(ct, root / "scan.nii.gz")
    shutil.copy(ct, root / "a" / "scan.nii.gz")
    Image.fromarray(np.tile(np.arange(48, dtype=np.uint8) * 5, (48, 1))).save(root / "scan.png")
    (root / "notes.txt").write_text("nothing to see")
    shutil.copy(ct, tmp_path / "other.nii.gz")
    out = root / "results"
    for _ in range(2):  # the second time the folder holds results, which are no inputs
        assert run("segment", root, tmp_path / "other.nii.gz", "-o", out, "--weights", weights, "--quiet") == EXIT_OK
        names = [row["case"] for row in rows_of(out)]
        assert sorted(names) == ["a_CT", "b_CT", "other", "scan", "scan_nii_gz", "scan_png"]
    assert all((out / f"{name}.json").exists() for name in names)


def test_names_that_differ_by_case_alone_are_told_apart(tmp_path):
    for name in ("a/CT.nii", "a/ct.nii", "A/ct.nii", "a/ct.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    cases, errors = find_cases([tmp_path], tmp_path / "out")
    assert errors == []
    assert len({case.name.casefold() for case in cases}) == 4


def test_an_input_without_a_name_is_refused(weights, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run("segment", "", "-o", tmp_path / "out", "--weights", weights)
    assert stop.value.code == EXIT_USAGE


def test_results_beside_the_inputs_are_not_segmented_again(ct, weights):
    for _ in range(2):
        assert run("segment", ct.parent, "-o", ct.parent, "--weights", weights, "--quiet") == EXIT_OK
        assert [row["case"] for row in rows_of(ct.parent)] == ["ct"]


def test_files_of_others_are_not_overwritten(ct, weights, capsys):
    mine = ct.with_name("ct_mask.nii.gz")
    shutil.copy(ct, mine)
    before = mine.read_bytes()
    assert run("segment", ct, "-o", ct.parent, "--weights", weights) == EXIT_FAILED_CASES
    assert "is no result of this program" in capsys.readouterr().err
    assert mine.read_bytes() == before


def test_tiny_pictures(weights, tmp_path):
    for side in (1, 3, 7, 9):
        grey = np.arange(side * side, dtype=np.uint8).reshape(side, side) * 2 + 100
        grey[0, 0] = 0
        Image.fromarray(grey).save(tmp_path / f"p{side}.png")
    pictures = [tmp_path / f"p{side}.png" for side in (3, 7, 9)]
    assert run("segment", *pictures, "-o", tmp_path / "out", "--weights", weights, "--quiet") == EXIT_OK
    assert run("segment", tmp_path / "p1.png", "-o", tmp_path / "out", "--weights", weights) == EXIT_FAILED_CASES


def bad_cases(tmp_path, phantom) -> dict[str, Path]:
    bad = broken_nifti(tmp_path)
    del bad["a folder"]
    volumes = {
        "NaN voxel": np.where(phantom == phantom.max(), np.nan, phantom),
        "constant": np.full((9, 9, 9), -700.0),
        "not HU": (phantom + 1024).astype(np.int16),
    }
    for name, voxels in volumes.items():
        bad[name] = tmp_path / f"{name.replace(' ', '_')}.nii.gz"
        nib.save(nib.Nifti1Image(voxels, ASYMMETRIC), bad[name])
    bad["blank picture"] = tmp_path / "blank.png"
    Image.new("L", (40, 40), 7).save(bad["blank picture"])
    bad["twelve bits in sixteen"] = tmp_path / "dark.png"
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 2).save(bad["twelve bits in sixteen"])
    bad["turned by EXIF"] = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.arange(1600).reshape(40, 40).astype(np.uint8)).save(bad["turned by EXIF"], exif=exif)
    bad["text as picture"] = tmp_path / "text.jpg"
    bad["text as picture"].write_text("hello")
    bad["text"] = tmp_path / "notes.txt"
    bad["text"].write_text("hello")
    bad["empty folder"] = tmp_path / "empty"
    bad["empty folder"].mkdir()
    bad["MR series"] = write_series(
        tmp_path / "mr", phantom.transpose(2, 1, 0).astype(float), change=lambda k, s: setattr(s, "Modality", "MR")
    )
    bad["one DICOM file"] = bad["MR series"] / "IM0000"
    return bad


def test_bad_cases_are_one_line_each_and_the_others_go_on(ct, phantom, weights, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    bad, out = bad_cases(tmp_path / "bad", phantom), tmp_path / "out"
    assert run("segment", *bad.values(), ct, "-o", out, "--weights", weights) == EXIT_FAILED_CASES
    rows = rows_of(out)
    assert sum(row["status"] == "failed" for row in rows) == len(bad)
    assert [row["case"] for row in rows if row["status"] == "ok"] == ["ct"]
    names = {"ct_mask.nii.gz", "ct_overlay.png", "ct.json", "cases.csv", "failures.jsonl"}
    assert {p.name for p in out.iterdir()} == names
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert sorted(failure["reason"] for failure in failures) == sorted(row["error"] for row in rows if row["error"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == len(bad)
    for name, path in bad.items():
        assert any(line.startswith(f"scoat-fast: {path}") for line in lines), name
    assert "unexpected" not in "".join(lines)


def test_blank_slices_warn_and_do_not_fail(phantom, weights, tmp_path):
    blank = phantom.copy()
    blank[:, :, 3] = -1000
    nib.save(nib.Nifti1Image(blank, ASYMMETRIC), tmp_path / "ct.nii.gz")
    assert run("segment", tmp_path / "ct.nii.gz", "-o", tmp_path / "out", "--weights", weights) == EXIT_OK
    assert "1 blank slices" in rows_of(tmp_path / "out")[0]["warnings"]


def test_a_full_disk_costs_one_case_and_leaves_nothing_half_written(ct, weights, tmp_path, monkeypatch, capsys):
    shutil.copy(ct, tmp_path / "second.nii.gz")
    real, calls = os.fsync, []

    def full_once(handle):
        calls.append(handle)
        if len(calls) == 2:  # the overlay of the first case
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full_once)
    out = tmp_path / "out"
    code = run("segment", ct, tmp_path / "second.nii.gz", "-o", out, "--weights", weights)
    assert code == EXIT_FAILED_CASES
    assert "ct_overlay.png: cannot be written: No space left on device" in capsys.readouterr().err
    assert [row["status"] for row in rows_of(out)] == ["failed", "ok"]
    names = {"second_mask.nii.gz", "second_overlay.png", "second.json", "cases.csv", "failures.jsonl"}
    assert {p.name for p in out.iterdir()} == names


AS_NOBODY = textwrap.dedent(
    """
    import os, sys
    from scoat_fast.cli import main
    ct, weights, scratch, closed, secret, folder = sys.argv[1:]
    assert main(["segment", ct, "-o", scratch, "--weights", weights, "--quiet"]) == 0  # loads all that is needed
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    codes = [
        main(["segment", ct, "-o", closed, "--weights", weights, "--quiet"]),
        main(["segment", ct, "-o", closed + "/new", "--weights", weights, "--quiet"]),
        main(["segment", secret, "-o", scratch, "--weights", weights, "--quiet"]),
        main(["segment", folder, "-o", scratch, "--weights", weights, "--quiet"]),
        main(["segment", folder + "/closed/x.nii.gz", ct, "-o", scratch, "--weights", weights, "--quiet"]),
    ]
    print(codes)
    """
)


def test_no_permission_is_one_clear_line(ct, weights, tmp_path):
    """As another user when the tests run as root, to whom permissions mean nothing."""
    closed, scratch, secret = tmp_path / "closed", tmp_path / "scratch", tmp_path / "secret.nii.gz"
    closed.mkdir()
    scratch.mkdir()
    shutil.copy(ct, secret)
    for path in [tmp_path, *tmp_path.parents][:-1]:
        if path.stat().st_uid == os.getuid() and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o755)
    for path in (weights.parent, weights.parent.parent):
        path.chmod(path.stat().st_mode | 0o755)
    scratch.chmod(0o777)
    closed.chmod(0o555)
    secret.chmod(0)
    folder = tmp_path / "folder"
    (folder / "closed").mkdir(parents=True)
    shutil.copy(ct, folder / "fine.nii.gz")
    (folder / "closed").chmod(0)
    command = [sys.executable, "-c", AS_NOBODY, ct, weights, scratch, closed, secret, folder]
    result = subprocess.run([str(a) for a in command], capture_output=True, text=True, timeout=120)
    closed.chmod(0o755)
    (folder / "closed").chmod(0o755)
    codes = [EXIT_USAGE, EXIT_USAGE, EXIT_FAILED_CASES, EXIT_FAILED_CASES, EXIT_FAILED_CASES]
    assert json.loads(result.stdout) == codes, result.stderr
    assert {"fine.json", "ct.json"} <= {path.name for path in scratch.iterdir()}  # the others went on
    lines = result.stderr.strip().splitlines()
    assert sum("cannot be written: Permission denied" in line for line in lines) >= 2
    assert any(line.endswith("secret.nii.gz: cannot be read: Permission denied") for line in lines)
    assert list(closed.iterdir()) == []


def test_weights_and_options_that_cannot_be_used_end_the_command(ct, weights, tmp_path, capsys):
    for arguments, reason in [
        (("--weights", "nowhere"), "neither a weights file"),
        (("--weights", weights, "--threshold", 2), "between 0 and 1"),
        (("--weights", weights, "--min-mm3", -1), "must be 0 or more"),
        (("--weights", weights, "--device", "tpu9"), "device"),
        (("--weights", weights, "--device", "meta"), "device"),
    ]:
        assert run("segment", ct, "-o", tmp_path / "out", *arguments) == EXIT_USAGE
        error = capsys.readouterr().err
        assert reason in error
        assert len(error.splitlines()) == 1


def test_gzip_results_are_the_same_bytes_every_time(ct, weights, tmp_path):
    for name in ("one", "two"):
        assert run("segment", ct, "-o", tmp_path / name, "--weights", weights, "--quiet") == EXIT_OK
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    gzip.decompress((tmp_path / "one" / "ct_mask.nii.gz").read_bytes())


def test_what_others_wrote_beside_an_input_is_left_alone(ct, weights, capsys):
    """A sidecar named as our report, a mask drawn by hand, a table of the user's."""
    folder = ct.parent
    others = {"ct.json": b'{"Manufacturer": "x"}', "ct_mask.nii.gz": b"drawn", "ct_probability.nii.gz": b"theirs"}
    for name, data in others.items():
        (folder / name).write_bytes(data)
        assert run("segment", ct, "-o", folder, "--weights", weights) == EXIT_FAILED_CASES
        assert "is no result of this program" in capsys.readouterr().err
        assert (folder / name).read_bytes() == data
        (folder / name).unlink()
    for name in ("cases.csv", "failures.jsonl"):
        (folder / name).write_text("patient,age\n")
        assert run("segment", ct, "-o", folder, "--weights", weights) == EXIT_USAGE
        assert (folder / name).read_text() == "patient,age\n"
        (folder / name).unlink()


def test_results_anywhere_below_the_inputs_are_no_cases(ct, weights):
    folder = ct.parent
    assert run("segment", folder, "-o", folder / "first", "--weights", weights) == EXIT_OK
    assert run("segment", folder, "-o", folder / "second", "--weights", weights) == EXIT_OK
    assert [row["case"] for row in rows_of(folder / "second")] == ["ct"]


def test_optional_results_of_an_earlier_run_go_with_it(ct, weights, tmp_path):
    out = tmp_path / "out"
    assert run("segment", ct, "-o", out, "--weights", weights, "--save-probabilities", "--save-attention") == EXIT_OK
    assert len(list(out.glob("ct_attention_*"))) == 6
    assert run("segment", ct, "-o", out, "--weights", weights, "--save-probabilities") == EXIT_OK
    assert not list(out.glob("ct_attention_*"))
    assert (out / "ct_probability.nii.gz").exists()
    assert run("segment", ct, "-o", out, "--weights", weights) == EXIT_OK
    assert not (out / "ct_probability.nii.gz").exists()


@pytest.mark.parametrize(
    ("ending", "environment"),
    [
        ("> /dev/full", {}),
        ("> /dev/full 2> /dev/full", {}),
        (">&-", {}),
        (">&- 2>&-", {}),
        ("| head -0", {}),
        ("", {"PYTHONIOENCODING": "ascii"}),
    ],
)
def test_output_that_nobody_can_read_costs_no_case(ct, weights, tmp_path, ending, environment):
    names = ["one.nii.gz", "\u00fcn\u00ef.nii.gz", os.fsdecode(b"bad\xff.nii.gz")]
    for name in names:
        shutil.copy(ct, tmp_path / name)
    command = f'"$0" -m scoat_fast.cli segment "$@" {ending}; test $? -lt 1'
    if ending.startswith("|"):
        command = f'set -o pipefail; "$0" -m scoat_fast.cli segment "$@" {ending}'
    arguments = [sys.executable, *(tmp_path / name for name in names), "-o", tmp_path / "out", "--weights", weights]
    done = subprocess.run(
        ["bash", "-c", command, *map(str, arguments)], capture_output=True, env=os.environ | environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    rows = (tmp_path / "out" / "cases.csv").read_bytes().splitlines()
    assert len(rows) == 1 + len(names)
    assert all(b",ok," in row for row in rows[1:])


def test_pipes_are_not_waited_for_and_links_are_followed(ct, weights, tmp_path):
    folder, elsewhere = tmp_path / "cohort", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    shutil.move(ct, elsewhere / "linked.nii.gz")
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.nii.gz")
    (folder / "p1").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    cases, errors = find_cases([folder], tmp_path / "out")
    assert [case.path.name for case in cases] == ["linked.nii.gz"]
    assert not errors
    _, errors = find_cases([folder / "pipe"], tmp_path / "out")
    assert "neither" in errors[0].reason


@pytest.mark.parametrize("spacing", [(2, 0.1, 1.68), (2, 1e-4, 1e-4), (2, 30, 30)])
def test_pixels_that_no_scanner_makes_are_refused(net, phantom, spacing):
    with pytest.raises(BadInputError, match=r"pixels of 0.05 to 20 mm are wanted"):
        Segmenter(net, "cpu").segment(phantom.transpose(2, 1, 0), spacing)


def test_a_lung_mask_may_be_full_and_what_is_found_unpacks(net, phantom):
    mask, probabilities, statistics = Segmenter(net, "cpu").segment(
        phantom, affine=ASYMMETRIC, lung=np.ones(phantom.shape)
    )
    assert mask.shape == probabilities.shape == phantom.shape
    assert statistics["share_of_lung"] == pytest.approx(mask.mean())


def test_library_warnings_do_not_reach_the_user(phantom, weights, tmp_path, capfd):
    image = nib.Nifti1Image(phantom, ASYMMETRIC)
    image.header.set_slope_inter(3e38, 0)
    nib.save(image, tmp_path / "slope.nii")
    nib.save(nib.Nifti1Image(np.where(phantom > 0, 1e300, -1000.0), ASYMMETRIC), tmp_path / "huge.nii")
    for name in ("slope.nii", "huge.nii"):
        assert run("segment", tmp_path / name, "-o", tmp_path / "out", "--weights", weights) == EXIT_FAILED_CASES
        assert len(capfd.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("ending", ["2> /dev/full", "2>&-"])
def test_errors_that_nobody_can_read_keep_their_exit_code(ct, weights, tmp_path, ending):
    command = f'"$0" -m scoat_fast.cli segment "$@" {ending}'
    arguments = [sys.executable, tmp_path / "missing.nii.gz", ct, "-o", tmp_path / "out", "--weights", weights]
    for more, code in (([], EXIT_FAILED_CASES), (["--threshold", "7"], EXIT_USAGE)):
        done = subprocess.run(["bash", "-c", command, *map(str, arguments), *more], capture_output=True, timeout=120)
        assert done.returncode == code
        assert b"Traceback" not in done.stderr
        assert done.stdout.count(b"mL of opacity") == (not more)
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["failed", "ok"]


def test_a_newline_in_a_name_makes_no_second_line(ct, weights, tmp_path, capsys):
    path, out = ct.rename(ct.parent / "a\nb.nii.gz"), tmp_path / "out"
    assert run("segment", path, "-o", out, "--weights", weights) == EXIT_OK
    assert capsys.readouterr().out.startswith("a\\nb: ")
    (out / "a\nb.json").write_text("{}")
    assert run("segment", path, "-o", out, "--weights", weights) == EXIT_FAILED_CASES
    error = capsys.readouterr().err
    assert "a\\nb.json: cannot be written" in error
    assert len(error.splitlines()) == 1


def test_links_that_lead_to_themselves_cost_no_other_case(ct, weights, tmp_path):
    for name in ("loop.nii.gz", "loop"):
        (ct.parent / name).symlink_to(ct.parent / name)
    assert run("segment", ct.parent, "-o", tmp_path / "out", "--weights", weights) == EXIT_FAILED_CASES
    assert sorted(row["status"] for row in rows_of(tmp_path / "out")) == ["failed", "failed", "ok"]


def test_an_earlier_result_that_cannot_go_fails_its_case_alone(ct, weights, tmp_path, capsys):
    other, out = Path(shutil.copy(ct, ct.parent / "other.nii.gz")), tmp_path / "out"
    assert run("segment", ct, "-o", out, "--weights", weights) == EXIT_OK
    (out / "ct_probability.nii.gz").mkdir()
    capsys.readouterr()
    assert run("segment", ct, other, "-o", out, "--weights", weights) == EXIT_FAILED_CASES
    assert "ct_probability.nii.gz: cannot be written: it is of an earlier run" in capsys.readouterr().err
    assert [row["status"] for row in rows_of(out)] == ["failed", "ok"]


def test_nothing_waits_for_pipes(ct, weights, tmp_path, capsys):
    pipe, out = tmp_path / "pipe.nii.gz", tmp_path / "out"
    os.mkfifo(pipe)
    assert run("segment", ct, "-o", out, "--weights", weights, "--lung", pipe) == EXIT_FAILED_CASES
    assert "pipe.nii.gz: a NIfTI file is wanted" in capsys.readouterr().err
    with pytest.raises(scoat_fast.BadInputError, match="a picture file is wanted"):
        read_mask(pipe)
    (out / "cases.csv").unlink()
    os.mkfifo(out / "cases.csv")
    assert run("segment", ct, "-o", out, "--weights", weights) == EXIT_USAGE


def test_a_name_too_long_for_its_results_is_one_line(ct, weights, tmp_path, capsys):
    long = tmp_path / f"{'x' * 251}.nii"
    long.write_bytes(gzip.decompress(ct.read_bytes()))
    assert run("segment", long, ct, "-o", tmp_path / "out", "--weights", weights) == EXIT_FAILED_CASES
    error = capsys.readouterr().err
    assert "cannot be written: File name too long" in error
    assert len(error.splitlines()) == 1
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["failed", "ok"]


def test_a_link_to_nothing_in_place_of_a_result_is_left_alone(ct, weights, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "ct_mask.nii.gz").symlink_to(tmp_path / "elsewhere")
    assert run("segment", ct, "-o", out, "--weights", weights) == EXIT_FAILED_CASES
    assert (out / "ct_mask.nii.gz").is_symlink()
