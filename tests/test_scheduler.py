"""Laws of `plan`, `admit` and the forecasts, against a scheduler in plain Python."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import python_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojax import admission, kv_cache, ordering, scheduler
from nanojax.config import EngineConfig
from nanojax.scheduler import Batching, PhaseOrder, Policy

PAGE = 4
CONFIG = EngineConfig(token_budgets=(16,), num_slots=5, num_pages=14, max_len=40, page_size=PAGE)
S, N = CONFIG.num_slots, CONFIG.num_pages


def policy(phase_order=PhaseOrder.DECODE_FIRST, forecast=admission.greedy, batching=Batching.CONTINUOUS):
    return Policy(forecast, scheduler.shortest_prompt, phase_order, batching)


@functools.cache
def jitted_plan(phase_order):
    return jax.jit(functools.partial(scheduler.plan, CONFIG, policy(phase_order)))


@functools.cache
def jitted_admit(forecast, batching):
    return jax.jit(functools.partial(scheduler.admit, CONFIG, policy(forecast=forecast, batching=batching)))


@functools.cache
def jitted_rounds(forecast):
    return jax.jit(functools.partial(scheduler.admit_in_two_rounds, CONFIG, policy(forecast=forecast)))


@st.composite
def states(draw):
    """Reachable states: computed tokens lie exactly in the pages held, pages do not exceed the pool."""
    rows, free = [], N
    for slot in range(S):
        resident = draw(st.booleans())
        active = resident and draw(st.booleans())
        prompt = draw(st.integers(1, 20))
        num_tokens = prompt + draw(st.integers(0, 10))
        computed = draw(st.integers(0, num_tokens - 1)) if active or not resident else 0  # a stale slot holds anything
        if active and draw(st.booleans()):
            computed = num_tokens - 1  # decoding
        pages = -(-computed // PAGE) if active else 0
        if pages > free:  # a preempted request starts again
            computed, pages = 0, 0
        free -= pages
        extra = draw(st.integers(1, 10))
        waited = draw(st.sampled_from([0, scheduler.PATIENCE - 1, scheduler.PATIENCE]))
        rows.append((resident, active, prompt, num_tokens, computed, pages, num_tokens + extra, slot, waited))
    order = draw(st.permutations(range(S)))
    return rows, order


def arrays(rows, order):
    resident, active, prompt, num_tokens, computed, pages, limit, _, waited = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    state = scheduler.init(S)
    state = state.replace(
        resident=jnp.array(resident), active=jnp.array(active), prompt_len=jnp.array(prompt, jnp.int32),
        num_tokens=jnp.array(num_tokens, jnp.int32), num_computed=jnp.array(computed, jnp.int32),
        max_tokens=jnp.array(limit, jnp.int32), expected_tokens=jnp.array(limit, jnp.int32),
        arrival=jnp.array(order, jnp.int32), request_id=jnp.arange(S, dtype=jnp.int32),
        waited=jnp.array(waited, jnp.int32),
    )  # fmt: skip
    pool = kv_cache.grow(kv_cache.init_pool(CONFIG), jnp.array(pages, jnp.int32), N)
    return state, pool


@pytest.mark.parametrize("phase_order", list(PhaseOrder))
@settings(max_examples=200, deadline=None)
@given(data=states(), budget=st.integers(1, 16))
def test_plan_equals_python(phase_order, data, budget):
    rows, order = data
    state, pool = arrays(rows, order)
    step_plan = jitted_plan(phase_order)(state, pool, jnp.int32(budget))
    oracle = [
        python_scheduler.Row(a, r[3], r[4], r[5], active=r[1], rank=r[2], is_first=r[8] >= scheduler.PATIENCE)
        for r, a in zip(rows, order, strict=True)
    ]
    tokens, victim = python_scheduler.plan(
        oracle, int(pool.num_free), budget, PAGE, phase_order is PhaseOrder.DECODE_FIRST
    )
    np.testing.assert_array_equal(step_plan.q_lens, tokens)
    np.testing.assert_array_equal(np.flatnonzero(step_plan.preempt), [] if victim is None else [victim])

    # Laws that hold whatever the oracle says.
    q, new = np.asarray(step_plan.q_lens), np.asarray(step_plan.new_pages)
    assert q.sum() <= budget
    freed = rows[victim][5] if victim is not None else 0
    runs = [r for i, r in enumerate(rows) if r[1] and i != victim]
    if sum(-(-r[3] // PAGE) - r[5] for r in runs) <= int(pool.num_free) + freed:  # pages for all that is to be computed
        assert q.sum() == min(budget, sum(r[3] - r[4] for r in runs)), "the budget is filled exactly"
    assert new.sum() <= int(pool.num_free) + freed
    assert victim is None or freed > 0, "a preemption that frees no page"
    for row, taken, added in zip(rows, q, new, strict=True):
        assert taken >= 0
        assert not row[1] or (row[4] + taken) <= (row[5] + added) * PAGE
    laid_out = q[np.asarray(step_plan.order)]
    num_decode = int(step_plan.num_decode)
    assert (laid_out[:num_decode] == 1).all()
    assert (laid_out[num_decode : num_decode + (q > 1).sum()] > 1).all()
    assert sorted(np.asarray(step_plan.order).tolist()) == list(range(S))
    if any(r[1] for r in rows):
        assert q.sum() > 0, "active requests, and none moves"


@pytest.mark.parametrize(("patience", "num_steps"), [(scheduler.PATIENCE, scheduler.PATIENCE), (10**6, None)])
def test_no_active_request_starves(patience, num_steps, monkeypatch):
    """A long prompt waits, while shorter ones come without end, each of which could have the whole budget."""
    monkeypatch.setattr(scheduler, "PATIENCE", patience)

    @jax.jit
    def step(state):
        step_plan = scheduler.plan(CONFIG, policy(), state, kv_cache.init_pool(CONFIG), jnp.int32(4))
        nothing = jnp.zeros(S, bool)
        return step_plan.q_lens[0], scheduler.commit(state, step_plan, nothing, nothing)

    def next_served(state):
        for i in range(150):
            lens = jnp.full(S, 4, jnp.int32).at[0].set(20)
            others = jnp.arange(S, dtype=jnp.int32).at[1:].add(i * S)  # all but the first are new in each step
            state = state.replace(
                num_tokens=lens, prompt_len=lens, num_computed=jnp.zeros_like(lens), arrival=others,
                waited=jnp.where(others == 0, state.waited, 0),
            )  # fmt: skip
            granted, state = step(state)
            if granted:
                return i
        return None

    everybody = jnp.ones(S, bool)
    assert next_served(scheduler.init(S).replace(resident=everybody, active=everybody)) == num_steps


@settings(max_examples=200, deadline=None)
@given(
    data=states(), batching=st.sampled_from(list(Batching)), rule=st.sampled_from(["greedy", "reserve_max", "oracle"])
)
def test_admit_takes_the_longest_prefix_of_the_queue_that_fits(data, batching, rule):
    rows, order = data
    state, pool = arrays(rows, order)
    forecast = getattr(admission, rule)
    after = jitted_admit(forecast, batching)(state, pool)
    is_short = bool(scheduler.is_short_of_pages(CONFIG, state, pool))
    active = np.array([r[1] for r in rows])
    expected = active.copy()
    if not is_short and not (batching is Batching.STATIC and active.any()):
        queue = sorted((i for i in range(S) if rows[i][0] and not rows[i][1]), key=lambda i: (rows[i][2], order[i]))
        for i in queue:
            joined = expected.copy()
            joined[i] = True
            if expected.any() and int(forecast(state, jnp.array(joined), PAGE)) > N:
                break
            expected = joined
    np.testing.assert_array_equal(after.active, expected)
    if batching is Batching.CONTINUOUS:
        np.testing.assert_array_equal(jitted_rounds(forecast)(state, ~jnp.bool_(is_short)), expected)


@pytest.mark.parametrize("rule", ["peak_memory", "past_future", "oracle"])
def test_admission_in_two_rounds_is_admission_one_by_one(rule, unchecked):
    """On more slots than one round could ask for, with each number of requests that may join."""
    num_slots = 41
    config = dataclasses.replace(CONFIG, num_slots=num_slots, num_pages=200)
    own = policy(forecast=admission.make_forecast(rule, expected_output_len=12))
    one_by_one, in_rounds = (
        jax.jit(functools.partial(f, config, own)) for f in (scheduler.admit_one_by_one, scheduler.admit_in_two_rounds)
    )
    joined = set()
    for seed in range(150):
        rng = np.random.default_rng(seed)
        prompt = rng.integers(1, rng.integers(2, 30), num_slots)
        num_tokens, output = prompt + rng.integers(0, 6, num_slots), rng.integers(1, 40, num_slots)
        resident = rng.random(num_slots) < 0.9
        state = scheduler.init(num_slots).replace(
            resident=jnp.array(resident), active=jnp.array(resident & (rng.random(num_slots) < rng.choice([0, 0.3, 0.8]))),
            request_id=jnp.arange(num_slots), prompt_len=jnp.array(prompt), num_tokens=jnp.array(num_tokens),
            max_tokens=jnp.array(num_tokens + output), expected_tokens=jnp.array(num_tokens + output),
            arrival=jnp.array(rng.permutation(num_slots)), num_finished=jnp.int32(seed % 4),
        )  # fmt: skip
        expected = one_by_one(state, jnp.bool_(True))
        np.testing.assert_array_equal(in_rounds(state, jnp.bool_(True)), expected)
        np.testing.assert_array_equal(in_rounds(state, jnp.bool_(False)), state.active)
        joined.add(int((expected & ~state.active).sum()))
    assert len(joined) > 12


def test_longest_output_counts_what_is_left():
    state = dataclasses.replace(
        scheduler.init(3), num_tokens=jnp.array([10, 40, 5]), expected_tokens=jnp.array([30, 42, 34])
    )
    assert np.argsort(scheduler.longest_output(state)).tolist() == [2, 0, 1]  # 29, 20 and 2 tokens


@functools.cache
def jitted_order(few):
    def order(rank, priority, arrival):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ordering, "FEW_SLOTS", few)
            return ordering.in_order(rank, priority, arrival)

    return jax.jit(order)


numbers = st.one_of(st.integers(0, 3), st.integers(0, 10**6), st.integers(-(2**31), 2**31 - 1))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), numbers, numbers), min_size=7, max_size=7))
@pytest.mark.parametrize("few", [0, ordering.FEW_SLOTS])
def test_slots_are_ordered_by_rank_priority_and_arrival(few, rows):
    rank, priority, arrival = (jnp.array(column, jnp.int32) for column in zip(*rows, strict=True))
    expected = sorted(range(len(rows)), key=lambda i: (rows[i] if rows[i][0] < 2 else (2, 0, 0), i))
    np.testing.assert_array_equal(jitted_order(few)(rank, priority, arrival), expected)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(-3, 40), st.booleans()), min_size=6, max_size=6),
    st.sampled_from([1, PAGE, 7, 16]),
)
def test_peak_forecast_equals_brute_force(requests, page_size):
    num_tokens, remaining, active = (np.array(column) for column in zip(*requests, strict=True))
    ours = admission.peak_pages(
        jnp.array(num_tokens, jnp.int32), jnp.array(remaining, jnp.int32), jnp.array(active), page_size
    )
    brute = python_scheduler.peak_pages(num_tokens[active].tolist(), remaining[active].tolist(), page_size)
    assert int(ours) == brute


def finished(lens):
    state = scheduler.init(S)
    return state.replace(
        finished_lens=state.finished_lens.at[: len(lens)].set(jnp.array(lens, jnp.int32)),
        num_finished=jnp.int32(len(lens)),
    )


def test_peak_memory_uses_the_prior_until_a_request_has_finished_then_the_average():
    active = jnp.arange(S) == 0
    one = {"prompt_len": jnp.full(S, 8), "num_tokens": jnp.full(S, 9), "max_tokens": jnp.full(S, 100)}
    forecast = functools.partial(admission.peak_memory, expected_output_len=12)
    assert int(forecast(scheduler.init(S).replace(**one), active, PAGE)) == -(-(8 + 12 - 1) // PAGE)
    assert int(forecast(finished([4, 8]).replace(**one), active, PAGE)) == -(-(8 + 6 - 1) // PAGE)
    assert int(forecast(finished([1]).replace(**one), active, PAGE)) == -(-9 // PAGE), "outlived: one step from its end"


def test_past_future_draws_only_longer_outputs_and_repeats_itself():
    active = jnp.arange(S) == 0
    state = finished([2, 3, 30]).replace(
        prompt_len=jnp.full(S, 8), num_tokens=jnp.full(S, 12), max_tokens=jnp.full(S, 100), request_id=jnp.arange(S)
    )
    forecast = functools.partial(admission.past_future, expected_output_len=12, seed=0)
    assert int(forecast(state, active, PAGE)) == -(-(8 + 30 - 1) // PAGE), "only 30 is longer than the 4 generated"
    assert int(forecast(state, active, PAGE)) == int(forecast(state, active, PAGE))
    outlived = state.replace(num_tokens=jnp.full(S, 40))
    assert int(forecast(outlived, active, PAGE)) == -(-(100 - 1) // PAGE), "none is longer: its maximum"


def test_unknown_admission_rule_is_named():
    with pytest.raises(ValueError, match="'optimistic' is none of"):
        admission.make_forecast("optimistic")
