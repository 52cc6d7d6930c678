"""What does each part of NanoFlow bring?  One after the other, split only, overlapped, overlapped with KV offload.

Figure: NanoFlow (arXiv 2408.12757v2) Figure 9: tokens/s per GPU, LLaMA-2-70B on 8 A100-80GB, dense batch 2048.
Claim: splitting alone costs 8 to 12 %, overlap gains 1.14 to 1.22 times over no overlap, offload costs 3 %.
Command: python -m experiments.fig09_ablation [--pipeline=llama_70b_released] [--measured --engine=--model=llama-3-8b]
Hardware: none; with `--measured` the real engine also runs on any device (default: SmolLM2 on a CPU).    Minutes: 0.1; 3 measured.
Expected: mean absolute error of 11 %; 13 % with what the search finds.  Splitting costs next to nothing, which the paper
measured at 10 %: Table 2 gives one time per operation, from which no loss of smaller products follows.  The timings and the
interference in the authors' repository, a second calibration, have that loss (a small KQV takes 2.5 times its part): no
overlap and splitting alone are 2 and 4 % off.  Figure 6's pipeline is 25 % too slow with D_best / P(R), which counts twice what
a small product leaves idle; where that slows it down by nothing (`--spares_idle`), 3 % off, and all is in order.  Figure 6's
shares keep room for decode attention, which prefill-only work does not have: with Table 2 it loses there, and the searched
pipeline does not.  Offload is not predicted: nothing in Table 2 says what copying beside the feed-forward costs.

    out/fig09_ablation.json   metrics: tokens/s and errors
    out/fig09_ablation.png    published and simulated bars
    out/fig09_ablation-released.png, -released_spares_idle.png    the same, durations and interference from the authors' repository
    out/fig09_ablation-measured.json, .png  with `--measured`: ratios to no overlap
"""

import copy
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from experiments import (
    comparison,
    figure_flags,
    layer_timings,
    measured_throughput,
    published,
    searched,
    throughput_prediction,
)
from experiments.figures import Bars, grouped_bars, sources_of
from experiments.record import make_record, write_record
from nanojax.pipeline import library
from nanojax.pipeline.ir import Pipeline

NAME = "fig09_ablation"
MODEL, NUM_DEVICES, NUM_TOKENS = "llama-2-70b", 8, 2048
SEARCHED = "NanoFlow, searched"
LENGTHS = {"512-0": (512, 0), "512-512": (512, 512), "1024-512": (1024, 512), "512-1024": (512, 1024)}


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    layer_timings.define_model_flags(values)
    flags.DEFINE_string("pipeline", "llama_70b_figure6", "A ready-made pipeline.", flag_values=values)
    measured_throughput.define_flags(values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Predicts, prints, writes the record and the figure; gives the record."""
    printed = published.grid("fig09")
    theirs = {name: [printed.at(name, column) for column in printed.columns] for name in printed.rows}
    metrics: dict[str, Any] = {}
    chosen = _calibrations(values)
    ours = {label: _predict(own, printed.columns) for label, own in chosen.items()}
    for label, rates in ours.items():
        metrics |= {f"{label}{name}": value for name, value in _metrics(rates, theirs, printed.columns).items()}
    config = {name: values[name].value for name in ("pipeline", *layer_timings.MODEL_FLAGS)}
    record = make_record(
        NAME, "simulated", metrics=metrics, config=config | {"published_source": printed.source}, seed=values.seed
    )
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    for label, rates in ours.items():
        stem = f"{NAME}-{label}".rstrip("_-")
        bars = [Bars(name, "published", theirs[name]) for name in printed.rows]
        bars += [Bars(f"{name}, ours", "simulated", rates[name], against=_reference(name)) for name in rates]
        picture = grouped_bars(
            f"Figure 9: ablation, {MODEL} on {NUM_DEVICES} x A100", sources_of(record), printed.columns, bars,
            folder / f"{stem}.png", y_label="tokens/s per GPU", notes=[f"{_text(chosen[label])}."],
        )  # fmt: skip
        print(_text(chosen[label]))
        _show(rates, theirs, printed.columns)
        print(f"record {folder / NAME}.json, figure {picture}")
    if values.measured:
        _measure(values, theirs, ours[""])
    return record


def _calibrations(values: flags.FlagValues) -> dict[str, flags.FlagValues]:
    """The flags by what goes before their metrics: as they are, and with all that the authors' repository says of operations."""
    chosen = {"": values}
    for label, spares_idle in (("released_", False), ("released_spares_idle_", True)):
        chosen[label] = copy.deepcopy(values)
        for name, value in {"profile": "released", "interference": "released", "spares_idle": spares_idle}.items():
            chosen[label][name].value = value
    return chosen


def _text(values: flags.FlagValues) -> str:
    spared = ", what an operation leaves idle slows it down by nothing" if values.spares_idle else ""
    return f"Durations: {layer_timings.PROFILES[values.profile]}; interference: {values.interference}{spared}"


def _predict(values: flags.FlagValues, columns: Sequence[str]) -> dict[str, list[float]]:
    """Tokens/s per GPU by pipeline, a number for each of `columns`."""
    overlapped = throughput_prediction.named(values.pipeline, MODEL, NUM_TOKENS, NUM_DEVICES)
    makers: dict[str, Callable[[str], Pipeline]] = {
        "Non-overlap": lambda column: throughput_prediction.named("sequential", MODEL, NUM_TOKENS, NUM_DEVICES),
        "Nanobatch-only": lambda column: library.on_one_stream(overlapped),
        "NanoFlow": lambda column: overlapped,
    }
    if values.profile == "table2":  # which was searched with
        makers[SEARCHED] = lambda column: searched.pipeline(MODEL, *LENGTHS[column])
    return {
        name: [
            throughput_prediction.predict(
                MODEL, NUM_DEVICES, make(column), *LENGTHS[column], values
            ).tokens_per_s_per_device
            for column in columns
        ]
        for name, make in makers.items()
    }


def _metrics(
    ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]], columns: Sequence[str]
) -> dict[str, int | float | None]:
    """Rates, errors, and how many comparisons come out the other way, for the paper's pipeline and the searched one."""
    metrics: dict[str, int | float | None] = {}
    for name, rates in ours.items():
        label, reference = name.replace(", ", "-"), theirs[_reference(name)]
        for column, rate, printed in zip(columns, rates, reference, strict=True):
            metrics[f"tokens_per_s_per_gpu_{label}_{column}"] = rate
            metrics[f"error_percent_{label}_{column}"] = comparison.error_percent(rate, printed)
        metrics[f"mean_absolute_error_percent_{label}"] = comparison.mean_absolute_error_percent(rates, reference)
    for prefix, chosen in (("", "NanoFlow"), ("searched_", SEARCHED)):
        if chosen not in ours:
            continue
        three = _three(ours, chosen)
        pairs = [(a, b) for name, rates in three.items() for a, b in zip(rates, theirs[name], strict=True)]
        metrics[f"{prefix}mean_absolute_error_percent"] = comparison.mean_absolute_error_percent(
            *zip(*pairs, strict=True)
        )
        metrics[f"{prefix}num_wrong_orders"] = len(_wrong_orders(three, theirs, columns))
    return metrics


