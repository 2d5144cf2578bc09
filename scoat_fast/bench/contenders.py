"""The ways to run the network that ``bench model`` compares."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..engine.layout import FLOAT8, has_float8
from ..engine.runner import Engine
from ..engine.runner import compile as compile_network
from ..model import SCOATNet
from .eager import EagerSCOATNet

# of the largest logit, against float64: what rounding through about forty layers may make of the dtype's precision
BOUND = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, FLOAT8: 0.5}
TF32_BOUND = 1e-2
HALVES = (torch.bfloat16, torch.float16)

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to run the network. ``start`` takes the network and a batch [N, 1, H, W], and gives a call."""

    name: str
    dtype: torch.dtype
    start: Callable[[SCOATNet, Tensor], Call]
    tf32: bool = False
    in_torch: bool = True  # whether its memory is of PyTorch's allocator, which can tell the peak

    @property
    def bound(self) -> float:
        return TF32_BOUND if self.tf32 else BOUND[self.dtype]


def contenders(device: torch.device, compile: bool, autotune: bool = False) -> Iterator[Contender]:
    """What is compared on a device: the engine first, and last what takes minutes, left out without ``compile``."""
    single, half = torch.float32, torch.bfloat16
    contiguous, last = torch.contiguous_format, torch.channels_last
    for dtype, backends in engines(device).items():
        for backend in (*backends, *(() if dtype == FLOAT8 else ("reference",))):
            yield Contender(f"engine {backend} {str(dtype)[6:]}", dtype, _engine(backend, dtype))
    if autotune:
        yield Contender("engine triton bfloat16 autotuned", torch.bfloat16, _engine("triton", torch.bfloat16, True))
    yield Contender("eager float32", single, _stock(single, contiguous))
    yield Contender("eager float32 channels_last", single, _stock(single, last))
    yield Contender("SCOATNet float32", single, _ours(single, contiguous))
    yield Contender("SCOATNet float32 channels_last", single, _ours(single, last))
    if device.type == "cuda":
        yield Contender("eager TF32 channels_last", single, _stock(single, last), tf32=True)
        yield Contender("eager bfloat16 channels_last", half, _stock(half, last))
        yield Contender("SCOATNet bfloat16 channels_last", half, _ours(half, last))
        for mode in ("default", "max-autotune") if compile else ():  # the second records CUDA graphs, too
            yield Contender(f"compile {mode} bfloat16 channels_last", half, _stock(half, last, mode))
    else:
        if half in engines(device):
            yield Contender("eager bfloat16 channels_last", half, _stock(half, last))
        if all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
            yield Contender("ONNX Runtime float32", single, _onnx_runtime, in_torch=False)
        if compile:
            yield Contender("compile float32", single, _stock(single, contiguous, "default"))


def engines(device: torch.device) -> dict[torch.dtype, tuple[str, ...]]:
    """The engine's own backends that may run on a device, by dtype: what is for other processors is left out."""
    if device.type == "cpu":
        return {torch.float32: ("cpu",)} | ({torch.bfloat16: ("amx",)} if _has_amx(device) else {})
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    both = ("triton", "sm90a") if hopper else ("triton",)
    found = dict.fromkeys(HALVES, both) | {torch.float32: ("triton",)}
    return found | ({FLOAT8: both} if has_float8(device) else {})


def _has_amx(device: torch.device) -> bool:
    try:
        from ..engine import amx
    except ImportError:  # without the extension
        return False
    return amx.why_not(device, torch.bfloat16) is None


def baseline_of(net: SCOATNet) -> EagerSCOATNet:
    """The same network in stock PyTorch."""
    baseline = EagerSCOATNet(net.width).eval()
    baseline.load_state_dict(net.state_dict())
    return baseline


def engine_for(net: SCOATNet, x: Tensor, backend: str, dtype: torch.dtype, autotune: bool = False) -> Engine:
    """An engine that takes ``x`` at once, and is calibrated on some of it for float8."""
    options = {"batch_sizes": (len(x),), "size": x.shape[2:], "autotune": autotune}
    options |= {"calibration": x[:2]} if dtype == FLOAT8 else {}
    return compile_network(net, device=x.device, dtype=dtype, backend=backend, **options)


def _stock(dtype: torch.dtype, layout: torch.memory_format, mode: str | None = None):
    def start(net: SCOATNet, x: Tensor) -> Call:
        return _module(baseline_of(net), x, dtype, layout, mode)

    return start


def _ours(dtype: torch.dtype, layout: torch.memory_format):
    def start(net: SCOATNet, x: Tensor) -> Call:
        return _module(copy.deepcopy(net), x, dtype, layout, None)

    return start


def _module(net: nn.Module, x: Tensor, dtype: torch.dtype, layout: torch.memory_format, mode: str | None) -> Call:
    net = net.to(x.device, dtype, memory_format=layout)
    if mode is not None:
        torch._dynamo.reset()
        net = torch.compile(net, mode=mode, fullgraph=True, dynamic=False)
    given = x.to(dtype, memory_format=layout)
    return lambda: net(given)


def _engine(backend: str, dtype: torch.dtype, autotune: bool = False):
    def start(net: SCOATNet, x: Tensor) -> Call:
        return _Run(engine_for(net, x, backend, dtype, autotune), x)

    return start


@dataclass(frozen=True)
class _Run:
    """An engine on a batch: its logits, and its masks to check."""

    engine: Engine
    x: Tensor

    def __call__(self) -> Tensor:
        return self.engine(self.x)

    @property
    def held_bytes(self) -> int:
        """The features, which are there between calls, too."""
        return self.engine.memory_bytes

    def mask(self, threshold: float) -> Tensor:
        return self.engine.mask(self.x, threshold)


def _onnx_runtime(net: SCOATNet, x: Tensor) -> Call:
    """The published network, exported, with as many threads as torch has."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):  # it reports its progress
        model = torch.onnx.export(baseline_of(net), (x,), dynamo=True, verbose=False).model_proto
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])
