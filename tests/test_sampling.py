"""Laws of sampling: distributions, cuts, independence of neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojax import sampling
from nanojax.config import SamplingParts

V, R = 1000, 4


def state(temperature=1.0, top_k=0, top_p=1.0, seed=range(R)):
    base = sampling.init(R, 2)
    return base.replace(
        temperature=jnp.broadcast_to(jnp.float32(temperature), (R,)),
        top_k=jnp.broadcast_to(jnp.int32(top_k), (R,)),
        top_p=jnp.broadcast_to(jnp.float32(top_p), (R,)),
        seed=jnp.array(list(seed), jnp.uint32),
    )


SLOTS = jnp.arange(R, dtype=jnp.int32)
sample = jax.jit(sampling.sample)


def logits(seed=0, rows=R):
    return 2 * jax.random.normal(jax.random.key(seed), (rows, V))


def test_temperature_zero_is_the_first_largest_logit():
    x = logits().at[0, 7].set(50.0).at[0, 9].set(50.0)
    np.testing.assert_array_equal(sample(x, state(0.0), SLOTS, SLOTS), jnp.argmax(x, axis=-1))


def test_categorical_inverts_the_cumulative_distribution():
    weights = jnp.array([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]])
    for uniform, token in ((0.0, 1), (0.49, 1), (0.5, 3), (0.74, 3), (0.75, 4), (0.9999999, 4)):
        assert int(sampling.categorical(weights, jnp.array([uniform], jnp.float32))[0]) == token


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**24 - 1).map(lambda n: n / 2**24), st.integers(0, 2**31 - 2))
def test_categorical_never_draws_a_token_of_weight_zero(uniform, seed):
    weights = jax.random.uniform(jax.random.key(seed), (R, V)) * (
        jax.random.uniform(jax.random.key(seed + 1), (R, V)) < 0.01
    )
    weights = weights.at[:, 0].set(1e-6)
    token = sampling.categorical(weights, jnp.full((R,), uniform, jnp.float32))
    assert (jnp.take_along_axis(weights, token[:, None], 1) > 0).all()


def test_frequencies_follow_the_softmax():
    x = jnp.broadcast_to(jnp.array([1.0, 0.0, -1.0, 2.0, -jnp.inf]), (20000, 5))
    base = sampling.init(20000, 1)
    base = base.replace(temperature=base.temperature + 0.7, seed=jnp.arange(20000, dtype=jnp.uint32))
    slots = jnp.arange(20000, dtype=jnp.int32)
    drawn = sampling.sample(x, base, slots, jnp.full((20000,), 3, jnp.int32))
    expected = np.asarray(jax.nn.softmax(x[0] / 0.7))
    counts = np.bincount(np.asarray(drawn), minlength=5) / 20000
    sigma = np.sqrt(expected * (1 - expected) / 20000)
    assert (np.abs(counts - expected) <= 4 * sigma + 1e-12).all()


@pytest.mark.parametrize("top_k", [1, 2, 17, 999, 1000])
def test_top_k_keeps_the_k_largest(top_k):
    weights = jnp.exp(logits())
    weights = weights / weights.max(axis=1, keepdims=True)
    kept = sampling._keep_top(weights, jnp.full((R,), top_k), jnp.ones(R))
    expected = np.argsort(-np.asarray(weights), axis=1)[:, :top_k]
    for row in range(R):
        assert set(np.flatnonzero(kept[row])) == set(expected[row])


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass(top_p):
    weights = jnp.exp(logits())
    weights = weights / weights.max(axis=1, keepdims=True)
    kept = sampling._keep_top(weights, jnp.zeros((R,), jnp.int32), jnp.full((R,), top_p, jnp.float32))
    for row in range(R):
        ordered = np.sort(np.asarray(weights[row], np.float64))[::-1]
        needed = int(np.searchsorted(np.cumsum(ordered), top_p * ordered.sum())) + 1
        assert abs(int((kept[row] > 0).sum()) - needed) <= (top_p > 0.99), (
            "float32 sums may differ by one token far out"
        )


def test_top_p_is_taken_of_what_top_k_leaves():
    weights = jnp.array([[1.0, 0.9, 0.8, 0.7]])
    kept = sampling._keep_top(weights, jnp.array([2]), jnp.array([0.5], jnp.float32))
    np.testing.assert_array_equal(kept > 0, [[True, False, False, False]])


def test_a_sample_depends_on_its_own_seed_and_position_only():
    x, position = logits(), jnp.array([5, 6, 7, 8], jnp.int32)
    together = sample(x, state(1.0), SLOTS, position)
    greedy_neighbours = state(1.0).replace(temperature=jnp.array([0.0, 0.0, 1.0, 0.0]))
    assert sample(x, greedy_neighbours, SLOTS, position)[2] == together[2]
    cut_neighbours = state(1.0).replace(top_k=jnp.array([1, 3, 0, 5]), top_p=jnp.array([0.1, 1.0, 1.0, 0.4]))
    assert sample(x, cut_neighbours, SLOTS, position)[2] == together[2]
    order = jnp.array([2, 0, 3, 1], jnp.int32)
    np.testing.assert_array_equal(sample(x[order], state(1.0), order, position[order]), together[order])
    assert (sample(x, state(1.0), SLOTS, position + 1) != together).any()
    assert (sample(x, state(1.0, seed=range(9, 9 + R)), SLOTS, position) != together).any()


def test_logprob_is_the_models_own_and_0_where_nobody_asks():
    x, tokens = logits(), jnp.array([1, 2, 3, 4])
    expected = jnp.where(jnp.arange(R) == 2, jax.nn.log_softmax(x)[jnp.arange(R), tokens], 0)
    np.testing.assert_allclose(sampling.logprob(x, tokens, jnp.arange(R) == 2), expected, rtol=1e-5)
    np.testing.assert_array_equal(sampling.logprob(x, tokens, jnp.zeros(R, bool)), 0)


HOWS = {
    "greedy": state(0.0),
    "random": state(0.7),
    "cut": state(1.0, top_k=5, top_p=0.5),
    "all kinds": state(0.9).replace(
        temperature=jnp.array([0.0, 0.0, 1.0, 0.8]),
        top_k=jnp.array([0, 3, 0, 7]),
        top_p=jnp.array([1.0, 0.4, 1.0, 0.9]),
    ),
}


@pytest.mark.parametrize("name", HOWS)
def test_work_that_a_cpu_skips_changes_nothing(name, as_on_a_gpu):
    x = logits()
    computed = jax.jit(lambda *args: sampling.sample(*args))(x, HOWS[name], SLOTS, SLOTS)
    np.testing.assert_array_equal(computed, sample(x, HOWS[name], SLOTS, SLOTS))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("greedy", SamplingParts(random=False)),
        ("random", SamplingParts(top=False)),
        ("greedy", SamplingParts(top=False)),
    ],
)
def test_parts_that_nobody_asks_for_change_nothing(name, parts):
    x = logits()
    np.testing.assert_array_equal(
        sampling.sample(x, HOWS[name], SLOTS, SLOTS, parts), sample(x, HOWS[name], SLOTS, SLOTS)
    )
