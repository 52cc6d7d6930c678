"""What do the pipelines look like, and how long does a layer take in each?

Figure: NanoFlow (arXiv 2408.12757v2) Figure 6 (the pipeline for LLaMA-2-70B), and the same for every ready-made pipeline.
Claim: nano-operations bound by compute, memory and network run beside each other, so that compute hardly ever waits.
Command: python -m experiments.fig06_pipelines [--interference=none --shares=fair --profile=released --pipeline=MINE.json]
Hardware: none.    Minutes: 0.2.
Expected: Figure 6's pipeline takes 13 % less than the sequential one with Table 2's times and Table 3's curves.  With the
released timings and no interference the released pipeline is bound by compute alone, 2.03 ms per layer, 14 % below the best
that the authors' search had found for the same timings (2.347 ms, its bound still open).

    out/fig06_pipelines.json                series `layer_times` (a row per pipeline), `authors_search`, `bars_<pipeline>`
    out/fig06_<pipeline>.txt, .png          one steady layer as text and as a picture
    out/fig06_<pipeline>.trace.json         all layers, for ui.perfetto.dev
"""

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags

from experiments import comparison, figure_flags, gantt_plot, layer_timings, published
from experiments.figures import sources_of
from experiments.record import make_record, write_record
from nanojax.pipeline import library
from nanojax.pipeline.cost_model import BatchShape
from nanojax.pipeline.interference import NO_INTERFERENCE
from nanojax.pipeline.ir import OpKind, Pipeline, Resource
from nanojax.pipeline.json_format import from_json
from nanojax.pipeline.published_profile import released_profile
from nanojax.pipeline.render import chart, text_gantt, trace_events
from nanojax.pipeline.simulate import Shares, Timeline, simulate
from nanojax.pipeline.validate import validate

