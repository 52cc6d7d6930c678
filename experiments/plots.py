"""How do records look?  Figures from records only; nothing is measured here.

    python -m experiments.plots experiments/results/*.json --out=experiments/figures

draws, next to each other, whatever a record has series for: `timeline`, `latency`, `sweep`.  Every figure states
where its numbers come from (measured, compiled, simulated, published), on what, and at which commit.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from absl import app, flags
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

from experiments.record import read_record

__all__ = ["draw", "plot_latency", "plot_sweep", "plot_timeline"]

Record = Mapping[str, Any]

# Okabe and Ito's palette: distinct with every common kind of colour blindness.  Lines also differ in marker.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
LINE_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, MUTED, GRID = "#222222", "#6b6b6b", "#e6e6e6"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 11, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": "#b0b0b0", "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "legend.frameon": False, "legend.fontsize": 10, "legend.handlelength": 1.6, "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.4, "xtick.major.pad": 6, "xtick.major.size": 0, "ytick.major.size": 0,
    "lines.linewidth": 2.0, "figure.facecolor": "white",
}  # fmt: skip
DASHED = (0, (4, 3))
DPI = 160
WIDTH_INCHES = 8.0
ACRONYMS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "end-to-end", "kv": "KV"}
UNITS = {
    "tokens_per_s": "tokens / s", "s_per_token": "s / token", "per_s": "1 / s", "s": "s", "bytes": "bytes",
    "flops": "FLOP/s", "fraction": "fraction",
}  # fmt: skip


def plot_timeline(record: Record, path: str | os.PathLike[str]) -> pathlib.Path:
    """Throughput and occupancy over time: tokens/s (decode and prefill, stacked), requests, KV pages.

    Reads `series["timeline"]` as `nanojax.metrics.step_series` makes it; draws the page pool's size where `config` has
    `num_pages`, and the mean throughput where `metrics` has `total_tokens_per_s`.
    """
    table = _table(record, "timeline")
    time_s = table["time_s"]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure("Throughput and occupancy over time", [record], (2.1, 1.25, 1.25))
        top, middle, bottom = axes

        top.stackplot(
            time_s, table["decode_tokens_per_s"], table["prefill_tokens_per_s"],
            colors=[BLUE, ORANGE], labels=["decode", "prefill"], alpha=0.9, linewidth=0,
        )  # fmt: skip
        mean = record["metrics"].get("total_tokens_per_s")
        if mean is not None:
            top.axhline(mean, color=INK, linewidth=1.2, linestyle=DASHED, label=f"mean {_number(mean)} tokens / s")
        _label(top, "tokens / s")

        middle.plot(time_s, table["num_running"], color=GREEN, label="running")
        middle.plot(time_s, table["num_waiting"], color=VERMILION, linestyle=(0, (3, 1.5)), label="waiting")
        _label(middle, "requests")

        bottom.fill_between(time_s, table["pages_in_use"], color=PURPLE, alpha=0.35, linewidth=0)
        bottom.plot(time_s, table["pages_in_use"], color=PURPLE, label="in use")
        num_pages = record["config"].get("num_pages")
        if num_pages is not None:
            bottom.axhline(num_pages, color=INK, linewidth=1.2, linestyle=DASHED, label=f"pool of {num_pages:,}")
        _label(bottom, "KV pages")

        bottom.set_xlabel("time (s)")
        bottom.set_xlim(0, max(time_s) + time_s[0])
        bottom.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10]))
        return _save(figure, path)


def plot_latency(
    records: Sequence[Record],
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    slo_s_per_token: float | None = 0.2,
) -> pathlib.Path:
    """Normalized latency against request rate, one line per record, its p99 shaded above the mean where it is known.

    Reads `series["latency"]`: `request_rate_per_s`, `normalized_latency_s_per_token_mean`, optionally `..._p99`.
    `slo_s_per_token` draws the service level (the paper's is 0.2 s per token); None draws none.
    Raises ValueError without records, or with more of them than can be told apart (6).
    """
    if not records:
        raise ValueError("plot_latency needs at least 1 record, got 0")
    labels = [record["experiment"] for record in records] if labels is None else labels
    name = "normalized_latency_s_per_token"
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure("Latency against request rate", records, (3.6,))
        for record, label, (color, marker) in zip(records, labels, _line_styles(len(records)), strict=True):
            table = _table(record, "latency")
            rate, mean = table["request_rate_per_s"], _gaps(table[f"{name}_mean"])
            axes.plot(rate, mean, color=color, marker=marker, markersize=6, label=f"{label} ({record['origin']})")
            if f"{name}_p99" in table:
                axes.fill_between(rate, mean, _gaps(table[f"{name}_p99"]), color=color, alpha=0.15, linewidth=0)
        if slo_s_per_token is not None:
            axes.axhline(slo_s_per_token, color=INK, linewidth=1.2, linestyle=DASHED)
            axes.annotate(
                f"SLO: {_number(slo_s_per_token)} s / token", (0.01, slo_s_per_token), fontsize=10, color=MUTED,
                xycoords=("axes fraction", "data"), xytext=(0, 5), textcoords="offset points",
            )  # fmt: skip
        _label(axes, "normalized latency (s / token)\nmean, shaded to p99", num_ticks=7)
        axes.set_xlabel("request rate (requests / s)")
        axes.set_xlim(left=0)
        return _save(figure, path)


def plot_sweep(record: Record, metric: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """One metric against the swept flag; with two swept flags, a line per value of the first.

    Words have no order: a bar for each, markers with two flags.  Slowest and fastest of repeated runs are whiskers.

    Reads `series["sweep"]` (`experiments.sweep.sweep_series`), whose leading columns named in `config["swept"]` are the
    flags.  Raises ValueError when `metric` is not there, more than two flags were swept, or more than 6 lines result.
    """
    table = _table(record, "sweep")
    swept = list(record["config"].get("swept", []))
    if not 1 <= len(swept) <= 2:
        raise ValueError(f"config['swept']={swept} must name one or two flags to be drawn")
    for column in (*swept, metric):
        if column not in table:
            raise ValueError(f"series['sweep'] has no column {column!r}: {', '.join(table)}")
    *grouping, flag = swept
    positions, tick_labels = _positions(table[flag])
    title = _words(metric).partition(" (")[0]
    is_ordered = all(isinstance(value, int | float) for value in table[flag])
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(f"{title[:1].upper()}{title[1:]} by {flag}", [record], (3.4,))
        groups = list(dict.fromkeys(table[grouping[0]])) if grouping else [None]
        for group, (color, marker) in zip(groups, _line_styles(len(groups)), strict=True):
            rows = [i for i in range(len(positions)) if group is None or table[grouping[0]][i] == group]
            x, y = [positions[i] for i in rows], [table[metric][i] for i in rows]
            label = None if group is None else f"{grouping[0]} = {group}"
            if is_ordered or len(groups) > 1:
                line = "-" if is_ordered else "none"
                axes.plot(x, _gaps(y), color=color, marker=marker, markersize=7, label=label, linestyle=line)
            else:
                axes.bar(x, _gaps(y), 0.5, color=color)
            if len(groups) == 1:
                low, high = (table.get(f"{metric}_{end}", table[metric]) for end in ("min", "max"))
                for i in rows:
                    if table[metric][i] is not None:
                        axes.plot([positions[i]] * 2, [low[i], high[i]], color="0.35", linewidth=1.5)
                        axes.annotate(
                            _number(table[metric][i]), (positions[i], high[i]),
                            xytext=(0, 9), textcoords="offset points", ha="center", fontsize=10,
                            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0}, zorder=1.5,
                        )  # fmt: skip
        axes.set_xticks(list(tick_labels), list(tick_labels.values()))
        axes.margins(x=0.06)
        _label(axes, _words(metric), num_ticks=7)
        axes.set_xlabel(flag)
        return _save(figure, path)


def _table(record: Record, name: str) -> Mapping[str, list]:
    if name not in record["series"]:
        raise ValueError(
            f"record {record['experiment']!r} has no series {name!r}: {', '.join(record['series']) or 'none'}"
        )
    return record["series"][name]


def _figure(title: str, records: Sequence[Record], panel_inches: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A column of panels under a header: what it shows (bold), then where it comes from (grey, a line per source)."""
    sources = list(dict.fromkeys(map(_source, records)))
    header = 0.52 + 0.2 * len(sources)
    height = header + sum(panel_inches) + 0.55
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - header / height), h_pad=0.05, w_pad=0.08)
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panel_inches), 1, sharex=True, height_ratios=panel_inches, squeeze=False)[:, 0]
    figure.text(0.015, 1 - 0.14 / height, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.015, 1 - 0.46 / height, "\n".join(sources), fontsize=9.5, color=MUTED, va="top", linespacing=1.4)
    origins = list(dict.fromkeys(record["origin"] for record in records))
    figure.text(
        0.988, 1 - 0.17 / height, " and ".join(origins), fontsize=10, color=BLUE, va="top", ha="right",
        bbox={"boxstyle": "round,pad=0.35", "facecolor": "#eaf3f9", "edgecolor": "none"},
    )  # fmt: skip
    return figure, list(axes)


