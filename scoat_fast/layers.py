"""The building blocks of SCOAT-Net, each built on stock layers and named as in the published state dict."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolutions import convolution, is_itself, is_plain, is_untouched, two_convolutions
from .ops import batch_norm_relu, channel_gate, spatial_gate, upsample
from .ops._backend import stock_only
from .ops.batch_norm_relu.op import normalize_again
from .recompute import forget

EQUATIONS = ("published", "paper")
REDUCTION = 16  # r of equation 5


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``relu(norm(x) + residual)``: [N, C, H, W], and the same -> the same.

    For a ``BatchNorm2d`` in training it is one operation. A module that somebody has put in its place, SyncBatchNorm
    say, or hung hooks on is called.
    """
    fused = is_untouched(norm, nn.BatchNorm2d) and not stock_only() and x.numel() > 0
    fused = fused and norm.weight is not None and norm.bias is not None
    if not fused or not (norm.training or norm.running_mean is None):
        y = norm(x)
        return F.relu(y if residual is None else y + residual)
    y, mean, var = batch_norm_relu(x, norm.weight, norm.bias, residual, norm.eps)
    if residual is None:
        forget(y, partial(normalize_again, eps=norm.eps), x, norm.weight, norm.bias, mean, var)
    if norm.training and norm.track_running_stats:
        _track(norm, mean, var, x.numel() // x.shape[1])
    return y


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves the running statistics, as the layer does: towards the unbiased variance."""
    momentum = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / norm.num_batches_tracked.item()
    for running, found in ((norm.running_mean, mean), (norm.running_var, var * (count / (count - 1)))):
        if running is not None:
            running.lerp_(found.to(running.dtype), momentum)


class PlainBlock(nn.Module):
    """Two times 3x3 convolution, batch normalisation and ReLU (the block of UNet++, "VGG" in the published code)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self._add_layers(in_channels, out_channels)

    def _add_layers(self, in_channels: int, out_channels: int) -> None:
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def finish(self, first: Tensor, residual: Tensor | None = None) -> Tensor:
        """All that follows the first convolution; the residual is added before the last ReLU."""
        return norm_relu(self.bn2, convolution(norm_relu(self.bn1, first), self.conv2), residual)

    def forward(self, x: Tensor) -> Tensor:  # [N, in, H, W] -> [N, out, H, W]
        return self.finish(convolution(x, self.conv1))


class ResidualBlock(PlainBlock):
    """``PlainBlock`` with a 1x1 shortcut that is added before the last ReLU."""

    def _add_layers(self, in_channels: int, out_channels: int) -> None:
        super()._add_layers(in_channels, out_channels)
        self.downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if not _is_pair(self.downsample):
            return self.finish(convolution(x, self.conv1), self.downsample(x))
        convolve, norm = self.downsample
        first, shortcut = two_convolutions(x, self.conv1, convolve)
        return self.finish(first, norm(shortcut))


class ChannelAttention(nn.Module):
    """Squeeze and excitation: equations 4 and 5, and the product ``x_V * x_c`` of equation 6."""

    def __init__(self, channels: int):
        super().__init__()
        squeezed = channels // REDUCTION
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed, bias=False),
            nn.ReLU(),
            nn.Linear(squeezed, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        """[N, C, H, W] and, where they are known, its means over the pixels [N, C] -> [N, C, H, W].

        Where somebody has replaced one of the layers or hung hooks on one, all of them are called.
        """
        kinds = (nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid)
        whole = is_untouched(self.fc, nn.Sequential) and len(self.fc) == len(kinds)
        whole = whole and all(map(is_untouched, self.fc, kinds))
        if not whole or self.fc[0].bias is not None or self.fc[2].bias is not None:
            means = x.mean((2, 3)) if means is None else means.to(x.dtype)
            return x * self.fc(means)[:, :, None, None]
        given = (x, self.fc[0].weight, self.fc[2].weight, *(() if means is None else (means,)))
        y = channel_gate(*given)
        # who hangs hooks on this may take the weights away until its own backward pass: a sharded module
        return forget(y, channel_gate, *given) if is_untouched(self, ChannelAttention) else y


class GatedBlock(ResidualBlock):
    """A residual block on recalibrated channels: equation 6.

    The published network adds the shortcut of the recalibrated input and applies ReLU after the sum; the paper
    writes ``H_R^2(x_V x_c) + H_R(x_c)``: the shortcut of the raw input, a ReLU on either branch, none after the sum.
    """

    def __init__(self, in_channels: int, out_channels: int, equations: str):
        nn.Module.__init__(self)
        self.ca = ChannelAttention(in_channels)  # before the convolutions, as in the published state dict
        self._add_layers(in_channels, out_channels)
        self.equations = equations

    def forward(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        """[N, in, H, W] and, where they are known, its means over the pixels [N, in] -> [N, out, H, W]."""
        recalibrated = self.ca(x, means)
        if self.equations == "paper":
            return self.finish(convolution(recalibrated, self.conv1)) + F.relu(self.downsample(x))
        return super().forward(recalibrated)


class SpatialAttention(nn.Module):
    """The attention map ``M`` (equation 1) and the gated features ``(1 + M) * up(y)`` (equation 2).

    ``x`` has this level's resolution, ``y`` comes from the level below with twice the channels. The published
    network applies ReLU once, to the sum of the two projections; the paper writes one on each.
    """

    def __init__(self, channels: int, equations: str):
        super().__init__()
        self.W_x = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.W_y = nn.Sequential(nn.Conv2d(2 * channels, channels, 1), nn.BatchNorm2d(channels))
        self.active = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
        self.equations = equations

    def forward(self, y: Tensor, *row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates ``y`` [N, 2C, h, w] by what the last of ``row``, each [N, C, 2h, 2w], attends to.

        Returns ``row`` and the gated features, concatenated [N, len(row) * C + 2C, 2h, 2w]; the means of that over
        its pixels; and the attention map [N, 1, 2h, 2w].
        """
        if _is_pair(self.W_y) and is_itself(self.W_y[0], nn.Conv2d) and is_plain(self.W_y[0], 1):
            project, norm = self.W_y
            projected = project(y)  # W_y up(y) = up(W_y y)
            from_below = norm(forget(upsample(projected), upsample, projected))
        else:
            from_below = self.W_y(upsample(y))
        residual = None if self.equations == "paper" else from_below
        if _is_pair(self.W_x):
            project, norm = self.W_x
            joined = norm_relu(norm, project(row[-1]), residual)
        else:
            joined = norm_relu(self.W_x, row[-1], residual)
        if self.equations == "paper":
            joined = joined + F.relu(from_below)
        attention = self.active(joined)
        joined, means = spatial_gate(y, attention, row, return_means=True)
        forget(joined, lambda y, attention, *row: spatial_gate(y, attention, row), y, attention, *row)
        return joined, means, attention


def _is_pair(module: nn.Module) -> bool:
    """Whether a module is no more than the two that it holds; hooks on all modules see those two."""
    return is_itself(module, nn.Sequential) and len(module) == 2


def join(row: Sequence[Tensor], y: Tensor) -> Tensor:
    """``row``, each [N, C, 2h, 2w], and the upsampled ``y`` [N, D, h, w], concatenated."""
    return forget(upsample(y, row), lambda y, *row: upsample(y, row), y, *row)


def initialize(module: nn.Module) -> None:
    """Initialises one module as the published network: for ``Module.apply``."""
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # there is nothing to draw, for which PyTorch would import its compiler, for seconds
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, mode="fan_in")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:  # [N, C, H, W] -> [N, C, H', W']
    """Repeats the last row and column until height and width are multiples of ``multiple``."""
    height, width = x.shape[-2:]
    # of what is not negative: torch.compile has no bounds for -height % multiple where sizes change
    bottom, right = ((size + multiple - 1) // multiple * multiple - size for size in (height, width))
    wanted = torch.jit.is_tracing() or bottom or right  # a trace is for any size
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if wanted else x
