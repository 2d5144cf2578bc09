"""The networks of the paper's Tables II and III, by name.

Those on SCOAT-Net's grid are written here, in its grammar; the others come from well-kept libraries, which are imported
when one is built. All take [N, 1, H, W] and give logits of that shape, or a list of such, the last being the answer.
None has pretrained weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ScoatFastError
from ..layers import PlainBlock, ResidualBlock, initialize
from ..model import ATTENTION_NODES, LEVELS, SCOATNet
from ..ops import upsample

SMALL = 32  # channels on level 0: narrower networks are compared with ResNet-18, others with ResNet-50


class UNetPlusPlus(nn.Module):
    """UNet++ as the paper's code has it: SCOAT-Net's grid without its attention, four 3x3 heads.

    Z. Zhou et al., UNet++: A Nested U-Net Architecture for Medical Image Segmentation.

    Args:
        width: channels on level 0, doubled on each level below.
        block: of two convolutions, with or without a residual.
        attend: makes the attention of a node of level 1 to 3 from its channels C; it is called with the last feature of
            the node's row [N, C, H, W] and the upsampled one from below [N, 2C, H, W], and returns both, weighted.
        attend_to_node: makes what weights the outcome of such a node, [N, C, H, W] to the same.
    """

    def __init__(
        self,
        width: int = 32,
        in_channels: int = 1,
        block: Callable[[int, int], nn.Module] = PlainBlock,
        attend: Callable[[int], nn.Module] | None = None,
        attend_to_node: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        channels = [width * 2**i for i in range(LEVELS)]
        for j in range(LEVELS):
            for i in range(LEVELS - j):
                below = channels[i - 1] if i else in_channels
                self.add_module(f"conv{i}_{j}", block(j * channels[i] + channels[i + 1] if j else below, channels[i]))
        for i, j in ATTENTION_NODES:
            if attend:
                self.add_module(f"att{i}_{j}", attend(channels[i]))
            if attend_to_node:
                self.add_module(f"node{i}_{j}", attend_to_node(channels[i]))
        for j in range(1, LEVELS):
            self.add_module(f"final{j}", nn.Conv2d(width, 1, 3, padding=1))
        self.apply(initialize)

    def forward(self, input: Tensor) -> list[Tensor]:
        """[N, C, H, W], H and W multiples of 16, to the logits of four heads."""
        parts = dict(self.named_children())
        x = {(0, 0): parts["conv0_0"](input)}
        for i in range(1, LEVELS):
            x[i, 0] = parts[f"conv{i}_0"](F.max_pool2d(x[i - 1, 0], 2))
        for j in range(1, LEVELS):
            for i in range(LEVELS - j):
                *row, last, below = *(x[i, k] for k in range(j)), upsample(x[i + 1, j - 1])
                if f"att{i}_{j}" in parts:
                    last, below = parts[f"att{i}_{j}"](last, below)
                node = parts[f"conv{i}_{j}"](torch.cat([*row, last, below], 1))
                x[i, j] = parts[f"node{i}_{j}"](node) if f"node{i}_{j}" in parts else node
        return [parts[f"final{j}"](x[0, j]) for j in range(1, LEVELS)]


class ResidualAttention(nn.Module):
    """AttentionV1: weights a node's outcome ``T`` by ``1 + M``.

    The soft mask branch of F. Wang et al., Residual Attention Network for Image Classification, one level deep, with
    a trunk of two units. The paper does not say where it stands nor how deep it is; of what was tried, this comes
    nearest to the size in its Table III.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.trunk = nn.Sequential(_Unit(channels), _Unit(channels))
        self.down, self.skip, self.up = _Unit(channels), nn.Conv2d(channels, channels, 1), _Unit(channels)
        self.mask = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> the same
        low = F.max_pool2d(x, 3, 2, 1)
        around = F.interpolate(self.up(self.down(low)), x.shape[2:], mode="bilinear", align_corners=True)
        return (1 + self.mask(around + self.skip(x))) * self.trunk(x)


