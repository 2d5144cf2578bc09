"""Builds the extension ``scoat_fast._C`` with ninja and whatever compilers are there; torch is not needed for it.

With nvcc the CUDA kernels are built too; without a C++ compiler the package is pure Python. What was built, and why
not the rest, is written into ``scoat_fast/_build.json``, which ``scoat-fast doctor`` prints.

Environment: ``SCOAT_FAST_EXTENSION`` and ``SCOAT_FAST_CUDA`` are ``auto`` (the default), ``1`` (fail without it) or
``0`` (leave it out); ``CXX``, ``NVCC`` and ``CUDA_HOME`` name the tools.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = ROOT / "csrc"
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
# contraction to FMA is wanted, other liberties with floating point are not: a NaN has to stay one
ISA_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma",
    "base": "",
}
AMX_FLAGS = [*ISA_FLAGS["avx512"].split(), "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-Wno-maybe-uninitialized"]
CUDA_ARCHITECTURES = ("80", "90")  # machine code for these, and PTX of the last for newer ones
HOPPER_TARGETS = ["-gencode=arch=compute_90a,code=sm_90a"]  # whose tensor cores need code of their own


class Refused(Exception):
    """Why a part is left out of the build."""


def wanted(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable} must be auto, 0 or 1, got {value!r}")
    return value


def find_compiler() -> str:
    """The C++ compiler; raises Refused."""
    if wanted("SCOAT_FAST_EXTENSION") == "0":
        raise Refused("SCOAT_FAST_EXTENSION=0 when it was built")
    if platform.system() not in ("Linux", "Darwin"):
        raise Refused(f"the extension is built on Linux and macOS, not on {platform.system()}")
    return first_of("CXX", ["g++", "c++", "clang++"], "C++ compiler")


def find_nvcc() -> str:
    """The CUDA compiler; raises Refused."""
    if wanted("SCOAT_FAST_CUDA") == "0":
        raise Refused("SCOAT_FAST_CUDA=0 when it was built")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + ["/usr/local/cuda"]
    return first_of("NVCC", ["nvcc", *(f"{home}/bin/nvcc" for home in homes)], "nvcc")


def first_of(variable: str, names: list[str], what: str) -> str:
    """The tool that an environment variable names, else the first that is there; raises Refused."""
    named = os.environ.get(variable)
    for name in [named] if named else names:
        found = shutil.which(name)
        if found:
            return found
    if named:
        raise SystemExit(f"{variable}={named} is not there")
    raise Refused(f"no {what} was found when it was built")


def compiles(compiler: str, flags: list[str], suffix: str = ".cpp") -> bool:
    """Whether a small program compiles and links with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe").with_suffix(suffix)
        source.write_text("#include <vector>\nint main() { return std::vector<int>(1).at(0); }\n")
        command = [compiler, *flags, str(source), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def cuda_targets() -> list[str]:
    newest = CUDA_ARCHITECTURES[-1]
    targets = [(cc, f"sm_{cc}") for cc in CUDA_ARCHITECTURES] + [(newest, f"compute_{newest}")]
    return [f"-gencode=arch=compute_{cc},code={code}" for cc, code in targets]


def nvcc_flags(compiler: str) -> list[str]:
    return ["-std=c++17", "-O3", "-ccbin", compiler, "-Xcompiler=-fPIC,-fvisibility=hidden"]


def plan() -> tuple[dict, str | None, str | None]:
    """What is built: the report for ``_build.json``, the C++ compiler and nvcc, None for what is left out."""
    report: dict = {"extension": None, "cuda": None, "hopper": False, "openmp": False, "amx": False}
    try:
        compiler = find_compiler()
        if not compiles(compiler, CXX_FLAGS):
            raise Refused(f"{compiler} could not compile a small C++17 program when it was built")
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise Refused("Python's headers (python3-dev) were not found when it was built")
    except Refused as reason:
        if wanted("SCOAT_FAST_EXTENSION") == "1":
            raise SystemExit(f"SCOAT_FAST_EXTENSION=1, but {reason}") from None
        print(f"scoat-fast: pure Python, because {reason}", file=sys.stderr)
        return report | {"why_no_extension": str(reason), "why_no_cuda": str(reason)}, None, None
    report["extension"] = compiler
    report["openmp"] = compiles(compiler, [*CXX_FLAGS, "-fopenmp"])
    report["amx"] = is_x86() and compiles(compiler, [*CXX_FLAGS, *AMX_FLAGS])
    try:
        nvcc = find_nvcc()
        if not compiles(nvcc, [*nvcc_flags(compiler), *cuda_targets()], ".cu"):  # too old for these, or for the C++ one
            raise Refused(f"{nvcc} could not compile a small program for {CUDA_ARCHITECTURES} when it was built")
    except Refused as reason:
        if wanted("SCOAT_FAST_CUDA") == "1":
            raise SystemExit(f"SCOAT_FAST_CUDA=1, but {reason}") from None
        return report | {"why_no_cuda": str(reason)}, compiler, None
    report["cuda"] = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1]
    report["hopper"] = compiles(nvcc, [*nvcc_flags(compiler), *HOPPER_TARGETS], ".cu")  # not before CUDA 12
    return report, compiler, nvcc


