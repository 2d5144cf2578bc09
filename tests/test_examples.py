"""The shipped weights on the real CT that ships, the way the README says."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scoat_fast.cli import EXIT_OK, main
from scoat_fast.pretrained import shipped

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module", params=shipped())
def output(request, tmp_path_factory) -> Path:
    """Both examples, segmented."""
    out = tmp_path_factory.mktemp(request.param)
    inputs = [str(EXAMPLES / name) for name in ("ct.nii.gz", "dicom")]
    assert main(["segment", *inputs, "-o", str(out), "--weights", request.param, "--quiet"]) == EXIT_OK
    return out


def test_opacity_is_found_where_radiologists_saw_it(output):
    found, truth = (nib.load(path) for path in (output / "ct_mask.nii.gz", EXAMPLES / "ct_truth.nii.gz"))
    assert (found.affine == truth.affine).all()
    found, truth = (np.asarray(image.dataobj) > 0 for image in (found, truth))
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.7


def test_a_dicom_series_comes_back_on_its_grid(output):
    """Two slices a millimetre apart: what is found in one is found in the other."""
    image = nib.load(output / "dicom_mask.nii.gz")
    found = np.asarray(image.dataobj) > 0
    assert found.shape == (512, 512, 2)
    np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :3], axis=0), (0.625, 0.625, 1))
    first, second = found[..., 0], found[..., 1]
    assert 2 * (first & second).sum() > 0.8 * (first.sum() + second.sum())


def test_numbers_agree_between_files(output):
    with (output / "cases.csv").open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"ct", "dicom"}
    for case, row in rows.items():
        mask = nib.load(output / f"{case}_mask.nii.gz")
        report = json.loads((output / f"{case}.json").read_text())
        assert int(row["voxels"]) == report["statistics"]["voxels"] == np.asarray(mask.dataobj).sum()
        mm3 = int(row["voxels"]) * abs(np.linalg.det(mask.affine[:3, :3]))
        assert float(row["mm3"]) == pytest.approx(mm3, rel=1e-5)


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "nibabel.load" in block)
    names: dict = {}
    exec(code.replace("scan.nii.gz", str(EXAMPLES / "ct.nii.gz")), names)
    assert names["found"].mask.shape == (256, 256, 12)
    assert names["found"].statistics["ml"] > 50


def run_example(name: str, *arguments):
    """What the ``main`` of an example gives."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(*arguments)


def test_monai_inferers():
    whole, windows = run_example("monai_inferers", 4)
    assert whole == 1.0 and 0.8 < windows < 0.99


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*num_workers.*")
def test_lightning_module():
    losses = run_example("lightning_module")
    assert len(losses) == 32 and losses[-1] < 0.6 * losses[0]
