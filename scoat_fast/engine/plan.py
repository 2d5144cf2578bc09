"""SCOATNet as a list of fused steps over named buffers: pure data, which a person can print and any backend can run.

Feature buffers are [N, H, W, C], dense. The nodes of a row of the grid lie side by side in one buffer, so that a
convolution over their concatenation reads a slice of it and nothing is copied. What comes from the level below,
upsampled and gated, is a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from ..model import ATTENTION_NODES, LEVELS, SCOATNet

TAPS = 10  # of a head for one class, and one of zeros, so that they are pairs
KINDS = {
    "features": "[N, H, W, C] in the engine's dtype",
    "wide": "[N, H, W, C] in the engine's dtype, or bfloat16 where that is float8",
    "map": "[N, H, W], as wide",
    "sums": "[N, parts, C] in float32: sums over parts of the pixels, in as many parts as the backend likes",
    "scale": "[N, C] in float32",
    "weights": "[N, rows, C] in the engine's dtype: each slice's own weights, in as many rows as the backend wants",
    "logits": "[N, C, H, W] in float32",
    "mask": "[N, C, H, W] in uint8",
    "threshold": "[1] in float32, a logit",
}


@dataclass(frozen=True)
class Buffer:
    """Memory of a kind (see ``KINDS``) at ``1 / 2**level`` of the resolution.

    ``within`` are channels of another buffer that hold nothing as long as this one lives: it lies there.
    """

    kind: str
    channels: int
    level: int
    within: Slice | None = None


@dataclass(frozen=True)
class Slice:
    """Some of the channels of a buffer."""

    buffer: str
    first: int
    channels: int

    def __str__(self) -> str:
        return f"{self.buffer}[{self.first}:{self.first + self.channels}]"


@dataclass(frozen=True)
class Shortcut:
    """A 1x1 convolution of a convolution's own sources, stored to be added by the block's second convolution."""

    weights: str
    out: Slice
    relu: bool  # before it is stored
    scaled: bool  # whether it reads the recalibrated sources too


@dataclass(frozen=True)
class Taps:
    """Products of a result with the nine taps of a head for one class [1, C, 3, 3], row by row: ``TAPS`` channels."""

    weights: str
    out: Slice


@dataclass(frozen=True)
class Convolve:
    """out = relu(convolution of the concatenated sources + bias), of ``size`` 3 with zero padding, or 1.

    ``scale`` [N, channels of all sources] multiplies the channels of the sources, or those of the weights, for which
    ``scaled`` has room. ``below`` is a last source of half the height and width, which becomes
    (1 + attention) * up(below) on the way in, or up(below) alone, for backends that can (see ``build``). ``residual``
    adds what ``out`` holds already, "before" the ReLU or "after" it. ``pooled`` takes the maxima of 2x2 pixels of
    ``out``, ``sums`` its sums, and ``taps`` the place of ``out``, which is not stored then.
    """

    level: int
    weights: str
    size: int
    sources: tuple[Slice, ...]
    out: Slice
    below: Slice | None = None
    attention: Slice | None = None
    relu: bool = True
    scale: Slice | None = None
    scaled: Slice | None = None
    shortcut: Shortcut | None = None
    residual: str | None = None
    pooled: Slice | None = None
    sums: Slice | None = None
    taps: Taps | None = None

    @property
    def inputs(self) -> tuple[Slice, ...]:
        """What is convolved: the sources, and the one below."""
        return self.sources if self.below is None else (*self.sources, self.below)

    @property
    def channels(self) -> int:
        return sum(used.channels for used in self.inputs)

    @property
    def products(self) -> dict[str, bool]:
        """The weights that multiply the inputs, its own and the shortcut's, and whether ``scale`` is for them."""
        own = {self.weights: self.scale is not None}
        return own if self.shortcut is None else own | {self.shortcut.weights: self.shortcut.scaled}


@dataclass(frozen=True)
class Attend:
    """The attention map: sigmoid(psi relu(W_x row + up(below))), where ``below`` is W_y y at low resolution.

    ``each`` applies ReLU to either term, not to their sum (the letter of the paper's equation 1).
    """

    level: int
    project: str  # weights of W_x
    weights: str  # of psi
    row: Slice
    below: Slice
    out: Slice
    each: bool


@dataclass(frozen=True)
class Gate:
    """out = (1 + attention) * up(below), or up(below) alone; ``sums`` takes the sums of ``out`` over its pixels.

    Without ``out``, only the sums are wanted.
    """

    level: int
    below: Slice
    out: Slice | None
    attention: Slice | None = None
    sums: Slice | None = None


@dataclass(frozen=True)
class Excite:
    """out = sigmoid(W_2 relu(W_1 means)), the means being those of the concatenated ``sums``."""

    level: int
    weights: str
    sums: tuple[Slice, ...]
    out: Slice


