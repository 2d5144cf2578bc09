"""A plan on a device, ready for batches."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import mmap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import ScoatFastError
from ..layers import pad_to_multiple
from ..model import ATTENTION_NODES, LEVELS, SCOATNet
from ..ops._backend import disabled, without_autocast
from . import plan as plans
from .calibrate import calibrate, rescale
from .layout import FLOAT8, lay_out, step_dtype, view_of
from .pack import pack
from .plan import Plan, Step
from .tune import Tiles, tune, using

ORDER = {"cuda": ("triton", "reference"), "cpu": ("cpu", "amx", "reference")}
BACKENDS = ("reference", "cpu", "amx", "triton", "sm90a")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, FLOAT8)
# Made anew by a compiler on every machine: an engine that chooses one of these by itself checks it first.
CHECKED = ("triton",)
# of the largest logit: further off than rounding takes two backends from each other (TF32 in stock convolutions, too)
BOUND = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.1, FLOAT8: 0.5}
# what the libraries say that do not raise torch.OutOfMemoryError: CUDA, its driver, Triton; cuBLAS and cuDNN
NO_MEMORY = ("out of memory", "out_of_memory", "alloc_failed")
MASK_DICE = 0.99  # of two kernels for the same numbers
READY = 64  # other batches than an engine is made for that stay prepared, those used last: on a GPU each has a graph
BATCH_SIZES = {"cuda": (1, 8, 32), "cpu": (1,)}  # a CPU is not faster with more slices at once: they leave its caches
SIZE = 512
FACTOR = 2 ** (LEVELS - 1)  # height and width of a plan are multiples of this


class BackendRefused(RuntimeError):
    """The backend that was asked for cannot run here; ``reasons`` says why, by backend."""

    def __init__(self, reasons: dict[str, str]):
        self.reasons = reasons
        super().__init__(f"engine: {'; '.join(f'{name} {reason}' for name, reason in reasons.items())}")


@dataclass(frozen=True)
class EngineParity:
    """How far an engine is from its network on a batch.

    ``error`` is the largest difference of two logits, ``relative`` that as a share of the network's largest logit, and
    ``dice`` the overlap of the two masks: 1 where they are equal, as two empty ones are.
    """

    error: float
    relative: float
    dice: float


def compile(
    net: SCOATNet,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    batch_sizes: Sequence[int] | None = None,
    size: int | tuple[int, int] | None = None,
    calibration: Tensor | None = None,
    autotune: bool = False,
) -> Engine:
    """Turns a trained network into its fastest forward pass. The network stays as it is.

    Args:
        net: in evaluation mode or not: the engine computes what evaluation mode gives. Hooks on it do not run.
        device: where the engine runs; the network's own by default.
        dtype: float64, float32, float16, bfloat16 or float8_e4m3fn; by default bfloat16 on GPUs that have it (float16
            on older ones), float32 elsewhere. All sums are in float32, or float64; of float8 in what tensor cores have
            for it, which on Hopper is less; "sm90a" rounds what each tap of the last head gives before it adds nine of
            them. With float8 the input, the last features and the attention maps are bfloat16.
        backend: "triton" or "sm90a" on a GPU, "cpu" (float32) or "amx" (bfloat16) on a CPU, or "reference"; by default
            the fastest that runs here, and on a GPU only after its logits for one slice were found near those of
            "reference". "sm90a", whose convolutions are of Hopper alone, runs where it is asked for: it has not been
            measured yet.
        batch_sizes: how many slices run at once. A batch of another size is cut into these, with little padding.
            By default 1, 8 and 32 on a GPU, 1 on a CPU.
        size: height and width for which everything is prepared, so that the first batch is fast; by default what the
            weights were trained on, or 512. Other sizes are prepared when they first come.
        calibration: for float8 only, and needed there: real slices [N, in_channels, H, W] as the network takes them,
            from which the scales of features are taken, and on which the Dice against bfloat16 is measured that
            ``print(engine)`` shows.
        autotune: for the Triton backend only: measure on this GPU which tiles are fastest for the largest batch at
            ``size``, instead of taking them from the table that ships. Takes minutes, once for each network form,
            size and dtype: what was found is kept in the user's cache, which only engines with this option read.

    Raises:
        BackendRefused: a RuntimeError, if the backend that was asked for cannot run here: with the reason.
        ValueError: for an argument out of its range, or a network with another forward pass or other layers than
            SCOATNet's.
        WeightsError: if the network's weights are not finite.
    """
    device = _indexed(torch.device(device) if device is not None else next(net.parameters()).device)
    if dtype is None:
        dtype = torch.float32
        if device.type == "cuda":
            dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if dtype not in DTYPES:
        raise ValueError(f"the dtype must be one of {', '.join(str(d)[6:] for d in DTYPES)}, got {dtype}")
    batch_sizes = BATCH_SIZES.get(device.type, (1,)) if batch_sizes is None else batch_sizes
    if not isinstance(batch_sizes, Sequence) or not batch_sizes or not all(map(_is_count, batch_sizes)):
        raise ValueError(f"batch sizes from 1 on are wanted, got {batch_sizes}")
    size = getattr(getattr(net, "pretrained", None), "size", SIZE) if size is None else size
    shape = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(shape) != 2 or not all(map(_is_count, shape)):
        raise ValueError(f"a height and width from 1 on are wanted, got {size}")
    if "meta" in {device.type, *(x.device.type for x in net.state_dict().values())}:
        raise ValueError("a device and weights that hold numbers are wanted, got the meta device")
    if (dtype == FLOAT8) != (calibration is not None):
        raise ValueError(f"calibration slices are wanted for float8_e4m3fn and for nothing else, got {dtype}")
    if calibration is not None and not len(calibration):
        raise ValueError("at least one calibration slice is wanted, got none")
    options = (tuple(map(int, batch_sizes)), tuple(map(int, shape)), calibration, autotune)
    engine = Engine(net, device, dtype, backend, *options)
    if backend is not None or engine.backend == "reference":
        engine.get_ready()
        return engine
    reason = _why_failed(engine)
    if reason is None and engine.backend in CHECKED:
        reason = _why_wrong(engine, Engine(net, device, dtype, "reference", (1,), *options[1:3]))
    if reason is None:
        return engine
    warnings.warn(f"engine: {engine.backend} {reason}; stock PyTorch runs instead", stacklevel=2)
    refusals = engine.refusals | {engine.backend: reason}
    del engine  # its memory is given back before more is asked for
    engine = Engine(net, device, dtype, "reference", *options[:3])
    engine.refusals = refusals
    engine.get_ready()
    return engine


def _why_failed(engine: Engine) -> str | None:
    """Why an engine does not get ready, or None where it does. Too little memory is no fault of a backend's."""
    try:
        engine.get_ready()
    except ScoatFastError:
        raise
    except Exception as error:  # of a compiler or a driver, of any type
        if is_out_of_memory(error):
            raise
        return f"cannot run here: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether a library says so, by its type or in its words."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error).lower() for sign in NO_MEMORY)


