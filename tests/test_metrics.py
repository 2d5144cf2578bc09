"""Equations 8 to 10, against definitions that try everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from scoat_fast.imaging.regions import regions
from scoat_fast.study.metrics import METRICS, Counts, centre, count, scores


def brute_centre(points: np.ndarray, spacing) -> int:
    """Equation 10 as it stands: every point against every point of the edge."""
    region = np.zeros(points.max(axis=0) + 3, bool)
    region[tuple((points + 1).T)] = True
    inner = region.copy()
    for axis in range(region.ndim):
        inner &= np.roll(region, 1, axis) & np.roll(region, -1, axis)
    edge = np.argwhere(region & ~inner) - 1
    farthest = [(((point - edge) * np.asarray(spacing, float)) ** 2).sum(axis=1).max() for point in points]
    return int(np.argmin(farthest))


def flooded(mask: np.ndarray, steps: int) -> np.ndarray:
    """Labels by flooding; neighbours differ along up to ``steps`` axes."""
    labels = np.zeros(mask.shape, int)
    near = [step for step in itertools.product((-1, 0, 1), repeat=mask.ndim) if 0 < sum(map(abs, step)) <= steps]
    for start in map(tuple, np.argwhere(mask)):
        front = [] if labels[start] else [start]
        labels[start] = labels[start] or labels.max() + 1
        while front:
            at = front.pop()
            for step in near:
                to = tuple(a + b for a, b in zip(at, step, strict=True))
                if all(0 <= a < n for a, n in zip(to, mask.shape, strict=True)) and mask[to] and not labels[to]:
                    labels[to] = labels[start]
                    front.append(to)
    return labels


@pytest.mark.parametrize(("neighbours", "dims", "steps"), [(4, 2, 1), (8, 2, 2), (6, 3, 1), (18, 3, 2), (26, 3, 3)])
def test_regions_of_masks_of_any_dtype(neighbours, dims, steps):
    generator = np.random.default_rng(neighbours)
    for _ in range(40):
        mask = generator.random(tuple(generator.integers(1, 9, dims))) > generator.choice([0.3, 0.6, 0.8])
        expected = flooded(mask, steps)
        for dtype in (bool, np.uint8, np.float32):
            labels, count = regions(mask.astype(dtype), neighbours)
            assert count == expected.max() == labels.max()
            pairs = set(zip(labels.ravel().tolist(), expected.ravel().tolist(), strict=True))
            assert len(pairs) == count + (~mask).any() and all((a == 0) == (b == 0) for a, b in pairs)


@pytest.mark.parametrize("neighbours", [4, 8])
def test_regions_of_each_slice(neighbours):
    generator = np.random.default_rng(neighbours)
    for full in (0.2, 0.5, 0.9, 1.1):
        mask = generator.random((4, 7, 6)) < full
        labels, count = regions(mask, neighbours)
        seen = 0
        for image, found in zip(mask, labels, strict=True):
            alone, more = regions(image, neighbours)
            np.testing.assert_array_equal(found, np.where(alone, alone + seen, 0))
            seen += more
        assert seen == count


def brute_counts(found, truth, dims, spacing, centre_of) -> Counts:
    total = Counts(int((found & truth).sum()), int(found.sum()), int(truth.sum()))
    pairs = [(found, truth)] if dims == 3 else list(zip(found, truth, strict=True))
    for ours, theirs in pairs:
        a, b = (flooded(mask, steps=dims) for mask in (ours, theirs))
        places = {}
        for name, labels in (("a", a), ("b", b)):
            places[name] = []
            for number in range(1, labels.max() + 1):
                points = np.argwhere(labels == number)
                places[name].append(tuple(points[brute_centre(points, spacing[-ours.ndim :])]))
        right = [place for place in places["a"] if theirs[place]]
        met = {b[place] for place in right}
        if centre_of == "truth":
            met = [place for place in places["b"] if ours[place]]
        total += Counts(0, 0, 0, len(places["a"]), len(right), len(places["b"]), len(met))
    return total


def blobs(generator: np.random.Generator, shape, full: float) -> np.ndarray:
    """Regions of every size, with holes and bends; at times nothing."""
    noise = generator.random(shape)
    for axis in range(len(shape)):
        noise = (noise + np.roll(noise, 1, axis)) / 2
    return noise > np.quantile(noise, 1 - full) if full else np.zeros(shape, bool)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_thousand_random_pairs(dims):
    generator = np.random.default_rng(dims)
    for _ in range(500):
        shape = tuple(generator.integers(1, 4, 1)) + tuple(generator.integers(1, 11, 2))
        found, truth = (blobs(generator, shape, generator.choice([0, 0.02, 0.2, 0.6, 1])) for _ in range(2))
        spacing = tuple(generator.choice([0.5, 0.7, 1.0, 2.5], 3))
        centre_of = str(generator.choice(["prediction", "truth"]))
        assert count(found, truth, dims, spacing, centre_of) == brute_counts(found, truth, dims, spacing, centre_of)


@pytest.mark.parametrize("spacing", [(1, 1), (0.7, 0.7), (0.5, 2.0)])
def test_centres_of_large_regions(spacing):
    rows, columns = np.mgrid[:70, :60]
    disc = (rows - 31) ** 2 + (columns - 30) ** 2 <= 29**2
    ring = disc & ((rows - 31) ** 2 + (columns - 30) ** 2 >= 20**2)
    letter_c = ring & ~((columns > 30) & (abs(rows - 31) < 8))
    for region in (disc, ring, letter_c, rows * 60 > columns * 70, np.eye(70, 60, dtype=bool), rows >= 0):
        points = np.argwhere(region)
        assert centre(points, spacing) == brute_centre(points, spacing)
    at = np.argwhere(disc)[centre(np.argwhere(disc), (1, 1))]
    assert tuple(at) == (31, 30)


def test_voxels_are_those_of_monai():
    from monai.metrics import ConfusionMatrixMetric, DiceMetric
    from torch import from_numpy

    generator = np.random.default_rng(5)
    for _ in range(20):
        found, truth = (generator.random((3, 9, 8)) > generator.choice([0.3, 0.9]) for _ in range(2))
        ours = scores(count(found, truth))
        pair = [from_numpy(mask.astype(np.float32))[None, None] for mask in (found, truth)]
        rates = ConfusionMatrixMetric(metric_name=("sensitivity", "precision"))
        rates(*pair)
        theirs = [DiceMetric()(*pair), *rates.aggregate()]
        for name, value in zip(("DSC", "SEN", "PPV"), theirs, strict=True):
            assert ours[name] == pytest.approx(float(value), rel=1e-6)
        volumes = found.sum(), truth.sum()
        assert ours["VA"] == pytest.approx(1 - 2 * abs(int(volumes[0]) - int(volumes[1])) / sum(map(int, volumes)))


def test_where_there_is_nothing():
    nothing, something = np.zeros((1, 4, 4), bool), np.eye(4, dtype=bool)[None]
    assert scores(count(nothing, nothing)) == dict.fromkeys(METRICS, 1.0)
    assert scores(count(nothing, nothing), "skip") == dict.fromkeys(METRICS)
    missed, invented = count(nothing, something), count(something, nothing)
    assert scores(missed) == scores(invented) == {**dict.fromkeys(METRICS, 0.0), "VA": -1.0}
    assert [name for name, value in scores(missed, "skip").items() if value is None] == ["PPV", "RLP"]
    assert [name for name, value in scores(invented, "skip").items() if value is None] == ["SEN", "RLR"]


def test_counts_of_slices_add_up_to_those_of_the_case():
    generator = np.random.default_rng(7)
    found, truth = (blobs(generator, (4, 12, 12), 0.2) for _ in range(2))
    parts = [count(found[k : k + 1], truth[k : k + 1]) for k in range(4)]
    assert sum(parts, Counts()) == count(found, truth)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"truth": np.ones((1, 4, 5))}, "two masks"), ({"dims": 4}, "dims"), ({"centre_of": "both"}, "centre_of")],
)
def test_what_cannot_be_counted(change, reason):
    with pytest.raises(ValueError, match=reason):
        count(**{"found": np.ones((1, 4, 4)), "truth": np.ones((1, 4, 4)), **change})
    with pytest.raises(ValueError, match="empty must be"):
        scores(Counts(), "nan")
