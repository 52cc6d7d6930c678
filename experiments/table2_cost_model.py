"""What do the operations of LLaMA-2-70B cost, and how far are real kernels from that?

Table: NanoFlow (arXiv 2408.12757v2) Table 2: GFLOP, memory and network GB, estimated and real time per operation, 80
layers on 8 A100-80GB with a dense batch of 2048; and Eq. 5, the optimal throughput, for every preset.
Claim: compute binds (estimates: 114 ms of compute, 45 of memory, 31 of network), so hiding the others in it pays.
Command: python -m experiments.table2_cost_model
Hardware: none.    Minutes: 0.1.
Expected: GFLOP and GB as printed; estimated times as printed once GFLOP and GB are rounded as printed; 1857 tokens/s/GPU.

    out/table2_cost_model.json  series `published` and `simulated` (a row per operation), `optimum` (a row per preset)
    out/table2_cost_model.png   estimated and real times by operation
"""

import pathlib
from typing import Any

from absl import flags

from experiments import comparison, figure_flags, figures, published
from experiments.record import make_record, write_record
from nanojax.config import PRESETS
from nanojax.hardware import PAPER_TABLE_1
from nanojax.pipeline.closed_forms import MEASURED_PEAK_FRACTION, PAPER_PARAMS, optimal_throughput
from nanojax.pipeline.cost_model import Roofline
from nanojax.pipeline.published_profile import TABLE_2_ROWS, table2_cost

NAME = "table2_cost_model"
HARDWARE, NUM_DEVICES = PAPER_TABLE_1["a100-80"], 8
ESTIMATES = ("est_compute_ms", "est_mem_ms", "est_net_ms")


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)


def operations() -> dict[str, list]:
    """Our Table 2, in the units that it is printed in."""
    roofline = Roofline(HARDWARE, NUM_DEVICES)
    costs = [table2_cost(row) for row in TABLE_2_ROWS]
    bounds_ms = [[1e3 * s for s in roofline.bounds_s(cost)] for cost in costs]
    return {
        "operation": list(TABLE_2_ROWS),
        "compute_gflop": [cost.flops / 1e9 for cost in costs],
        "mem_load_gb": [cost.memory_bytes / 1e9 for cost in costs],
        "net_usage_gb": [cost.network_bytes / 1e9 for cost in costs],
        **{name: [row[i] for row in bounds_ms] for i, name in enumerate(ESTIMATES)},
    }


def optima() -> dict[str, list]:
    """Eq. 5 for every preset on one A100: with the printed peak, and with the one that the paper's numbers imply."""
    return {
        "model": list(PRESETS),
        "num_active_params": [model.num_active_params for model in PRESETS.values()],
        "paper_params": [PAPER_PARAMS[name].active if name in PAPER_PARAMS else None for name in PRESETS],
        "optimal_tokens_per_s_at_312_tflops": [optimal_throughput(model, HARDWARE) for model in PRESETS.values()],
        "optimal_tokens_per_s_at_260_tflops": [
            optimal_throughput(model, HARDWARE, peak_fraction=MEASURED_PEAK_FRACTION) for model in PRESETS.values()
        ],
        "optimal_tokens_per_s_at_260_tflops_with_paper_params": [
            optimal_throughput(
                model, HARDWARE, peak_fraction=MEASURED_PEAK_FRACTION, params=PAPER_PARAMS[name]
            ) if name in PAPER_PARAMS else None
            for name, model in PRESETS.items()
        ],
    }  # fmt: skip


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Computes, prints, writes the record and the figure; gives the record."""
    printed, totals = published.table("table2"), published.scalars("table2_totals")
    eq5 = published.scalars("eq5")
    ours, optimum = operations(), optima()
    metrics = {
        "largest_error_flops_percent": _largest_error(ours["compute_gflop"], printed.columns["compute_gflop"]),
        "largest_error_memory_bytes_percent": _largest_error(ours["mem_load_gb"], printed.columns["mem_load_gb"]),
        **{f"total_{name.removesuffix('_ms')}_s": sum(ours[name]) / 1e3 for name in ESTIMATES},
        "total_real_s_published": sum(printed.columns["real_ms"]) / 1e3,
        "optimal_llama_2_70b_tokens_per_s": optimal_throughput(
            PRESETS["llama-2-70b"], HARDWARE, peak_fraction=MEASURED_PEAK_FRACTION, params=PAPER_PARAMS["llama-2-70b"]
        ),
        "optimal_llama_2_70b_tokens_per_s_published": eq5.values["optimal_tokens_per_s_per_gpu"],
    }
    record = make_record(
        NAME, "simulated", metrics=metrics,
        config={"published_source": printed.source, "notes": [*printed.notes, *eq5.notes], "published_totals": dict(totals.values)},
        seed=values.seed,
        series={"published": {k: list(v) for k, v in printed.columns.items()}, "simulated": ours, "optimum": optimum},
    )  # fmt: skip
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    picture = figures.grouped_bars(
        "Table 2: time by operation, LLaMA-2-70B on 8 x A100-80GB, batch 2048, 80 layers",
        figures.sources_of(record), printed.columns["operation"],
        [
            figures.Bars("estimate", "published", _bounds(printed.columns)),
            figures.Bars("estimate", "simulated", _bounds(ours), against="estimate"),
            figures.Bars("real kernels", "published", printed.columns["real_ms"]),
        ],
        folder / f"{NAME}.png", y_label="time of the binding resource (ms)", digits=2, notes=[*printed.notes, *eq5.notes],
    )  # fmt: skip
    print(comparison.text_table(ours))
    print("\nas published:\n" + comparison.text_table(printed.columns))
    print("\nEq. 5, tokens/s of one A100:\n" + comparison.text_table(optimum))
    print(f"record {folder / NAME}.json, figure {picture}")
    return record


def _bounds(columns) -> list[float]:
    """Estimated time of the resource that takes longest, in ms."""
    return [max(row) for row in zip(*(columns[name] for name in ESTIMATES), strict=True)]


def _largest_error(ours, theirs) -> float:
    return max(abs(comparison.error_percent(a, b) or 0.0) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
