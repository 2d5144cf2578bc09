"""SCOAT-Net (Zhao et al., Pattern Recognition 119, 2021, doi 10.1016/j.patcog.2021.108109)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .layers import (
    EQUATIONS,
    REDUCTION,
    GatedBlock,
    PlainBlock,
    ResidualBlock,
    SpatialAttention,
    initialize,
    join,
    pad_to_multiple,
)
from .recompute import recomputing

LEVELS = 5
ATTENTION_NODES = ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3))
BLOCKS = {"res": ResidualBlock, "vgg": PlainBlock}
STEM = ("conv0_0.conv1.weight", "conv0_0.downsample.0.weight")  # the weights that see the input channels


class SCOATNet(nn.Module):
    """The UNet++ grid with spatial and channel attention; parameters are named as in the published network.

    Node ``x[i, j]`` lies on level ``i`` (``width * 2**i`` channels, ``1 / 2**i`` of the resolution). The encoder is
    column 0, row 0 holds plain blocks, and the other nodes gate what comes from below (figure 1 of the paper).

    Args:
        in_channels: channels of the input; 1 for CT (also ``input_channels``).
        out_channels: classes, each with its own logit (also ``classes``, ``num_classes``).
        width: channels on level 0, at least 3; the paper's network has 32.
        block: "res" (residual) or "vgg" (plain) blocks in the encoder and in row 0.
        deep_supervision: four heads, on ``x[0, 1]`` to ``x[0, 4]``. Afterwards ``net.deep_supervision`` can be
            switched: off, such a network gives the output of its last head alone.
        equations: "published" for what the authors' code computes, "paper" for equations 1 and 6 to the letter.
        spatial_dims: 2, for pipelines that pass it.

    Raises:
        ValueError: for a value out of its range, or two spellings of one argument that differ.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        width: int = 32,
        block: str = "res",
        deep_supervision: bool = False,
        equations: str = "published",
        *,
        spatial_dims: int = 2,
        input_channels: int | None = None,
        classes: int | None = None,
        num_classes: int | None = None,
    ):
        super().__init__()
        in_channels = _one_spelling("in_channels", in_channels, 1, input_channels=input_channels)
        out_channels = _one_spelling("out_channels", out_channels, 1, classes=classes, num_classes=num_classes)
        if spatial_dims != 2:
            raise ValueError(f"SCOATNet works on slices: spatial_dims must be 2, got {spatial_dims}")
        if min(in_channels, out_channels) < 1:
            raise ValueError(f"SCOATNet needs at least one channel in and out, got {in_channels} and {out_channels}")
        if 6 * width < REDUCTION:  # the narrowest gated node has 6 * width channels
            raise ValueError(f"SCOATNet: width must be at least 3, got {width}")
        if block.lower() not in BLOCKS:
            raise ValueError(f"SCOATNet: block must be one of {sorted(BLOCKS)}, got {block!r}")
        if equations not in EQUATIONS:
            raise ValueError(f"SCOATNet: equations must be one of {EQUATIONS}, got {equations!r}")
        self.in_channels, self.out_channels, self.width = in_channels, out_channels, width
        self.block, self.equations = block.lower(), equations

        channels = [width * 2**i for i in range(LEVELS)]
        plain = BLOCKS[self.block]
        self.pool = nn.MaxPool2d(2, 2)
        for i in range(LEVELS):
            self.add_module(f"conv{i}_0", plain(channels[i - 1] if i else in_channels, channels[i]))
        for j in range(1, LEVELS):
            self.add_module(f"conv0_{j}", plain(j * channels[0] + channels[1], channels[0]))
            for i in range(1, LEVELS - j):
                self.add_module(f"conv{i}_{j}", GatedBlock(j * channels[i] + channels[i + 1], channels[i], equations))
        for i, j in ATTENTION_NODES:
            self.add_module(f"att{i}_{j}", SpatialAttention(channels[i], equations))
        self.has_heads = bool(deep_supervision)
        for name in ("final1", "final2", "final3", "final4") if self.has_heads else ("final",):
            self.add_module(name, nn.Conv2d(width, out_channels, 3, padding=1))
        self._deep_supervision = self.has_heads

        self.apply(initialize)
        self.register_load_state_dict_pre_hook(_accept_published)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> SCOATNet:
        """A trained network in evaluation mode, by the name of shipped weights or the path of a weights file.

        ``net.pretrained`` then holds what the network wants: window in HU, slice size, threshold.

        Raises:
            scoat_fast.WeightsError: if the file is unknown, damaged, does not fit or holds NaN.
        """
        from .pretrained import load

        return load(name_or_path)

    @property
    def deep_supervision(self) -> bool:
        """Whether the network returns the outputs of its four heads, or that of the last alone."""
        return self._deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, on: bool) -> None:
        if on and not self.has_heads:
            raise ValueError("SCOATNet: this network has one head; build it with deep_supervision=True to get four")
        self._deep_supervision = bool(on)

    def forward(
        self, input: Tensor, return_attention: bool = False
    ) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], dict[str, Tensor]]:
        """Logits for every pixel.

        Args:
            input: [N, in_channels, H, W], any float dtype (that of the parameters), any H and W from 1: the
                network pads to a multiple of 16 by repeating the last row and column, and crops its output.
            return_attention: also return the six attention maps of equation 1.

        Returns:
            Logits [N, out_channels, H, W]; with deep supervision the list of those of the four heads, the last being
            the network's answer. With ``return_attention``, that and a dict from "x11", "x21", "x31", "x12", "x22",
            "x13" to maps [N, 1, ceil(H / 2**i), ceil(W / 2**i)] in 0..1, where i is the name's first digit.
        """
        fits = torch.jit.is_tracing() or (input.shape[1:2] == (self.in_channels,) and 0 not in input.shape[2:])
        if input.ndim != 4 or not fits:
            raise ValueError(f"SCOATNet wants [N, {self.in_channels}, H, W], got {tuple(input.shape)}")
        height, width = input.shape[2:]
        with recomputing():
            x, attention = self._grid(pad_to_multiple(input, 2 ** (LEVELS - 1)))
        if self.deep_supervision:
            output = [getattr(self, f"final{j}")(x[0, j])[:, :, :height, :width] for j in range(1, LEVELS)]
        else:
            output = (self.final4 if self.has_heads else self.final)(x[0, LEVELS - 1])[:, :, :height, :width]
        if not return_attention:
            return output
        return output, {
            f"x{i}{j}": attention[i, j][:, :, : -(-height // 2**i), : -(-width // 2**i)] for i, j in ATTENTION_NODES
        }

    def _grid(self, input: Tensor) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor]]:
        """The nodes and the attention maps, by level and column."""
        x, attention = {(0, 0): self.conv0_0(input)}, {}
        for i in range(1, LEVELS):
            x[i, 0] = getattr(self, f"conv{i}_0")(self.pool(x[i - 1, 0]))
        for j in range(1, LEVELS):
            for i in reversed(range(LEVELS - j)):
                row, below, block = [x[i, k] for k in range(j)], x[i + 1, j - 1], getattr(self, f"conv{i}_{j}")
                if i == 0:
                    x[i, j] = block(join(row, below))
                else:
                    joined, means, attention[i, j] = getattr(self, f"att{i}_{j}")(below, *row)
                    x[i, j] = block(joined, means)
                    del joined  # else it lives until the next one
        return x, attention


def _one_spelling(name: str, value: int, default: int, **others: int | None) -> int:
    """The value of an argument that goes by several names."""
    given = {key: number for key, number in {name: value, **others}.items() if number is not None}
    if value == default and len(given) > 1:
        del given[name]
    if len(set(given.values())) > 1:
        raise ValueError(f"SCOATNet: {' and '.join(given)} mean the same, got {given}")
    return next(iter(given.values()))


def _accept_published(net: SCOATNet, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Before loading: takes off ``module.`` and fits the stem of a 1- or 3-channel network to the other."""
    wrapped = prefix + "module."
    for key in [key for key in state if key.startswith(wrapped)]:
        state[prefix + key.removeprefix(wrapped)] = state.pop(key)
    for key in (prefix + name for name in STEM):
        weight = state.get(key)
        if weight is None or weight.ndim != 4 or weight.shape[1] == net.in_channels:
            continue
        if (weight.shape[1], net.in_channels) == (1, 3):
            state[key] = weight.repeat(1, 3, 1, 1) / 3
        elif (weight.shape[1], net.in_channels) == (3, 1):
            state[key] = weight.sum(1, keepdim=True)
