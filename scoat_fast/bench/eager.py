"""The baseline: the published network in stock PyTorch, operator by operator.

It upsamples three times in every gated node (for the map, for the product and for the sum), concatenates by copying,
and recalibrates by a mean, two linear layers and a product. Its state dict is that of ``SCOATNet``, which it equals.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import ATTENTION_NODES, LEVELS


def up(y: Tensor) -> Tensor:  # [N, C, h, w] -> [N, C, 2h, 2w]
    return F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)


class Block(nn.Module):
    """Two convolutions with a 1x1 shortcut; on recalibrated channels where ``gated``."""

    def __init__(self, in_channels: int, out_channels: int, gated: bool = False):
        super().__init__()
        if gated:
            self.ca = Recalibration(in_channels)
        self.gated = gated
        self.conv1, self.bn1 = nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels)
        self.conv2, self.bn2 = nn.Conv2d(out_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels)
        self.downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            x = self.ca(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


class Recalibration(nn.Module):
    """Squeeze and excitation with a reduction of 16."""

    def __init__(self, channels: int):
        super().__init__()
        squeezed = channels // 16
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed, bias=False),
            nn.ReLU(),
            nn.Linear(squeezed, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        scale = self.fc(F.adaptive_avg_pool2d(x, 1).view(n, c)).view(n, c, 1, 1)
        return x * scale.expand_as(x)


class Gate(nn.Module):
    """The spatial attention map from features of this level and upsampled features from below."""

    def __init__(self, channels: int):
        super().__init__()
        self.W_x = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.W_y = nn.Sequential(nn.Conv2d(2 * channels, channels, 1), nn.BatchNorm2d(channels))
        self.active = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.active(F.relu(self.W_x(x) + self.W_y(y)))


class EagerSCOATNet(nn.Module):
    """The published network with one input channel, residual blocks and one head."""

    def __init__(self, width: int = 32, in_channels: int = 1, out_channels: int = 1):
        super().__init__()
        channels = [width * 2**i for i in range(LEVELS)]
        self.pool = nn.MaxPool2d(2, 2)
        for i in range(LEVELS):
            self.add_module(f"conv{i}_0", Block(channels[i - 1] if i else in_channels, channels[i]))
        for j in range(1, LEVELS):
            for i in range(LEVELS - j):
                self.add_module(f"conv{i}_{j}", Block(j * channels[i] + channels[i + 1], channels[i], gated=i > 0))
        for i, j in ATTENTION_NODES:
            self.add_module(f"att{i}_{j}", Gate(channels[i]))
        self.final = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W], multiples of 16 -> [N, out_channels, H, W]
        nodes = {(0, 0): self.conv0_0(x)}
        for i in range(1, LEVELS):
            nodes[i, 0] = getattr(self, f"conv{i}_0")(self.pool(nodes[i - 1, 0]))
        for j in range(1, LEVELS):
            for i in reversed(range(LEVELS - j)):
                row, below = [nodes[i, k] for k in range(j)], nodes[i + 1, j - 1]
                if i == 0:
                    from_below = up(below)
                else:
                    attention = getattr(self, f"att{i}_{j}")(row[-1], up(below))
                    from_below = attention * up(below) + up(below)
                nodes[i, j] = getattr(self, f"conv{i}_{j}")(torch.cat([*row, from_below], 1))
        return self.final(nodes[0, LEVELS - 1])
