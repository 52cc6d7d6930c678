"""How would this service do on that hardware?  The engine's own scheduler under a modelled clock: one engine, a sweep, or a fleet.

Figure: throughput, running requests and pages over time; with `--sweep` one metric by the swept flag; with
`--num_replicas` requests in the fleet over time.
Claim: none of its own; `experiments.validate_simulator` holds the simulator against the real engine.
Command: python -m experiments.simulate_serving --trace=sharegpt --num_requests=4000 --pipeline=llama_70b_figure6
         python -m experiments.simulate_serving --arrival=recorded --trace=AzureLLMInferenceTrace_conv.csv.gz --max_len=16384
         python -m experiments.simulate_serving --arrival=poisson --sweep="admission=greedy,peak_memory;request_rate=4,8,16"
         python -m experiments.simulate_serving --arrival=poisson --request_rate=800 --num_replicas=100 --routing=least_loaded
Hardware: none (two CPU cores).    Minutes: an hour of the Azure trace takes less than one.
Expected: LLaMA-2-70B on 8 A100 and lengths of Table 4 reach what Figure 7's pipelines promise, less what filling and draining cost.

Prompts of several rounds: `--num_rounds=4` makes conversations of the trace's requests; with `--offloads_kv` their keys and
values come back from a larger memory.  `--stops_late` is the original's one-iteration lag of ends.

    out/simulate_serving.json, .png
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import fleet_run, modelled_steps, plots, serving, serving_flags
from experiments.record import make_record, write_record
from experiments.sweep import sweep_series
from nanojax import workload
from nanojax.config import PRESETS, EngineConfig
from nanojax.metrics import step_series, summarize
from nanojax.scheduler import Policy
from nanojax.serve import Driver
from nanojax.simulate import Host, Simulation, simulate, simulate_many
from nanojax.step_time import StepCoefficients
from nanojax.workload import Rounds, Trace

NAME = "simulate_serving"
ARRIVALS = ("offline", "poisson", "recorded")
DEFAULTS = {
    "model": "llama-2-70b", "trace": "sharegpt", "num_requests": 1000, "token_budgets": "2048", "num_slots": 2048,
    "num_pages": 94_720, "max_len": 4096,
}  # fmt: skip
SMOKE = {"model": "llama-2-70b"}
NO_MODEL = ("prompts", "sharegpt_texts")


@dataclasses.dataclass(frozen=True)
class Case:
    """One simulation, ready to run."""

    config: EngineConfig
    policy: Policy
    host: Host
    step: StepCoefficients
    work: Trace | Rounds


def define_flags(values: flags.FlagValues) -> None:
    serving_flags.define(values)
    serving_flags.define_work(values)
    modelled_steps.define_flags(values)
    fleet_run.define_flags(values)
    for name, value in DEFAULTS.items():
        values.set_default(name, value)
    flags.DEFINE_enum(
        "arrival", ARRIVALS[0], ARRIVALS, "All at once, at --request_rate, or as recorded.", flag_values=values
    )
    flags.DEFINE_float("request_rate", 8.0, "Requests (conversations) per second (poisson).", 1e-9, flag_values=values)
    flags.DEFINE_integer("num_rounds", 1, "Rounds of a conversation at most.", 1, flag_values=values)
    flags.DEFINE_float("think_s", 10.0, "Mean time from an answer to the next question.", 0.0, flag_values=values)
    flags.DEFINE_bool("offloads_kv", False, "Keep all keys and values in a larger memory, too.", flag_values=values)
    flags.DEFINE_bool("stops_late", False, "Notice the end of a request one step late.", flag_values=values)
    flags.DEFINE_string("sweep", "", "Runs to compare: request_rate=4,8;seed=0,1.", flag_values=values)
    flags.DEFINE_string(
        "sweep_metric", "normalized_latency_s_per_token_mean", "What its figure shows.", flag_values=values
    )
    flags.DEFINE_integer(
        "vmap_steps", None, "Points that differ in requests and times only: side by side in one program (jax.vmap), of at "
        "most so many steps each.", 1, flag_values=values,
    )  # fmt: skip


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Simulates, prints, writes the record and the figure; gives the record."""
    for name, value in SMOKE.items() if values.smoke else ():
        values.set_default(name, value)
    with serving_flags.one_line_errors():
        points = serving_flags.sweep_points(values, values.sweep)
        if values.trace in NO_MODEL:
            raise ValueError(f"--trace={values.trace} has texts; the simulator takes lengths")
        if values.num_replicas is not None and values.sweep:
            raise ValueError(
                "--num_replicas and --sweep do not go together: sweep one engine, or run fleets one by one"
            )
        cases = [case(own) for _, own in points]
    if values.num_replicas is not None:
        return _fleet(values, cases[0])
    start_s = time.perf_counter()
    simulations = _simulate_all(cases, values.vmap_steps)
    wall_s = time.perf_counter() - start_s
    found = [
        summarize(one.records, one.steps, num_pages=its.config.num_pages)
        for one, its in zip(simulations, cases, strict=True)
    ]
    num_steps = sum(len(one.steps) for one in simulations)
    speed = {"wall_s": wall_s, "simulated_steps_per_s": num_steps / wall_s}
    folder = pathlib.Path(values.out)
    if not values.sweep:
        series = {"timeline": step_series(simulations[0].steps)}
        metrics = {**found[0], **speed}
        record = make_record(
            NAME, "simulated", metrics=metrics, config=describe(values), seed=values.seed, series=series
        )
        picture = plots.plot_timeline(record, folder / f"{NAME}.png")
        for name in ("duration_s", "total_tokens_per_s", values.sweep_metric, "ttft_s_p50", "num_preemptions"):
            print(f"{name:<45} {'-' if metrics[name] is None else format(metrics[name], ',.4g')}")
    else:
        table = sweep_series([point for point, _ in points], found)
        config = describe(values) | {"swept": list(points[0][0])}
        record = make_record(NAME, "simulated", metrics=speed, config=config, seed=values.seed, series={"sweep": table})
        with serving_flags.one_line_errors():
            picture = plots.plot_sweep(record, values.sweep_metric, folder / f"{NAME}.png")
        for (point, _), metrics in zip(points, found, strict=True):
            label = ", ".join(f"{name}={setting}" for name, setting in point.items())
            print(f"{label:<50} {values.sweep_metric} {metrics[values.sweep_metric]:,.4g}")
    write_record(record, folder / f"{NAME}.json")
    print(f"{num_steps} steps in {wall_s:.1f} s; record {folder / NAME}.json, figure {picture}")
    return record


