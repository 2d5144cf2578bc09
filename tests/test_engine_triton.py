"""The engine's Triton kernels under the interpreter, in both forms of reading; on a GPU, the kernels themselves."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from engine_steps import run_steps, trained

import scoat_fast
from scoat_fast import SCOATNet, clock
from scoat_fast.engine import pack, plan, tune
from scoat_fast.engine.layout import FLOAT8
from scoat_fast.errors import ScoatFastError
from scoat_fast.ops import _verdict

backend = pytest.importorskip("scoat_fast.engine.triton", exc_type=ImportError)
interpreted = pytest.mark.skipif(
    backend.why_not(torch.device("cpu"), torch.float32) is not None, reason="Triton is not interpreted here"
)
SLACK, FLOOR = 2.0, 2e-6  # times stock torch's own error in the same dtype; of the largest value


@pytest.fixture(params=["sm90", "sm80"], ids=["boxes", "pointers"])
def family(request, monkeypatch):
    monkeypatch.setattr(backend, "forced", request.param)
    return request.param


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, for a sigmoid of 0
@pytest.mark.parametrize(("form", "shape", "dtype", "options"), [
    ({"width": 8}, (2, 16, 32), torch.float16, {}),
    ({"width": 3, "equations": "paper"}, (1, 16, 16), torch.float32, {"mask": True}),
    ({"width": 16, "block": "vgg", "in_channels": 3, "out_channels": 2}, (1, 16, 48), torch.float32, {}),
    ({"width": 8, "block": "vgg", "equations": "paper"}, (1, 16, 16), torch.float16, {}),  # what the first lacks
], ids=["float16", "odd channels", "vgg", "float16 vgg paper"])  # fmt: skip
def test_every_step(family, form, shape, dtype, options):
    for outcome in run_steps(trained(**form), "triton", dtype, shape, **options):
        if outcome.slice.buffer == "mask":
            assert torch.equal(outcome.ours.double(), outcome.exact)
            continue
        ours, stock, largest = outcome.errors
        assert ours <= SLACK * stock + FLOOR * max(largest, 1), (plan.summary(outcome.step), ours, stock)


@pytest.fixture
def rounding(monkeypatch):
    """As GPUs round to float8 (cvt.rn.satfinite) and bfloat16: of the one, the interpreter loses the carry into the
    exponent; to the other it cuts off."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    as_it_is = interpreter._convert_float

    def convert(values, given, wanted, mode):
        if given != tl.float32 or wanted not in (tl.float8e4nv, tl.bfloat16):
            return as_it_is(values, given, wanted, mode)
        exact = torch.from_numpy(np.frombuffer(values.tobytes(), np.float32).copy())
        if wanted == tl.bfloat16:
            return exact.to(torch.bfloat16).view(torch.uint16).numpy().reshape(values.shape)
        return exact.clamp(-448, 448).to(FLOAT8).view(torch.uint8).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_every_step_in_float8(rounding):
    """Of a width with too few channels for boxes on the upper levels, where pointers are used."""
    for outcome in run_steps(trained(width=16), "triton", FLOAT8, (1, 16, 16)):
        if plan.Slice("input", 0, 1) in plan.reads(outcome.step):
            continue  # in bfloat16, which the interpreter multiplies wrongly
        ours, stock, largest = outcome.errors
        assert ours <= SLACK * stock + FLOOR * max(largest, 1), (plan.summary(outcome.step), ours, stock)


@interpreted
def test_bits_are_equal_for_any_batch_size_and_order(family):
    net = trained(width=4)
    x = torch.rand(2, 1, 16, 16)

    def logits(x: torch.Tensor) -> torch.Tensor:
        return scoat_fast.compile(net, backend="triton", size=16, batch_sizes=(len(x),))(x)

    assert torch.equal(logits(x[:1]), logits(x.flip(0))[1:])


def test_boxes_want_aligned_channels():
    assert backend.why_no_boxes([32, 64], torch.bfloat16) is None
    assert "multiples of 16 bytes" in backend.why_no_boxes([12, 24], torch.bfloat16)
    assert backend.why_no_boxes([12, 24], torch.float32) is None
    assert backend.why_no_boxes([32, 64], FLOAT8) is None
    assert "multiples of 32 channels" in backend.why_no_boxes([16, 32], FLOAT8)


def test_a_kernel_is_named_with_its_tile(family):
    device, steps = torch.device("cpu"), plan.build(SCOATNet(width=32)).steps
    of_one_channel = "convolve 128x32x16 by pointers, 4 warps, 3 stages"  # which fills no box
    assert backend.kernel(steps[0], 512, device, torch.bfloat16) == of_one_channel
    scaled = next(step for step in steps if isinstance(step, plan.Convolve) and step.scale and step.level == 1)
    assert (
        backend.kernel(scaled, 256, device, torch.bfloat16)
        == {
            "sm90": "scale_weights, convolve 128x64x64 by boxes, 4 warps, 4 stages",
            "sm80": "scale_weights, convolve 128x64x32 by pointers, 4 warps, 3 stages",
        }[backend.forced]
    )
    named = {backend.kernel(step, 512 >> step.level, device, torch.bfloat16).split()[0] for step in steps}
    assert named == {"convolve", "scale_weights,", "attend", "up_forward", "means,", "head"}


def test_what_it_refuses():
    assert "not in float64" in backend.why_not(torch.device("cpu"), torch.float64)
    assert backend.why_not(torch.device("meta"), torch.float32) == "needs CUDA tensors, got meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", backend.DTYPES)
