"""How many tokens per second does the engine serve when all requests are there at once?

Figure: throughput, running requests and KV pages over time.  With `--sweep` a figure of one metric by the swept flag.
Claim: paper section 6.2, offline throughput (input + output tokens / time) and its percentage of the optimum (Eq. 5).
Command: make run, or python -m experiments.offline_throughput [--sweep="page_size=8,16,32" --repeats=3]
Hardware: any; the default, SmolLM2-135M and the project's 64 prompts, is meant for a CPU.    Minutes: 1.
Expected: no published number; the answers are readable, the percentage of the optimum says what is left to gain.

    out/offline_throughput.json              record of the run (of each point: offline_throughput-page_size=8.json)
    out/offline_throughput.png               its figure
    out/offline_throughput-sweep.json, .png  table and figure of a sweep
"""

import dataclasses
import gc
import pathlib
import time
from typing import Any

import numpy as np
from absl import flags

from experiments import breakdown, rungs, serving, serving_flags, summary
from experiments.record import make_record, write_record
from experiments.sweep import sweep_series
from nanojax import hardware
from nanojax.metrics import StepRecord, optimal_tokens_per_s, step_series, summarize
from nanojax.serve import Engine
from nanojax.weights import LoadedModel

NAME = "offline_throughput"
NUM_FIRST_TOKENS = 12
"""Of an answer that is shown before all steps are compiled."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run gave.  `steps` end at times since the start of the run, `peak` was measured right after it."""

    metrics: dict[str, Any]
    steps: list[StepRecord]
    config: dict[str, Any]
    peak: hardware.Measurement
    num_active_params: int


def define_flags(values: flags.FlagValues) -> None:
    serving_flags.define(values)
    serving_flags.define_work(values)
    flags.DEFINE_string("sweep", "", "Runs to compare: page_size=8,16,32; several flags with ';'.", flag_values=values)
    flags.DEFINE_string("sweep_metric", "total_tokens_per_s", "What the figure of a sweep shows.", flag_values=values)
    flags.DEFINE_integer("repeats", 1, "Runs of each point, points in turn; the median counts.", 1, flag_values=values)
    flags.DEFINE_bool("breakdown", False, "Also time the parts of a step, about a minute.", flag_values=values)


def run(values: flags.FlagValues) -> list[dict[str, Any]]:
    """Runs all points, prints, writes records and figures; gives the records of the points."""
    with serving_flags.one_line_errors():
        points = serving_flags.sweep_points(values, values.sweep)
    folder = pathlib.Path(values.out)
    runs: list[list[Run]] = [[] for _ in points]
    models: dict[tuple, LoadedModel] = {}
    for repeat in range(values.repeats):
        for (point, own), results in zip(points, runs, strict=True):
            label = ", ".join(f"{name}={value}" for name, value in point.items())
            if label or values.repeats > 1:
                print(f"-- {label or NAME} ({repeat + 1} of {values.repeats})")
            results.append(_serve(own, models))
            if values.sweep:
                _check_metric(values.sweep_metric, results[-1])
            gc.collect()  # the engine's KV cache, before the next one is made
    from experiments import plots  # not before: the first tokens need not wait until matplotlib is there

    records = []
    for (point, own), results in zip(points, runs, strict=True):
        same_dtype = (one for many in runs for one in many if one.config["dtype"] == own.dtype)
        peak = max((one.peak for one in same_dtype), key=lambda peak: peak.median)
        typical = _with_optimum(_median(results), peak)
        record = make_record(
            NAME, "measured", metrics=typical.metrics, config=typical.config, seed=own.seed,
            series={"timeline": step_series(typical.steps)},
        )  # fmt: skip
        stem = "-".join([NAME, *(f"{name}={value}" for name, value in point.items())]).replace("/", "_")
        write_record(record, folder / f"{stem}.json")
        picture = plots.plot_timeline(record, folder / f"{stem}.png")
        print(f"\n{stem}\n{summary.table(record['metrics'], record['device']['name'])}")
        if own.breakdown:
            print(breakdown.table(record["metrics"]))
        print(f"record {folder / stem}.json, figure {picture}")
        records.append(record)
    if values.sweep:
        _write_sweep(values, [point for point, _ in points], records, folder)
    return records


