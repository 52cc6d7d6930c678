"""How does attention read pages in place on a CPU?

XLA for CPUs has no loop that reads a page where it lies: it gathers pages into a buffer first.  Here Python functions that
numba compiles to machine code do, as an FFI handler that shares its rows among the threads of XLA's pool.
"""

import math
import typing

import jax
import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array, Float, Int32, UInt16

from pallas_kernels.device import cpu_has_amx
from pallas_kernels.matmul.numba_tiles import configure, release_tiles
from pallas_kernels.numba_ffi import FRAME_SIZE, Describe, Work, array, attribute, buffer, register
from pallas_kernels.numba_memory import LANES, clear_rows
from pallas_kernels.numba_vectors16 import WIDTH
from pallas_kernels.paged_attention import numba_chunks
from pallas_kernels.paged_attention.numba_chunks import BLOCK, QUERY_PARTS, WEIGHT_PARTS, attend
from pallas_kernels.paged_attention.numba_vectors import MAX_SUMS, add_values, value_order
from pallas_kernels.paged_attention.numba_weights import NUM_KEYS, weigh_by_tiles, weigh_by_vectors


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
    """Attention as `api.paged_attention` defines it; products and sums in float32 (chunks of bfloat16: weights of 16 bits).

    Pages of uint16 or float32, for a CPU.  Where the matrix unit (AMX) takes the pages, it does chunks (`numba_chunks`), and
    the scores of single tokens in bfloat16 (`numba_weights`).  Else every token is a row of its own to the kernel: a token of a
    chunk reads the chunk's pages again, out of the cores' caches.  Either way a token's result depends on that token's row
    alone, to the last bit; the ways differ in the last bits.
    """
    del num_decode
    num_tokens, num_heads, head_dim = q.shape
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(cu_q_lens[1:], token, side="right", method="compare_all")
    row = jnp.minimum(row, kv_lens.shape[0] - 1)
    num_visible = jnp.where(token < cu_q_lens[-1], kv_lens[row] - cu_q_lens[row + 1] + token + 1, 0)
    is_in_chunk = cu_q_lens[row + 1] - cu_q_lens[row] >= numba_chunks.MIN_CHUNK
    page_size = k_pages.shape[3]
    has_unit = cpu_has_amx() and numba_chunks.why_not(k_pages.dtype.name, head_dim, page_size) is None
    query = q if q.dtype == jnp.bfloat16 else q.astype(jnp.float32)
    target = _target(k_pages.dtype.name, query.dtype.name, head_dim, num_heads // k_pages.shape[2], has_unit)
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(query.shape, query.dtype))
    rows = jnp.stack([num_visible, row, is_in_chunk.astype(jnp.int32)])
    out = call(query, k_pages, v_pages, rows, page_indices, layer=np.int64(layer), scale=np.float64(sm_scale))
    return out.astype(q.dtype)


def _target(dtype: str, query_dtype: str, head_dim: int, group: int, has_unit: bool) -> str:
    """Compiles the handler for pages and queries of these dtypes, `group` query heads for each KV head; returns its name for XLA.

    has_unit: chunks are for the matrix unit.
    """
    name = f"paged_attention_{dtype}_of_{query_dtype}_h{head_dim}_g{group}{'_amx' if has_unit else ''}"
    itemsizes = np.dtype(dtype).itemsize, jnp.dtype(query_dtype).itemsize

    def make(sources):
        return _make_describe(has_unit, sources), _make_work(*itemsizes, head_dim, group, has_unit, sources)

    return register(name, make, num_words=NUM_WORDS)


# Words of a job: addresses of the data, then sizes.
(
    Q, K_PAGES, V_PAGES, ROWS, TABLE, OUT, NUM_TOKENS, TABLE_WIDTH, NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, LAYER, SCALE,
    NUM_BLOCKS, NUM_WORDS,
) = range(15)  # fmt: skip


