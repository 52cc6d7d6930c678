"""How do CTAs attend to decode rows as fast as memory gives keys and values?  What a worker does, and how parts are merged.

Each part of a pair that `mosaic_decode_plan` lists writes its weighted values and the logarithm of its sum, and a second
kernel merges the parts.  Nothing is atomic, so the same batch gives the same bits.

A block's scores are taken as keys x queries, [block G'], so that the few query heads of a KV head (G, padded to a
multiple of 8) fill the narrow side of wgmma: padding them to its 64 rows would cost 8 times the tensor core work and
make a small share of the SMs compute bound.
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
from pallas_kernels.paged_attention.mosaic_decode_plan import REDUCTION_BYTES, DecodeSchedule, DecodeShape
from pallas_kernels.paged_attention.mosaic_tiles import Interpret

CONSUMER, PRODUCER = 0, 1  # the warpgroups of a worker
# Three workers' 768 threads start with 80 registers each; those who fetch give half of theirs to those who attend.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 120, 40


def attend_parts(shape: DecodeShape, cta, refs, scratch, interpret: Interpret) -> None:
    """What CTA `cta` of `shape.num_ctas` does, with two warpgroups for each worker: fetch the blocks of its parts, attend to them.

    refs: those of `kernel_inputs` and `part_types`, in global memory.
    """
    warpgroup = lax.axis_index("warpgroup")
    worker = jnp.minimum(warpgroup // 2, shape.num_workers - 1)
    run = cta * shape.num_workers + worker
    role = jnp.where(warpgroup < 2 * shape.num_workers, lax.rem(warpgroup, 2), -1)

    is_crowded = shape.num_workers > 2 and interpret is None

    def fetch() -> None:
        if is_crowded:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _fetch(shape, worker, run, refs, scratch)

    def attend() -> None:
        if is_crowded:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        _attend(shape, worker, run, refs, scratch, interpret)

    def attend_from(nth: int) -> None:
        """Warps reduce where free shared memory begins, whoever they are: the code of each worker is compiled with more of it taken."""
        if nth + 1 < shape.num_workers:
            taken = plgpu.SMEM((REDUCTION_BYTES // 4,), jnp.int32)
            pl.run_scoped(lambda _: attend_from(nth + 1), taken, collective_axes="warpgroup")
        pl.when((role == CONSUMER) & (worker == nth))(attend)

    if interpret is None:
        attend_from(0)
    else:
        pl.when(role == CONSUMER)(attend)
    pl.when(role == PRODUCER)(fetch)


def _fetch(shape: DecodeShape, worker, run, refs, s) -> None:
    """The blocks of a run, each with its queries, as soon as its place in the worker's rings is free."""
    q, k_pages, v_pages, table, first_page_of_layer, parts, cu_parts_of_run, kv_lens, _, _ = refs
    first_of_layer, first_slot = first_page_of_layer[0], worker * shape.num_stages

    def part_body(part, step):
        row, kv_head, first_block, num_blocks = (parts[part, i] for i in range(4))
        pages_of_row = (kv_lens[row] + shape.page_size - 1) // shape.page_size
        query = q.at[row, kv_head]

        def block_body(i, step):
            slot = first_slot + lax.rem(step, jnp.int32(shape.num_stages))
            first_page = (first_block + i) * shape.pages_per_block
            num_pages = jnp.minimum(pages_of_row - first_page, shape.pages_per_block)
            page_ids = tiles.page_ids_of(table, row, first_page, num_pages, first_of_layer, shape.pages_per_block)
            for pages, ring, full, free in (
                (k_pages, s["k_smem"], s["k_full"], s["k_free"]),
                (v_pages, s["v_smem"], s["v_full"], s["v_free"]),
            ):

                @pl.when(step >= shape.num_stages)
                def wait(free=free):
                    plgpu.barrier_wait(free.at[slot])

                if pages is k_pages:  # the queries ride with each block of keys: no barriers of their own
                    plgpu.copy_gmem_to_smem(query, s["q_smem"].at[slot], full.at[slot])
                tiles.fetch_pages(pages, kv_head, page_ids, num_pages, ring.at[slot], full.at[slot])
            return step + 1

        return lax.fori_loop(0, num_blocks, block_body, step)

    step = lax.fori_loop(cu_parts_of_run[run], cu_parts_of_run[run + 1], part_body, jnp.int32(0))
    for slot in range(shape.num_stages):  # leave no phase unseen

        @pl.when(slot < step)
        def drain(slot=slot):
            plgpu.barrier_wait(s["k_free"].at[first_slot + slot])
            plgpu.barrier_wait(s["v_free"].at[first_slot + slot])


