"""Reading and writing images: geometry kept, damage named."""

from __future__ import annotations

import csv
import errno
import gzip
import itertools
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ASYMMETRIC
from limits import BYTES, SECONDS, within
from nibabel.orientations import apply_orientation, inv_ornt_aff
from PIL import Image

from scoat_fast import BadInputError, OutputError, files
from scoat_fast.imaging import packing
from scoat_fast.imaging.grid import from_square, to_square
from scoat_fast.imaging.nifti import new_header, nifti_bytes, read_nifti
from scoat_fast.imaging.pictures import read_mask, read_picture
from scoat_fast.imaging.volume import Turn, check_hu, check_plane
from scoat_fast.imaging.window import LUNG, Window

ORIENTATIONS = [
    np.array(list(zip(order, flips, strict=True)))
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def test_window_is_linear_and_cut_off():
    hu = np.array([-3000.0, -1250, -500, 250, 3000])
    np.testing.assert_allclose(LUNG.apply(hu), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(LUNG.apply(torch.from_numpy(hu)).numpy(), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(LUNG.invert(LUNG.apply(hu[1:4])), hu[1:4])
    with pytest.raises(ValueError, match="low < high"):
        Window(100, 100)


def test_turn_shows_slices_as_a_radiologist_sees_them(phantom):
    slices = Turn(ASYMMETRIC).to_slices(phantom)  # axes left, posterior, superior
    assert slices.shape == (6, 36, 40)
    np.testing.assert_array_equal(slices, phantom.transpose(2, 1, 0))
    np.testing.assert_allclose(Turn(ASYMMETRIC).spacing, (2.5, 0.8, 0.9))


@pytest.mark.parametrize(
    "orientation", ORIENTATIONS, ids=lambda o: "".join(f"{'+-'[int(s < 0)]}{int(a)}" for a, s in o)
)
def test_turn_undoes_every_axis_order_and_flip(phantom, orientation):
    stored = apply_orientation(phantom, orientation)
    turn = Turn(ASYMMETRIC @ inv_ornt_aff(orientation, phantom.shape))
    slices = turn.to_slices(stored)
    np.testing.assert_array_equal(slices, phantom.transpose(2, 1, 0))
    np.testing.assert_array_equal(turn.from_slices(slices), stored)
    np.testing.assert_allclose(turn.spacing, (2.5, 0.8, 0.9))
    np.testing.assert_allclose(turn.slices_affine(stored.shape), Turn(ASYMMETRIC).slices_affine(phantom.shape))


@pytest.mark.parametrize("shape", [(40, 40), (37, 50), (50, 21), (20, 90)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.5, 0.8), (2.0, 0.7)])
def test_square_grid_and_back(shape, spacing):
    """A smooth picture survives the way to a larger square grid and back, and keeps its shape."""
    y, x = np.meshgrid(*(np.linspace(0, 3, n) for n in shape), indexing="ij")
    slices = torch.from_numpy(np.sin(x) * np.cos(y))[None, None] * 0.2 + 0.5
    square = to_square(slices, spacing, 256)
    assert square.shape == (1, 1, 256, 256)
    back = from_square(square, shape, spacing)
    assert back.shape == slices.shape
    inner = (..., slice(1, -1), slice(1, -1))  # the outermost pixels mix with what was padded
    torch.testing.assert_close(back[inner], slices[inner], rtol=0, atol=0.03)
    height, width = shape[0] * spacing[0], shape[1] * spacing[1]
    assert (square > 0.1).double().mean() == pytest.approx(min(height, width) / max(height, width), abs=0.06)


def test_square_grid_of_its_own_size_changes_nothing():
    slices = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(to_square(slices, (0.7, 0.7), 64), slices, rtol=0, atol=0)
    torch.testing.assert_close(from_square(slices, (64, 64), (0.7, 0.7)), slices, rtol=0, atol=0)


# NIfTI


def save(path, voxels, affine=ASYMMETRIC, kind=nib.Nifti1Image, **fields):
    """Writes a NIfTI file and then sets raw fields of its header."""
    image = kind(voxels, affine)
    raw = bytearray(image.to_bytes())
    header = type(image.header)(bytes(raw[: image.header.sizeof_hdr]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[: image.header.sizeof_hdr] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32, np.float64, np.uint8, np.int32])
def test_nifti_is_read_as_nibabel_reads_it(tmp_path, name, kind, dtype):
    voxels = (np.arange(24).reshape(2, 3, 4) * 5).astype(dtype)
    path = save(tmp_path / name, voxels, kind=kind, scl_slope=1.5, scl_inter=-1024)
    volume = read_nifti(path)
    np.testing.assert_allclose(volume.voxels, nib.load(path).get_fdata())
    np.testing.assert_allclose(volume.affine, nib.load(path).affine)
    assert volume.warnings == []


def test_a_slope_of_zero_means_not_scaled(tmp_path):
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    assert (read_nifti(save(tmp_path / "a.nii", voxels, scl_slope=0, scl_inter=7)).voxels == voxels).all()


def test_big_endian_and_trailing_axes_of_one(tmp_path):
    voxels = np.arange(24, dtype=">i2").reshape(2, 3, 4, 1)
    image = nib.Nifti1Image(voxels, ASYMMETRIC, nib.Nifti1Header(endianness=">"))
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    volume = read_nifti(tmp_path / "a.nii")
    np.testing.assert_array_equal(volume.voxels, voxels[..., 0])
    (tmp_path / "b.nii.gz").write_bytes(nifti_bytes((volume.voxels > 4).astype(np.uint8), volume.header))
    assert nib.load(tmp_path / "b.nii.gz").shape == (2, 3, 4, 1)


@pytest.mark.parametrize(("unit", "mm"), [("mm", 1), ("meter", 1000), ("micron", 0.001), ("unknown", 1)])
def test_units_of_length(tmp_path, unit, mm):
    image = nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), ASYMMETRIC)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    spacing = Turn(read_nifti(tmp_path / "a.nii").affine).spacing
    np.testing.assert_allclose(spacing, np.array([2.5, 0.8, 0.9]) * mm, rtol=1e-6)