@typing.no_type_check
def _make_describe(has_unit, sources):
    """Reads what a call is about off its frame; items of work are blocks of chunks, for each KV head, then tokens."""

    @numba.cfunc(Describe, cache=True)
    @typing.no_type_check
    def describe(frame_at, job_at):
        frame, job = array(frame_at, np.int64, FRAME_SIZE), array(job_at, np.int64, NUM_WORDS + 0 * sources)
        for word, index in ((Q, 0), (K_PAGES, 1), (V_PAGES, 2), (ROWS, 3), (TABLE, 4)):
            job[word] = buffer(frame, False, index)[0]
        job[OUT], out_dims = buffer(frame, True, 0)
        cache_dims = array(buffer(frame, False, 1)[1], np.int64, 5)
        job[NUM_PAGES], job[NUM_KV_HEADS], job[PAGE_SIZE] = cache_dims[1], cache_dims[2], cache_dims[3]
        job[TABLE_WIDTH] = array(buffer(frame, False, 4)[1], np.int64, 2)[1]
        job[LAYER], job[SCALE] = attribute(frame, 0), attribute(frame, 1)  # SCALE: a float64's bits
        job[NUM_TOKENS] = array(out_dims, np.int64, 3)[0]
        num_blocks = (job[NUM_TOKENS] + BLOCK - 1) // BLOCK if has_unit else 0
        job[NUM_BLOCKS] = num_blocks * job[NUM_KV_HEADS]
        return job[NUM_BLOCKS] + job[NUM_TOKENS]

    return describe


@numba.njit(forceinline=True)
@typing.no_type_check
def _read(source, itemsize, values):
    """Elements of bfloat16 (2 bytes) or float32 (4) at an address, as float32."""
    if itemsize == 4:
        floats = array(source, np.float32, values.size)
        for i in range(values.size):
            values[i] = floats[i]
    else:
        bits, wide = array(source, np.uint16, values.size), values.view(np.uint32)
        for i in range(values.size):
            wide[i] = np.uint32(bits[i]) << np.uint32(16)


@numba.njit(forceinline=True)
@typing.no_type_check
def _write(values, target, itemsize):
    """Values of float32 to an address, as elements of bfloat16 (2 bytes), rounded to the nearest even, or float32 (4)."""
    if itemsize == 4:
        floats = array(target, np.float32, values.size)
        for i in range(values.size):
            floats[i] = values[i]
    else:
        bits, wide = array(target, np.uint16, values.size), values.view(np.uint32)
        for i in range(values.size):
            half = np.uint32(0x7FFF) + ((wide[i] >> np.uint32(16)) & np.uint32(1))
            bits[i] = (wide[i] + half) >> np.uint32(16)


