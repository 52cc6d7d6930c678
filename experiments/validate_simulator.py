"""Does the simulator say how fast the real engine is?  Profile, predict and measure on the device at hand, in one process.

Figure: tokens computed over time with all requests there at once, and normalized latency at a request rate, measured and simulated.
Claim: step times profiled on this engine predict throughput within 5 % and the median normalized latency within 10 %, on
a trace that was not profiled.
Command: python -m experiments.validate_simulator [--repeats=3 --request_rate_fraction=0.7]
Hardware: any, one device; the defaults (SmolLM2-135M) are meant for a CPU.    Minutes: 3.
Expected: both within their aims on a machine that runs nothing else; on a shared one the pairs scatter by 15 %.

How: the profiling runs (`experiments/step_profile.py`) are timed before and after each run that is predicted, and both
together predict it: a shared machine can change its speed by half within minutes.  A repeat is an offline and an online run;
errors are those of each pair, and medians over repeats count.
Nothing of the predicted trace goes into the profile; the request rate is that fraction of what the simulator says the engine
can take, and is given to both.

    out/validate_simulator.json            simulated: predictions and errors; series `step_times` (a profile)
    out/validate_simulator-measured.json   measured: the same runs by the clock
    out/validate_simulator.png             both
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import comparison, figures, serving, serving_flags, step_profile
from experiments.record import make_record, write_record
from experiments.step_profile import StepTable
from nanojax import workload
from nanojax.metrics import RequestRecord, StepRecord, summarize
from nanojax.serve import Engine
from nanojax.simulate import simulate
from nanojax.workload import Request, Trace

NAME = "validate_simulator"
THROUGHPUT, LATENCY = "total_tokens_per_s", "normalized_latency_s_per_token_p50"
SHOWN = (
    "duration_s", THROUGHPUT, "ttft_s_p50", "tpot_s_p50", LATENCY, "normalized_latency_s_per_token_mean",
    "normalized_latency_s_per_token_p99", "num_steps", "num_running_mean", "num_preemptions",
)  # fmt: skip
AIMS_PERCENT = {f"offline_{THROUGHPUT}": 5.0, f"online_{LATENCY}": 10.0}
DEFAULTS = {
    "trace": "splitwise", "length_divisor": 16, "num_requests": 20, "max_len": 640, "token_budgets": "16,32,256",
    "num_slots": 32,
}  # fmt: skip
SMOKE = {"repeats": 1, "num_requests": 6}


@dataclasses.dataclass(frozen=True)
class Served:
    """One run: requests and steps, times since its start."""

    records: list[RequestRecord]
    steps: list[StepRecord]


def define_flags(values: flags.FlagValues) -> None:
    serving_flags.define(values)
    serving_flags.define_work(values)
    for name, value in DEFAULTS.items():
        values.set_default(name, value)
    flags.DEFINE_float(
        "request_rate_fraction",
        0.7,
        "Of the rate that the engine can take, by the simulator.",
        0.01,
        flag_values=values,
    )
    flags.DEFINE_integer("repeats", 2, "Of the offline and the online run, in turn.", 1, flag_values=values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Profiles, predicts, measures, prints, writes records and figure; gives the record of the predictions."""
    for name, value in SMOKE.items() if values.smoke else ():
        values.set_default(name, value)
    with serving_flags.one_line_errors():
        loaded = serving.load(values)
        requests = serving.work(values, loaded, values.num_requests).requests
        engine, policy = serving.engine(values, loaded), serving.policy(values)
        host = step_profile.host_of(engine)
    requests = [dataclasses.replace(request, arrival_s=0.0) for request in requests]
    print(f"{loaded.config.name}: compiling ...", flush=True)
    engine.warm_up()
    rng, num_rungs = np.random.default_rng(values.seed), len(engine.config.token_budgets)
    traces = step_profile.profile_traces(engine.config, rng)
    step_profile.time_steps(engine, policy, traces[-1:], rng)  # what a first run does once, caches of the host included

    def profile() -> StepTable:
        return step_profile.time_steps(engine, policy, traces, rng)

    profiles = [profile()]
    alone = simulate(engine.config, policy, step_profile.fit(profiles, num_rungs), _trace(requests), host=host)
    rate_per_s = values.request_rate_fraction * len(requests) / alone.steps[-1].time_s
    times_s = workload.poisson_arrivals(len(requests), rate_per_s=rate_per_s, rng=rng)
    arriving = [dataclasses.replace(r, arrival_s=float(t)) for r, t in zip(requests, times_s, strict=True)]
    measured_runs: dict[str, list[Served]] = {"offline": [], "online": []}
    simulated_runs: dict[str, list[Served]] = {"offline": [], "online": []}
    for repeat in range(values.repeats):
        for kind, work in (("offline", requests), ("online", arriving)):
            start_s = time.perf_counter()
            measured_runs[kind].append(_served(engine, work))
            served_s = time.perf_counter()
            profiles.append(profile())
            step = step_profile.fit(profiles[-2:], num_rungs)
            one = simulate(engine.config, policy, step, _trace(work), host=host)
            simulated_runs[kind].append(Served(one.records, one.steps))
            print(
                f"repeat {repeat + 1}: {kind} {served_s - start_s:.1f} s, profile {time.perf_counter() - served_s:.1f} s",
                flush=True,
            )  # fmt: skip
    step = step_profile.fit(profiles, num_rungs)
    num_pages = engine.config.num_pages
    by_repeat = {origin: _repeats(runs, num_pages) for origin, runs in
                 (("measured", measured_runs), ("simulated", simulated_runs))}  # fmt: skip
    measured, simulated = (_medians(by_repeat[origin]) for origin in ("measured", "simulated"))
    errors: dict[str, float] = {}
    for name, ours in by_repeat["simulated"].items():
        pairs = zip(ours, by_repeat["measured"][name], strict=True)
        found = [error for pair in pairs if (error := comparison.error_percent(*pair)) is not None]
        if len(found) == values.repeats:
            errors[f"error_percent_{name}"] = float(np.median(found))
    profile_s = np.median([table.seconds for table in profiles], axis=0)
    simulated |= errors | {
        "profile_num_steps": len(profile_s),
        "profile_fit_mean_absolute_error_percent": 100
        * float(np.mean(np.abs(step_profile.seconds(step, profiles[0]) / profile_s - 1))),
        "profile_speed_spread_ratio": float(np.ptp([t.seconds.sum() for t in profiles]) / profile_s.sum()),
    }
    config = serving.describe(values, loaded) | {
        "request_rate_per_s": rate_per_s, "repeats": values.repeats, "aims_percent": AIMS_PERCENT,
        "request_rate_fraction": values.request_rate_fraction,
    }  # fmt: skip
    series = {
        origin: {
            "progress": _progress(_middle(runs["offline"]).steps),
            "latency": _quantiles([one.records for one in runs["online"]]),
            "repeats": by_repeat[origin],
        }
        for origin, runs in (("measured", measured_runs), ("simulated", simulated_runs))
    }
    series["simulated"][step_profile.SERIES] = step_profile.to_series(step, engine.config.token_budgets)
    record = make_record(
        NAME, "simulated", metrics=simulated, config=config, seed=values.seed, series=series["simulated"]
    )
    clocked = make_record(
        f"{NAME}-measured", "measured", metrics=measured, config=config, seed=values.seed, series=series["measured"]
    )
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    write_record(clocked, folder / f"{NAME}-measured.json")
    picture = draw(record, clocked, folder / f"{NAME}.png")
    print(comparison.text_table({
        "metric": list(measured),
        "measured": list(measured.values()),
        "simulated": [simulated[name] for name in measured],
        "error (%)": [errors.get(f"error_percent_{name}") for name in measured],
    }))  # fmt: skip
    for name, aim in AIMS_PERCENT.items():
        error = errors[f"error_percent_{name}"]
        print(f"{name}: error {error:+.1f} %, aim {aim:.0f} %: {'met' if abs(error) <= aim else 'missed'}")
    print(f"records {folder / NAME}.json, {folder / NAME}-measured.json, figure {picture}")
    return record


