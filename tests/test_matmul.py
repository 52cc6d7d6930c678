"""Does every implementation of the matrix product keep the contract of `api.py`?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import api, matmul, reference
from pallas_kernels.matmul.arg_specs import ARG_SPECS

BF16_KERNEL = jnp.zeros((2, api.PANEL), jnp.bfloat16)
needs_unit = pytest.mark.skipif(
    api._why_not_numba(BF16_KERNEL) is not None, reason=str(api._why_not_numba(BF16_KERNEL))
)
IMPLEMENTATIONS = ("xla", pytest.param("numba", marks=needs_unit))


def operands(num_tokens, width, num_columns, dtype=jnp.bfloat16):
    x, kernel = jax.random.split(jax.random.key(num_tokens))
    return jax.random.normal(x, (num_tokens, width)), jax.random.normal(kernel, (width, num_columns)).astype(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestMatmul:
    @pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 7, 8, 12, 13, 16, 25])
    def test_is_the_sum_of_products(self, implementation, num_tokens):
        x, kernel = operands(num_tokens, 6, 64)
        out = matmul(x, kernel, implementation=implementation)
        exact = reference.matmul(x.astype(jnp.bfloat16), kernel)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("spec", ARG_SPECS[::4], ids=lambda spec: spec.name)
    def test_real_shapes(self, implementation, spec):
        x, kernel = operands(spec.num_tokens, spec.width, spec.num_columns)
        out = jax.jit(lambda x, kernel: matmul(x, kernel, implementation=implementation))(x, kernel)
        exact = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(kernel, np.float64)
        assert np.abs(out - exact).max() <= 1e-5 * np.abs(exact).max()


@needs_unit
def test_a_token_does_not_depend_on_its_neighbours():
    x, kernel = operands(29, 64, 96)
    together = matmul(x, kernel, implementation="numba")
    for first, stop in ((0, 1), (3, 11), (12, 28)):
        np.testing.assert_array_equal(matmul(x[first:stop], kernel, implementation="numba"), together[first:stop])


@needs_unit
def test_many_calls_at_once_finish():
    """Calls that share the pool's threads, more of them than threads: none may wait for a task that never starts."""
    x, kernel = operands(40, 64, 256)
    many = jax.jit(lambda x, kernel: [matmul(x + i, kernel, implementation="numba") for i in range(40)])
    plain = [matmul(x + i, kernel, implementation="xla") for i in range(40)]
    for _ in range(20):
        for out, expected in zip(many(x, kernel), plain, strict=True):
            np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_float32_kernels_take_xla():
    x, kernel = operands(3, 6, 64, jnp.float32)
    np.testing.assert_array_equal(matmul(x, kernel), matmul(x, kernel, implementation="xla"))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (jnp.zeros((4, 64), jnp.float32), "float32"),
        (jnp.zeros((3, 64), jnp.bfloat16), r"\[3, 64\]"),
        (jnp.zeros((4, 40), jnp.bfloat16), r"\[4, 40\]"),
    ],
)
def test_what_numba_cannot_do_is_said(kernel, message):
    with pytest.raises(NotImplementedError, match=message):
        matmul(jnp.zeros((2, kernel.shape[0])), kernel, implementation="numba")


def test_unknown_implementation_is_said():
    with pytest.raises(NotImplementedError, match="'cuda' is none of"):
        matmul(jnp.zeros((2, 2)), jnp.zeros((2, 2)), implementation="cuda")
