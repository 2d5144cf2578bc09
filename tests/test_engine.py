"""The engine: its plan, its backends step by step, and the whole against the network."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_steps import run_in_place, run_steps, trained
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import scoat_fast
from scoat_fast import ScoatFastError, SCOATNet, WeightsError
from scoat_fast.bench.eager import EagerSCOATNet
from scoat_fast.engine import calibrate, pack, plan, reference, runner
from scoat_fast.engine.cost import cost
from scoat_fast.engine.layout import FLOAT8, lay_out, view_of

FORMS = (
    {"width": 8},
    {"width": 3, "equations": "paper"},
    {"width": 16, "block": "vgg", "in_channels": 3, "out_channels": 2},
    {"width": 5, "deep_supervision": True},
)
native = pytest.mark.skipif(
    not pytest.importorskip("importlib.util").find_spec("scoat_fast._C"), reason="needs the extension"
)
# Of stock torch's error. Winograd's transforms cost digits of their own: 1.1 to 2 times the error on the average of a
# network's convolutions, most where few products are summed; over the whole network nothing of it is left.
SLACK = {"cpu": 4.0, "reference": 1.0}
FLOOR = 2e-6  # of the largest value


def double(net: SCOATNet, x: torch.Tensor, **options):
    with torch.no_grad():
        return copy.deepcopy(net).double()(x.double(), **options)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("fuses", [False, True], ids=["apart", "gates and a head in convolutions"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_plan_is_the_network(form, fuses, monkeypatch):
    monkeypatch.setattr(reference, "fuses", lambda step, dtype: fuses)
    net = trained(**form).double()
    x = torch.rand(3, net.in_channels, 50, 37, dtype=torch.float64)
    expected, maps = double(net, x, return_attention=True)
    engine = scoat_fast.compile(net, dtype=torch.float64, backend="reference", batch_sizes=(2,), size=64)
    found, found_maps = engine(x, return_attention=True)
    assert isinstance(found, list) == isinstance(expected, list)
    for ours, exact in zip(tree_leaves([found, found_maps]), tree_leaves([expected, maps]), strict=True):
        assert ours.shape == exact.shape
        assert relative(ours, exact) < 1e-12
    last = expected[-1] if isinstance(expected, list) else expected
    assert torch.equal(engine.mask(x, 0.4), (last.sigmoid() > 0.4).to(torch.uint8))


def test_every_buffer_is_written_before_it_is_read():
    for form in FORMS:
        whole = plan.build(SCOATNet(**form))
        written = set(whole.inputs)
        for step in whole.steps:
            assert {used.buffer for used in plan.reads(step)} <= written | {plan.writes(step)[0].buffer}
            written |= {used.buffer for used in [*plan.writes(step), *plan.scratch(step)]}
        assert written == set(whole.buffers)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 64, 48)])
def test_buffers_that_live_together_do_not_overlap(shape):
    whole = plan.build(SCOATNet(width=8), attention=True)
    extents = SimpleNamespace(parts=lambda step, height, *rest: height, rows=lambda step, _: 10 * step.out.channels)
    layout = lay_out(whole, extents, *shape, torch.device("cpu"), torch.bfloat16)
    memory = torch.zeros(layout.bytes, dtype=torch.uint8)
    tensors = {name: x for name, x in layout.tensors(memory).items() if whole.buffers[name].within is None}
    ranges = {name: (x.data_ptr(), x.data_ptr() + x.nbytes) for name, x in tensors.items()}
    lifetimes = {name: whole.lifetimes[name] for name in ranges}
    for name, (first, last) in lifetimes.items():
        for other, (born, dead) in lifetimes.items():
            if name != other and first <= dead and born <= last:
                assert ranges[name][1] <= ranges[other][0] or ranges[other][1] <= ranges[name][0], (name, other)


def test_what_lies_in_a_row_is_gone_before_its_node_comes():
    whole = plan.build(SCOATNet(width=8))
    layout = lay_out(whole, reference, 2, 32, 48, torch.device("cpu"), torch.float32)
    tensors = layout.tensors(torch.zeros(layout.bytes, dtype=torch.uint8))
    inside = {name: buffer.within for name, buffer in whole.buffers.items() if buffer.within is not None}
    assert inside.keys() == layout.within.keys() == {"between0_1", "between0_2"}
    for name, channels in inside.items():
        born, dead = whole.lifetimes[name]
        row = tensors[channels.buffer]
        assert tensors[name].data_ptr() == row[..., channels.first :].data_ptr()
        assert tensors[name].shape == (*row.shape[:3], channels.channels) and tensors[name].stride() == row.stride()
        assert whole.lifetimes[channels.buffer][0] <= born and dead <= whole.lifetimes[channels.buffer][1]
        for number, step in enumerate(whole.steps):
            for used in [*plan.reads(step), *plan.writes(step)]:
                beside = (
                    used.first >= channels.first + channels.channels or used.first + used.channels <= channels.first
                )
                assert used.buffer != channels.buffer or beside or number > dead, (name, plan.summary(step))


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, for as long as they live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_peak_memory_is_half_of_eager():
    """What the Triton backend asks for; tensors without memory, so that it may be as large as on a GPU."""
    triton = pytest.importorskip("scoat_fast.engine.triton", exc_type=ImportError)
    device = torch.device("meta")
    for width in (32, 64):
        with torch.no_grad(), device:
            net, baseline = SCOATNet(width=width), EagerSCOATNet(width=width).to(torch.bfloat16).eval()
            x = torch.empty(32, 1, 512, 512, dtype=torch.bfloat16)
            with PeakMemory() as eager:
                baseline(x)
            for options in ({}, {"mask": True}, {"attention": True}):
                whole = plan.build(net, **options)
                layout = lay_out(whole, triton, 32, 512, 512, device, torch.bfloat16)
                assert layout.bytes < 0.45 * eager.peak, (width, options)
                _, shape, _ = layout.places["scaled1_1"]  # a slice's own weights are among it
                assert shape == (32, 10 * 2 * width, 6 * width)


def test_steps_need_no_memory_beside_what_is_planned():
    triton = pytest.importorskip("scoat_fast.engine.triton", exc_type=ImportError)
    net, device = SCOATNet(width=16), torch.device("meta")
    whole, weights = plan.build(net), pack.pack(net)
    layout = lay_out(whole, triton, 32, 512, 512, device, torch.bfloat16)
    with PeakMemory() as bound:
        ready = [(step, triton.prepare(step, weights, device, torch.bfloat16)) for step in whole.steps]
        start = bound.peak = bound.now
        tensors = layout.tensors(torch.empty(layout.bytes, dtype=torch.uint8, device=device))
        for step, prepared in ready:
            triton.bind(step, prepared, view_of(whole, tensors), (512 >> step.level) ** 2)
    assert layout.bytes <= bound.peak - start < layout.bytes + (1 << 20)


@pytest.mark.parametrize("width, microseconds", [(32, 431), (64, 1569)])
def test_the_floor_is_that_of_a_roofline(width, microseconds):
    """An independent count of this network's bytes and operations for 4.3 TB/s and 790 TFLOP/s, bfloat16, batch 16."""
    whole = plan.build(SCOATNet(width=width))
    costs = [cost(whole, step, 16, 512, 512, 2) for step in whole.steps]
    floor = sum(found.seconds(4.3e12, 790e12) for found in costs) / 16 * 1e6
    assert floor == pytest.approx(microseconds, rel=0.02)


