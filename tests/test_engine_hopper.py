"""The convolutions for Hopper: run thread by thread on a CPU, their machine code read, and run on a GPU that has it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from engine_steps import run_steps, trained
from test_cuda_source import (
    CSRC,
    EMULATED,
    ROOT,
    WATCHED,
    disassembler,
    give_what_is_asked_for,
    load_emulated,
    machine_code_of,
)

import scoat_fast
from scoat_fast import SCOATNet
from scoat_fast.engine import pack, plan
from scoat_fast.engine.layout import FLOAT8

native = pytest.importorskip("scoat_fast.ops._native", exc_type=ImportError)
sm90a = pytest.importorskip("scoat_fast.engine.sm90a", exc_type=ImportError)
DTYPES = {torch.bfloat16: 2**-8, torch.float16: 2**-11, FLOAT8: 2**-4}  # and half the step from a number to the next
WAYS = [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False), (FLOAT8, False)]  # and ``planes``
SLACK, FLOOR = 2.0, 2e-6  # times stock torch's own error in the same dtype; of the largest value


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """csrc/hopper.cu compiled for the CPU, see ``emulated_cuda/hopper_ptx.h``."""
    sources = [(CSRC / "hopper.cu", [*WATCHED, f"-DSCOAT_TYPE={kind}"]) for kind in ("Half", "BFloat", "E4M3")]
    sources += [(CSRC / "hopper_bindings.cpp", []), (EMULATED / "hopper_module.cpp", [])]
    sources += [(EMULATED / "hopper_ptx.cpp", ["-O2"])]
    return load_emulated(tmp_path_factory.mktemp("emulated"), "_hopper", sources)


@pytest.fixture
def on_a_cpu(emulated, monkeypatch):
    give_what_is_asked_for(emulated, monkeypatch)
    monkeypatch.setattr(native, "_C", types.SimpleNamespace(hopper=emulated.hopper))


def named(way) -> str:
    dtype, planes = way
    return f"{str(dtype)[6:]} {'planes' if planes else 'swizzled'}"


def assert_steps_as_accurate(form, shape, dtype, device):
    """Every step that runs here, in memory full of NaN."""
    upsampled = gated = tapped = 0
    options = {"wanted": lambda step: sm90a.why_triton(step, dtype) is None}
    options |= {"fuses": partial(sm90a.fuses, dtype=dtype)}
    for outcome in run_steps(trained(**form), "sm90a", dtype, shape, device=device, **options):
        ours, stock, largest = outcome.errors
        assert ours <= SLACK * stock + FLOOR * max(largest, 1), (plan.summary(outcome.step), ours, stock)
        tapped += isinstance(outcome.step, plan.Head)
        if isinstance(outcome.step, plan.Convolve) and outcome.slice == outcome.step.out:
            upsampled += outcome.step.below is not None
            gated += outcome.step.attention is not None
    assert tapped == (not sm90a.planes)
    assert upsampled - gated == (0 if form.get("block") else 4)  # of nodes with a shortcut
    assert gated == 6


@pytest.mark.parametrize(("form", "shape", "dtype", "planes"), [
    ({"width": 16}, (2, 16, 80), torch.bfloat16, False),
    ({"width": 16, "equations": "paper"}, (2, 32, 16), torch.float16, False),
    ({"width": 32}, (2, 16, 16), torch.bfloat16, True),
    ({"width": 32, "block": "vgg"}, (1, 16, 32), torch.float16, False),
    ({"width": 32}, (1, 16, 16), FLOAT8, False),
], ids=["narrow", "paper", "wide", "vgg", "float8"])  # fmt: skip
def test_every_step(form, shape, dtype, planes, on_a_cpu, monkeypatch):
    monkeypatch.setattr(sm90a, "planes", planes)
    assert_steps_as_accurate(form, shape, dtype, "cpu")


@dataclass
class Case:
    """One call of a kernel."""

    counts: tuple[int, ...]
    out: int
    shape: tuple[int, int, int]
    below: int = 0
    attention: bool = False
    shortcut: bool = False
    residual: str | None = None
    pooled: bool = False
    sums: bool = False
    relu: bool = True
    wide: bool = False  # its last result


CASES = [
    Case((32,), 32, (1, 1, 1)),
    Case((32,), 32, (3, 2, 2), pooled=True, sums=True),
    Case((32, 64), 32, (2, 17, 71), shortcut=True, relu=False),
    Case((64, 32), 32, (1, 33, 129), residual="before", sums=True),
    Case((16,), 16, (1, 38, 66), residual="after", pooled=True),
    Case((16, 48), 16, (1, 15, 65), shortcut=True, sums=True),
    Case((64,), 64, (1, 18, 62), pooled=True, sums=True),
    Case((32, 32), 64, (2, 5, 127), shortcut=True),
    Case((96,), 128, (1, 9, 64), residual="before"),
    Case((64, 64), 128, (1, 4, 3), shortcut=True, sums=True),
    Case((32,), 32, (1, 2, 2), below=32, shortcut=True),
    Case((32, 32), 32, (3, 18, 130), below=64, shortcut=True),
    Case((64,), 64, (3, 10, 68), below=64, attention=True, shortcut=True),
    Case((16,), 16, (1, 34, 66), below=32, shortcut=True),
    Case((64,), 64, (2, 6, 62), below=128, shortcut=True),
    Case((32,), 128, (1, 6, 66), below=32, shortcut=True),
    Case((32,), 32, (2, 17, 66), residual="before", wide=True),
    Case((64, 32), 32, (1, 10, 70), below=64, shortcut=True, wide=True),
    Case((64,), 64, (1, 9, 65), residual="after", sums=True, wide=True),
    Case((64,), 64, (1, 6, 64), below=32, attention=True, shortcut=True, wide=True),
    Case((32,), 128, (1, 5, 66), residual="before", wide=True),
    Case((128,), 128, (1, 3, 3), shortcut=True, wide=True),
    Case((32,), 256, (2, 4, 66), residual="before", pooled=True, sums=True),
    Case((32, 64), 384, (1, 3, 2), shortcut=True),
    Case((64,), 384, (1, 2, 3), residual="after"),  # a stage's weights would be those of the block before
    Case((128,), 384, (1, 2, 3)),
    Case((32,), 256, (2, 2, 66), below=64, attention=True, shortcut=True),
    Case((16,), 32, (1, 17, 66), residual="before"),  # less than what is multiplied at once
    Case((48, 16), 64, (1, 6, 66), below=80, attention=True, shortcut=True),
    Case((112,), 192, (2, 2, 66), pooled=True, sums=True),
    Case((128,), 192, (2, 4, 66), below=96, attention=True, shortcut=True),
    Case((64, 112), 192, (1, 5, 66), shortcut=True, sums=True),
    Case((16,), 64, (1, 2, 66), shortcut=True, wide=True),
]


@pytest.mark.parametrize(("case", "way"), [
    (case, (dtype, planes)) for case in CASES for dtype, planes in WAYS
    if (dtype == FLOAT8 or not case.wide) and (dtype != FLOAT8 or case.out > 16)
], ids=lambda value: str(value) if isinstance(value, Case) else named(value))  # fmt: skip
def test_odd_sizes_and_every_epilogue(case, way, on_a_cpu, monkeypatch):
    """Views into wider buffers, whose other channels stay as they are."""
    dtype, planes = way
    monkeypatch.setattr(sm90a, "planes", planes)
    torch.manual_seed(2)
    (n, h, w), pixels = case.shape, case.shape[1] * case.shape[2]
    level, buffers = 0, {}

    def buffer(name, channels, height=h, width=w, kind=dtype):
        whole = torch.full((n, height, width, channels + 32), torch.nan, dtype=kind)
        buffers[name] = whole[..., 16 : 16 + channels]
        return plan.Slice(name, 0, channels)

    def fill(name):
        buffers[name].copy_(torch.randn(buffers[name].shape))

    sources = tuple(buffer(f"x{i}", count) for i, count in enumerate(case.counts))
    for source in sources:
        fill(source.buffer)
    below = buffer("below", case.below, h // 2, w // 2) if case.below else None
    if below is not None:
        fill("below")
    attention = plan.Slice("attention", 0, 1) if case.attention else None
    wide = torch.bfloat16 if dtype == FLOAT8 else dtype
    buffers["attention"] = torch.rand(n, h, w).to(wide)
    last = wide if case.wide else dtype
    shortcut = None
    if case.shortcut:
        shortcut = plan.Shortcut("1x1", buffer("shortcut", case.out, kind=last), relu=True, scaled=False)
    out = buffer("out", case.out, kind=dtype if case.shortcut else last)
    pooled = buffer("pooled", case.out, h // 2, w // 2) if case.pooled else None
    if case.residual:
        fill("out")
    held = buffers["out"].double()
    sums = plan.Slice("sums", 0, case.out) if case.sums else None
    step = plan.Convolve(level, "3x3", 3, sources, out, below, attention, case.relu, residual=case.residual,
                         shortcut=shortcut, pooled=pooled, sums=sums)  # fmt: skip
    buffers["sums"] = torch.full((n, sm90a.parts(step, h, w, torch.device("cpu"), dtype), case.out), torch.nan)
    channels = sum(case.counts) + case.below
    weights = {"3x3": (torch.randn(case.out, channels, 3, 3) / (9 * channels) ** 0.5, torch.randn(case.out))}
    weights["1x1"] = torch.randn(case.out, channels, 1, 1) / channels**0.5, torch.randn(case.out)
    ready = sm90a.prepare(step, weights, torch.device("cpu"), dtype)
    sm90a.bind(step, ready, lambda used: buffers[used.buffer], pixels)()

    x, slack = torch.cat([buffers[source.buffer] for source in sources], 3).double().permute(0, 3, 1, 2), 1e-5
    if case.below:
        up = F.interpolate(buffers["below"].double().permute(0, 3, 1, 2), (h, w), mode="bilinear", align_corners=True)
        up = up * (1 + buffers["attention"].double()[:, None]) if case.attention else up
        x = torch.cat([x, up.to(dtype).double()], 1)
        # an upsampled value halfway between two numbers may become either: some few of those in a sum
        slack += 4 * 2 * DTYPES[dtype] * up.abs().max() * weights["3x3"][0].abs().max()
    y = F.conv2d(x, rounded(weights["3x3"][0], dtype), weights["3x3"][1].double(), padding=1).permute(0, 2, 3, 1)
    y = y + held if case.residual == "before" else y
    y = y.relu() if case.relu else y
    y = y + held if case.residual == "after" else y
    assert_rounded(buffers["out"], y, slack)
    if case.pooled:
        most = F.max_pool2d(y.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        assert_rounded(buffers["pooled"], most, slack)
    if case.sums:
        assert ((buffers["sums"].double().sum(1) - y.sum((1, 2))).abs() <= 1e-6 * y.abs().sum((1, 2)) + 1e-6).all()
    if case.shortcut:
        exact = F.conv2d(x, rounded(weights["1x1"][0], dtype), weights["1x1"][1].double()).relu()
        assert_rounded(buffers["shortcut"], exact.permute(0, 2, 3, 1), slack)
    for name in ("out", "pooled", "shortcut"):
        if name in buffers:
            around = buffers[name]._base.float()
            assert around[..., :16].isnan().all() and around[..., -16:].isnan().all(), name


@pytest.mark.parametrize(("out", "shape", "residual", "dtype"), [
    (out, *rest, dtype) for out, *rest in (
        (32, (1, 1, 1), None), (16, (1, 33, 65), "after"), (32, (2, 17, 71), "before"), (64, (1, 9, 130), "before"),
    ) for dtype in DTYPES if dtype != FLOAT8 or out > 16
])  # fmt: skip
def test_a_head_in_the_last_convolution(out, shape, residual, dtype, on_a_cpu):
    """Its taps, which stand for the result, and then their sums, as logits and as a mask."""
    torch.manual_seed(2)
    (n, h, w), wide = shape, torch.bfloat16 if dtype == FLOAT8 else dtype
    slices = {name: plan.Slice(name, 0, out) for name in ("x", "out")}
    slices |= {"taps": plan.Slice("taps", 0, plan.TAPS), "threshold": plan.Slice("threshold", 0, 1)}
    slices |= {name: plan.Slice(name, 0, 1) for name in ("logits", "mask")}
    taps = plan.Taps("head", slices["taps"])
    step = plan.Convolve(0, "3x3", 3, (slices["x"],), slices["out"], residual=residual, taps=taps)
    assert sm90a.fuses(step, dtype)
    weights = {"3x3": (torch.randn(out, out, 3, 3) / (9 * out) ** 0.5, torch.randn(out))}
    weights["head"] = torch.randn(1, out, 3, 3) / (9 * out) ** 0.5, torch.randn(1)
    found = {"x": torch.randn(n, h, w, out).to(dtype), "out": torch.randn(n, h, w, out).to(wide)}
    held, threshold = found["out"].clone(), torch.tensor([0.3])
    whole = {"taps": torch.full((n + 2, h, w, plan.TAPS), torch.nan, dtype=wide)}  # with a slice before and one after
    whole |= {"logits": torch.full((n + 2, 1, h, w), torch.nan), "mask": torch.full((n + 2, 1, h, w), 255).byte()}
    found |= {name: x[1:-1] for name, x in whole.items()} | {"threshold": threshold}

    def run(step, kind):
        ready = sm90a.prepare(step, weights, torch.device("cpu"), kind)
        sm90a.bind(step, ready, lambda used: found[used.buffer], h * w)()

    run(step, dtype)
    run(plan.Head(0, "head", slices["taps"], slices["logits"], tapped=True), wide)
    run(plan.Head(0, "head", slices["taps"], slices["mask"], slices["threshold"], tapped=True), wide)

    x, (kernel, bias) = found["x"].double().permute(0, 3, 1, 2), weights["3x3"]
    y = F.conv2d(x, rounded(kernel, dtype), bias.double(), padding=1)
    y = y + held.double().permute(0, 3, 1, 2) if residual == "before" else y
    y = y.relu()
    y = y + held.double().permute(0, 3, 1, 2) if residual == "after" else y
    head, bias = weights["head"][0].to(wide).double(), weights["head"][1].double()
    by_tap = head.flatten(2).permute(2, 1, 0)[..., None]
    taps = found["taps"].double().permute(0, 3, 1, 2)
    error = (taps[:, :9] - F.conv2d(y, by_tap)).abs()
    assert (error <= 2 * DTYPES[wide] * F.conv2d(y.abs(), by_tap.abs()) + 1e-5).all() and (taps[:, 9] == 0).all()
    assert torch.equal(found["out"], held)
    beside = F.pad(taps, (1, 1, 1, 1))
    added = sum(beside[:, i, i // 3 : i // 3 + h, i % 3 : i % 3 + w] for i in range(9)) + bias
    torch.testing.assert_close(found["logits"][:, 0].double(), added, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["mask"], (found["logits"] > threshold).to(torch.uint8))
    for around in (whole["taps"].float().isnan(), whole["logits"].isnan(), whole["mask"] == 255):
        assert around[0].all() and around[-1].all() and not around[1:-1].any()
    exact, most = F.conv2d(y, head, bias, padding=1), F.conv2d(y.abs(), head.abs(), padding=1)
    assert ((found["logits"].double() - exact).abs() <= 2 * DTYPES[wide] * most + 1e-4).all()


def rounded(weight, dtype):
    """As the kernel has it, in float64."""
    divided, unit = pack.in_units(weight) if dtype == FLOAT8 else (weight, 1.0)
    return divided.to(dtype).double() * unit


def assert_rounded(x, exact, slack):
    """As near as one rounding leaves it, and what came before."""
    least = 2**-10 if x.dtype == FLOAT8 else 0  # half of the step between subnormal numbers
    assert ((x.double() - exact).abs() <= DTYPES[x.dtype] * exact.abs() + least + slack).all()


@pytest.mark.parametrize("shape", [(2, 2, 2, 16), (1, 34, 38, 128), (3, 18, 70, 48)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_sums_of_what_is_gated(shape, dtype, on_a_cpu):
    """Of upsampled pixels that nobody stores."""
    torch.manual_seed(2)
    n, h, w, channels = shape
    found = {"below": torch.randn(n, h // 2, w // 2, channels + 8).to(dtype)[..., 8:]}
    found["attention"] = torch.rand(n, h, w).to(torch.bfloat16 if dtype == FLOAT8 else dtype)
    slices = {name: plan.Slice(name, 0, channels) for name in ("below", "attention", "sums")}
    step = plan.Gate(0, slices["below"], None, slices["attention"], slices["sums"])
    found["sums"] = torch.full((n, sm90a.parts(step, h, w, torch.device("cpu"), dtype), channels), torch.nan)
    sm90a.bind(step, {}, lambda used: found[used.buffer], h * w)()
    up = F.interpolate(found["below"].double().permute(0, 3, 1, 2), (h, w), mode="bilinear", align_corners=True)
    gated = up * (1 + found["attention"].double()[:, None])
    error = (found["sums"].double().sum(1) - gated.sum((2, 3))).abs()
    assert (error <= 1e-6 * gated.abs().sum((2, 3)) + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_nan_is_no_clean_zero(dtype, on_a_cpu):
    x, out, most = torch.zeros(1, 4, 4, 32), torch.zeros(1, 4, 4, 32), torch.zeros(1, 2, 2, 32)
    x[0, 0, 0, 5] = torch.nan
    found = {"x": x.to(dtype), "out": out.to(dtype), "pooled": most.to(dtype)}
    slices = {name: plan.Slice(name, 0, 32) for name in found}
    step = plan.Convolve(0, "3x3", 3, (slices["x"],), slices["out"], pooled=slices["pooled"])
    ready = sm90a.prepare(step, {"3x3": (torch.ones(32, 32, 3, 3), -torch.ones(32))}, x.device, dtype)
    sm90a.bind(step, ready, lambda used: found[used.buffer], 16)()
    results = {name: x.float() for name, x in found.items()}
    assert results["out"][0, :2, :2].isnan().all() and not results["out"][0, 3:].isnan().any()
    assert results["pooled"][0, 0, 0].isnan().all()

    wide = torch.bfloat16 if dtype == FLOAT8 else dtype
    taps, mask = torch.zeros(2, 4, 4, plan.TAPS, dtype=wide), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    taps[0, 0, 0], given = torch.nan, {"taps": taps, "mask": mask, "threshold": torch.tensor([0.3])}
    slices = {name: plan.Slice(name, 0, x.shape[-1]) for name, x in given.items()}
    head = plan.Head(0, "head", slices["taps"], slices["mask"], slices["threshold"], tapped=True)
    ready = sm90a.prepare(head, {"head": (torch.ones(1, 32, 3, 3), torch.zeros(1))}, x.device, wide)
    sm90a.bind(head, ready, lambda used: given[used.buffer], 16)()
    assert mask[0, 0, :2, :2].all() and mask.sum() == 4


def test_equal_slices_give_equal_bits(on_a_cpu):
    """Whichever block computes them, and whatever lies in the rest of the batch."""
    steps = [step for step in plan.build(SCOATNet(width=16)).steps if sm90a.why_triton(step, torch.bfloat16) is None]
    step = next(step for step in steps if step.sums)
    x = torch.randn(1, 40, 70, step.channels).bfloat16()
    weights = {step.weights: (torch.randn(step.out.channels, step.channels, 3, 3), torch.randn(step.out.channels))}
    ready = sm90a.prepare(step, weights, x.device, torch.bfloat16)
    results = []
    for batch in (x, torch.cat([x * 2, x, x])):
        found = {step.out.buffer: torch.zeros(len(batch), 40, 70, step.out.channels).bfloat16()}
        found[step.pooled.buffer] = torch.zeros(len(batch), 20, 35, step.out.channels).bfloat16()
        parts = sm90a.parts(step, 40, 70, x.device, torch.bfloat16)
        found[step.sums.buffer] = torch.zeros(len(batch), parts, step.out.channels)
        sm90a.bind(step, ready, lambda used, f=found, b=batch: f.get(used.buffer, b), 2800)()
        results.append(found)
    for name, once in results[0].items():
        for i in (1, 2):
            assert torch.equal(results[1][name][i], once[0]), name


def test_what_it_refuses(on_a_cpu, monkeypatch):
    assert "not in float32" in sm90a.why_not(torch.device("cpu"), torch.float32)
    assert sm90a.why_not(torch.device("cpu"), torch.bfloat16) == "needs CUDA tensors, got cpu"
    monkeypatch.setattr(sm90a, "planes", True)
    assert "in bfloat16 alone" in sm90a.why_not(torch.device("cuda"), FLOAT8)
    with pytest.raises(RuntimeError, match="engine: sm90a needs CUDA tensors, got cpu"):
        scoat_fast.compile(SCOATNet(width=16), dtype=torch.bfloat16, backend="sm90a")
    steps = plan.build(SCOATNet(width=16)).steps
    reasons = {sm90a.why_triton(step, torch.bfloat16) for step in steps}
    assert "takes 1 channels, and multiples of 8 are wanted" in reasons
    narrow = [replace(step, sources=(plan.Slice("x", 0, 8),)) for step in steps if getattr(step, "scale", None)]
    reasons = {sm90a.why_triton(step, torch.bfloat16) for step in narrow}
    assert "takes 8 channels, and multiples of 32 are wanted" in reasons
    reasons = {sm90a.why_triton(step, FLOAT8) for step in steps}
    assert "gives 16 channels, and there are kernels for 32 and multiples of 64" in reasons
    first = plan.build(SCOATNet(in_channels=32)).steps[0]
    assert sm90a.why_triton(first, torch.bfloat16) == "takes what the network is given"


@pytest.mark.parametrize(("width", "gated"), [(12, 0), (16, 6), (32, 6), (64, 6), (256, 5)])
def test_plans_gate_in_convolutions_that_have_a_kernel(width, gated, on_a_cpu):
    with torch.device("meta"):
        net = SCOATNet(width=width)
    steps = plan.build(net, fuses=partial(sm90a.fuses, dtype=torch.bfloat16)).steps
    assert sum(isinstance(step, plan.Convolve) and step.attention is not None for step in steps) == gated
    apart = [step for step in steps if isinstance(step, plan.Gate) and step.attention is not None]
    assert sum(step.out is not None for step in apart) == 6 - gated


def test_a_step_is_named_with_its_tile_or_with_why_it_runs_in_triton(on_a_cpu):
    steps, device = plan.build(SCOATNet(width=32)).steps, torch.device("cpu")
    names = [sm90a.kernel(step, 512 >> step.level, device, torch.bfloat16) for step in steps]
    assert "convolve_tiles 8x64 pixels, 32 channels at once" in names
    assert "scale, convolve_tiles 4x64 pixels, 32 channels at once" in names
    assert any(name.endswith("(not sm90a: it takes 1 channels, and multiples of 8 are wanted)") for name in names)
    assert "up_forward" in names


def test_products_that_wait_for_each_other_fail_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    monkeypatch.chdir(ROOT)
    compiler = tmp_path / "nvcc"
    built = {"openmp": False, "amx": False, "hopper": True}
    ninja_file = runpy.run_path("setup.py", run_name="setup")["ninja_file"]
    text = ninja_file(tmp_path, tmp_path / "_C.so", "g++", str(compiler), built)
    (command,) = re.findall(r"rule nvcc_hopper\n  command = (.*)", text)
    command = command.replace("$in", "x.cu").replace("$out", "x.o").replace("$extra", "").replace("$$", "$")
    for said, code in (("ptxas info : (C7511) serialized", 1), ("ptxas info : (C7519) serialized", 0), ("", 0)):
        compiler.write_text(f"#!/bin/sh\necho '{said}' >&2\ntouch x.o\n")
        compiler.chmod(0o755)
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode != 0) == bool(code) and said in done.stderr, done


@pytest.fixture(scope="module")
def machine_code() -> dict[str, tuple[str, str]]:
    """Resources and SASS of every kernel in the extension as it was built, by mangled name."""
    if not hasattr(native._C, "hopper") or disassembler() is None:
        pytest.skip("needs an extension with code for Hopper, and cuobjdump")
    found = machine_code_of("sm_90a", "convolve_tiles")
    # without a shortcut: bfloat16 in four counts of channels and two ways to lie, float16 in one of them, and float8 in
    # three counts, with a wide result and without; for up to 64 channels also with a shortcut, and with taps
    assert len(found) == 8 + 4 + 6 + 6 + 3 + 4 + 3 + 3 + 2
    return found


def test_machine_code_has_no_spills(machine_code):
    for name, (resources, code) in machine_code.items():
        # a block begins with so many: what warpgroups then take and give is reckoned from them
        assert re.search(r"REG:168 STACK:0 .*LOCAL:0 ", resources), (name, resources)
        assert not re.search(r"\b(LDL|STL)\b", code), name


def test_machine_code_multiplies_without_waiting(machine_code):
    """All products of a stage follow each other, and one wait follows them; what is fetched comes in boxes."""
    for name, (_, code) in machine_code.items():
        form = re.search(r"Li(\d+)ELb(\d)ELb\dELb\dELb(\d)", name).groups()
        channels, shortcut, tapped = (int(found) for found in form)
        cut = sm90a._Cut(native._C.hopper.cut(channels, bool(shortcut)))
        rows, joined = cut.height // 2, cut.zeros + 1
        products = rows // joined * (joined + 2) * 3 + rows * shortcut  # of so many channels:
        name_of, at_once = ("QGMMA", 32) if "E4M3" in name else ("HGMMA", 16)
        found = re.findall(rf"\b{name_of}\.64x(\d+)x{at_once}\.F32\S*", code)
        assert len(found) == products * cut.depth // at_once, (name, found)
        assert found.count(str(joined * channels)) >= len(found) - rows * 2
        assert len(re.findall(rf"{name_of}.*gsb0", code)) == 1, name
        # a warp's, by all of its threads: of a row and 8 taps for each 16 channels
        assert not re.search(r"@!?U?P\d\s+HMMA", code), name
        assert (
            len(re.findall(r"\bHMMA\.16816\b", code)) == len(re.findall("HMMA", code)) == tapped * rows * channels // 8
        )
        assert "UTMALDG.4D" in code and "UBLKCP" in code, name


hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@hopper_only
@pytest.mark.parametrize("way", WAYS, ids=named)
@pytest.mark.parametrize("form", [{"width": 16, "equations": "paper"}, {"width": 32}, {"width": 64, "block": "vgg"}])
def test_every_step_on_a_gpu(form, way, monkeypatch):
    dtype, planes = way
    if dtype == FLOAT8 and form["width"] == 16:
        form = form | {"width": 32}  # there are no kernels for 16 channels
    monkeypatch.setattr(sm90a, "planes", planes)
    for shape in ((3, 80, 112), (1, 256, 272)):
        assert_steps_as_accurate(form, shape, dtype, "cuda")


@hopper_only
@pytest.mark.parametrize("way", WAYS, ids=named)
def test_the_engine_on_a_gpu(way, monkeypatch):
    dtype, planes = way
    monkeypatch.setattr(sm90a, "planes", planes)
    net, x = trained(width=32).cuda(), torch.rand(5, 1, 144, 208, device="cuda")
    options = {"dtype": dtype, "batch_sizes": (1, 4), "size": (144, 208)}
    options |= {"calibration": x} if dtype == FLOAT8 else {}
    engine, stock = (scoat_fast.compile(net, backend=name, **options) for name in ("sm90a", "reference"))
    assert engine.parity(x).relative <= SLACK * stock.parity(x).relative + FLOOR
    assert 1 - engine.parity(x).dice <= SLACK * (1 - stock.parity(x).dice) + 1e-3
    assert torch.equal(engine(x), engine(x.flip(0)).flip(0))
    assert torch.equal(engine.mask(x), engine.mask(x.flip(0)).flip(0))


@hopper_only
@pytest.mark.parametrize("way", WAYS, ids=named)
def test_opacity_of_a_real_scan_on_a_gpu(way, monkeypatch, real_slices):
    """The Dice with the network's masks is 1 but for rounding: stock torch loses 0.0075 in bfloat16 on a CPU."""
    dtype, planes = way
    monkeypatch.setattr(sm90a, "planes", planes)
    net, x = SCOATNet.from_pretrained("scoat-w16").cuda(), real_slices.cuda()
    options = {"dtype": dtype, "batch_sizes": (2,)} | ({"calibration": x} if dtype == FLOAT8 else {})
    ours, stock = (
        1 - scoat_fast.compile(net, backend=backend, **options).parity(x).dice for backend in ("sm90a", "reference")
    )
    assert ours <= SLACK * stock + 1e-3
