"""Draws the charts and writes the tables of the README from the files under ``benchmarks/results/``.

python benchmarks/report.py            # after new results were put there
python benchmarks/report.py --check    # fails where the README does not say what the files say
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from scoat_fast.bench.chart import draw, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURES, README = ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures", ROOT / "README.md"
MARKED = re.compile(r"(<!-- results: (?P<name>[\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def readme() -> str:
    """The README with its tables made anew: each stands between ``<!-- results: NAME -->`` and ``<!-- end -->``."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(RESULTS / found['name'])}\n\n{found[3]}", README.read_text())


def main() -> int:
    if "--check" in sys.argv[1:]:
        if readme() != README.read_text():
            print("README.md: its tables are not those of benchmarks/results; run python benchmarks/report.py")
            return 1
        return 0
    README.write_text(readme())
    for path in sorted([*RESULTS.glob("ops*.json"), *RESULTS.glob("model*.json")]):
        draw(path, PICTURES / f"{path.stem}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
