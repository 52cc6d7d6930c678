"""What performance is a share of the device worth to kernels that run beside a GEMM?

Table and figure: NanoFlow (arXiv 2408.12757v2) Table 3 (resource share R -> performance P) and Figure 5 (interference of
GEMM and GEMV kernels); the authors' released tables; their A100 measurements of decode attention against thread blocks.
Claim: memory- and network-bound kernels reach more of their peak than their share of the device.
Command: python -m experiments.table3_fig05_interference [--curves=MEASURED.json]
Hardware: none; `--curves` takes curves measured elsewhere (`nanojax.pipeline.interference.Interference.to_json`).
Minutes: 0.1.
Expected: the printed points lie on our curves; between R = 0.2 and 0.8 nothing is printed, and three sources disagree:
at R = 0.4 decode attention has P = 0.48 (interpolated), 0.60 (released) or 0.80 (the paper's text).

    out/table3_fig05_interference.json  series `published_table3`, `simulated_<curve>`: P by R for each resource
    out/table3_fig05_interference.png   a panel for memory-bound and one for network-bound kernels
"""

import pathlib
from typing import Any

import numpy as np
from absl import flags

from experiments import comparison, figure_flags, figures, published
from experiments.record import make_record, write_record
from nanojax.pipeline.interference import PAPER_TABLE_3, PAPER_TABLE_3_AND_TEXT, RELEASED_TABLES, Interference
from nanojax.pipeline.ir import Resource

NAME = "table3_fig05_interference"
SHARES = [round(0.1 * i, 1) for i in range(11)]
CURVES = {"paper": PAPER_TABLE_3, "paper_and_text": PAPER_TABLE_3_AND_TEXT, "released": RELEASED_TABLES}
MEMORY, NETWORK = "memory-bound: decode attention", "network-bound: collectives"


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    flags.DEFINE_string("curves", None, "JSON file with measured curves, to draw beside.", flag_values=values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Computes, prints, writes the record and the figure; gives the record.  Raises ValueError for no curves."""
    printed, text = published.table("table3"), published.scalars("table3_text")
    blocks = published.table("decode_attention_blocks")
    measured = None
    if values.curves is not None:
        measured = Interference.from_json(pathlib.Path(values.curves).read_text(encoding="utf-8"))
    series = {"published_table3": {name: list(column) for name, column in printed.columns.items()}}
    series |= {f"simulated_{name}": _points(curves) for name, curves in CURVES.items()}
    if measured is not None:
        series["measured"] = _points(measured)
    differences = [
        abs(PAPER_TABLE_3.performance(resource, share) - performance)
        for resource, column in ((Resource.COMPUTE, "gemm"), (Resource.MEMORY, "gemv"), (Resource.NETWORK, "network"))
        for share, performance in zip(printed.columns["share"], printed.columns[column], strict=True)
    ]
    share = text.values["decode_attention_share"]
    metrics = {"largest_difference_fraction": max(differences)}
    metrics |= {
        f"decode_attention_performance_fraction_{name}": curves.performance(Resource.MEMORY, share)
        for name, curves in CURVES.items()
    }
    record = make_record(
        NAME, "simulated", metrics=metrics, seed=values.seed, series=series,
        config={"published_source": f"{printed.source}; {blocks.source}", "notes": [*printed.notes, *blocks.notes]},
    )  # fmt: skip
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    picture = figures.line_chart(
        "Table 3 and Figure 5: performance of a kernel that gets a share of the device", figures.sources_of(record),
        [*_published_lines(printed, text, blocks), *_our_lines(measured)], folder / f"{NAME}.png",
        x_label="resource share R", y_label="performance P (fraction of alone)", notes=[*printed.notes, *blocks.notes],
        y_max=1.05,
    )  # fmt: skip
    for name, table in series.items():
        print(f"{name}:\n{comparison.text_table(table)}\n")
    print(f"record {folder / NAME}.json, figure {picture}")
    return record


def _points(curves: Interference) -> dict[str, list[float]]:
    """P of each resource at every tenth."""
    rows = {resource.value: [curves.performance(resource, share) for share in SHARES] for resource in Resource}
    return {"share": SHARES, **rows}


def _published_lines(printed: published.Table, text: published.Scalars, blocks: published.Table) -> list[figures.Line]:
    counts = np.array(blocks.columns["thread_blocks"])
    bandwidths = np.array(blocks.columns["bandwidth_gb_per_s"])
    gemv, network = (published.table(f"released_interference_{name}").columns for name in ("gemv", "network"))
    point = ([text.values["decode_attention_share"]], [text.values["decode_attention_performance"]])
    share = printed.columns["share"]
    loose = {"origin": "published", "joined": False}
    return [
        figures.Line("Table 3", x=share, y=printed.columns["gemv"], panel=MEMORY, **loose),
        figures.Line("released table", x=gemv["share"], y=gemv["performance"], panel=MEMORY, **loose),
        figures.Line("the text's decode attention", x=point[0], y=point[1], panel=MEMORY, **loose),
        figures.Line(
            "alone, on that share of 108 thread blocks", x=(counts / 108).tolist(),
            y=(bandwidths / bandwidths[-1]).tolist(), panel=MEMORY, **loose,
        ),
        figures.Line("Table 3", x=share, y=printed.columns["network"], panel=NETWORK, **loose),
        figures.Line("released table", x=network["share"], y=network["performance"], panel=NETWORK, **loose),
    ]  # fmt: skip


def _our_lines(measured: Interference | None) -> list[figures.Line]:
    grid = np.linspace(0, 1, 101).tolist()

    def line(label: str, origin: str, curves: Interference, resource: Resource, panel: str) -> figures.Line:
        p = [curves.performance(resource, share) for share in grid]
        return figures.Line(label, origin, grid, p, panel, marked=False)

    lines = []
    for resource, panel in ((Resource.MEMORY, MEMORY), (Resource.NETWORK, NETWORK)):
        lines.append(line("Table 3, interpolated", "simulated", PAPER_TABLE_3, resource, panel))
        lines.append(line("released table, interpolated", "simulated", RELEASED_TABLES, resource, panel))
        if resource is Resource.MEMORY:
            lines.append(line("Table 3 and the text", "simulated", PAPER_TABLE_3_AND_TEXT, resource, panel))
        if measured is not None:
            lines.append(line(measured.source, "measured", measured, resource, panel))
    return lines


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