def case(values: flags.FlagValues) -> Case:
    """What the flags ask for.  Raises ValueError for requests that the engine cannot serve, or flags that do not fit."""
    config = serving_flags.engine_config(values, PRESETS[values.model].max_len)
    own = requests(values, config.max_len)
    host = Host(values.driver == Driver.DISPATCH_AHEAD.value, values.stops_late, values.offloads_kv)
    mean_output_len = values.expected_output_len or round(float(own.output_lens.mean()))
    policy = _policy(
        values.admission, values.priority, values.phase_order, values.batching, mean_output_len, values.seed
    )
    return Case(config, policy, host, modelled_steps.step_time_of(values, config, own), own)


def requests(values: flags.FlagValues, max_len: int) -> Trace | Rounds:
    """The requests that the flags ask for, the first at 0 s.  A recorded trace is served whole unless `--num_requests` is given."""
    rng = np.random.default_rng(values.seed)
    whole = values.arrival == "recorded" and values["num_requests"].using_default_value
    trace, _ = workload.length_filter(serving.length_trace(values, values.num_requests, rng), max_len=max_len)
    num = len(trace) if whole else min(values.num_requests, len(trace))
    trace = trace.select(np.arange(num))
    if values.arrival == "recorded":
        if not trace.arrival_s[-1] > 0:
            raise ValueError(f"--trace={values.trace} has no arrival times; use --arrival=poisson")
        times_s = trace.arrival_s
    elif values.arrival == "poisson":
        times_s = workload.poisson_arrivals(num, rate_per_s=values.request_rate, rng=rng)
    else:
        times_s = np.zeros(num)
    if values.num_rounds == 1:
        return workload.with_arrivals(trace, times_s)
    return workload.conversation_rounds(
        trace, times_s[: num // values.num_rounds], num_rounds=values.num_rounds, think_s_mean=values.think_s,
        max_len=max_len, rng=rng,
    )  # fmt: skip


def describe(values: flags.FlagValues) -> dict[str, Any]:
    """For the record: every flag that decides what is simulated."""
    hidden = {
        "out",
        "cache_dir",
        "smoke",
        "weights",
        "dtype",
        "kv_dtype",
        "attention",
        "check_invariants",
        "temperature",
    }
    mine = flags.FlagValues()
    define_flags(mine)
    shown = {name: values[name].value for name in sorted(set(mine) - hidden - {"vmap_steps"})}
    return {
        name: pathlib.Path(value).name if isinstance(value, str) and "/" in value else value
        for name, value in shown.items()
    } | {"token_budgets": [int(rung) for rung in values.token_budgets.replace("+", ",").split(",")]}


@functools.cache
def _policy(admission: str, priority: str, phase_order: str, batching: str, output_len: int, seed: int) -> Policy:
    """One value for equal flags, so that they share compiled programs."""
    mine = flags.FlagValues()
    serving_flags.define(mine)
    names = ("admission", "priority", "phase_order", "batching", "expected_output_len", "seed")
    for name, value in zip(names, (admission, priority, phase_order, batching, output_len, seed), strict=True):
        mine[name].value = value
    mine.mark_as_parsed()
    return serving.policy(mine)


def _simulate_all(cases: Sequence[Case], vmap_steps: int | None) -> list[Simulation]:
    """Each case by itself, two at a time on two cores; or by `jax.vmap` those that share a compiled program."""
    if vmap_steps is None:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(cases), unit=" runs") as bar:

            def one(its: Case) -> Simulation:
                found = simulate(its.config, its.policy, its.step, its.work, host=its.host)
                bar.update()
                return found

            return list(pool.map(one, cases))
    groups: dict[tuple, list[int]] = {}
    for i, its in enumerate(cases):
        groups.setdefault((its.config, its.policy, its.host, type(its.work)), []).append(i)
    found: dict[int, Simulation] = {}
    for (config, policy, host, _), members in tqdm(groups.items(), unit=" programs"):
        works = [cases[i].work for i in members]
        steps = [cases[i].step for i in members]
        with serving_flags.one_line_errors():
            together = simulate_many(config, policy, steps, works, host=host, max_steps=vmap_steps)
        found |= dict(zip(members, together, strict=True))
    return [found[i] for i in range(len(cases))]


def _fleet(values: flags.FlagValues, its: Case) -> dict[str, Any]:
    folder = pathlib.Path(values.out)
    with serving_flags.one_line_errors():
        metrics, series = fleet_run.run(values, its.config, its.policy, its.host, its.step, its.work)
    record = make_record(NAME, "simulated", metrics=metrics, config=describe(values), seed=values.seed, series=series)
    write_record(record, folder / f"{NAME}.json")
    picture = fleet_run.draw(record, folder / f"{NAME}.png")
    for name, value in metrics.items():
        print(f"{name:<45} {'-' if value is None else format(value, ',.4g')}")
    print(f"record {folder / NAME}.json, figure {picture}")
    return record


if __name__ == "__main__":
    serving_flags.launch(define_flags, run)
