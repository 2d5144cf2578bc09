"""Single steps of a plan, run by a backend on inputs that a float64 run of the plan left in its buffers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoat_fast import SCOATNet
from scoat_fast.engine import pack, plan, reference
from scoat_fast.engine.layout import lay_out, step_dtype, view_of


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
    **options,
) -> list[Outcome]:
    """Runs every wanted step of a network's plan by itself, for ``shape`` [N, H, W], in memory full of NaN."""
    module = importlib.import_module(f"scoat_fast.engine.{backend}")
    whole, weights = plan.build(net, **options), pack.pack(net)
    torch.manual_seed(5)
    exact = _allocate(whole, reference, shape, torch.float64, device)
    exact["input"].uniform_()
    if "threshold" in exact:
        exact["threshold"].fill_(0.1)
    outcomes = []
    for step in whole.steps:
        results = {}
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
            outcomes.append(Outcome(step, used, found["ours"], found["stock"], found["exact"]))
    return outcomes


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
