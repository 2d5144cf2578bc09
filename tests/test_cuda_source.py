"""The CUDA sources without a GPU: run thread by thread on the CPU, and compiled, of which the machine code is read."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch
from test_ops import FLOATS, assert_as_accurate

from scoat_fast import ops
from scoat_fast.ops import parity

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
EMULATED = Path(__file__).parent / "emulated_cuda"
WATCHED = ["-fsanitize=thread,alignment"]  # emulated_cuda is told of each access, see its races.h
NVCC = shutil.which("nvcc")


def disassembler() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None and importlib.util.find_spec("triton"):
        bundled = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def load_emulated(folder: Path, name: str, sources: list[tuple[Path, list[str]]]) -> types.ModuleType:
    """An extension of sources, each with options of its own, compiled for the CPU as ``emulated_cuda`` says.

    Two in one process must have different names: Python takes the first one for both.
    """
    sources = [*sources, *((EMULATED / name, ["-O2"]) for name in ("cuda_runtime.cpp", "races.cpp"))]
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    pybind11 = pytest.importorskip("pybind11")
    includes = [EMULATED, CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-fno-gnu-unique", "-Wno-psabi", *(f"-I{i}" for i in includes)]
    objects = [str(folder / f"{i}.o") for i in range(len(sources))]
    running = [
        subprocess.Popen([*command, *options, "-x", "c++", "-c", str(source), "-o", to])
        for (source, options), to in zip(sources, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0] * len(sources)
    target = folder / f"{name}.so"
    subprocess.run([compiler, "-shared", *objects, "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location(name, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The extension with its CUDA kernels compiled for the CPU, see ``emulated_cuda/cuda_runtime.h``."""
    options = ["-fopenmp-simd", "-DSCOAT_ISA=base", "-DSCOAT_EMULATED", "-DSCOAT_CUDA"]
    names = ("cuda.cu", "cpu.cpp", "cpu_dispatch.cpp", "engine_cpu.cpp", "training_cpu.cpp", "bindings.cpp")
    sources = [(CSRC / name, options + WATCHED * name.endswith(".cu")) for name in names]
    return load_emulated(tmp_path_factory.mktemp("emulated"), "_C", sources)


def give_what_is_asked_for(module, monkeypatch) -> None:
    """Lets emulated kernels use the memory of those tensors alone of which addresses are taken."""
    allow, address = ctypes.CDLL(module.__file__).allow, torch.Tensor.data_ptr
    allow.argtypes = ctypes.c_void_p, ctypes.c_size_t

    def data_ptr(x):
        if x.numel():
            last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
            allow(address(x), (last + 1) * x.itemsize)
        return address(x)

    allow(None, 0)
    monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_cuda_kernels_thread_by_thread(op, dtype, emulated, monkeypatch):
    native = pytest.importorskip("scoat_fast.ops._native", exc_type=ImportError)
    give_what_is_asked_for(emulated, monkeypatch)
    monkeypatch.setattr(native, "_C", types.SimpleNamespace(cpu=emulated.cuda))
    for sample in op.samples("awkward", dtype, "cpu"):
        assert_as_accurate(parity.measure(op, "cpu", sample), sample.name)


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    sources = [(EMULATED / "faults.cpp", WATCHED), (EMULATED / "faults_module.cpp", [])]
    sources += [(EMULATED / "hopper_ptx.cpp", [])]
    return load_emulated(tmp_path_factory.mktemp("faults"), "_faults", sources)


@pytest.mark.parametrize(("without", "said"), [
    ("the fence of barriers", "a barrier is used before its threads know of it"),
    ("a wait for an empty stage", "copies for barrier 0 of block 0 writes shared memory at 0, which copies for"),
    ("a fence between proxies", "products of warp . of block 0 reads .* thread .* wrote without a fence between"),
    ("a warp's barrier", "products of warp . of block 0 reads .* thread .* wrote at the same time"),
    ("a wait for a full stage", "shared memory at .* at the same time"),
    ("a wait for products", "copies for barrier 0 of block 0 writes .* products of warp . of block 0 read at the same"),
    ("a barrier of all", "thread .* shared memory at .* thread .* at the same time"),
    ("somebody at a barrier", "all threads wait"),
    ("a fence before products", "products without a fence before them"),
    ("the last bytes", "uses shared memory that it was not given"),
    ("a barrier's place", "thread 0 of block 0 uses shared memory at 8192, where a barrier lies"),
    ("a value", "products of warp . of block 0 reads shared memory at .* which nobody wrote"),
    ("the end", "thread 127 of block 0 writes memory that it was not given"),
    ("a vector's beginning", "a vector that does not begin at its size"),
    ("a place for each block", "thread .* of block 1 writes memory at .* thread .* of block 0 wrote at the same time"),
])  # fmt: skip
def test_the_emulation_sees_what_is_left_out(without, said, faults):
    for blocks in (2, 1, 1) if "block 1" not in said else (2,):
        faults.run_without("nothing", blocks)
        with pytest.raises(RuntimeError, match=said):
            faults.run_without(without, blocks)
        faults.run_without("nothing", blocks)


