"""Who runs next?  Continuous batching as a pure state machine: `admit`, `plan`, `commit`.

A request is two numbers: `num_tokens` known, `num_computed` of them in the KV cache.  Decode, chunked prefill and recompute
after preemption are all "the next `num_tokens - num_computed` tokens".  A resident request waits until `admit` makes it
active; only active requests hold pages.  Admission asks a forecast (`nanojax.admission`), order asks a priority function.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from nanojax.array_types import Array, Bool, Int32
from nanojax.config import EngineConfig
from nanojax.kv_cache import PagePool, pages_for
from nanojax.ordering import in_order

HISTORY_LEN = 256
"""Finished output lengths that are remembered for the forecasts."""

PATIENCE = 64
"""Steps in which an active request may get nothing before it comes first, whatever its priority."""


@flax.struct.dataclass
class SchedulerState:
    """The resident requests, one per slot.  Fields of slots that are not `resident` mean nothing."""

    request_id: Int32[Array, "S"]
    resident: Bool[Array, "S"]
    active: Bool[Array, "S"]
    num_tokens: Int32[Array, "S"]
    num_computed: Int32[Array, "S"]
    prompt_len: Int32[Array, "S"]
    max_tokens: Int32[Array, "S"]
    """Longest that the request can get: prompt and output."""
    expected_tokens: Int32[Array, "S"]
    """Prompt and output as an oracle knows them (traces do); equals `max_tokens` when nobody knows."""
    arrival: Int32[Array, "S"]
    waited: Int32[Array, "S"]
    """Steps since the active request last got a token of the budget."""
    finished_lens: Int32[Array, "W"]
    """Ring buffer of the last finished output lengths, `W = HISTORY_LEN`."""
    num_finished: Int32[Array, ""]


@flax.struct.dataclass
class StepPlan:
    """One step's decision.  `order` lists the slots as the batch lays them out: one-token rows, chunks, idle slots."""

    q_lens: Int32[Array, "S"]
    new_pages: Int32[Array, "S"]
    order: Int32[Array, "S"]
    num_decode: Int32[Array, ""]
    preempt: Bool[Array, "S"]


Forecast = Callable[[SchedulerState, Bool[Array, "S"], int], Int32[Array, ""]]
"""`forecast(state, active, page_size)`: pages that the `active` requests will need at their peak; never fewer for more of them."""

PriorityFn = Callable[[SchedulerState], Int32[Array, "S"]]
"""Rank of each request, lowest first; the earlier arrival wins a tie."""


class PhaseOrder(enum.Enum):
    """Which rows get the token budget first."""

    DECODE_FIRST = "decode_first"
    PREFILL_FIRST = "prefill_first"


class Batching(enum.Enum):
    """Continuous: a request joins when it fits.  Static: the next batch starts when the last one is done."""

    CONTINUOUS = "continuous"
    STATIC = "static"


@dataclasses.dataclass(frozen=True)
class Policy:
    """The choices that an ablation varies."""

    forecast: Forecast
    priority: PriorityFn
    phase_order: PhaseOrder = PhaseOrder.DECODE_FIRST
    batching: Batching = Batching.CONTINUOUS


def first_come(state: SchedulerState) -> Int32[Array, "S"]:
    """In order of arrival."""
    return state.arrival


def shortest_prompt(state: SchedulerState) -> Int32[Array, "S"]:
    """The shortest prompt first."""
    return state.prompt_len


def shortest_job(state: SchedulerState) -> Int32[Array, "S"]:
    """Least work left, prompt and output, by the oracle's lengths."""
    return state.expected_tokens - state.num_computed


def longest_output(state: SchedulerState) -> Int32[Array, "S"]:
    """Most output left first, by the oracle's lengths: all at once, the last ones end sooner (list scheduling, Graham 1969)."""
    return state.num_tokens - state.expected_tokens


PRIORITIES: dict[str, PriorityFn] = {
    "first_come": first_come,
    "shortest_prompt": shortest_prompt,
    "shortest_job": shortest_job,
    "longest_output": longest_output,
}


def init(num_slots: int) -> SchedulerState:
    """No requests."""

    def zeros() -> Int32[Array, "S"]:  # a buffer of its own for each field: the state is donated
        return jnp.zeros((num_slots,), jnp.int32)

    return SchedulerState(
        request_id=zeros() - 1, resident=zeros() > 0, active=zeros() > 0, num_tokens=zeros(), num_computed=zeros(),
        prompt_len=zeros(), max_tokens=zeros(), expected_tokens=zeros(), arrival=zeros(), waited=zeros(),
        finished_lens=jnp.zeros((HISTORY_LEN,), jnp.int32), num_finished=jnp.int32(0),
    )  # fmt: skip


