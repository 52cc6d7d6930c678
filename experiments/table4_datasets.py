"""How long are the prompts and answers of the paper's data sets, and do our generated traces have these lengths?

Table: NanoFlow (arXiv 2408.12757v2) Table 4: mean and standard deviation of input and output lengths.
Claim: three real data sets with quite different balances of prompt and answer.
Command: python -m experiments.table4_datasets [--traces=FOLDER]
Hardware: none.    Minutes: 0.1.
Expected: a log-normal trace of 50,000 requests within 3 % of each mean, 10 % of each deviation.  The authors' released
files (`--traces`: splitwise.csv, lmsys.csv, sharegpt.csv, plain or .gz, anywhere below) differ from the printed table.

    out/table4_datasets.json  series `published`, `simulated` (drawn), `published_counted` (files, if given): tokens
    out/table4_datasets.png   the four statistics of each data set
"""

import pathlib
from typing import Any

import numpy as np
from absl import flags

from experiments import comparison, figure_flags, figures, published
from experiments.record import make_record, write_record
from nanojax import workload

NAME = "table4_datasets"
NUM_REQUESTS, NUM_REQUESTS_SMOKE = 50_000, 2_000
FILES = {  # the authors' Splitwise trace is Azure's conversation trace of 2023
    "splitwise": ("splitwise", "AzureLLMInferenceTrace_conv"),
    "lmsys": ("lmsys",),
    "sharegpt": ("sharegpt",),
}
STATISTICS = {
    "input_mean_tokens": "input_len_mean",
    "input_std_tokens": "input_len_std",
    "output_mean_tokens": "output_len_mean",
    "output_std_tokens": "output_len_std",
}
SHORT = {"input_mean_tokens": "mean in", "input_std_tokens": "std in", "output_mean_tokens": "mean out", "output_std_tokens": "std out"}  # fmt: skip


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    flags.DEFINE_string("traces", None, "Folder with the authors' released trace files.", flag_values=values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Draws, prints, writes the record and the figure; gives the record.  Raises OSError for a missing trace file."""
    printed, released = published.table("table4"), published.table("released_traces")
    names = list(printed.columns["dataset"])
    num_requests = NUM_REQUESTS_SMOKE if values.smoke else NUM_REQUESTS
    rng = np.random.default_rng(values.seed)
    drawn = _columns(names, [workload.table4_trace(name, num_requests, rng) for name in names])
    series = {
        "published": {name: list(column) for name, column in printed.columns.items()},
        "simulated": drawn,
        "published_released_files": {name: list(column) for name, column in released.columns.items()},
    }
    if values.traces is not None:
        traces = [workload.load_trace(_find(pathlib.Path(values.traces), name)) for name in names]
        series["published_counted"] = _columns(names, traces)
    metrics = {
        f"mean_absolute_error_{name.removesuffix('_tokens')}_percent": comparison.mean_absolute_error_percent(
            drawn[name], printed.columns[name]
        )
        for name in STATISTICS
    }
    record = make_record(
        NAME, "simulated", metrics={"num_requests": num_requests, **metrics}, seed=values.seed, series=series,
        config={"published_source": printed.source, "notes": list(printed.notes)},
    )  # fmt: skip
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    bars = [
        figures.Bars("Table 4", "published", _flat(series["published"])),
        figures.Bars("log-normal trace", "simulated", _flat(drawn), against="Table 4"),
    ]
    if "published_counted" in series:
        bars.append(
            figures.Bars("released files, counted", "published", _flat(series["published_counted"]), against="Table 4")
        )
    picture = figures.grouped_bars(
        "Table 4: lengths of prompts and answers", figures.sources_of(record),
        [f"{name}\n{SHORT[statistic]}" for name in names for statistic in STATISTICS], bars, folder / f"{NAME}.png",
        y_label="tokens", notes=printed.notes,
    )  # fmt: skip
    for origin, table in series.items():
        print(f"{origin}:\n{comparison.text_table(table)}\n")
    print(f"record {folder / NAME}.json, figure {picture}")
    return record


def _columns(names: list[str], traces: list[workload.Trace]) -> dict[str, list]:
    found = [workload.trace_statistics(trace) for trace in traces]
    return {"dataset": names, **{name: [float(row[key]) for row in found] for name, key in STATISTICS.items()}}


def _flat(table: dict[str, list]) -> list[float]:
    """Data set by data set, its statistics in order."""
    return [table[name][i] for i in range(len(table["dataset"])) for name in STATISTICS]


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
    found = [path for stem in FILES[name] for path in sorted(folder.rglob(f"{stem}.csv*"))]
    if not found:
        raise FileNotFoundError(f"no {' or '.join(f'{stem}.csv' for stem in FILES[name])} in {folder}")
    return found[0]


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
