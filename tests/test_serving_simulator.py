"""Laws of the serving simulator: the engine's own batches, exact time, conservation, hand-worked conversations and offload."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from nanojax import simulate as simulator
from nanojax import step_time, virtual_clock, virtual_engine, virtual_run
from nanojax.config import PRESETS, EngineConfig
from nanojax.metrics import summarize
from nanojax.pipeline.cost_model import BatchShape
from nanojax.pipeline.ir import NanoBatch, OpKind
from nanojax.pipeline.published_profile import TABLE_2_SHAPE, table2_profile
from nanojax.scheduler import PhaseOrder
from nanojax.serve import Driver
from nanojax.simulate import Host, simulate, simulate_many
from nanojax.step_time import FEATURES, StepWork
from nanojax.workload import (
    Rounds,
    Trace,
    burst_arrivals,
    constant_trace,
    conversation_rounds,
    poisson_arrivals,
    synthetic_requests,
    with_arrivals,
)

LADDER = tiny.GREEDY
TIGHT = dataclasses.replace(tiny.GREEDY, token_budgets=(4, 8), num_pages=13)
UNIT = step_time.linear([1.0, 1.0])
"""Every step takes a second."""
ROOMY = EngineConfig(token_budgets=(8,), num_slots=6, page_size=4, num_pages=64, max_len=64)


def random_trace(num_requests: int, seed: int = 0, max_input_len: int = 30, max_output_len: int = 20) -> Trace:
    rng = np.random.default_rng(seed)
    lens = (rng.integers(1, most + 1, num_requests) for most in (max_input_len, max_output_len))
    return Trace("random", burst_arrivals(num_requests), *lens)


def no_model(params, kv, batch):
    """Always the same token: what the engine schedules does not depend on it, and a real model takes long to compile."""
    return jnp.zeros((batch.row_slots.shape[0], tiny.LLAMA.vocab_size)), kv


CASES = {
    "a ladder": (LADDER, {}),
    "host waits": (LADDER, {"driver": Driver.HOST_SYNC}),
    "few slots": (dataclasses.replace(LADDER, num_slots=2), {}),
    "tight pages": (TIGHT, {}),
    "tight pages, host waits": (TIGHT, {"driver": Driver.HOST_SYNC}),
    "shortest prompt, prefill first": (TIGHT, {"policy": tiny.policy("greedy", "shortest_prompt", "prefill_first")}),
    "oracle, shortest job": (TIGHT, {"policy": tiny.policy("oracle", "shortest_job")}),
    "tight pages, longest output": (TIGHT, {"policy": tiny.policy("greedy", "longest_output")}),
    "peak memory": (TIGHT, {"policy": tiny.policy("peak_memory")}),
    "past future": (TIGHT, {"policy": tiny.policy("past_future")}),
    "reserve": (TIGHT, {"policy": tiny.policy("reserve_max")}),
    "static batches": (LADDER, {"policy": tiny.policy(batching="static")}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_engines(name):
    config, options = CASES[name]
    trace = random_trace(24)
    engine = tiny.engine(config, check_invariants=False, forward=no_model, **options)
    engine.generate(synthetic_requests(trace, tiny.LLAMA.vocab_size, np.random.default_rng(0)))
    host = Host(reads_late=engine.driver is Driver.DISPATCH_AHEAD)
    simulation = simulate(config, options.get("policy", tiny.policy()), UNIT, trace, host=host, steps_per_launch=7)

    def untimed(steps):
        return [dataclasses.astuple(step)[1:] for step in steps]

    assert untimed(simulation.steps) == untimed(engine.steps)

    # The step in which each request got its first token and its last, and how often it was preempted.
    def events(records, steps):
        number = {step.time_s: i for i, step in enumerate(steps)}
        return {r.request_id: (number[r.first_token_s], number[r.finish_s], r.num_preemptions) for r in records}

    assert events(simulation.records, simulation.steps) == events(engine.records, engine.steps)
    assert sum(r.num_preemptions for r in engine.records) > 0 or "tight" not in name, "tight pages must preempt"


class StepClock:
    """The engine's clock, when every step takes a second: it looks once when it reads a step."""

    def __init__(self):
        self.now, self.is_serving = 0.0, False

    def __call__(self):
        self.now += self.is_serving
        return self.now