@pytest.mark.parametrize("codes", [(1, 0), (0, 2), (1, 4), (0, 0)])
def test_results_have_the_geometry_of_the_input_byte_by_byte(tmp_path, codes):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), ASYMMETRIC)
    image.set_qform(ASYMMETRIC, codes[0])
    image.set_sform(ASYMMETRIC + np.eye(4) * 1e-3, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"], image.header["aux_file"] = b"DOE^JANE", b"jane.txt"
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_nifti(tmp_path / "a.nii.gz")
    mask = np.zeros((4, 5, 6), np.uint8)
    mask[1, 2, 3] = 1
    (tmp_path / "m.nii.gz").write_bytes(nifti_bytes(mask, volume.header))
    before, after = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "m.nii.gz")
    for field in (
        "dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
        "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units",
    ):  # fmt: skip
        assert before.header[field].tobytes() == after.header[field].tobytes(), field
    assert (before.affine == after.affine).all()
    assert after.get_data_dtype() == np.uint8
    assert (np.asarray(after.dataobj) == mask).all()
    assert b"JANE" not in gzip.decompress((tmp_path / "m.nii.gz").read_bytes()).upper()


def broken_nifti(tmp_path) -> dict[str, Path]:
    """Files that must be refused, by what is wrong with them."""
    voxels = np.random.default_rng(0).integers(-1000, 400, (4, 5, 6)).astype(np.int16)
    nan_affine, flat_affine = np.array(ASYMMETRIC), np.array(ASYMMETRIC)
    nan_affine[0, 0] = np.nan
    flat_affine[:3, 1] = flat_affine[:3, 0]
    good = save(tmp_path / "good.nii.gz", voxels).read_bytes()
    plain = save(tmp_path / "good.nii", voxels).read_bytes()
    made = {
        "truncated gzip": good[:-30],
        "half a gzip": good[: len(good) // 2],
        "flipped byte": good[:200] + bytes([good[200] ^ 0xFF]) + good[201:],
        "garbage after gzip": good + b"garbage",
    }
    bad = {name: tmp_path / f"{name}.nii.gz" for name in made}
    for name, content in made.items():
        bad[name].write_bytes(content)
    for name, content in {
        "empty": b"",
        "not a nifti": b"hello" * 500,
        "truncated header": plain[:300],
        "truncated voxels": plain[:-1],
        "too much": plain + b"\0" * (1 << 20),
    }.items():
        bad[name] = tmp_path / f"{name}.nii"
        bad[name].write_bytes(content)
    unset = {"sform_code": 0, "qform_code": 0}
    for name, fields in {
        "NaN slope": {"scl_slope": np.nan},
        "infinite slope": {"scl_slope": np.inf},
        "infinite intercept": {"scl_inter": -np.inf},
        "NaN spacing": {"pixdim": [1, 1, np.nan, 1, 0, 0, 0, 0], **unset},
        "NaN spacing beside an sform": {"pixdim": [1, 1, np.nan, 1, 0, 0, 0, 0]},
        "zero spacing": {"pixdim": [1, 0, 1, 1, 0, 0, 0, 0], **unset},
        "negative spacing": {"pixdim": [1, -1, 1, 1, 0, 0, 0, 0], **unset},
        "broken quaternion": {"sform_code": 0, "qform_code": 1, "quatern_b": 5},
        "two dimensions": {"dim": [2, 20, 6, 1, 1, 1, 1, 1]},
        "four dimensions": {"dim": [4, 4, 5, 3, 2, 1, 1, 1]},
        "no dimensions": {"dim": [0, 4, 5, 6, 1, 1, 1, 1]},
        "negative dimension": {"dim": [3, -4, 5, 6, 1, 1, 1, 1]},
        "many dimensions": {"dim": [12, 4, 5, 6, 1, 1, 1, 1]},
        "petabytes": {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]},
        "colours": {"datatype": 128, "bitpix": 24},
        "complex": {"datatype": 32, "bitpix": 64},
        "unknown type": {"datatype": 999},
        "header alone": {"magic": b"ni1"},
        "odd offset": {"vox_offset": 1e30},
        "NaN offset": {"vox_offset": np.nan},
        "inside the header": {"vox_offset": 10},
    }.items():
        bad[name] = save(tmp_path / f"{name}.nii", voxels, **fields)
    bad["NaN affine"] = save(tmp_path / "nan affine.nii", voxels, ASYMMETRIC, srow_x=nan_affine[0])
    bad["singular affine"] = save(
        tmp_path / "flat.nii", voxels, **{f"srow_{a}": flat_affine[i] for i, a in enumerate("xyz")}
    )
    bad["missing"] = tmp_path / "nowhere.nii"
    bad["a folder"] = tmp_path
    return bad


