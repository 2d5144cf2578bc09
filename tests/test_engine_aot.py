"""The engine's Triton kernels compiled ahead of time at the network's shapes: what a GPU gets to run.

Needs no GPU. The compiler works in a process of its own (this file as a script), where ``TRITON_INTERPRET`` is not set.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_triton_aot import SHARED, disassembly, specialized

triton = pytest.importorskip("triton")

FAMILIES = {80: "sm80", 86: "sm80", 89: "sm80", 90: "sm90", 100: "sm90", 120: "sm120"}
SHARED = {**SHARED, 86: 99}
# by what they write: wide and narrow rows, one source and two, channels as rows, recalibrated, pooled
STEPS = ("x0_4", "between0_4", "between2_1", "between3_1", "x4_0", "attention1_1", "scale1_1", "logits4", "pool2")
CONVOLUTIONS = ("convolve", "attend")
BFLOAT16, FLOAT16, FLOAT32, FLOAT8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
CASES = (  # dtype, capability, width, size, steps
    *((BFLOAT16, capability, 32, 512, STEPS) for capability in (80, 86, 90, 100, 120)),
    (BFLOAT16, 90, 64, 512, STEPS),
    *((FLOAT8, capability, 32, 512, STEPS) for capability in (89, 90)),
    (FLOAT32, 90, 32, 512, ("x0_4", "between2_1", "attention1_1", "attention3_1", "pool2")),
    *((dtype, 90, 16, 256, ("x0_4", "between2_1", "attention1_1")) for dtype in (FLOAT32, FLOAT16)),
)  # the last: the shape of the weights that ship


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """What ``measure`` says of every launch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        run = subprocess.run(
            [sys.executable, __file__],
            env=environment | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def of(compiled: list[dict], *capabilities: int, float8: bool = False) -> list[dict]:
    """The products of features with weights that tensor cores are for."""
    found = [each for each in compiled if each["capability"] in capabilities and each["kernel"] in CONVOLUTIONS]
    found = [each for each in found if each["float8"] == float8 and not each["float32"]]
    assert found
    return found


def test_every_kernel_is_compiled(compiled):
    names = {"convolve", "attend", "head", "means", "excite", "scale_weights"}
    assert {each["kernel"] for each in compiled if each["capability"] == 90} == names


def test_shared_memory_fits(compiled):
    for each in compiled:
        assert each["shared"] <= SHARED[each["capability"]] * 1024, each


def test_nothing_spills(compiled):
    for each in compiled:
        allowed = 8 if each["capability"] == 120 else 0  # of Triton 3.6: one number
        assert each["stack"] <= allowed and each["local"] == 0, each
        if each["instructions"] is not None:
            assert not {name for name in each["instructions"] if name.startswith(("LDL", "STL"))}, each


def test_registers_leave_room(compiled):
    for each in compiled:
        if each["registers"] is not None:
            assert each["registers"] <= 255 and each["registers"] * 32 * each["warps"] <= 65536, each


@pytest.mark.parametrize(("float8", "instruction"), [(False, "HGMMA"), (True, "QGMMA")])
def test_hopper_multiplies_from_shared_memory(compiled, float8, instruction):
    for each in of(compiled, 90, float8=float8):
        if each["instructions"] is None:
            pytest.skip("this Triton brings no cuobjdump")
        assert any(name.startswith("UTMALDG.4D") for name in each["instructions"]), each
        assert any(name.startswith(instruction) for name in each["instructions"]), each
        assert not any(name.startswith(("HMMA", "QMMA")) for name in each["instructions"]), each
        # a left matrix that is loaded into registers halves the rate
        assert each["products"] > each["from_registers"] == 0, each


def test_float8_saturates(compiled):
    """What is too large becomes the largest number, not NaN; Triton 3.6 goes by way of float16 on sm_89."""
    found = [each for each in of(compiled, 89, 90, float8=True) if each["kernel"] == "convolve"]
    for each in found:
        wide = each["step"].endswith("-> x0_4[0:32]")  # in bfloat16
        assert bool(each["conversions"]) != wide, each
        assert all(name.startswith("cvt.rn.satfinite.e4m3x2.") for name in each["conversions"]), each


def test_older_cards_multiply_with_tensor_cores(compiled):
    for each in of(compiled, 80):
        if each["instructions"] is None:
            pytest.skip("this Triton brings no cuobjdump")
        assert any(name.startswith("HMMA") for name in each["instructions"]), each
        assert any(name.startswith("LDGSTS") for name in each["instructions"]), each  # pipelined


# What the process of its own does.


def launches(dtype: torch.dtype, capability: int, width: int, size: int, steps: tuple[str, ...]) -> Iterator:
    """The different launches of a batch of 8."""
    from scoat_fast import SCOATNet
    from scoat_fast.engine import pack, plan
    from scoat_fast.engine import triton as backend
    from scoat_fast.engine.layout import lay_out, step_dtype, view_of

    backend.forced, device = FAMILIES[capability], torch.device("meta")
    net = SCOATNet(width=width)
    whole, weights = plan.build(net), pack.pack(net.eval())
    layout = lay_out(whole, backend, 8, size, size, device, dtype)
    tensors = layout.tensors(torch.empty(layout.bytes, dtype=torch.uint8, device=device))
    for step in whole.steps:
        if {used.buffer for used in plan.writes(step)} & set(steps):
            ready = backend.prepare(step, weights, device, step_dtype(whole, step, dtype))
            for launch in backend.launches(step, ready, view_of(whole, tensors), (size >> step.level) ** 2):
                yield launch, plan.summary(step)


def kind(value) -> tuple[str, bool]:
    """The type of an argument for Triton, and whether it is a multiple of 16."""
    if hasattr(value, "block_shape"):
        name, _ = specialized(value.base)
        return f"tensordesc<{name.removeprefix('*')}{list(value.block_shape)}>", False
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
        return "*u8", True
    return ("fp32", False) if isinstance(value, float) else specialized(value)


def source(launch):
    """The kernel for the arguments of a launch, as ``launch.run()`` would have it compiled."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[i,] = "constexpr", value
            continue
        parts = {(i, j): part for j, part in enumerate(value)} if isinstance(value, tuple) else {(i,): value}
        kinds = [kind(part) for part in parts.values()]
        signature[name] = tuple(k for k, _ in kinds) if isinstance(value, tuple) else kinds[0][0]
        for (path, part), (found, divisible) in zip(parts.items(), kinds, strict=True):
            if found == "constexpr":
                constants[path] = part
            elif divisible:
                attributes[path] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def measure(launch, capability: int, what: str) -> dict:
    from triton.backends.compiler import GPUTarget

    made = source(launch)
    kernel = triton.compile(made, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})
    found = {"kernel": kernel.metadata.name, "capability": capability, "step": what, "warps": launch.warps}
    left = re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\S)", kernel.asm["ptx"])  # "{" where it is in registers
    conversions = sorted(set(re.findall(r"cvt\.\S*e4m3x2\.\w+", kernel.asm["ptx"])))
    found |= {"float8": "fp8e4nv" in str(made.signature), "conversions": conversions}
    found |= {"shared": kernel.metadata.shared, "products": len(left), "from_registers": left.count("{")}
    return found | disassembly(kernel.asm["cubin"], with_instructions=capability in (80, 90))


def main() -> None:
    measured, seen = [], set()
    for dtype, capability, width, size, steps in CASES:
        for launch, what in launches(dtype, capability, width, size, steps):
            made = source(launch)
            key = (capability, launch.kernel.fn.__name__, str(made.signature), str(made.constants))
            if key not in seen:
                seen.add(key)
                measured.append(measure(launch, capability, f"width {width}: {what}") | {"float32": dtype == FLOAT32})
    json.dump(measured, sys.stdout)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
