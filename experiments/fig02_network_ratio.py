"""For which models and accelerators does the network bind a tensor-parallel layer?

Figure: NanoFlow (arXiv 2408.12757v2) Figure 2: T_net / T_compute for 6 models on 13 accelerators, 8 devices.
Claim: below 1 nearly everywhere with NVLink-like links, above 1 for small models and for PCIe.
Command: python -m experiments.fig02_network_ratio
Hardware: none.    Minutes: 0.1.
Expected: all 78 cells within 0.0005 of the printed ones.

    out/fig02_network_ratio.json  series `published` and `simulated`: a column per accelerator, a row per model
    out/fig02_network_ratio.png   both, cell by cell
"""

import pathlib
from typing import Any

from absl import flags

from experiments import comparison, figure_flags, figures, published
from experiments.record import make_record, write_record
from nanojax.config import PRESETS
from nanojax.hardware import PAPER_TABLE_1
from nanojax.pipeline.closed_forms import PAPER_PARAMS, network_to_compute_ratio

NAME = "fig02_network_ratio"
NUM_DEVICES = 8


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Computes, prints, writes the record and the figure; gives the record."""
    printed = published.grid("fig02")
    ours = [
        [
            network_to_compute_ratio(PRESETS[model], PAPER_TABLE_1[name], NUM_DEVICES, params=PAPER_PARAMS[model])
            for name in printed.columns
        ]
        for model in printed.rows
    ]
    worst = max(
        abs(a - b) for row, own in zip(printed.values, ours, strict=True) for a, b in zip(row, own, strict=True)
    )
    series = {
        origin: {"model": list(printed.rows)}
        | {name: [row[j] for row in grid] for j, name in enumerate(printed.columns)}
        for origin, grid in (("published", printed.values), ("simulated", ours))
    }
    record = make_record(
        NAME, "simulated", metrics={"num_cells": len(ours) * len(ours[0]), "largest_difference_ratio": worst},
        config={"published_source": printed.source, "notes": list(printed.notes), "num_devices": NUM_DEVICES},
        seed=values.seed, series=series,
    )  # fmt: skip
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    picture = figures.heatmap(
        "Figure 2: network time / compute time of a tensor-parallel layer, 8 devices", figures.sources_of(record),
        printed.rows, printed.columns, printed.values, ours, folder / f"{NAME}.png", notes=printed.notes,
        x_label="above 1 (red) the network binds, below 1 (blue) compute", digits=3,
    )  # fmt: skip
    print(comparison.text_table(series["simulated"]))
    print(f"largest difference from the {len(ours) * len(ours[0])} printed cells: {worst:.5f}")
    print(f"record {folder / NAME}.json, figure {picture}")
    return record


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
