"""How would requests be served, if steps took as long as a model says?  The engine's scheduler under a simulated clock.

Admission, batch formation, preemption and retirement are the functions of `nanojax.scheduler`, so the composition of every step
is the engine's; only the clock is modelled.  Two things are left out because no decision reads them: token ids (output
lengths come from the trace) and the names of pages (only counts; no two requests share a page here).

All of it is plain jax on arrays; `nanojax.virtual_run` goes on step after step.  Compiled in: capacities, policy, `Host`.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from nanojax import scheduler, virtual_clock, virtual_requests
from nanojax.array_types import Array, Bool, Int32
from nanojax.config import EngineConfig
from nanojax.kv_cache import PagePool, pages_for
from nanojax.scheduler import Policy, SchedulerState, StepPlan
from nanojax.step_time import StepTime, StepWork
from nanojax.virtual_clock import Seconds
from nanojax.virtual_requests import NO_REQUEST, Requests, TraceArrays


@dataclasses.dataclass(frozen=True)
class Host:
    """What surrounds the scheduler.

    reads_late: the host launches step n + 1 before it has read step n (the engine's dispatch-ahead driver): requests are seen,
        slots refilled and budgets picked one step later.
    stops_late: the original's asynchronous scheduling: a request's end is noticed one step late, at the price of one wasted
        token (paper section 4.2.1).
    offloads_kv: all keys and values are also in a larger memory: rounds of a conversation and preempted requests get theirs
        back when they are admitted, if pages are free, and compute only what is new.
    """

    reads_late: bool = False
    stops_late: bool = False
    offloads_kv: bool = False


@flax.struct.dataclass
class SimulatorState:
    """Everything the simulator knows.

    `S` is the number of slots that are simulated: as many as `EngineConfig.num_slots`, or fewer while those suffice.
    """

    clock: Seconds
    seen: Seconds
    """Requests that arrived up to here are known to the host."""
    scheduler: SchedulerState
    num_pages: Int32[Array, "S"]
    num_free: Int32[Array, ""]
    offloaded_len: Int32[Array, "S"]
    unread: Bool[Array, "S"]
    """Slots whose end the host has not read (`reads_late`)."""
    todo_read: Int32[Array, ""]
    """Tokens to compute, as the host read them."""
    flying_budget: Int32[Array, ""]
    """Budget of the launch that the host has not read; 0 for none."""
    requests: Requests
    num_loaded: Int32[Array, ""]
    num_done: Int32[Array, ""]
    num_steps: Int32[Array, ""]
    is_stuck: Bool[Array, ""]
    """A step had requests to work on, and none moved."""


@flax.struct.dataclass
class StepLog:
    """One row per step; a step that found no request has none running and none waiting."""

    end: Seconds
    work: StepWork
    num_running: Int32[Array, "*n"]
    num_waiting: Int32[Array, "*n"]
    pages_in_use: Int32[Array, "*n"]


def init(config: EngineConfig, trace: TraceArrays, num_slots: int | None = None) -> SimulatorState:
    """Nothing has happened, the clock is at 0 s.  `num_slots` are simulated; all of the engine's if None."""
    num_slots = config.num_slots if num_slots is None else num_slots

    def zeros() -> Int32[Array, "S"]:  # a buffer of its own for each field: the state is donated
        return jnp.zeros((num_slots,), jnp.int32)

    def zero() -> Seconds:
        return Seconds(high=jnp.float32(0), low=jnp.float32(0))

    return SimulatorState(
        clock=zero(), seen=zero(), scheduler=scheduler.init(num_slots), num_pages=zeros(),
        num_free=jnp.int32(config.num_pages), offloaded_len=zeros(), unread=zeros() > 0, todo_read=jnp.int32(0),
        flying_budget=jnp.int32(0), requests=virtual_requests.init(trace), num_loaded=jnp.int32(0),
        num_done=jnp.int32(0), num_steps=jnp.int32(0), is_stuck=jnp.bool_(False),
    )  # fmt: skip


def step(
    config: EngineConfig, policy: Policy, host: Host, step_time: StepTime, trace: TraceArrays, state: SimulatorState
) -> tuple[SimulatorState, StepLog]:
    """One step of the engine: requests that have come get slots, then `admit`, `plan`, `commit`; the clock moves on."""
    todo_before = scheduler.num_todo(state.scheduler)
    state, todo_loaded = _receive(config, policy, host, trace, skip_idle_time(state))
    todo = (state.todo_read if host.reads_late else todo_before) + todo_loaded
    if host.reads_late:
        num_rows = jnp.sum(state.scheduler.resident | state.unread, dtype=jnp.int32)
        flying = state.flying_budget
        todo = jnp.maximum(todo - flying, 0) + jnp.minimum(num_rows, flying)
    budgets = jnp.array(config.token_budgets, jnp.int32)
    rung = jnp.minimum(jnp.sum(budgets < todo, dtype=jnp.int32), len(config.token_budgets) - 1)

    admitted = scheduler.admit(config, policy, state.scheduler, _pool(config, state))
    if host.offloads_kv:
        state, admitted, num_restored = _restore(config, state, admitted)
    else:
        num_restored = jnp.int32(0)
    plan = scheduler.plan(config, policy, admitted, _pool(config, state), budgets[rung])
    work = _work(rung, admitted, plan, num_restored)
    end = virtual_clock.later(state.clock, step_time(work))

    row = admitted.request_id
    sampled = scheduler.samples(admitted, plan)
    num_generated = jnp.where(sampled, admitted.num_tokens + 1 - admitted.prompt_len, 0)
    is_last = sampled & (num_generated == trace.output_len[row])
    retired = sampled & (num_generated >= trace.output_len[row] + host.stops_late)
    committed = scheduler.commit(admitted, plan, sampled, retired)

    num_pages = jnp.where(plan.preempt, 0, state.num_pages) + plan.new_pages
    num_free = config.num_pages - jnp.sum(num_pages, dtype=jnp.int32)
    requests = virtual_requests.book(
        trace, state.requests, row, end, sampled & (num_generated == 1), is_last, plan.preempt
    )
    new_state = dataclasses.replace(
        state,
        clock=end,
        seen=state.clock if host.reads_late else end,
        scheduler=committed,
        num_pages=jnp.where(retired, 0, num_pages),
        num_free=num_free + jnp.sum(jnp.where(retired, num_pages, 0), dtype=jnp.int32),
        offloaded_len=jnp.maximum(state.offloaded_len, committed.num_computed),
        unread=retired & host.reads_late,
        todo_read=todo_before + todo_loaded,
        flying_budget=budgets[rung],
        requests=requests,
        num_done=state.num_done + jnp.sum(is_last, dtype=jnp.int32),
        num_steps=state.num_steps + 1,
        is_stuck=(jnp.sum(plan.q_lens) == 0) & jnp.any(admitted.resident),
    )
    log = StepLog(
        end=end, work=work, num_running=jnp.sum(admitted.active, dtype=jnp.int32),
        num_waiting=jnp.sum(admitted.resident & ~admitted.active, dtype=jnp.int32),
        pages_in_use=config.num_pages - num_free,
    )  # fmt: skip
    return new_state, log


def is_idle(state: SimulatorState) -> Bool[Array, ""]:
    """No request is resident, and the host knows it (else it launches a step, which finds nothing to do)."""
    return ~jnp.any(state.scheduler.resident | state.unread)


def skip_idle_time(state: SimulatorState) -> SimulatorState:
    """Moves the clock on to the next arrival when there is nothing to do."""
    idle = is_idle(state)
    clock = virtual_clock.latest(virtual_requests.next_arrival(state.requests), state.clock)
    return dataclasses.replace(
        state,
        clock=virtual_clock.where(idle, clock, state.clock),
        seen=virtual_clock.where(idle, clock, state.seen),
        todo_read=jnp.where(idle, 0, state.todo_read),
        flying_budget=jnp.where(idle, 0, state.flying_budget),
    )


def _receive(
    config: EngineConfig, policy: Policy, host: Host, trace: TraceArrays, state: SimulatorState
) -> tuple[SimulatorState, Int32[Array, ""]]:
    """Puts requests that the host has seen into free slots, in the order of the policy; gives their prompt tokens too."""
    priority = virtual_requests.priorities(policy, trace)

    def head(is_loaded: Bool[Array, "n"]) -> Int32[Array, ""]:
        return virtual_requests.head_of_queue(priority, state.requests, is_loaded, state.seen)

    def is_free(s: SchedulerState) -> Bool[Array, "S"]:
        return ~s.resident & ~state.unread

    def load(carry):
        s, offloaded_len, is_loaded, num_loaded, todo, index = carry
        slot = jnp.argmax(is_free(s))
        s = dataclasses.replace(
            s,
            request_id=s.request_id.at[slot].set(index),
            resident=s.resident.at[slot].set(True),
            active=s.active.at[slot].set(False),
            num_tokens=s.num_tokens.at[slot].set(trace.input_len[index]),
            num_computed=s.num_computed.at[slot].set(0),
            prompt_len=s.prompt_len.at[slot].set(trace.input_len[index]),
            max_tokens=s.max_tokens.at[slot].set(trace.max_tokens[index]),
            expected_tokens=s.expected_tokens.at[slot].set(trace.input_len[index] + trace.output_len[index]),
            # Without conversations rows are in order of arrival; with them only the loads are.
            arrival=s.arrival.at[slot].set(index if trace.next_round is None else num_loaded),
        )
        offloaded_len = offloaded_len.at[slot].set(trace.offloaded_len[index])
        is_loaded = is_loaded.at[index].set(True)
        return s, offloaded_len, is_loaded, num_loaded + 1, todo + trace.input_len[index], head(is_loaded)

    def goes_on(carry) -> Bool[Array, ""]:
        return (carry[-1] != NO_REQUEST) & jnp.any(is_free(carry[0]))

    before = (state.scheduler, state.offloaded_len, state.requests.is_loaded, state.num_loaded, jnp.int32(0))
    s, offloaded_len, is_loaded, num_loaded, todo, _ = jax.lax.while_loop(goes_on, load, (*before, head(before[2])))
    requests = dataclasses.replace(state.requests, is_loaded=is_loaded)
    state = dataclasses.replace(
        state, scheduler=s, offloaded_len=offloaded_len, requests=requests, num_loaded=num_loaded
    )
    return state, todo


def _pool(config: EngineConfig, state: SimulatorState) -> PagePool:
    """The counts as a pool in which every page has one owner; its names of pages are blank."""
    return PagePool(
        page_indices=jnp.zeros((state.num_pages.shape[0], config.pages_per_slot), jnp.int32),
        num_pages=state.num_pages,
        free=jnp.zeros((1,), jnp.int32),
        num_free=state.num_free,
        ref_count=jnp.ones((1,), jnp.int32),
    )


def _restore(
    config: EngineConfig, state: SimulatorState, admitted: SchedulerState
) -> tuple[SimulatorState, SchedulerState, Int32[Array, ""]]:
    """Gives requests that were just admitted their offloaded tokens back, as far as pages are free; the rest recompute."""
    is_new = admitted.active & ~state.scheduler.active
    wanted = jnp.where(is_new, jnp.minimum(state.offloaded_len, admitted.num_tokens - 1), 0)
    pages = pages_for(wanted, config.page_size)
    order = jnp.argsort(admitted.arrival)
    fits = jnp.zeros_like(is_new).at[order].set(jnp.cumsum(pages[order]) <= state.num_free)
    pages, restored = jnp.where(fits, pages, 0), jnp.where(fits, wanted, 0)
    state = dataclasses.replace(
        state, num_pages=state.num_pages + pages, num_free=state.num_free - jnp.sum(pages, dtype=jnp.int32)
    )
    admitted = dataclasses.replace(admitted, num_computed=admitted.num_computed + restored)
    return state, admitted, jnp.sum(restored, dtype=jnp.int32)


def _work(rung: Int32[Array, ""], s: SchedulerState, plan: StepPlan, num_restored: Int32[Array, ""]) -> StepWork:
    """What the step computes; a row of one token counts as decode, as in the batch."""
    q_lens = plan.q_lens.astype(jnp.float32)
    context = q_lens * s.num_computed + q_lens * (q_lens + 1) / 2
    is_decode = plan.q_lens == 1
    return StepWork(
        rung=rung,
        num_decode_tokens=plan.num_decode.astype(jnp.float32),
        num_prefill_tokens=jnp.sum(jnp.where(is_decode, 0, q_lens)),
        decode_context=jnp.sum(jnp.where(is_decode, context, 0)),
        prefill_context=jnp.sum(jnp.where(is_decode, 0, context)),
        num_sampled=jnp.sum(scheduler.samples(s, plan), dtype=jnp.float32),
        num_restored_tokens=num_restored.astype(jnp.float32),
    )