def _source(record: Record) -> str:
    commit, _, dirty = record["commit"].partition("-")
    commit = commit if commit == "unknown" else commit[:9] + (" (changed)" if dirty else "")
    return f"{record['experiment']}: {record['origin']}, {record['device']['name']}, commit {commit}"


def _label(axes: Axes, y_label: str, num_ticks: int = 5) -> None:
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.04)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=num_ticks, min_n_ticks=3, steps=[1, 2, 2.5, 5, 10]))
    if axes.get_ylim()[1] >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif axes.get_ylim()[1] >= 1000:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(handles), borderaxespad=0.1
        )


def _line_styles(num_lines: int) -> list[tuple[str, str]]:
    """Colour and marker of each line."""
    if num_lines > len(LINE_COLORS):
        raise ValueError(f"{num_lines} lines in one figure; at most {len(LINE_COLORS)} can be told apart")
    return [(LINE_COLORS[i], MARKERS[i]) for i in range(num_lines)]


def _positions(values: Sequence[Any]) -> tuple[list[float], dict[float, str]]:
    """Where each value sits: equal steps in order of appearance, as swept values often double; and the tick labels."""
    distinct = list(dict.fromkeys(values))
    return [float(distinct.index(value)) for value in values], {float(i): str(v) for i, v in enumerate(distinct)}


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _words(metric: str) -> str:
    """`ttft_s_p99` -> "TTFT p99 (s)"; a name of another form is kept, with spaces."""
    units = "|".join(UNITS)
    match = re.fullmatch(rf"(?P<stem>\w+?)_(?P<unit>{units})(_(?P<statistic>mean|max|p\d\d))?", metric)
    if match is None:
        return metric.replace("_", " ")
    unit = match["unit"]
    words = [ACRONYMS.get(word, word) for word in match["stem"].split("_")]
    if unit == "tokens_per_s":
        words.append("throughput")
    return f"{' '.join(filter(None, [*words, match['statistic']]))} ({UNITS[unit]})"