def _attend(shape: DecodeShape, worker, run, refs, s, interpret: Interpret) -> None:
    """Online softmax over the blocks of each part of a run."""
    _, _, _, _, _, parts, cu_parts_of_run, kv_lens, acc_out, lse_out = refs
    block, heads, first_slot = shape.block, shape.heads, worker * shape.num_stages
    weights_smem = s["p_smem"].at[worker]

    def part_body(part, step):
        row, first_block, num_blocks = (parts[part, i] for i in (0, 2, 3))
        kv_len = kv_lens[row]

        def block_body(i, state):
            step, peak, total, acc = state
            slot = first_slot + lax.rem(step, jnp.int32(shape.num_stages))
            num_valid = kv_len - (first_block + i) * block
            plgpu.barrier_wait(s["k_full"].at[slot])
            scores = tiles.matmul(s["k_smem"].at[slot], s["q_smem"].at[slot], interpret, transpose_b=True)
            plgpu.barrier_arrive(s["k_free"].at[slot])
            is_visible = tiles.iota((block, heads), 0, interpret) < num_valid
            scores = jnp.where(is_visible, scores * shape.scale, tiles.MASKED)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=0))
            old = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(scores - tiles.spread(new_peak, scores.shape, 1))
            total = total * tiles.spread(old, total.shape, 1) + weights
            tiles.store_transposed(weights_smem, weights.astype(weights_smem.dtype), interpret)
            plgpu.commit_smem()
            plgpu.barrier_wait(s["v_full"].at[slot])
            values = s["v_smem"].at[slot]

            @pl.when(num_valid < block)
            def clear():
                tiles.clear_beyond(values, num_valid, interpret, range(block))

            product = tiles.matmul(values, weights_smem, interpret, transpose_a=True, transpose_b=True)
            plgpu.barrier_arrive(s["v_free"].at[slot])
            return step + 1, new_peak, total, acc * tiles.spread(old, acc.shape, 1) + product

        column = jnp.full((heads,), tiles.MASKED, jnp.float32)
        if interpret is None:
            column = plgpu.layout_cast(column, plgpu.Layout.WGMMA.reduce(0))
        total, acc = (
            tiles.as_accumulator(jnp.zeros((m, heads), jnp.float32), interpret) for m in (block, shape.head_dim)
        )
        step, peak, total, acc = lax.fori_loop(0, num_blocks, block_body, (step, column, total, acc))
        total = jnp.sum(total, axis=0)
        acc_out[part] = acc / tiles.spread(total, acc.shape, 1)
        lse_out[part] = peak + jnp.log2(total)
        return step

    lax.fori_loop(cu_parts_of_run[run], cu_parts_of_run[run + 1], part_body, jnp.int32(0))


def _merge_body(shape: DecodeShape, interpret: Interpret, cu_parts, acc_in, lse_in, out) -> None:
    """CTA `pair`: the mean of its parts, weighted by their sums; zero if it has none."""
    pair = lax.axis_index("pair")
    heads, acc_shape = shape.heads, (shape.head_dim, shape.heads)

    def add(part, state):
        peak, total, acc = state
        lse = tiles.load(lse_in.at[part], plgpu.Layout.WGMMA.reduce(0), interpret)
        new = tiles.load(acc_in.at[part], plgpu.Layout.WGMMA, interpret)
        new_peak = jnp.maximum(peak, lse)
        old, weight = jnp.exp2(peak - new_peak), jnp.exp2(lse - new_peak)
        acc = acc * tiles.spread(old, acc_shape, 1) + new * tiles.spread(weight, acc_shape, 1)
        return new_peak, total * old + weight, acc

    peak, total = (jnp.full((heads,), x, jnp.float32) for x in (tiles.MASKED, 0))
    if interpret is None:
        peak, total = (plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(0)) for x in (peak, total))
    acc = tiles.as_accumulator(jnp.zeros(acc_shape, jnp.float32), interpret)
    _, total, acc = lax.fori_loop(cu_parts[pair], cu_parts[pair + 1], add, (peak, total, acc))
    out[pair] = (acc / tiles.spread(jnp.maximum(total, jnp.float32(1e-30)), acc_shape, 1)).astype(out.dtype)


