"""What several test files need: a small trained-looking network, a phantom, and files made of it."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # these networks are too small for more to help

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torchvision_on_cpu
from PIL import Image

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

from scoat_fast import SCOATNet
from scoat_fast.imaging.volume import Turn
from scoat_fast.imaging.window import Window
from scoat_fast.pretrained import Pretrained, save
from scoat_fast.train.data import COLUMNS

torchvision_on_cpu.declare()
torch.backends.cudnn.allow_tf32 = False  # float32 is what stock convolutions are compared in

GOLDEN = Path(__file__).parent / "golden"
ASYMMETRIC = np.array([[-0.9, 0, 0, 80], [0, -0.8, 0, 60], [0, 0, 2.5, -30], [0, 0, 0, 1.0]])  # LPS axes, mm


# Minutes each, most of it in a few tests: one of them begun last would have every other worker wait for it.
LONG = "ray", "engine_hopper", "engine_aot", "triton_aot", "train", "engine", "engine_triton", "model"


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist: it would begin with the files of the most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    long = [f"test_{name}" for name in LONG]
    items.sort(key=lambda item: long.index(item.path.stem) if item.path.stem in long else len(long))


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Uninitialised memory is NaN, so that reading it cannot go unnoticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Triton's interpreter in a third of its time, and with any NumPy.

    It patches the language anew whenever one function calls another, although it is patched while a kernel runs, and
    checks every sum of integers for an overflow that images as small as the tests' cannot reach. That of Triton 3.6
    makes numbers of arrays with one element in a way that NumPy 2.5 refuses.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    builder, patched, patch_tensor = interpreter.interpreter_builder, set(), interpreter._patch_lang_tensor

    def call(self, *arguments, **named):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*arguments, **named)

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_verdict(tmp_path_factory):
    """What ``scoat-fast doctor`` found on this machine has no say in the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def net() -> SCOATNet:
    """A narrow network whose answer depends on its input everywhere; small, so that tests are fast."""
    torch.manual_seed(7)
    net = SCOATNet(width=3).eval()
    net.pretrained = Pretrained("test", size=48)
    return net


@pytest.fixture(scope="session")
def weights(net, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "test.safetensors"
    save(net, path, net.pretrained)
    return path


@pytest.fixture(scope="session")
def phantom() -> np.ndarray:
    """A chest [40, 36, 6] in HU with axes left, posterior, superior: no symmetry, so that every flip shows."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 36, 6)), indexing="ij")
    hu = np.full(x.shape, -1000.0)
    hu[(x / 0.9) ** 2 + (y / 0.8) ** 2 < 1] = 40
    hu[((x + 0.4) / 0.3) ** 2 + ((y + 0.05) / 0.5) ** 2 < 1] = -850  # the right lung
    hu[((x - 0.45) / 0.22) ** 2 + ((y - 0.1) / 0.4) ** 2 < 1] = -870  # the left one, smaller
    hu[(x - 0.45) ** 2 + (y - 0.3) ** 2 + (z - 0.5) ** 2 / 4 < 0.03] = -400  # opacity, low in the back
    hu[x**2 + (y - 0.65) ** 2 < 0.02] = 400  # the spine
    return (hu + 10 * z).round().astype(np.int16)


@pytest.fixture
def ct(phantom, tmp_path) -> Path:
    """The phantom as a NIfTI file."""
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(phantom, ASYMMETRIC), path)
    return path


@pytest.fixture(scope="session")
def real_slices() -> torch.Tensor:
    """Slices [N, 1, H, W], as ``scoat-w16`` takes them, of a patient with opacity that it was not trained on."""
    volume = nib.load(Path(__file__).parent.parent / "examples" / "ct.nii.gz")
    slices = Turn(volume.affine).to_slices(volume.get_fdata(dtype=np.float32))[::4]
    window = Window(*SCOATNet.from_pretrained("scoat-w16").pretrained.window)
    return torch.from_numpy(window.apply(slices))[:, None]


PATIENTS = ("p1", "p1", "p2", "p2", "p3", "")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder of 24 slices [40, 36] with bright squares to find, of three known patients and unknown ones."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for k in range(24):
        image = rng.integers(60, 100, (40, 36)).astype(np.uint8)
        mask = np.zeros((40, 36), bool)
        if k % 4:
            y, x = rng.integers(5, 22, 2)
            mask[y : y + 10, x : x + 9] = True
        image[mask] += 90
        Image.fromarray(image).save(folder / f"images/s{k}.png")
        Image.fromarray(mask).save(folder / f"masks/s{k}.png")
        rows.append(
            dict.fromkeys(COLUMNS, "")
            | {"id": f"s{k}", "patient": PATIENTS[k % 6], "image": f"images/s{k}.png", "mask": f"masks/s{k}.png"}
            | ({"window_low_hu": "-1350", "window_high_hu": "150"} if k % 2 else {})
        )
    write_index(folder, rows)
    return folder


def write_index(folder: Path, rows: list[dict]) -> None:
    with (folder / "index.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
