"""What throughput does the paper's pipeline promise offline, for fixed lengths and for the lengths of three datasets?

Figure: NanoFlow (arXiv 2408.12757v2) Figure 7: tokens/s per GPU, LLaMA-2-70B on 8 A100-80GB, dense batch 2048.
Claim: NanoFlow reaches 65 to 69 % of the optimum of 1857 tokens/s per GPU and 1.73 to 1.91 times TensorRT-LLM.
Command: python -m experiments.fig07_offline_throughput [--pipeline=llama_70b_released] [--measured --engine=--model=llama-3-8b]
Hardware: none; with `--measured` the real engine also runs on any device (default: SmolLM2 on a CPU).    Minutes: 0.1; 3 measured.
Expected: within 10 % of NanoFlow's bars; what the search finds promises 12 to 21 % more than NanoFlow reached.  Predictions
come from Table 2 and the interference table alone.

    out/fig07_offline_throughput.json   metrics: tokens/s and errors
    out/fig07_offline_throughput.png    published engines and the simulated pipeline
    out/fig07_offline_throughput-measured.json, .png  with `--measured`: each as a share of its own optimum
"""

import pathlib
from collections.abc import Sequence
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

NAME = "fig07_offline_throughput"
MODEL, NUM_DEVICES, NUM_TOKENS = "llama-2-70b", 8, 2048
LENGTHS = {"512-512": (512, 512), "1024-512": (1024, 512), "512-1024": (512, 1024)}


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    layer_timings.define_model_flags(values)
    flags.DEFINE_string("pipeline", "llama_70b_figure6", "A ready-made pipeline.", flag_values=values)
    measured_throughput.define_flags(values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Predicts, prints, writes the record and the figure; gives the record."""
    printed = published.grid("fig07")
    optimum = published.scalars("fig07_optimum").values["optimal_tokens_per_s_per_gpu"]
    pipeline = throughput_prediction.named(values.pipeline, MODEL, NUM_TOKENS, NUM_DEVICES)
    ours = [
        throughput_prediction.predict(MODEL, NUM_DEVICES, pipeline, *lengths(row), values).tokens_per_s_per_device
        for row in printed.rows
    ]
    theirs = [printed.at(row, "NanoFlow") for row in printed.rows]
    found = [
        throughput_prediction.predict(
            MODEL, NUM_DEVICES, searched.pipeline(MODEL, *lengths(row)), *lengths(row), values
        ).tokens_per_s_per_device
        for row in printed.rows
    ]
    engines = {name: [printed.at(row, name) for row in printed.rows] for name in printed.columns}
    metrics = {f"tokens_per_s_per_gpu_{row}": rate for row, rate in zip(printed.rows, ours, strict=True)}
    metrics |= {
        f"error_percent_{row}": comparison.error_percent(*pair)
        for row, *pair in zip(printed.rows, ours, theirs, strict=True)
    }
    metrics["mean_absolute_error_percent"] = comparison.mean_absolute_error_percent(ours, theirs)
    for row, rate, reference in zip(printed.rows, found, theirs, strict=True):
        metrics[f"searched_tokens_per_s_per_gpu_{row}"] = rate
        metrics[f"searched_error_percent_{row}"] = comparison.error_percent(rate, reference)
    metrics["searched_mean_absolute_error_percent"] = comparison.mean_absolute_error_percent(found, theirs)
    wrong = {
        label: comparison.wrong_orders(printed.rows, {"NanoFlow": rates}, engines)
        for label, rates in (("by hand", ours), ("searched", found))
    }
    metrics |= {"num_wrong_orders": len(wrong["by hand"]), "searched_num_wrong_orders": len(wrong["searched"])}
    config = {name: values[name].value for name in ("pipeline", *layer_timings.MODEL_FLAGS)}
    record = make_record(
        NAME, "simulated", metrics=metrics, config=config | {"published_source": printed.source}, seed=values.seed
    )
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    bars = [Bars(name, "published", rates) for name, rates in engines.items()]
    bars.append(Bars(values.pipeline, "simulated", ours, against="NanoFlow"))
    bars.append(Bars("searched", "simulated", found, against="NanoFlow"))
    picture = grouped_bars(
        f"Figure 7: offline throughput, {MODEL} on {NUM_DEVICES} x A100", sources_of(record), printed.rows, bars,
        folder / f"{NAME}.png", y_label="tokens/s per GPU", reference_lines={f"optimum {optimum:.0f}": optimum},
    )  # fmt: skip
    print(comparison.prediction_table({"lengths": printed.rows}, theirs, ours, found))
    for label, orders in wrong.items():
        print(f"wrong orders, {label}: {', '.join(orders) or 'none'}")
    print(f"record {folder / NAME}.json, figure {picture}")
    if values.measured:
        _measure(
            values, [100 * rate / optimum for rate in theirs], [100 * rate / optimum for rate in ours], printed.rows
        )
    return record


def _measure(values: flags.FlagValues, theirs: list[float], ours: list[float], rows: Sequence[str]) -> dict[str, Any]:
    """Runs the engine here without and with a pipeline; record and figure of shares (%) of each one's optimum."""
    pipelines = {"sequential": None, values.pipeline: values.pipeline}
    found = measured_throughput.measure(values, {row: lengths(row) for row in rows}, pipelines)
    shares = {
        label: [100 * by_length[row] / found.optimal_tokens_per_s for row in rows]
        for label, by_length in found.tokens_per_s.items()
    }
    metrics = {
        f"tokens_per_s_{label}_{row}": rate
        for label, by_length in found.tokens_per_s.items()
        for row, rate in by_length.items()
    } | {"optimal_tokens_per_s": found.optimal_tokens_per_s}
    config = found.config | {"published_source": published.grid("fig07").source}
    record = make_record(f"{NAME}-measured", "measured", metrics=metrics, config=config, seed=values.seed)
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}-measured.json")
    bars = [Bars("NanoFlow", "published", theirs), Bars(f"{values.pipeline}, 8 A100", "simulated", ours)]
    bars += [Bars(f"{label}, here", "measured", values_) for label, values_ in shares.items()]
    picture = grouped_bars(
        f"Figure 7 as shares of the optimum: {MODEL} beside {config['model']}", sources_of(record), rows, bars,
        folder / f"{NAME}-measured.png", y_label="% of the optimum (Eq. 5)",
        notes=[f"Simulated: {values.pipeline} from Table 2, not from this device.  Measured: lengths divided by "
               f"{config['length_divisor']}, {config['num_requests']} requests, filling and draining included."],
    )  # fmt: skip
    print(
        comparison.text_table({"lengths": list(rows), **{f"{label}, measured (%)": v for label, v in shares.items()}})
    )
    print(f"record {folder / NAME}-measured.json, figure {picture}")
    return record


def lengths(row: str) -> tuple[float, float]:
    """Mean prompt and output of a group of bars, tokens; the datasets' are those of the paper's Table 4."""
    if row in LENGTHS:
        return LENGTHS[row]
    table = published.table("table4").columns
    at = table["dataset"].index(row)
    return table["input_mean_tokens"][at], table["output_mean_tokens"][at]


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
