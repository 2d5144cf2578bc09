"""``scoat-fast doctor``: what this machine has, which kernels run here, and whether they compute what they should."""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib import resources
from pathlib import Path

import torch

from . import __version__, ops, winograd
from .engine import runner
from .errors import ScoatFastError
from .files import check_output, make_folder, write_text
from .info import version_of
from .model import SCOATNet
from .ops import _verdict, parity
from .ops._backend import IMPLEMENTATIONS, ORDER, why_not

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = tuple(name for name in IMPLEMENTATIONS if name != "reference")
BACKENDS = tuple(name for name in runner.BACKENDS if name != "reference")
ENGINE_SLACK = 4.0  # times the error of stock torch through the whole network, in the same dtype


@dataclasses.dataclass(frozen=True)
class Finding:
    """One implementation of one operation in one dtype, or one backend of the engine.

    ``reason`` says why it does not run, or what went wrong.
    """

    operation: str
    implementation: str
    dtype: str
    status: str  # "ok", "out of bounds", "broken" or "not here"
    error: float | None = None  # the largest against float64, of outputs and gradients; None where it did not run
    bound: float | None = None
    reason: str = ""


def diagnose(device: str) -> list[Finding]:
    """Compares every implementation and backend that runs on ``device`` ("cpu" or "cuda") with float64."""
    with _verdict.suspended():
        found = [
            _examine(op, implementation, dtype, device)
            for op in ops.ALL
            for implementation in KERNELS
            for dtype in DTYPES
        ]
        found.append(_examine_convolution(device))
        return found + [_examine_engine(backend, dtype, device) for backend in BACKENDS for dtype in DTYPES]


def _examine(op: ops.Operation, implementation: str, dtype: torch.dtype, device: str) -> Finding:
    what = (op.name, implementation, str(dtype).removeprefix("torch."))
    if implementation not in ORDER[device]:
        return Finding(*what, "not here", reason=f"does not run on {device} tensors")
    worst = parity.Parity(0.0, 0.0, 0.0)
    for sample in op.samples("awkward", dtype, device):
        refusal = why_not(op.name, implementation, *sample.args)
        if refusal is not None:
            return Finding(*what, "not here", reason=refusal)
        try:
            found = parity.measure(op, implementation, sample)
        except Exception as error:  # whatever a driver or compiler raises: the doctor reports it and goes on
            return Finding(*what, "broken", reason=f"{sample.name}: {type(error).__name__}: {error}".splitlines()[0])
        for one in found:
            if not one.holds:
                return Finding(*what, "out of bounds", one.error, one.bound, f"at {sample.name}")
            worst = max(worst, one, key=lambda p: p.error)
    return Finding(*what, "ok", worst.error, worst.bound)


def _examine_convolution(device: str) -> Finding:
    """Of the gradient of the weights of a 3x3 convolution, for which there is a kernel on a CPU in float32 alone."""
    what = ("convolution", "cpu", "float32")
    if device != "cpu":
        return Finding(*what, "not here", reason=f"does not run on {device} tensors")
    generator = torch.Generator().manual_seed(0)
    x, dy = (
        torch.randn(2, channels, 37, 45, generator=generator).contiguous(memory_format=torch.channels_last)
        for channels in (19, 21)
    )
    with torch.no_grad():
        if (refusal := winograd.why_not(x)) is not None:
            return Finding(*what, "not here", reason=refusal)
        exact = torch.nn.grad.conv2d_weight(x.double(), (21, 19, 3, 3), dy.double(), padding=1)
        try:
            found = winograd.weight_gradient(dy, x).double()
        except Exception as error:  # as above
            return Finding(*what, "broken", reason=f"{type(error).__name__}: {error}".splitlines()[0])
    errors, bounds = (found - exact).abs().amax((2, 3), keepdim=True), winograd.rounding(dy, x)
    error, bound = errors.max().item(), bounds.max().item()
    if not (errors <= bounds).all():
        return Finding(*what, "out of bounds", error, bound, "in the gradient of its weights")
    return Finding(*what, "ok", error, bound)