def admit(config: EngineConfig, policy: Policy, state: SchedulerState, pool: PagePool) -> SchedulerState:
    """Activates waiting requests in priority order while the forecast peak fits the pool.

    The head of the queue is never overtaken.  Nothing is admitted while an active request is short of a page, so that a
    preempted request cannot take back what it gave.  A request alone is always admitted.
    """
    is_open = ~is_short_of_pages(config, state, pool)
    if policy.batching is Batching.STATIC:
        is_open &= ~jnp.any(state.active)
    active = jax.lax.platform_dependent(
        state, is_open,
        cpu=functools.partial(admit_one_by_one, config, policy),
        default=functools.partial(admit_in_two_rounds, config, policy),
    )  # fmt: skip
    return dataclasses.replace(state, active=active)


def admit_one_by_one(
    config: EngineConfig, policy: Policy, state: SchedulerState, is_open: Bool[Array, ""]
) -> Bool[Array, "S"]:
    """Who is active once the queue's heads have been tried in turn: as many forecasts as requests join, and one."""
    priority = policy.priority(state)

    def is_waiting(active: Bool[Array, "S"]) -> Bool[Array, ""]:
        return jnp.any(state.resident & ~active)

    def try_head(carry: tuple[Bool[Array, "S"], Bool[Array, ""]]) -> tuple[Bool[Array, "S"], Bool[Array, ""]]:
        active, _ = carry
        waiting = state.resident & ~active
        best = jnp.min(jnp.where(waiting, priority, _LAST))
        first = jnp.argmin(jnp.where(waiting & (priority == best), state.arrival, _LAST))
        joined = active.at[first].set(True)
        fits = (policy.forecast(state, joined, config.page_size) <= config.num_pages) | ~jnp.any(active)
        active = jnp.where(fits, joined, active)
        return active, fits & is_waiting(active)

    active, _ = jax.lax.while_loop(lambda carry: carry[1], try_head, (state.active, is_open & is_waiting(state.active)))
    return active


def admit_in_two_rounds(
    config: EngineConfig, policy: Policy, state: SchedulerState, is_open: Bool[Array, ""]
) -> Bool[Array, "S"]:
    """As `admit_one_by_one`, without a loop that a GPU's host would have to watch.

    A forecast does not fall when a request joins, so the numbers of joining requests that fit are all those up to one of
    them: the first round asks for every `width`-th number, the second for those between, each for all of them at once.
    """
    num_slots = state.resident.shape[0]
    waiting = state.resident & ~state.active
    queue = in_order(jnp.where(waiting, 0, 2), policy.priority(state), state.arrival)
    place = jnp.zeros((num_slots,), jnp.int32).at[queue].set(jnp.arange(num_slots, dtype=jnp.int32))
    always = jnp.where(jnp.any(state.active), 0, 1)

    def joined_by(count: Int32[Array, ""]) -> Bool[Array, "S"]:
        return state.active | (waiting & (place < count))

    def last_that_fits(counts: Int32[Array, "C"]) -> Int32[Array, ""]:
        pages = jax.vmap(lambda count: policy.forecast(state, joined_by(count), config.page_size))(counts)
        return jnp.max(jnp.where((pages <= config.num_pages) | (counts <= always), counts, 0))

    width = math.isqrt(num_slots) + 1  # so that width * width > num_slots
    steps = jnp.arange(width, dtype=jnp.int32)
    coarse = last_that_fits(steps * width)
    count = jnp.maximum(coarse, last_that_fits(coarse + steps))
    return joined_by(jnp.where(is_open, count, 0))


def plan(
    config: EngineConfig, policy: Policy, state: SchedulerState, pool: PagePool, token_budget: Int32[Array, ""]
) -> StepPlan:
    """Divides the token budget and the free pages among the active requests.

    In order of phase and priority each request takes what it still has to compute, cut by the tokens and by the pages that
    are left (a chunk may fill what its last page has room for when no page is free).  When the requests are short of pages,
    the youngest that holds some is preempted, and its pages serve this step.  Whoever got nothing for `PATIENCE` steps comes
    first, the earlier arrival before the later one: under a priority that lets others pass, nobody active waits for ever.
    """
    page_size = config.page_size
    preempt, num_freed = _preempt_youngest(config, state, pool)
    num_free = pool.num_free + num_freed
    todo = jnp.where(state.active & ~preempt, state.num_tokens - state.num_computed, 0)

    is_chunk = todo > 1
    late_phase = is_chunk if policy.phase_order is PhaseOrder.DECODE_FIRST else ~is_chunk
    is_first = state.waited >= PATIENCE
    rank = jnp.where(todo == 0, 2, late_phase & ~is_first)
    order = in_order(rank, jnp.where(is_first, _BEFORE_ALL, policy.priority(state)), state.arrival)

    todo = todo[order]
    room = jnp.where(todo > 0, (pool.num_pages * page_size - state.num_computed)[order], 0)  # else the slot is stale
    wanted = _take(todo, token_budget)
    pages_wanted = pages_for(jnp.maximum(wanted - room, 0), page_size)
    pages_left = jnp.maximum(num_free - _exclusive_cumsum(pages_wanted), 0)
    granted = _take(jnp.minimum(todo, room + pages_left * page_size), token_budget)
    new_pages = pages_for(jnp.maximum(granted - room, 0), page_size)

    # The batch wants one-token rows first: a stable partition of the order above into one-token rows, chunks, idle.
    kind = jnp.where(granted == 1, 0, jnp.where(granted > 1, 1, 2))
    counts = jnp.array([jnp.sum(kind == i) for i in range(3)], jnp.int32)
    within = jnp.stack([jnp.cumsum(kind == i) for i in range(3)])
    place = _exclusive_cumsum(counts)[kind] + jnp.take_along_axis(within, kind[None], axis=0)[0] - 1
    zeros = jnp.zeros_like(order)
    return StepPlan(
        q_lens=zeros.at[order].set(granted),
        new_pages=zeros.at[order].set(new_pages),
        order=zeros.at[place].set(order),
        num_decode=counts[0],
        preempt=preempt,
    )


