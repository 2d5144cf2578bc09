"""The Triton kernels compiled ahead of time, as they are launched for the network: what a GPU gets to run.

Needs no GPU. The compiler works in a process of its own (this file as a script), where ``TRITON_INTERPRET`` is not set.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

FULL = 90  # compiled in both layouts and dtypes; the others in one layout for each dtype
CAPABILITIES = (80, 89, FULL, 100, 120)
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program can have
KERNELS = {
    "up_forward",
    "up_backward",
    "gate_backward_channels_last",
    "gate_backward_contiguous",
    "affine",
    "dot",
    "moments",
    "norm",
    "norm_sums",
    "norm_backward",
}
REGISTERS = {
    "affine": 64,
    "dot": 64,
    "moments": 64,
    "norm": 64,
    "norm_sums": 64,
    "norm_backward": 64,
}  # that is full occupancy for half of 64; the others have 128: 16 warps
# Bytes of the widest loads and stores. Contiguous y moves half of what its outputs do; a map has few channels.
WIDTHS = {
    ("up_forward", True): (16, 16),
    ("up_forward", False): (16, 16),
    ("up_backward", True): (16, 16),
    ("up_backward", False): (16, 8),
    ("gate_backward_channels_last", True): (16, 4),
    ("gate_backward_contiguous", False): (16, 16),
    ("affine", True): (16, 16),
    ("affine", False): (16, 16),
    ("dot", True): (16, 4),
    ("dot", False): (16, 4),
    ("moments", True): (16, 4),
    ("moments", False): (16, 4),
    ("norm", True): (16, 16),
    ("norm", False): (16, 16),
    ("norm_sums", True): (16, 16),
    ("norm_sums", False): (16, 16),
    ("norm_backward", True): (16, 16),
    ("norm_backward", False): (16, 16),
}


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


@pytest.fixture(scope="module")
def disassembled(compiled) -> list[dict]:
    """The launches for the one card that are taken apart: to disassemble takes as long as to compile."""
    chosen = [each for each in compiled if each["capability"] == FULL]
    if any(each["instructions"] is None for each in chosen):
        pytest.skip("this Triton brings no cuobjdump")
    return chosen


def test_every_kernel_for_every_card(compiled):
    assert {(each["kernel"], each["capability"]) for each in compiled} == {
        (kernel, capability) for kernel in KERNELS for capability in CAPABILITIES
    }


def test_shared_memory_fits(compiled):
    for each in compiled:
        assert each["shared"] <= SHARED[each["capability"]] * 1024, each


def test_addresses_have_64_bits(compiled):
    for each in compiled:
        assert each["offsets"] == ["i64"], each
        assert each["wide_products"], each


def test_nothing_spills(compiled, disassembled):
    for each in compiled:
        assert each["stack"] == each["local"] == 0, each
    for each in disassembled:
        assert not {name for name in each["instructions"] if name.startswith(("LDL", "STL"))}, each


def test_registers_leave_room_for_other_warps(compiled):
    for each in compiled:
        if each["registers"] is None:
            pytest.skip("this Triton brings no cuobjdump")
        assert each["registers"] <= REGISTERS.get(each["kernel"], 128), each


def test_memory_moves_in_wide_pieces(disassembled):
    for each in disassembled:
        loads, stores = WIDTHS[each["kernel"], each["channels_last"]]
        assert widest(each, "LDG") == loads, each
        assert widest(each, "STG") == stores, each


def widest(each: dict, access: str) -> int:
    """Bytes of the widest access to global memory, by its name: LDG.E.128, LDG.E.U16, STG.E."""
    widths = {name: re.search(r"\.(?:U|S)?(8|16|64|128)\b", name) for name in each["instructions"]}
    return max(int(m[1]) // 8 if m else 4 for name, m in widths.items() if name.startswith(access))


# What the process of its own does.


def launches(dtype: torch.dtype, channels_last: bool) -> Iterator:
    """As the node x11 at 512x512 launches them, forward and backward, on a batch of 16."""
    from dataclasses import replace

    from scoat_fast.ops import _triton_launch as kernels

    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def image(c: int, size: int) -> Tensor:
        return torch.empty(16, c, size, size, dtype=dtype, device="meta", memory_format=memory_format)

    def numbers(*size: int) -> Tensor:
        return torch.empty(size, device="meta")

    y, gate, joined, scale, shift = image(128, 128), image(1, 256), image(192, 256), numbers(16, 192), numbers(16, 192)
    own = joined[:, 64:]
    forward = kernels.up_forward(y, gate, own)
    dot = kernels.dot(joined, joined)
    norm_sums = kernels.norm_sums(joined, joined, joined, shift, joined)
    for launch in (forward, dot, kernels.moments(joined, shift), norm_sums):
        place = numbers(16, launch.tiles, 384)[:, :, -launch.arguments["C"] :]
        yield replace(launch, arguments=launch.arguments | kernels._arguments({"sums": place}))
    yield kernels.up_backward(own, gate, shift[:, 64:], y)
    yield kernels.gate_backward(own, shift[:, 64:], y, numbers(kernels.gate_parts(y), *gate.shape))
    yield kernels.affine(joined, image(192, 256), scale, shift)
    yield kernels.norm(joined, joined, scale, shift, joined)
    yield kernels.norm_backward(joined, joined, joined, scale, scale, shift, joined)


def specialized(value) -> tuple[str, bool]:
    """The type of an argument for Triton, and whether it is a multiple of 16."""
    if isinstance(value, Tensor):
        names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
        names |= {torch.float8_e4m3fn: "*fp8e4nv"}
        return names[value.dtype], value.data_ptr() % 16 == 0
    if value is None or value == 1:
        return "constexpr", False
    return "i32" if abs(value) < 2**31 else "i64", value % 16 == 0


def source(launch):
    """The kernel for the arguments of a launch, as ``launch.run()`` would have it compiled."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[i,] = "constexpr", launch.constants[name]
            continue
        value = launch.arguments[name]
        parts = {(i, j): part for j, part in enumerate(value)} if isinstance(value, tuple) else {(i,): value}
        kinds = [specialized(part) for part in parts.values()]
        signature[name] = tuple(kind for kind, _ in kinds) if isinstance(value, tuple) else kinds[0][0]
        for (path, part), (kind, divisible) in zip(parts.items(), kinds, strict=True):
            if kind == "constexpr":
                constants[path] = part
            elif divisible:
                attributes[path] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def measure(launch, capability: int) -> dict:
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": launch.warps, "num_stages": 1, "enable_fp_fusion": True}
    kernel = triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": kernel.metadata.name,
        "capability": capability,
        "dtype": str(next(iter(launch.arguments.values())).dtype),
        "channels_last": launch.constants["CHANNELS_LAST"],
        "shared": kernel.metadata.shared,
        "offsets": sorted(set(re.findall(r"tt\.addptr .*(i\d+)>?(?: loc.*)?$", kernel.asm["ttir"], re.MULTILINE))),
        "wide_products": len(re.findall(r"\bm(?:ul|ad)\.(?:wide\.[su]32|lo\.[su]64)", kernel.asm["ptx"])),
        **disassembly(kernel.asm["cubin"], with_instructions=capability == FULL),
    }


def disassembly(cubin: bytes, with_instructions: bool) -> dict:
    """Registers, bytes of stack and local memory, and how often each instruction occurs."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {"registers": None, "stack": 0, "local": 0, "instructions": None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [tool, "-res-usage", *(["-sass"] if with_instructions else []), path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", text)
    return {"registers": registers, "stack": stack, "local": local, "instructions": Counter(names) or None}


def main() -> None:
    measured = []
    for capability in CAPABILITIES:
        for dtype in (torch.bfloat16, torch.float32):
            for channels_last in (True, False):
                if capability == FULL or channels_last == (dtype == torch.bfloat16):
                    measured += [measure(launch, capability) for launch in launches(dtype, channels_last)]
    json.dump(measured, sys.stdout)


if __name__ == "__main__":
    main()