def ninja_file(folder: Path, target: Path, compiler: str, nvcc: str | None, report: dict) -> str:
    """The text of build.ninja."""
    import pybind11

    x86, openmp, amx, hopper = is_x86(), report["openmp"], report["amx"], report["hopper"]
    flags = [*CXX_FLAGS, "-ffp-contract=fast", f"-I{SOURCES}"]
    flags += [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags += ["-fopenmp"] if openmp else ["-fopenmp-simd"]
    flags += ["-DSCOAT_X86"] * x86 + ["-DSCOAT_CUDA"] * bool(nvcc) + ["-DSCOAT_HOPPER"] * hopper
    flags += ["-DSCOAT_AMX"] * amx
    lines = [
        f"cxx = {argument(compiler)}",
        f"flags = {' '.join(map(argument, flags))}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = []

    def build(rule: str, source: str, name: str, extra: str = "") -> None:
        lines.append(f"build {escape(folder / name)}: {rule} {escape(SOURCES / source)}")
        lines.append(f"  extra = {extra}")
        objects.append(escape(folder / name))

    build("cxx", "bindings.cpp", "bindings.o")
    build("cxx", "cpu_dispatch.cpp", "cpu_dispatch.o")
    for isa in ("avx512", "avx2", "base") if x86 else ("base",):
        for source in ("cpu", "engine_cpu", "training_cpu"):
            build("cxx", f"{source}.cpp", f"{source}_{isa}.o", f"-DSCOAT_ISA={isa} {ISA_FLAGS[isa]}")
    if amx:
        build("cxx", "amx.cpp", "amx.o", " ".join(AMX_FLAGS))
        build("cxx", "amx_bindings.cpp", "amx_bindings.o")
    link = ["-shared", "-fopenmp"] if openmp else ["-shared"]
    if platform.system() == "Darwin":
        link += ["-undefined", "dynamic_lookup"]
    if nvcc:
        options = " ".join(map(argument, nvcc_flags(compiler)))
        command = f"{argument(nvcc)} -MD -MF $out.d {options} $extra -I{argument(SOURCES)} -c $in -o $out"
        # ptxas only informs where it makes products wait for each other (C75xx, but for C7519, which is harmless)
        checked = (
            "2> $out.log; code=$$?; cat $out.log >&2; [ $$code = 0 ] && ! grep '(C75' $out.log | grep -qv '(C7519)'"
        )
        for rule, tail in (("nvcc", ""), ("nvcc_hopper", f" {checked}")):
            lines += [f"rule {rule}", f"  command = {command}{tail}", "  depfile = $out.d", "  deps = gcc"]
        for kind in ("BFloat", "E4M3", "Half") if hopper else ():  # the longest first
            build("nvcc_hopper", "hopper.cu", f"hopper_{kind}.o", " ".join([f"-DSCOAT_TYPE={kind}", *HOPPER_TARGETS]))
        if hopper:
            build("cxx", "hopper_bindings.cpp", "hopper_bindings.o")
        build("nvcc", "cuda.cu", "cuda.o", " ".join(cuda_targets()))
        home = Path(nvcc).resolve().parent.parent
        homes = [home, Path("/usr/local/cuda"), *(Path(os.environ[n]) for n in ("CUDA_HOME",) if n in os.environ)]
        folders = [h / lib for h in homes for lib in ("lib64", "lib", "targets/x86_64-linux/lib") if (h / lib).is_dir()]
        # static, so that no CUDA library must be found at run time and the driver alone decides what runs
        link += [f"-L{argument(path)}" for path in folders] + ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    lines += ["rule link", f"  command = $cxx $in {' '.join(link)} -o $out"]
    lines.append(f"build {escape(target)}: link {' '.join(objects)}")
    lines.append(f"default {escape(target)}")
    return "\n".join(lines) + "\n"


def argument(text: object) -> str:
    """For a command."""
    return shlex.quote(str(text)).replace("$", "$$")


def escape(path: object) -> str:
    """For the names of what is built."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildExtension(build_ext):
    """Hands the extension to ninja."""

    def run(self) -> None:
        report, compiler, nvcc = plan()
        target = Path(self.get_ext_fullpath("scoat_fast._C")).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if compiler is None:
            self.extensions = []  # nothing to copy
            target.unlink(missing_ok=True)  # of an earlier build
        else:
            (folder / "build.ninja").write_text(ninja_file(folder, target, compiler, nvcc, report))
            subprocess.run([*ninja(), "-C", str(folder)], check=True)
        (target.parent / "_build.json").write_text(json.dumps(report, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        target = Path(self.get_ext_fullpath("scoat_fast._C"))
        return [*([str(target)] if self.extensions else []), str(target.parent / "_build.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def ninja() -> list[str]:
    try:
        import ninja  # noqa: F401

        return [sys.executable, "-m", "ninja"]
    except ImportError:
        return ["ninja"]


setup(
    ext_modules=[Extension("scoat_fast._C", sources=[])],
    cmdclass={"build_ext": BuildExtension},
)
