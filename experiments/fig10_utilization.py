"""How well does one layer use compute, memory and network, without overlap and with the paper's pipeline?

Figure: NanoFlow (arXiv 2408.12757v2) Figure 10: utilisation of the three resources over the time of one layer, LLaMA-2-70B
on 8 A100-80GB, non-overlapping (a) and NanoFlow (b).
Claim: one after the other, operations leave compute idle while memory or network work; overlapped, compute averages 68.5 %.
Command: python -m experiments.fig10_utilization [--pipeline=llama_70b_released --shares=fair]
Hardware: none.    Minutes: 0.1.
Expected: the paper does not say which peak its 68.5 % refers to.  Of the data sheet's 312 TFLOP/s the model gives 58 %,
of the 260 TFLOP/s that its optimal throughput implies 70 % (Eq. 5: 1857 tokens/s is 260, not the 280 of the text).
Interference acts on the resource that binds an operation: what KQV reads beside decode attention is not taken from it, so
that with --profile=roofline memory exceeds its peak by a fifth for a while.

    out/fig10_utilization.json   metrics: means; series `utilization_<pipeline>`: fractions of the data sheet's peaks
    out/fig10_utilization.png    both pipelines, three panels each
"""

import pathlib
from typing import Any

from absl import flags

from experiments import comparison, figure_flags, gantt_plot, layer_timings, published
from experiments.figures import sources_of
from experiments.record import make_record, write_record
from nanojax.pipeline import library
from nanojax.pipeline.ir import Resource
from nanojax.pipeline.simulate import Timeline, utilization_over_time

NAME = "fig10_utilization"
MODEL, NUM_DEVICES, NUM_TOKENS = "llama-2-70b", 8, 2048
GEMM_PEAK_FLOPS = 260e12
"""FLOP/s per A100 behind the paper's optimal throughput of 1857 tokens/s (2 x 70e9 x 1857)."""


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    layer_timings.define_flags(values)
    names = [name for name in library.PIPELINES if name not in ("sequential", *library.ONE_DEVICE)]
    flags.DEFINE_enum("pipeline", "llama_70b_figure6", names, "What is compared with sequential.", flag_values=values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Simulates, prints, writes the record and the figure; gives the record."""
    printed = published.scalars("fig10")
    published_fraction = printed.values["nanoflow_mean_compute_utilization_percent"] / 100
    work = layer_timings.setting_of(MODEL, NUM_DEVICES, NUM_TOKENS, values)
    metrics: dict[str, float | None] = {"published_compute_fraction": published_fraction}
    series = {}
    for name in ("sequential", values.pipeline):
        pipeline = library.PIPELINES[name](NUM_TOKENS, False, NUM_DEVICES)
        timeline = work.timeline(pipeline, values, num_layers=values.num_layers)
        table = _over_time(timeline, work)
        series[f"utilization_{name}"] = table
        metrics[f"layer_time_s_{name}"] = timeline.layer_time_s
        metrics |= {f"{r.value}_fraction_{name}": _mean(table, r.value) for r in Resource}
        of_gemm = _mean(table, "compute") * work.hardware.peak_flops / GEMM_PEAK_FLOPS
        metrics[f"compute_of_gemm_peak_fraction_{name}"] = of_gemm
    ours = {peak: metrics[f"compute_{peak}fraction_{values.pipeline}"] for peak in ("", "of_gemm_peak_")}
    for peak, fraction in ours.items():
        metrics[f"error_{peak}percent"] = comparison.error_percent(fraction, published_fraction)
    settings = ("pipeline", *layer_timings.MODEL_FLAGS, "num_layers", "input_len", "output_len")
    config = {name: values[name].value for name in settings} | {"published_source": printed.source}
    record = make_record(NAME, "simulated", metrics=metrics, config=config, seed=values.seed, series=series)
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    picture = _draw(record, values, ours, folder / f"{NAME}.png")
    _print(metrics, values.pipeline)
    print(f"record {folder / NAME}.json, figure {picture}")
    return record


def _over_time(timeline: Timeline, work: layer_timings.Setting) -> dict[str, list[float]]:
    """One steady layer from its first KQV on; fractions of the published peaks."""
    start_s, _ = timeline.window_s
    instants, useful = utilization_over_time(timeline, work.peak_time, timeline.window_s)
    edges = [instant - start_s for instant in instants]
    return {"start_s": edges[:-1], "stop_s": edges[1:], **{r.value: values for r, values in useful.items()}}


def _mean(table: dict[str, list[float]], column: str) -> float:
    lengths = [stop - start for start, stop in zip(table["start_s"], table["stop_s"], strict=True)]
    return sum(value * s for value, s in zip(table[column], lengths, strict=True)) / sum(lengths)


def _draw(
    record: dict[str, Any], values: flags.FlagValues, ours: dict[str, float | None], path: pathlib.Path
) -> pathlib.Path:
    titles = {
        name: f"{name}: {record['metrics'][f'layer_time_s_{name}'] * 1e3:.2f} ms per layer"
        for name in ("sequential", values.pipeline)
    }
    sources = [
        *sources_of(record),
        f"times: {layer_timings.PROFILES[values.profile]}; interference: {values.interference}; {values.shares} shares; "
        f"{NUM_TOKENS} tokens, prompts of {values.input_len}, outputs of {values.output_len}",
        f"peaks: 312 TFLOP/s, 2 TB/s and 300 GB/s one way per A100; of the {GEMM_PEAK_FLOPS / 1e12:.0f} TFLOP/s behind the "
        f"paper's optimum, {values.pipeline} uses {100 * (ours['of_gemm_peak_'] or 0):.1f} %",
    ]
    tables = {title: record["series"][f"utilization_{name}"] for name, title in titles.items()}
    return gantt_plot.plot_utilization(
        f"Figure 10: use of compute, memory and network in one layer, {MODEL} on {NUM_DEVICES} x A100", sources, tables,
        {titles[values.pipeline]: ("compute", record["metrics"]["published_compute_fraction"])}, path,
    )  # fmt: skip


def _print(metrics: dict[str, float | None], pipeline: str) -> None:
    rows = [("sequential", None), (pipeline, metrics["published_compute_fraction"])]
    columns: dict[str, list] = {"pipeline": [name for name, _ in rows]}
    columns["ms per layer"] = [1e3 * (metrics[f"layer_time_s_{name}"] or 0) for name, _ in rows]
    for resource in Resource:
        columns[f"{resource.value} %"] = [100 * (metrics[f"{resource.value}_fraction_{name}"] or 0) for name, _ in rows]
    columns["compute % of 260 TFLOP/s"] = [
        100 * (metrics[f"compute_of_gemm_peak_fraction_{name}"] or 0) for name, _ in rows
    ]
    columns["published compute %"] = [None if fraction is None else 100 * fraction for _, fraction in rows]
    print(comparison.text_table(columns))


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
