"""What should paged attention compute?  One token after another, each against its whole page table."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt16


def paged_attention(
    q: Float[Array, "T H h"],
    k_pages: Float[Array, "L N K p h"] | UInt16[Array, "L N K p h"],
    v_pages: Float[Array, "L N K p h"] | UInt16[Array, "L N K p h"],
    layer: int,
    kv_lens: Int32[Array, "R"],
    page_indices: Int32[Array, "R P"],
    cu_q_lens: Int32[Array, "R+1"],
    num_decode: Int32[Array, ""],
    *,
    sm_scale: float,
) -> Float[Array, "T H h"]:
    """Attention as `api.paged_attention` defines it.  `num_decode` is a hint of which this loop makes no use.

    Products are taken in the wider of the dtypes of `q` and the pages and summed in float32, weights are rounded to
    that dtype: the plain implementation whose error the others are measured by.
    """
    del num_decode
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, page_size = k_pages.shape[2:4]
    group = num_heads // num_kv_heads
    value_dtype = jnp.bfloat16 if k_pages.dtype == jnp.uint16 else k_pages.dtype
    dtype = jnp.promote_types(q.dtype, value_dtype)
    positions_of_table = jnp.arange(page_indices.shape[1] * page_size)

    def dot(subscripts, a, b):
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)

    def rows_of_pages(pages, row):
        """[L N K p h] -> [K P*p h]: a row's tokens are the rows of its pages, end to end."""
        taken = jax.lax.bitcast_convert_type(pages[layer, page_indices[row]], value_dtype)
        return taken.swapaxes(0, 1).reshape(num_kv_heads, -1, head_dim)

    def attend(token):
        row = jnp.searchsorted(cu_q_lens, token, side="right") - 1  # the row with cu_q_lens[row] <= token < [row + 1]
        position = kv_lens[row] - cu_q_lens[row + 1] + token
        is_visible = positions_of_table <= position
        k, v = rows_of_pages(k_pages, row), rows_of_pages(v_pages, row)
        v = jnp.where(is_visible[:, None], v, 0)  # 0 * NaN is NaN: what is not visible must not be multiplied
        scores = dot("kgh,ksh->kgs", q[token].reshape(num_kv_heads, group, head_dim), k) * sm_scale
        weights = jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf), axis=-1)
        return dot("kgs,ksh->kgh", weights, v).reshape(num_heads, head_dim).astype(q.dtype)

    tokens = jnp.arange(q.shape[0])
    is_real = tokens < cu_q_lens[-1]
    out = jax.lax.map(attend, jnp.where(is_real, tokens, 0))
    return jnp.where(is_real[:, None, None], out, 0)
