"""How does plain XLA attend over pages at the cost of the pages in use, not of the page table?"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

MASKED = -1e30  # a finite score that no key can reach: max, exp and subtraction stay free of NaN


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes in tokens (blocks are rounded up to whole pages) and how many decode blocks one iteration takes."""

    decode_block: int = 64
    decode_blocks_per_step: int = 32
    query_tile: int = 64
    prefill_block: int = 128

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be positive")


def paged_attention(
    q: Float[Array, "T H h"],
    k_pages: Float[Array, "L N K p h"],
    v_pages: Float[Array, "L N K p h"],
    layer: int,
    kv_lens: Int32[Array, "R"],
    page_indices: Int32[Array, "R P"],
    cu_q_lens: Int32[Array, "R+1"],
    num_decode: Int32[Array, ""],
    *,
    sm_scale: float,
    config: Config = Config(),
) -> Float[Array, "T H h"]:
    """Attention as `api.paged_attention` defines it, in two loops over the blocks in use."""
    num_tokens, num_heads, head_dim = q.shape
    num_layers, num_pages, num_kv_heads, page_size, _ = k_pages.shape
    # Pages of all layers end to end is a bitcast; taking one layer out would copy it.
    flat = (num_layers * num_pages * num_kv_heads, page_size * head_dim)
    pages = (k_pages.reshape(flat), v_pages.reshape(flat))
    queries = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, -1, head_dim) * sm_scale
    table = page_indices + layer * num_pages
    num_pages_used = -(-kv_lens // page_size)
    out = jnp.zeros((num_tokens + config.query_tile, *queries.shape[1:]), jnp.float32)
    out = _decode(config, out, queries, pages, kv_lens, num_pages_used, table, num_decode, page_size)
    out = _prefill(config, out, queries, pages, kv_lens, num_pages_used, table, cu_q_lens, num_decode, page_size)
    return out[:num_tokens].reshape(q.shape).astype(q.dtype)


def _gather(pages, page_ids, num_kv_heads, page_size, iteration):
    """Pages [(L N K) (p h)] at page_ids [... b] -> float32 [... K b*p h]."""
    # Tied to the iteration, or XLA hoists a float32 copy of the whole cache out of the loop.
    pages, _ = lax.optimization_barrier((pages, iteration))
    rows = page_ids[..., None, :] * num_kv_heads + jnp.arange(num_kv_heads, dtype=jnp.int32)[:, None]
    blocks = pages.at[rows].get(mode="promise_in_bounds").astype(jnp.float32)
    return blocks.reshape(*page_ids.shape[:-1], num_kv_heads, page_ids.shape[-1] * page_size, -1)


def _decode(config, out, queries, pages, kv_lens, num_pages_used, table, num_decode, page_size):
    _, num_kv_heads, group, head_dim = queries.shape
    capacity = min(table.shape[0], queries.shape[0])
    pages_per_block = -(-config.decode_block // page_size)
    block = pages_per_block * page_size
    kv_lens = jnp.where(jnp.arange(capacity) < num_decode, kv_lens[:capacity], 0)
    cu_blocks = jnp.cumsum(-(-kv_lens // block))
    queries = queries[:capacity]

    def body(i, state):
        peak, total, acc = state
        item = i * config.decode_blocks_per_step + jnp.arange(config.decode_blocks_per_step)
        row = jnp.minimum(jnp.sum(cu_blocks <= item[:, None], axis=1), capacity - 1)
        is_item = item < cu_blocks[-1]
        first = (item - jnp.where(row > 0, cu_blocks[row - 1], 0)) * pages_per_block
        page = first[:, None] + jnp.arange(pages_per_block)
        page_ids = table[row[:, None], jnp.clip(page, 0, num_pages_used[row, None] - 1)]
        k, v = (_gather(x, page_ids, num_kv_heads, page_size, i) for x in pages)
        position = first[:, None] * page_size + jnp.arange(block)
        is_visible = (position < kv_lens[row, None]) & is_item[:, None]  # [C s]
        scores = jnp.einsum("cksh,ckgh->cksg", k, queries[row])
        scores = jnp.where(is_visible[:, None, :, None], scores, MASKED)
        item_peak = scores.max(2)
        onehot = (jnp.arange(capacity)[:, None] == row) & is_item
        new_peak = jnp.maximum(peak, jnp.where(onehot[:, :, None, None], item_peak, MASKED).max(1))
        weights = jnp.exp(scores - new_peak[row][:, :, None])
        weights = jnp.where(is_visible[:, None, :, None], weights, 0)
        v = jnp.where(is_visible[:, None, :, None], v, 0)
        alpha = jnp.exp(peak - new_peak)
        item_acc = jnp.einsum("cksg,cksh->ckgh", weights, v)
        onehot = onehot.astype(jnp.float32)
        total = total * alpha + jnp.einsum("rc,ckg->rkg", onehot, weights.sum(2))
        acc = acc * alpha[..., None] + jnp.einsum("rc,ckgh->rkgh", onehot, item_acc)
        return new_peak, total, acc

    zeros = jnp.zeros(queries.shape, jnp.float32)
    state = (zeros[..., 0] + MASKED, zeros[..., 0], zeros)
    _, total, acc = lax.fori_loop(0, -(-cu_blocks[-1] // config.decode_blocks_per_step), body, state)
    return lax.dynamic_update_slice(out, acc / jnp.maximum(total, 1e-37)[..., None], (0, 0, 0, 0))


def _prefill(config, out, queries, pages, kv_lens, num_pages_used, table, cu_q_lens, num_decode, page_size):
    _, num_kv_heads, group, head_dim = queries.shape
    num_rows = table.shape[0]
    tile = config.query_tile
    pages_per_block = -(-config.prefill_block // page_size)
    block = pages_per_block * page_size
    queries = jnp.pad(queries, ((0, tile), (0, 0), (0, 0), (0, 0)))
    q_lens = jnp.where(jnp.arange(num_rows) >= num_decode, jnp.diff(cu_q_lens), 0)
    cu_tiles = jnp.cumsum(-(-q_lens // tile))

    def tile_body(t, out):
        row = jnp.minimum(jnp.sum(cu_tiles <= t), num_rows - 1)
        first_q = (t - jnp.where(row > 0, cu_tiles[row - 1], 0)) * tile  # within the row
        start = cu_q_lens[row] + first_q
        position = kv_lens[row] - q_lens[row] + first_q + jnp.arange(tile)
        position = jnp.minimum(position, kv_lens[row] - 1)
        tile_q = lax.dynamic_slice_in_dim(queries, start, tile).transpose(1, 2, 0, 3)  # [K G t h]
        tile_q = tile_q.reshape(num_kv_heads, group * tile, head_dim)

        def block_body(b, state):
            peak, total, acc = state
            page = jnp.minimum(b * pages_per_block + jnp.arange(pages_per_block), num_pages_used[row] - 1)
            k, v = (_gather(x, table[row, page], num_kv_heads, page_size, b) for x in pages)
            kv_position = b * block + jnp.arange(block)
            v = jnp.where((kv_position < kv_lens[row])[:, None], v, 0)
            is_visible = jnp.tile(kv_position <= position[:, None], (group, 1))  # [G*t s]
            scores = jnp.einsum("kqh,ksh->kqs", tile_q, k)
            scores = jnp.where(is_visible, scores, MASKED)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.where(is_visible, jnp.exp(scores - new_peak[..., None]), 0)
            alpha = jnp.exp(peak - new_peak)
            total = total * alpha + weights.sum(-1)
            acc = acc * alpha[..., None] + jnp.einsum("kqs,ksh->kqh", weights, v)
            return new_peak, total, acc

        zeros = jnp.zeros(tile_q.shape, jnp.float32)
        num_blocks = position[-1] // block + 1
        _, total, acc = lax.fori_loop(0, num_blocks, block_body, (zeros[..., 0] + MASKED, zeros[..., 0], zeros))
        tile_out = (acc / total[..., None]).reshape(num_kv_heads, group, tile, head_dim).transpose(2, 0, 1, 3)
        is_query = first_q + jnp.arange(tile) < q_lens[row]
        old = lax.dynamic_slice_in_dim(out, start, tile)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(is_query[:, None, None, None], tile_out, old), start, 0)

    return lax.fori_loop(0, cu_tiles[-1], tile_body, out)
