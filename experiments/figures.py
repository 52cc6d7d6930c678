"""How does a figure of the paper look beside ours?  Heatmaps, grouped bars and lines that keep the origins apart.

Grey is what was published, blue what a model computes, orange what a clock measured, green what a compiler said; several
series of one origin differ in lightness and hatching (bars) or marker (lines).  Errors against the published value are
printed beside each number of ours.  Everything drawn comes from a record's series; nothing is computed here but errors.
"""

import dataclasses
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from experiments.comparison import error_text
from experiments.plots import BLUE, DPI, GREEN, INK, MARKERS, MUTED, ORANGE, STYLE, VERMILION

__all__ = ["ORIGIN_COLORS", "Bars", "Line", "grouped_bars", "heatmap", "line_chart", "sources_of"]

ORIGIN_COLORS = {"published": "#8a8a8a", "simulated": BLUE, "measured": ORANGE, "compiled": GREEN}
HATCHES = ("", "//", "..", "xx", "\\\\", "++")
LINE_STYLES = ("solid", (0, (5, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))


@dataclasses.dataclass(frozen=True)
class Bars:
    """One bar per group.    against: label of the bars whose values its errors are counted from."""

    label: str
    origin: str
    values: Sequence[float | None]
    against: str | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """Points joined by lines, or not.    panel: title of the panel that it is drawn in."""

    label: str
    origin: str
    x: Sequence[float]
    y: Sequence[float]
    panel: str = ""
    joined: bool = True
    marked: bool = True


def sources_of(record: Mapping[str, Any]) -> list[str]:
    """What stands under a figure's title: `config["published_source"]` if there is one, then this run's origin."""
    commit, _, dirty = record["commit"].partition("-")
    commit = commit if commit == "unknown" else commit[:9] + (" (changed)" if dirty else "")
    device = f" on {record['device']['name']}" if record["origin"] == "measured" else ""
    ours = f"{record['origin']}: {record['experiment']}{device}, commit {commit}"
    published = record["config"].get("published_source")
    return ([f"published: {published}"] if published else []) + [ours]


def grouped_bars(
    title: str,
    sources: Sequence[str],
    groups: Sequence[str],
    bars: Sequence[Bars],
    path: str | os.PathLike[str],
    *,
    y_label: str,
    notes: Sequence[str] = (),
    reference_lines: Mapping[str, float] | None = None,
    digits: int = 0,
) -> pathlib.Path:
    """Groups of bars, each with its value, and with its error where it has something to count against.

    reference_lines: label -> value, dashed across (3 at most).    digits: after the point, of the values.
    Raises ValueError when bars differ in number from `groups`, or count against bars that are not there.
    """
    values_of = {one.label: one.values for one in bars}
    for one in bars:
        if len(one.values) != len(groups):
            raise ValueError(f"{one.label!r} has {len(one.values)} values for {len(groups)} groups")
        if one.against is not None and one.against not in values_of:
            raise ValueError(f"{one.label!r} counts against {one.against!r}, which is none of {', '.join(values_of)}")
    width_inches = float(np.clip(1.3 + 0.31 * len(groups) * (len(bars) + 0.7), 8.0, 14.0))
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(title, sources, notes, width_inches, 4.0)
        width = 0.86 / len(bars)
        is_narrow = (width_inches - 1.3) / len(groups) * width < 0.5
        highest = max((v for one in bars for v in one.values if v is not None), default=1.0)
        handles: list[Artist] = []
        for i, (one, (color, hatch)) in enumerate(zip(bars, _bar_styles(bars), strict=True)):
            x = np.arange(len(groups)) + (i - (len(bars) - 1) / 2) * width
            heights = [0.0 if value is None else value for value in one.values]
            axes.bar(x, heights, width * 0.92, color=color, hatch=hatch, edgecolor="white", linewidth=0.6)
            handles.append(Patch(facecolor=color, hatch=hatch, edgecolor="white", label=f"{one.label} ({one.origin})"))
            reference = values_of.get(one.against or "", [None] * len(groups))
            for at, value, published in zip(x, one.values, reference, strict=True):
                if value is not None:
                    parts = [f"{value:,.{digits}f}", error_text(value, published)]
                    text = ("  " if is_narrow else "\n").join(filter(None, parts if is_narrow else reversed(parts)))
                    axes.annotate(
                        text, (at, value), xytext=(0, 3), textcoords="offset points", ha="center", va="bottom",
                        fontsize=8, rotation=90 if is_narrow else 0, color=_text_color(one.origin), linespacing=1.1,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},  # no line runs through a number
                    )  # fmt: skip
        top = highest * (1.4 if is_narrow else 1.16)
        for (label, value), style in zip((reference_lines or {}).items(), LINE_STYLES[1:], strict=False):
            handles.append(axes.axhline(value, color=INK, linewidth=1.1, linestyle=style, zorder=0.9, label=label))
            top = max(top, 1.08 * value)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_ylim(0, top)
        _label_y(axes, y_label)
        _legend(axes, handles)
        return _save(figure, path)