@pytest.fixture(params=["isal", "gzip"])
def unpacker(request, monkeypatch):
    """The fast one, and Python's own."""
    if request.param == "gzip":
        monkeypatch.setattr(packing, "igzip", None)
    else:
        assert packing.igzip is not None


def test_packed_volumes_come_back(unpacker, phantom, tmp_path):
    header = new_header(ASYMMETRIC, phantom.shape)
    assert nifti_bytes(phantom, header) == nifti_bytes(phantom, header)
    (tmp_path / "ct.nii.gz").write_bytes(nifti_bytes(phantom, header))
    assert np.array_equal(read_nifti(tmp_path / "ct.nii.gz").voxels, phantom)
    assert np.array_equal(nib.load(tmp_path / "ct.nii.gz").dataobj, phantom)


def test_broken_nifti_files_are_refused_by_name(unpacker, tmp_path):
    for name, path in broken_nifti(tmp_path).items():
        with pytest.raises(BadInputError) as error:
            read_nifti(path)
        assert str(error.value).startswith(f"{path}: "), name
        assert "\n" not in str(error.value), name


def test_an_unknown_orientation_is_warned_about(tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((2, 3, 4), np.int16), sform_code=0, qform_code=0)
    assert "does not say how the patient lies" in read_nifti(path).warnings[0]


def test_contradicting_spacings_are_warned_about(tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((2, 3, 4), np.int16), pixdim=[1, 3, 3, 3, 0, 0, 0, 0])
    assert "differs from that of its affine" in read_nifti(path).warnings[0]


def with_qform(path, qform, affine=ASYMMETRIC, unit="mm", kind=nib.Nifti1Image, **fields):
    """A file with both forms, the affine as its sform; and with raw fields of its header."""
    header = kind.header_class()
    header.set_qform(qform, 1)
    header.set_xyzt_units(unit)
    names = ("pixdim", "xyzt_units", "qform_code", *(f"quatern_{a}" for a in "bcd"), *(f"qoffset_{a}" for a in "xyz"))
    return save(path, np.zeros((40, 36, 6), np.int16), affine, kind, **{name: header[name] for name in names} | fields)