@pytest.mark.parametrize("driver", [Driver.HOST_SYNC, Driver.DISPATCH_AHEAD])
def test_online_every_step_and_time_is_the_engines(driver):
    trace = with_arrivals(random_trace(30), poisson_arrivals(30, rate_per_s=0.3, rng=np.random.default_rng(1)))
    clock = StepClock()
    engine = tiny.engine(TIGHT, check_invariants=False, forward=no_model, driver=driver, clock=clock)
    waiting = synthetic_requests(trace, tiny.LLAMA.vocab_size, np.random.default_rng(0))
    while waiting or engine.num_unfinished:
        if not engine.num_unfinished:
            clock.now = max(clock.now, waiting[0].arrival_s)
        while waiting and waiting[0].arrival_s <= clock.now:
            engine.submit(waiting.pop(0))
        clock.is_serving = True
        engine.poll()
        clock.is_serving = False
    simulation = simulate(TIGHT, tiny.policy(), UNIT, trace, host=Host(reads_late=driver is Driver.DISPATCH_AHEAD))

    def rounded(steps):
        return [(round(step.time_s, 6), *dataclasses.astuple(step)[1:]) for step in steps]

    assert rounded(simulation.steps) == rounded(engine.steps)
    finish_s = {record.request_id: record.finish_s for record in engine.records}
    for record in simulation.records:
        assert record.finish_s == pytest.approx(finish_s[record.request_id], abs=1e-6)


def one_request(arrival_s: float = 0.0, input_len: int = 5, output_len: int = 3) -> Trace:
    return Trace("one", np.array([arrival_s]), np.array([input_len]), np.array([output_len]))


def times(simulation):
    return [(r.arrival_s, r.first_token_s, r.finish_s) for r in simulation.records]


def computed_tokens(simulation) -> float:
    columns = [FEATURES.index(name) for name in ("num_decode_tokens", "num_prefill_tokens")]
    return simulation.work[:, columns].sum()


def test_a_request_alone_takes_a_step_per_token_from_when_it_comes():
    assert times(simulate(ROOMY, tiny.policy(), UNIT, one_request(2.5))) == [(2.5, 3.5, 5.5)]
    longer = one_request(2.5, input_len=17)  # three steps of eight tokens until the first output
    assert times(simulate(ROOMY, tiny.policy(), UNIT, longer)) == [(2.5, 5.5, 7.5)]


def test_who_comes_during_a_step_waits_for_the_next_and_one_more_if_the_host_reads_late():
    trace = Trace("two", np.array([0.0, 1.5]), np.array([5, 4]), np.array([6, 1]))
    in_time = simulate(ROOMY, tiny.policy(), UNIT, trace)
    late = simulate(ROOMY, tiny.policy(), UNIT, trace, host=Host(reads_late=True))
    assert times(in_time) == [(0.0, 1.0, 6.0), (1.5, 3.0, 3.0)]
    assert times(late) == [(0.0, 1.0, 6.0), (1.5, 4.0, 4.0)]


def test_times_of_a_step_come_from_what_it_computes():
    # Prompt of 5: 5 + 15 context; then 1 decode token at context 6, then 1 at 7.  Rung 0 holds 4 tokens, rung 1 holds 8.
    config = dataclasses.replace(ROOMY, token_budgets=(4, 8))
    model = step_time.linear(
        [10.0, 20.0],
        num_decode_tokens=1.0,
        num_prefill_tokens=[0.0, 2.0],
        decode_context=0.5,
        prefill_context=0.1,
        num_sampled=3.0,
    )
    first, second, third = 20 + 2 * 5 + 0.1 * 15 + 3, 10 + 1 + 0.5 * 6 + 3, 10 + 1 + 0.5 * 7 + 3
    [(_, first_token_s, finish_s)] = times(simulate(config, tiny.policy(), model, one_request()))
    assert first_token_s == pytest.approx(first)
    assert finish_s == pytest.approx(first + second + third)


