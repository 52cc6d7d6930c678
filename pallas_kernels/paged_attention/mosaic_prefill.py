"""How do prefill chunks of any length attend over pages as fast as the tensor cores multiply?

CTAs go through the tiles of queries that `mosaic_prefill_plan` lists.  In each CTA one warpgroup fetches queries and
pages by TMA, two multiply (wgmma) and keep scores, weights and results in registers.  The two take turns, as in
FlashAttention-3 (arXiv 2407.08608, section 3.1): one's softmax runs under the other's products.  Each output is written
by one CTA and nothing is atomic, so the same batch gives the same bits.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.inlined import inlined
from pallas_kernels.paged_attention import mosaic_tiles as tiles
from pallas_kernels.paged_attention.mosaic_prefill_plan import (
    NUM_CONSUMERS,
    QUERY_SLOTS,
    PrefillSchedule,
    PrefillShape,
    item_of,
    num_items_of,
)
from pallas_kernels.paged_attention.mosaic_tiles import HALF, Interpret

# Of 65,536 registers for 3 x 128 threads, most go to those who hold scores and results.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40


def attend_tiles(shape: PrefillShape, cta, refs, scratch, interpret: Interpret) -> None:
    """What CTA `cta` of `shape.num_ctas` does, with three warpgroups: its share of the tiles, one after another.

    refs: q [T H h] with T as `shape.padded` has it, k_pages, v_pages [L*N K p h], table [R P], the layer's first page
    [1], the schedule's arrays, and the result [T H h], of which the tiles' tokens are written; all in global memory.
    """
    *inputs, listed, num_tiles, out = refs
    warpgroup = lax.axis_index("warpgroup")

    def item(i):
        """The fields of the tile that is the CTA's i-th one, and its KV head."""
        nth = item_of(i, cta, shape.num_ctas)
        row, eighth, first, last, to_position, kv_len = (listed[nth // shape.num_kv_heads, x] for x in range(6))
        # As a product it is known to be a multiple of 8.
        return (row, eighth * tiles.SUBLANES, first, last, to_position, kv_len), lax.rem(nth, shape.num_kv_heads)

    num_items = num_items_of(cta, shape.num_ctas, num_tiles[0] * shape.num_kv_heads)

    @pl.when(warpgroup == NUM_CONSUMERS)
    def produce():
        if interpret is None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _fetch_tiles(shape, item, num_items, inputs, scratch)

    @pl.when(warpgroup < NUM_CONSUMERS)
    def consume():
        if interpret is None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        _attend_to_tiles(shape, warpgroup, item, num_items, out, scratch, interpret)


def _fetch_tiles(shape: PrefillShape, item, num_items, inputs, s) -> None:
    """Queries of each tile, then its blocks of keys and values, as soon as their places in shared memory are free."""
    q, k_pages, v_pages, table, first_page_of_layer = inputs
    first_of_layer = first_page_of_layer[0]

    def tile_body(i, step):
        (row, token, _, last, to_position, kv_len), kv_head = item(i)
        query_slot = lax.rem(i, QUERY_SLOTS)

        @pl.when(i >= QUERY_SLOTS)
        def wait():
            plgpu.barrier_wait(s["q_free"].at[query_slot])

        for consumer in range(NUM_CONSUMERS):
            for first_row, head, first_token, n in shape.pieces(consumer):
                plgpu.copy_gmem_to_smem(
                    q.at[pl.ds(token + first_token, n), kv_head * shape.group + head],
                    s["q_smem"].at[query_slot, consumer, pl.ds(first_row, n)],
                    s["q_full"].at[query_slot],
                )
        pages_of_row = (kv_len + shape.page_size - 1) // shape.page_size

        def block_body(b, step):
            slot = lax.rem(step, shape.num_stages)
            first_page = b * shape.pages_per_block
            num_pages = jnp.minimum(pages_of_row - first_page, shape.pages_per_block)
            page_ids = tiles.page_ids_of(table, row, first_page, num_pages, first_of_layer, shape.pages_per_block)
            for pages, name in ((k_pages, "k"), (v_pages, "v")):

                @pl.when(step >= shape.num_stages)
                def wait(name=name):
                    plgpu.barrier_wait(s[f"{name}_free"].at[slot])

                ring, full = s[f"{name}_smem"].at[slot], s[f"{name}_full"].at[slot]
                tiles.fetch_pages(pages, kv_head, page_ids, num_pages, ring, full)
            return step + 1

        return lax.fori_loop(0, shape.num_blocks(last + to_position), block_body, step)

    step = lax.fori_loop(0, num_items, tile_body, jnp.int32(0))
    for num_slots, done, names in ((QUERY_SLOTS, num_items, "q"), (shape.num_stages, step, "kv")):
        for slot in range(num_slots):  # leave no phase unseen

            @pl.when(slot < done)
            def drain(slot=slot, names=names):
                for name in names:
                    plgpu.barrier_wait(s[f"{name}_free"].at[slot])


def _attend_to_tiles(shape: PrefillShape, warpgroup, item, num_items, out, s, interpret: Interpret) -> None:
    """A consumer's half of each tile, by online softmax over the blocks of keys, in turn with the other consumer."""
    block = shape.block

    def next_turn():
        """Both consumers pass together, but consumer 1 is half a block behind: it has passed once more."""
        plgpu.barrier_arrive(s["turn"])
        plgpu.barrier_wait(s["turn"])

    def tile_body(i, step):
        (_, token, first, last, to_position, kv_len), kv_head = item(i)
        query_slot = lax.rem(i, QUERY_SLOTS)
        query = s["q_smem"].at[query_slot, warpgroup]
        plgpu.barrier_wait(s["q_full"].at[query_slot])
        nth_row = tiles.iota_of_rows(HALF, interpret) + warpgroup * HALF
        last_visible = to_position + token + lax.rem(nth_row, shape.tokens)

        def block_body(b, state, *, is_masked):
            step, peak, total, acc = state
            slot = lax.rem(step, shape.num_stages)
            keys, values = s["k_smem"].at[slot], s["v_smem"].at[slot]
            plgpu.barrier_wait(s["k_full"].at[slot])
            if is_masked:
                num_valid = kv_len - b * block
                plgpu.barrier_wait(s["v_full"].at[slot])

                @pl.when((warpgroup == 0) & (num_valid < block))
                def clear():  # for both: consumer 1 multiplies by the values after consumer 0 has passed its turn on
                    tiles.clear_beyond(values, num_valid, interpret, range(block))

            scores = tiles.matmul(query, keys, interpret, transpose_b=True, meanwhile=next_turn)
            plgpu.barrier_arrive(s["k_free"].at[slot])
            if is_masked:
                key = b * block + tiles.iota(scores.shape, 1, interpret)
                scores = jnp.where(key <= tiles.spread(last_visible, scores.shape, 0), scores, tiles.MASKED)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=1) * shape.scale)
            old = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(scores * shape.scale - tiles.spread(new_peak, scores.shape, 0))
            total = total * old + jnp.sum(weights, axis=1)
            acc = acc * tiles.spread(old, acc.shape, 0)
            if not is_masked:
                plgpu.barrier_wait(s["v_full"].at[slot])
            next_turn()
            acc = tiles.matmul(weights.astype(values.dtype), values, interpret, acc=acc)
            plgpu.barrier_arrive(s["v_free"].at[slot])
            return step + 1, new_peak, total, acc

        whole, masked = (functools.partial(block_body, is_masked=x) for x in (False, True))
        peak, total = (tiles.row_accumulator(HALF, x, interpret) for x in (tiles.MASKED, 0.0))
        acc = tiles.as_accumulator(jnp.zeros((HALF, shape.head_dim), jnp.float32), interpret)
        num_whole = (to_position + first + 1) // block  # blocks that all rows see all of
        state = lax.fori_loop(0, num_whole, whole, (step, peak, total, acc))
        # Copies of the last tile's results, long since under way; the tile after this one needs their place.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(i > 0)
        def free():
            plgpu.barrier_arrive(s["q_free"].at[1 - query_slot])

        step, _, total, acc = lax.fori_loop(num_whole, shape.num_blocks(last + to_position), masked, state)
        result = (acc * tiles.spread(1 / total, acc.shape, 0)).astype(out.dtype)
        _store(shape, warpgroup, result, query, s["rows_smem"].at[warpgroup], out, (token, first, last, kv_head))
        return step

    pl.when(warpgroup == 1)(next_turn)
    lax.fori_loop(0, num_items, tile_body, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)

    @pl.when(num_items > 0)
    def free():
        plgpu.barrier_arrive(s["q_free"].at[lax.rem(num_items - 1, QUERY_SLOTS)])

    pl.when(warpgroup == 0)(next_turn)


