"""How does one flag become many runs?  `--sweep="page_size=8,16;num_slots=4,8"` -> points -> one table of results.

Pure functions: they run nothing.  Several flags, separated by `;`, give their cartesian product, the last one fastest.
"""

import itertools
from collections.abc import Mapping, Sequence

__all__ = ["parse_sweep", "sweep_series"]


def parse_sweep(text: str) -> list[dict[str, int | float | bool | str]]:
    """Points of a sweep, each a dict flag -> value; an empty text gives one empty point: the run as it is.

    A value is an int, else a float, else true/false, else text.  Raises ValueError naming the part that is wrong: no
    `=`, no flag name, an empty value, a flag or value given twice.
    """
    swept: dict[str, list[int | float | bool | str]] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        flag, equals, values = (piece.strip() for piece in part.partition("="))
        if not equals or not flag.isidentifier():
            raise ValueError(f"sweep {part!r}: expected flag=value,value,...")
        if flag in swept:
            raise ValueError(f"sweep {part!r}: flag {flag!r} is given twice")
        words = [word.strip() for word in values.split(",")]
        if "" in words:
            raise ValueError(f"sweep {part!r}: a value is empty")
        if len(set(words)) < len(words):
            raise ValueError(f"sweep {part!r}: a value is given twice")
        swept[flag] = [_parse_value(word) for word in words]
    return [dict(zip(swept, point, strict=True)) for point in itertools.product(*swept.values())]


def sweep_series(
    points: Sequence[Mapping[str, int | float | bool | str]], metrics: Sequence[Mapping[str, int | float | None]]
) -> dict[str, list]:
    """Columns for a record's `series["sweep"]`: swept flags, then the metrics that all points have; a row per point.

    Raises ValueError when points and metrics differ in number.
    """
    if len(points) != len(metrics):
        raise ValueError(f"{len(points)} points, but metrics of {len(metrics)} runs")
    if not points:
        return {}
    shared = [name for name in metrics[0] if all(name in run for run in metrics)]
    return {flag: [point[flag] for point in points] for flag in points[0]} | {
        name: [run[name] for run in metrics] for name in shared
    }


def _parse_value(word: str) -> int | float | bool | str:
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(word.lower(), word)
