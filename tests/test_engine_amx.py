"""The engine's steps in the matrix registers of a CPU."""

from __future__ import annotations

import functools

import pytest
import torch
from engine_steps import run_steps, trained
from torch.utils._pytree import tree_leaves

import scoat_fast
from scoat_fast.engine import plan

backend = pytest.importorskip("scoat_fast.engine.amx", exc_type=ImportError)
BFLOAT16 = torch.bfloat16
why_not = backend.why_not(torch.device("cpu"), BFLOAT16)
native = pytest.mark.skipif(why_not is not None, reason=f"amx {why_not}")
fuses = functools.partial(backend.fuses, dtype=BFLOAT16)
STORED = 2**-8  # of a number: what cutting it to bfloat16 may cost; rounding costs half of that
# of the largest result
SUMMED = 1e-5  # sums of float32, in another order
ROUNDED = 2**-7  # where what is multiplied was rounded in the step: weights that were scaled, or what was upsampled
THROUGH = 3 * STORED  # of a network: the root of its forty roundings


@native
@pytest.mark.parametrize(("form", "shape", "options"), [
    ({"width": 8}, (2, 32, 48), {"attention": True}),
    ({"width": 16}, (1, 48, 80), {"mask": True}),
    ({"width": 3, "equations": "paper"}, (1, 16, 16), {}),
    ({"width": 20, "deep_supervision": True}, (1, 80, 32), {}),
    ({"width": 40, "equations": "paper"}, (1, 32, 64), {}),  # a block of 32 outputs and one of 8 more
    ({"width": 16, "block": "vgg", "in_channels": 3, "out_channels": 18}, (3, 16, 32), {}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("upsampled", [False, True], ids=["apart", "on the way in"])
def test_every_step(form, shape, options, upsampled):
    options = options | ({"fuses": fuses} if upsampled else {})
    for outcome in run_steps(trained(**form), "amx", BFLOAT16, shape, rounded=True, **options):
        step, ours, exact = outcome.step, outcome.ours.double(), outcome.exact
        if outcome.slice.buffer == "mask":
            assert torch.equal(ours, exact)
            continue
        rounds = isinstance(step, plan.Convolve) and (step.scale is not None or step.below is not None)
        off = (ours - exact).abs() - STORED * exact.abs() * (outcome.ours.dtype == BFLOAT16)
        assert off.max() <= (ROUNDED if rounds else SUMMED) * exact.abs().max(), (plan.summary(step), off.max())


@native
@pytest.mark.parametrize("form", [
    {"width": 8}, {"width": 5, "deep_supervision": True}, {"width": 16, "equations": "paper"},
    {"width": 16, "block": "vgg", "in_channels": 3, "out_channels": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("size", [(1, 1), (50, 37), (64, 80)])
def test_as_exact_as_torch(form, size):
    net = trained(**form)
    x = torch.rand(2, net.in_channels, *size)
    with torch.no_grad():
        exact = tree_leaves(net.double()(x.double(), return_attention=True))
    net.float()
    ours, stock = (
        tree_leaves(scoat_fast.compile(net, dtype=BFLOAT16, backend=name, size=64)(x, return_attention=True))
        for name in ("amx", "reference")
    )
    for found, torchs, wanted in zip(ours, stock, exact, strict=True):
        largest = wanted.abs().max()
        assert (found - wanted).abs().max() <= 2 * (torchs - wanted).abs().max() + THROUGH * largest


@native
@pytest.mark.parametrize("width", [3, 16])
def test_bits_are_equal_for_any_batch_size_order_and_number_of_threads(width):
    net = trained(width=width)
    x = torch.rand(5, 1, 48, 80)
    compile = functools.partial(scoat_fast.compile, net, dtype=BFLOAT16, backend="amx", size=(48, 80))
    one, mask = compile()(x), compile().mask(x, 0.4)
    for sizes in ((2,), (1, 3), (8,)):
        engine = compile(batch_sizes=sizes)
        assert torch.equal(engine(x.flip(0)).flip(0), one)
        assert torch.equal(engine.mask(x[[3, 0, 4, 2, 1]], 0.4), mask[[3, 0, 4, 2, 1]])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(compile()(x), one)
    torch.set_num_threads(1)
    assert torch.equal(mask, (one > torch.tensor(0.4).logit()).to(torch.uint8))


@native
def test_nan_is_no_clean_zero():
    engine = scoat_fast.compile(trained(width=8), dtype=BFLOAT16, size=32)
    x = torch.rand(1, 1, 32, 32)
    x[0, 0, 5, 9] = torch.nan
    assert engine.backend == "amx"
    assert engine(x).isnan().any() and engine.mask(x)[0, 0, 3:8, 7:12].all()


@native
@pytest.mark.parametrize("width", [8, 16])
def test_what_was_in_the_memory_before_does_no_harm(width):
    """Products that read two pixels read one behind the last: zero times NaN would be NaN."""
    engine = scoat_fast.compile(trained(width=width), dtype=BFLOAT16, size=(48, 80))
    x = torch.rand(1, 1, 48, 80)
    before = engine(x)
    engine(torch.full((1, 1, 48, 80), torch.nan))
    assert before.isfinite().all() and torch.equal(engine(x), before)


@native
def test_it_is_the_engine_of_bfloat16():
    net = trained(width=8)
    assert scoat_fast.compile(net, dtype=BFLOAT16, size=32).backend == "amx"
    assert scoat_fast.compile(net, size=32).backend == "cpu"
    assert "scale_weights, convolve" in str(scoat_fast.compile(net, dtype=BFLOAT16, size=32))


def test_what_it_refuses(monkeypatch):
    cpu = torch.device("cpu")
    assert backend.why_not(torch.device("meta"), BFLOAT16) == "runs on a CPU, not on meta"
    assert backend.why_not(cpu, torch.float32) == "computes in bfloat16, not in float32"
    monkeypatch.delattr(backend._C, "amx", raising=False)
    assert backend.why_not(cpu, BFLOAT16) == "was left out of the build: its compiler knows no AMX"


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("channels", "outputs"), [([32], 16), ([5], 3), ([16, 33], 40), ([70], 64)])
def test_tiles_hold_the_weights_in_the_order_of_their_use(channels, outputs, size):
    """Read as csrc/amx.cpp describes them: of blocks of 32 outputs, chunks of channels, rows of taps and products."""
    weight, bias = torch.randn(outputs, sum(channels), size, size, dtype=torch.float64), torch.randn(outputs)
    tiles, padded = backend._packed(weight, bias, channels, scaled=True)
    assert torch.equal(padded[:outputs], bias) and not padded[outputs:].any() and len(padded) % 16 == 0
    given, found = iter(tiles), torch.zeros(len(padded), *weight.shape[1:])
    for block in range(0, len(padded), 32):
        first = 0
        for count in channels:
            for start in range(0, count, 32):
                left = min(32, count - start)
                pixels = 1 if left > 16 else 2  # that lie side by side in 32 numbers
                for row in range(size):
                    for column in range(0, size, pixels):
                        for out in range(block, min(block + 32, len(padded)), 16):
                            for k in range(0, 32, 2):
                                for n in range(16):
                                    for c in (k, k + 1):
                                        value, x, y = next(given), column + c // (32 // pixels), c % (32 // pixels)
                                        if x < size and y < left:
                                            found[out + n, first + start + y, row, x] = value
                                        else:
                                            assert value == 0
            first += count
    assert next(given, None) is None
    assert torch.equal(found[:outputs], weight.float()) and not found[outputs:].any()
