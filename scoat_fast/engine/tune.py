"""Tiles of the Triton kernels by measurement: on the user's own GPU, when asked, and kept in the user's cache."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ..clock import median_ms
from ..errors import ScoatFastError
from ..files import make_folder, write_text
from ..ops import _verdict
from .layout import lay_out, step_dtype, view_of
from .plan import Attend, Convolve, Plan, Step, writes

Tiles = dict[str, tuple[int, int, int]]  # pixels, warps and stages, by the key of ``triton.tile_key``
PIXELS, WARPS, STAGES = (64, 128, 256), (4, 8), (2, 3, 4, 5)
SECONDS = 0.02  # of runs, for each tile

# What the Triton backend looks into before its own table. A context variable: engines of other threads have their own.
chosen: ContextVar[Tiles] = ContextVar("chosen", default={})  # noqa: B039, never written to


def path() -> Path:
    """The file: a dict from a machine and its versions to ``Tiles``."""
    return _verdict.path().with_name("tiles.json")


def tune(
    plan: Plan,
    packed: dict[Step, dict],
    n: int,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tiles:
    """The fastest tile of every matrix product of a plan for ``n`` slices, measured where the cache does not know it.

    Tiles change which program computes a pixel, not the order of its sums: what does not give the same bits as the
    table's tile is left out.

    Raises:
        ScoatFastError: if the cache is damaged. OutputError: if it cannot be written.
    """
    import triton

    from . import triton as backend

    known = _read()
    here = known.setdefault(f"{_verdict.machine(device)} / triton {triton.__version__}", {})
    make_folder(path().parent)

    def most_parts(step: Step, height: int, width: int, device: torch.device, dtype: torch.dtype) -> int:
        """Sums have room for those of any tile: the fewer pixels, the more parts."""
        if not isinstance(step, Convolve):
            return backend.parts(step, height, width, device, dtype)
        key, table = backend.tile_key(step, width, device, dtype)
        found = []
        for pixels in {table[0], *PIXELS}:
            with using({key: (pixels, *table[1:])}):
                found.append(backend.parts(step, height, width, device, dtype))
        return max(found)

    layout = lay_out(plan, SimpleNamespace(parts=most_parts, rows=backend.rows), n, height, width, device, dtype)
    tensors = layout.tensors(torch.zeros(layout.bytes, dtype=torch.uint8, device=device))
    tensors["input"].uniform_()
    view = view_of(plan, tensors)
    for step in plan.steps:
        pixels = (height >> step.level) * (width >> step.level)

        def bound(step: Step = step, pixels: int = pixels) -> Callable[[], None]:
            return backend.bind(step, packed[step], view, pixels)

        if isinstance(step, Convolve | Attend):
            key, table = backend.tile_key(step, width >> step.level, device, step_dtype(plan, step, dtype))
            if key not in here:
                outputs = [view(used) for used in writes(step) if plan.buffers[used.buffer].kind != "sums"]
                here[key] = list(_fastest(bound, outputs, key, table, device))
                write_text(path(), json.dumps(known, indent=2) + "\n")  # at once: it may be stopped
            if getattr(step, "sums", None) is not None:
                view(step.sums).zero_()  # of other tiles
        bound()()
    return {key: tuple(tile) for key, tile in here.items()}


def _fastest(
    bound: Callable[[], Callable[[], None]],
    outputs: list[Tensor],
    key: str,
    table: tuple[int, int, int],
    device: torch.device,
) -> tuple[int, int, int]:
    """The fastest tile of one step, by pixels and warps first; ``outputs`` are left as they were."""
    from triton.runtime.errors import OutOfResources

    before = [x.clone() for x in outputs]
    times: dict[tuple[int, int, int], float] = {}
    expected: list[Tensor] = []

    def measure(tile: tuple[int, int, int]) -> None:
        _restore(outputs, before)
        with using({key: tile}), contextlib.suppress(OutOfResources):  # it does not fit into shared memory
            call = bound()
            call()
            if not expected:
                expected.extend(x.clone() for x in outputs)
            if all(_same_bits(x, y) for x, y in zip(outputs, expected, strict=True)):
                times[tile] = median_ms(call, device, SECONDS)

    measure(table)
    for tile in _others(table, [(p, w, table[2]) for p in PIXELS for w in WARPS]):
        measure(tile)
    best = min(times, key=times.__getitem__)
    for tile in _others(table, [(*best[:2], s) for s in STAGES]):
        measure(tile)
    _restore(outputs, before)
    return min(times, key=times.__getitem__)


@contextlib.contextmanager
def using(tiles: Tiles) -> Iterator[None]:
    """Within, the Triton backend takes these tiles, where they are, and not those of its table."""
    token = chosen.set(tiles)
    try:
        yield
    finally:
        chosen.reset(token)


def _others(table: tuple[int, int, int], tiles: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    return (tile for tile in tiles if tile != table)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def _restore(outputs: list[Tensor], before: list[Tensor]) -> None:
    for x, value in zip(outputs, before, strict=True):
        x.copy_(value)


def _read() -> dict[str, dict[str, list[int]]]:
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
        tiles = [tile for machine in found.values() for tile in machine.values()]
        if all(len(tile) == 3 and all(isinstance(number, int) for number in tile) for tile in tiles):
            return found
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ScoatFastError(f"{path()}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError):
        pass
    raise ScoatFastError(f"{path()}: damaged; delete it, and tiles are measured anew")