def commit(
    state: SchedulerState, step_plan: StepPlan, sampled: Bool[Array, "S"], finished: Bool[Array, "S"]
) -> SchedulerState:
    """Books a step: tokens computed, one new token where `sampled`, preempted requests back to waiting, `finished` gone."""
    num_computed = jnp.where(step_plan.preempt, 0, state.num_computed + step_plan.q_lens)
    num_tokens = state.num_tokens + sampled
    place = (state.num_finished + jnp.cumsum(finished) - 1) % HISTORY_LEN
    place = jnp.where(finished, place, HISTORY_LEN)
    return dataclasses.replace(
        state,
        resident=state.resident & ~finished,
        active=state.active & ~finished & ~step_plan.preempt,
        num_computed=num_computed,
        num_tokens=num_tokens,
        waited=jnp.where(state.active & ~step_plan.preempt & (step_plan.q_lens == 0), state.waited + 1, 0),
        finished_lens=state.finished_lens.at[place].set(num_tokens - state.prompt_len, mode="drop"),
        num_finished=state.num_finished + jnp.sum(finished, dtype=jnp.int32),
    )


def samples(state: SchedulerState, step_plan: StepPlan) -> Bool[Array, "S"]:
    """Requests whose last known token is computed in this step, so that the step yields a new one."""
    return (step_plan.q_lens > 0) & (state.num_computed + step_plan.q_lens == state.num_tokens)


def num_todo(state: SchedulerState) -> Int32[Array, ""]:
    """Tokens that the active requests could compute now."""
    return jnp.sum(jnp.where(state.active, state.num_tokens - state.num_computed, 0), dtype=jnp.int32)


def is_short_of_pages(config: EngineConfig, state: SchedulerState, pool: PagePool) -> Bool[Array, ""]:
    """More decode rows want a page than pages are free, or no active request can move at all."""
    stuck = state.active & (state.num_computed >= pool.num_pages * config.page_size)
    decoding = stuck & (state.num_tokens - state.num_computed == 1)
    none_moves = (pool.num_free == 0) & jnp.all(stuck == state.active) & jnp.any(state.active)
    return (jnp.sum(decoding, dtype=jnp.int32) > pool.num_free) | none_moves


def _preempt_youngest(
    config: EngineConfig, state: SchedulerState, pool: PagePool
) -> tuple[Bool[Array, "S"], Int32[Array, ""]]:
    """The victim, if one is needed, and the pages that only it holds.  A preemption that frees nothing is not taken."""
    holds = state.active & (pool.num_pages > 0)
    youngest = jnp.argmax(jnp.where(holds, state.arrival, -1))
    column = jnp.arange(pool.page_indices.shape[1])
    is_own = (column < pool.num_pages[youngest]) & (pool.ref_count[pool.page_indices[youngest]] == 1)
    num_freed = jnp.sum(is_own, dtype=jnp.int32)
    is_needed = is_short_of_pages(config, state, pool) & (jnp.sum(holds) > 1) & (num_freed > 0)
    preempt = is_needed & holds & (jnp.arange(holds.shape[0]) == youngest)
    return preempt, jnp.where(is_needed, num_freed, 0)


_LAST = jnp.iinfo(jnp.int32).max
_BEFORE_ALL = -(2**30)


def _exclusive_cumsum(x: Int32[Array, "n"]) -> Int32[Array, "n"]:
    return jnp.cumsum(x, dtype=jnp.int32) - x


def _take(todo: Int32[Array, "S"], budget: Int32[Array, ""]) -> Int32[Array, "S"]:
    """Serves `todo` in order from `budget`, the last one served in part."""
    return jnp.clip(budget - _exclusive_cumsum(todo), 0, todo)