def test_operations_are_those_that_torch_counts():
    net = SCOATNet(width=16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.rand(1, 1, 64, 64))
    whole = plan.build(net)
    ours = sum(cost(whole, s, 1, 64, 64, 4).flops for s in whole.steps if not isinstance(s, plan.Gate))
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


@native
@pytest.mark.parametrize("form, shape", [
    ({"width": 8}, (2, 32, 48)),
    ({"width": 3, "equations": "paper"}, (1, 16, 16)),
    ({"width": 12, "block": "vgg", "in_channels": 3, "out_channels": 2}, (2, 16, 80)),
    ({"width": 32, "deep_supervision": True}, (1, 64, 32)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"mask": True}], ids=str)
def test_every_step_of_the_cpu_backend(form, shape, options):
    for outcome in run_steps(trained(**form), "cpu", torch.float32, shape, **options):
        if outcome.slice.buffer == "mask":
            assert torch.equal(outcome.ours.double(), outcome.exact)
            continue
        ours, stock, largest = outcome.errors
        assert ours <= SLACK["cpu"] * stock + FLOOR * max(largest, 1), (plan.summary(outcome.step), ours, stock)


@native
@pytest.mark.parametrize(("form", "size"), [({"width": 32}, (512, 512)), ({"width": 5}, (304, 208))], ids=str)
def test_every_step_of_the_cpu_backend_at_full_size(form, size):
    """Of the published network, and of an odd one: in the memory where they run, so that none spoils another's."""
    net, steps = trained(**form), set()
    for outcome in run_in_place(scoat_fast.compile(net, backend="cpu", size=size), net):
        ours, stock, largest = outcome.errors
        assert ours <= SLACK["cpu"] * stock + FLOOR * max(largest, 1), (plan.summary(outcome.step), ours, stock)
        steps.add(outcome.step)
    assert steps == set(plan.build(net).steps)


