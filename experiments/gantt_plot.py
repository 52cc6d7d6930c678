"""How does a layer's timeline look?  Bars on lanes (Gantt), and the use of each resource over time; from record series."""

import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from experiments.plots import BLUE, DPI, GREEN, INK, MUTED, ORANGE, STYLE

__all__ = ["plot_gantt", "plot_utilization"]

RESOURCE_COLORS = {"compute": BLUE, "memory": GREEN, "network": ORANGE}
WIDTH_INCHES, LANE_INCHES = 12.0, 0.72
PUBLISHED_GREY = "#8a8a8a"
# Width of an average character at 8 points, and what the axis leaves of the figure's width; inches.
CHARACTER_INCHES, AXIS_INCHES = 0.072, 10.6


def plot_gantt(
    title: str, sources: Sequence[str], table: Mapping[str, Sequence], length_s: float, path: str | os.PathLike[str]
) -> pathlib.Path:
    """Bars of one steady layer: a lane for each stream of each resource, what belongs to other layers in light colours.

    table: columns `lane`, `label`, `start_s`, `stop_s`, `resource`, `share`, `layer` (0 is the layer that is shown).
    """
    lanes = list(dict.fromkeys(sorted(table["lane"], key=lambda lane: list(RESOURCE_COLORS).index(lane.split()[0]))))
    others = {layer for layer in table["layer"] if layer != 0}
    style: dict[Any, Any] = STYLE | {"axes.grid.axis": "x"}
    with matplotlib.rc_context(style):
        figure, ((axes,),) = _figure(title, sources, WIDTH_INCHES, [LANE_INCHES * len(lanes) + 0.35], 1)
        for i, lane in enumerate(table["lane"]):
            row = {name: column[i] for name, column in table.items()}
            start_ms, width_ms = row["start_s"] * 1e3, (row["stop_s"] - row["start_s"]) * 1e3
            color, y = RESOURCE_COLORS[row["resource"]], lanes.index(lane)
            axes.barh(
                y, width_ms, left=start_ms, height=0.82, color=color, alpha=0.9 if row["layer"] == 0 else 0.4,
                edgecolor="white", linewidth=0.8,
            )  # fmt: skip
            _bar_label(axes, row, start_ms + width_ms / 2, y, width_ms / (length_s * 1e3) * AXIS_INCHES)
        axes.set_yticks(range(len(lanes)), [_lane_name(lane) for lane in lanes])
        axes.set_ylim(len(lanes) - 0.45, -0.55)
        axes.set_xlim(0, length_s * 1e3)
        axes.set_xlabel("time since the layer's first KQV (ms)")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=14, steps=[1, 2, 2.5, 5, 10]))
        used = [name for name in RESOURCE_COLORS if name in table["resource"]]
        handles = [Patch(facecolor=RESOURCE_COLORS[name], alpha=0.9, label=f"{name}-bound") for name in used]
        if others:
            words = [word for word, is_there in (("before", min(others) < 0), ("after", max(others) > 0)) if is_there]
            handles.append(Patch(facecolor=MUTED, alpha=0.4, label=f"of the layer {' or '.join(words)}"))
        axes.legend(
            handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(handles), borderaxespad=0.1
        )
        return _save(figure, path)


