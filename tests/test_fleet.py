"""Laws of the fleet: every replica is the exact simulator on its share, and the router does what plain Python would."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny

from nanojax import step_time
from nanojax.config import EngineConfig
from nanojax.fleet import FleetConfig, Routing, simulate_fleet
from nanojax.simulate import Host, simulate
from nanojax.workload import Trace, conversation_rounds, poisson_arrivals

CONFIG = EngineConfig(token_budgets=(8,), num_slots=3, page_size=4, num_pages=24, max_len=64)
POLICY = tiny.policy()
MODEL = step_time.linear([0.3], decode_context=0.002, num_restored_tokens=0.001)
DURATION_S = 1e4
"""Long enough for everything to finish."""


def trace(num_requests: int = 60, rate_per_s: float = 2.0, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    arrival_s = poisson_arrivals(num_requests, rate_per_s=rate_per_s, rng=rng)
    return Trace("fleet", arrival_s, rng.integers(1, 30, num_requests), rng.integers(1, 20, num_requests))


def serve(work, fleet: FleetConfig, **options):
    return simulate_fleet(
        CONFIG, POLICY, MODEL, work, fleet, duration_s=options.pop("duration_s", DURATION_S), **options
    )


@pytest.mark.parametrize("routing", [Routing.ROUND_ROBIN, Routing.LEAST_LOADED])
@pytest.mark.parametrize("window_s", [0.7, 40.0])
def test_a_replica_is_the_simulator_on_its_share(routing, window_s):
    work = trace()
    fleet = FleetConfig(5, routing, window_s=window_s, chunk_size=2, requests_per_replica=60)
    result = serve(work, fleet, duration_s=200.0)
    assert sorted(set(result.replica)) == [0, 1, 2, 3, 4]
    for replica in range(5):
        mine = np.flatnonzero(result.replica == replica)
        records = simulate(CONFIG, POLICY, MODEL, work.select(mine)).records
        np.testing.assert_array_equal(result.arrival_s[mine], work.arrival_s[mine])
        assert [r.first_token_s for r in records] == result.first_token_s[mine].tolist()
        assert [r.finish_s for r in records] == result.finish_s[mine].tolist()


def test_round_robin_deals_in_order_of_arrival():
    result = serve(trace(), FleetConfig(7, window_s=3.0), duration_s=60.0)
    assert result.replica.tolist() == [i % 7 for i in range(60)]


def test_least_loaded_is_what_plain_python_would_pick():
    """One arrival per window: the router knows the loads at the start of its window."""
    model, num_replicas = step_time.linear([0.3]), 3
    work = dataclasses.replace(trace(24), arrival_s=np.arange(24) + 0.5)
    fleet = FleetConfig(num_replicas, Routing.LEAST_LOADED, window_s=1.0, requests_per_replica=24)
    result = simulate_fleet(CONFIG, POLICY, model, work, fleet, duration_s=300.0)
    shares: list[list[int]] = [[] for _ in range(num_replicas)]
    for request in range(24):
        loads = []
        for share in shares:
            others = [i for i in range(24) if i not in share]
            order = np.array(share + others)
            alone = Trace("alone", np.sort(work.arrival_s), work.input_lens[order], work.output_lens[order])
            alone = dataclasses.replace(alone, arrival_s=np.append(work.arrival_s[share], np.full(len(others), 1e6)))
            records = simulate(CONFIG, POLICY, model, alone).records[: len(share)]
            # Steps that start within a window are reported at its end.
            loads.append(sum(record.finish_s - 0.3 >= request for record in records))
        shares[loads.index(min(loads))].append(request)
    assert [sorted(share) for share in shares] == [
        np.flatnonzero(result.replica == r).tolist() for r in range(num_replicas)
    ]
    assert len({len(share) for share in shares}) > 1, "as good as round robin: the test shows little"


def conversations(num_users: int = 30, rate_per_s: float = 1.0):
    rng = np.random.default_rng(3)
    said = Trace("talk", np.zeros(4 * num_users), rng.integers(1, 12, 4 * num_users), rng.integers(1, 9, 4 * num_users))
    arrival_s = poisson_arrivals(num_users, rate_per_s=rate_per_s, rng=rng)
    return conversation_rounds(said, arrival_s, num_rounds=4, think_s_mean=3.0, max_len=64, rng=rng)


def test_users_come_back_when_they_have_read_the_answer():
    rounds = conversations()
    result = serve(rounds, FleetConfig(4, Routing.LEAST_LOADED, window_s=0.5), duration_s=400.0)
    followed = np.flatnonzero(rounds.next_round >= 0)
    follower = rounds.next_round[followed]
    assert np.isfinite(result.finish_s).all()
    np.testing.assert_allclose(result.arrival_s[follower], result.finish_s[followed] + rounds.think_s[follower])


def test_prefix_affinity_stays_at_home_and_reuses_the_conversation():
    rounds, host = conversations(), Host(offloads_kv=True)
    options = {"host": host, "duration_s": 400.0}
    loyal = serve(rounds, FleetConfig(4, Routing.PREFIX_AFFINITY, max_overload=100.0), **options)
    moving = serve(rounds, FleetConfig(4, Routing.ROUND_ROBIN), **options)
    has_history = rounds.history_lens > 0
    previous = np.full(len(rounds), -1)
    previous[rounds.next_round[rounds.next_round >= 0]] = np.flatnonzero(rounds.next_round >= 0)
    assert (loyal.replica[has_history] == loyal.replica[previous[has_history]]).all()
    assert (loyal.reused_len == rounds.history_lens).all()
    stayed = moving.replica[has_history] == moving.replica[previous[has_history]]
    np.testing.assert_array_equal(moving.reused_len[has_history], np.where(stayed, rounds.history_lens[has_history], 0))
    assert 0 < stayed.sum() < has_history.sum()
    assert (serve(rounds, FleetConfig(4, Routing.PREFIX_AFFINITY), duration_s=400.0).reused_len == 0).all()


def test_prefix_affinity_leaves_a_home_that_is_overloaded():
    rounds = conversations(60, rate_per_s=20.0)
    loyal, fickle = (
        serve(rounds, FleetConfig(6, Routing.PREFIX_AFFINITY, max_overload=limit), duration_s=400.0)
        for limit in (100.0, 0.1)
    )
    previous = np.flatnonzero(rounds.next_round >= 0)
    moves = [(r.replica[rounds.next_round[previous]] != r.replica[previous]).sum() for r in (loyal, fickle)]
    assert moves[0] == 0 < moves[1]


def test_threads_change_nothing_and_a_run_can_end_early():
    work, fleet = trace(), FleetConfig(5, Routing.LEAST_LOADED, chunk_size=1)
    one = serve(work, fleet, duration_s=10.0)
    with ThreadPoolExecutor(2) as pool:
        two = serve(work, fleet, duration_s=10.0, run_all=pool.map)
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name))
    assert ((one.replica >= 0) == (work.arrival_s < 10.0)).all()
    assert 0 < np.isfinite(one.finish_s).sum() < (work.arrival_s < 10.0).sum()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="num_replicas=0 must be positive"):
        FleetConfig(0)
    with pytest.raises(ValueError, match="more requests than requests_per_replica=3"):
        serve(trace(), FleetConfig(2, requests_per_replica=3), duration_s=60.0)
    with pytest.raises(ValueError, match="the limit is 64"):
        serve(dataclasses.replace(trace(1), input_lens=np.array([70])), FleetConfig(1))