def turned(degrees: float) -> np.ndarray:
    """About the long axis of the patient."""
    turn, angle = np.eye(4), np.radians(degrees)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


def moved(x: float) -> np.ndarray:
    move = np.eye(4)
    move[0, 3] = x
    return move


MIRROR = np.diag([-1.0, 1, 1, 1])


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(("unit", "scale"), [("mm", 1), ("meter", 1e-3), ("micron", 1e3)])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (np.eye(4), None),
        (moved(2), None),  # less than from slice to slice
        (moved(3), "3 mm apart"),
        (turned(1), None),
        (turned(20), "mm apart"),
        (turned(180), "mm apart"),
        (MIRROR, "mirror each other"),
        (turned(90) @ MIRROR, "mirror each other"),
    ],
)
def test_forms_that_place_a_volume_differently_are_warned_about(tmp_path, kind, unit, scale, change, said):
    size = np.diag([scale, scale, scale, 1.0])
    path = with_qform(tmp_path / "a.nii", size @ change @ ASYMMETRIC, size @ ASYMMETRIC, unit=unit, kind=kind)
    volume = read_nifti(path)
    np.testing.assert_allclose(volume.affine, ASYMMETRIC, rtol=1e-5, atol=1e-4)
    if said is None:
        assert volume.warnings == []
    else:
        (warning,) = volume.warnings
        assert said in warning and "the sform is used" in warning
        assert ("mirror" in warning) == ("mirror" in said)


@pytest.mark.parametrize(("share", "differ"), [(0.05, False), (0.4, True)])
def test_a_shear_that_a_qform_cannot_have_counts_by_how_far_it_leads(tmp_path, share, differ):
    shear = np.eye(4)
    shear[1, 2] = share
    header = new_header(shear @ ASYMMETRIC, (40, 36, 6))
    volume = read_nifti(with_qform(tmp_path / "a.nii", header.get_qform(), shear @ ASYMMETRIC))
    said = [warning for warning in volume.warnings if "the sform is used" in warning]
    assert len(said) == differ and "mirror" not in "".join(said)


@pytest.mark.parametrize("fields", [
    {"quatern_b": np.nan}, {"quatern_c": np.inf}, {"quatern_d": 5}, {"qoffset_x": np.nan}, {"qoffset_y": 3e38},
    {"pixdim": [1, -0.9, 0.8, 2.5, 0, 0, 0, 0]}, {"pixdim": [7, 0.9, 0.8, 2.5, 0, 0, 0, 0]},
])  # fmt: skip
def test_a_qform_without_sense_beside_an_sform_is_warned_about(tmp_path, fields):
    volume = read_nifti(with_qform(tmp_path / "a.nii", ASYMMETRIC, **fields))
    assert "the sform is used" in volume.warnings[-1] and "mirror" not in volume.warnings[-1]
    np.testing.assert_allclose(volume.affine, ASYMMETRIC, rtol=1e-6)


@pytest.mark.parametrize("fields", [{"qform_code": 0}, {"sform_code": 0}, {"pixdim": [0, 0.9, 0.8, 2.5, 0, 0, 0, 0]}])
def test_one_form_is_compared_with_none_and_zeros_of_a_qform_have_a_sense(tmp_path, fields):
    affine = np.diag([0.9, 0.8, 2.5, 1])
    qform = affine if "pixdim" in fields else MIRROR @ affine
    path = with_qform(tmp_path / "a.nii", qform, affine, **fields)
    assert nib.load(path).header["quatern_b"] == 0
    assert read_nifti(path).warnings == []


# The width of a slice


@pytest.mark.parametrize(
    "size",
    [
        (256, 256, 0.168, 0.168),  # the example in cm: 112 mL would be 0.1
        (256, 256, 16.8, 16.8),  # and in tenths of a mm
        (512, 512, 0.0625, 0.0625),
        (512, 512, 0.09766, 0.09766),  # 500 mm
        (512, 400, 0.1367, 0.1367),  # 700 mm
        (128, 100, 0.28, 0.28),
        (64, 64, 0.29, 0.2),
        (80, 40, 20, 20),
    ],
)
def test_slices_of_a_width_that_no_chest_has_are_refused(size):
    rows, columns, *mm = size
    with pytest.raises(BadInputError, match=r"slices of 80 to 1500 mm across are wanted, got .* is its unit mm\?"):
        check_plane("a.nii", in_order(mm), (2, rows, columns))


