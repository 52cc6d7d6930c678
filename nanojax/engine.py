"""How does serving advance?  All state is one pytree on the device; one compiled `step` admits, plans, computes, samples, retires.

The host loads requests into free slots, picks the token budget of each launch and reads reports; it never has to look before
it launches the next step.  A report names the requests it speaks of, so it may be read late.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from nanojax import batch, kv_cache, sampling, scheduler
from nanojax.array_types import Array, Bool, Float32, Int32, Params, UInt32
from nanojax.batch import RaggedBatch
from nanojax.config import EngineConfig, ModelConfig, SamplingParts
from nanojax.kv_cache import KVPages, PagePool
from nanojax.sampling import NO_TOKEN, SamplingState
from nanojax.scheduler import Policy, SchedulerState, StepPlan

Forward = Callable[[Params, KVPages, RaggedBatch], tuple[Float32[Array, "R V"], KVPages]]
"""Logits after each row's last token, and the updated cache."""


class Finish(enum.IntEnum):
    """Why a request ended in this step."""

    NOT = 0
    STOP = 1
    LENGTH = 2


@flax.struct.dataclass
class EngineState:
    """Everything the engine knows, on the device.  Functions that take it consume it (its buffers are donated)."""

    scheduler: SchedulerState
    pool: PagePool
    kv: KVPages
    sampling: SamplingState
    tokens: Int32[Array, "S M"]


@flax.struct.dataclass
class Arrivals:
    """`A` requests on their way into free slots; a row whose `slot` is `S` is padding."""

    slot: Int32[Array, "A"]
    request_id: Int32[Array, "A"]
    arrival: Int32[Array, "A"]
    tokens: Int32[Array, "A M"]
    prompt_len: Int32[Array, "A"]
    max_tokens: Int32[Array, "A"]
    expected_tokens: Int32[Array, "A"]
    temperature: Float32[Array, "A"]
    top_k: Int32[Array, "A"]
    top_p: Float32[Array, "A"]
    seed: UInt32[Array, "A"]
    stop_tokens: Int32[Array, "A B"]
    wants_logprob: Bool[Array, "A"]


@flax.struct.dataclass
class StepReport:
    """What one step did.  `token[s]` is `NO_TOKEN` where slot `s`, then of `request_id[s]`, got none.

    The reports of a launch of `n` steps are stacked.
    """

    request_id: Int32[Array, "*n S"]
    token: Int32[Array, "*n S"]
    logprob: Float32[Array, "*n S"]
    finish: Int32[Array, "*n S"]
    preempted: Bool[Array, "*n S"]
    num_decode_tokens: Int32[Array, "*n"]
    num_prefill_tokens: Int32[Array, "*n"]
    num_running: Int32[Array, "*n"]
    num_waiting: Int32[Array, "*n"]
    num_todo: Int32[Array, "*n"]
    """Tokens that the running requests could compute in the next step: what the host picks the next budget by."""
    pages_in_use: Int32[Array, "*n"]


def init(config: EngineConfig, model: ModelConfig, kv_dtype=jnp.float32) -> EngineState:
    """An engine without requests.  Raises ValueError when `max_len` exceeds what the model was made for."""
    if config.max_len > model.max_len:
        raise ValueError(
            f"max_len={config.max_len} exceeds the {model.max_len} tokens that {model.name} was trained for"
        )
    return EngineState(
        scheduler=scheduler.init(config.num_slots),
        pool=kv_cache.init_pool(config),
        kv=kv_cache.init_pages(config, model, kv_dtype),
        sampling=sampling.init(config.num_slots, config.max_stop_tokens),
        tokens=jnp.zeros((config.num_slots, config.max_len), jnp.int32),
    )


