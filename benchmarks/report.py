"""Draws the charts and writes the tables of the documents from the files under ``benchmarks/results/``.

Needs pip install '.[bench,study]'.

python benchmarks/report.py            # after new results were put there
python benchmarks/report.py --check    # fails where a document does not say what the files say
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from scoat_fast.bench.chart import draw, table
from scoat_fast.errors import ScoatFastError
from scoat_fast.study.tables import tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "study.md")
MARKED = re.compile(r"(<!-- results: (?P<name>[\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def anew(document: Path) -> str:
    """A document with its tables made anew: each stands between ``<!-- results: NAME -->`` and ``<!-- end -->``."""

    def made(found: re.Match) -> str:
        make = tables if found["name"].startswith("study") else table
        return f"{found[1]}\n{make(RESULTS / found['name']).rstrip()}\n\n{found[3]}"

    return MARKED.sub(made, document.read_text())


def main() -> int:
    if "--check" in sys.argv[1:]:
        old = [document for document in DOCUMENTS if anew(document) != document.read_text()]
        for document in old:
            print(f"{document.name}: its tables are not those of benchmarks/results; run python benchmarks/report.py")
        return 1 if old else 0
    texts = {document: anew(document) for document in DOCUMENTS}  # all, or none is written
    for document, text in texts.items():
        document.write_text(text)
    for path in sorted(path for kind in ("ops", "model", "train") for path in RESULTS.glob(f"{kind}*.json")):
        draw(path, PICTURES / f"{path.stem}.png")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ScoatFastError as error:
        raise SystemExit(f"report.py: {error}") from None