def _save(figure: Figure, path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.align_ylabels()
    figure.savefig(path, dpi=DPI)
    return path


def draw(record_path: str | os.PathLike[str], folder: str | os.PathLike[str], sweep_metric: str) -> list[pathlib.Path]:
    """Draws every series of a record that has a figure, as `<record>_<series>.png`; gives the files."""
    record, folder, stem = read_record(record_path), pathlib.Path(folder), pathlib.Path(record_path).stem
    drawn = []
    if "timeline" in record["series"]:
        drawn.append(plot_timeline(record, folder / f"{stem}_timeline.png"))
    if "latency" in record["series"]:
        drawn.append(plot_latency([record], folder / f"{stem}_latency.png"))
    if "sweep" in record["series"]:
        drawn.append(plot_sweep(record, sweep_metric, folder / f"{stem}_sweep.png"))
    return drawn


def main(argv: Sequence[str]) -> None:
    if len(argv) < 2:
        raise app.UsageError("name at least one record file")
    for name in argv[1:]:
        for path in draw(name, flags.FLAGS.out, flags.FLAGS.metric):
            print(path)


if __name__ == "__main__":
    # Here rather than at the top, so that experiments which import this file are free to name their flags.
    flags.DEFINE_string("out", "experiments/figures", "Folder for the figures.")
    flags.DEFINE_string("metric", "total_tokens_per_s", "Metric that is drawn for a sweep.")
    app.run(main)