def _why_wrong(engine: Engine, stock: Engine) -> str | None:
    """What is wrong with an engine's results, or None where they are near those of stock PyTorch.

    Every batch size is seen in all of its slices: its logits, and its masks against its own logits.
    """
    most = engine.batch_sizes[-1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(most, engine.in_channels, *engine.size, generator=generator, device="cpu").to(engine.device)
    expected = torch.stack(tree_leaves(stock(noise)))
    threshold = expected[-1].float().sigmoid().median().clamp(0.01, 0.99).item()  # about half of a mask
    for n in engine.batch_sizes:
        ours = torch.stack(tree_leaves(engine(noise[:n])))
        error = _share((ours - expected[:, :n]).abs().max().item(), expected.abs().max().item())
        if not error <= BOUND[engine.dtype]:
            return f"gives logits that are {error:.1e} of the largest away from stock PyTorch's on this machine"
        overlap = dice(engine.mask(noise[:n], threshold).bool(), ours[-1] > math.log(threshold / (1 - threshold)))
        if not overlap >= MASK_DICE:
            return f"gives masks whose Dice with its own logits is {overlap:.3f} on this machine"
    return None


class Engine:
    """A trained network as its fastest forward pass; see ``scoat_fast.compile``, which makes one.

    An engine holds its own copy of the weights, and memory that all its calls use: several threads may call it, on any
    CUDA streams; one after the other is served. It stays in its process: it can be neither copied nor pickled.
    """

    def __init__(
        self,
        net: SCOATNet,
        device: torch.device,
        dtype: torch.dtype,
        backend: str | None,
        batch_sizes: Sequence[int],
        size: tuple[int, int],
        calibration: Tensor | None = None,
        autotune: bool = False,
    ):
        weights = pack(net)
        self.net, self.device, self.dtype, self.batch_sizes = net, device, dtype, tuple(sorted(set(batch_sizes)))
        self.size, self.in_channels = size, net.in_channels
        self.backend, self._module, self.refusals = _choose(backend, device, dtype)
        keys = ((False, False), (False, True), (True, False))
        fuses = functools.partial(self._module.fuses, dtype=dtype)
        self._plans = {key: plans.build(net, *key, fuses) for key in keys}
        if calibration is not None:
            self._check(calibration := calibration.to(device))
            given = pad_to_multiple(calibration.float(), FACTOR)
            with without_autocast(device.type):
                weights = rescale(self.plan, weights, calibrate(self.plan, weights, given))
        dtypes = {step: step_dtype(plan, step, dtype) for plan in self._plans.values() for step in plan.steps}
        self._packed = {step: self._module.prepare(step, weights, device, kind) for step, kind in dtypes.items()}
        if autotune and self.backend != "triton":
            raise ValueError(f"only the triton backend has tiles to tune, and here runs {self.backend}")
        self._autotune, self._tiles = autotune, Tiles()
        self._listed = net.deep_supervision
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._ready: dict[tuple, _Prepared] = {}
        self._lock = threading.Lock()
        on_gpu = device.type == "cuda"
        self._last = torch.cuda.Event() if on_gpu else None  # of the run before
        # Its graphs run one after the other, and leave their results in the memory above: they share one pool.
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._calibration, self.calibration_dice = calibration, None

    def get_ready(self) -> None:
        """Compiles and records everything for the engine's size, so that the first batch is fast."""
        if self._autotune:
            n = self.batch_sizes[-1]
            self._tiles = tune(self.plan, self._packed, n, *self.padded_size, self.device, self.dtype)
        with self._in_turn():
            for _ in range(2):  # what outgrew the memory of those before it made them forget: at the end all are ready
                for n in reversed(self.batch_sizes):
                    for key in ((False, False), (True, False)):
                        self._prepare(n, *self.padded_size, *key)
        if self._calibration is not None:
            self.calibration_dice = self._calibration_dice(self._calibration)
            self._calibration = None  # it is no longer needed

    @property
    def plan(self) -> Plan:
        """The steps to the logits."""
        return self._plans[False, False]

    @property
    def padded_size(self) -> tuple[int, int]:
        """The height and width that everything is prepared for, as multiples of 16."""
        return _padded(*self.size)

    @property
    def memory_bytes(self) -> int:
        """What all buffers together take."""
        return self._memory.numel()

    def __call__(
        self, batch: Tensor, return_attention: bool = False
    ) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], dict[str, Tensor]]:
        """What the network gives for a batch, within the rounding of the engine's dtype.

        Args:
            batch: [N, in_channels, H, W] on the engine's device, of any float dtype, H and W from 1.
            return_attention: also return the six attention maps.

        Returns:
            As ``SCOATNet.forward``; float32, float64 from an engine of float64.
        """
        found = self._run(batch, mask=False, attention=return_attention)
        heads = len(found) - (len(ATTENTION_NODES) if return_attention else 0)
        height, width = batch.shape[2:]
        logits = [x[:, :, :height, :width].contiguous() for x in found[:heads]]
        output = logits if self._listed else logits[-1]
        if not return_attention:
            return output
        maps = {}
        for (i, j), x in zip(ATTENTION_NODES, found[heads:], strict=True):
            maps[f"x{i}{j}"] = x[:, None, : -(-height // 2**i), : -(-width // 2**i)].to(logits[-1].dtype).contiguous()
        return output, maps

    def mask(self, batch: Tensor, threshold: float = 0.5) -> Tensor:
        """Where the probability of each class exceeds ``threshold``: uint8, 0 or 1, [N, out_channels, H, W]."""
        if not 0 < threshold < 1:
            raise ValueError(f"the threshold must lie between 0 and 1, got {threshold}")
        (found,) = self._run(batch, mask=True, threshold=math.log(threshold / (1 - threshold)))
        return found[:, :, : batch.shape[2], : batch.shape[3]].contiguous()

    def kernel(self, step: Step) -> str:
        """What runs a step at the engine's size, for people to read."""
        with using(self._tiles):
            kind = step_dtype(self.plan, step, self.dtype)
            return self._module.kernel(step, self.padded_size[1] >> step.level, self.device, kind)

    def calls(self, n: int) -> list[tuple[Step, Callable[[], None]]]:
        """The steps for ``n`` slices, each with what runs it alone on what the buffers hold: to time them."""
        with without_autocast(self.device.type):
            prepared = self._prepare(n, *self.padded_size, False, False)
        return list(zip(self.plan.steps, prepared.calls, strict=True))

    @torch.no_grad()
    def parity(self, batch: Tensor, threshold: float = 0.5) -> EngineParity:
        """Compares with the network as it is now, on a batch of at least one slice as the network takes it."""
        if not len(batch):
            raise ValueError("at least one slice is wanted to compare on, got none")
        parameter = next(self.net.parameters())
        modes = {module: module.training for module in self.net.modules()}
        try:
            with without_autocast(parameter.device.type):
                exact = self.net.eval()(batch.to(parameter.device, parameter.dtype))
        finally:
            for module, training in modes.items():
                module.training = training
        exact = (exact[-1] if isinstance(exact, list) else exact).to(self.device, torch.float64)
        batch = batch.to(self.device)
        ours = self(batch)
        error = ((ours[-1] if isinstance(ours, list) else ours).double() - exact).abs().max().item()
        mask, wanted = self.mask(batch, threshold).bool(), exact > math.log(threshold / (1 - threshold))
        return EngineParity(error, _share(error, exact.abs().max().item()), dice(mask, wanted))

    def _calibration_dice(self, batch: Tensor) -> float:
        """The Dice of the masks of this engine and one of bfloat16."""
        wide = Engine(self.net, self.device, torch.bfloat16, self.backend, self.batch_sizes, self.size)
        return dice(self.mask(batch).bool(), wide.mask(batch).bool())

    @torch.no_grad()
    def _run(self, batch: Tensor, mask: bool, attention: bool = False, threshold: float = 0.0) -> list[Tensor]:
        """The plan's outputs for a batch of any size, [N, ...] at the padded size."""
        self._check(batch)
        done: list[list[Tensor]] = []
        with self._in_turn():
            start = 0
            while start < len(batch) or not done:
                n = next_size(len(batch) - start, self.batch_sizes)
                given = pad_to_multiple(batch[start : start + n], FACTOR)
                prepared = self._prepare(n, *given.shape[2:], mask, attention)
                done.append([x[: len(given)].clone() for x in prepared(given, threshold)])
                start += n
        return done[0] if len(done) == 1 else [torch.cat(parts) for parts in zip(*done, strict=True)]

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Within, the memory is this thread's alone, and on a GPU this thread's current stream's; without autocast."""
        with self._lock, without_autocast(self.device.type):
            if self._last is None:
                yield
                return
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._last)
            try:
                yield
            finally:
                self._last.record(stream)

    def _check(self, batch: Tensor) -> None:
        if not isinstance(batch, Tensor):
            raise ValueError(f"the engine wants a tensor, got {type(batch).__name__}")
        if batch.ndim != 4 or batch.shape[1] != self.in_channels or 0 in batch.shape[2:]:
            raise ValueError(f"the engine wants [N, {self.in_channels}, H, W], got {tuple(batch.shape)}")
        if batch.device != self.device:
            raise ValueError(f"the engine is on {self.device}, the batch on {batch.device}")
        if not batch.is_floating_point():
            raise ValueError(f"the engine wants floating-point numbers, got {batch.dtype}")

    def _prepare(self, n: int, height: int, width: int, mask: bool, attention: bool) -> _Prepared:
        key = (n, height, width, mask, attention)
        found = self._ready.pop(key, None)
        if found is None:
            with using(self._tiles), torch.inference_mode(False):  # who calls first may be in it, and others not
                found = self._bound(self._plans[mask, attention], n, height, width)
        self._ready[key] = found  # as the last one that was used
        return found

    def _bound(self, plan: Plan, n: int, height: int, width: int) -> _Prepared:
        layout = lay_out(plan, self._module, n, height, width, self.device, self.dtype)
        larger = layout.bytes > self._memory.numel()
        full = len(self._ready) >= READY + 2 * len(self.batch_sizes)  # for those, logits and masks
        if self.device.type == "cuda" and (larger or full):
            torch.cuda.synchronize(self.device)  # another stream than the current one may still be at work there
        if full:
            del self._ready[next(iter(self._ready))]
        if larger:
            self._ready.clear()  # what they hold is given back before more is asked for
            self._memory = torch.empty(0, dtype=torch.uint8, device=self.device)
            self._memory = _zeros(layout.bytes, self.device)
        calls = []
        tensors = layout.tensors(self._memory)
        view = view_of(plan, tensors)
        for step in plan.steps:
            pixels = (height >> step.level) * (width >> step.level)
            calls.append(self._module.bind(step, self._packed[step], view, pixels))
        return _Prepared(tensors, calls, plan, self._pool)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an engine cannot be copied or pickled, its network can: compile that again where it is wanted")

    def __str__(self) -> str:
        from .describe import describe

        return describe(self)


class _Prepared:
    """A plan bound to memory; on a GPU, as a CUDA graph."""

    def __init__(self, tensors: dict[str, Tensor], calls: list[Callable[[], None]], plan: Plan, pool: tuple | None):
        self.calls, self._input, self._threshold = calls, tensors["input"], tensors.get("threshold")
        self._outputs = [tensors[name] for name in plan.outputs]
        self._graph = None
        if self._input.is_cuda:
            self._capture(pool)

    def __call__(self, given: Tensor, threshold: float) -> list[Tensor]:
        self._input[: len(given)].copy_(given.permute(0, 2, 3, 1))
        if self._threshold is not None:
            self._threshold.fill_(threshold)
        if self._graph is None:
            self._go()
        else:
            self._graph.replay()
        return self._outputs

    def _go(self) -> None:
        for call in self.calls:
            call()

    def _capture(self, pool: tuple) -> None:
        """Runs once, so that kernels are compiled, and then records; other threads may use their GPUs meanwhile."""
        device = self._input.device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), torch.no_grad():
                self._go()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # on this stream: the one that torch takes by itself stays on the GPU of the first capture
            with torch.cuda.graph(self._graph, pool, stream, "thread_local"), torch.no_grad():
                self._go()


