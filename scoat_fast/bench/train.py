"""The speed of a step of training: the published network in stock PyTorch, eager and compiled, and ``SCOATNet``.

All take the same steps from the same weights over the same batches. A row's gradient, of a few images, is checked
against float64, and its curve of losses against that of the first row, before it is timed; one that fails has no
number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..clock import median_ms
from ..files import check_output
from ..model import SCOATNet
from ..train.losses import hybrid_loss
from .contenders import baseline_of
from .machine import facts, reason_of, save
from .memory import peak_bytes

# of the norm of all gradients: a pixel on the edge of ReLU may fall to its other side, and bfloat16 has 8 bits
BOUND = {torch.float32: 5e-2, torch.bfloat16: 0.5}
CURVE_BOUND = 0.1  # of the first loss: how far the curves of losses may lie apart
LEARNING_RATE = 1e-3
MEASURED = ("ms_per_step", "images_per_s", "peak_mib", "error", "curve_gap", "losses", "reason")
CHECKED = 4  # images, of which a gradient in float64 fits where a batch in float32 does
COLUMNS = (
    f"{'name':36}{'width':>6}{'batch':>6}{'ms a step':>11}{'images/s':>10}{'x eager':>9}{'peak MiB':>10}{'error':>9}"
    f"{'curve':>9}"
)


@dataclass(frozen=True)
class Trainee:
    """A way to train: ``ours`` or the baseline, in float32 or under autocast to ``dtype``, compiled or not."""

    name: str
    ours: bool
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    compile: bool = False


def trainees(device: torch.device, compile: bool) -> Iterator[Trainee]:
    last, half = torch.channels_last, torch.bfloat16
    yield Trainee("eager float32", ours=False)
    yield Trainee("eager float32 channels_last", ours=False, layout=last)
    if device.type == "cuda":
        yield Trainee("eager bfloat16 channels_last", ours=False, dtype=half, layout=last)
    if compile:
        chosen = {"dtype": half, "layout": last} if device.type == "cuda" else {}
        yield Trainee(f"compile {str(chosen.get('dtype', torch.float32))[6:]}", ours=False, compile=True, **chosen)
    yield Trainee("SCOATNet float32", ours=True)
    yield Trainee("SCOATNet float32 channels_last", ours=True, layout=last)
    if device.type == "cuda":
        yield Trainee("SCOATNet bfloat16 channels_last", ours=True, dtype=half, layout=last)


def run(
    device: torch.device,
    widths: Sequence[int] = (32,),
    batches: Sequence[int] = (1,),
    size: int = 512,
    steps: int = 50,
    seconds: float = 3.0,
    compile: bool = False,
    commit: str = "",
    output: Path | None = None,
) -> dict:
    """Measures, printing each row as it is done, and writes ``output`` anew after each.

    Returns:
        What the file holds: the machine, and ``rows`` with ``name, width, batch, size, dtype, ms_per_step,
        images_per_s, ratio_to_eager, peak_mib, error, curve_gap, losses, reason``. ``losses`` are those of ``steps``
        steps; the ratio is to eager float32; the peak is that of a step, beside weights and optimizer on a CPU and with
        them on a GPU. Numbers are null where ``reason`` is not.
    """
    if output is not None:
        check_output(output)
    result = {**facts(device, commit), "rows": []}
    print(COLUMNS)
    for width in widths:
        for batch in batches:
            torch.manual_seed(0)
            start = SCOATNet(width=width)
            failed: str | None = None
            try:
                images, masks = (t.to(device) for t in slices(batch * 4, size))
                baseline = baseline_of(start).double().to(device).train()
                exact = _gradient(baseline, _checked(images, batch).double(), _checked(masks, batch))
            except Exception as failure:  # without what to check against there is no number
                failed = reason_of(failure)
            first: dict | None = None
            for trainee in trainees(device, compile):
                row = {"name": trainee.name, "width": width, "batch": batch, "size": size}
                row |= {"dtype": str(trainee.dtype)[6:]}
                if failed is None:
                    curve = first and first["losses"]
                    row |= measure(trainee, start, images, masks, batch, exact, curve, steps, seconds)
                else:
                    row |= dict.fromkeys(MEASURED) | {"reason": failed}
                first = first or row
                both = row["ms_per_step"] is not None and first["ms_per_step"] is not None
                row["ratio_to_eager"] = first["ms_per_step"] / row["ms_per_step"] if both else None
                result["rows"].append(row)
                print(line(row), flush=True)
                if output is not None:
                    save(output, result)
    return result


def measure(
    trainee: Trainee,
    start: SCOATNet,
    images: Tensor,
    masks: Tensor,
    batch: int,
    exact: Tensor,
    curve: list[float] | None,
    steps: int,
    seconds: float,
) -> dict:
    """Checks, then times. ``exact``: the gradient of the first images; ``curve``: the losses to keep to."""
    row: dict = dict.fromkeys(MEASURED)
    try:
        if images.is_cuda:
            torch.cuda.empty_cache()  # of the trainee before
        net, _ = _prepared(trainee, start, images.device)
        with _autocast(trainee, images.device):
            some = _checked(images, batch).contiguous(memory_format=trainee.layout)
            gradient = _gradient(net, some, _checked(masks, batch))
        row["error"] = ((gradient - exact).norm() / exact.norm()).item()
        if not row["error"] <= BOUND[trainee.dtype]:
            row["reason"] = f"its gradient's error is {row['error']:.1e}, allowed is {BOUND[trainee.dtype]:.0e}"
            return row
        _, step = _prepared(trainee, start, images.device)  # the check has moved running statistics
        batches = list(zip(images.split(batch), masks.split(batch), strict=True))
        row["losses"] = [step(*batches[k % len(batches)]) for k in range(steps)]
        if curve is not None:
            row["curve_gap"] = max(abs(a - b) for a, b in zip(row["losses"], curve, strict=True)) / curve[0]
            if not row["curve_gap"] <= CURVE_BOUND:
                row["reason"] = f"its losses lie {row['curve_gap']:.1e} from eager's, allowed is {CURVE_BOUND:g}"
                return row
        row["peak_mib"] = peak_bytes(lambda: step(*batches[0]), images.device) / 2**20
        row["ms_per_step"] = median_ms(lambda: step(*batches[0], wait=False), images.device, seconds)
        row["images_per_s"] = 1000 * batch / row["ms_per_step"]
    except Exception as failure:  # out of memory, say: the other rows keep their numbers
        row["reason"] = reason_of(failure)
    return row


def slices(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Grey noise with brighter discs [N, 1, size, size] in 0..1, and masks of the discs: something to learn."""
    generator = torch.Generator().manual_seed(1)
    centre, radius = torch.rand(2, count, 1, 1, 1, generator=generator) * size, size / 8
    at = torch.arange(size)
    masks = ((at[:, None] - centre[0]) ** 2 + (at[None, :] - centre[1]) ** 2 < radius**2).float()
    return (torch.rand(count, 1, size, size, generator=generator) * 0.5 + masks * 0.4), masks