def _store(shape: PrefillShape, warpgroup, result, query, rows, out, place) -> None:
    """Start copies of a consumer's results: a whole tile goes where its queries were and out in pieces, else by rows."""
    token, first, last, kv_head = place
    is_whole = (token == first) & (token + shape.tokens == last)

    @pl.when(is_whole)
    def stage_tile():
        query[...] = result

    @pl.when(~is_whole)
    def stage_rows():
        rows[...] = result

    plgpu.commit_smem()
    for consumer in range(NUM_CONSUMERS):
        for first_row, head, first_token, n in shape.pieces(consumer):
            out_head, start = kv_head * shape.group + head, token + first_token

            @pl.when((warpgroup == consumer) & is_whole)
            def copy_piece(first_row=first_row, n=n, out_head=out_head, start=start):
                plgpu.copy_smem_to_gmem(query.at[pl.ds(first_row, n)], out.at[pl.ds(start, n), out_head])

            @pl.when((warpgroup == consumer) & ~is_whole)
            def copy_rows(first_row=first_row, n=n, out_head=out_head, start=start):
                @pl.loop(jnp.maximum(first, start), jnp.minimum(last, start + n))
                def copy_row(i):
                    # A matrix of one row: jax 0.11 finds no layout for memory that vectors are copied from.
                    row = rows.at[pl.ds(first_row + i - start, 1)]
                    plgpu.copy_smem_to_gmem(row, out.at[pl.ds(i, 1), out_head])