def load(state: EngineState, new: Arrivals) -> EngineState:
    """Puts requests into slots that the host knows to be free.  Consumes `state`."""

    def put(old: Array, value) -> Array:
        return old.at[new.slot].set(value, mode="drop")

    s, how = state.scheduler, state.sampling
    return dataclasses.replace(
        state,
        scheduler=dataclasses.replace(
            s,
            request_id=put(s.request_id, new.request_id),
            resident=put(s.resident, True),
            active=put(s.active, False),
            num_tokens=put(s.num_tokens, new.prompt_len),
            num_computed=put(s.num_computed, 0),
            prompt_len=put(s.prompt_len, new.prompt_len),
            max_tokens=put(s.max_tokens, new.max_tokens),
            expected_tokens=put(s.expected_tokens, new.expected_tokens),
            arrival=put(s.arrival, new.arrival),
            waited=put(s.waited, 0),
        ),
        sampling=SamplingState(
            temperature=put(how.temperature, new.temperature),
            top_k=put(how.top_k, new.top_k),
            top_p=put(how.top_p, new.top_p),
            seed=put(how.seed, new.seed),
            stop_tokens=put(how.stop_tokens, new.stop_tokens),
            wants_logprob=put(how.wants_logprob, new.wants_logprob),
        ),
        tokens=put(state.tokens, new.tokens),
    )


def cancel(state: EngineState, mask: Bool[Array, "S"]) -> EngineState:
    """Forgets the masked slots' requests; their pages are free at once.  Consumes `state`."""
    s = state.scheduler
    gone = dataclasses.replace(s, resident=s.resident & ~mask, active=s.active & ~mask)
    return dataclasses.replace(state, scheduler=gone, pool=kv_cache.release(state.pool, mask))


def assume_computed(config: EngineConfig, state: EngineState) -> EngineState:
    """The state in which the waiting requests run and all their tokens but the last are in the cache.  Consumes `state`.

    Their pages hold whatever was there, so that what follows means nothing: for measurements that begin in the middle of
    a run.  The caller guarantees that the pool has room.
    """
    s = state.scheduler
    is_new = s.resident & ~s.active
    num_computed = jnp.where(is_new, s.num_tokens - 1, s.num_computed)
    new_pages = jnp.where(is_new, kv_cache.pages_for(num_computed, config.page_size), 0)
    return dataclasses.replace(
        state,
        scheduler=dataclasses.replace(s, active=s.active | is_new, num_computed=num_computed),
        pool=kv_cache.grow(state.pool, new_pages, config.num_pages),
    )


def step(
    config: EngineConfig, policy: Policy, forward: Forward, token_budget: int, params: Params, state: EngineState
) -> tuple[EngineState, StepReport]:
    """One iteration of continuous batching on a batch of `token_budget` tokens, padding included.  Consumes `state`.

    Any budget is right: it decides how much of the work is done now, never what comes out.
    """
    admitted, step_plan, pool, packed = schedule(config, policy, token_budget, state)
    is_sampled = scheduler.samples(admitted, step_plan)
    logits, kv = forward(params, state.kv, packed)
    token, logprob = _sample(config.sampling, state.sampling, packed, logits, is_sampled, admitted.num_tokens)

    is_stop = jnp.any(token[:, None] == state.sampling.stop_tokens, axis=1)
    is_full = admitted.num_tokens + 1 >= admitted.max_tokens
    finish = jnp.where(is_stop, Finish.STOP, jnp.where(is_full, Finish.LENGTH, Finish.NOT))
    finish = jnp.where(is_sampled, finish, Finish.NOT).astype(jnp.int32)
    committed = scheduler.commit(admitted, step_plan, is_sampled, finish != Finish.NOT)
    place = jnp.where(is_sampled, admitted.num_tokens, config.max_len)
    new_state = EngineState(
        scheduler=committed,
        pool=kv_cache.release(pool, finish != Finish.NOT),
        kv=kv,
        sampling=state.sampling,
        tokens=state.tokens.at[jnp.arange(config.num_slots), place].set(token, mode="drop"),
    )
    report = StepReport(
        request_id=admitted.request_id,
        token=token,
        logprob=logprob,
        finish=finish,
        preempted=step_plan.preempt,
        num_decode_tokens=step_plan.num_decode,
        num_prefill_tokens=jnp.sum(step_plan.q_lens, dtype=jnp.int32) - step_plan.num_decode,
        num_running=jnp.sum(admitted.active, dtype=jnp.int32),
        num_waiting=jnp.sum(admitted.resident & ~admitted.active, dtype=jnp.int32),
        num_todo=scheduler.num_todo(committed),
        pages_in_use=config.num_pages - pool.num_free,
    )
    return new_state, report


