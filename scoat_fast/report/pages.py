"""HTML pages that need nothing but themselves: styles and pictures inside, no script, no address but their own."""

from __future__ import annotations

import base64
import io
from functools import cache
from importlib import resources
from pathlib import Path

import jinja2
from PIL import Image

from ..errors import OutputError
from ..files import write_text

MARK = "<!-- a page of scoat_fast -->"  # in the first line of each: what has it may be replaced
LABELS = {
    "ml": ("Opacity", "mL"),
    "share_of_lung": ("Share of the lungs", "%"),
    "right_ml": ("Opacity, right lung", "mL"),
    "right_share": ("Share of the right lung", "%"),
    "left_ml": ("Opacity, left lung", "mL"),
    "left_share": ("Share of the left lung", "%"),
    "ground_glass_ml": ("Ground glass, -750 to -300 HU", "mL"),
    "consolidation_ml": ("Consolidation, above -300 HU", "mL"),
    "other_ml": ("Darker than -750 HU", "mL"),
    "lung_ml": ("Lung volume", "mL"),
    "lung_mask": ("Lung mask", ""),
    "hu_mean": ("Mean density of the opacity", "HU"),
    "hu_sd": ("Standard deviation", "HU"),
    "slices": ("Slices with opacity", ""),
    "voxels": ("Voxels with opacity", ""),
}
LEFT_OUT = {"mm3"}  # is the volume once more


def number(name: str, value: object) -> str:
    """A statistic as people read it, with its unit; a dash where it is not known."""
    unit = LABELS.get(name, (name, ""))[1]
    if value is None:
        return "\u2013"
    if unit == "%":
        return f"{100 * value:.1f} %"
    if isinstance(value, float):
        return f"{value:.1f} {unit}".strip()
    return f"{value} {unit}".strip()


def rows_of(statistics: dict) -> list[tuple[str, str]]:
    """Label and value of every statistic: the known ones first, and none lost."""
    known = [name for name in LABELS if name in statistics]
    rest = [name for name in statistics if name not in LABELS and name not in LEFT_OUT]
    return [(LABELS.get(name, (name, ""))[0], number(name, statistics[name])) for name in (*known, *rest)]


def picture(image: Image.Image, width: int | None = None) -> str:
    """A picture as an address that holds it; no wider than ``width``."""
    if width is not None and image.width > width:
        image = image.resize((width, max(round(image.height * width / image.width), 1)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def write_page(path: Path, template: str, **values) -> None:
    """Writes a page. Raises OutputError, also where the file is there and no page of this program."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            ours = MARK in file.readline()
    except FileNotFoundError:
        ours = True
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error
    if not ours:
        raise OutputError(path, "a file of this name is there already, and is no page of this program")
    text = _environment().get_template(template).render(mark=MARK, **values)
    write_text(path, text.encode(errors="surrogateescape").decode(errors="replace"))  # names of files may be no UTF-8


@cache
def _environment() -> jinja2.Environment:
    folder = Path(str(resources.files(__package__) / "templates"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = lambda value, name: number(name, value)
    return environment
