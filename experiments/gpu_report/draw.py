"""How do the report's findings look?  Figures from the records of a folder: `python -m experiments.gpu_report.draw DIR`.

rp_curves.png    decode attention's R -> P on this card, beside the paper's and the release's
pair_ratios.png  T(pair) / (T1 + T2) by the matmul's share of the multiprocessors, a line per form
end_to_end.png   percent of optimal by pipeline, for each pair of lengths
"""

import pathlib
import sys
from typing import Any

import numpy as np

from experiments import figures
from experiments.gpu_report.results_table import rows_of
from experiments.record import read_record
from nanojax.pipeline.interference import PAPER_TABLE_3, PAPER_TABLE_3_AND_TEXT, RELEASED_TABLES, Interference
from nanojax.pipeline.ir import Resource

PUBLISHED = {
    "paper, Table 3": PAPER_TABLE_3,
    "paper, Table 3 and text": PAPER_TABLE_3_AND_TEXT,
    "released table": RELEASED_TABLES,
}


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws whatever there are records for; gives the files."""
    drawn = []
    curves = folder / "card.interference.json"
    if curves.exists() and (folder / "cta_curves.json").exists():
        drawn.append(rp_curves(Interference.from_json(curves.read_text(encoding="utf-8")), folder))
    if any(row.get("time_over_sum") for row in rows_of(folder, "pairs")):
        drawn.append(pair_ratios(folder))
    if rows_of(folder, "end_to_end"):
        drawn.append(end_to_end(folder))
    return drawn


def rp_curves(card: Interference, folder: pathlib.Path) -> pathlib.Path:
    """Decode attention's performance against its share."""
    record = read_record(folder / "cta_curves.json")
    grid = np.linspace(0, 1, 101).tolist()
    lines = [
        figures.Line(
            label, "published", grid, [curves.performance(Resource.MEMORY, share) for share in grid], marked=False
        )
        for label, curves in PUBLISHED.items()
    ]
    shares, performance = zip(*card.memory, strict=True)
    lines.append(figures.Line(record["device"]["name"], "measured", shares, performance))
    return figures.line_chart(
        "What a share of the device is worth to decode attention", _sources(record), lines, folder / "rp_curves.png",
        x_label="resource share R", y_label="performance P (fraction of alone)", y_max=1.05,
        notes=["Share of the card: what the matmul, alone on the other multiprocessors, loses; both kernels measured alone."],
    )  # fmt: skip


def pair_ratios(folder: pathlib.Path) -> pathlib.Path:
    """T(pair) over the sum of both alone, and over the longer one."""
    record = read_record(folder / "pairs.json")
    rows = [row for row in rows_of(folder, "pairs") if row.get("time_over_sum") and row.get("form")]
    panels = {"time_over_sum": "T(pair) / (T1 + T2)", "time_over_max": "T(pair) / max(T1, T2)"}
    lines = []
    for column, panel in panels.items():
        for form in dict.fromkeys(row["form"] for row in rows):
            own = sorted((row for row in rows if row["form"] == form), key=lambda row: row["num_matmul_ctas"])
            share = [row["num_matmul_ctas"] / (row["num_matmul_ctas"] + row["num_attention_ctas"]) for row in own]
            lines.append(figures.Line(form, record["origin"], share, [row[column] for row in own], panel))
    return figures.line_chart(
        "A matmul and decode attention side by side", _sources(record), lines, folder / "pair_ratios.png",
        x_label="the matmul's share of the multiprocessors", y_label="time ratio", horizontal={"": 1.0},
        notes=[str(rows[0]["job"]), "T1: the fastest matmul alone on the whole device, cuBLAS among them; T2: the fastest attention"],
    )  # fmt: skip


def end_to_end(folder: pathlib.Path) -> pathlib.Path:
    """Percent of optimal, a group for each pair of lengths, a bar for each pipeline and driver."""
    record = read_record(folder / "end_to_end.json")
    rows = rows_of(folder, "end_to_end")
    groups = list(dict.fromkeys(row["lengths"] for row in rows))
    ways = list(dict.fromkeys((row["pipeline"], row["driver"]) for row in rows))
    percent = {(row["lengths"], row["pipeline"], row["driver"]): row["percent_of_optimal"] for row in rows}
    has_one_driver = len({driver for _, driver in ways}) == 1
    bars = [
        figures.Bars(pipeline if has_one_driver else f"{pipeline}, {driver}", record["origin"], [percent.get((group, pipeline, driver)) for group in groups])
        for pipeline, driver in ways
    ]  # fmt: skip
    return figures.grouped_bars(
        f"Offline throughput in a steady state: {rows[0]['model']}", _sources(record), groups, bars,
        folder / "end_to_end.png", y_label="percent of optimal", digits=1,
        notes=["Optimal: peak FLOP/s, measured, / (2 x active parameters), the paper's Eq. 5; random weights"],
    )  # fmt: skip


def _sources(record: dict[str, Any]) -> list[str]:
    note = ["a smoke run: tiny shapes, the numbers mean nothing"] if record["config"].get("is_smoke") else []
    return [*figures.sources_of(record), *note]


if __name__ == "__main__":
    print("\n".join(f"figure {path}" for path in draw(pathlib.Path(sys.argv[1]))))