NAME = "fig06_pipelines"
TEXT_COLUMNS = 150


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline and who runs it.    baseline: the same work without overlap."""

    name: str
    pipeline: Pipeline
    baseline: Pipeline
    model: str
    num_devices: int


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    layer_timings.define_flags(values)
    flags.DEFINE_string(
        "pipeline", None, "JSON file of a pipeline to draw instead of the ready-made ones.", flag_values=values
    )
    flags.DEFINE_string("model", "llama-2-70b", "Model for --pipeline.", flag_values=values)
    flags.DEFINE_integer("num_devices", 8, "Devices for --pipeline.", lower_bound=1, flag_values=values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Simulates, prints, writes the record, texts, traces and figures; gives the record."""
    cases = ready_made() if values.pipeline is None else [_from_file(values)]
    folder = pathlib.Path(values.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows, series, timelines = [], {}, {}
    for case in cases:
        validate(case.pipeline, num_devices=case.num_devices)
        timelines[case.name], row = _simulate(case, values)
        rows.append(row)
        series[f"bars_{case.name}"] = _bars(timelines[case.name])
    series["layer_times"] = {name: [row[name] for row in rows] for name in rows[0]}
    printed = published.scalars("released_stage1")
    series["authors_search"] = _against_authors_search(printed, values.num_layers)
    settings = (*layer_timings.MODEL_FLAGS, "num_layers", "input_len", "output_len")
    record = make_record(
        NAME, "simulated", metrics={f"layer_time_s_{row['pipeline']}": row["layer_time_s"] for row in rows},
        config={name: values[name].value for name in settings} | {"published_source": printed.source}, seed=values.seed,
        series=series,
    )  # fmt: skip
    write_record(record, folder / f"{NAME}.json")
    for case, row in zip(cases, rows, strict=True):
        timeline = timelines[case.name]
        text = f"{case.name}, {row['model']} on {case.num_devices}: {_summary(row)}\n" + text_gantt(
            timeline, width=TEXT_COLUMNS
        )
        print(text + "\n")
        (folder / f"fig06_{case.name}.txt").write_text(text + "\n", encoding="utf-8")
        (folder / f"fig06_{case.name}.trace.json").write_text(json.dumps(trace_events(timeline)), encoding="utf-8")
        gantt_plot.plot_gantt(
            f"{case.name}: {row['model']} on {case.num_devices} x A100, {row['num_tokens']:,} tokens",
            [f"one layer in steady state: {_summary(row)}", sources_of(record)[-1], _settings_text(values)],
            record["series"][f"bars_{case.name}"], row["layer_time_s"], folder / f"fig06_{case.name}.png",
        )  # fmt: skip
    shown = ("pipeline", "num_tokens", "layer_time_s", "sequential_s", "no_interference_s", "fair_s")
    print(comparison.text_table({name: series["layer_times"][name] for name in shown}))
    print("\nllama_70b_released_2048 with the released timings and no interference, beside the authors' search:")
    print(comparison.text_table(series["authors_search"]))
    print(f"record {folder / NAME}.json, figures, texts and traces {folder}/fig06_*")
    return record


def ready_made() -> list[Case]:
    """Every ready-made pipeline at its published size, on its model."""
    whole, one = library.sequential(2048, collectives="gather"), library.sequential(1024)
    forms = ("gather", "reduce")
    cases = [
        ("sequential", whole, 2048),
        ("nano_batched", library.nano_batched(2048, (640, 1408), collectives=forms), 2048),
        ("llama_70b_released_on_one_stream", library.on_one_stream(library.llama_70b_released()), 2048),
        ("llama_70b_figure6", library.llama_70b_figure6(), 2048),
        *((f"llama_70b_released_{n}", library.llama_70b_released(n), n) for n in library.RELEASED_70B),
    ]
    mixtral = library.sequential(4096, collectives="gather", is_moe=True)
    return [
        *(Case(name, p, library.sequential(n, collectives="gather"), "llama-2-70b", 8) for name, p, n in cases),
        Case("llama_8b", library.llama_8b_single_gpu(), one, "llama-3-8b", 1),
        Case("decode_beside_dense", library.decode_beside_dense(1024, 384), one, "llama-3-8b", 1),
        Case("mixtral_released", library.mixtral_released(), mixtral, "mixtral-8x7b", 8),
    ]


def _from_file(values: flags.FlagValues) -> Case:
    pipeline = from_json(pathlib.Path(values.pipeline).read_text(encoding="utf-8"))
    is_moe = any(node.op.value == "Router" for node in pipeline.nodes)
    form = "gather" if values.num_devices > 1 else None
    baseline = library.sequential(pipeline.num_tokens, collectives=form, is_moe=is_moe)
    return Case(pipeline.name, pipeline, baseline, values.model, values.num_devices)


def _simulate(case: Case, values: flags.FlagValues) -> tuple[Timeline, dict[str, Any]]:
    """The timeline that the flags ask for, and a row of the table: the same pipeline under other assumptions too."""
    work = layer_timings.setting_of(case.model, case.num_devices, case.pipeline.num_tokens, values)
    curves, num_layers = layer_timings.INTERFERENCE[values.interference], values.num_layers
    busy = work.occupancy if values.spares_idle else None

    def timeline(pipeline: Pipeline, shares: Shares, interference=curves) -> Timeline:
        return simulate(pipeline, work.duration, interference, num_layers=num_layers, shares=shares, occupancy=busy)

    shown = timeline(case.pipeline, Shares(values.shares))
    row = {
        "pipeline": case.name,
        "model": case.model,
        "num_tokens": case.pipeline.num_tokens,
        "num_nodes": len(case.pipeline.nodes),
        "layer_time_s": shown.layer_time_s,
        "sequential_s": timeline(case.baseline, Shares.FIXED).layer_time_s,
        "no_interference_s": timeline(case.pipeline, Shares.FIXED, NO_INTERFERENCE).layer_time_s,
        "fixed_s": timeline(case.pipeline, Shares.FIXED).layer_time_s,
        "fair_s": timeline(case.pipeline, Shares.FAIR).layer_time_s,
        "room_wait_s": sum(shown.waits_s().values()) / num_layers,
        **{f"{resource.value}_fraction": shown.utilization(resource) for resource in Resource},
    }
    return shown, row


def _against_authors_search(printed: published.Scalars, num_layers: int) -> dict[str, list]:
    """The hand-written released pipeline where the authors' stage I searched: their timings and batch, no interference."""
    work = released_profile().durations(BatchShape(1280, 768, 1024, 512))
    pipeline = library.llama_70b_released()
    many, three = (simulate(pipeline, work, NO_INTERFERENCE, num_layers=n) for n in (num_layers, 3))
    dense_s = sum(
        s
        for node, s in zip(pipeline.nodes, many.alone_s, strict=True)
        if node.op.resource is Resource.COMPUTE and node.op is not OpKind.PF_ATTN
    )
    names = ("steady_layer_ms", "makespan_3_layers_ms", "gemm_only_sum_ms")
    ours = [1e3 * many.layer_time_s, 1e3 * three.makespan_s, 1e3 * dense_s]
    theirs = [printed.values[name] for name in names]
    errors = [comparison.error_percent(a, b) for a, b in zip(ours, theirs, strict=True)]
    return {"quantity": list(names), "published": theirs, "simulated": ours, "difference_percent": errors}


def _bars(timeline: Timeline) -> dict[str, list]:
    drawn = chart(timeline)
    return {
        "lane": [drawn.lanes[bar.lane] for bar in drawn.bars],
        "resource": [bar.resource.value for bar in drawn.bars],
        **{
            name: [getattr(bar, name) for bar in drawn.bars]
            for name in ("label", "start_s", "stop_s", "share", "layer")
        },
    }


def _summary(row: dict[str, Any]) -> str:
    change = round(100 * (row["layer_time_s"] / row["sequential_s"] - 1), 1) + 0.0  # no minus before a zero
    waits = f", {row['room_wait_s'] * 1e6:.0f} µs of waiting for room" if row["room_wait_s"] else ""
    return (
        f"{row['layer_time_s'] * 1e3:.3f} ms ({change:+.1f} % against sequential; without interference "
        f"{row['no_interference_s'] * 1e3:.3f} ms){waits}"
    )


def _settings_text(values: flags.FlagValues) -> str:
    return (
        f"times: {layer_timings.PROFILES[values.profile]}; interference: {values.interference}; {values.shares} shares; "
        f"prompts of {values.input_len} and outputs of {values.output_len} tokens"
    )


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
