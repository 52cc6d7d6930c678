"""What does a program of the GPU do for paged attention?  The kernels, in Triton.

Programs share the items of a list that exists nowhere: each finds out from the rows' lengths which row an item belongs to,
and takes every n-th item.  So the grid may have any size, down to one program.  An item is

- for decode rows a *split* of a row's keys for one KV head, with the group's query heads as the rows of a tile,
- for prefill chunks a *tile* of queries for one KV head, each query with its group of query heads.

Letters as in `api.py`, and G query heads for each KV head; scores are in units of log2, so that exp2 serves.  Of the sizes of a
batch only a power of 2 of its rows is part of the code, so that the nano-batches of a step share it.
"""

import typing  # Triton reads the functions' source: checks of types at run time must leave them as they are

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
@typing.no_type_check
def _find(ends, item):
    """The row that an item belongs to and its number there; `ends` is the prefix sum of items of the rows."""
    row = tl.sum((ends <= item).to(tl.int32), 0)
    return row, item - tl.max(tl.where(ends <= item, ends, 0), 0)


@triton.jit
@typing.no_type_check
def _cut_into_splits(kv_lens, num_decode, R, ROWS: tl.constexpr, BLOCK: tl.constexpr, MIN_SPLIT: tl.constexpr,
                     EXTRA_SPLITS: tl.constexpr):  # fmt: skip
    """Tokens in a split, and the prefix sum of splits of the decode rows: at most R + EXTRA_SPLITS."""
    rows = tl.arange(0, ROWS)
    is_decode = rows < tl.minimum(tl.load(num_decode), R)
    lens = tl.load(kv_lens + rows, mask=is_decode, other=0)
    fair = tl.cdiv(tl.sum(lens, 0), EXTRA_SPLITS)
    split_len = tl.cdiv(tl.maximum(fair, MIN_SPLIT), BLOCK) * BLOCK
    return split_len, tl.cumsum(tl.cdiv(lens, split_len), 0)