@pytest.mark.parametrize("form", [{"width": 32}, {"width": 8, "equations": "paper"}, {"width": 12, "block": "vgg"}])
def test_on_a_gpu(form, dtype):
    if (reason := backend.why_not(torch.device("cuda"), dtype)) is not None:
        pytest.skip(reason)
    net = trained(**form).cuda()
    x = torch.rand(5, 1, 80, 112, device="cuda")
    exact = scoat_fast.compile(net, dtype=torch.float64, backend="reference", batch_sizes=(5,), size=(80, 112))(x)
    calibration = {"calibration": x} if dtype == FLOAT8 else {}
    for shape in backend.TILES if dtype == torch.bfloat16 and form["width"] == 32 else (None,):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "forced", shape)
            if shape not in (None, "sm80") and torch.cuda.get_device_capability() < (9, 0):
                continue
            stock, ours = (
                scoat_fast.compile(net, dtype=dtype, backend=name, batch_sizes=(2,), size=(80, 112), **calibration)
                for name in ("reference", "triton")
            )
        error, stock_error = ((engine(x).double() - exact).abs().max() / exact.abs().max() for engine in (ours, stock))
        assert error <= 2 * stock_error + 1e-5
        assert torch.equal(ours(x), ours(x.flip(0)).flip(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_masks_on_a_gpu(name):
    net = trained(width=16).cuda()
    x = torch.rand(7, 1, 64, 48, device="cuda")
    masks = [
        scoat_fast.compile(net, dtype=torch.float32, backend=name, batch_sizes=sizes, size=(64, 48)).mask(x)
        for sizes in ((1,), (2, 4), (8,))
    ]
    assert torch.equal(masks[0], masks[1]) or name == "reference"  # cuDNN chooses by the batch
    assert torch.equal(masks[0], masks[2]) or name == "reference"
    assert scoat_fast.compile(net, batch_sizes=(8,), size=(64, 48)).parity(x).dice > 0.95


@pytest.fixture
def times(monkeypatch):
    """A clock that says which tile was measured, and takes 256 pixels and 4 warps for the fastest."""
    measured = []

    def median_ms(call, device, seconds):
        (tile,) = tune.chosen.get().values()
        measured.append(tile)
        return abs(tile[0] - 256) + abs(tile[1] - 4) + abs(tile[2] - 5)

    monkeypatch.setattr(tune, "median_ms", median_ms)
    for name, values in (("PIXELS", (256,)), ("WARPS", (4,)), ("STAGES", (3, 5))):
        monkeypatch.setattr(tune, name, values)
    return measured


@interpreted
def test_tiles_are_measured_once_and_kept(times, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # the interpreter multiplies by the CPU's BLAS, which may add up tiles of other shapes in another order
    monkeypatch.setattr(tune, "_same_bits", lambda x, y: torch.allclose(x, y, rtol=1e-4, atol=1e-5))
    net, x = trained(width=3), torch.rand(1, 1, 16, 16)
    tuned = scoat_fast.compile(net, backend="triton", size=16, autotune=True)
    assert set(tuned._tiles.values()) == {(256, 4, 5)} and len(times) > len(tuned._tiles)
    assert json.loads(tune.path().read_text()).popitem()[1].keys() == tuned._tiles.keys()
    del times[:]
    again = scoat_fast.compile(net, backend="triton", size=16, autotune=True)
    assert again._tiles == tuned._tiles and not times
    plain = scoat_fast.compile(net, backend="triton", size=16)
    stages, run = [], backend.Launch.run
    monkeypatch.setattr(backend.Launch, "run", lambda self: stages.append(self.arguments.get("STAGES", 5)) or run(self))
    ours = again(x)
    assert set(stages) == {5} and torch.equal(ours, tuned(x))
    del stages[:]
    torch.testing.assert_close(ours, plain(x), rtol=1e-4, atol=1e-4)
    assert set(stages) == {4, 5}  # the table's, and those without


def test_every_tile_has_room_for_its_sums(family, monkeypatch, tmp_path):
    """Also one of fewer pixels than the table's, which leaves more of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "median_ms", lambda call, *rest: call() or 1.0)
    seen = set()

    def run(self) -> None:
        if (sums := self.arguments.get("sums")) is not None and self.kernel is backend.kernels.convolve:
            assert self.grid[0] // len(sums) <= sums.shape[1]  # of no more than one block of channels
            seen.add(self.arguments["BP"])

    monkeypatch.setattr(backend.Launch, "run", run)
    monkeypatch.setattr(backend.pointwise.Launch, "run", lambda self: None)
    net, device = SCOATNet(width=16), torch.device("cpu")
    whole, weights = plan.build(net), pack.pack(net)
    packed = {step: backend.prepare(step, weights, device, torch.float32) for step in whole.steps}
    tune.tune(whole, packed, 2, 16, 512, device, torch.float32)
    assert {64, 128} <= seen


def test_times_and_tiles_are_of_the_gpu_that_was_asked_for(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def current(device):
        entered.append(device)
        yield
        entered.remove(device)

    second = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(clock, "_median_ms", lambda call, *rest: (entered[:], call()))
    assert clock.median_ms(lambda: 1.0, second, 0.0) == ([second], 1.0) and not entered
    assert _verdict.machine(second).startswith("GPU 1 / ")


def test_a_damaged_cache_of_tiles_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune.path().parent.mkdir()
    for text in ("{", "[]", '{"a": {"b": [1, 2]}}', '{"a": 3}'):
        tune.path().write_text(text)
        with pytest.raises(ScoatFastError, match=r"tiles\.json: damaged; delete it"):
            tune._read()


def test_only_tiles_can_be_tuned():
    with pytest.raises(ValueError, match="only the triton backend has tiles to tune, and here runs reference"):
        scoat_fast.compile(trained(width=3), backend="reference", autotune=True)
