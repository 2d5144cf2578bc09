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

import scoat_fast
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


@pytest.mark.filterwarnings("ignore::UserWarning")  # a bundle's file is a program: here it is ours
def test_monai_bundle_segments_as_the_command_does(output, tmp_path):
    from monai.bundle import run

    configs = EXAMPLES / "monai_bundle" / "configs"
    run(config_file=str(configs / "inference.json"), dataset_dir=str(EXAMPLES), output_dir=str(tmp_path))
    ours, theirs = nib.load(output / "ct_mask.nii.gz"), nib.load(tmp_path / "ct_mask.nii.gz")
    np.testing.assert_array_equal(theirs.affine, ours.affine)
    ours, theirs = (np.asarray(image.dataobj) > 0 for image in (ours, theirs))
    assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) > 0.99
    nib.save(nib.Nifti1Image(np.full((40, 30, 2), -500, np.int16), np.eye(4)), tmp_path / "ct.nii.gz")
    with pytest.raises(RuntimeError, match="Failed to evaluate") as error:
        run(config_file=str(configs / "inference.json"), dataset_dir=str(tmp_path), output_dir=str(tmp_path))
    assert "square slices are wanted" in repr(error.getrepr(chain=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_monai_bundle_trains(tmp_path):
    import torch
    from monai.bundle import run

    random = np.random.default_rng(0)
    for k in range(3):
        opacity = np.zeros((64, 64, 4))
        opacity[10 * k + 5 : 10 * k + 25, 20:40] = 1
        hu = random.normal(-850, 30, opacity.shape) + 600 * opacity
        for folder, voxels in (("images", hu), ("labels", opacity)):
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.eye(4)), tmp_path / folder / f"v{k}.nii.gz")
    torch.manual_seed(0)
    options = {"size": 64, "max_epochs": 8, "network_def#width": 4, "optimizer#lr": 0.02}
    config = EXAMPLES / "monai_bundle" / "configs" / "train.json"
    run(config_file=str(config), dataset_dir=str(tmp_path), output_dir=str(tmp_path / "models"), **options)
    net = scoat_fast.SCOATNet(width=4)
    net.load_state_dict(torch.load(tmp_path / "models" / "model.pt", weights_only=True))
    image = np.clip((nib.load(tmp_path / "images" / "v2.nii.gz").get_fdata() + 1250) / 1500, 0, 1)
    slices = torch.from_numpy(image).float().permute(2, 0, 1)[:, None]
    with torch.no_grad():
        found = net.eval()(slices)[:, 0].permute(1, 2, 0).numpy() > 0
    truth = nib.load(tmp_path / "labels" / "v2.nii.gz").get_fdata() > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.8


def test_monai_metadata_tells_the_truth():
    facts = json.loads((EXAMPLES / "monai_bundle" / "configs" / "metadata.json").read_text())
    net = scoat_fast.SCOATNet.from_pretrained("scoat-w16")
    data = facts["network_data_format"]["inputs"]["image"]
    assert data["spatial_shape"] == [net.pretrained.size] * 2 and data["num_channels"] == net.in_channels
    low, high = net.pretrained.window
    assert data["channel_def"]["0"].startswith(f"{low:g} to {high:g} HU")
    assert facts["version"] == facts["required_packages_version"]["scoat-fast"] == scoat_fast.__version__
