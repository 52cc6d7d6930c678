"""How far is ours from the published number?  Errors, and tables of published, ours and error for a terminal."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = [
    "error_percent",
    "error_text",
    "mean_absolute_error_percent",
    "prediction_table",
    "text_table",
    "wrong_orders",
]


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


def wrong_orders(
    groups: Sequence[str], ours: Mapping[str, Sequence[float]], published: Mapping[str, Sequence[float]]
) -> list[str]:
    """Pairs of series whose order in a group is not the published one: `512-0: Non-overlap faster than NanoFlow`.

    Series that only `published` has count on both sides: what others measured is not predicted.
    """
    both = dict(published) | dict(ours)
    found = []
    for i, group in enumerate(groups):
        for a, b in itertools.combinations(both, 2):
            order, should_be = (_order(by[a][i], by[b][i]) for by in (both, published))
            if (a in ours or b in ours) and order != should_be:
                found.append(f"{group}: {a} {order} {b}")
    return found


def _order(a: float, b: float) -> str:
    """As numbers; what rounding may have parted is one number."""
    if math.isclose(a, b, rel_tol=1e-6):
        return "as fast as"
    return "faster than" if a > b else "slower than"


def prediction_table(
    names: Mapping[str, Sequence[str]],
    published: Sequence[float],
    by_hand: Sequence[float],
    searched: Sequence[float | None],
) -> str:
    """A row per prediction with the published number and both pipelines' errors; below, the mean absolute errors."""
    columns: dict[str, Sequence] = {**names, "published": published}
    lines = []
    for label, rates in (("by hand", by_hand), ("searched", searched)):
        errors = [error_text(*pair) for pair in zip(rates, published, strict=True)]
        columns |= {f"{label} (simulated)": rates, f"error, {label}": errors}
        error = mean_absolute_error_percent(rates, published)
        lines.append(f"mean absolute error, {label}: {error:.1f} %")
    return "\n".join([text_table(columns), *lines])


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
