"""The weights of a trained network, with BatchNorm folded into the convolution before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convolutions import METHODS
from ..errors import WeightsError
from ..layers import GatedBlock, PlainBlock, ResidualBlock, SpatialAttention
from ..model import SCOATNet
from .layout import FLOAT8

Weights = dict[str, tuple[Tensor, Tensor]]


def pack(net: SCOATNet) -> Weights:
    """Pairs of float64 tensors on the CPU, by the names that a plan uses.

    Convolutions are weight [out, in, k, k] and bias [out]; ``conv*.ca`` are the two linear layers of a recalibration,
    [C / 16, C] and [C, C / 16].

    Raises:
        ValueError: for a network that computes something else than SCOATNet, or has other layers.
        WeightsError: if a folded weight is not finite: a network with NaN in it would answer everything with nothing.
    """
    if not isinstance(net, SCOATNet) or type(net).forward is not SCOATNet.forward:
        raise ValueError(f"the engine knows the forward pass of SCOATNet, not that of {type(net).__name__}")
    _check_layers(net)
    found: Weights = {}
    for name, module in net.named_children():
        if isinstance(module, PlainBlock):
            found[f"{name}.conv1"] = fold(module.conv1, module.bn1)
            found[f"{name}.conv2"] = fold(module.conv2, module.bn2)
        if isinstance(module, ResidualBlock):
            found[f"{name}.downsample"] = fold(*module.downsample)
        if isinstance(module, GatedBlock):
            found[f"{name}.ca"] = (_exact(module.ca.fc[0].weight), _exact(module.ca.fc[2].weight))
        if isinstance(module, SpatialAttention):
            found[f"{name}.W_x"], found[f"{name}.W_y"] = fold(*module.W_x), fold(*module.W_y)
            found[f"{name}.active"] = fold(*module.active[:2])
        if isinstance(module, nn.Conv2d):
            found[name] = _exact(module.weight), _exact(module.bias)
    for name, tensors in found.items():
        if not all(bool(torch.isfinite(x).all()) for x in tensors):
            raise WeightsError("network", f"finite weights are wanted, got NaN or infinity in {name}")
    return found


def _check_layers(net: SCOATNet) -> None:
    """Raises ValueError where a layer is not what SCOATNet has there: a plan is of those, and kernels trust it.

    Normalisation is left to ``fold``, but for its hooks: an engine calls none.
    """
    with torch.device("meta"):
        form = SCOATNet(net.in_channels, net.out_channels, net.width, net.block, net.has_heads, net.equations)
    found = dict(net.named_modules(remove_duplicate=False))
    for name, wanted in form.named_modules():
        layer = found.get(name)
        if layer is not None and (layer._forward_hooks or layer._forward_pre_hooks or {*METHODS} & {*vars(layer)}):
            raise ValueError(f"the engine calls no hooks and no replaced methods, and {name or 'the network'} has some")
        if isinstance(wanted, _BatchNorm):
            continue
        if getattr(type(layer), "forward", None) is not type(wanted).forward or _line(layer) != _line(wanted):
            raise ValueError(
                f"the engine knows the layers of SCOATNet: wanted {type(wanted).__name__}({_line(wanted)}) as {name}, "
                f"got {type(layer).__name__}({_line(layer)})"
            )


def _line(layer: nn.Module | None) -> str:
    """What a layer prints about itself, without those in it."""
    return "" if layer is None else layer.extra_repr()


def fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A convolution that does what a convolution and a BatchNorm in evaluation mode do."""
    if not isinstance(norm, _BatchNorm) or any(x is None for x in (norm.running_var, norm.weight, norm.bias)):
        raise ValueError(f"the engine folds BatchNorm layers with running statistics, weight and bias, got {norm}")
    scale = _exact(norm.weight) / torch.sqrt(_exact(norm.running_var) + norm.eps)
    bias = (_exact(convolution.bias) - _exact(norm.running_mean)) * scale + _exact(norm.bias)
    return _exact(convolution.weight) * scale[:, None, None, None], bias


def in_units(weight: Tensor) -> tuple[Tensor, float]:
    """Weights that reach as far as float8 does, and their unit: what they are to be multiplied by.

    A unit for each output channel would gain nothing where these lie within 12 binades of each other: so many more has
    float8 than its three bits of precision need. Weights so small that their bias, in units, could outgrow float32 are
    as good as none.
    """
    unit = max(weight.abs().max().item() / torch.finfo(FLOAT8).max, 2.0**-40)
    return weight / unit, unit


def _exact(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)
