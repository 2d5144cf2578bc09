"""Slices of many cases through one engine: batches are filled across cases, and a GPU does not wait for the host."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..engine.runner import compile as compile_network
from ..engine.runner import is_out_of_memory
from ..errors import ScoatFastError
from ..imaging.grid import from_square, to_square
from ..imaging.window import Window
from ..model import SCOATNet

BATCH = {"cuda": 32, "cpu": 1}  # more slices at once are slower on a CPU: their features leave its caches


@dataclass
class Job:
    """Slices on their way through the network, and what it made of them.

    ``slices``: [N, H, W], HU as int16 or float32, or grey values in 0..1 where ``windowed``; spine down. ``spacing``:
    mm between rows and columns. ``threshold``: of the probability.

    ``mask``: [N, H, W], uint8. ``probabilities``: the same shape, float32 in 0..1, where they are kept. ``attention``:
    maps in 0..1 by name. ``error``: why there are none of these.
    """

    slices: np.ndarray
    spacing: tuple[float, float]
    threshold: float
    windowed: bool = False
    keeps_probabilities: bool = False
    about: object = None  # the caller's own
    mask: np.ndarray = field(init=False)
    probabilities: np.ndarray | None = field(init=False, default=None)
    attention: dict[str, np.ndarray] = field(init=False, default_factory=dict)
    error: Exception | None = field(init=False, default=None)
    answered: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.mask = np.empty(self.slices.shape, np.uint8)
        if self.keeps_probabilities:
            self.probabilities = np.empty(self.slices.shape, np.float32)

    @property
    def is_done(self) -> bool:
        return self.error is not None or self.answered == len(self.slices)


@dataclass(frozen=True)
class _Part:
    """Some slices of a job, in a batch."""

    job: Job
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def keep(self, found: dict[str, Tensor]) -> None:
        """Puts results in the host's memory where they belong."""
        job, place = self.job, slice(self.start, self.stop)
        if not found.pop("finite"):
            job.error = ScoatFastError("the network answered with NaN: its weights or this device are broken")
        job.mask[place] = found.pop("mask").numpy()
        if job.probabilities is not None:
            job.probabilities[place] = found.pop("probabilities").numpy()
        for name, maps in found.items():
            job.attention.setdefault(name, np.empty(job.slices.shape, np.float32))[place] = maps.numpy()
        job.answered += self.size