def plot_utilization(
    title: str,
    sources: Sequence[str],
    tables: Mapping[str, Mapping[str, Sequence]],
    published_mean: Mapping[str, tuple[str, float]],
    path: str | os.PathLike[str],
) -> pathlib.Path:
    """A column per pipeline, a row per resource: use of its peak over time, with the mean; beside it what was published.

    tables: pipeline -> columns `start_s`, `stop_s`, `compute`, `memory`, `network` (fractions, constant in between).
    published_mean: pipeline -> (resource, fraction), dashed grey in that panel.
    """
    last_us = max(table["stop_s"][-1] for table in tables.values()) * 1e6
    top = max(100.0, *(100 * value for table in tables.values() for name in RESOURCE_COLORS for value in table[name]))
    with matplotlib.rc_context(STYLE):
        figure, grid = _figure(title, sources, WIDTH_INCHES, [1.75] * len(RESOURCE_COLORS), len(tables))
        for column, (name, table) in enumerate(tables.items()):
            edges_us = [0.0, *(stop * 1e6 for stop in table["stop_s"])]
            for axes_row, (resource, color) in zip(grid, RESOURCE_COLORS.items(), strict=True):
                axes, percent = axes_row[column], [100 * value for value in table[resource]]
                axes.stairs(percent, edges_us, fill=True, color=color, alpha=0.35)
                axes.stairs(percent, edges_us, color=color, linewidth=1.3)
                lengths = [stop - start for start, stop in zip(table["start_s"], table["stop_s"], strict=True)]
                mean = sum(p * s for p, s in zip(percent, lengths, strict=True)) / sum(lengths)
                axes.plot(
                    [0, edges_us[-1]], [mean, mean], color=INK, linewidth=1.3, label=f"simulated mean {mean:.1f} %"
                )
                published = published_mean.get(name)
                if published is not None and published[0] == resource:
                    axes.axhline(
                        100 * published[1], color=PUBLISHED_GREY, linewidth=1.6, linestyle=(0, (4, 3)),
                        label=f"published mean {100 * published[1]:.1f} %",
                    )  # fmt: skip
                axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.1, fontsize=9.5)
                axes.set_ylim(0, 1.04 * top)
                axes.set_xlim(0, last_us)
                axes.set_yticks([0, 25, 50, 75, 100])
                if column == 0:
                    axes.set_ylabel(f"{resource}\n(% of peak)")
            grid[0][column].set_title(name, fontsize=11, fontweight="bold", loc="left", pad=26)
            grid[-1][column].set_xlabel("time (µs)")
        return _save(figure, path)


def _bar_label(axes: Axes, row: Mapping[str, Any], x: float, y: float, width_inches: float) -> None:
    """Name and share as they fit: side by side, one over the other, the name alone upright, or nothing."""
    share = f"R {row['share']:g}" if row["share"] < 1 else ""
    lines = [row["label"], *([share] if share else [])]
    is_dark = row["layer"] == 0 and row["resource"] != "network"
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": "white" if is_dark else INK}
    if max(map(len, lines)) * CHARACTER_INCHES + 0.06 <= width_inches:
        axes.text(x, y, "\n".join(lines), fontsize=8, linespacing=1.2, **style)
    elif width_inches >= 0.09:
        axes.text(x, y, row["label"], fontsize=7.5 if width_inches >= 0.13 else 6, rotation=90, **style)


def _lane_name(lane: str) -> str:
    resource, _, stream = lane.partition(" ")
    return f"{resource}\nstream {stream}"


def _figure(
    title: str, sources: Sequence[str], width: float, row_inches: Sequence[float], num_columns: int
) -> tuple[Figure, list[list[Axes]]]:
    """Rows of panels under a bold title and grey sources; sizes in inches."""
    lines = [line for source in sources for line in textwrap.wrap(source, int(width * 14.5))]
    header = 0.42 + 0.18 * len(lines) + 0.05
    height = header + sum(row_inches) + 0.75
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - header / height), h_pad=0.06, w_pad=0.08)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    figure.text(0.12 / width, 1 - 0.12 / height, title, fontsize=13.5, fontweight="bold", va="top")
    figure.text(0.12 / width, 1 - 0.42 / height, "\n".join(lines), fontsize=9, color=MUTED, va="top", linespacing=1.4)
    axes = figure.subplots(
        len(row_inches), num_columns, sharex=True, sharey="row", height_ratios=row_inches, squeeze=False
    )
    return figure, [list(row) for row in axes]


def _save(figure: Figure, path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