def test_a_late_stop_wastes_one_decode_token_per_request():
    trace = random_trace(20)
    plain = simulate(ROOMY, tiny.policy(), UNIT, trace)
    late = simulate(ROOMY, tiny.policy(), UNIT, trace, host=Host(stops_late=True))
    assert computed_tokens(plain) == (trace.input_lens + trace.output_lens - 1).sum()
    assert computed_tokens(late) == computed_tokens(plain) + len(trace)
    assert sum(r.finish_s for r in late.records) > sum(r.finish_s for r in plain.records)
    assert times(simulate(ROOMY, tiny.policy(), UNIT, one_request(), host=Host(stops_late=True))) == [(0.0, 1.0, 3.0)]


def conversation() -> Rounds:
    """One user, three rounds, two seconds to think; another user of one round."""
    trace = Trace("talk", np.zeros(6), np.array([5, 3, 2, 4, 60, 1]), np.array([3, 2, 1, 4, 3, 1]))
    rng = np.random.default_rng(0)
    rounds = conversation_rounds(trace, np.array([0.0, 0.5]), num_rounds=3, think_s_mean=1.0, max_len=64, rng=rng)
    return dataclasses.replace(rounds, think_s=np.where(rounds.think_s > 0, 2.0, 0.0))


def test_rounds_repeat_what_was_said_and_end_before_the_limit():
    rounds = conversation()
    assert rounds.input_lens.tolist() == [
        5,
        5 + 3 + 3,
        11 + 2 + 2,
        4,
    ]  # the second user's next prompt would have 68 tokens
    assert rounds.history_lens.tolist() == [0, 7, 12, 0]
    assert rounds.next_round.tolist() == [1, 2, -1, -1]
    assert rounds.arrival_s.tolist() == [0.0, np.inf, np.inf, 0.5]


@pytest.mark.parametrize("offloads_kv", [False, True])
def test_a_round_comes_when_its_user_has_read_the_last_answer(offloads_kv):
    host = Host(offloads_kv=offloads_kv)
    simulation = simulate(ROOMY, tiny.policy(), UNIT, conversation(), host=host)
    first, second, third, _ = simulation.records
    assert (first.first_token_s, first.finish_s) == (1.0, 3.0)
    assert second.arrival_s == first.finish_s + 2.0
    assert third.arrival_s == second.finish_s + 2.0
    # 11 tokens take two steps of 8; with 7 of them back from the offload tier, one.
    assert second.first_token_s - second.arrival_s == (1.0 if offloads_kv else 2.0)
    restored = simulation.work[:, FEATURES.index("num_restored_tokens")].sum()
    assert restored == (7 + 12 if offloads_kv else 0)
    assert computed_tokens(simulation) + restored == (5 + 2) + (11 + 1) + 15 + (4 + 3)


def test_offloaded_tokens_spare_preempted_requests_the_recompute():
    trace, config = random_trace(24), dataclasses.replace(TIGHT, num_pages=20)
    plain = simulate(config, tiny.policy(), UNIT, trace)
    offloaded = simulate(config, tiny.policy(), UNIT, trace, host=Host(offloads_kv=True))
    needed = (trace.input_lens + trace.output_lens - 1).sum()
    assert sum(r.num_preemptions for r in plain.records) > 0
    assert computed_tokens(plain) > computed_tokens(offloaded) >= needed
    restored = offloaded.work[:, FEATURES.index("num_restored_tokens")]
    assert restored.sum() > 0
    assert max(step.pages_in_use for step in offloaded.steps) <= config.num_pages


def test_restoring_takes_time():
    model = step_time.linear([1.0], num_restored_tokens=0.25)
    records = simulate(ROOMY, tiny.policy(), model, conversation(), host=Host(offloads_kv=True)).records
    assert records[1].first_token_s - records[1].arrival_s == 1 + 7 * 0.25


def test_a_full_batch_is_as_fast_as_its_layers():
    config = EngineConfig(token_budgets=(32,), num_slots=64, page_size=4, num_pages=10_000, max_len=64)
    trace = constant_trace(400, input_len=16, output_len=8)
    layers = step_time.from_layer_times([1e-3], 10, overhead_s=2e-3)
    simulation = simulate(config, tiny.policy("oracle"), layers, trace)
    metrics = summarize(simulation.records, simulation.steps, num_pages=config.num_pages)
    assert metrics["duration_s"] == pytest.approx(metrics["num_steps"] * 12e-3)
    assert metrics["num_steps"] == pytest.approx(400 * 23 / 32, rel=0.03)  # the last token of a request is not computed


