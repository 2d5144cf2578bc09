"""The lungs by thresholds: on a chest made of ellipsoids, and on the real one of the examples."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scoat_fast.imaging.volume import Turn
from scoat_fast.segmentation.lungs import LEFT, RIGHT, find_lungs, given_lungs

EXAMPLES = Path(__file__).parent.parent / "examples"
SPACING = (5.0, 1.6, 1.5)
SHAPE = (24, 200, 240)  # 120 x 320 x 360 mm


def ellipsoid(centre, radii) -> np.ndarray:
    """Where a voxel lies in an ellipsoid, by mm from the middle of the volume: to the head, the back and the left."""
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(SHAPE, SPACING, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    return sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, radii, strict=True)) < 1


@pytest.fixture
def chest() -> dict[str, np.ndarray]:
    """A body on a table under a blanket, with two lungs, a trachea, and gas in the stomach."""
    hu = np.full(SHAPE, -1000.0, np.float32)
    hu[ellipsoid((0, 0, 0), (400, 115, 160))] = 40
    right, left = ellipsoid((0, 0, -75), (55, 80, 60)), ellipsoid((0, 5, 75), (52, 75, 55))
    hu[right | left] = -830
    trachea, stomach = ellipsoid((40, 30, 0), (60, 9, 9)), ellipsoid((-52, -50, 60), (12, 20, 25))
    hu[trachea | stomach] = -995
    hu[:, 180:184, 20:220] = 200  # the table
    hu[:, 22:24, 30:210] = -100  # a thin blanket, and air below it
    return {"hu": hu, "right": right & ~trachea & ~stomach, "left": left & ~trachea & ~stomach, "trachea": trachea}


def dice(a, b) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_both_lungs_and_nothing_else(chest):
    found = find_lungs(chest["hu"], np.zeros(SHAPE, np.uint8), SPACING)
    assert found.warnings == [] and found.source == "own" and found.labels.dtype == np.uint8
    assert dice(found.labels == RIGHT, chest["right"]) > 0.97
    assert dice(found.labels == LEFT, chest["left"]) > 0.97
    upper = chest["trachea"] & (np.arange(SHAPE[0])[:, None, None] > 18)  # where it is far from the lungs
    assert (found.labels[upper] > 0).mean() < 0.05
    assert not found.labels[:, 160:].any() and not found.labels[:, :26].any()


@pytest.mark.parametrize("marked", [True, False])
def test_consolidation_at_the_chest_wall_is_lung_where_it_is_marked(chest, marked):
    dense = chest["left"] & ellipsoid((0, 60, 110), (40, 45, 45))
    chest["hu"][dense] = 45
    opacity = dense if marked else np.zeros(SHAPE, bool)
    found = find_lungs(chest["hu"], opacity, SPACING)
    share = (dense & (found.labels == LEFT)).sum() / dense.sum()
    assert share > 0.97 if marked else share < 0.8
    if marked:
        assert dice(found.labels == LEFT, chest["left"]) > 0.96


def test_a_lung_that_is_all_consolidation_is_warned_about(chest):
    chest["hu"][chest["left"]] = 45
    found = find_lungs(chest["hu"], np.zeros(SHAPE), SPACING)
    assert found.warnings == ["no left lung was found"]
    assert dice(found.labels == RIGHT, chest["right"]) > 0.97
    marked = find_lungs(chest["hu"], chest["left"], SPACING)
    assert "of the lungs are no air" in marked.warnings[0]
    assert dice(marked.labels == LEFT, chest["left"]) > 0.95


def test_lungs_that_touch_are_told_apart(chest):
    bridge = ellipsoid((0, -40, 0), (40, 6, 30))
    chest["hu"][bridge] = -830
    found = find_lungs(chest["hu"], np.zeros(SHAPE), SPACING)
    assert dice(found.labels == RIGHT, chest["right"]) > 0.95
    assert dice(found.labels == LEFT, chest["left"]) > 0.95


@pytest.mark.parametrize("hu", [
    np.full(SHAPE, 40, np.int16), np.full(SHAPE, -1000, np.int16), np.full((1, 9, 7), -500, np.float32),
], ids=["tissue", "air", "tiny"])  # fmt: skip
def test_no_lungs_is_not_zero(hu):
    found = find_lungs(hu, np.zeros(hu.shape), SPACING)
    assert found.labels is None and found.source is None
    assert found.warnings == ["no lungs were found: no share of the lung"]


def test_one_slice(chest):
    found = find_lungs(chest["hu"][12:13].astype(np.int16), np.zeros((1, *SHAPE[1:])), SPACING)
    assert dice(found.labels[0] == RIGHT, chest["right"][12]) > 0.95


def test_a_given_mask_gets_its_sides(chest):
    found = given_lungs(chest["right"] | chest["left"], chest["hu"])
    alone = given_lungs(chest["left"], chest["hu"])
    np.testing.assert_array_equal(alone.labels, np.where(chest["left"], LEFT, 0))
    assert found.source == "given" and found.warnings == []
    np.testing.assert_array_equal(found.labels == RIGHT, chest["right"])
    np.testing.assert_array_equal(found.labels == LEFT, chest["left"])
    assert given_lungs(np.zeros((2, 3, 4))).labels is None


def test_a_real_chest():
    image, truth = (nib.load(EXAMPLES / name) for name in ("ct.nii.gz", "ct_truth.nii.gz"))
    turn = Turn(image.affine)
    hu, opacity = (turn.to_slices(np.asarray(x.dataobj)) for x in (image, truth))
    found = find_lungs(hu, opacity, turn.spacing)
    assert found.warnings == []
    sides = [(found.labels == side).sum() * turn.voxel_mm3 / 1000 for side in (RIGHT, LEFT)]
    assert all(700 < ml < 1700 for ml in sides)
    assert (found.labels[opacity > 0] > 0).mean() > 0.97
    air = (found.labels > 0) & (hu < -950)
    assert air.sum() < 0.02 * (found.labels > 0).sum()
    middle = found.labels.shape[2] // 2
    assert (found.labels[:, :, : middle - 20] != LEFT).all() and (found.labels[:, :, middle + 20 :] != RIGHT).all()