def heatmap(
    title: str,
    sources: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    published: Sequence[Sequence[float]],
    ours: Sequence[Sequence[float]],
    path: str | os.PathLike[str],
    *,
    digits: int | None = None,
    notes: Sequence[str] = (),
    x_label: str = "",
    is_colored: bool = True,
    origin: str = "simulated",
) -> pathlib.Path:
    """A cell per pair: published above, ours below.  The last column has each row's largest difference.

    digits: after the point; if None, of each cell as many as the published number has.
    is_colored: shades by ours, white at 1, red above, blue below.
    A cell whose numbers differ as printed has a red frame.  Raises ValueError when the grids are not of that shape.
    """
    theirs, mine = np.asarray(published, float), np.asarray(ours, float)
    if theirs.shape != (len(rows), len(columns)) or mine.shape != theirs.shape:
        raise ValueError(
            f"{len(rows)} rows and {len(columns)} columns, but values of shape {theirs.shape} and {mine.shape}"
        )
    width_inches = max(8.0, 1.9 + 0.62 * (len(columns) + 1.4))
    bare: dict[Any, Any] = {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}
    with matplotlib.rc_context(STYLE | bare):
        figure, (axes,) = _figure(title, sources, notes, width_inches, 0.46 * len(rows) + 0.9)
        if is_colored:
            limit = max(mine.max(), 1 / mine.min())
            axes.imshow(mine, cmap="RdBu_r", norm=LogNorm(1 / limit, limit), aspect="auto", alpha=0.42)
        for i, j in np.ndindex(mine.shape):
            places = len(f"{theirs[i, j]:.12g}".partition(".")[2]) if digits is None else digits
            texts = [f"{grid[i, j]:,.{places}f}" for grid in (theirs, mine)]
            for text, shift, color in zip(texts, (-0.2, 0.2), (INK, _text_color(origin)), strict=True):
                axes.text(j, i + shift, text, ha="center", va="center", fontsize=9, color=color)
            if texts[0] != texts[1]:
                axes.add_patch(
                    Rectangle((j - 0.47, i - 0.46), 0.94, 0.92, fill=False, edgecolor=VERMILION, linewidth=1.3)
                )
        largest = np.abs(mine - theirs).max(axis=1)
        for i, difference in enumerate(largest):
            text = f"{difference:.2g}" if is_colored else f"{np.abs(mine[i] / theirs[i] - 1).max():.1%}"
            axes.text(len(columns) + 0.2, i, text, ha="center", va="center", fontsize=9, color=MUTED)
        axes.set_xlim(-0.5, len(columns) + 0.9)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        heading = "largest\ndifference" if is_colored else "largest\nerror"
        axes.set_xticks([*range(len(columns)), len(columns) + 0.2], [*columns, heading], fontsize=9.5)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_xlabel(x_label)
        handles = [
            Patch(facecolor="none", edgecolor="none", label="upper number: published"),
            Patch(facecolor="none", edgecolor="none", label=f"lower number: {origin}"),
            Patch(facecolor="none", edgecolor=VERMILION, label="differ as printed"),
        ]
        _legend(axes, handles)
        for text, color in zip(axes.get_legend().get_texts(), (INK, _text_color(origin), INK), strict=True):  # pyright: ignore[reportOptionalMemberAccess]
            text.set_color(color)
        return _save(figure, path)


def line_chart(
    title: str,
    sources: Sequence[str],
    lines: Sequence[Line],
    path: str | os.PathLike[str],
    *,
    x_label: str | Sequence[str],
    y_label: str | Sequence[str],
    notes: Sequence[str] = (),
    horizontal: Mapping[str, float] | None = None,
    is_log: tuple[bool, bool] = (False, False),
    y_max: float | None = None,
) -> pathlib.Path:
    """Lines in one panel, or side by side in one per `Line.panel`, in order of appearance.

    x_label, y_label: of all panels, or one for each.
    horizontal: label -> value, dashed across.    is_log: of x and y.    y_max: top of the axis, if not what is needed.
    Raises ValueError without lines.
    """
    if not lines:
        raise ValueError("line_chart needs at least 1 line, got 0")
    panels = list(dict.fromkeys(line.panel for line in lines))
    with matplotlib.rc_context(STYLE):
        rows_of_legend = max(sum(line.panel == panel for line in lines) for panel in panels) / (1 + (len(panels) == 1))
        height = 3.7 + 0.19 * rows_of_legend
        figure, all_axes = _figure(title, sources, notes, max(8.0, 4.6 * len(panels)), height, len(panels))
        x_labels, y_labels = ([text] * len(panels) if isinstance(text, str) else text for text in (x_label, y_label))
        for axes, panel, x_text, y_text in zip(all_axes, panels, x_labels, y_labels, strict=True):
            own = [line for line in lines if line.panel == panel]
            for line, (color, style, marker) in zip(own, _line_styles(own), strict=True):
                axes.plot(
                    line.x, line.y, color=color, linestyle=style if line.joined else "none",
                    marker=marker if line.marked else "", markersize=6, label=f"{line.label} ({line.origin})",
                    markerfacecolor=color if line.joined else "white", markeredgewidth=1.4,
                )  # fmt: skip
            axes.set_xscale("log" if is_log[0] else "linear")
            axes.set_yscale("log" if is_log[1] else "linear")
            for axis in (axis for axis, chosen in zip((axes.xaxis, axes.yaxis), is_log, strict=True) if chosen):
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
                axis.set_minor_locator(NullLocator())
            for label, value in (horizontal or {}).items():
                axes.axhline(value, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
                axes.annotate(
                    label, (0.01, value), xycoords=("axes fraction", "data"), xytext=(0, 4),
                    textcoords="offset points", fontsize=9, color=MUTED,
                )  # fmt: skip
            if not is_log[0]:
                axes.set_xlim(left=0)
            if not is_log[1]:
                axes.set_ylim(0, y_max)
                _label_y(axes, y_text)
            axes.set_ylabel(y_text)
            axes.set_xlabel(x_text)
            axes.set_title(panel, fontsize=11, loc="left", fontweight="bold")
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.17), fontsize=8.5, ncols=2 if len(panels) == 1 else 1
            )
        return _save(figure, path)


