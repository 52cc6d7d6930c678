"""Does every implementation of the norm keep the contract of `api.py`?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rms_norm import api, rms_norm

EPS = 1e-5


def numba_to(dtype):
    """ "numba" with results of `dtype`, skipped where this CPU cannot."""
    reason = api._why_not_numba(api.LANES, dtype)
    return pytest.param("numba", dtype, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


CASES = [("xla", jnp.float32), ("xla", jnp.bfloat16), numba_to(jnp.float32), numba_to(jnp.bfloat16)]


def operands(shape):
    x, scale = jax.random.split(jax.random.key(shape[-1]))
    return 3 * jax.random.normal(x, shape), jax.random.normal(scale, shape[-1:])


@pytest.mark.parametrize(("implementation", "out_dtype"), CASES)
@pytest.mark.parametrize("shape", [(1, 16), (31, 64), (33, 576), (100, 4096), (2, 3, 5, 128)])
def test_is_the_norm(implementation, out_dtype, shape):
    x, scale = operands(shape)
    out = rms_norm(x, scale, EPS, implementation=implementation, out_dtype=out_dtype)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * np.asarray(scale, np.float64)
    assert (out.shape, out.dtype) == (shape, out_dtype)
    rounding = 2**-8 if out_dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize(("implementation", "out_dtype"), CASES)
@pytest.mark.parametrize("num_tokens", [0, 1, 32, 33, 70])
def test_padding_is_left_out_and_harms_nobody(implementation, out_dtype, num_tokens):
    x, scale = operands((70, 64))
    alone = rms_norm(x[:num_tokens], scale, EPS, implementation=implementation, out_dtype=out_dtype)
    padded = x.at[num_tokens:].set(jnp.nan)
    norm = jax.jit(
        lambda x, n: rms_norm(x, scale, EPS, num_tokens=n, implementation=implementation, out_dtype=out_dtype)
    )
    out = norm(padded, jnp.int32(num_tokens))
    np.testing.assert_allclose(np.asarray(out[:num_tokens], np.float32), np.asarray(alone, np.float32), rtol=1e-6)
    if implementation == "numba":  # to the last bit
        np.testing.assert_array_equal(out[:num_tokens], alone)
        np.testing.assert_array_equal(out[num_tokens:], 0)


def test_operands_may_be_narrow():
    x, scale = operands((5, 64))
    out = rms_norm(x.astype(jnp.bfloat16), scale.astype(jnp.bfloat16), EPS)
    exact = rms_norm(x.astype(jnp.bfloat16), scale.astype(jnp.bfloat16), EPS, implementation="xla")
    np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("implementation", "out_dtype"), CASES)
def test_a_row_of_zeros_and_a_row_of_large_values(implementation, out_dtype):
    x = jnp.stack([jnp.zeros(32), jnp.full((32,), 1e15)])
    out = rms_norm(x, jnp.ones(32), EPS, implementation=implementation, out_dtype=out_dtype)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.stack([np.zeros(32), np.ones(32)]), rtol=1e-6)


@pytest.mark.parametrize(
    ("width", "implementation", "out_dtype", "message"),
    [
        (24, "numba", jnp.float32, "needs a width that is a multiple of 16, not 24"),
        (32, "numba", jnp.float16, "gives float32 or bfloat16, not float16"),
        (32, "triton", jnp.float32, "'triton' is none of 'numba', 'xla'"),
    ],
)
def test_what_it_cannot_do_is_named(width, implementation, out_dtype, message):
    with pytest.raises(NotImplementedError, match=message):
        rms_norm(jnp.ones((1, width)), jnp.ones(width), EPS, implementation=implementation, out_dtype=out_dtype)
    if implementation == "numba":
        assert rms_norm(jnp.ones((1, width)), jnp.ones(width), EPS, out_dtype=out_dtype).dtype == out_dtype