@native
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (50, 37), (64, 80)])
def test_the_cpu_backend_is_as_exact_as_torch(form, size):
    net = trained(**form)
    x = torch.rand(2, net.in_channels, *size)
    with torch.no_grad():
        stock = tree_leaves(net(x))
    exact = tree_leaves(double(net, x))
    ours = tree_leaves(scoat_fast.compile(net, backend="cpu", size=64)(x))
    for found, torchs, wanted in zip(ours, stock, exact, strict=True):
        assert relative(found, wanted) <= 4 * relative(torchs, wanted) + 2e-6


@native
@pytest.mark.parametrize("isa, name", [("avx2", "AVX2"), ("base", "baseline")])
def test_narrower_instruction_sets(isa, name, tmp_path):
    code = (
        "import torch, scoat_fast\n"
        "from scoat_fast import _C\n"
        f"assert _C.cpu.instruction_set() == {name!r}, _C.cpu.instruction_set()\n"
        "torch.manual_seed(0)\n"
        "net = scoat_fast.SCOATNet(width=8).eval()\n"
        "found = scoat_fast.compile(net, backend='cpu', size=32).parity(torch.rand(1, 1, 32, 48))\n"
        "assert found.relative < 1e-5, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"SCOAT_FAST_ISA": isa, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    if "AssertionError: baseline" in done.stderr and isa == "avx2":
        pytest.skip("this CPU has no AVX2")
    assert done.returncode == 0, done.stderr


@native
@pytest.mark.parametrize("width", [3, 8])
def test_bits_are_equal_for_any_batch_size_and_order(width):
    net = trained(width=width)
    x = torch.rand(5, 1, 32, 32)
    one = scoat_fast.compile(net, size=32)(x)
    for sizes in ((2,), (1, 3), (8,)):
        assert torch.equal(scoat_fast.compile(net, size=32, batch_sizes=sizes)(x), one)
    assert torch.equal(scoat_fast.compile(net, size=32, batch_sizes=(4,))(x.flip(0)).flip(0), one)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(scoat_fast.compile(net, size=32)(x), one)
    torch.set_num_threads(1)
    mask = scoat_fast.compile(net, size=32).mask(x, 0.4)
    for sizes in ((1, 3), (8,)):
        engine = scoat_fast.compile(net, size=32, batch_sizes=sizes)
        assert torch.equal(engine.mask(x, 0.4), mask)
        assert torch.equal(engine.mask(x[[3, 0, 4, 2, 1]], 0.4), mask[[3, 0, 4, 2, 1]])


def test_results_are_the_callers_own():
    engine = scoat_fast.compile(trained(width=8), size=32)
    x = torch.rand(1, 1, 32, 32)
    first = engine(x)
    before = first.clone()
    engine(torch.rand(1, 1, 32, 32))
    assert torch.equal(first, before)


def test_only_so_many_sizes_stay_prepared(monkeypatch):
    monkeypatch.setattr(runner, "READY", 1)
    net = trained(width=3)
    engine = scoat_fast.compile(net, backend="reference", size=64)
    batches = [torch.rand(1, 1, 16, width) for width in (16, 32, 48, 32, 64)]
    for x in batches:
        assert torch.equal(engine(x), scoat_fast.compile(net, backend="reference", size=(16, x.shape[3]))(x))
    assert [key[2] for key in engine._ready] == [48, 32, 64]


def test_calls_outlive_their_engine():
    """What a call reads and writes is there as long as the call."""
    engine = scoat_fast.compile(trained(width=8), size=32)
    calls = engine.calls(1)
    used = [x for step in engine.plan.steps for pair in engine._packed[step].values() for x in pair]
    used += engine._ready[1, 32, 32, False, False]._outputs
    alive = [weakref.ref(x) for x in used]
    del engine, used
    assert all(x() is not None for x in alive)
    for _, call in calls:
        call()


def test_an_engine_is_of_its_process():
    engine = scoat_fast.compile(trained(width=3), size=16)
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="an engine cannot be copied or pickled, its network can"):
            leave(engine)