@pytest.mark.parametrize(
    "size",
    [
        (512, 512, 0.293, 0.293),  # one lung, 150 mm
        (512, 512, 0.195, 0.195),  # 100 mm
        (1024, 1024, 0.146, 0.146),
        (512, 512, 1.5625, 1.5625),  # 800 mm
        (256, 256, 5.8, 5.8),
        (64, 64, 6, 6),
        (512, 90, 0.7, 0.7),  # a crop, or a stack of coronal slices
        (20, 18, 0.9, 0.8),
        (63, 200, 0.1, 0.1),
        (200, 9, 0.1, 0.1),
        (1, 1, 0.7, 0.7),
    ],
)
def test_slices_of_any_width_that_a_scan_or_a_crop_has_pass(size):
    rows, columns, *mm = size
    assert check_plane("a.nii", in_order(mm), (2, rows, columns)) == []


@pytest.mark.parametrize("size", [(64, 64, 0.7, 0.7), (96, 80, 0.7, 0.8), (64, 64, 0.55, 0.55), (128, 128, 0.5, 0.5)])
def test_crops_that_may_be_a_chest_in_another_unit_are_warned_about(size):
    rows, columns, *mm = size
    (warning,) = check_plane("a.nii", in_order(mm), (2, rows, columns))
    assert "mm across" in warning and "if its unit is not mm" in warning


def in_order(mm: list[float]) -> Turn:
    """Slices from the feet up, 2.5 mm apart, with these distances between rows and columns."""
    return Turn(np.array([[0, 0, -mm[1], 0], [0, -mm[0], 0, 0], [2.5, 0, 0, 0], [0, 0, 0, 1]]))


# Hounsfield units


def test_a_chest_in_hu_passes(phantom):
    assert check_hu("ct", phantom.transpose(2, 1, 0)) == []


def test_blank_slices_only_warn(phantom):
    slices = phantom.transpose(2, 1, 0).copy()
    slices[[1, 4]] = -1000
    assert check_hu("ct", slices) == ["2 blank slices, counted from the feet: 1, 4"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda hu: hu * 0, "every voxel is 0"),
        (lambda hu: np.where(hu == hu.max(), np.nan, hu), "NaN or infinite"),
        (lambda hu: np.where(hu == hu.max(), -np.inf, hu), "NaN or infinite"),
        (lambda hu: hu + 1024, "no air or lung"),
        (lambda hu: LUNG.apply(hu), "no air or lung"),
        (lambda hu: LUNG.apply(hu) * 255, "no air or lung"),
        (lambda hu: (hu - hu.mean()) / hu.std(), "no air or lung"),
        (lambda hu: np.minimum(hu, -300), "no tissue"),
        (lambda hu: hu * 20, "many voxels above 5000"),
    ],
)
def test_what_is_not_a_chest_in_hu_is_refused(phantom, change, reason):
    with pytest.raises(BadInputError, match=reason):
        check_hu("ct", change(phantom.transpose(2, 1, 0).astype(np.float32)))


# Pictures


def grey_picture(shape=(30, 40)):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [*itertools.product(["png", "tif", "webp"], ["L", "RGB", "RGBA", "P"]), ("jpg", "L"), ("jpg", "RGB")],
)
def test_pictures_of_every_kind(tmp_path, suffix, mode):
    grey = np.kron(grey_picture((5, 6)) // 8 * 8, np.ones((8, 8), np.uint8))  # blocks that survive JPEG
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(grey).convert(mode).save(path, **({"lossless": True} if suffix == "webp" else {"quality": 100}))
    np.testing.assert_allclose(read_picture(path), grey / 255, atol=3 / 255 if suffix == "jpg" else 1e-6)


def test_pictures_of_sixteen_bits(tmp_path):
    grey = np.random.default_rng(0).integers(0, 65536, (9, 11)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_picture(tmp_path / "a.png"), grey / 65535, atol=1e-6)


def test_masks_of_one_bit(tmp_path):
    mask = grey_picture() > 128
    Image.fromarray(mask).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), mask)


