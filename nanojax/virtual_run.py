"""How long does the virtual engine go on?  Compiled loops around its step, under as few slots as suffice.

Work per step grows with the slots, most of which are empty at moderate load.  So states start with few slots, a loop ends
before the step that would need more (`has_room`), and its caller goes on with twice as many (`with_slots`).  No decision
depends on the number of slots until a request waits for one, so results are those of all `EngineConfig.num_slots`.

`jax.vmap` of `run` over arrivals, step times or seeds gives sweeps.  A batch of policies of equal phase order is
`any_of(policies, index)`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nanojax import virtual_clock, virtual_engine, virtual_requests
from nanojax.array_types import Array, Bool, Int32
from nanojax.config import EngineConfig
from nanojax.scheduler import Policy
from nanojax.step_time import StepTime, StepWork
from nanojax.virtual_clock import Seconds
from nanojax.virtual_engine import Host, SimulatorState, StepLog
from nanojax.virtual_requests import TraceArrays

MIN_SLOTS = 256


def run(
    config: EngineConfig,
    policy: Policy,
    host: Host,
    max_steps: int,
    step_time: StepTime,
    trace: TraceArrays,
    until: Seconds,
    state: SimulatorState,
) -> tuple[SimulatorState, StepLog]:
    """Up to `max_steps` steps that start before `until`, fewer when no request is left or none has room; consumes `state`.

    One `lax.while_loop`: under `jax.vmap` the members go on until the last one is done.
    """

    def is_on(carry) -> Bool[Array, ""]:
        i, state, _ = carry
        return (i < max_steps) & has_work(state, until) & has_room(config, state) & ~state.is_stuck

    def advance(carry):
        i, state, log = carry
        state, row = virtual_engine.step(config, policy, host, step_time, trace, state)
        return i + 1, state, jax.tree.map(lambda rows, new: rows.at[i].set(new), log, row)

    _, state, log = jax.lax.while_loop(is_on, advance, (jnp.int32(0), state, _blank_log(max_steps)))
    return state, log


def advance(
    config: EngineConfig,
    policy: Policy,
    host: Host,
    step_time: StepTime,
    trace: TraceArrays,
    until: Seconds,
    state: SimulatorState,
) -> SimulatorState:
    """`run` without a limit of steps and without a log; consumes `state`."""
    one_step = functools.partial(virtual_engine.step, config, policy, host, step_time, trace)

    def is_on(s: SimulatorState) -> Bool[Array, ""]:
        return has_work(s, until) & has_room(config, s) & ~s.is_stuck

    return jax.lax.while_loop(is_on, lambda s: one_step(s)[0], state)


def has_work(state: SimulatorState, until: Seconds) -> Bool[Array, ""]:
    """A request is there, or comes, before `until`."""
    start = virtual_clock.where(
        virtual_engine.is_idle(state), virtual_requests.next_arrival(state.requests), state.clock
    )
    start = virtual_clock.latest(start, state.clock)
    return jnp.isfinite(start.high) & (virtual_clock.elapsed_s(start, until) < 0)


def has_room(config: EngineConfig, state: SimulatorState) -> Bool[Array, ""]:
    """Every request that has come by the next step finds a free slot, or the engine has no more slots than `state`."""
    s = state.scheduler
    if s.resident.shape[0] >= config.num_slots:
        return jnp.bool_(True)
    requests, seen = state.requests, virtual_engine.skip_idle_time(state).seen
    is_due = ~requests.is_loaded & (virtual_clock.elapsed_s(requests.arrival, seen) <= 0)
    return jnp.sum(is_due) <= jnp.sum(~s.resident & ~state.unread)


def with_slots(config: EngineConfig, trace: TraceArrays, num_slots: int, state: SimulatorState) -> SimulatorState:
    """The same state with `num_slots` slots, no fewer than it has."""
    blank = virtual_engine.init(config, trace, num_slots)
    return jax.tree.map(
        lambda new, old: old if new.shape == old.shape else new.at[: old.shape[0]].set(old), blank, state
    )


def any_of(policies: Sequence[Policy], index: Int32[Array, ""]) -> Policy:
    """`policies[index]` for a traced index, to sweep policies by `vmap`; each step then computes the forecasts of all.

    Raises ValueError unless all have the same phase order and batching, which are compiled in.
    """
    first = policies[0]
    if any((p.phase_order, p.batching) != (first.phase_order, first.batching) for p in policies):
        raise ValueError("policies of different phase order or batching need a run each: these two are compiled in")
    return Policy(
        lambda state, active, page_size: jax.lax.switch(
            index, [lambda p=p: p.forecast(state, active, page_size) for p in policies]
        ),
        lambda state: jax.lax.switch(index, [lambda p=p: p.priority(state) for p in policies]),
        first.phase_order,
        first.batching,
    )


def _blank_log(num_steps: int) -> StepLog:
    counts, amounts = jnp.zeros((num_steps,), jnp.int32), jnp.zeros((num_steps,), jnp.float32)
    work = StepWork(
        rung=counts, num_decode_tokens=amounts, num_prefill_tokens=amounts, decode_context=amounts,
        prefill_context=amounts, num_sampled=amounts, num_restored_tokens=amounts,
    )  # fmt: skip
    end = Seconds(high=amounts, low=amounts)
    return StepLog(end=end, work=work, num_running=counts, num_waiting=counts, pages_in_use=counts)
