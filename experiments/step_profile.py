"""How long do steps of the real engine take, by token budget and contents?  Runs that touch every budget -> step times.

Each run offers its requests at once, so the scheduler alone decides what every step computes, the same in every repeat; the
simulator tells what that is.  A step's time is the median over repeats; a line per budget is fitted to them
(`nanojax.step_time.fit`), host work included.  The coefficients stand in a record's series `step_times`, a row per budget.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64

from nanojax import step_time, workload
from nanojax.config import EngineConfig
from nanojax.scheduler import Policy
from nanojax.serve import Driver, Engine
from nanojax.simulate import Host, simulate
from nanojax.step_time import FEATURES, StepCoefficients
from nanojax.workload import Trace

__all__ = ["StepTable", "fit", "from_series", "host_of", "profile_traces", "seconds", "time_steps", "to_series"]

SERIES = "step_times"
OUTPUT_LENS = (4, 12)
"""Outputs of the requests that are timed, tokens; long enough for steps of decode alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class StepTable:
    """Steps of one repeat of all runs: budget (index), contents (by `FEATURES`) and seconds."""

    rung: Int64[np.ndarray, "n"]
    work: Float64[np.ndarray, "n f"]
    seconds: Float64[np.ndarray, "n"]


def host_of(engine: Engine) -> Host:
    """How the simulator follows this engine.  Raises ValueError for the device loop, which reports several steps at once."""
    if engine.driver is Driver.DEVICE_LOOP:
        raise ValueError("driver=device_loop gives no time of each step; use host_sync or dispatch_ahead")
    return Host(reads_late=engine.driver is Driver.DISPATCH_AHEAD)


def profile_traces(config: EngineConfig, rng: np.random.Generator) -> list[Trace]:
    """Requests, all there at once, whose steps run on every budget, with short and long contexts.

    A budget that the slots can fill gets as many decoding requests as three quarters of it.  Each gets prompts of six tenths
    of it and more, the largest of less, too: a request that comes alone fills little of it, and padding is left out.  Then
    come a few long prompts, and short ones for half of the slots.
    """
    traces, longest = [], config.max_len - OUTPUT_LENS[1]

    def add(input_lens: Sequence[int] | np.ndarray, output_lens: Sequence[int] | np.ndarray) -> None:
        lens = np.asarray(input_lens, np.int64), np.asarray(output_lens, np.int64)
        traces.append(Trace(f"profile-{len(traces)}", np.zeros(len(lens[0])), *lens))

    def outputs(num: int) -> np.ndarray:
        return rng.integers(OUTPUT_LENS[0], OUTPUT_LENS[1] + 1, num)

    for budget in config.token_budgets:
        if budget <= config.num_slots:
            num = max(1, 3 * budget // 4)
            add(rng.integers(1, longest // 8 + 1, num), outputs(num))
        is_largest = budget == config.token_budgets[-1] > config.num_slots
        smaller = max((other for other in config.token_budgets if other < budget), default=0)
        for fraction in (0.15, 0.25, 0.4, 0.6) if is_largest else (0.6, 0.7, 0.8, 0.9):
            if fraction * budget <= smaller:
                continue
            num = int(rng.integers(1, min(8, config.num_slots, budget // 4 + 1) + 1))
            add(np.full(num, max(1, min(longest, int(fraction * budget / num)))), np.full(num, 2))
    few, many = -(-config.num_slots // 16), -(-config.num_slots // 2)
    add(rng.integers(longest // 4, 3 * longest // 4 + 1, few), outputs(few))
    add(rng.integers(1, longest // 6 + 1, many), outputs(many))
    return traces


def time_steps(engine: Engine, policy: Policy, traces: Sequence[Trace], rng: np.random.Generator) -> StepTable:
    """Runs the traces on the engine, one after another.  Raises RuntimeError if it does other steps than the simulator."""
    config, host, unit = engine.config, host_of(engine), step_time.linear([1.0] * len(engine.config.token_budgets))
    rungs, works, seconds = [], [], []
    num_rows = max(map(len, traces))
    for trace in traces:
        requests = workload.synthetic_requests(trace, engine.model.vocab_size, rng)
        engine.reset_metrics()
        engine.generate(requests)
        simulation = simulate(config, policy, unit, trace, host=host, num_rows=num_rows)
        ours, theirs = ([dataclasses.astuple(step)[1:] for step in run.steps] for run in (simulation, engine))
        if ours != theirs:
            raise RuntimeError(f"{trace.name}: the engine's {len(theirs)} steps are not the simulator's {len(ours)}")
        start_s = min(record.arrival_s for record in engine.records)
        seconds.append(np.diff([start_s, *(step.time_s for step in engine.steps)]))
        rungs.append(simulation.rung)
        works.append(simulation.work)
    return StepTable(np.concatenate(rungs), np.concatenate(works), np.concatenate(seconds))


def fit(repeats: Sequence[StepTable], num_rungs: int) -> StepCoefficients:
    """Step times from the medians over repeats of the same runs (of two: their mean).  Raises ValueError for a budget without a step."""
    first = repeats[0]
    return step_time.fit(first.rung, first.work, np.median([table.seconds for table in repeats], axis=0), num_rungs)


def seconds(step: StepCoefficients, table: StepTable) -> Float64[np.ndarray, "n"]:
    """What the coefficients say of each step of a table."""
    per_unit_s, constant_s = np.asarray(step.per_unit_s, np.float64), np.asarray(step.constant_s, np.float64)
    return constant_s[table.rung] + np.sum(per_unit_s[table.rung] * table.work, axis=1)


def to_series(step: StepCoefficients, token_budgets: Sequence[int]) -> dict[str, list]:
    """Columns for a record: a row per budget, seconds and seconds per unit of each of `FEATURES`."""
    table = np.asarray(step.per_unit_s, np.float64)
    columns = {f"s_per_{name}": table[:, i].tolist() for i, name in enumerate(FEATURES)}
    return {"token_budget": list(token_budgets), "constant_s": np.asarray(step.constant_s).tolist(), **columns}


def from_series(record: Mapping[str, Any]) -> tuple[StepCoefficients, tuple[int, ...]]:
    """The step times of a record, and the token budgets they are for.  Raises ValueError where there are none."""
    if SERIES not in record["series"]:
        raise ValueError(f"a record of {record['experiment']} has no series {SERIES!r}")
    table = record["series"][SERIES]
    step = StepCoefficients(
        constant_s=jnp.asarray(table["constant_s"], jnp.float32),
        per_unit_s=jnp.asarray(np.stack([table[f"s_per_{name}"] for name in FEATURES], axis=1), jnp.float32),
        slowdown=jnp.float32(1.0),
    )
    return step, tuple(table["token_budget"])