def test_broken_pictures_are_refused_by_name(tmp_path):
    Image.fromarray(grey_picture()).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(good[:-200])
    (tmp_path / "corrupt.png").write_bytes(good[:100] + bytes(50) + good[150:])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(grey_picture((9, 9, 3))).save(tmp_path / "colour.png")
    Image.new("F", (8, 8)).save(tmp_path / "float.tif")
    pages = [Image.fromarray(grey_picture()) for _ in range(2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    for name in ("truncated.png", "corrupt.png", "text.png", "empty.jpg", "colour.png", "float.tif", "pages.tif",
                 "bomb.png", "missing.png"):  # fmt: skip
        with pytest.raises(BadInputError, match=name):
            read_picture(tmp_path / name)


# Files that appear whole or not at all


def test_files_appear_together(tmp_path):
    with files.StagedFiles() as staged:
        staged.write(tmp_path / "a", lambda file: file.write(b"a"))
        staged.write(tmp_path / "b", lambda file: file.write(b"b"))
        assert not (tmp_path / "a").exists()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"a", "b": b"b"}


def test_an_error_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(RuntimeError), files.StagedFiles() as staged:
        staged.write(tmp_path / "a", lambda file: file.write(b"new"))
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def stage_and_die(folder: Path, ready: Callable[[], object]) -> None:
    """In a process of its own: stages files, calls ``ready``, and is gone without a word."""
    child = os.fork()
    if child == 0:
        killed = files.StagedFiles()
        for name in ("a[1]", "b"):
            killed.write(folder / name, lambda file: file.write(b"half"))
        ready()
        os._exit(0)
    os.waitpid(child, 0)


def test_what_a_killed_writer_left_goes_away(tmp_path):
    def write() -> None:
        files._remove_leftovers.cache_clear()  # as in another process
        files.write_text(tmp_path / "c", "whole")

    stage_and_die(tmp_path, write)
    left = {path for path in tmp_path.iterdir() if path.suffix == ".part"}
    assert len(left) == 2 and (tmp_path / "c").exists()  # they were of a living process
    foreign = [tmp_path / f".scoat_fast-01234567-1-{name}.part" for name in ("new", "old")]  # of another machine
    for path in (*foreign, tmp_path / ".somebody.part"):
        path.write_text("half")
        os.utime(path, (1, 1) if path != foreign[0] else None)
    write()
    assert set(tmp_path.iterdir()) == {tmp_path / "c", foreign[0], tmp_path / ".somebody.part"}


def test_many_files_in_a_folder_do_not_slow_writing_down(tmp_path, monkeypatch):
    listed, scan = [], os.scandir
    monkeypatch.setattr(files.os, "scandir", lambda folder: listed.append(folder) or scan(folder))
    for k in range(20):
        files.write_text(tmp_path / f"{k}", "whole")
    assert listed == [tmp_path]


def test_names_may_be_as_long_as_the_file_system_has_them_and_no_utf8(tmp_path):
    for name in ("x" * 255, os.fsdecode(b"bad\xff.csv")):
        files.write_csv(tmp_path / name, ["name"], [{"name": os.fsdecode(b"bad\xff")}])
        assert (tmp_path / name).read_bytes() == b"name\nbad\xff\n"


def test_tables_hold_no_formulas(tmp_path):
    texts = [f"{sign}cmd|' C calc'!A0" for sign in "=+-@\t\r\n"]
    texts += ["'=1+1", "''-x", "'quoted'", "a=b", "=", "-", "", "O'", "a\r=1,2", 'a\n"=1']
    numbers = [-1.5, "-1350", "+3e-2", -7, "-5"]
    files.write_csv(tmp_path / "t.csv", ["text"], [{"text": value} for value in [*texts, *numbers, "'-5"]])
    with (tmp_path / "t.csv").open(newline="") as file:
        raw = [row["text"] for row in csv.DictReader(file)]
    assert raw[len(texts) : -1] == list(map(str, numbers))
    for text in raw[: len(texts)]:
        assert not text.startswith(tuple("=+-@\t\r\n"))
    with (tmp_path / "t.csv").open(newline="") as file:
        assert [row["text"] for row in files.read_csv(file)] == [*texts, *map(str, numbers), "'-5"]


def test_a_rename_that_fails_takes_the_others_back(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(OutputError, match="b: cannot be written"), files.StagedFiles() as staged:
        staged.write(tmp_path / "a", lambda file: file.write(b"a"))
        staged.write(tmp_path / "b", lambda file: file.write(b"b"))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_full_disk_is_one_clear_error(tmp_path):
    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"a: cannot be written: No space left on device"):
        files.write_atomically(tmp_path / "a", full)
    assert list(tmp_path.iterdir()) == []


def append_to_a_full_disk(path: Path) -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    files.append_text(path, "first\n")
    with pytest.raises(OutputError, match="t: cannot be written: No space left"):
        files.append_text(path, "second\n")
    return path.read_text()


def test_what_is_added_to_a_file_is_there_whole_or_not_at_all(tmp_path):
    assert within(SECONDS, BYTES, append_to_a_full_disk, tmp_path / "t") == "first\n"
    files.append_text(tmp_path / "t", "second\n")
    assert (tmp_path / "t").read_text() == "first\nsecond\n"


@pytest.mark.parametrize("padding", [-1000, -2000, -976, -3024])
def test_padding_around_the_scan_does_not_pass_for_air(phantom, padding):
    slices = phantom.transpose(2, 1, 0).astype(np.float32)
    y, x = np.mgrid[-1 : 1 : slices.shape[1] * 1j, -1 : 1 : slices.shape[2] * 1j]
    outside = x**2 + y**2 > 0.98
    check_hu("ct", np.where(outside, padding, slices))
    greys = ((slices + 1250) / 1500).clip(0, 1)
    for values in (slices + 1024, (slices + 1024) / 4, greys, greys * 255):
        for padded in (np.where(outside, padding, values), np.where(outside | (y < -0.9), padding, values)):
            with pytest.raises(BadInputError, match="not in Hounsfield units"):
                check_hu("ct", padded)


def test_a_crop_within_the_lung_passes(phantom):
    crop = phantom.transpose(2, 1, 0)[:, 10:26, 8:20].astype(np.float32)
    check_hu("ct", crop)
    check_hu("ct", crop.clip(-870, None))


@pytest.mark.parametrize("shape", [(40, 36, 3), (20, 36, 6)])
def test_a_header_that_declares_too_few_voxels_is_refused(phantom, tmp_path, shape):
    data = bytearray(nib.Nifti1Image(phantom, ASYMMETRIC).to_bytes())
    data[42:48] = np.array(shape, "<i2").tobytes()
    for name, packed in (("short.nii", data), ("short.nii.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(BadInputError, match="goes on after the voxels"):
            read_nifti(tmp_path / name)


def test_codes_that_the_standard_does_not_have_are_warned_about(phantom, tmp_path, capfd):
    image = nib.Nifti1Image(phantom, ASYMMETRIC)
    data = bytearray(image.to_bytes())
    data[254:256] = (-1).to_bytes(2, "little", signed=True)
    (tmp_path / "a.nii").write_bytes(data)
    volume = read_nifti(tmp_path / "a.nii")
    assert "its sform_code -1 is not valid and taken as 0" in volume.warnings
    nifti_bytes(volume.voxels, volume.header)
    assert capfd.readouterr().err == ""


def test_signs_and_zeros_of_the_spacing_beside_an_affine_say_nothing_on_stderr(phantom, tmp_path, capfd):
    data = bytearray(nib.Nifti1Image(phantom, ASYMMETRIC).to_bytes())
    data[76:92] = np.array([3, -0.9, 0, 2.5], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(data)
    volume = read_nifti(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.affine, ASYMMETRIC, rtol=1e-6)
    nifti_bytes(volume.voxels, volume.header)
    assert capfd.readouterr().err == ""


def test_a_damaged_magic_is_refused(phantom, tmp_path):
    data = bytearray(nib.Nifti1Image(phantom, ASYMMETRIC).to_bytes())
    data[346] = 0x7F
    (tmp_path / "a.nii").write_bytes(data)
    with pytest.raises(BadInputError, match="header and voxels in one"):
        read_nifti(tmp_path / "a.nii")


@pytest.mark.parametrize("kind", [BadInputError, OutputError])
@pytest.mark.parametrize("name", ["a\nb", "a\r", "a\u2028b\x1b[2J"])
def test_errors_are_one_line_whatever_a_file_is_called(kind, name):
    error = str(kind(name, "one two"))
    assert len(error.splitlines()) == 1
    assert error.startswith("a\\")
    assert "\x1b" not in error


def test_a_phantom_of_a_few_materials_passes():
    slices = np.full((2, 20, 20), -1000.0, np.float32)
    slices[:, 5:15, 5:15] = 40
    check_hu("phantom", slices)