def _choose(wanted: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, ModuleType, dict[str, str]]:
    """The backend that runs here, and the reasons against those before it. One that is asked for must run."""
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(f"the backend must be one of {BACKENDS}, got {wanted!r}")
    refusals: dict[str, str] = {}
    for name in ORDER.get(device.type, ("reference",)) if wanted is None else (wanted,):
        reason = disabled("engine", name)
        if reason is None:
            try:
                module = importlib.import_module(f"{__package__}.{name}")
                reason = module.why_not(device, dtype)
            except ImportError as error:
                reason = f"cannot be loaded: {error}"
        if reason is None:
            return name, module, refusals
        refusals[name] = reason
    raise BackendRefused(refusals)


@functools.cache
def next_size(left: int, sizes: tuple[int, ...]) -> int:
    """The size of the batch to run first where ``left`` slices remain: the largest if full, then the cheapest cover.

    A batch costs as much as its slices, padding included, and one more for its launches: 9 slices run as 8 and 1 and
    not as 32, but 31 as 32.
    """
    if left >= sizes[-1]:
        return sizes[-1]
    covers: list[tuple[int, ...]] = [()]  # of 0, 1, 2, ... slices
    for count in range(1, left + 1):
        found = ((size, *covers[max(count - size, 0)]) for size in sizes)
        covers.append(min(found, key=lambda cover: (sum(cover) + len(cover), len(cover))))
    return max(covers[left], default=sizes[0])  # padding at the end; an empty batch gives shapes


def dice(a: Tensor, b: Tensor) -> float:
    """The overlap of two masks of bool: 1 where both are empty."""
    both = int(a.sum() + b.sum())
    return 2 * int((a & b).sum()) / both if both else 1.0


def _zeros(size: int, device: torch.device) -> Tensor:
    """Memory of a device; of a CPU in large pages where the system has some, since rows of tiles lie in many pages."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _share(error: float, largest: float) -> float:
    """Of what may be zero throughout."""
    return error / largest if largest else math.inf if error else 0.0


def _indexed(device: torch.device) -> torch.device:
    """A device as tensors name it: CUDA has a number there."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _is_count(number: object) -> bool:
    return isinstance(number, Integral) and number >= 1


def _padded(height: int, width: int) -> tuple[int, int]:
    return -(-height // FACTOR) * FACTOR, -(-width // FACTOR) * FACTOR