@typing.no_type_check
def _make_work(itemsize, query_itemsize, head_dim, group, has_unit, sources):
    """The work: bytes per element of pages and of queries, `head_dim` and `group` are constants, other sizes come with the call."""
    num_keys = min(4, math.gcd(head_dim, LANES), 1 << (max(1, MAX_SUMS // group).bit_length() - 1))  # a power of 2
    by_unit = has_unit and query_itemsize == 2 and group <= WIDTH  # each token too, not chunks alone
    interval = 1 << (group - 1).bit_length()  # of the group's heads side by side
    taken, every = value_order(itemsize, head_dim)
    query_parts, weight_parts = QUERY_PARTS[query_itemsize], WEIGHT_PARTS[query_itemsize]

    @numba.cfunc(Work, error_model="numpy", cache=True)
    @typing.no_type_check
    def work(job_at, first, stop):
        job = array(job_at, np.int64, NUM_WORDS + 0 * sources)
        q_data, k_data, v_data, out_data = job[Q], job[K_PAGES], job[V_PAGES], job[OUT]
        num_pages, num_kv_heads, page_size, width = job[NUM_PAGES], job[NUM_KV_HEADS], job[PAGE_SIZE], job[TABLE_WIDTH]
        layer_page, num_rows = job[LAYER] * num_pages, job[NUM_TOKENS]
        kv_lens = array(job[ROWS], np.int32, num_rows)
        row_of = array(job[ROWS] + 4 * num_rows, np.int32, num_rows)
        is_in_chunk = array(job[ROWS] + 8 * num_rows, np.int32, num_rows)
        num_heads = num_kv_heads * group
        token_size = head_dim * itemsize  # bytes of one KV head of a token
        block = page_size * token_size  # of one KV head in a page
        page_bytes = num_kv_heads * block
        per_head = 4 * group * head_dim  # bytes of the sums of one KV head, in float32
        token_bytes = query_itemsize * num_heads * head_dim  # of a token's queries, and of its result
        scale = np.float32(array(job_at + 8 * SCALE, np.float64, 1)[0])
        if has_unit:
            for item in range(first, min(stop, job[NUM_BLOCKS])):
                k, token = item % num_kv_heads, item // num_kv_heads * BLOCK
                place = layer_page * page_bytes + k * block
                end = min(token + BLOCK, num_rows)
                while token < end:
                    later = token + 1
                    while later < end and row_of[later] == row_of[token] and kv_lens[later] > 0:
                        later += 1
                    if is_in_chunk[token] and kv_lens[token] > 0:
                        pages = array(job[TABLE] + 4 * width * row_of[token], np.int32, width)
                        shift = token * token_bytes + k * query_itemsize * group * head_dim
                        attend(pages, k_data + place, v_data + place, page_bytes, page_size, head_dim, group, scale,
                               q_data + shift, out_data + shift, token_bytes, later - token, np.int64(kv_lens[token]),
                               query_itemsize, query_parts, weight_parts)  # fmt: skip
                    token = later
        first, stop = max(first - job[NUM_BLOCKS], 0), stop - job[NUM_BLOCKS]
        while has_unit and first < stop and is_in_chunk[first] and kv_lens[first] > 0:  # done, with its block
            first += 1
        if first >= stop:
            return
        stride = np.int64(NUM_KEYS)  # tokens of the longest row, in whole blocks
        for row in range(first, stop):
            stride = max(stride, (np.int64(kv_lens[row]) + NUM_KEYS - 1) // NUM_KEYS * NUM_KEYS)
        num_weights = num_kv_heads * (interval if by_unit else group) * stride
        num_pairs = num_kv_heads * interval * head_dim // 2 if by_unit else 0
        buffer_ = np.empty(num_weights + num_pairs + 2 * WIDTH * (num_kv_heads + 1), np.float32)
        weights = (buffer_.ctypes.data + 63) // 64 * 64
        pairs = weights + 4 * num_weights
        lanes = pairs + 4 * num_pairs
        totals = np.empty(num_heads, np.float32)
        queries = np.empty(num_heads * head_dim, np.float32)
        sums, ordered = np.empty(num_heads * head_dim, np.float32), np.empty(num_heads * head_dim, np.float32)
        k_layer, v_layer = k_data + page_bytes * layer_page, v_data + page_bytes * layer_page
        if by_unit:
            configure(weights, NUM_KEYS, interval)
            clear_rows(pairs, 4 * num_pairs, 0, 1, 4 * num_pairs)
        for row in range(first, stop):
            if has_unit and is_in_chunk[row] and kv_lens[row] > 0:
                continue
            table = array(job[TABLE] + 4 * width * row_of[row], np.int32, width)
            result, kv_len = out_data + row * token_bytes, np.int64(kv_lens[row])
            for i in range(num_heads * head_dim):
                sums[i] = 0
            if kv_len == 0:
                _write(sums, result, query_itemsize)
                continue
            if by_unit:
                weigh_by_tiles(
                    table, kv_len, k_layer, v_layer, page_bytes, page_size, num_kv_heads,
                    q_data + row * token_bytes, stride, weights, totals, scale, pairs, lanes, head_dim, group, interval,
                )  # fmt: skip
                strides, head_weights = (np.int64(1), np.int64(interval)), interval * stride
            else:
                _read(q_data + row * token_bytes, query_itemsize, queries)
                for i in range(num_heads * head_dim):
                    queries[i] *= scale
                weigh_by_vectors(
                    table, kv_len, k_layer, v_layer, page_bytes, page_size, num_kv_heads,
                    queries.ctypes.data, stride, weights, totals, num_keys, itemsize, head_dim, group,
                )  # fmt: skip
                strides, head_weights = (stride, np.int64(1)), group * stride
            num_used = (kv_len + page_size - 1) // page_size
            for j in range(num_used):
                num_tokens = min(page_size, kv_len - j * page_size)
                page = v_layer + page_bytes * table[j]
                coming = v_layer + page_bytes * table[min(j + 1, num_used - 1)]
                for k in range(num_kv_heads):
                    of_page = weights + 4 * (k * head_weights + strides[1] * j * page_size)
                    values, to = page + k * block, sums.ctypes.data + k * per_head
                    add_values(of_page, strides, values, num_tokens, coming + k * block, to, itemsize, head_dim, group)
            for m in range(num_heads):
                for d in range(m * head_dim, (m + 1) * head_dim, taken * every):
                    for n in range(every):
                        for i in range(taken):
                            ordered[d + every * i + n] = sums[d + taken * n + i] / totals[m]
            _write(ordered, result, query_itemsize)
        if by_unit:
            release_tiles()
        buffer_[0] = 0  # numba frees an array after the last use of its name, whoever still uses its address

    return work