def prefill_attention(
    q: Float[Array, "T H h"],
    k_pages: Float[Array, "LN K p h"],
    v_pages: Float[Array, "LN K p h"],
    first_of_layer: int,
    page_indices: Int32[Array, "R P"],
    schedule: PrefillSchedule,
    shape: PrefillShape,
    *,
    interpret: Interpret = None,
) -> Float[Array, "T H h"]:
    """Attention of the schedule's tokens over their rows' pages; anything for the other tokens.

    One kernel of `shape.num_ctas` CTAs; no nested jit, so that it may run on a stream of its own.  `first_of_layer` is
    the layer's first page in the flat page axis.
    """
    num_tokens = q.shape[0]
    if shape.padded(num_tokens) != num_tokens:
        padding = (0, shape.padded(num_tokens) - num_tokens, 0)
        q = lax.pad(q, jnp.zeros((), q.dtype), [padding, (0, 0, 0), (0, 0, 0)])
    make = _kernel if interpret is None else functools.partial(_make_kernel, interpret=interpret)
    first = lax.full((1,), first_of_layer, jnp.int32)
    out = make(shape, q.shape, jnp.dtype(q.dtype))(q, k_pages, v_pages, page_indices, first, *schedule)
    return out[:num_tokens]


def _make_kernel(
    shape: PrefillShape, q_shape: tuple[int, ...], dtype: jnp.dtype, interpret: Interpret
) -> Callable[..., Array]:
    scratch = shape.scratch(dtype)

    def prefill_attention_tiles(*refs):
        inputs, buffers = refs[: -len(scratch)], refs[-len(scratch) :]
        names = dict(zip(scratch, buffers, strict=True))
        attend_tiles(shape, lax.axis_index("cta"), inputs, names, interpret)

    return tiles.kernel(
        prefill_attention_tiles,
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct(q_shape, dtype),
        scratch_types=list(scratch.values()),
        grid=(shape.num_ctas,),
        grid_names=("cta",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
    )


@functools.cache
def _kernel(shape: PrefillShape, q_shape: tuple[int, ...], dtype: jnp.dtype) -> Callable[..., Array]:
    """Compiled once for all layers."""
    return inlined(_make_kernel(shape, q_shape, dtype, None))
