"""Which numbers has the NanoFlow paper, or its repository, printed?  Typed access to `published.json`.

Each item names its source; `certainty` says how it got here: paper (printed there), repo (in a file of the authors'
repository), derived (computed from their files), read_from_image (off a plot).  Units end the names of columns and values.
Models, accelerators and data sets have the names that `PRESETS`, `PAPER_TABLE_1` and `PAPER_TABLE_4` give them.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

__all__ = ["Grid", "Scalars", "Table", "grid", "scalars", "table"]

PATH = pathlib.Path(__file__).with_name("published.json")


@dataclasses.dataclass(frozen=True)
class Item:
    """Where numbers come from, and what to know about them (contradictions in print, too)."""

    source: str
    certainty: str
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Grid(Item):
    """A number for each pair of `rows` and `columns`."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    def at(self, row: str, column: str) -> float:
        """One number.  Raises ValueError naming what there is."""
        if row not in self.rows or column not in self.columns:
            raise ValueError(
                f"no ({row!r}, {column!r}) here: rows {', '.join(self.rows)}; columns {', '.join(self.columns)}"
            )
        return self.values[self.rows.index(row)][self.columns.index(column)]


@dataclasses.dataclass(frozen=True)
class Table(Item):
    """Columns of equal length, texts or numbers."""

    columns: Mapping[str, tuple]

    def rows(self) -> list[dict[str, Any]]:
        """The same, by row."""
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]


@dataclasses.dataclass(frozen=True)
class Scalars(Item):
    """Single numbers by name."""

    values: Mapping[str, float]


def grid(name: str) -> Grid:
    """An item of kind grid: fig02, fig03, fig07, fig08_crossings, fig09.  Raises ValueError naming the grids."""
    item = _item(name, "grid")
    return Grid(*_origin(item), tuple(item["rows"]), tuple(item["columns"]), tuple(map(tuple, item["values"])))


def table(name: str) -> Table:
    """An item of kind table: table1 to table4, fig11, fig08_vLLM ...  Raises ValueError naming the tables."""
    item = _item(name, "table")
    return Table(*_origin(item), {column: tuple(values) for column, values in item["columns"].items()})


def scalars(name: str) -> Scalars:
    """An item of kind scalars: eq5, fig10, released_stage1 ...  Raises ValueError naming them."""
    item = _item(name, "scalars")
    return Scalars(*_origin(item), item["values"])


@functools.cache
def _items() -> dict[str, Any]:
    return json.loads(PATH.read_text(encoding="utf-8"))


def _item(name: str, kind: str) -> dict[str, Any]:
    known = [key for key, item in _items().items() if item["kind"] == kind]
    if name not in known:
        raise ValueError(f"nothing published is a {kind} named {name!r}: {', '.join(known)}")
    return _items()[name]


def _origin(item: Mapping[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    return item["source"], item["certainty"], tuple(item.get("notes", ()))