def _three(ours: Mapping[str, list[float]], chosen: str) -> dict[str, list[float]]:
    """The three published pipelines, `chosen` in the place of NanoFlow's."""
    return {name: ours[name] for name in ("Non-overlap", "Nanobatch-only")} | {"NanoFlow": ours[chosen]}


def _wrong_orders(
    three: Mapping[str, list[float]], theirs: Mapping[str, list[float]], columns: Sequence[str]
) -> list[str]:
    return comparison.wrong_orders(columns, three, {name: theirs[name] for name in three})


def _reference(name: str) -> str:
    """The published bars that ours count against."""
    return "NanoFlow" if name == SEARCHED else name


def _show(ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]], columns: Sequence[str]) -> None:
    rows = [(name, at) for name in ours for at in range(len(columns))]
    table = {
        "pipeline": [name for name, _ in rows],
        "lengths": [columns[at] for _, at in rows],
        "published": [theirs[_reference(name)][at] for name, at in rows],
        "simulated": [ours[name][at] for name, at in rows],
        "error": [comparison.error_text(ours[name][at], theirs[_reference(name)][at]) for name, at in rows],
    }
    print(comparison.text_table(table))
    for name, rates in ours.items():
        print(
            f"mean absolute error, {name}: {comparison.mean_absolute_error_percent(rates, theirs[_reference(name)]):.1f} %"
        )
    for chosen in (name for name in ("NanoFlow", SEARCHED) if name in ours):
        wrong = _wrong_orders(_three(ours, chosen), theirs, columns)
        print(f"wrong orders, {chosen}: {', '.join(wrong) or 'none'}")


def _measure(values: flags.FlagValues, theirs: dict[str, list[float]], ours: dict[str, list[float]]) -> dict[str, Any]:
    """Runs the engine here with each pipeline; record and figure of ratios to `Non-overlap`."""
    pipelines = {"Non-overlap": "sequential", "Nanobatch-only": "nano_batched", "NanoFlow": values.pipeline}
    found = measured_throughput.measure(values, LENGTHS, pipelines)
    rates = {label: list(by_length.values()) for label, by_length in found.tokens_per_s.items()}
    metrics = {
        f"tokens_per_s_{label}_{name}": rate
        for label, by_length in found.tokens_per_s.items()
        for name, rate in by_length.items()
    }
    config = found.config | {"published_source": published.grid("fig09").source}
    record = make_record(f"{NAME}-measured", "measured", metrics=metrics, config=config, seed=values.seed)
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}-measured.json")
    bars = [
        Bars(f"{label}{suffix}", origin, [a / b for a, b in zip(by[label], by["Non-overlap"], strict=True)])
        for origin, suffix, by in (
            ("published", "", theirs),
            ("simulated", ", 8 A100", ours),
            ("measured", ", here", rates),
        )
        for label in ("Nanobatch-only", "NanoFlow")
    ]
    picture = grouped_bars(
        f"Figure 9 as ratios: {MODEL} beside {config['model']}", sources_of(record), list(LENGTHS), bars,
        folder / f"{NAME}-measured.png", y_label="throughput / throughput without overlap", digits=2,
        reference_lines={"Non-overlap": 1.0},
        notes=[f"Measured: lengths divided by {config['length_divisor']}, {config['num_requests']} requests; NanoFlow is "
               f"{values.pipeline} on one device, where there is no network to overlap (and on a CPU nothing to overlap with)."],
    )  # fmt: skip
    print(
        comparison.text_table(
            {"lengths": list(LENGTHS), **{f"{label}, tokens/s": found for label, found in rates.items()}}
        )
    )
    print(f"record {folder / NAME}-measured.json, figure {picture}")
    return record


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