def test_the_network_stays_as_it_was():
    net = trained(width=8).train()
    net.conv2_1.bn1.eval()  # frozen
    before = copy.deepcopy(net.state_dict())
    engine = scoat_fast.compile(net, size=32)
    x = torch.rand(1, 1, 32, 32)
    assert engine.parity(x).relative < 1e-5
    assert [name for name, module in net.named_modules() if not module.training] == ["conv2_1.bn1"]
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    with torch.no_grad():
        net.final.bias += 1
    assert engine.parity(x).error == pytest.approx(1, abs=1e-3)  # the engine has the weights that it was made with


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=native), "reference"])
def test_autocast_around_an_engine_changes_nothing(backend):
    net, x = trained(width=8), torch.rand(2, 1, 32, 32)
    engine = scoat_fast.compile(net, size=32, backend=backend)
    logits, mask, parity = engine(x), engine.mask(x), engine.parity(x)
    with torch.autocast("cpu", torch.bfloat16):
        made = scoat_fast.compile(net, size=32, backend=backend)
        assert torch.equal(engine(x), logits) and torch.equal(made(x), logits)
        assert torch.equal(engine.mask(x), mask) and engine.parity(x) == parity
        assert parity.relative < 1e-5


def test_an_engine_of_nothing_but_zeros_is_right():
    net = trained(width=4)
    with torch.no_grad():
        net.final.weight.zero_()
        net.final.bias.zero_()
    engine, x = scoat_fast.compile(net, size=32), torch.rand(1, 1, 32, 32)
    assert engine.parity(x).relative == 0
    with torch.no_grad():
        engine.net.final.bias += 1
    assert engine.parity(x).relative == pytest.approx(1)


