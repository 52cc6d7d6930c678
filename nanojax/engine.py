"""How does serving advance?  All state is one pytree on the device; one compiled `step` admits, plans, computes, samples, retires.

The host loads requests into free slots and reads reports; it never has to look before it launches the next step.  A report
names the requests it speaks of, so it may be read late.
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
from nanojax.config import EngineConfig, ModelConfig
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
    token_budget: Int32[Array, "*n"]
    num_decode_tokens: Int32[Array, "*n"]
    num_prefill_tokens: Int32[Array, "*n"]
    num_running: Int32[Array, "*n"]
    num_waiting: Int32[Array, "*n"]
    pages_in_use: Int32[Array, "*n"]


def init(config: EngineConfig, model: ModelConfig, kv_dtype=jnp.float32) -> EngineState:
    """An engine without requests.  Raises ValueError when `max_len` exceeds what the model was made for."""
    if config.max_len > model.max_len:
        raise ValueError(f"max_len={config.max_len} exceeds the {model.max_len} tokens that {model.name} was trained for")
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


def step(
    config: EngineConfig, policy: Policy, forward: Forward, params: Params, state: EngineState
) -> tuple[EngineState, StepReport]:
    """One iteration of continuous batching.  Consumes `state`.

    The forward pass runs on the smallest token budget of the ladder that holds the step's tokens, and is left out when there
    are none.
    """
    admitted = scheduler.admit(config, policy, state.scheduler, state.pool)
    budgets = jnp.array(config.token_budgets, jnp.int32)
    budget = jnp.min(jnp.where(budgets >= scheduler.num_todo(admitted), budgets, budgets[-1]))
    step_plan = scheduler.plan(config, policy, admitted, state.pool, budget)
    pool = kv_cache.release(state.pool, step_plan.preempt)
    max_new_pages = config.num_slots + config.token_budgets[-1] // config.page_size
    pool = kv_cache.grow(pool, step_plan.new_pages, max_new_pages)
    is_sampled = scheduler.samples(admitted, step_plan)

    num_tokens = jnp.sum(step_plan.q_lens, dtype=jnp.int32)
    rung = jnp.where(num_tokens > 0, 1 + jnp.sum(budgets < num_tokens, dtype=jnp.int32), 0)
    compute = functools.partial(
        _compute, config, forward, params, dataclasses.replace(state, scheduler=admitted, pool=pool), step_plan, is_sampled
    )
    branches = [functools.partial(_compute_nothing, config)]
    branches += [functools.partial(compute, token_budget) for token_budget in config.token_budgets]
    kv, token, logprob = jax.lax.switch(rung, branches, state.kv)

    is_stop = jnp.any(token[:, None] == state.sampling.stop_tokens, axis=1)
    is_full = admitted.num_tokens + 1 >= admitted.max_tokens
    finish = jnp.where(is_stop, Finish.STOP, jnp.where(is_full, Finish.LENGTH, Finish.NOT))
    finish = jnp.where(is_sampled, finish, Finish.NOT).astype(jnp.int32)
    place = jnp.where(is_sampled, admitted.num_tokens, config.max_len)
    committed = scheduler.commit(admitted, step_plan, is_sampled, finish != Finish.NOT)
    new_state = EngineState(
        scheduler=committed,
        pool=kv_cache.release(pool, finish != Finish.NOT),
        kv=kv,
        sampling=state.sampling,
        tokens=state.tokens.at[jnp.arange(config.num_slots), place].set(token, mode="drop"),
    )
    report = StepReport(
        request_id=admitted.request_id,
        token=jnp.where(is_sampled, token, NO_TOKEN),
        logprob=logprob,
        finish=finish,
        preempted=step_plan.preempt,
        token_budget=jnp.where(rung > 0, budgets[jnp.maximum(rung - 1, 0)], 0),
        num_decode_tokens=step_plan.num_decode,
        num_prefill_tokens=num_tokens - step_plan.num_decode,
        num_running=jnp.sum(admitted.active, dtype=jnp.int32),
        num_waiting=jnp.sum(admitted.resident & ~admitted.active, dtype=jnp.int32),
        pages_in_use=config.num_pages - pool.num_free,
    )
    return new_state, report


def run(
    config: EngineConfig, policy: Policy, forward: Forward, num_steps: int, params: Params, state: EngineState
) -> tuple[EngineState, StepReport]:
    """`num_steps` steps in one launch; the reports are stacked.  Consumes `state`.

    A loop of known length, so that a GPU's host can queue all of it; steps without work cost next to nothing.
    """

    def body(state: EngineState, _):
        return step(config, policy, forward, params, state)

    return jax.lax.scan(body, state, length=num_steps)


def _compute(
    config: EngineConfig,
    forward: Forward,
    params: Params,
    state: EngineState,
    step_plan: StepPlan,
    is_sampled: Bool[Array, "S"],
    token_budget: int,
    kv: KVPages,
) -> tuple[KVPages, Int32[Array, "S"], Float32[Array, "S"]]:
    """The rung's work: pack, forward, sample.  Results by slot."""
    packed = batch.pack(
        step_plan.order, step_plan.q_lens, step_plan.num_decode, state.scheduler.num_computed, state.tokens,
        state.pool.page_indices, token_budget=token_budget, page_size=config.page_size, num_pages=config.num_pages,
    )  # fmt: skip
    logits, kv = forward(params, kv, packed)
    slots = packed.row_slots
    how = dataclasses.replace(state.sampling, temperature=jnp.where(is_sampled, state.sampling.temperature, 0.0))
    token = sampling.sample(logits, how, slots, state.scheduler.num_tokens[slots])
    logprob = sampling.logprob(logits, token, (how.wants_logprob & is_sampled)[slots])
    by_slot = jnp.full((config.num_slots,), NO_TOKEN, jnp.int32)
    return kv, by_slot.at[slots].set(token), jnp.zeros((config.num_slots,), jnp.float32).at[slots].set(logprob)


def _compute_nothing(config: EngineConfig, kv: KVPages) -> tuple[KVPages, Int32[Array, "S"], Float32[Array, "S"]]:
    none = jnp.full((config.num_slots,), NO_TOKEN, jnp.int32)
    return kv, none, jnp.zeros((config.num_slots,), jnp.float32)
