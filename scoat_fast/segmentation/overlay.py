"""Pictures of a result: a contact sheet of slices with contours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILES, COLUMNS = 12, 4
TILE = 300  # pixels of the longer side
FOUND, TRUTH = (0, 220, 255), (255, 60, 60)  # cyan and red, as in figure 4 of the paper
TEXT, BAR = (235, 235, 235), 24
MARGIN = 0.03  # around the body, of the side
BODY = 0.4  # grey value: soft tissue is brighter in any lung window


def contact_sheet(
    greys: Sequence[np.ndarray],
    mask: np.ndarray,
    spacing: tuple[float, float],
    title: str,
    truth: np.ndarray | None = None,
) -> Image.Image:
    """Slices with the contours of a mask, from the head down, under one line of text.

    Args:
        greys: slices [H, W] in 0..1; only those that are shown are looked at.
        mask: the same shape; its contours are cyan. Slices with opacity are shown first of all.
        spacing: mm between rows and columns, which gives the tiles their shape.
        truth: a second mask, in red.
    """
    seen = mask.astype(bool) if truth is None else mask.astype(bool) | truth.astype(bool)
    shown = _choose(seen)
    pictures = {k: greys[k] for k in shown}
    crop = _body(np.stack(list(pictures.values())))
    size = _tile_size(crop, spacing)
    columns = min(COLUMNS, len(shown))
    tiles = [_tile(pictures[k][crop], size, mask[k][crop], None if truth is None else truth[k][crop]) for k in shown]
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * size[0], BAR + rows * (size[1] + BAR)))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((6, 5), title, TEXT, font)
    for place, (k, tile) in enumerate(zip(shown, tiles, strict=True)):
        x, y = place % columns * size[0], BAR + place // columns * (size[1] + BAR)
        sheet.paste(tile, (x, y))
        if len(greys) > 1:
            draw.text((x + 6, y + size[1] + 4), f"slice {k + 1} of {len(greys)}, from the feet", TEXT, font)
    return sheet


def _choose(seen: np.ndarray) -> list[int]:
    """Up to ``TILES`` slices, from the head down: evenly among those with opacity, then among the others."""
    involved = np.flatnonzero(seen.any(axis=(1, 2)))
    chosen = set(_evenly(involved, TILES))
    others = np.setdiff1d(np.arange(len(seen)), list(chosen))
    return sorted(chosen | set(_evenly(others, TILES - len(chosen))), reverse=True)


def _evenly(numbers: np.ndarray, most: int) -> list[int]:
    if len(numbers) <= most:
        return [int(n) for n in numbers]
    return [int(numbers[i]) for i in np.linspace(0, len(numbers) - 1, most).round().astype(int)]


def _body(greys: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns that hold more than air."""
    bright = (greys > BODY).any(axis=0)
    box = []
    for axis in (1, 0):
        found, length = np.flatnonzero(bright.any(axis=axis)), bright.shape[1 - axis]
        if len(found) < max(length // 8, 1):
            box.append(slice(0, length))
            continue
        margin = round(MARGIN * length)
        box.append(slice(max(int(found[0]) - margin, 0), min(int(found[-1]) + 1 + margin, length)))
    return box[0], box[1]


def _tile_size(crop: tuple[slice, slice], spacing: tuple[float, float]) -> tuple[int, int]:
    """Width and height in pixels of a tile, as the body really is."""
    height, width = ((part.stop - part.start) * mm for part, mm in zip(crop, spacing, strict=True))
    scale = TILE / max(height, width)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _tile(grey: np.ndarray, size: tuple[int, int], mask: np.ndarray, truth: np.ndarray | None) -> Image.Image:
    picture = Image.fromarray((grey * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    pixels = np.stack([np.asarray(picture)] * 3, axis=-1)
    for area, colour in ((truth, TRUTH), (mask, FOUND)):
        if area is not None:
            pixels[contour(area.astype(bool), size)] = colour
    return Image.fromarray(pixels)


def contour(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The one-pixel outline of a mask [H, W] in a picture of ``size`` (width, height): [height, width] bool."""
    large = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    around = np.pad(large, 1)
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return large & ~inner