def schedule(
    config: EngineConfig, policy: Policy, token_budget: int, state: EngineState
) -> tuple[SchedulerState, StepPlan, PagePool, RaggedBatch]:
    """What a step decides before it computes: who is admitted, who gets tokens and pages, and the batch that comes of it."""
    admitted = scheduler.admit(config, policy, state.scheduler, state.pool)
    step_plan = scheduler.plan(config, policy, admitted, state.pool, jnp.int32(token_budget))
    pool = kv_cache.release(state.pool, step_plan.preempt)
    pool = kv_cache.grow(pool, step_plan.new_pages, config.num_slots + token_budget // config.page_size)
    packed = batch.pack(
        step_plan.order, step_plan.q_lens, step_plan.num_decode, admitted.num_computed, state.tokens, pool.page_indices,
        token_budget=token_budget, page_size=config.page_size, num_pages=config.num_pages,
    )  # fmt: skip
    return admitted, step_plan, pool, packed


def run(
    config: EngineConfig,
    policy: Policy,
    forward: Forward,
    token_budget: int,
    max_steps: int,
    params: Params,
    state: EngineState,
) -> tuple[EngineState, StepReport]:
    """Up to `max_steps` steps in one launch, fewer when no request is left; the reports are stacked.  Consumes `state`."""
    one_step = functools.partial(step, config, policy, forward, token_budget, params)

    def is_on(carry) -> Bool[Array, ""]:
        i, state, _ = carry
        return (i < max_steps) & jnp.any(state.scheduler.resident)

    def advance(carry):
        i, state, reports = carry
        state, report = one_step(state)
        return i + 1, state, jax.tree.map(lambda all_, new: all_.at[i].set(new), reports, report)

    blank = _blank_reports(max_steps, config.num_slots)
    _, state, reports = jax.lax.while_loop(is_on, advance, (jnp.int32(0), state, blank))
    return state, reports


def _blank_reports(num_steps: int, num_slots: int) -> StepReport:
    """Reports of steps in which nothing was there to do."""
    per_slot, per_step = jnp.zeros((num_steps, num_slots), jnp.int32), jnp.zeros((num_steps,), jnp.int32)
    return StepReport(
        request_id=per_slot, token=per_slot + NO_TOKEN, logprob=per_slot.astype(jnp.float32), finish=per_slot,
        preempted=per_slot > 0, num_decode_tokens=per_step, num_prefill_tokens=per_step, num_running=per_step,
        num_waiting=per_step, num_todo=per_step, pages_in_use=per_step,
    )  # fmt: skip


def _sample(
    parts: SamplingParts,
    state: SamplingState,
    packed: RaggedBatch,
    logits: Float32[Array, "R V"],
    is_sampled: Bool[Array, "S"],
    num_tokens: Int32[Array, "S"],
) -> tuple[Int32[Array, "S"], Float32[Array, "S"]]:
    """The new token and its log-probability by slot; `NO_TOKEN` and 0 for slots that are not sampled."""
    slots = packed.row_slots
    how = dataclasses.replace(state, temperature=jnp.where(is_sampled, state.temperature, 0.0))
    token = sampling.sample(logits, how, slots, num_tokens[slots], parts)
    wanted = (state.wants_logprob & is_sampled)[slots]
    logprob = sampling.logprob(logits, token, wanted) if parts.logprobs else jnp.zeros(token.shape, jnp.float32)
    none = jnp.full(is_sampled.shape, NO_TOKEN, jnp.int32)
    return (
        jnp.where(is_sampled, none.at[slots].set(token), NO_TOKEN),
        jnp.where(is_sampled, jnp.zeros(is_sampled.shape, jnp.float32).at[slots].set(logprob), 0.0),
    )
