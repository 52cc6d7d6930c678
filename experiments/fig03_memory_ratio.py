"""For which models and workloads does memory bind serving at the largest batch?

Figure: NanoFlow (arXiv 2408.12757v2) Figure 3: T_R = T_mem / T_compute for 5 models and 6 workloads on A100-80GB.
Claim: below 1 (compute binds) everywhere but for LLaMA-3-8B with 512 tokens in and 1024 out.
Command: python -m experiments.fig03_memory_ratio
Hardware: none.    Minutes: 0.1.
Expected: the 24 cells of dense models as printed; the Mixtral row within 0.006 (see the figure's note).

    out/fig03_memory_ratio.json  series `published` and `simulated` as columns by workload; `dense_batch` in tokens
    out/fig03_memory_ratio.png   both, cell by cell
"""

import pathlib
from typing import Any

from absl import flags

from experiments import comparison, figure_flags, figures, published
from experiments.record import make_record, write_record
from nanojax.config import PRESETS
from nanojax.hardware import PAPER_TABLE_1
from nanojax.pipeline.closed_forms import PAPER_PARAMS, max_dense_batch, memory_to_compute_ratio
from nanojax.workload import PAPER_TABLE_4

NAME = "fig03_memory_ratio"
HARDWARE = "a100-80"


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)


def mean_lengths(workload: str) -> tuple[float, float]:
    """Mean input and output tokens of a data set of Table 4, or of constant lengths written `512-1024`."""
    if workload in PAPER_TABLE_4:
        return PAPER_TABLE_4[workload].input_mean, PAPER_TABLE_4[workload].output_mean
    input_len, output_len = workload.split("-")
    return float(input_len), float(output_len)


def num_devices(model: str) -> int:
    """GPUs that the paper's figures give a model."""
    return 1 if model == "llama-3-8b" else 8


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Computes, prints, writes the record and the figure; gives the record."""
    printed = published.grid("fig03")
    ours, batches = [], []
    for model in printed.rows:
        where = (PRESETS[model], PAPER_TABLE_1[HARDWARE], num_devices(model))
        lengths = [mean_lengths(workload) for workload in printed.columns]
        ours.append([memory_to_compute_ratio(*where, *pair, params=PAPER_PARAMS[model]) for pair in lengths])
        batches.append([max_dense_batch(*where, *pair, params=PAPER_PARAMS[model]) for pair in lengths])
    series = {
        name: {"model": list(printed.rows)}
        | {column: [row[j] for row in grid] for j, column in enumerate(printed.columns)}
        for name, grid in (("published", printed.values), ("simulated", ours), ("dense_batch", batches))
    }
    largest = {
        model: max(abs(a - b) for a, b in zip(theirs, own, strict=True))
        for model, theirs, own in zip(printed.rows, printed.values, ours, strict=True)
    }
    mixtral = largest.pop("mixtral-8x7b")
    record = make_record(
        NAME, "simulated",
        metrics={"largest_difference_dense_ratio": max(largest.values()), "largest_difference_mixtral_ratio": mixtral},
        config={"published_source": printed.source, "notes": list(printed.notes), "hardware": HARDWARE},
        seed=values.seed, series=series,
    )  # fmt: skip
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    picture = figures.heatmap(
        "Figure 3: memory time / compute time at the largest batch, A100-80GB", figures.sources_of(record),
        printed.rows, printed.columns, printed.values, ours, folder / f"{NAME}.png", notes=printed.notes,
        x_label="above 1 (red) memory binds, below 1 (blue) compute", digits=2,
    )  # fmt: skip
    print(comparison.text_table(series["simulated"]))
    print(f"largest differences: dense models {max(largest.values()):.4f}, Mixtral {mixtral:.4f}")
    print(f"largest dense batch (tokens):\n{comparison.text_table(series['dense_batch'])}")
    print(f"record {folder / NAME}.json, figure {picture}")
    return record


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