def online(rate_per_s: float, seed: int, num_requests: int = 40) -> Trace:
    rng = np.random.default_rng(seed)
    arrival_s = poisson_arrivals(num_requests, rate_per_s=rate_per_s, rng=rng)
    return with_arrivals(random_trace(num_requests, seed), arrival_s)


def test_side_by_side_is_one_after_the_other():
    traces = [online(0.5, 0), online(2.0, 1, 37), online(8.0, 2)]
    models = [step_time.linear([0.1]), step_time.linear([0.2], decode_context=0.01), step_time.linear([0.4])]
    together = simulate_many(ROOMY, tiny.policy(), models, traces, max_steps=800)
    for model, trace, simulation in zip(models, traces, together, strict=True):
        alone = simulate(ROOMY, tiny.policy(), model, trace)
        assert simulation.steps == alone.steps
        assert simulation.records == alone.records


def test_policies_are_a_batch_dimension():
    policies = [tiny.policy("greedy"), tiny.policy("peak_memory"), tiny.policy("oracle", "shortest_job")]
    trace = online(4.0, 3)
    arrays = simulator.trace_arrays(trace, max_len=TIGHT.max_len)
    forever = virtual_clock.from_float64(np.array(np.inf))

    @jax.jit
    @jax.vmap
    def finish(index):
        policy, state = virtual_run.any_of(policies, index), virtual_engine.init(TIGHT, arrays)
        state = virtual_run.advance(TIGHT, policy, virtual_engine.Host(), UNIT, arrays, forever, state)
        return state.requests.finish

    found = virtual_clock.to_float64(finish(jnp.arange(len(policies))))[:, : len(trace)]
    for policy, finish_s in zip(policies, found, strict=True):
        assert finish_s.tolist() == [r.finish_s for r in simulate(TIGHT, policy, UNIT, trace).records]
    assert len({tuple(row) for row in found.tolist()}) == len(policies), (
        "the policies must differ, or the test shows little"
    )
    with pytest.raises(ValueError, match="compiled in"):
        virtual_run.any_of(
            [policies[0], dataclasses.replace(policies[0], phase_order=PhaseOrder.PREFILL_FIRST)], jnp.int32(0)
        )


def test_similar_traces_share_a_program():
    simulate(ROOMY, POLICY, UNIT, random_trace(33))
    before = simulator._run._cache_size()
    simulate(ROOMY, POLICY, step_time.linear([3.0, 3.0]), random_trace(39, seed=1))
    assert simulator._run._cache_size() == before


POLICY = tiny.policy()


def test_time_does_not_drift():
    @jax.jit
    def many_steps():
        start = virtual_clock.Seconds(high=jnp.float32(3600), low=jnp.float32(0))
        return jax.lax.fori_loop(0, 200_000, lambda i, t: virtual_clock.later(t, jnp.float32(0.0137)), start)

    expected = 3600 + 200_000 * np.float64(np.float32(0.0137))
    assert float(virtual_clock.to_float64(many_steps())) == pytest.approx(expected, abs=1e-6)


def test_close_times_are_told_apart():
    a, b = (virtual_clock.from_float64(np.array(t)) for t in (3600.0, 3600.0 + 1e-8))
    assert float(virtual_clock.elapsed_s(b, a)) == pytest.approx(1e-8, rel=1e-3)
    assert float(virtual_clock.elapsed_s(a, b)) < 0
    assert float(virtual_clock.to_float64(virtual_clock.latest(a, b))) == pytest.approx(3600.0 + 1e-8, abs=1e-12)
    never = virtual_clock.from_float64(np.array(np.inf))
    assert float(virtual_clock.elapsed_s(never, a)) == np.inf
    assert float(virtual_clock.to_float64(never)) == np.inf


