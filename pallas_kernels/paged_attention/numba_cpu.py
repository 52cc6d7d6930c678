"""How does attention read pages in place on a CPU?

XLA for CPUs has no loop that reads a page where it lies: it gathers pages into a buffer first.  Here Python functions that
numba compiles to machine code do, as an FFI handler that shares its rows among the threads of XLA's pool.
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array, Float, Int32, UInt16

from pallas_kernels.numba_ffi import (
    FRAME_SIZE,
    LANES,
    Describe,
    Work,
    array,
    attribute,
    buffer,
    fingerprint,
    prefetch,
    register,
)
from pallas_kernels.paged_attention import numba_vectors
from pallas_kernels.paged_attention.numba_vectors import MAX_SUMS, add_values, exponentiate, scores

ROWS_PER_TURN = 1


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
    """Attention as `api.paged_attention` defines it; products and sums in float32.

    Pages of uint16 or float32, for a CPU.  Every token is a row of its own to the kernel: a token of a chunk reads the chunk's
    pages again, out of the cores' caches.  Its result depends on that token's row alone, to the last bit.
    """
    del num_decode
    num_tokens, num_heads, head_dim = q.shape
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(cu_q_lens[1:], token, side="right", method="compare_all")
    row = jnp.minimum(row, kv_lens.shape[0] - 1)
    num_visible = jnp.where(token < cu_q_lens[-1], kv_lens[row] - cu_q_lens[row + 1] + token + 1, 0)
    target = _target(k_pages.dtype.name, head_dim, num_heads // k_pages.shape[2])
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(q.shape, jnp.float32))
    query = q.astype(jnp.float32) * jnp.float32(sm_scale)
    out = call(query, k_pages, v_pages, num_visible, page_indices[row], layer=np.int64(layer))
    return out.astype(q.dtype)


@functools.cache
def _target(dtype: str, head_dim: int, group: int) -> str:
    """Compiles the handler for pages of a dtype, `group` query heads for each KV head; returns its name for XLA."""
    name = f"paged_attention_{dtype}_h{head_dim}_g{group}"
    sources = fingerprint(__file__, numba_vectors.__file__)
    work = _make_rows(np.dtype(dtype).itemsize, head_dim, group, sources)
    register(name, _make_describe(sources), work, num_words=NUM_WORDS, items_per_turn=ROWS_PER_TURN)
    return name


# Words of a job: addresses of the data, then sizes.
Q, K_PAGES, V_PAGES, KV_LENS, TABLE, OUT, TABLE_WIDTH, NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, LAYER, NUM_WORDS = range(12)


@typing.no_type_check
def _make_describe(sources):
    """Reads what a call is about off its frame; an item of work is a row."""

    @numba.cfunc(Describe, cache=True)
    def describe(frame_at, job_at):
        frame, job = array(frame_at, np.int64, FRAME_SIZE), array(job_at, np.int64, NUM_WORDS + 0 * sources)
        for word, index in ((Q, 0), (K_PAGES, 1), (V_PAGES, 2), (KV_LENS, 3), (TABLE, 4)):
            job[word] = buffer(frame, False, index)[0]
        job[OUT], out_dims = buffer(frame, True, 0)
        cache_dims = array(buffer(frame, False, 1)[1], np.int64, 5)
        job[NUM_PAGES], job[NUM_KV_HEADS], job[PAGE_SIZE] = cache_dims[1], cache_dims[2], cache_dims[3]
        job[TABLE_WIDTH] = array(buffer(frame, False, 4)[1], np.int64, 2)[1]
        job[LAYER] = attribute(frame, 0)
        return array(out_dims, np.int64, 3)[0]

    return describe


@typing.no_type_check
def _make_rows(itemsize, head_dim, group, sources):
    """The work: `itemsize`, `head_dim` and `group` are constants to the compiler, all other sizes come with the call."""
    num_keys = min(4, math.gcd(head_dim, LANES), 1 << (max(1, MAX_SUMS // group).bit_length() - 1))  # a power of 2

    @numba.cfunc(Work, error_model="numpy", cache=True)
    def rows(job_at, first, stop):
        job = array(job_at, np.int64, NUM_WORDS + 0 * sources)
        q_data, k_data, v_data, out_data = job[Q], job[K_PAGES], job[V_PAGES], job[OUT]
        num_pages, num_kv_heads, page_size, width = job[NUM_PAGES], job[NUM_KV_HEADS], job[PAGE_SIZE], job[TABLE_WIDTH]
        layer_page = job[LAYER] * num_pages
        kv_lens = array(job[KV_LENS], np.int32, stop)
        table = array(job[TABLE], np.int32, stop * width)
        num_heads = num_kv_heads * group
        stride = np.int64(0)  # tokens of the longest row
        for row in range(first, stop):
            stride = max(stride, np.int64(kv_lens[row]))
        weights = np.empty(num_heads * stride, np.float32)
        totals = np.empty(num_heads, np.float32)
        token_size = head_dim * itemsize  # bytes of one KV head of a token
        block = page_size * token_size  # of one KV head in a page
        per_head = 4 * group * head_dim  # bytes of the queries, or of the sums, of one KV head
        for row in range(first, stop):
            acc = array(out_data + row * num_kv_heads * per_head, np.float32, num_heads * head_dim)
            acc[:] = 0
            kv_len = np.int64(kv_lens[row])
            if kv_len == 0:
                continue
            num_used = (kv_len + page_size - 1) // page_size
            for j in range(num_used):
                num_tokens = min(page_size, kv_len - j * page_size)
                page = (layer_page + table[row * width + j]) * num_kv_heads * block
                coming = v_data + (layer_page + table[row * width]) * num_kv_heads * block
                if j + 1 < num_used:
                    coming = k_data + (layer_page + table[row * width + j + 1]) * num_kv_heads * block
                for k in range(num_kv_heads):
                    query = q_data + (row * num_kv_heads + k) * per_head
                    out = weights.ctypes.data + 4 * (k * group * stride + j * page_size)
                    for s in range(0, num_tokens - num_keys + 1, num_keys):
                        place = k * block + s * token_size
                        prefetch(coming + place, num_keys * token_size)
                        keys = k_data + page + place
                        scores(query, keys, out + 4 * s, stride, num_keys, itemsize, head_dim, group)
                    for s in range(num_tokens - num_tokens % num_keys, num_tokens):
                        keys = k_data + page + k * block + s * token_size
                        scores(query, keys, out + 4 * s, stride, 1, itemsize, head_dim, group)
            for m in range(num_heads):
                totals[m] = exponentiate(array(weights.ctypes.data + 4 * m * stride, np.float32, kv_len), kv_len)
            for j in range(num_used):
                num_tokens = min(page_size, kv_len - j * page_size)
                page = (layer_page + table[row * width + j]) * num_kv_heads * block
                coming = v_data + (layer_page + table[row * width + min(j + 1, num_used - 1)]) * num_kv_heads * block
                for k in range(num_kv_heads):
                    of_page = weights.ctypes.data + 4 * (k * group * stride + j * page_size)
                    sums = out_data + (row * num_kv_heads + k) * per_head
                    values = v_data + page + k * block
                    add_values(of_page, stride, values, num_tokens, coming + k * block, sums, itemsize, head_dim, group)
            for m in range(num_heads):
                for d in range(head_dim):
                    acc[m * head_dim + d] /= totals[m]

    return rows
