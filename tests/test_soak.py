"""Soak: 100,000 scheduler steps under random arrivals, cancels and tight pages, a token oracle in place of the model.

The oracle's token is a function of request and position, and so is the stamp that it leaves in the KV page of each token it
computes.  Every step reads back the stamps of all earlier tokens of each row: a page that two requests write, a page handed
on too early or a wrong length shows as a foreign stamp.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from nanojax import engine as core
from nanojax import invariants
from nanojax.config import GREEDY, EngineConfig, ModelConfig
from nanojax.sampling import NO_TOKEN
from nanojax.scheduler import PATIENCE

V = 31
MODEL = ModelConfig("oracle", 1, 4, 1, 1, 1, 4, V, 64)
CONFIG = EngineConfig(
    token_budgets=(12,), num_slots=8, page_size=4, num_pages=24, max_len=40, max_stop_tokens=1,
    sampling=GREEDY,
)  # fmt: skip
STEPS_PER_LAUNCH = 500


def oracle(request, position):
    """Token of `request` at `position`, never 0."""
    return 1 + (request * 7919 + position * 104729) % (V - 1)


def forward(params, kv, batch):
    """Stamps this step's tokens, checks all stamps of each row, and answers with the oracle's next token.

    The first prompt token carries the request's number: `tokens` hold it, so the oracle needs no other state.
    """
    flat = kv.k[0, :, 0, :, 0]
    stamp = batch.tokens.astype(jnp.float32)
    flat = flat.at[batch.pages, batch.positions % CONFIG.page_size].set(stamp, mode="drop")
    rows = flat[batch.page_indices].reshape(batch.kv_lens.shape[0], -1)
    request = rows[:, 0].astype(jnp.int32) - V
    position = jnp.arange(rows.shape[1])
    expected = jnp.where(position == 0, request[:, None] + V, oracle(request[:, None], position))
    is_right = (rows == expected) | (position >= batch.kv_lens[:, None])
    is_right = jnp.all(is_right, axis=1) & (request >= 0) | (batch.kv_lens == 0)
    token = jnp.where(is_right, oracle(request, batch.kv_lens), 0)  # 0 says: a foreign stamp
    return jax.nn.one_hot(token, V), kv.replace(k=flat[None, :, None, :, None])


def random_arrivals(key, state, first_id):
    """Fills each free slot with probability 1/4."""
    slots = jnp.arange(CONFIG.num_slots)
    k1, k2, k3 = jax.random.split(key, 3)
    wanted = jax.random.bernoulli(k1, 0.25, slots.shape) & ~state.scheduler.resident
    request = first_id + slots
    prompt_len = jax.random.randint(k2, slots.shape, 1, 25)
    max_tokens = prompt_len + jax.random.randint(k3, slots.shape, 1, CONFIG.max_len - 24)
    position = jnp.arange(CONFIG.max_len)
    tokens = jnp.where(position == 0, request[:, None] + V, oracle(request[:, None], position))
    zeros = jnp.zeros(slots.shape, jnp.int32)
    arrivals = core.Arrivals(
        slot=jnp.where(wanted, slots, CONFIG.num_slots), request_id=request, arrival=request, tokens=tokens,
        prompt_len=prompt_len, max_tokens=max_tokens, expected_tokens=max_tokens, temperature=zeros.astype(jnp.float32),
        top_k=zeros, top_p=jnp.ones(slots.shape), seed=zeros.astype(jnp.uint32),
        stop_tokens=jnp.full((CONFIG.num_slots, 1), NO_TOKEN), wants_logprob=zeros > 0,
    )  # fmt: skip
    return core.load(state, arrivals)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def soak(policy, key, state, first_id):
    """500 steps; returns the state, the next free id, and what happened."""

    def outputs(state, mask):
        return jnp.sum(jnp.where(mask, state.scheduler.num_tokens - state.scheduler.prompt_len, 0))

    def body(carry, step_key):
        state, first_id, broken, foreign, finished, preempted, cancelled, idle, lost, longest_wait = carry
        k1, k2 = jax.random.split(step_key)
        state = random_arrivals(k1, state, first_id)
        victim = jax.random.bernoulli(k2, 0.01, (CONFIG.num_slots,)) & state.scheduler.resident
        before = outputs(state, state.scheduler.resident & ~victim)
        state = core.cancel(state, victim)
        work = jnp.any(state.scheduler.resident)
        state, report = core.step(CONFIG, policy, forward, CONFIG.token_budgets[0], {}, state)
        idle += work & (report.num_decode_tokens + report.num_prefill_tokens == 0)
        broken |= ~invariants.holds(CONFIG, state)
        foreign += jnp.sum(report.token == 0)
        has_ended = report.finish != core.Finish.NOT
        finished += jnp.sum(has_ended)
        # Each token that a request gained was reported, and who ends has all that it asked for.
        gained = outputs(state, state.scheduler.resident | has_ended) - before
        lost += gained != jnp.sum(report.token != NO_TOKEN)
        lost += jnp.any(has_ended & (state.scheduler.num_tokens != state.scheduler.max_tokens))
        return (
            state, first_id + CONFIG.num_slots, broken, foreign, finished, preempted + jnp.sum(report.preempted),
            cancelled + jnp.sum(victim), idle, lost, jnp.maximum(longest_wait, jnp.max(state.scheduler.waited)),
        ), None  # fmt: skip

    zero = jnp.int32(0)
    carry = (state, first_id, jnp.zeros(len(invariants.LAWS), bool), zero, zero, zero, zero, zero, zero, zero)
    return jax.lax.scan(body, carry, jax.random.split(key, STEPS_PER_LAUNCH))[0]


POLICIES = {
    "greedy": tiny.policy("greedy"),
    "greedy, prefill first": tiny.policy("greedy", phase_order="prefill_first", priority="shortest_prompt"),
    "peak memory, longest output": tiny.policy("peak_memory", "longest_output"),
    "past future": tiny.policy("past_future"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_soak(name):
    state, first_id = core.init(CONFIG, MODEL), jnp.int32(0)
    finished = preempted = cancelled = 0
    for i in range(100_000 // len(POLICIES) // STEPS_PER_LAUNCH):
        state, first_id, broken, foreign, *counts, idle, lost, longest_wait = soak(
            POLICIES[name], jax.random.key(i), state, first_id
        )
        assert not broken.any(), [law for law, b in zip(invariants.LAWS, np.asarray(broken), strict=True) if b]
        assert int(foreign) == 0, "a token read another request's KV"
        assert int(idle) == 0, "requests were there, and none moved"
        assert int(lost) == 0, "a token that was not reported, or a request that ended too early"
        assert int(longest_wait) < 2 * PATIENCE, "an active request starved"
        finished, preempted, cancelled = (
            a + int(b) for a, b in zip((finished, preempted, cancelled), counts, strict=True)
        )
    assert finished > 1000
    assert cancelled > 100
    assert preempted > 100 or "greedy" not in name, "tight pages must preempt here, or the soak shows little"