KINDS = (OpKind.KQV, OpKind.O, OpKind.O_AR, OpKind.UG, OpKind.D, OpKind.D_AR, OpKind.DEC_ATTN, OpKind.PF_ATTN)


def work_of(shape: BatchShape, rung: int = 0) -> StepWork:
    decode, prefill = float(shape.num_decode_tokens), float(shape.num_prefill_tokens)
    amounts = (decode, prefill, decode * shape.mean_context_len, prefill * shape.mean_prefill_context_len, decode, 0.0)
    return StepWork(rung=jnp.int32(rung), **dict(zip(FEATURES, map(jnp.float32, amounts), strict=True)))


def test_table_2_is_a_step_of_225_ms():
    model = PRESETS["llama-2-70b"]
    seconds = step_time.from_durations(table2_profile().durations, [TABLE_2_SHAPE], KINDS, model.num_layers)
    assert float(seconds(work_of(TABLE_2_SHAPE))) == pytest.approx(225.05e-3, rel=2e-3)


def test_operation_times_are_read_at_any_context():
    profile, layers = table2_profile(), PRESETS["llama-2-70b"].num_layers
    shapes = [BatchShape(300, 212, 900.0, 400.0), TABLE_2_SHAPE]
    seconds = step_time.from_durations(profile.durations, shapes, KINDS, layers, overhead_s=0.5, head_s_per_row=1e-3)
    for rung, base in enumerate(shapes):
        other = dataclasses.replace(base, mean_context_len=1700.0, mean_prefill_context_len=800.0)
        whole = NanoBatch(0, other.num_tokens)
        expected = layers * sum(profile.durations(other)(kind, whole) for kind in KINDS)
        expected += 0.5 + 1e-3 * other.num_decode_tokens
        assert float(seconds(work_of(other, rung))) == pytest.approx(expected, rel=1e-3)


def test_a_fit_finds_the_numbers_that_made_the_steps():
    truth = step_time.linear([0.2, 0.5], num_decode_tokens=[0.01, 0.02], decode_context=[1e-4, 2e-4], num_sampled=1e-3)
    rng = np.random.default_rng(0)
    rung = rng.integers(0, 2, 200)
    features = rng.uniform(0, 100, (200, len(FEATURES)))
    work = StepWork(
        rung=jnp.asarray(rung, jnp.int32), **dict(zip(FEATURES, jnp.asarray(features.T, jnp.float32), strict=True))
    )
    seconds = np.asarray(truth(work), np.float64)
    found = step_time.fit(rung, features, seconds, 2)
    np.testing.assert_allclose(found.constant_s, truth.constant_s, rtol=1e-3)
    np.testing.assert_allclose(found.per_unit_s, truth.per_unit_s, rtol=1e-3, atol=1e-7)
    with pytest.raises(ValueError, match="rung 2: no step"):
        step_time.fit(rung, features, seconds, 3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"num_pages is no feature|only num_decode_tokens"):
        step_time.linear([1.0], num_pages=1.0)
    with pytest.raises(ValueError, match="2 numbers for 1 rungs"):
        step_time.linear([1.0], num_sampled=[1.0, 2.0])
    with pytest.raises(ValueError, match="must be >= 0"):
        step_time.linear([-1.0])
    with pytest.raises(ValueError, match="request 0 has 70 tokens, the limit is 64"):
        simulate(ROOMY, tiny.policy(), UNIT, one_request(input_len=67))
    with pytest.raises(ValueError, match="output length 0"):
        simulate(ROOMY, tiny.policy(), UNIT, one_request(output_len=0))
    with pytest.raises(ValueError, match="max_steps=3"):
        simulate_many(ROOMY, tiny.policy(), UNIT, [one_request(output_len=9)], max_steps=3)
    with pytest.raises(ValueError, match="num_prefill_tokens=0 must be >= 1"):
        step_time.from_durations(table2_profile().durations, [BatchShape(8, 0, 100.0, 1.0)], KINDS, 80)
    with pytest.raises(ValueError, match="num_rounds=3 need"):
        conversation_rounds(
            random_trace(5), np.zeros(2), num_rounds=3, think_s_mean=1.0, max_len=64, rng=np.random.default_rng(0)
        )