class Stream:
    """A network in an engine on a device, through which jobs go.

    Args:
        net: in float32, with the facts of its weights (``pretrained``).
        device: where it runs.
        batch_size: slices at once, None for what suits the device.
        dtype: of the engine, None for what suits the device.
    """

    def __init__(
        self,
        net: SCOATNet,
        device: torch.device,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.net, self.device, self.dtype = net.to(device), device, dtype
        self.batch_size = BATCH[device.type] if batch_size is None else batch_size
        self._size, self._window = net.pretrained.size, Window(*net.pretrained.window)
        self._make_engine()
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def run(
        self, jobs: Iterable[Job], attention: bool = False, progress: Callable[[int], object] = lambda slices: None
    ) -> Iterator[Job]:
        """Answers jobs in their order and yields each when it is done.

        A job that fails has its ``error`` and costs no other. When the GPU's memory runs out, batches are halved; when
        one slice is too much for it, the CPU goes on.

        Args:
            attention: also fill in ``Job.attention``.
            progress: called with the number of slices that were answered.
        """
        unfinished: deque[Job] = deque()
        parts: list[_Part] = []
        started: Callable[[], None] = _nothing

        def answer() -> None:
            """Starts on a batch, and then fetches what was started before it."""
            nonlocal started
            before, started = started, self._start(parts, attention)
            before()
            progress(_count(parts))
            parts.clear()

        for job in jobs:
            unfinished.append(job)
            start = 0
            while start < len(job.slices) and job.error is None:
                stop = min(start + self.batch_size - _count(parts), len(job.slices))
                parts.append(_Part(job, start, stop))
                start = stop
                if _count(parts) >= self.batch_size:
                    answer()
            while unfinished and unfinished[0].is_done:
                yield unfinished.popleft()
        answer()
        started()
        yield from unfinished

    def _start(self, parts: list[_Part], attention: bool) -> Callable[[], None]:
        """Starts a batch; the call that it gives waits for the results and puts them where they belong."""
        parts = [part for part in parts if part.job.error is None]
        jobs = {id(part.job): part.job for part in parts}.values()
        try:
            results, ready = self._results(parts, attention) if parts else ([], None)
        except Exception as error:  # it may be the fault of one of them
            if len(jobs) > 1:
                alone = [self._start([part for part in parts if part.job is job], attention) for job in jobs]
                return lambda: _call_all(alone)
            for job in jobs:
                job.error = error
            return _nothing

        def fetch() -> None:
            try:
                if ready is not None:
                    ready.synchronize()
                for part, found in zip(parts, results, strict=True):
                    part.keep(found)
            except Exception as error:  # a GPU tells late
                for job in jobs:
                    job.error = job.error or error

        return fetch

    def _results(self, parts: list[_Part], attention: bool) -> tuple[list[dict[str, Tensor]], torch.cuda.Event | None]:
        """What the network says about each part, and what to wait for before it is read."""
        while True:
            try:
                results = self._forward(parts, attention)
                ready = torch.cuda.Event() if self.device.type == "cuda" else None
                if ready is not None:
                    ready.record(torch.cuda.current_stream(self.device))
                return results, ready
            except RuntimeError as error:
                if not (is_out_of_memory(error) and self._can_shrink):
                    raise
            self._shrink()  # here, where the error no longer holds what was computed

    @torch.inference_mode()
    def _forward(self, parts: list[_Part], attention: bool) -> list[dict[str, Tensor]]:
        greys = torch.cat([self._squares(part) for part in parts]).expand(-1, self.net.in_channels, -1, -1)
        output = self.engine(greys, return_attention=attention)
        logits, maps = output if attention else (output, {})
        logits = logits[-1] if isinstance(logits, list) else logits
        # opacity of any kind, should a network tell several apart
        found = {"probabilities": _one_by_one(lambda x: x.sigmoid().amax(1, keepdim=True), logits)}
        for name, x in maps.items():
            found[name] = torch.nn.functional.interpolate(x, greys.shape[2:], mode="bilinear")
        results, start = [], 0
        for part in parts:
            job = part.job
            back = partial(from_square, shape=job.slices.shape[1:], spacing=job.spacing)
            native = {name: _one_by_one(back, x[start : start + part.size])[:, 0] for name, x in found.items()}
            start += part.size
            probabilities = native["probabilities"]
            native["finite"] = probabilities.isfinite().all()
            native["mask"] = (probabilities > job.threshold).to(torch.uint8)
            if not job.keeps_probabilities:
                del native["probabilities"]
            results.append({name: x.to("cpu", non_blocking=True) for name, x in native.items()})
        return results

    def _squares(self, part: _Part) -> Tensor:
        """Slices as the network wants them, [N, 1, size, size]."""
        job = part.job
        given = self._to_device(torch.from_numpy(job.slices[part.start : part.stop])[:, None]).float()
        greys = given if job.windowed else self._window.apply(given)
        return _one_by_one(partial(to_square, spacing=job.spacing, size=self._size), greys)

    def _to_device(self, given: Tensor) -> Tensor:
        """Slices on the device; to a GPU they travel while it computes on those before them."""
        if self.device.type != "cuda":
            return given
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copying):
            there = given.pin_memory().to(self.device, non_blocking=True)
        computing.wait_stream(self._copying)
        there.record_stream(computing)  # no later copy gets its memory before it was read
        return there

    @property
    def _can_shrink(self) -> bool:
        return self.batch_size > 1 or self.device.type == "cuda"

    def _shrink(self) -> None:
        """Takes smaller batches, or the CPU where one slice is too much for a GPU."""
        if self.batch_size > 1:
            self.batch_size //= 2
        else:
            warnings.warn(f"the memory of {self.device} is too small for one slice: the CPU goes on", stacklevel=2)
            self.device = torch.device("cpu")
            self.net = self.net.cpu()
        self.engine = None  # its memory is given back before more is asked for
        self._make_engine()

    def _make_engine(self) -> None:
        """An engine for whole batches, and for what is left at the end."""
        try:
            sizes = (self.batch_size, -(-self.batch_size // 4), 1)
            self.engine = compile_network(self.net, dtype=self.dtype, batch_sizes=sizes)
            return
        except RuntimeError as error:
            if not (is_out_of_memory(error) and self._can_shrink):
                raise
        self._shrink()


def _one_by_one(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of [N, C, H, W]; on a CPU of each slice alone, since there its bits depend on what is beside it."""
    return torch.cat([function(one) for one in x.split(1)]) if x.device.type == "cpu" and len(x) > 1 else function(x)


def _count(parts: list[_Part]) -> int:
    return sum(part.size for part in parts)


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _nothing() -> None:
    """What there is to fetch before the first batch."""
