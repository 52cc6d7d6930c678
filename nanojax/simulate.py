"""How would this trace be served by that hardware?  Trace x scheduler x step time -> the records that a real run leaves.

    step_time = step_time.from_layer_times([2.4e-3], num_layers=80)
    simulation = simulate(config, policy, step_time, trace)
    metrics.summarize(simulation.records, simulation.steps)

The scheduler is the engine's (`nanojax.virtual_engine`); this file brings traces to the device and results back.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64

from nanojax import virtual_clock, virtual_engine, virtual_run
from nanojax.array_types import Array, Bool
from nanojax.config import EngineConfig
from nanojax.invariants import InvariantError
from nanojax.metrics import RequestRecord, StepRecord
from nanojax.scheduler import Policy
from nanojax.step_time import FEATURES, StepTime
from nanojax.virtual_clock import Seconds
from nanojax.virtual_engine import Host, SimulatorState, StepLog
from nanojax.virtual_requests import Requests, TraceArrays
from nanojax.workload import Rounds, Trace

PLAIN_HOST = Host()
"""Waits for each step."""


@dataclasses.dataclass(frozen=True, eq=False)
class Simulation:
    """What a simulated run leaves; `records` are in the order of the trace, times in seconds since its start.

    rung: by step, index into `token_budgets`.    work: by step, what it was made of, columns `nanojax.step_time.FEATURES`.
    """

    records: list[RequestRecord]
    steps: list[StepRecord]
    rung: Int64[np.ndarray, "n"]
    work: Float64[np.ndarray, "n f"]


def simulate(
    config: EngineConfig,
    policy: Policy,
    step_time: StepTime,
    trace: Trace | Rounds,
    *,
    host: Host = PLAIN_HOST,
    max_output_len: int | None = None,
    num_rows: int | None = None,
    steps_per_launch: int = 4096,
    on_launch: Callable[[int, float], None] = lambda num_done, clock_s: None,
) -> Simulation:
    """Serves the whole trace.  `on_launch` hears, every `steps_per_launch` steps, the requests done and the simulated time.

    max_output_len: the limit on new tokens that the scheduler is told for every request; if None, each one's true length, as
        replaying a trace on the real engine does.
    num_rows: at least as many as requests; traces with equally many share a compiled program.
    Raises ValueError for a request that the engine could never serve, InvariantError if none can move.
    """
    check(config, trace)
    arrays = trace_arrays(trace, max_output_len=max_output_len, max_len=config.max_len, num_rows=num_rows)
    num_slots = min(config.num_slots, max(virtual_run.MIN_SLOTS, int(np.sum(trace.arrival_s <= 0))))
    state = _init(config, arrays, num_slots)
    forever = virtual_clock.from_float64(np.array(np.inf))
    logs, num_before = [], 0
    while True:
        state, log = _run(config, policy, host, steps_per_launch, step_time, arrays, forever, state)
        num_steps, num_done = int(state.num_steps), int(state.num_done)
        logs.append(jax.tree.map(lambda x, n=num_steps - num_before: np.asarray(x)[:n], log))
        on_launch(num_done, float(virtual_clock.to_float64(state.clock)))
        if bool(state.is_stuck):
            raise InvariantError(f"no request can move after {num_steps} steps, {num_done} of {len(trace)} are done")
        if bool(_is_short_of_slots(config, forever, state)):
            num_slots = min(2 * num_slots, config.num_slots)
            state = _with_slots(config, num_slots, arrays, state)
        elif num_steps - num_before < steps_per_launch:
            break
        num_before = num_steps
    return _simulation(config, trace, state.requests, jax.tree.map(lambda *parts: np.concatenate(parts), *logs))


def simulate_many(
    config: EngineConfig,
    policy: Policy,
    step_times: StepTime | Sequence[StepTime],
    traces: Sequence[Trace | Rounds],
    *,
    host: Host = PLAIN_HOST,
    max_output_len: int | None = None,
    max_steps: int,
) -> list[Simulation]:
    """`simulate` of several traces (rates, seeds) side by side: one compiled program, `jax.vmap` over them.

    step_times: one for all, or one per trace.    max_steps: of the longest run; its logs are kept for all.
    Raises as `simulate` does, and ValueError if some run has not finished within `max_steps`.
    """
    for trace in traces:
        check(config, trace)
    num_rows = _padded_size(max(map(len, traces)))
    arrays = [trace_arrays(t, max_output_len=max_output_len, max_len=config.max_len, num_rows=num_rows) for t in traces]
    together = jax.tree.map(lambda *columns: jnp.stack(columns), *arrays)
    is_shared = not isinstance(step_times, (list, tuple))
    times = step_times if is_shared else jax.tree.map(lambda *leaves: jnp.stack(leaves), *step_times)
    finals, logs = _run_many(config, policy, host, max_steps, is_shared, times, together)
    simulations = []
    for i, trace in enumerate(traces):
        (requests, num_done, num_steps), log = jax.tree.map(lambda x, i=i: np.asarray(x[i]), (finals, logs))
        if num_done < len(trace):
            raise ValueError(f"{trace.name!r}: {num_done} of {len(trace)} requests done in max_steps={max_steps}")
        log = jax.tree.map(lambda x, n=int(num_steps): x[:n], log)
        simulations.append(_simulation(config, trace, requests, log))
    return simulations


def check(config: EngineConfig, trace: Trace | Rounds) -> None:
    """Raises ValueError, naming the request, the value and the limit, if this engine can never serve some request."""
    lens = trace.input_lens + trace.output_lens
    if not len(trace):
        raise ValueError(f"trace {trace.name!r} is empty")
    for name, column in (("input", trace.input_lens), ("output", trace.output_lens)):
        if column.min() < 1:
            raise ValueError(f"trace {trace.name!r}: request {column.argmin()} has {name} length 0")
    longest = int(lens.argmax())
    limit = min(config.max_len, config.num_pages * config.page_size)
    if lens[longest] > limit:
        raise ValueError(
            f"trace {trace.name!r}: request {longest} has {lens[longest]} tokens, the limit is {limit} "
            f"(max_len={config.max_len}, num_pages={config.num_pages} of {config.page_size})"
        )


def trace_arrays(
    trace: Trace | Rounds, *, max_len: int, max_output_len: int | None = None, num_rows: int | None = None
) -> TraceArrays:
    """A trace for the device, padded to `num_rows` (if None to a number that similar traces share, to compile once)."""
    num_rows = _padded_size(len(trace)) if num_rows is None else num_rows

    def column(values: Int64[np.ndarray, "n"]) -> jax.Array:
        return jnp.asarray(np.pad(values, (0, num_rows - len(trace))), jnp.int32)

    limits = trace.output_lens if max_output_len is None else np.maximum(max_output_len, trace.output_lens)
    rounds: dict = {"offloaded_len": column(np.zeros(len(trace), np.int64)), "next_round": None, "think_s": None}
    if isinstance(trace, Rounds):
        last = np.where(trace.next_round < 0, num_rows, trace.next_round)
        rounds = {
            "offloaded_len": column(trace.history_lens),
            "next_round": column(last),
            "think_s": jnp.asarray(np.pad(trace.think_s, (0, num_rows - len(trace))), jnp.float32),
        }
    arrival_s = np.pad(trace.arrival_s, (0, num_rows - len(trace)), constant_values=np.inf)
    return TraceArrays(
        arrival=virtual_clock.from_float64(arrival_s), input_len=column(trace.input_lens),
        output_len=column(trace.output_lens), max_tokens=column(np.minimum(trace.input_lens + limits, max_len)), **rounds,
    )  # fmt: skip


def _padded_size(num_requests: int) -> int:
    """The next number of the form (4 to 7) * 2**k: at most a quarter more."""
    unit = 1 << max(num_requests.bit_length() - 3, 0)
    return -(-num_requests // unit) * unit


def _simulation(config: EngineConfig, trace: Trace | Rounds, requests: Requests, log: StepLog) -> Simulation:
    times = [virtual_clock.to_float64(t) for t in (requests.arrival, requests.first_token, requests.finish)]
    arrival_s, first_token_s, finish_s = (column.tolist() for column in times)
    lens = zip(trace.input_lens.tolist(), trace.output_lens.tolist(), strict=True)
    preemptions = np.asarray(requests.num_preemptions).tolist()
    records = [
        RequestRecord(
            request_id=f"{trace.name}-{i}", arrival_s=arrival_s[i], first_token_s=first_token_s[i], finish_s=finish_s[i],
            input_len=input_len, output_len=output_len, num_preemptions=preemptions[i],
        )
        for i, (input_len, output_len) in enumerate(lens)
    ]  # fmt: skip
    has_requests = np.flatnonzero(log.num_running + log.num_waiting)
    log = jax.tree.map(lambda x: x[has_requests], log)
    columns = np.stack(
        [
            virtual_clock.to_float64(log.end),
            np.array(config.token_budgets)[log.work.rung],
            *(log.work.num_decode_tokens, log.work.num_prefill_tokens),
            *(log.num_running, log.num_waiting, log.pages_in_use),
        ],
        axis=1,
    ).tolist()
    steps = [StepRecord(row[0], *map(int, row[1:])) for row in columns]
    work = np.stack([np.asarray(getattr(log.work, name), np.float64) for name in FEATURES], axis=1)
    return Simulation(records, steps, np.asarray(log.work.rung, np.int64), work)


@functools.partial(jax.jit, static_argnums=0)
def _is_short_of_slots(config: EngineConfig, until: Seconds, state: SimulatorState) -> Bool[Array, ""]:
    return virtual_run.has_work(state, until) & ~virtual_run.has_room(config, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _with_slots(config: EngineConfig, num_slots: int, trace: TraceArrays, state: SimulatorState) -> SimulatorState:
    return virtual_run.with_slots(config, trace, num_slots, state)


_init = jax.jit(virtual_engine.init, static_argnums=(0, 2))
_run = jax.jit(virtual_run.run, static_argnums=(0, 1, 2, 3), donate_argnums=7)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run_many(
    config: EngineConfig, policy: Policy, host: Host, max_steps: int, is_shared: bool, step_times, traces: TraceArrays
) -> tuple[tuple[Requests, jax.Array, jax.Array], StepLog]:
    def one(step_time: StepTime, trace: TraceArrays) -> tuple[tuple[Requests, jax.Array, jax.Array], StepLog]:
        forever = virtual_clock.Seconds(high=jnp.float32(jnp.inf), low=jnp.float32(0))
        state = virtual_engine.init(config, trace)
        state, log = virtual_run.run(config, policy, host, max_steps, step_time, trace, forever, state)
        return (state.requests, state.num_done, state.num_steps), log

    return jax.vmap(one, in_axes=(None if is_shared else 0, 0))(step_times, traces)