@dataclass(frozen=True)
class Head:
    """A 3x3 convolution to logits; into a mask, where they exceed ``threshold``.

    ``tapped``: the source holds its ``Taps`` already, each to be added to the pixel beside.
    """

    level: int
    weights: str
    source: Slice
    out: Slice
    threshold: Slice | None = None
    tapped: bool = False


Step = Convolve | Attend | Gate | Excite | Head


def reads(step: Step) -> list[Slice]:
    """What a step reads."""
    match step:
        case Convolve():
            given = [*step.sources, step.below, step.attention, step.scale, step.out if step.residual else None]
        case Attend():
            given = [step.row, step.below]
        case Gate():
            given = [step.below, step.attention]
        case Excite():
            given = [*step.sums]
        case Head():
            given = [step.source, step.threshold]
    return [used for used in given if used is not None]


def writes(step: Step) -> list[Slice]:
    """What a step writes."""
    match step:
        case Convolve():
            taken = [step.taps.out if step.taps else step.out, step.shortcut.out if step.shortcut else None]
            taken += [step.pooled, step.sums]
        case Gate():
            taken = [step.out, step.sums]
        case _:
            taken = [step.out]
    return [used for used in taken if used is not None]


def scratch(step: Step) -> list[Slice]:
    """What a step needs for itself alone."""
    return [step.scaled] if isinstance(step, Convolve) and step.scaled else []


@dataclass(frozen=True)
class Plan:
    """Steps in the order in which they run, and the buffers that they name.

    ``outputs`` are read by the caller: the heads, the last one last, and the attention maps where they are asked for.
    """

    buffers: dict[str, Buffer]
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @cached_property
    def lifetimes(self) -> dict[str, tuple[int, int]]:
        """The first and the last step in which a buffer holds something."""
        lives = dict.fromkeys(self.inputs, (-1, -1))
        for number, step in enumerate(self.steps):
            for used in [*reads(step), *writes(step), *scratch(step)]:
                lives[used.buffer] = (lives.get(used.buffer, (number,))[0], number)
        return lives | {name: (lives[name][0], len(self.steps)) for name in self.outputs}


def build(
    net: SCOATNet,
    mask: bool = False,
    attention: bool = False,
    fuses: Callable[[Convolve], bool] = lambda step: False,
) -> Plan:
    """The plan of a network's forward pass.

    Args:
        net: only its form is read; its weights are named as its modules are (see ``pack``).
        mask: the last head gives a mask, and no other head runs; else logits of all heads that the network returns.
        attention: keep the attention maps until the end.
        fuses: whether a backend runs a convolution with a source ``below``, else a ``Gate`` comes before it; or with
            the last head's ``taps``.
    """
    return _Builder(net, mask, attention, fuses).plan()