needs_nvcc = pytest.mark.skipif(NVCC is None or disassembler() is None, reason="needs nvcc and cuobjdump")


def machine_code_of(target: str, name: str) -> dict[str, tuple[str, str]]:
    """Resources and SASS of the kernels with ``name`` in their mangled names, of the extension as it was built."""
    native = pytest.importorskip("scoat_fast._C", exc_type=ImportError)
    build = json.loads(Path(native.__file__).with_name("_build.json").read_text())
    if "SCOAT_FAST_CUDA=0" in build.get("why_no_cuda", ""):
        pytest.skip("the extension was built without CUDA, as it was asked for")

    def dump(option: str) -> str:
        command = [disassembler(), option, "-arch", target, native.__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    resources = dict(re.findall(r"Function (\S+):\n\s*(.+)", dump("-res-usage")))
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", dump("-sass"), re.DOTALL))
    assert resources.keys() == code.keys()
    return {found: (resources[found], text) for found, text in code.items() if name in found}


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def machine_code(request) -> dict[str, tuple[str, str]]:
    return machine_code_of(request.param, "4cuda")  # their namespace


@needs_nvcc
def test_machine_code_has_no_spills_and_few_registers(machine_code):
    assert len(machine_code) == 108  # nine kernels, two layouts, three dtypes, with and without vectors
    for name, (resources, code) in machine_code.items():
        assert re.search(r"STACK:0 .*LOCAL:0 ", resources), (name, resources)
        assert not re.search(r"\b(LDL|STL)\b", code), name
        registers = int(re.search(r"REG:(\d+)", resources)[1])
        assert registers <= 128, (name, registers)  # so that two blocks of 256 threads fit


@needs_nvcc
def test_machine_code_moves_16_bytes_at_a_time(machine_code):
    """The variants for whole vectors do, by the template arguments in their mangled names."""
    vectors = re.compile(r"(contiguousI(f|NS_[46][A-Za-z]+E)Lb1E)|(channels_lastI(f|NS_[46][A-Za-z]+E)Li[48]E)")
    chosen = {name: code for name, (_, code) in machine_code.items() if vectors.search(name)}
    assert len(chosen) == 54
    for name, code in chosen.items():
        loads, stores = re.search(r"\bLDG\.E\.128", code), re.search(r"\bSTG\.E\.128", code)
        reads_only = (
            re.search(r"channels_(contiguous|channels_last)\w+Lb0EEEv|Pass\w*E0EEEv", name) or "gate_backward" in name
        )
        assert stores or reads_only or "up_backward_contiguous" in name, name  # that one stores half a vector
        assert loads or "up_forward_contiguous" in name, name  # that one reads single columns around its outputs


@needs_nvcc
def test_addresses_are_computed_in_64_bits(tmp_path):
    ptx = tmp_path / "cuda.ptx"
    subprocess.run([NVCC, "-std=c++17", "-ptx", "-arch=compute_90", str(CSRC / "cuda.cu"), "-o", str(ptx)], check=True)
    for name, body in re.findall(r"\.entry (\w+)\((.*?)\n}", ptx.read_text(), re.DOTALL):
        assert re.search(r"mul\.lo\.s64|mad\.lo\.s64", body), name  # steps of tensors are multiplied in 64 bits


@pytest.mark.skipif(os.name != "posix", reason="the extension is built on Linux and macOS")
def test_the_build_without_a_compiler_is_pure_python(tmp_path):
    """What the package is on a machine with no compiler: it says so, and works."""
    target = tmp_path / "site"
    (tmp_path / "bin").mkdir()
    code = f"""
import os, runpy, sys
os.environ["PATH"] = {str(tmp_path / "bin")!r}
os.environ.pop("CXX", None)
sys.argv = ["setup.py", "-q", "build", "--build-base", {str(tmp_path / "build")!r}, "--build-lib", {str(target)!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pure Python, because no C++ compiler was found" in done.stderr
    assert not list((target / "scoat_fast").glob("_C*"))
    check = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]  # finds the checkout's
import torch
from scoat_fast import ops
from scoat_fast.ops import parity
print(ops.explain("upsample", torch.rand(1, 2, 3, 3), []))
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=target, capture_output=True, text=True, check=True)
    assert "implementation='reference'" in done.stdout
    assert "cannot be loaded" in done.stdout