def _serve(values: flags.FlagValues, models: dict[tuple, LoadedModel]) -> Run:
    """One run of the engine on its work.  `models` keeps what is loaded already."""
    start_s, is_first = time.perf_counter(), not models
    with serving_flags.one_line_errors():
        key = (values.model, values.weights, values.dtype, values.seed)
        loaded = models[key] = models.get(key) or serving.load(values)
        load_s = time.perf_counter() - start_s
        work = serving.work(values, loaded, values.num_requests)
        engine = serving.engine(values, loaded)
        for request in work.requests:
            engine.check(request)
    print(f"{loaded.config.name}: {loaded.config.num_params / 1e6:,.1f} M parameters, {values.dtype}; ", end="")
    print(f"loaded in {load_s:.1f} s", flush=True)
    start_s = time.perf_counter()
    engine.warm_up(engine.config.token_budgets[:1])
    compile_s = time.perf_counter() - start_s
    first = _first_words(engine, work) if is_first else {}
    start_s = time.perf_counter()
    engine.warm_up()
    compile_s += time.perf_counter() - start_s
    print(f"compiled in {compile_s:.1f} s", flush=True)
    print(rungs.text(rungs.choose(values, loaded.config)), end="", flush=True)
    before = _measure_peak(values)
    start_s = time.perf_counter()
    with summary.progress(len(work.requests), work.questions) as on_event:
        engine.generate(work.requests, on_event)
    metrics: dict[str, Any] = summarize(engine.records, engine.steps, num_pages=engine.config.num_pages)
    metrics |= {"load_s": load_s, "compile_s": compile_s, **first}
    config = serving.describe(values, loaded) | {"num_dropped": work.num_dropped}
    peak = max(before, _measure_peak(values), key=lambda peak: peak.median)  # shared machines drift
    steps = [dataclasses.replace(step, time_s=step.time_s - start_s) for step in engine.steps]
    if values.breakdown:
        del engine  # the parts need room for a KV cache of their own
        gc.collect()
        mean_input_len = float(np.mean([len(request.prompt_ids) for request in work.requests]))
        metrics |= breakdown.measure(values, loaded, steps, mean_input_len=mean_input_len)
    return Run(metrics, steps, config, peak, loaded.config.num_active_params)


def _first_words(engine: Engine, work: serving.Work) -> dict[str, float]:
    """The shortest request says a little, on the steps that are compiled; when its first token came."""
    request = min(work.requests, key=lambda request: len(request.prompt_ids))
    words, num_tokens, age_s = "", 0, None
    engine.submit(request)
    while engine.num_unfinished and num_tokens < NUM_FIRST_TOKENS:
        for event in engine.poll():
            age_s = age_s if num_tokens else summary.process_age_s()
            words, num_tokens = words + event.text, num_tokens + len(event.token_ids)
    if engine.num_unfinished:
        engine.cancel(request.request_id)
    engine.poll()  # what was under way
    engine.reset_metrics()
    print(summary.sample(request.request_id, work.questions.get(request.request_id, ""), words + " ..."))
    if age_s is None:
        return {}
    print(f"first token {age_s:.1f} s after the start of the process", flush=True)
    return {"first_token_since_process_start_s": age_s}


def _measure_peak(values: flags.FlagValues) -> hardware.Measurement:
    if values.smoke:
        return hardware.measure_peak_flops(values.dtype, sizes=(128,), num_repeats=3)
    return hardware.measure_peak_flops(values.dtype, num_repeats=5)


def _with_optimum(one: Run, peak: hardware.Measurement) -> Run:
    """The run beside its optimum.  `peak` is the best of all runs, so that a noisy machine does not flatter one."""
    optimum = optimal_tokens_per_s(peak.median, one.num_active_params)
    percent = 100 * one.metrics["total_tokens_per_s"] / optimum
    found = {"peak_flops": peak.median, "optimal_tokens_per_s": optimum, "percent_of_optimal": percent}
    return dataclasses.replace(one, metrics=one.metrics | found, config=one.config | {"peak_flops_of": peak.what})


def _median(results: list[Run]) -> Run:
    """The run of median throughput (of an even number the slower one), with the slowest and the fastest beside it."""
    ordered = sorted(results, key=lambda result: result.metrics["total_tokens_per_s"])
    rates = [result.metrics["total_tokens_per_s"] for result in ordered]
    middle = ordered[(len(ordered) - 1) // 2]
    spread = {"num_repeats": len(ordered), "total_tokens_per_s_min": rates[0], "total_tokens_per_s_max": rates[-1]}
    return dataclasses.replace(middle, metrics=middle.metrics | spread)


def _check_metric(name: str, one: Run) -> None:
    """Said after the first run of a sweep, not after the last."""
    known = _with_optimum(_median([one]), one.peak).metrics
    with serving_flags.one_line_errors():
        if name not in known:
            raise ValueError(f"--sweep_metric={name} is none of {', '.join(known)}")


def _write_sweep(
    values: flags.FlagValues, points: list[dict], records: list[dict[str, Any]], folder: pathlib.Path
) -> None:
    table = sweep_series(points, [record["metrics"] for record in records])
    config: dict[str, Any] = records[0]["config"] | {"swept": list(points[0]), "sweep": values.sweep}
    for name in points[0]:
        config.pop(name, None)
    record = make_record(NAME, "measured", metrics={}, config=config, seed=values.seed, series={"sweep": table})
    write_record(record, folder / f"{NAME}-sweep.json")
    print(f"\n{values.sweep_metric} by {', '.join(points[0])}:")
    for point, value in zip(points, table[values.sweep_metric], strict=True):
        label = ", ".join(f"{name}={setting}" for name, setting in point.items())
        print(f"  {label:<40} {'-' if value is None else format(value, ',.4g')}")
    if len(points[0]) <= 2:
        from experiments import plots

        print(f"figure {plots.plot_sweep(record, values.sweep_metric, folder / f'{NAME}-sweep.png')}")


if __name__ == "__main__":
    serving_flags.launch(define_flags, run)