def passed(result: dict) -> bool:
    """Whether every row of a run has its time."""
    return all(row["reason"] is None for row in result["rows"])


def line(row: dict) -> str:
    """One row, with the reason at the end where there is no time."""
    numbers = (("ms_per_step", 11, ".1f"), ("images_per_s", 10, ".2f"), ("ratio_to_eager", 9, ".2f"),
               ("peak_mib", 10, ".0f"), ("error", 9, ".1e"), ("curve_gap", 9, ".1e"))  # fmt: skip
    cells = "".join(f"{'-' if row[name] is None else format(row[name], how):>{wide}}" for name, wide, how in numbers)
    reason = f"  no time: {row['reason']}" if row["reason"] else ""
    return f"{row['name']:36}{row['width']:>6}{row['batch']:>6}{cells}{reason}"


def _prepared(trainee: Trainee, start: SCOATNet, device: torch.device) -> tuple[nn.Module, Callable]:
    """The network at its start, and a step that trains it and returns its loss; None without ``wait``."""
    if trainee.ours:
        net: nn.Module = SCOATNet(width=start.width)
        net.load_state_dict(start.state_dict())
    else:
        net = baseline_of(start)
    net = net.to(device, memory_format=trainee.layout).train()
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE)
    if trainee.compile:
        torch._dynamo.reset()
        called: Callable = torch.compile(net, fullgraph=True, dynamic=False)
    else:
        called = net

    def step(images: Tensor, masks: Tensor, wait: bool = True) -> float | None:
        with _autocast(trainee, device):
            logits = called(images.contiguous(memory_format=trainee.layout))
        loss = hybrid_loss(logits, masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item() if wait else None

    return net, step


def _checked(x: Tensor, batch: int) -> Tensor:
    """Of the images or masks of a run, those of the gradient that is checked: of the first batch."""
    return x[: min(batch, CHECKED)]


def _gradient(net: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    """Of all parameters, by their names, in float64."""
    hybrid_loss(net(images), masks).backward()
    return torch.cat([parameter.grad.double().flatten() for _, parameter in sorted(net.named_parameters())])


def _autocast(trainee: Trainee, device: torch.device) -> contextlib.AbstractContextManager:
    if trainee.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, trainee.dtype)
