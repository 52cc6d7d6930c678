"""How does a CPU's matrix unit (AMX) attend from the tokens of a prefill chunk?  A block of tokens and one KV head at a time.

The keys in sight are turned into pairs of dimensions, the values into pairs of tokens, as the unit wants its right operands, once for
the block; then 32 tokens of a query head at a time take all their scores, a softmax a row, and the sums of values.  The unit
multiplies bfloat16, which keys and values are; queries of float32 and weights are sums of parts in bfloat16, so that little is lost.
"""

import typing

import numba
import numpy as np

from pallas_kernels.matmul.numba_bfloat16 import pack_pair
from pallas_kernels.matmul.numba_float32 import turn_square
from pallas_kernels.matmul.numba_tiles import DEPTH, ROWS, configure, release_tiles, tiles
from pallas_kernels.matmul.packed import PANEL
from pallas_kernels.numba_ffi import array
from pallas_kernels.numba_vectors16 import WIDTH, peak_row, scale_row, split_row, weigh_row

BLOCK = 128
"""Tokens that share packed keys and values."""
MIN_CHUNK = 2
"""Tokens of a row from which on it is worth the packing."""
QUERY_PARTS, WEIGHT_PARTS = {2: 1, 4: 3}, {2: 2, 4: 3}
"""Numbers in bfloat16 that add up to a query's element, and to a weight, by the bytes of a query's element."""


def why_not(dtype: str, head_dim: int, page_size: int) -> str | None:
    """What keeps chunks from the unit, which the CPU is taken to have; None if nothing does."""
    if dtype != "uint16":
        return f"pages are {dtype}, not bfloat16's bits in uint16"
    if head_dim % (2 * PANEL):
        return f"head_dim={head_dim} is no multiple of {2 * PANEL}"
    return f"page_size={page_size} is no multiple of {ROWS}" if page_size % ROWS else None


