"""How far is ours from the published number?  Errors, and tables of published, ours and error for a terminal."""

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["error_percent", "error_text", "mean_absolute_error_percent", "text_table"]


def error_percent(ours: float | None, published: float | None) -> float | None:
    """`100 (ours - published) / published`; None where either is missing or nothing (0) was published."""
    if ours is None or not published:
        return None
    return 100 * (ours - published) / published


def mean_absolute_error_percent(ours: Sequence[float | None], published: Sequence[float | None]) -> float | None:
    """Mean of |error| over the pairs that have one; None if none has."""
    errors = [error_percent(a, b) for a, b in zip(ours, published, strict=True)]
    found = [abs(error) for error in errors if error is not None]
    return float(np.mean(found)) if found else None


def error_text(ours: float | None, published: float | None) -> str:
    """`+3.2%`, `-12%`, `0.0%`; empty where there is no error to tell."""
    error = error_percent(ours, published)
    if error is None:
        return ""
    text = f"{error:+.1f}%" if abs(error) < 9.95 else f"{error:+.0f}%"
    return "0.0%" if text in ("+0.0%", "-0.0%") else text


def text_table(columns: Mapping[str, Sequence]) -> str:
    """Columns under their names: texts to the left, numbers to the right with four digits, `-` for None."""
    cells = {name: [_cell(value) for value in values] for name, values in columns.items()}
    widths = {name: max(len(name), *map(len, texts)) for name, texts in cells.items()}
    is_text = {name: all(isinstance(value, str) for value in values) for name, values in columns.items()}
    lines = []
    for row in (
        {name: name for name in cells},
        *(dict(zip(cells, r, strict=True)) for r in zip(*cells.values(), strict=True)),
    ):
        parts = [text.ljust(widths[name]) if is_text[name] else text.rjust(widths[name]) for name, text in row.items()]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool() | str():
            return str(value)
        case int() | float():
            return f"{value:,.0f}" if abs(value) >= 1e4 or value == round(value) else f"{value:,.4g}"
    raise TypeError(f"cell {value!r} must be a number, a text or None")
