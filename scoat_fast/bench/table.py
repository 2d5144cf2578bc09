"""Results as lines on the terminal."""

from __future__ import annotations

COLUMNS = (
    ("op", 16),
    ("implementation", 15),
    ("sample", 15),
    ("dtype", 9),
    ("layout", 14),
    ("batch", 6),
    ("direction", 9),
)
NUMBERS = (
    ("ms", "ms", 10, "{:.3f}"),
    ("gb_per_s", "GB/s", 8, "{:.0f}"),
    ("share_of_copy", "of copy", 8, "{:.0%}"),
    ("error", "error", 9, "{:.1e}"),
    ("ratio_to_eager", "x eager", 8, "{:.2f}"),
    ("ratio_to_compile", "x compile", 10, "{:.2f}"),
)


def head(result: dict) -> str:
    """The machine, the bandwidth of a copy, and the names of the columns."""
    where = f"{result['gpu']}, driver {result['driver']}" if result["gpu"] else f"CPU {result['cpu']}"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    names = "".join(f"{name:{width}}" for name, width in COLUMNS) + "".join(f"{n:>{w}}" for _, n, w, _ in NUMBERS)
    return "\n".join(
        (
            f"{where}; {versions}",
            f"commit {result['commit'] or 'unknown'}, {result['date']}",
            f"copy {result['copy_gb_per_s']:.1f} GB/s, bytes read and written together",
            names,
        )
    )


def line(row: dict) -> str:
    """One row, with "-" for what was not measured and the reason at the end."""
    names = "".join(f"{row[name]!s:{width}}" for name, width in COLUMNS)
    numbers = "".join(
        f"{'-' if row[name] is None else pattern.format(row[name]):>{width}}" for name, _, width, pattern in NUMBERS
    )
    return f"{names}{numbers}" + (f"  no time: {row['reason']}" if row["reason"] else "")