def decode_attention(
    q: Float[Array, "R H h"],
    k_pages: Float[Array, "LN K p h"],
    v_pages: Float[Array, "LN K p h"],
    first_of_layer: int,
    page_indices: Int32[Array, "R P"],
    schedule: DecodeSchedule,
    shape: DecodeShape,
    *,
    interpret: Interpret = None,
) -> Float[Array, "R H h"]:
    """Attention of one query token in each row over the row's pages; 0 for rows that the schedule leaves out.

    Two kernels, `shape.num_ctas` CTAs and then one small CTA for each pair, and one pass over the queries; no nested
    jit, so that it may run on a stream of its own.  `first_of_layer` is the layer's first page in the flat page axis.
    """
    inputs = kernel_inputs(q, k_pages, v_pages, first_of_layer, page_indices, schedule, shape)
    num_parts = schedule.parts.shape[0]
    make = _parts_kernel if interpret is None else functools.partial(_make_parts_kernel, interpret=interpret)
    acc, lse = make(shape, num_parts, jnp.dtype(q.dtype))(*inputs)
    return merge_parts(acc, lse, q, schedule, shape, interpret)


def _make_parts_kernel(shape: DecodeShape, num_parts: int, dtype: jnp.dtype, interpret: Interpret) -> Callable:
    scratch = shape.scratch(dtype)

    def decode_attention_parts(*refs):
        inputs, buffers = refs[: -len(scratch)], refs[-len(scratch) :]
        names = dict(zip(scratch, buffers, strict=True))
        attend_parts(shape, lax.axis_index("cta"), inputs, names, interpret)

    return tiles.kernel(
        decode_attention_parts,
        interpret=interpret,
        out_type=part_types(shape, num_parts),
        scratch_types=list(scratch.values()),
        grid=(shape.num_ctas,),
        grid_names=("cta",),
        num_threads=2 * shape.num_workers,
        thread_name="warpgroup",
    )


def _make_merge_kernel(shape: DecodeShape, num_pairs: int, dtype: jnp.dtype, interpret: Interpret) -> Callable:
    def decode_attention_merge(*refs):
        _merge_body(shape, interpret, *refs)

    return tiles.kernel(
        decode_attention_merge,
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct((num_pairs, shape.head_dim, shape.heads), dtype),
        grid=(num_pairs,),
        grid_names=("pair",),
    )


@functools.cache
def _parts_kernel(shape: DecodeShape, num_parts: int, dtype: jnp.dtype) -> Callable:
    return inlined(_make_parts_kernel(shape, num_parts, dtype, None))


@functools.cache
def _merge_kernel(shape: DecodeShape, num_pairs: int, dtype: jnp.dtype) -> Callable:
    return inlined(_make_merge_kernel(shape, num_pairs, dtype, None))


def kernel_inputs(
    q: Float[Array, "R H h"],
    k_pages: Float[Array, "LN K p h"],
    v_pages: Float[Array, "LN K p h"],
    first_of_layer: int,
    page_indices: Int32[Array, "R P"],
    schedule: DecodeSchedule,
    shape: DecodeShape,
) -> tuple[Array, ...]:
    """What the first kernel reads: q [R K G' h], k_pages, v_pages, table, first page of the layer [1], the schedule's arrays.

    The layer is no part of the kernel, which is compiled once for all of them.
    """
    num_rows, _, head_dim = q.shape
    # A group's queries fill a tile of their own: Mosaic cannot tell whether a tile at any other row is aligned.
    queries = q.reshape(num_rows, shape.num_kv_heads, shape.group, head_dim)
    padding = [(0, 0, 0), (0, 0, 0), (0, shape.heads - shape.group, 0), (0, 0, 0)]
    queries = lax.pad(queries, jnp.zeros((), q.dtype), padding)
    first = lax.full((1,), first_of_layer, jnp.int32)
    return queries, k_pages, v_pages, page_indices, first, schedule.parts, schedule.cu_parts_of_run, schedule.kv_lens


def part_types(shape: DecodeShape, num_parts: int) -> list[jax.ShapeDtypeStruct]:
    """What the first kernel writes: acc [parts h G'] (divided by their sums of weights) and lse [parts G'] (base 2)."""
    return [
        jax.ShapeDtypeStruct((num_parts, shape.head_dim, shape.heads), jnp.float32),
        jax.ShapeDtypeStruct((num_parts, shape.heads), jnp.float32),
    ]


def merge_parts(
    acc: Float[Array, "parts h heads"],
    lse: Float[Array, "parts heads"],
    q: Float[Array, "R H h"],
    schedule: DecodeSchedule,
    shape: DecodeShape,
    interpret: Interpret,
) -> Float[Array, "R H h"]:
    """The second kernel, and its results in the order of `q`."""
    num_pairs = q.shape[0] * shape.num_kv_heads
    make = _merge_kernel if interpret is None else functools.partial(_make_merge_kernel, interpret=interpret)
    out = make(shape, num_pairs, jnp.dtype(q.dtype))(schedule.cu_parts_of_pair, acc, lse)
    out = lax.slice_in_dim(out, 0, shape.group, axis=2)
    return lax.transpose(out, (0, 2, 1)).reshape(q.shape)
