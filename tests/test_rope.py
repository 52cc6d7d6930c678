"""Does every implementation of the rotation keep the contract of `api.py`?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rope import api, rotate_qkv

REASON = api._why_not_numba(jax.ShapeDtypeStruct((1, 1, 3, 64), jnp.float32), jnp.float32)
NUMBA = pytest.param("numba", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON)))
IMPLEMENTATIONS = ["xla", NUMBA]


def operands(t, num_kv_heads, group, head_dim):
    keys = jax.random.split(jax.random.key(t), 2)
    angle = 100 * jax.random.normal(keys[1], (t, head_dim // 2))
    return jax.random.normal(keys[0], (t, num_kv_heads, group + 2, head_dim)), jnp.cos(angle), jnp.sin(angle)


def exact(y, cos, sin):
    """As complex numbers, of which dimension i is the real and i + h/2 the imaginary part."""
    y, cos, sin = (np.asarray(x, np.float64) for x in (y, cos, sin))
    half = y.shape[-1] // 2
    turned = (y[..., :half] + 1j * y[..., half:]) * (cos + 1j * sin)[:, None, None]
    turned = np.concatenate([turned.real, turned.imag], axis=-1)
    return turned[:, :, :-2].reshape(y.shape[0], -1, 2 * half), turned[:, :, -2], y[:, :, -1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (17, 3, 3, 64), (16, 2, 4, 128), (40, 8, 4, 96)])
def test_is_the_rotation(implementation, out_dtype, shape):
    args = operands(*shape)
    found = rotate_qkv(*args, implementation=implementation, out_dtype=out_dtype)
    rounding = 2**-8 if out_dtype == jnp.bfloat16 else 1e-6
    for one, truth in zip(found, exact(*args), strict=True):
        assert (one.shape, one.dtype) == (truth.shape, out_dtype)
        np.testing.assert_allclose(np.asarray(one, np.float64), truth, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 40])
def test_padding_is_left_out_and_harms_nobody(implementation, num_tokens):
    y, cos, sin = operands(40, 2, 3, 64)
    alone = rotate_qkv(y, cos, sin, implementation=implementation)
    rotated = jax.jit(lambda y, n: rotate_qkv(y, cos, sin, num_tokens=n, implementation=implementation))
    found = rotated(y.at[num_tokens:].set(jnp.nan), jnp.int32(num_tokens))
    for one, whole in zip(found, alone, strict=True):
        np.testing.assert_allclose(one[:num_tokens], whole[:num_tokens], rtol=1e-6, atol=1e-6)
        if implementation == "numba":  # to the last bit
            np.testing.assert_array_equal(one[:num_tokens], whole[:num_tokens])
            np.testing.assert_array_equal(one[num_tokens:], 0)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "implementation", "out_dtype", "message"),
    [
        (48, jnp.float32, "numba", jnp.float32, "needs a head_dim that is a multiple of 32, not 48"),
        (64, jnp.bfloat16, "numba", jnp.float32, "takes float32 .* not bfloat16 and float32"),
        (64, jnp.float32, "numba", jnp.float16, "gives float32 or bfloat16, not float32 and float16"),
        (64, jnp.float32, "triton", jnp.float32, "'triton' is none of 'numba', 'xla'"),
    ],
)
def test_what_it_cannot_do_is_named(head_dim, dtype, implementation, out_dtype, message):
    y, cos, sin = operands(2, 1, 1, head_dim)
    with pytest.raises(NotImplementedError, match=message):
        rotate_qkv(y.astype(dtype), cos, sin, implementation=implementation, out_dtype=out_dtype)
    if implementation == "numba":
        assert {one.dtype for one in rotate_qkv(y, cos, sin, out_dtype=out_dtype)} == {jnp.dtype(out_dtype)}