def _examine_engine(backend: str, dtype: torch.dtype, device: str) -> Finding:
    what = ("engine", backend, str(dtype).removeprefix("torch."))
    if backend not in runner.ORDER[device]:
        return Finding(*what, "not here", reason=f"does not run on {device} tensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, x = SCOATNet(width=16).eval(), torch.rand(2, 1, 80, 112)
    x = x.to(device)

    def logits(backend: str, dtype: torch.dtype) -> torch.Tensor:
        return runner.compile(net, device=device, dtype=dtype, backend=backend, batch_sizes=(2,), size=(80, 112))(x)

    exact = logits("reference", torch.float64)
    stock = (logits("reference", dtype).double() - exact).abs().max().item()
    bound = ENGINE_SLACK * stock + parity.FLOOR * exact.abs().max().item()
    try:
        error = (logits(backend, dtype).double() - exact).abs().max().item()
    except runner.BackendRefused as refusal:
        return Finding(*what, "not here", reason=refusal.reasons[backend])
    except Exception as error:  # as above
        return Finding(*what, "broken", reason=f"{type(error).__name__}: {error}".splitlines()[0])
    if not error <= bound:
        return Finding(*what, "out of bounds", error, bound, "in its logits")
    return Finding(*what, "ok", error, bound)


def judge(findings: list[Finding], device: str) -> dict[str, str]:
    """Switches off on this machine what is out of bounds or broken, and on again what is not; returns the former.

    Raises OutputError if the verdict cannot be written.
    """
    off: dict[str, str] = {}
    for f in findings:
        if f.status in ("out of bounds", "broken"):
            why = f"is switched off by scoat-fast doctor: {f.status} in {f.dtype}, {f.reason}"
            off.setdefault(f"{f.operation}.{f.implementation}", why)
    try:
        verdicts = _verdict.read()
    except ScoatFastError:  # a damaged file is written anew
        verdicts = {"damaged": {}}
    machine = _verdict.machine(device)
    if verdicts.get(machine, {}) != off or "damaged" in verdicts:
        verdicts[machine] = off
        make_folder(_verdict.path().parent)
        write_text(_verdict.path(), json.dumps({m: v for m, v in verdicts.items() if v}, indent=2) + "\n")
        _verdict.forget()
    return off


def machine_facts(device: str) -> dict[str, object]:
    """What the numbers depend on: hardware, driver, versions, and what the package was built with."""
    build = json.loads(resources.files(__package__).joinpath("_build.json").read_text()) if _built() else {}
    facts: dict[str, object] = {
        "gpu": None,
        "driver": None,
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "versions": {
            "scoat_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda,
            "triton": version_of("triton"),
        },
        "build": build or {"why_no_extension": "this copy was never built", "why_no_cuda": "this copy was never built"},
    }
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        facts["gpu"] = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
        facts["driver"] = driver_version()
    return facts


def _built() -> bool:
    return resources.files(__package__).joinpath("_build.json").is_file()


def driver_version() -> str | None:
    """The version of the NVIDIA driver, as the kernel tells it; None where it does not."""
    file = Path("/sys/module/nvidia/version")
    return file.read_text().strip() if file.is_file() else None


def run(device: str, json_file: Path | None, quiet: bool = False) -> bool:
    """Examines, prints and judges; true if every kernel that runs here is within its bounds."""
    if json_file is not None:
        check_output(json_file)
    facts, findings = machine_facts(device), diagnose(device)
    off = judge(findings, device)
    if json_file is not None:
        found = [dataclasses.asdict(finding) for finding in findings]
        certificate = {**facts, "machine": _verdict.machine(device), "findings": found, "switched_off": off}
        write_text(json_file, json.dumps(certificate, indent=2) + "\n")
    if not quiet:
        print(report(facts, findings, device))
    for name, reason in off.items():
        print(f"{name} {reason}")
    return not off


def report(facts: dict, findings: list[Finding], device: str) -> str:
    """The page that the command prints."""
    build, versions = facts["build"], {name: version for name, version in facts["versions"].items() if version}
    lines = [
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"GPU   {facts['gpu'] or 'none'}" + (f", driver {facts['driver']}" if facts["driver"] else ""),
        f"CPU   {facts['cpu']}",
        f"C++   {build.get('extension') or 'not built: ' + build['why_no_extension']}",
        f"CUDA  {build.get('cuda') or 'not built: ' + build['why_no_cuda']}"
        + ("" if build.get("hopper") or not build.get("cuda") else ", without the code for Hopper: nvcc is too old"),
        "",
        f"{'operation':17}{'kernels':10}{'float32':>10}{'float16':>10}{'bfloat16':>10}   largest error against float64",
    ]
    for operation in dict.fromkeys(f.operation for f in findings):
        found: dict[str, list[Finding]] = {}
        for f in findings:
            if f.operation == operation:
                found.setdefault(f.implementation, []).append(f)
        order = runner.ORDER if operation == "engine" else ORDER
        well = [name for name in order[device] if any(f.status == "ok" for f in found.get(name, []))]
        for name, rows in found.items():
            cells = "".join(f"{'-' if f.error is None else format(f.error, '.1e'):>10}" for f in rows)
            reasons = sorted({f"{f.status}: {f.reason}" for f in rows if f.status != "ok"})
            runs = ["runs here" if well[:1] == [name] else "ok"] if name in well else []
            lines.append(f"{operation:17}{name:10}{cells}   {'; '.join([*runs, *reasons])}")
        lines.append(f"{operation:17}{'reference':40}   {'for the rest' if well else 'runs here'}: stock PyTorch")
    return "\n".join(lines)
