"""Single steps of a plan: run by a backend on what a float64 run of the plan left in its buffers, or in place."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoat_fast import SCOATNet
from scoat_fast.engine import pack, plan, reference
from scoat_fast.engine.layout import dtype_of, lay_out, step_dtype, view_of
from scoat_fast.engine.runner import Engine


def trained(**form) -> SCOATNet:
    """A network whose BatchNorm layers have something to fold."""
    torch.manual_seed(3)
    net = SCOATNet(**form).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.bias.data.normal_(0, 0.1)
    return net


@dataclass
class Outcome:
    """What a step wrote into one slice: in the backend, in stock torch in the same dtype, and in float64."""

    step: plan.Step
    slice: plan.Slice
    ours: Tensor
    stock: Tensor
    exact: Tensor

    @property
    def errors(self) -> tuple[float, float, float]:
        """Of the backend and of stock torch; and the largest exact value."""
        ours, stock = ((x.double() - self.exact).abs().max().item() for x in (self.ours, self.stock))
        return ours, stock, self.exact.abs().max().item()


def run_steps(
    net: SCOATNet,
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    wanted: Callable[[plan.Step], bool] = lambda step: True,
    device: str = "cpu",
    rounded: bool = False,
    **options,
) -> list[Outcome]:
    """Runs every wanted step of a network's plan by itself, for ``shape`` [N, H, W], in memory full of NaN.

    With ``rounded``, weights and what a step reads are numbers of ``dtype`` in float64, too: what is exact, then, is
    what the step makes of what it is given.
    """
    module = importlib.import_module(f"scoat_fast.engine.{backend}")
    whole, weights = plan.build(net, **options), pack.pack(net)
    if rounded:
        weights = {name: (weight.to(dtype).double(), bias) for name, (weight, bias) in weights.items()}
    torch.manual_seed(5)
    exact = _allocate(whole, reference, shape, torch.float64, device)
    exact["input"].uniform_()
    if "threshold" in exact:
        exact["threshold"].fill_(0.1)
    outcomes = []
    for step in whole.steps:
        results = {}
        for used in plan.reads(step) if rounded else ():
            given = view_of(whole, exact)(used)
            given.copy_(given.to(dtype_of(whole.buffers[used.buffer].kind, dtype)))
        before = {name: x.clone() for name, x in exact.items()}
        for name, runner in (("ours", module), ("stock", reference)) if wanted(step) else ():
            tensors = _allocate(whole, runner, shape, dtype, device)
            for used in plan.reads(step):
                _put(view_of(whole, tensors)(used), view_of(whole, before)(used))
            results[name] = _run(runner, step, whole, weights, tensors, shape, dtype)
        results["exact"] = _run(reference, step, whole, weights, exact, shape, torch.float64)
        for used in plan.writes(step) if wanted(step) else ():
            found = {name: view_of(whole, tensors)(used) for name, tensors in results.items()}
            if whole.buffers[used.buffer].kind == "sums":  # their parts are a backend's own
                found = {name: x.double().sum(1) for name, x in found.items()}
            exactly = found["exact"].clone()  # later steps write there, too
            outcomes.append(Outcome(step, used, found["ours"], found["stock"], exactly))
    return outcomes


def run_in_place(engine: Engine, net: SCOATNet) -> Iterator[Outcome]:
    """Runs the steps of an engine of float32 for one slice at its own size, in its own memory, one after the other.

    What a step wrote is held against what stock torch makes of its inputs. Of large 3x3 convolutions that is done in
    three stripes of rows: at the upper end, in the middle and at the lower end.
    """
    whole, weights, device = engine.plan, pack.pack(net), engine.device
    layout = lay_out(whole, engine._module, 1, *engine.padded_size, device, torch.float32)
    calls, view = engine.calls(1), view_of(whole, layout.tensors(engine._memory))
    view(plan.Slice("input", 0, net.in_channels)).uniform_()

    def rows(used: plan.Slice, first: int, last: int, level: int) -> Tensor:
        buffer = whole.buffers[used.buffer]
        if buffer.kind in ("scale", "sums"):
            return view(used)
        first, last = (number * 2**level >> buffer.level for number in (first, last))
        return view(used)[:, :, first:last] if buffer.kind == "logits" else view(used)[:, first:last]

    for step, call in calls:
        height, width = (size >> step.level for size in engine.padded_size)
        middle = height // 4 * 2
        stripes = [(0, 4), (middle, middle + 4), (height - 4, height)]
        if not isinstance(step, plan.Convolve | plan.Head) or height < 16:
            stripes = [(0, height)]
        around = [(max(first - 2, 0), min(last + 2, height)) for first, last in stripes]  # pools begin at even rows
        given = [{used: rows(used, *ends, step.level).clone() for used in plan.reads(step)} for ends in around]
        call()
        for inputs, ends, (first, last) in zip(given, around, stripes, strict=True):
            results = {"ours": {used: rows(used, *ends, step.level) for used in plan.writes(step)}}
            for name, dtype in (("stock", torch.float32), ("exact", torch.float64)):
                results[name] = {used: torch.empty_like(x, dtype=dtype) for used, x in results["ours"].items()}
                results[name] |= {used: x.to(dtype, copy=True) for used, x in inputs.items()}  # some are written, too
                ready = reference.prepare(step, weights, device, dtype)
                with torch.no_grad():
                    reference.bind(step, ready, results[name].__getitem__, height * width)()
            for used in plan.writes(step):
                kind, found = whole.buffers[used.buffer].kind, [result[used] for result in results.values()]
                if kind == "sums":  # of all rows
                    written = view(step.out)
                    found = view(used).double().sum(1), written.sum((1, 2)), written.double().sum((1, 2))
                elif kind != "scale":
                    down = whole.buffers[used.buffer].level - step.level
                    start, count = (first - ends[0]) >> down, (last - first) >> down
                    found = [x.narrow(2 if kind == "logits" else 1, start, count) for x in found]
                yield Outcome(step, used, *found)


def _run(module, step, whole, weights, tensors, shape, dtype) -> dict[str, Tensor]:
    device = tensors["input"].device
    ready = module.prepare(step, weights, device, step_dtype(whole, step, dtype))
    with torch.no_grad():
        module.bind(step, ready, view_of(whole, tensors), (shape[1] >> step.level) * (shape[2] >> step.level))()
    return tensors


def _put(to: Tensor, value: Tensor) -> None:
    """Sums have other parts in another backend: all in the first."""
    if to.ndim == 3 and to.shape[1] != value.shape[1]:
        to.zero_()
        to[:, 0] = value.sum(1)
    else:
        to.copy_(value)


def _allocate(whole: plan.Plan, backend, shape, dtype, device) -> dict[str, Tensor]:
    """Every buffer by itself, full of NaN: of 255 where it has none."""
    places = lay_out(whole, backend, *shape, torch.device(device), dtype).places
    return {name: torch.full(size, 255 if kind == torch.uint8 else torch.nan, dtype=kind, device=device)
            for name, (_, size, kind) in places.items()}  # fmt: skip