@native
def test_the_default_device_of_who_imports_it_is_not_that_of_the_engine(tmp_path):
    code = (
        "import torch, scoat_fast\n"
        "torch.set_default_device('meta')\n"
        "with torch.device('cpu'):\n"
        "    net, x = scoat_fast.SCOATNet(width=8).eval(), torch.rand(1, 1, 32, 32)\n"
        "engine = scoat_fast.compile(net, backend='cpu', size=32, device='cpu')\n"
        "torch.set_default_device('cpu')\n"
        "assert engine.parity(x).relative < 1e-5\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_other_sizes_and_empty_batches():
    net = trained(width=8)
    engine = scoat_fast.compile(net, size=32)
    for size in ((100, 30), (16, 16), (100, 30)):
        x = torch.rand(2, 1, *size)
        assert relative(engine(x), double(net, x)) < 1e-5
    assert engine(torch.rand(0, 1, 32, 32)).shape == (0, 1, 32, 32)
    assert engine.mask(torch.rand(0, 1, 30, 32)).shape == (0, 1, 30, 32)
    with pytest.raises(ValueError, match="at least one slice is wanted to compare on, got none"):
        engine.parity(torch.rand(0, 1, 32, 32))


def test_batches_are_cut_with_little_padding():
    def cut(left: int, *sizes: int) -> list[int]:
        found = []
        while left > 0:
            found.append(runner.next_size(left, sizes))
            left -= found[-1]
        return found

    assert cut(9, 1, 8, 32) == [8, 1]
    assert cut(31, 1, 8, 32) == [32] and cut(33, 1, 8, 32) == [32, 1] and cut(64, 1, 8, 32) == [32, 32]
    assert cut(3, 1, 8, 32) == [1, 1, 1] and cut(6, 1, 8, 32) == [8] and cut(14, 1, 8, 32) == [8, 8]
    assert cut(5, 2) == [2, 2, 2] and cut(1, 4) == [4]
    engine = scoat_fast.compile(trained(width=8), size=32, batch_sizes=(1, 4, 16))
    x = torch.rand(5, 1, 32, 32)
    ran = []
    prepare = engine._prepare
    engine._prepare = lambda n, *rest: ran.append(n) or prepare(n, *rest)
    assert engine(x).shape == x.shape and ran == [4, 1]


def test_it_is_ready_at_once_in_and_out_of_inference_mode(monkeypatch):
    net, x = trained(width=8), torch.rand(2, 1, 32, 32)
    engine = scoat_fast.compile(net, size=32, batch_sizes=(1, 2))
    ready = set(engine._ready)
    assert {key[:1] + key[3:] for key in ready} == {(n, mask, False) for n in (1, 2) for mask in (False, True)}
    with torch.inference_mode():
        inside = engine(x, return_attention=True)[0], engine(torch.rand(1, 1, 16, 48)), engine.mask(x)
    assert not engine(x).is_inference() and torch.equal(engine(x), inside[0].clone())
    assert torch.equal(engine.mask(x), inside[2])
    engine(torch.rand(1, 1, 16, 48))


def test_threads_share_an_engine():
    net = trained(width=8)
    engine = scoat_fast.compile(net, size=32)
    batches = [torch.rand(3, 1, 32, 32) for _ in range(8)]
    expected, found = [engine(x) for x in batches], [None] * len(batches)

    def work(i: int) -> None:
        found[i] = engine(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_nan_gives_no_clean_mask(backend):
    engine = scoat_fast.compile(trained(width=8), size=32, backend=backend)
    x = torch.rand(1, 1, 32, 32)
    x[0, 0, 5, 5] = torch.nan
    assert engine(x).isnan().any()
    assert engine.mask(x)[engine(x).isnan()].all()


@pytest.mark.parametrize("fuses", [False, True], ids=["apart", "gates and a head in convolutions"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_scales_in_the_weights_change_nothing(form, fuses, monkeypatch):
    """Powers of two: the network of the rescaled weights gives the same bits."""
    net = trained(**form)
    x = torch.rand(2, net.in_channels, 32, 48)
    monkeypatch.setattr(reference, "fuses", lambda step, dtype: fuses)
    whole, weights = plan.build(net, fuses=lambda step: fuses), pack.pack(net)
    scales = calibrate.calibrate(whole, weights, x)
    assert {len(scale.unique()) for scale in scales.values()} != {1}
    plain = scoat_fast.compile(net, backend="reference", size=(32, 48))
    monkeypatch.setattr("scoat_fast.engine.runner.pack", lambda net: calibrate.rescale(whole, weights, scales))
    scaled = scoat_fast.compile(net, backend="reference", size=(32, 48))
    for ours, expected in zip(
        *(tree_leaves(engine(x, return_attention=True)) for engine in (scaled, plain)), strict=True
    ):
        assert torch.equal(ours, expected)
    assert torch.equal(scaled.mask(x), plain.mask(x))


@pytest.mark.parametrize("fuses", [False, True], ids=["apart", "gates and a head in convolutions"])
def test_scales_bring_features_into_range(fuses, monkeypatch):
    """Of the calibration slices, with a factor of two to spare and no more than another lost to whole binades."""
    net, from_below, gated = trained(width=8), [], reference.gated

    def recorded(*given):  # of which no buffer holds the result
        from_below.append(gated(*given))
        return from_below[-1]

    monkeypatch.setattr(reference, "gated", recorded)
    whole, weights = plan.build(net, fuses=lambda step: fuses), pack.pack(net)
    for factor in (1e-3, 1.0, 1e5):  # of the first weights, and so of most features
        weights["conv0_0.conv1"] = tuple(factor * x for x in weights["conv0_0.conv1"])
        x = torch.rand(3, 1, 32, 32)
        scales = calibrate.calibrate(whole, weights, x)
        from_below.clear()
        largest = calibrate._largest(whole, calibrate.rescale(whole, weights, scales), x)
        assert max(found.abs().max() for found in from_below) <= torch.finfo(FLOAT8).max / 2
        for used, most in largest.items():
            if whole.buffers[used.buffer].kind == "features":
                assert most <= torch.finfo(FLOAT8).max / 2, used
        assert largest[plan.Slice("between0_0", 0, 8)] > torch.finfo(FLOAT8).max / 4


def test_float8_finds_the_same_opacity(real_slices):
    net = SCOATNet.from_pretrained("scoat-w16").eval()
    engine = scoat_fast.compile(net, dtype=FLOAT8, calibration=real_slices, batch_sizes=(2,))
    assert engine.backend == "reference" and "not in float8" in engine.refusals["cpu"]
    found = engine.parity(real_slices)
    assert 0 < found.relative < 0.1 and 0.97 < found.dice < 1
    assert 0.97 < engine.calibration_dice < 1
    assert f"bfloat16 on the calibration slices: {engine.calibration_dice:.4f}" in str(engine)
    assert engine(real_slices).dtype == torch.float32
    places = lay_out(engine.plan, reference, 1, 256, 256, engine.device, FLOAT8).places
    assert {name: places[name][2] for name in ("row0", "x0_4", "input")} == {
        "row0": FLOAT8, "x0_4": torch.bfloat16, "input": torch.bfloat16
    }  # fmt: skip


def test_float8_wants_slices_to_calibrate_on(net):
    x = torch.rand(1, 1, 16, 16)
    with pytest.raises(ValueError, match="calibration slices are wanted for float8"):
        scoat_fast.compile(net, dtype=FLOAT8)
    with pytest.raises(ValueError, match="for nothing else"):
        scoat_fast.compile(net, dtype=torch.float32, calibration=x)
    with pytest.raises(ValueError, match="at least one calibration slice"):
        scoat_fast.compile(net, dtype=FLOAT8, calibration=x[:0])
    with pytest.raises(ValueError, match=r"wants \[N, 1, H, W\], got \(1, 2"):
        scoat_fast.compile(net, dtype=FLOAT8, calibration=torch.rand(1, 2, 16, 16))
    x[0, 0, 3, 4] = torch.nan
    with pytest.raises(ScoatFastError, match="calibration slices give NaN"):
        scoat_fast.compile(net, dtype=FLOAT8, calibration=x)


def test_bad_input():
    engine = scoat_fast.compile(trained(width=8), size=32)
    for x, reason in (
        (torch.rand(1, 3, 32, 32), r"wants \[N, 1, H, W\], got \(1, 3, 32, 32\)"),
        (torch.rand(1, 1, 0, 32), "wants"),
        (torch.rand(32, 32), "wants"),
        (np.zeros((1, 1, 32, 32), np.float32), "the engine wants a tensor, got ndarray"),
        (torch.ones(1, 1, 32, 32, dtype=torch.int16), "floating-point numbers, got torch.int16"),
        (torch.rand(1, 1, 32, 32, device="meta"), "the engine is on cpu, the batch on meta"),
    ):
        with pytest.raises(ValueError, match=reason):
            engine(x)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        engine.mask(torch.rand(1, 1, 32, 32), 1)


def test_bad_options():
    net = trained(width=8)
    for options, error, reason in (
        ({"dtype": torch.int8}, ValueError, "bfloat16, float8_e4m3fn, got torch.int8"),
        ({"backend": "tpu"}, ValueError, "got 'tpu'"),
        ({"device": "meta"}, ValueError, "got the meta device"),
        ({"batch_sizes": ()}, ValueError, "batch sizes"),
        ({"batch_sizes": (0,)}, ValueError, "batch sizes"),
        ({"batch_sizes": 8}, ValueError, "batch sizes from 1 on are wanted, got 8"),
        ({"batch_sizes": (1, 2.5)}, ValueError, r"batch sizes from 1 on are wanted, got \(1, 2.5\)"),
        ({"size": 0}, ValueError, "height and width"),
        ({"size": 32.0}, ValueError, "a height and width from 1 on are wanted, got 32.0"),
        ({"size": (1, 32, 32)}, ValueError, r"a height and width from 1 on are wanted, got \(1, 32, 32\)"),
        ({"backend": "cpu", "dtype": torch.bfloat16}, RuntimeError, "computes in float32, not in bfloat16"),
    ):
        with pytest.raises(error, match=reason):
            scoat_fast.compile(net, **options)
    with pytest.raises(ValueError, match="weights that hold numbers are wanted"):
        scoat_fast.compile(SCOATNet(width=3).to("meta"), device="cpu")
    with pytest.raises(ValueError, match="not that of Linear"):
        scoat_fast.compile(torch.nn.Linear(1, 1))

    class Other(SCOATNet):
        def forward(self, input):
            return super().forward(input) + 1

    with pytest.raises(ValueError, match="not that of Other"):
        scoat_fast.compile(Other(width=3))
    net.conv2_1.bn1.running_var[3] = torch.nan
    with pytest.raises(WeightsError, match=r"conv2_1\.conv1"):
        scoat_fast.compile(net)
    net.conv2_1.bn1 = torch.nn.GroupNorm(1, 32)
    folded = "folds BatchNorm layers with running statistics, weight and bias"
    with pytest.raises(ValueError, match=f"{folded}, got GroupNorm"):
        scoat_fast.compile(net)
    net.conv2_1.bn1 = torch.nn.BatchNorm2d(32, affine=False)
    with pytest.raises(ValueError, match=f"{folded}, got BatchNorm2d"):
        scoat_fast.compile(net)


@pytest.mark.parametrize(("name", "layer"), [
    ("conv0_0.conv2", torch.nn.Conv2d(8, 8, 3, padding=2, dilation=2)),
    ("conv0_0.conv2", torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)),
    ("conv0_0.conv2", torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
    ("conv0_0.conv2", torch.nn.Conv2d(8, 8, 3, padding=1, bias=False)),
    ("conv2_1.ca.fc.1", torch.nn.SiLU()),
    ("pool", torch.nn.AvgPool2d(2, 2)),
    ("final", torch.nn.Conv2d(8, 2, 3, padding=1)),
    ("conv1_1", torch.nn.Identity()),
], ids=str)  # fmt: skip
def test_other_layers_are_refused(name, layer):
    """No kernel reads weights of a shape that is not the plan's."""
    net = trained(width=8)
    net.set_submodule(name, layer)
    with pytest.raises(ValueError, match=rf"layers of SCOATNet: wanted .* as {name}, got {type(layer).__name__}\("):
        scoat_fast.compile(net, size=32)


def test_layers_that_compute_the_same_are_taken():
    net, x = trained(width=8), torch.rand(1, 1, 32, 32)
    torch.nn.utils.parametrizations.weight_norm(net.conv0_0.conv1)
    net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert relative(scoat_fast.compile(net, size=32)(x), double(trained(width=8), x)) < 1e-5


@native
def test_a_backend_that_is_switched_off_says_so(monkeypatch):
    monkeypatch.setenv("SCOAT_FAST_DISABLE", "engine.cpu")
    engine = scoat_fast.compile(trained(width=8), size=32)
    assert engine.backend == "reference"
    off, other = "is switched off by SCOAT_FAST_DISABLE=engine.cpu", "computes in bfloat16, not in float32"
    assert engine.refusals == {"cpu": off, "amx": other}
    with pytest.raises(RuntimeError, match="switched off"):
        scoat_fast.compile(trained(width=8), backend="cpu")


@native
def test_a_backend_that_computes_wrongly_is_not_chosen(monkeypatch):
    net, x = trained(width=8, deep_supervision=True), torch.rand(1, 1, 32, 32)
    monkeypatch.setattr(runner, "CHECKED", ("cpu",))
    with warnings.catch_warnings(action="error"):
        assert scoat_fast.compile(net, size=32).backend == "cpu"
    cpu = importlib.import_module("scoat_fast.engine.cpu")
    bind = cpu.bind
    monkeypatch.setattr(cpu, "bind", lambda step, *rest: (lambda: None) if step.level == 3 else bind(step, *rest))
    with pytest.warns(UserWarning, match="cpu gives logits that are .* stock PyTorch runs instead"):
        engine = scoat_fast.compile(net, size=32)
    assert engine.backend == "reference" and "of the largest away" in engine.refusals["cpu"]
    assert relative(engine(x)[-1], double(net, x)[-1]) < 1e-5
    assert scoat_fast.compile(net, size=32, backend="cpu").backend == "cpu"  # who asks for it gets it


@native
def test_every_slice_is_checked_and_masks_too(monkeypatch):
    net, options = trained(width=8), {"size": 32, "batch_sizes": (1, 2)}
    monkeypatch.setattr(runner, "CHECKED", ("cpu",))
    cpu = importlib.import_module("scoat_fast.engine.cpu")
    bind = cpu.bind

    def breaking(kind: str, first: int):
        """As it is bound, but with the head's result of the slices from ``first`` on lost."""

        def bound(step, weights, view, pixels):
            call = bind(step, weights, view, pixels)
            if not isinstance(step, plan.Head) or (step.threshold is None) != (kind == "logits"):
                return call
            return lambda: (call(), view(step.out)[first:].zero_())

        return bound

    for kind, first, reason in (("logits", 1, "gives logits that are"), ("mask", 0, "gives masks whose Dice")):
        monkeypatch.setattr(cpu, "bind", breaking(kind, first))
        with pytest.warns(UserWarning, match=f"cpu {reason} .*; stock PyTorch runs instead"):
            engine = scoat_fast.compile(net, **options)
        assert engine.backend == "reference" and reason in engine.refusals["cpu"]


def test_hooks_and_replaced_methods_are_refused():
    """An engine calls none, and what they do to the network would be lost."""
    for place, change in (
        ("conv0_0.conv1", lambda layer: layer.register_forward_hook(lambda layer, given, y: 2 * y)),
        ("att1_1.W_y.1", lambda layer: layer.register_forward_hook(lambda layer, given, y: 2 * y)),
        ("conv1_1.ca", lambda layer: layer.register_forward_pre_hook(lambda layer, given: given)),
        ("conv0_4", lambda layer: setattr(layer, "forward", lambda x: x)),
        ("final", lambda layer: setattr(layer, "_conv_forward", lambda *given: given[0])),
        ("", lambda layer: layer.register_forward_hook(lambda layer, given, y: 2 * y)),
    ):
        net = trained(width=4)
        change(net.get_submodule(place))
        with pytest.raises(ValueError, match=f"calls no hooks .*, and {place or 'the network'} has some"):
            scoat_fast.compile(net, size=32)


@native
def test_a_backend_that_fails_is_not_chosen(monkeypatch):
    cpu = importlib.import_module("scoat_fast.engine.cpu")
    net, failure = trained(width=8), ValueError("out of resources: shared memory\nand more")

    def bind(*args):
        raise failure

    monkeypatch.setattr(cpu, "bind", bind)
    with pytest.warns(UserWarning, match="cpu cannot run here: ValueError: out of resources: .*; stock") as warned:
        engine = scoat_fast.compile(net, size=32)
    assert len(warned) == 1 and engine.backend == "reference"
    assert engine.refusals == {"cpu": "cannot run here: ValueError: out of resources: shared memory"}
    with pytest.raises(ValueError, match="out of resources"):
        scoat_fast.compile(net, size=32, backend="cpu")  # who asks for it learns all of it
    for failure in (torch.OutOfMemoryError("no memory left"), RuntimeError("Triton Error [CUDA]: out of memory")):
        with pytest.raises(type(failure), match="memory"):
            scoat_fast.compile(net, size=32)


def test_an_engine_prints_its_plan():
    engine = scoat_fast.compile(trained(width=8), size=(30, 48))
    text = str(engine)
    assert "32x48" in text
    assert f"{engine.backend} backend, float32" in text
    assert len(text.splitlines()) >= len(engine.plan.steps) + 4
    assert "convolve 3x3 input[0:1] -> between0_0[0:8], row0[0:8]" in text
    kernels = {"cpu": "convolve, Winograd F(4x4, 3x3), 24 tiles", "reference": "operators of PyTorch"}
    assert kernels[engine.backend] in text
