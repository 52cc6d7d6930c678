"""How does one token weigh the keys in its sight?  Scores, a softmax, and float32 weights of all heads.

By vectors, a few keys at a time; or by a CPU's matrix unit (AMX), whose left operand is 16 keys as they lie in a page, while the
right one is the queries of a KV head's group, one column each.  Then a group's weights lie side by side, key after key.  Either way
each next page of keys, at last the first page of values, is brought near meanwhile.
"""

import typing

import numba
import numba.extending
import numpy as np

from pallas_kernels.matmul.numba_tiles import BYTES, DEPTH, LEFT, RIGHT, ROWS, emit_tile
from pallas_kernels.numba_ffi import array
from pallas_kernels.numba_memory import prefetch
from pallas_kernels.numba_vectors16 import INT64, WIDTH, peak_row, weigh_row
from pallas_kernels.paged_attention.numba_vectors import exponentiate, scores

NUM_KEYS = ROWS
"""That the unit takes at a time."""


@numba.njit(error_model="numpy", forceinline=True)
@typing.no_type_check
def _keys_of_page(table, j, kv_len, k_data, v_data, page_bytes, page_size):
    """How many tokens page `j` of a sequence has, where its keys are, and what is read after it: the next keys, at last values."""
    num_tokens = min(page_size, kv_len - j * page_size)
    coming = v_data + page_bytes * table[0]
    if (j + 1) * page_size < kv_len:
        coming = k_data + page_bytes * table[j + 1]
    return num_tokens, k_data + page_bytes * table[j], coming


@numba.njit(error_model="numpy")
@typing.no_type_check
def weigh_by_vectors(
    table, kv_len, k_data, v_data, page_bytes, page_size, num_kv_heads, queries, stride, weights, totals,
    num_keys, itemsize, head_dim, group,
):  # fmt: skip
    """Writes exp(score - highest score) to `weights`, [head, `stride` keys], and each head's sum to `totals`; float32 both.

    table: pages of the sequence; page 0 has its keys at `k_data` and its values at `v_data`, the others lie `page_bytes` apart.
    queries: float32, scaled.
    num_keys: so many at a time; with what follows it a constant.
    """
    token_size = head_dim * itemsize
    block = page_size * token_size
    for j in range((kv_len + page_size - 1) // page_size):
        num_tokens, page, coming = _keys_of_page(table, j, kv_len, k_data, v_data, page_bytes, page_size)
        for k in range(num_kv_heads):
            query = queries + 4 * k * group * head_dim
            out = weights + 4 * (k * group * stride + j * page_size)
            for s in range(0, num_tokens - num_keys + 1, num_keys):
                place = k * block + s * token_size
                prefetch(coming + place, num_keys * token_size)
                scores(query, page + place, out + 4 * s, stride, num_keys, itemsize, head_dim, group)
            for s in range(num_tokens - num_tokens % num_keys, num_tokens):
                scores(query, page + k * block + s * token_size, out + 4 * s, stride, 1, itemsize, head_dim, group)
    for m in range(num_kv_heads * group):
        totals[m] = exponentiate(array(weights + 4 * m * stride, np.float32, kv_len), kv_len)


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def _score_keys(typing_context, keys, pairs, out, head_dim, interval):
    """out[s, g] = keys[s] . query[g] of 16 keys of bfloat16; `pairs`: two dimensions of each of `interval` queries, then two more.

    Addresses are int64, the others constants.
    """
    constants = head_dim, interval
    if not all(isinstance(number, numba.types.IntegerLiteral) for number in constants):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        keys, pairs, out = arguments[:3]
        size, step = (number.literal_value for number in constants)
        emit_tile(b, "tilezero", 0)
        for i in range(size // DEPTH):
            left, right = (
                b.inttoptr(b.add(at, INT64(n * i)), BYTES) for at, n in ((keys, 2 * DEPTH), (pairs, 2 * DEPTH * step))
            )
            emit_tile(b, "tileloadd64", LEFT[i % 2], left, INT64(2 * size))
            emit_tile(b, "tileloadd64", RIGHT, right, INT64(4 * step))
            emit_tile(b, "tdpbf16ps", 0, LEFT[i % 2], RIGHT)
        emit_tile(b, "tilestored64", 0, b.inttoptr(out, BYTES), INT64(4 * step))
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 3, *constants), generate


@numba.njit(error_model="numpy")
@typing.no_type_check
def weigh_by_tiles(
    table, kv_len, k_data, v_data, page_bytes, page_size, num_kv_heads, queries, stride, weights, totals,
    scale, pairs, lanes, head_dim, group, interval,
):  # fmt: skip
    """As `weigh_by_vectors`, with weights of [KV head, `stride` keys, `interval` >= group] and queries of bfloat16.

    scale: of scores, float32, positive.
    pairs, lanes: addresses of [KV head, head_dim / 2, `interval`] words, zero where no head is, and of 32 float32 per KV head.
    """
    words = head_dim // 2
    for k in range(num_kv_heads):
        source = array(queries + 4 * words * group * k, np.uint32, words * group)
        target = array(pairs + 4 * words * interval * k, np.uint32, words * interval)
        for g in range(group):
            for i in range(words):
                target[interval * i + g] = source[words * g + i]
    for j in range((kv_len + page_size - 1) // page_size):
        num_tokens, page, coming = _keys_of_page(table, j, kv_len, k_data, v_data, page_bytes, page_size)
        for k in range(num_kv_heads):
            for s in range(0, num_tokens, NUM_KEYS):
                place = 2 * head_dim * (page_size * k + s)
                prefetch(coming + place, NUM_KEYS * 2 * head_dim)
                out = weights + 4 * interval * (stride * k + page_size * j + s)
                _score_keys(page + place, pairs + 4 * words * interval * k, out, head_dim, interval)
    num_scores = interval * kv_len
    for k in range(num_kv_heads):  # of all at first: one peak alone would be waited for
        peak_row(weights + 4 * interval * stride * k, num_scores, lanes + 8 * WIDTH * k, interval)
    for k in range(num_kv_heads):
        own, peaks = weights + 4 * interval * stride * k, lanes + 8 * WIDTH * k
        sums = peaks + 4 * WIDTH
        weigh_row(own, num_scores, -(-num_scores // WIDTH), peaks, scale, own, 0, 0, sums, interval)
        for g in range(group):
            totals[group * k + g] = array(sums, np.float32, group)[g]
