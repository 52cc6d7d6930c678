"""How does plain XLA attend over pages at the cost of the pages in use, not of the page table?

Two loops whose trip counts depend on the data: decode rows are cut into blocks of keys, of which one iteration takes a
batch from any rows; prefill chunks are cut into tiles of queries, of which one iteration takes a few, each against its
blocks of keys one after another (online softmax).  Which blocks there are depends on the lengths and the page table
only, so XLA computes that once for all layers of a step.
"""

import dataclasses
import typing

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt16

MASKED = -1e30  # below each real score, yet finite: differences and exp stay free of NaN


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes: key tokens in a block, decode blocks in an iteration, query tokens in a tile, tiles in an iteration.

    Blocks are rounded up to whole pages.  Tiles of one iteration run side by side on the cores of a CPU.
    """

    block: int = 64
    decode_blocks: int = 32
    query_tile: int = 64
    query_tiles: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be positive")


class _Cache(typing.NamedTuple):
    """Where the blocks of all rows are: the pages of all layers end to end, and the step's page table cut into blocks.

    pages: keys and values, [L*N*K p*h] each.  first_page: of the layer, in units of pages.
    page_ids: [R blocks pages_per_block]; beyond a row's last page, that page again.
    value_dtype: what the pages hold.  dtype: what products are taken in.
    """

    pages: tuple[Array, Array]
    first_page: int
    page_ids: Array
    num_kv_heads: int
    page_size: int
    value_dtype: typing.Any
    dtype: typing.Any

    @property
    def block(self) -> int:
        return self.page_ids.shape[2] * self.page_size


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
    config: Config = Config(),
) -> Float[Array, "T H h"]:
    """Attention as `api.paged_attention` defines it.  Temporary memory: some blocks, copies of q and of the table."""
    num_tokens, _, head_dim = q.shape
    num_layers, num_pages, num_kv_heads, page_size, _ = k_pages.shape
    value_dtype = jnp.bfloat16 if k_pages.dtype == jnp.uint16 else k_pages.dtype
    # All layers end to end is a bitcast; to take one layer out would copy it.
    flat = (num_layers * num_pages * num_kv_heads, page_size * head_dim)
    cache = _Cache(
        pages=(k_pages.reshape(flat), v_pages.reshape(flat)),
        first_page=layer * num_pages,
        page_ids=_cut_into_blocks(page_indices, -(-kv_lens // page_size), -(-config.block // page_size)),
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        value_dtype=value_dtype,
        dtype=jnp.promote_types(q.dtype, value_dtype),
    )
    config = dataclasses.replace(config, query_tile=min(config.query_tile, num_tokens))
    # A tile may reach over the last token.
    queries = jnp.pad(q.reshape(num_tokens, num_kv_heads, -1, head_dim), ((0, config.query_tile), *((0, 0),) * 3))
    out = _decode(config, queries, cache, kv_lens, num_decode, sm_scale)
    out = _prefill(config, out, queries, cache, kv_lens, cu_q_lens, num_decode, sm_scale)
    return out[:num_tokens].reshape(q.shape).astype(q.dtype)


def _cut_into_blocks(page_indices, num_used, pages_per_block):
    """[R P] -> [R blocks pages_per_block]; entries beyond the pages in use repeat the last one, cheap to read again."""
    num_rows, width = page_indices.shape
    num_blocks = -(-width // pages_per_block)
    place = jnp.minimum(jnp.arange(num_blocks * pages_per_block), jnp.maximum(num_used[:, None] - 1, 0))
    return jnp.take_along_axis(page_indices, place, axis=1).reshape(num_rows, num_blocks, pages_per_block)


def _gather(cache, page_ids, num_valid, iteration):
    """Keys and values of blocks: page_ids [... pages_per_block], num_valid [...] -> two of [... K s h].

    Values beyond `num_valid` tokens become 0, because weight 0 times NaN is NaN.
    """
    # Tied to the iteration, or XLA moves work on the whole cache out of the loop; as integers, or XLA for CPUs reads
    # bfloat16 by way of float32.
    pages, _ = lax.optimization_barrier((cache.pages, iteration))
    integer = jnp.dtype(f"uint{8 * pages[0].dtype.itemsize}")
    heads = jnp.arange(cache.num_kv_heads, dtype=jnp.int32)[:, None]
    places = (page_ids[..., None, :] + cache.first_page) * cache.num_kv_heads + heads  # [... K pages_per_block]
    k, v = (lax.bitcast_convert_type(x, integer).at[places].get(mode="promise_in_bounds") for x in pages)
    head_dim = k.shape[-1] // cache.page_size
    first_token = jnp.arange(page_ids.shape[-1]) * cache.page_size
    num_values = (num_valid[..., None] - first_token)[..., None, :, None] * head_dim
    v = jnp.where(jnp.arange(v.shape[-1]) < num_values, v, jnp.zeros((), integer))
    shape = (*page_ids.shape[:-1], cache.num_kv_heads, cache.block, head_dim)
    k, v = (lax.bitcast_convert_type(x, cache.value_dtype).reshape(shape).astype(cache.dtype) for x in (k, v))
    return k, v


def _dot(subscripts, a, b, dtype):
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)


def _decode(config, queries, cache, kv_lens, num_decode, sm_scale):
    """Output of the first `num_decode` tokens, 0 for the others: float32 [T+tile K G h]."""
    num_rows, blocks_per_row, _ = cache.page_ids.shape
    capacity = min(num_rows, queries.shape[0] - config.query_tile)
    step = min(config.decode_blocks, capacity * blocks_per_row)
    # The work list: one item for each block in use, row after row.
    kv_lens = jnp.where(jnp.arange(num_rows) < num_decode, kv_lens, 0)
    num_blocks = -(-kv_lens // cache.block)
    cu_blocks = jnp.cumsum(num_blocks)
    item = jnp.arange(-(-capacity * blocks_per_row // step) * step)
    rows = jnp.searchsorted(cu_blocks, item, side="right", method="scan_unrolled").astype(jnp.int32)
    safe_rows = jnp.minimum(rows, capacity - 1)  # items beyond the last one have row num_rows
    blocks = jnp.where(rows < num_rows, item - (cu_blocks - num_blocks)[safe_rows], 0)
    num_valid = jnp.where(rows < num_rows, kv_lens[safe_rows] - blocks * cache.block, 0)
    page_ids = cache.page_ids[safe_rows, blocks]
    query_of_row = queries[:capacity]

    def body(i, state):
        peak, total, acc = state
        row, safe_row, valid, ids = (
            lax.dynamic_slice_in_dim(x, i * step, step) for x in (rows, safe_rows, num_valid, page_ids)
        )
        k, v = _gather(cache, ids, valid, i)
        scores = _dot("ckgh,cksh->ckgs", query_of_row[safe_row], k, cache.dtype) * sm_scale
        is_visible = jnp.arange(cache.block) < valid[:, None]
        scores = jnp.where(is_visible[:, None, None, :], scores, MASKED)
        block_peak = scores.max(-1)
        weights = jnp.exp(scores - block_peak[..., None])
        block_acc = _dot("ckgs,cksh->ckgh", weights, v, cache.dtype)
        # Blocks of one row may be anywhere in the batch: a product with the membership matrix adds them up.
        is_member = jnp.arange(capacity)[:, None] == row  # [rows blocks]
        new_peak = jnp.maximum(peak, jnp.where(is_member[:, :, None, None], block_peak, MASKED).max(1))
        old, new = jnp.exp(peak - new_peak), jnp.exp(block_peak - new_peak[safe_row])
        total = total * old + _dot("rc,ckg->rkg", is_member, weights.sum(-1) * new, jnp.float32)
        acc = acc * old[..., None] + _dot("rc,ckgh->rkgh", is_member, block_acc * new[..., None], jnp.float32)
        return new_peak, total, acc

    acc = jnp.zeros(query_of_row.shape, jnp.float32)
    state = (acc[..., 0] + MASKED, acc[..., 0], acc)
    _, total, acc = lax.fori_loop(0, -(-cu_blocks[-1] // step), body, state)
    out = acc / jnp.maximum(total, 1)[..., None]  # the peak alone adds 1, so only rows without work change
    return jnp.pad(out, ((0, queries.shape[0] - capacity), *((0, 0),) * 3))


def _prefill(config, out, queries, cache, kv_lens, cu_q_lens, num_decode, sm_scale):
    """`out` with the tokens of rows `num_decode` and up filled in."""
    num_rows = kv_lens.shape[0]
    tile, num_lanes = config.query_tile, config.query_tiles
    q_lens = jnp.where(jnp.arange(num_rows) >= num_decode, jnp.diff(cu_q_lens), 0)
    num_tiles = -(-q_lens // tile)
    cu_tiles = jnp.cumsum(num_tiles)

    def attend_to_tile(t):
        row = jnp.minimum(jnp.sum(cu_tiles <= t), num_rows - 1)
        first = jnp.where(t < cu_tiles[-1], (t - cu_tiles[row] + num_tiles[row]) * tile, q_lens[row])  # in the chunk
        num_queries = jnp.minimum(q_lens[row] - first, tile)
        start = cu_q_lens[row] + first
        # Positions of the tile's queries; those beyond the chunk see what its last query sees.
        last = kv_lens[row] - q_lens[row] + first + num_queries - 1
        position = jnp.minimum(last, last - num_queries + 1 + jnp.arange(tile))
        query = lax.dynamic_slice_in_dim(queries, start, tile).transpose(1, 2, 0, 3)  # [K G t h]
        folded = (query.shape[0], -1, query.shape[3])

        def body(b, state):
            peak, total, acc = state
            k, v = _gather(cache, cache.page_ids[row, b], kv_lens[row] - b * cache.block, b)
            scores = _dot("kqh,ksh->kqs", query.reshape(folded), k, cache.dtype).reshape(*peak.shape, -1) * sm_scale
            is_visible = b * cache.block + jnp.arange(cache.block) <= position[:, None]
            scores = jnp.where(is_visible, scores, MASKED)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.exp(scores - new_peak[..., None])
            old = jnp.exp(peak - new_peak)
            block_acc = _dot("kqs,ksh->kqh", weights.reshape(*folded[:2], cache.block), v, cache.dtype)
            return new_peak, total * old + weights.sum(-1), acc * old[..., None] + block_acc.reshape(acc.shape)

        acc = jnp.zeros(query.shape, jnp.float32)
        num_blocks = jnp.where(num_queries > 0, last // cache.block + 1, 0)
        _, total, acc = lax.fori_loop(0, num_blocks, body, (acc[..., 0] + MASKED, acc[..., 0], acc))
        tile_out = (acc / jnp.maximum(total, 1)[..., None]).transpose(2, 0, 1, 3)
        return start, num_queries, tile_out

    def body(i, out):
        # Independent until they are written, so that they can run at the same time.
        for start, num_queries, tile_out in [attend_to_tile(i * num_lanes + lane) for lane in range(num_lanes)]:
            is_query = (jnp.arange(tile) < num_queries)[:, None, None, None]
            tile_out = jnp.where(is_query, tile_out, lax.dynamic_slice_in_dim(out, start, tile))
            out = lax.dynamic_update_slice_in_dim(out, tile_out, start, 0)
        return out

    return lax.fori_loop(0, -(-cu_tiles[-1] // num_lanes), body, out)