def _figure(
    title: str, sources: Sequence[str], notes: Sequence[str], width: float, height: float, num_panels: int = 1
) -> tuple[Figure, list[Axes]]:
    """Panels side by side under a bold title and grey sources, over grey notes; sizes in inches."""
    columns = int(width * 15)
    titles = textwrap.wrap(title, int(width * 9.4))
    above = [line for source in sources for line in textwrap.wrap(source, columns, subsequent_indent="    ")]
    below = [line for note in notes for line in textwrap.wrap(f"• {note}", columns, subsequent_indent="   ")]
    title_bottom = 0.18 + 0.24 * len(titles)
    head, foot = title_bottom + 0.08 + 0.18 * len(above), (0.12 + 0.165 * len(below)) if below else 0.0
    total = head + height + foot
    layout = ConstrainedLayoutEngine(rect=(0, foot / total, 1, height / total), h_pad=0.06, w_pad=0.08)
    figure = Figure(figsize=(width, total), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    figure.text(0.12 / width, 1 - 0.12 / total, "\n".join(titles), fontsize=13.5, fontweight="bold", va="top")
    figure.text(
        0.12 / width, 1 - title_bottom / total, "\n".join(above), fontsize=9, color=MUTED, va="top", linespacing=1.4
    )
    figure.text(0.12 / width, 0.08 / total, "\n".join(below), fontsize=8.5, color=MUTED, va="bottom", linespacing=1.35)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def _bar_styles(bars: Sequence[Bars]) -> list[tuple[Any, str]]:
    """Colour and hatch: the origin's colour, paler and hatched for each further series of that origin."""
    seen: dict[str, int] = {}
    styles = []
    for one in bars:
        rank = seen.get(one.origin, 0)
        seen[one.origin] = rank + 1
        styles.append((_paler(ORIGIN_COLORS[one.origin], 0.22 * (rank % 4)), HATCHES[rank % len(HATCHES)]))
    return styles


def _line_styles(lines: Sequence[Line]) -> list[tuple[Any, Any, str]]:
    seen: dict[str, int] = {}
    styles = []
    for line in lines:
        rank = seen.get(line.origin, 0)
        seen[line.origin] = rank + 1
        color = _paler(ORIGIN_COLORS[line.origin], 0.18 * (rank % 4))
        styles.append((color, LINE_STYLES[rank % len(LINE_STYLES)], MARKERS[rank % len(MARKERS)]))
    return styles


def _paler(color: str, fraction: float) -> tuple[float, float, float]:
    """The colour, mixed with that much white."""
    red, green, blue = (channel + (1 - channel) * fraction for channel in to_rgb(color))
    return red, green, blue


def _text_color(origin: str) -> str:
    return {"published": INK, "measured": "#9a6700"}.get(origin, ORIGIN_COLORS[origin])


def _label_y(axes: Axes, y_label: str) -> None:
    axes.set_ylabel(y_label)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    if axes.get_ylim()[1] >= 1000:
        axes.yaxis.set_major_formatter("{x:,.0f}")


def _legend(axes: Axes, handles: Sequence[Artist]) -> None:
    """Above the panel, in at most 4 columns, as many as the figure is wide enough for."""
    widest_inches = 0.55 + 0.07 * max(len(str(handle.get_label())) for handle in handles)
    num_columns = max(1, min(len(handles), 4, int(axes.get_figure(root=True).get_figwidth() / widest_inches)))  # pyright: ignore[reportOptionalMemberAccess]
    axes.legend(
        handles=list(handles), loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=num_columns, borderaxespad=0.2, fontsize=9
    )  # fmt: skip


def _save(figure: Figure, path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