class _Builder:
    def __init__(self, net: SCOATNet, mask: bool, attention: bool, fuses: Callable[[Convolve], bool]):
        self.net, self.mask, self.attention, self.fuses = net, mask, attention, fuses
        self.width = [net.width * 2**i for i in range(LEVELS)]
        self.paper, self.residual = net.equations == "paper", net.block == "res"
        self.buffers: dict[str, Buffer] = {}
        self.steps: list[Step] = []

    def plan(self) -> Plan:
        outputs = []
        pooled = self.new("input", "wide", self.net.in_channels, 0)  # eight bits of float are no grey values
        inputs = ["input"]
        if self.mask:
            inputs.append(self.new("threshold", "threshold", 1, 0).buffer)
        for i in range(LEVELS):
            below = self.new(f"pool{i + 1}", "features", self.width[i], i + 1) if i < LEVELS - 1 else None
            self.steps += self.block(i, 0, (pooled,), pooled=below)
            pooled = below
        for j in range(1, LEVELS):
            for i in reversed(range(1, LEVELS - j)):
                self.inner_node(i, j)
        for j in range(1, LEVELS):  # the largest buffers last, when most others are free again
            self.inner_node(0, j)
            outputs += self.head(j)
        if self.attention:
            outputs += [f"attention{i}_{j}" for i, j in ATTENTION_NODES]
        return Plan(self.buffers, tuple(self.steps), tuple(inputs), tuple(outputs))

    def new(self, name: str, kind: str, channels: int, level: int, within: Slice | None = None) -> Slice:
        self.buffers.setdefault(name, Buffer(kind, channels, level, within))
        return Slice(name, 0, channels)

    def node(self, i: int, j: int) -> Slice:
        """Where ``x[i, j]`` lies. The last node of a row is read by the level above alone, and stands alone."""
        c, last = self.width[i], LEVELS - 1 - i
        if j == last:
            return self.new(f"x{i}_{j}", "wide" if i == 0 else "features", c, i)  # only a head reads x0_4
        self.new(f"row{i}", "features", last * c, i)
        return Slice(f"row{i}", j * c, c)

    def spare(self, i: int, j: int) -> Slice | None:
        """Where ``x[i, j + 1]`` will lie, for what only ``x[i, j]`` needs: on level 0, where memory is scarcest."""
        c = self.width[i]
        return Slice(f"row{i}", (j + 1) * c, c) if i == 0 < j < LEVELS - 2 else None

    def row(self, i: int, j: int) -> Slice:
        """The nodes ``x[i, 0]`` to ``x[i, j - 1]``, side by side."""
        return Slice(f"row{i}", 0, j * self.width[i])

    def sums(self, i: int, j: int) -> Slice | None:
        """Where the sums of a node that gets recalibrated lie."""
        if i == 0 or j == LEVELS - 1 - i:
            return None
        return self.new(f"sums{i}_{j}", "sums", self.width[i], i)

    def block(
        self, i: int, j: int, sources: tuple[Slice, ...], scale: Slice | None = None, pooled: Slice | None = None
    ) -> tuple[Convolve, Convolve]:
        """The two convolutions of a node."""
        name, out, recalibrated = f"conv{i}_{j}", self.node(i, j), scale is not None
        between = self.new(f"between{i}_{j}", "features", self.width[i], i, self.spare(i, j))
        shortcut = residual = scaled = None
        if recalibrated:
            scaled = self.new(f"scaled{i}_{j}", "weights", scale.channels, i)
        if recalibrated or self.residual:
            apart = recalibrated and self.paper
            shortcut = Shortcut(f"{name}.downsample", out, relu=apart, scaled=recalibrated and not apart)
            residual = "after" if apart else "before"
        return (
            Convolve(i, f"{name}.conv1", 3, sources, between, scale=scale, scaled=scaled, shortcut=shortcut),
            Convolve(i, f"{name}.conv2", 3, (between,), out, residual=residual, pooled=pooled, sums=self.sums(i, j)),
        )

    def inner_node(self, i: int, j: int) -> None:
        row, below, name = self.row(i, j), self.node(i + 1, j - 1), f"{i}_{j}"
        attention = sums = scale = None
        if i > 0:
            projected = self.new(f"projected{name}", "wide", self.width[i], i + 1)
            attention = self.new(f"attention{name}", "map", 1, i)
            sums = self.new(f"gated_sums{name}", "sums", below.channels, i)
            scale = self.new(f"scale{name}", "scale", row.channels + below.channels, i)
            self.steps += [
                Convolve(i + 1, f"att{name}.W_y", 1, (below,), projected, relu=False),
                Attend(i, f"att{name}.W_x", f"att{name}.active", self.node(i, j - 1), projected, attention, self.paper),
            ]
        first, second = self.block(i, j, (row,), scale)
        fused, gated = replace(first, below=below, attention=attention), None
        if self.fuses(fused):
            first = fused
        else:
            gated = self.new(f"gated{name}", "features", below.channels, i)
            first = replace(first, sources=(row, gated))
        if gated is not None or sums is not None:
            self.steps.append(Gate(i, below, gated, attention, sums))
        if scale is not None:
            self.steps.append(Excite(i, f"conv{name}.ca", (*(self.sums(i, k) for k in range(j)), sums), scale))
        self.steps += [first, second]

    def head(self, j: int) -> list[str]:
        """The output on ``x[0, j]``, of which the steps so far end with the second convolution, where there is one."""
        net, last = self.net, j == LEVELS - 1
        if not last and (self.mask or not net.deep_supervision):
            return []
        name, classes = f"final{j}" if net.has_heads else "final", net.out_channels
        if self.mask:
            out, threshold = self.new("mask", "mask", classes, 0), Slice("threshold", 0, 1)
        else:
            out, threshold = self.new(f"logits{j}", "logits", classes, 0), None
        source, tapped = self.node(0, j), False
        fused = replace(self.steps[-1], taps=Taps(name, Slice("taps", 0, TAPS)))
        if last and classes == 1 and self.fuses(fused):
            source, tapped = self.new("taps", "wide", TAPS, 0), True
            self.steps[-1] = fused
        self.steps.append(Head(0, name, source, out, threshold, tapped))
        return [out.buffer]


def summary(step: Step) -> str:
    """A step in one line: what it reads, and where its results go."""
    parts = [type(step).__name__.lower()]
    if isinstance(step, Convolve):
        parts[0] += f" {step.size}x{step.size}"
    sources = " + ".join(f"up({used})" if used is getattr(step, "below", None) else str(used) for used in reads(step))
    return f"{parts[0]:13}{sources} -> {', '.join(str(used) for used in writes(step))}"
