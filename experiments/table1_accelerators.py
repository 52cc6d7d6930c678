"""Do the ratios of the paper's Table 1 follow from its sizes and rates?

Table: NanoFlow (arXiv 2408.12757v2) Table 1: 13 accelerators; memory / bandwidth, compute / bandwidth, network / memory.
Claim: compute per byte of memory traffic grew over the years, so large batches bind on compute.
Command: python -m experiments.table1_accelerators
Hardware: none.    Minutes: 0.1.
Expected: all 39 ratios within one unit in the last printed place; the paper mixes rounding and truncation.

    out/table1_accelerators.json  series `published` and `simulated`: a row per accelerator, SI units
    out/table1_accelerators.png   both, cell by cell
"""

import pathlib
from typing import Any

from absl import flags

from experiments import comparison, figure_flags, figures, published
from experiments.record import make_record, write_record
from nanojax.hardware import PAPER_TABLE_1

NAME = "table1_accelerators"
RATIOS = {
    "memory_sweep_s": ("mem_size_to_mem_bandwidth_s", "memory / bandwidth\n(s)"),
    "flops_per_byte": ("compute_to_mem_bandwidth_flop_per_byte", "compute / bandwidth\n(FLOP / byte)"),
    "network_per_memory_bandwidth_ratio": ("net_to_mem_bandwidth_ratio", "network / memory\nbandwidth"),
}


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Computes, prints, writes the record and the figure; gives the record."""
    printed = published.table("table1")
    names = list(printed.columns["accelerator"])
    specs = [PAPER_TABLE_1[name] for name in names]
    theirs = {ours: list(printed.columns[column]) for ours, (column, _) in RATIOS.items()}
    ours = {
        "memory_sweep_s": [spec.memory_sweep_s for spec in specs],
        "flops_per_byte": [spec.flops_per_byte for spec in specs],
        "network_per_memory_bandwidth_ratio": [spec.network_per_memory_bandwidth for spec in specs],
    }
    worst = max(abs(a / b - 1) for name in RATIOS for a, b in zip(ours[name], theirs[name], strict=True))
    record = make_record(
        NAME, "simulated", metrics={"num_accelerators": len(names), "largest_error_percent": 100 * worst},
        config={"published_source": printed.source, "notes": list(printed.notes)}, seed=values.seed,
        series={"published": {"accelerator": names, **theirs}, "simulated": {"accelerator": names, **ours}},
    )  # fmt: skip
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    columns = {name: [*zip(theirs[name], ours[name], strict=True)] for name in RATIOS}
    picture = figures.heatmap(
        "Table 1: what the accelerators' sizes and rates imply", figures.sources_of(record), names,
        [label for _, label in RATIOS.values()],
        [[columns[name][i][0] for name in RATIOS] for i in range(len(names))],
        [[columns[name][i][1] for name in RATIOS] for i in range(len(names))],
        folder / f"{NAME}.png", notes=printed.notes, is_colored=False,
    )  # fmt: skip
    print(comparison.text_table({"accelerator": names, **ours}))
    print(f"largest error against the printed ratios: {100 * worst:.1f} %")
    print(f"record {folder / NAME}.json, figure {picture}")
    return record


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