@triton.jit
@typing.no_type_check
def _pages(table, start, stop, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The page of each token of a block; any for tokens from `stop` on."""
    tokens = start + tl.arange(0, BLOCK)
    return tl.load(table + tokens // PAGE, mask=tokens < stop, other=0)


@triton.jit
@typing.no_type_check
def _attend_to_block(query, peak, total, acc, k_pages, v_pages, page, first_page, head, start, stop, num_visible,
                     K: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr,
                     MASKED: tl.constexpr):  # fmt: skip
    """The state of online softmax after one more block of keys.

    query [M D]; peak, total [M]; acc [M D]; page [BLOCK]; tokens from `stop` on are not read, row m of the tile sees those
    below `num_visible[m]`.  Without MASKED, all of the block is read and seen.
    """
    tokens = start + tl.arange(0, BLOCK)
    # A cache can have more than 2**31 elements.
    offset = ((first_page + page) * K + head) * (PAGE * D) + (tokens % PAGE) * D
    at = offset[:, None] + tl.arange(0, D)[None, :]
    if MASKED:
        k = tl.load(k_pages + at, mask=(tokens < stop)[:, None], other=0)
        v = tl.load(v_pages + at, mask=(tokens < stop)[:, None], other=0)
    else:
        k = tl.load(k_pages + at)
        v = tl.load(v_pages + at)
    scores = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee") * SCALE
    if MASKED:
        scores = tl.where(tokens[None, :] < num_visible[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    old = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores - new_peak[:, None])
    total = total * old + tl.sum(weights, 1)
    acc = tl.dot(weights.to(query.dtype), v.to(query.dtype), acc * old[:, None], input_precision="ieee")
    return new_peak, total, acc


@triton.jit
@typing.no_type_check
def decode(q, k_pages, v_pages, kv_lens, page_indices, num_decode, partial, lse, layer, N, P, R,
           K: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
           TILE: tl.constexpr, BLOCK: tl.constexpr, MIN_SPLIT: tl.constexpr, EXTRA_SPLITS: tl.constexpr,
           SCALE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Attention of decode rows to each of their splits.

    partial [R+EXTRA_SPLITS H h] and lse [R+EXTRA_SPLITS H], both float32: weighted values, and log2 of the sum of weights.
    """
    split_len, ends = _cut_into_splits(kv_lens, num_decode, R, ROWS, BLOCK, MIN_SPLIT, EXTRA_SPLITS)
    g = tl.arange(0, TILE)
    d = tl.arange(0, D)
    first_page = layer.to(tl.int64) * N
    for item in range(tl.program_id(0), tl.max(ends, 0) * K, tl.num_programs(0)):
        split = item // K
        head = item % K
        row, nth = _find(ends, split)
        start = nth * split_len
        stop = tl.minimum(start + split_len, tl.load(kv_lens + row))
        at = g[:, None] * D + d[None, :]
        query = tl.load(q + (row.to(tl.int64) * K + head) * (G * D) + at, mask=(g < G)[:, None], other=0).to(DTYPE)
        peak = tl.full((TILE,), float("-inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        acc = tl.zeros((TILE, D), tl.float32)
        num_visible = stop + tl.zeros((TILE,), tl.int32)
        table = page_indices + row.to(tl.int64) * P
        page = _pages(table, start, stop, PAGE, BLOCK)
        for block in range(start, stop, BLOCK):
            next_page = _pages(table, block + BLOCK, stop, PAGE, BLOCK)  # a block ahead: nobody waits for it
            peak, total, acc = _attend_to_block(
                query, peak, total, acc, k_pages, v_pages, page, first_page, head, block, stop, num_visible,
                K, PAGE, D, BLOCK, SCALE, MASKED=True,
            )  # fmt: skip
            page = next_page
        first_head = (split.to(tl.int64) * K + head) * G
        tl.store(partial + first_head * D + at, acc / total[:, None], mask=(g < G)[:, None])
        tl.store(lse + first_head + g, peak + tl.log2(total), mask=g < G)


@triton.jit
@typing.no_type_check
def merge(kv_lens, cu_q_lens, num_decode, partial, lse, out, T, R,
          H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
          MIN_SPLIT: tl.constexpr, EXTRA_SPLITS: tl.constexpr):  # fmt: skip
    """Output of decode tokens from their splits, zeros for padding tokens; leaves out what prefill writes."""
    _, ends = _cut_into_splits(kv_lens, num_decode, R, ROWS, BLOCK, MIN_SPLIT, EXTRA_SPLITS)
    rows = tl.arange(0, ROWS)
    h = tl.arange(0, HEADS)
    zeros = tl.zeros((HEADS,), tl.int64)  # makes sums with it 64 bits wide
    d = tl.arange(0, D)
    num_rows = tl.load(num_decode)
    num_tokens = tl.load(cu_q_lens + R)
    for token in range(tl.program_id(0), T, tl.num_programs(0)):
        if (token < num_rows) | (token >= num_tokens):
            peak = tl.full((HEADS,), float("-inf"), tl.float32)
            total = tl.zeros((HEADS,), tl.float32)
            acc = tl.zeros((HEADS, D), tl.float32)
            if token < num_rows:
                first = tl.sum(tl.where(rows == token - 1, ends, 0), 0)
                for split in range(first, tl.sum(tl.where(rows == token, ends, 0), 0)):
                    head = (split + zeros) * H + h
                    size = tl.load(lse + head, mask=h < H, other=0)
                    values = tl.load(partial + head[:, None] * D + d[None, :], mask=(h < H)[:, None], other=0)
                    new_peak = tl.maximum(peak, size)
                    old = tl.exp2(peak - new_peak)
                    new = tl.exp2(size - new_peak)
                    total = total * old + new
                    acc = acc * old[:, None] + values * new[:, None]
                    peak = new_peak
            values = acc / tl.where(total > 0, total, 1)[:, None]
            head = (token + zeros) * H + h
            tl.store(out + head[:, None] * D + d[None, :], values.to(out.dtype.element_ty), mask=(h < H)[:, None])


@triton.jit
@typing.no_type_check
def prefill(q, k_pages, v_pages, kv_lens, page_indices, cu_q_lens, num_decode, before, out, layer, N, P, R,
            K: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
            TILE: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Output of the tokens of rows from `num_decode` on; `out` shares the memory of `before`, whose other tokens stay."""
    QUERIES: tl.constexpr = TILE // G
    rows = tl.arange(0, ROWS)
    is_prefill = (rows >= tl.load(num_decode)) & (rows < R)
    q_starts = tl.load(cu_q_lens + rows, mask=is_prefill, other=0)
    q_stops = tl.load(cu_q_lens + rows + 1, mask=is_prefill, other=0)
    ends = tl.cumsum(tl.cdiv(q_stops - q_starts, QUERIES), 0)
    m = tl.arange(0, TILE)
    d = tl.arange(0, D)
    first_page = layer.to(tl.int64) * N
    num_items = tl.max(ends, 0) * K
    for i in range(tl.program_id(0), num_items, tl.num_programs(0)):
        item = num_items - 1 - i  # the tiles at the ends of chunks take longest
        head = item % K
        row, nth = _find(ends, item // K)
        table = page_indices + row.to(tl.int64) * P
        q_start = tl.load(cu_q_lens + row)
        q_len = tl.load(cu_q_lens + row + 1) - q_start
        first = nth * QUERIES
        position = tl.load(kv_lens + row) - q_len + first  # of the tile's first query
        stop = position + tl.minimum(QUERIES, q_len - first)
        nth_query = m // G
        is_query = (nth_query < QUERIES) & (position + nth_query < stop)
        start_of_tile = ((q_start + first).to(tl.int64) * K + head) * (G * D)
        at = ((nth_query * K * G + m % G) * D)[:, None] + d[None, :]
        query = tl.load(q + start_of_tile + at, mask=is_query[:, None], other=0).to(DTYPE)
        peak = tl.full((TILE,), float("-inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        acc = tl.zeros((TILE, D), tl.float32)
        num_visible = position + nth_query + 1
        num_full = (position + 1) // BLOCK * BLOCK  # tokens in blocks that all queries see
        page = _pages(table, 0, stop, PAGE, BLOCK)
        for block in range(0, num_full, BLOCK):
            next_page = _pages(table, block + BLOCK, stop, PAGE, BLOCK)
            peak, total, acc = _attend_to_block(
                query, peak, total, acc, k_pages, v_pages, page, first_page, head, block, stop, num_visible,
                K, PAGE, D, BLOCK, SCALE, MASKED=False,
            )  # fmt: skip
            page = next_page
        for block in range(num_full, stop, BLOCK):
            next_page = _pages(table, block + BLOCK, stop, PAGE, BLOCK)
            peak, total, acc = _attend_to_block(
                query, peak, total, acc, k_pages, v_pages, page, first_page, head, block, stop, num_visible,
                K, PAGE, D, BLOCK, SCALE, MASKED=True,
            )  # fmt: skip
            page = next_page
        tl.store(out + start_of_tile + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_query[:, None])