class _Unit(nn.Module):
    """A residual unit with activation first: 1x1, then 3x3, each normalised before and the last also after."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class AttentionGate(nn.Module):
    """AttentionV2: what comes from below says where to look in the row.

    The gate of O. Oktay et al., Attention U-Net: Learning Where to Look for the Pancreas.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = 2 * channels
        self.W_g = nn.Sequential(nn.Conv2d(2 * channels, inner, 1), nn.BatchNorm2d(inner))
        self.W_x = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner))
        self.psi = nn.Sequential(nn.Conv2d(inner, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, x: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.psi(F.relu(self.W_g(below) + self.W_x(x))), below


class PyramidAttention(nn.Module):
    """AttentionV3: weights a node's outcome by ``1 + M``, the mean of maps at full, half and quarter resolution.

    W. Wang et al., Salient Object Detection With Pyramid Attention and Salient Edges.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid()) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> the same
        each = [
            F.interpolate(map(F.avg_pool2d(x, 2**k, ceil_mode=True)), x.shape[2:], mode="bilinear", align_corners=True)
            for k, map in enumerate(self.maps)
        ]
        return x * (1 + sum(each) / len(each))


class _Library(nn.Module):
    """A network of a library, whatever it wraps its logits in."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, input: Tensor) -> Tensor:
        out = self.net(input)
        return out["out"] if isinstance(out, dict) else out


def _unet(width: int) -> nn.Module:
    from monai.networks.nets import BasicUNet

    features = (*(width * 2**i for i in range(LEVELS)), width)
    return _Library(BasicUNet(2, 1, 1, features, act="relu", norm="batch"))


def _attention_unet(width: int) -> nn.Module:
    from monai.networks.nets import AttentionUnet

    return _Library(AttentionUnet(2, 1, 1, [width * 2**i for i in range(LEVELS)], [2] * (LEVELS - 1)))


def _fcn(width: int) -> nn.Module:
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    backbone, channels = _resnet(width)
    return _Library(FCN(backbone, FCNHead(channels, 1)))


def _deeplab(width: int) -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

    backbone, channels = _resnet(width)
    return _Library(DeepLabV3(backbone, DeepLabHead(channels, 1)))


def _resnet(width: int) -> tuple[nn.Module, int]:
    """torchvision's ResNet up to its last stage, for one channel: 50 with dilation, or 18, which has none."""
    from torchvision.models import resnet18, resnet50
    from torchvision.models._utils import IntermediateLayerGetter

    net = resnet18() if width < SMALL else resnet50(replace_stride_with_dilation=[False, True, True])
    net.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return IntermediateLayerGetter(net, {"layer4": "out"}), net.fc.in_features


def _pspnet(width: int) -> nn.Module:
    from segmentation_models_pytorch import PSPNet

    net = PSPNet("resnet18" if width < SMALL else "resnet50", encoder_weights=None, in_channels=1)
    for unused in (net.encoder.layer3, net.encoder.layer4):  # it pools what comes out of the second stage
        unused.requires_grad_(False)
    return _Library(net)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "fcn": _fcn,
    "deeplabv3": _deeplab,
    "pspnet": _pspnet,
    "attention-unet": _attention_unet,
    "unet": _unet,
    "unet++": UNetPlusPlus,
    "unet++-v1": lambda width: UNetPlusPlus(width, attend_to_node=ResidualAttention),
    "unet++-v2": lambda width: UNetPlusPlus(width, attend=AttentionGate),
    "unet++-v3": lambda width: UNetPlusPlus(width, attend_to_node=PyramidAttention),
    "unet++-res": lambda width: UNetPlusPlus(width, block=ResidualBlock),
    "scoat": lambda width: SCOATNet(1, 1, width, deep_supervision=True),
}
TABLE_2: Sequence[str] = ("fcn", "deeplabv3", "pspnet", "attention-unet", "unet", "unet++", "scoat")
TABLE_3: Sequence[str] = ("unet++", "unet++-v1", "unet++-v2", "unet++-v3", "unet++-res", "scoat")


def build(name: str, width: int) -> nn.Module:
    """A network by its name. ``width``: channels on level 0 of those that have a grid.

    Raises:
        ScoatFastError: for a name that is none, or without the library that has it.
    """
    if name not in NETWORKS:
        raise ScoatFastError(f"a network of {', '.join(NETWORKS)} is wanted, got {name!r}")
    try:
        return NETWORKS[name](width)
    except (ImportError, RuntimeError) as error:  # a torchvision that was made for another torch raises the latter
        raise ScoatFastError(f"{name} needs pip install 'scoat-fast[study,networks]': {error}") from error