def draw(record: dict[str, Any], clocked: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    """Both runs, measured and simulated, from their records."""
    lines = []
    for one in (clocked, record):
        progress, latency = one["series"]["progress"], one["series"]["latency"]
        label = "simulator" if one is record else "engine"
        lines.append(
            figures.Line(label, one["origin"], progress["time_s"], progress["tokens"], PANELS[0], marked=False)
        )
        lines.append(figures.Line(
            label, one["origin"], latency["percent"], latency["normalized_latency_s_per_token"], PANELS[1], marked=False,
        ))  # fmt: skip
    sources = [figures.sources_of(clocked)[-1], figures.sources_of(record)[-1]]
    config, metrics = record["config"], record["metrics"]
    notes = [
        f"{name}: error {metrics[f'error_percent_{name}']:+.1f} %, aim {aim:.0f} %"
        for name, aim in AIMS_PERCENT.items()
    ] + [
        f"{config['num_requests']} requests of {config['trace']}, lengths / {config['length_divisor']}; online at "
        f"{config['request_rate_per_s']:.2f} requests/s; medians over {config['repeats']} repeats.",
        "Step times come from other requests on the same engine.",
    ]
    return figures.line_chart(
        f"Simulator against engine: {config['model']}, {config['dtype']}", sources, lines, path,
        x_label=("time (s)", "requests (%), the fastest first"), y_label=("tokens", "s / token"), notes=notes,
    )  # fmt: skip


PANELS = ("offline: tokens computed", "online: normalized latency")


def _served(engine: Engine, requests: Sequence[Request]) -> Served:
    """One run; latencies count from when a request was due, also if the host was busy then."""
    engine.reset_metrics()
    start_s = time.perf_counter()
    engine.replay(requests)
    due_s = {request.request_id: request.arrival_s for request in requests}
    records = [
        dataclasses.replace(
            record, arrival_s=due_s[record.request_id], first_token_s=record.first_token_s - start_s,
            finish_s=record.finish_s - start_s,
        )
        for record in engine.records
    ]  # fmt: skip
    return Served(records, [dataclasses.replace(step, time_s=step.time_s - start_s) for step in engine.steps])


def _trace(requests: Sequence[Request]) -> Trace:
    """Lengths and arrivals."""
    arrival_s = np.array([request.arrival_s for request in requests])
    input_lens = np.array([len(request.prompt_ids) for request in requests])
    output_lens = np.array([request.sampling.max_tokens for request in requests])
    return Trace("validation", arrival_s, input_lens, output_lens)


def _shown(records: Sequence[RequestRecord], steps: Sequence[StepRecord], num_pages: int) -> dict[str, Any]:
    metrics = summarize(records, steps, num_pages=num_pages)
    return {name: metrics[name] for name in SHOWN}


def _repeats(found: dict[str, list[Served]], num_pages: int) -> dict[str, list]:
    """A row per repeat."""
    columns: dict[str, list] = {}
    for kind, runs in found.items():
        for one in runs:
            for name, value in _shown(one.records, one.steps, num_pages).items():
                columns.setdefault(f"{kind}_{name}", []).append(value)
    return columns


def _medians(by_repeat: dict[str, list]) -> dict[str, Any]:
    """Over the repeats."""
    return {name: None if None in column else float(np.median(column)) for name, column in by_repeat.items()}


def _middle(runs: Sequence[Served]) -> Served:
    """The run of median duration (the shorter of two)."""
    return sorted(runs, key=lambda one: one.steps[-1].time_s)[(len(runs) - 1) // 2]


def _progress(steps: Sequence[StepRecord], num_points: int = 120) -> dict[str, list]:
    """Tokens computed by the ends of some steps."""
    total = np.cumsum([step.num_decode_tokens + step.num_prefill_tokens for step in steps])
    at = np.unique(np.linspace(0, len(steps) - 1, num_points).round().astype(int))
    return {"time_s": [0.0, *(steps[i].time_s for i in at)], "tokens": [0, *total[at].tolist()]}


def _quantiles(runs: Sequence[Sequence[RequestRecord]]) -> dict[str, list]:
    """Normalized latency of each request (its median over the runs), by rank."""
    by_run = [{r.request_id: (r.finish_s - r.arrival_s) / r.output_len for r in run} for run in runs]
    latencies = np.sort([np.median([one[name] for one in by_run]) for name in by_run[0]])
    percent = 100 * (np.arange(len(latencies)) + 0.5) / len(latencies)
    return {"percent": percent.tolist(), "normalized_latency_s_per_token": latencies.tolist()}


if __name__ == "__main__":
    serving_flags.launch(define_flags, run)
