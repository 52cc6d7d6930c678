"""How long do users wait at a given request rate?  Requests arrive in real time, rate after rate, on one engine.

Figure: normalized latency (mean, shaded to p99) against request rate, with the paper's 0.2 s / token; the time to the
first token likewise.
Claim: paper section 6.3 (its figure of latency against request rate): latency stays low up to a rate near the offline
throughput, then the queue grows.
Command: make figures, or python -m experiments.online_latency --request_rates=1,2,4,8 --duration_s=30
         python -m experiments.online_latency --arrival=recorded --trace=TRACE.csv --speeds=1,2,4
Hardware: any; the default model is meant for a CPU.    Minutes: rates * duration_s, and the time to drain.
Expected: no published number for this model; the knee lies near (offline tokens/s) / (mean tokens of a request).

    out/online_latency.json           record: series `latency` has a row per rate
    out/online_latency.png, -ttft.png its figures
"""

import dataclasses
import math
import pathlib
import time
from typing import Any

import numpy as np
from absl import flags

from experiments import plots, rungs, serving, serving_flags, summary
from experiments.record import make_record, write_record
from nanojax.metrics import summarize
from nanojax.serve import Engine
from nanojax.workload import Request, poisson_arrivals

NAME = "online_latency"
SLO_S_PER_TOKEN = 0.2
ARRIVALS = ("poisson", "recorded")
LATENCIES = ("normalized_latency_s_per_token", "ttft_s", "tpot_s")
SHOWN = (
    "num_requests", "duration_s", "total_tokens_per_s", "output_tokens_per_s", "num_preemptions",
    "tokens_per_step_mean", "num_running_mean", "page_occupancy_fraction_mean",
    *(f"{name}_{statistic}" for name in LATENCIES for statistic in ("mean", "p50", "p90", "p99")),
)  # fmt: skip


def define_flags(values: flags.FlagValues) -> None:
    serving_flags.define(values)
    serving_flags.define_work(values)
    flags.DEFINE_enum("arrival", ARRIVALS[0], ARRIVALS, "Poisson, or the trace's own times.", flag_values=values)
    flags.DEFINE_string("request_rates", "1,2,4,8", "Requests per second, one run each (poisson).", flag_values=values)
    flags.DEFINE_string("speeds", "1", "How much faster than recorded, one run each (recorded).", flag_values=values)
    flags.DEFINE_float(
        "duration_s", 20.0, "Arrivals last that long at each rate; 0: --num_requests each.", 0.0, flag_values=values
    )


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Serves each rate, prints, writes the record and the figures; gives the record."""
    with serving_flags.one_line_errors():
        is_poisson = values.arrival == "poisson"
        settings = serving_flags.numbers(values.request_rates if is_poisson else values.speeds)
        loaded = serving.load(values)
        engine = serving.engine(values, loaded)
        runs = [arrivals(values, loaded, setting) for setting in settings]
        for request in (request for requests in runs for request in requests):
            engine.check(request)
    print(f"{loaded.config.name}: compiling ...", flush=True)
    engine.warm_up()
    print(rungs.text(rungs.choose(values, loaded.config)), end="", flush=True)
    rows = []
    for setting, requests in zip(settings, runs, strict=True):
        last_s = max(request.arrival_s for request in requests)
        rate = setting if is_poisson else (len(requests) - 1) / last_s
        print(f"{rate:.3g} requests/s: {len(requests)} requests in {last_s:.1f} s", flush=True)
        metrics = serve(engine, requests)
        rows.append({"request_rate_per_s": rate, **{name: metrics[name] for name in SHOWN}})
        print(
            f"  normalized latency {_milli(metrics, 'normalized_latency_s_per_token_mean')} mean, "
            f"{_milli(metrics, 'normalized_latency_s_per_token_p99')} p99 ms/token; "
            f"first token {_milli(metrics, 'ttft_s_mean')} ms mean; {metrics['total_tokens_per_s']:.0f} tokens/s"
        )
    record = _record(values, serving.describe(values, loaded), rows)
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    pictures = [
        plots.plot_latency([record], folder / f"{NAME}.png", slo_s_per_token=SLO_S_PER_TOKEN),
        plots.plot_sweep(record, "ttft_s_mean", folder / f"{NAME}-ttft.png"),
    ]
    print(f"record {folder / NAME}.json, figures {', '.join(map(str, pictures))}")
    return record


def arrivals(values: flags.FlagValues, loaded: serving.LoadedModel, setting: float) -> list[Request]:
    """Requests with their times at one rate (poisson) or speed (recorded).

    Raises ValueError for recorded times where the trace has none.
    """
    if values.arrival == "poisson":
        num_requests = max(2, math.ceil(setting * values.duration_s)) if values.duration_s else values.num_requests
        requests = serving.work(values, loaded, num_requests).requests
        rng = np.random.default_rng(values.seed)
        times_s = poisson_arrivals(num_requests, rate_per_s=setting, rng=rng)
        return [dataclasses.replace(r, arrival_s=float(t)) for r, t in zip(requests, times_s, strict=True)]
    requests = serving.work(values, loaded, values.num_requests).requests
    if not requests[-1].arrival_s > 0:
        raise ValueError(f"--trace={values.trace} has no arrival times to replay; use --arrival=poisson")
    at_speed = [dataclasses.replace(r, arrival_s=(r.arrival_s - requests[0].arrival_s) / setting) for r in requests]
    if values.duration_s:
        at_speed = [r for r in at_speed if r.arrival_s <= values.duration_s]
    if len(at_speed) < 2 or not at_speed[-1].arrival_s > 0:
        raise ValueError(f"fewer than 2 arrival times of {values.trace} are within duration_s={values.duration_s}")
    return at_speed


def serve(engine: Engine, requests: list[Request]) -> dict[str, int | float | None]:
    """Metrics of one run.  Latency counts from the time a request was due, also if the host was busy then."""
    engine.reset_metrics()
    start_s = time.perf_counter()
    with summary.progress(len(requests), {}) as on_event:
        engine.replay(requests, on_event)
    due_s = {request.request_id: start_s + request.arrival_s for request in requests}
    records = [dataclasses.replace(record, arrival_s=due_s[record.request_id]) for record in engine.records]
    return summarize(records, engine.steps, num_pages=engine.config.num_pages)


def _record(values: flags.FlagValues, config: dict[str, Any], rows: list[dict]) -> dict[str, Any]:
    table = {name: [row[name] for row in rows] for name in rows[0]}
    within = [row for row in rows if row["normalized_latency_s_per_token_mean"] <= SLO_S_PER_TOKEN]
    best = max((row["request_rate_per_s"] for row in within), default=None)
    metrics = {"request_rate_within_slo_per_s_max": best}
    own = {name: values[name].value for name in ("arrival", "request_rates", "speeds", "duration_s")}
    config = config | own | {"swept": ["request_rate_per_s"], "slo_s_per_token": SLO_S_PER_TOKEN}
    return make_record(
        NAME, "measured", metrics=metrics, config=config, seed=values.seed, series={"latency": table, "sweep": table}
    )


def _milli(metrics: dict[str, Any], name: str) -> str:
    return "-" if metrics[name] is None else f"{1e3 * metrics[name]:.0f}"


if __name__ == "__main__":
    serving_flags.launch(define_flags, run)