@numba.njit(error_model="numpy")
@typing.no_type_check
def _pack(table, k_data, v_data, page_bytes, page_size, head_dim, num_keys, num_panels, nothing, keys, values):
    """Keys and values of a KV head, which page 0 has at `k_data` and `v_data`.  `nothing`: zeros, for what is not in sight."""
    token_bytes = 2 * head_dim
    for s in range(0, num_panels * PANEL, ROWS):
        place, source, row_bytes = np.int64(0), nothing, np.int64(0)
        if s < num_keys:
            place = np.int64(table[s // page_size]) * page_bytes + s % page_size * token_bytes
            source, row_bytes = k_data + place, token_bytes
        target = keys + 2 * PANEL * head_dim * (s // PANEL) + 4 * (s % PANEL)
        for d in range(0, head_dim, DEPTH):
            turn_square(source + 2 * d, row_bytes, target + 2 * PANEL * d, 4)
        for i in range(s, s + ROWS, 2):
            one = v_data + place + (i - s) * token_bytes if i < num_keys else nothing
            two = v_data + place + (i + 1 - s) * token_bytes if i + 1 < num_keys else nothing
            for d in range(0, head_dim, PANEL):
                pack_pair(one + 2 * d, two + 2 * d, values + 2 * PANEL * (d * num_panels + i))


@numba.njit(error_model="numpy", forceinline=True)
@typing.no_type_check
def _product(left, left_stride, num_parts, part, panel, panel_bytes, num_panels, num_steps, out, out_stride, num_rows):
    """Up to 32 rows, as sums of `num_parts` (a constant) numbers `part` bytes apart, times panels of 32 columns."""
    no, nothing = (0, 0), (0, 0, 0)
    for p in range(0, num_panels, 2):
        right = panel + panel_bytes * p, panel_bytes
        for row in range(0, num_rows, ROWS):
            rows, to = (
                (left + left_stride * row, left_stride, 0),
                (out + out_stride * row + 4 * PANEL * p, out_stride, 0),
            )
            operands = rows, right, num_steps, to, nothing, 0, no, part, no, -1, (0, 0, 0, 0), 0
            if p + 1 < num_panels:
                tiles(operands, 1, 2, num_parts, 0, 0)
            else:
                tiles(operands, 1, 1, num_parts, 0, 0)


@numba.njit(error_model="numpy", forceinline=True)
@typing.no_type_check
def _copy(source, target, num_words):
    """Words of 8 bytes."""
    values, copies = array(source, np.int64, num_words), array(target, np.int64, num_words)
    for i in range(num_words):
        copies[i] = values[i]


@numba.njit(error_model="numpy")
@typing.no_type_check
def attend(
    table, k_data, v_data, page_bytes, page_size, head_dim, group, scale, queries, out, token_bytes, num_tokens, num_visible,
    itemsize, query_parts, weight_parts,
):  # fmt: skip
    """`num_tokens` tokens, of which the first sees `num_visible` keys and each one more than the one before.

    table: pages of the sequence; `page_bytes` of each, in which page 0 has the KV head at `k_data` and `v_data`.
    scale: factor on the scores, float32, positive.
    queries, out: addresses of the first token's first of the `group` heads, `token_bytes` from token to token.
    itemsize: bytes of a query's element: 2, bfloat16, or 4, float32; with its `QUERY_PARTS` and `WEIGHT_PARTS` a constant.
    """
    num_keys = num_visible + num_tokens - 1
    num_panels = (num_keys + PANEL - 1) // PANEL
    packed_bytes = num_panels * 2 * PANEL * head_dim
    score_stride, weight_stride = 4 * (num_panels * PANEL + WIDTH), 2 * PANEL * (num_panels + 1)  # whole lines
    query_bytes, weight_bytes = 2 * ROWS * 2 * head_dim, 2 * ROWS * weight_stride  # of a part
    sizes = 2 * packed_bytes + query_parts * query_bytes + weight_parts * weight_bytes + 2 * ROWS * score_stride
    buffer_ = np.empty(sizes + 2 * ROWS * 4 * head_dim + 4 * head_dim + 64, np.uint8)
    keys = (buffer_.ctypes.data + 63) // 64 * 64
    values = keys + packed_bytes
    parts = values + packed_bytes  # of queries
    weights = parts + query_parts * query_bytes
    scores = weights + weight_parts * weight_bytes
    sums = scores + 2 * ROWS * score_stride
    nothing = sums + 2 * ROWS * 4 * head_dim
    zeros = array(nothing, np.float32, head_dim)
    for d in range(head_dim):
        zeros[d] = 0
    _pack(table, k_data, v_data, page_bytes, page_size, head_dim, num_keys, num_panels, nothing, keys, values)
    configure(scores, ROWS, PANEL // 2)
    peaks, totals = np.empty(2 * ROWS * WIDTH, np.float32), np.empty(2 * ROWS * WIDTH, np.float32)
    for token in range(0, num_tokens, 2 * ROWS):
        count = min(2 * ROWS, num_tokens - token)
        used = (num_visible + token + count + PANEL - 2) // PANEL  # panels in sight of these tokens
        for head in range(group):
            first = token_bytes * token + itemsize * head_dim * head
            for i in range(count):
                source, to = queries + first + token_bytes * i, parts + 2 * head_dim * i
                if itemsize == 2:
                    _copy(source, to, head_dim // 4)
                else:
                    split_row(source, to, head_dim // WIDTH, query_bytes, query_parts)
            _product(
                parts, 2 * head_dim, query_parts, query_bytes, keys, 2 * PANEL * head_dim, used, head_dim // DEPTH, scores,
                score_stride, count,
            )  # fmt: skip
            for i in range(count):  # of all rows at first: one peak alone would be waited for
                peak_row(scores + score_stride * i, num_visible + token + i, peaks.ctypes.data + 4 * WIDTH * i, 1)
            for i in range(count):
                row, to = scores + score_stride * i, weights + weight_stride * i
                seen, vectors, lanes = num_visible + token + i, used * (PANEL // WIDTH), 4 * WIDTH * i
                peak, total = peaks.ctypes.data + lanes, totals.ctypes.data + lanes
                weigh_row(row, seen, vectors, peak, scale, to, weight_bytes, weight_parts, total, 1)
            _product(
                weights, weight_stride, weight_parts, weight_bytes, values, 2 * PANEL * PANEL * num_panels, head_dim // PANEL,
                used, sums, 4 * head_dim, count,
            )  # fmt: skip
            for i in range(count):
                share, to = np.float32(1) / totals[WIDTH * i], out + first + token_bytes * i
                scale_row(sums + 4 * head_dim * i, share, to, head_dim // WIDTH, itemsize)
    release_tiles()
    buffer_[0] = 0  # numba frees an array after the last use of its name, whoever still uses its address
