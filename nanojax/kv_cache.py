"""Which page holds which tokens?  The paged KV cache: its arrays, its free list, and who owns what.

Pages are handed out from a stack (`free[:num_free]`) and counted (`ref_count`), so that requests can share a prefix.
Every function is pure; the engine donates its state, so on the device all updates happen in place.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from nanojax.array_types import Array, Bool, Float, Int32, UInt16
from nanojax.config import EngineConfig, ModelConfig
from nanojax.control import skip_unless


@flax.struct.dataclass
class KVPages:
    """Keys and values of all layers, by page.  `p` tokens of one KV head are contiguous.

    uint16 pages hold the bits of bfloat16 values: XLA's CPU backend before jax 0.11 updates a bfloat16 array by way of a
    float32 copy of all of it, integers in place.
    """

    k: Float[Array, "L N K p h"] | UInt16[Array, "L N K p h"]
    v: Float[Array, "L N K p h"] | UInt16[Array, "L N K p h"]

    @property
    def value_dtype(self) -> jnp.dtype:
        """What the stored values are: bfloat16 for uint16 pages."""
        return jnp.dtype(jnp.bfloat16) if self.k.dtype == jnp.uint16 else self.k.dtype


@flax.struct.dataclass
class PagePool:
    """Who owns each page: slot `s` holds `page_indices[s, :num_pages[s]]`, in token order."""

    page_indices: Int32[Array, "S P"]
    num_pages: Int32[Array, "S"]
    free: Int32[Array, "N"]
    num_free: Int32[Array, ""]
    ref_count: Int32[Array, "N"]


def init_pages(config: EngineConfig, model: ModelConfig, dtype=jnp.float32) -> KVPages:
    """Zeroed pages; `2 * L * N * K * p * h` values."""
    shape = (model.num_layers, config.num_pages, model.num_kv_heads, config.page_size, model.head_dim)
    return KVPages(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def init_pool(config: EngineConfig) -> PagePool:
    """All pages free."""
    return PagePool(
        page_indices=jnp.zeros((config.num_slots, config.pages_per_slot), jnp.int32),
        num_pages=jnp.zeros((config.num_slots,), jnp.int32),
        free=jnp.arange(config.num_pages, dtype=jnp.int32),
        num_free=jnp.int32(config.num_pages),
        ref_count=jnp.zeros((config.num_pages,), jnp.int32),
    )


def pages_for(num_tokens: Int32[Array, "*s"], page_size: int) -> Int32[Array, "*s"]:
    """Pages that hold `num_tokens` tokens: the ceiling of the quotient."""
    return (num_tokens + (page_size - 1)) // page_size


def grow(pool: PagePool, new_pages: Int32[Array, "S"], max_new_pages: int) -> PagePool:
    """Gives slot `s` `new_pages[s]` more pages.

    The caller guarantees `sum(new_pages) <= min(num_free, max_new_pages)` and that no row of the table overflows.
    """
    num_slots, num_pages = pool.num_pages.shape[0], pool.free.shape[0]
    before = jnp.cumsum(new_pages) - new_pages
    total = before[-1] + new_pages[-1]
    nth = jnp.arange(min(max_new_pages, num_pages), dtype=jnp.int32)
    slot = jnp.repeat(jnp.arange(num_slots, dtype=jnp.int32), new_pages, total_repeat_length=nth.shape[0])
    slot = jnp.where(nth < total, slot, num_slots)  # past the last row: dropped below
    column = pool.num_pages[slot] + nth - before[slot]
    page = pool.free[jnp.maximum(pool.num_free - 1 - nth, 0)]
    return PagePool(
        page_indices=pool.page_indices.at[slot, column].set(page, mode="drop"),
        num_pages=pool.num_pages + new_pages,
        free=pool.free,
        num_free=pool.num_free - total,
        ref_count=pool.ref_count.at[jnp.where(nth < total, page, num_pages)].set(1, mode="drop"),
    )


def share(pool: PagePool, source: Int32[Array, ""], target: Int32[Array, ""], count: Int32[Array, ""]) -> PagePool:
    """Makes the first `count` pages of slot `source` also the first pages of slot `target`, which must hold none."""
    column = jnp.arange(pool.page_indices.shape[1])
    pages = pool.page_indices[source]
    shared = jnp.where(column < count, pages, pool.free.shape[0])
    return dataclasses.replace(
        pool,
        page_indices=pool.page_indices.at[target].set(jnp.where(column < count, pages, pool.page_indices[target])),
        num_pages=pool.num_pages.at[target].set(count),
        ref_count=pool.ref_count.at[shared].add(1, mode="drop"),
    )


def release(pool: PagePool, mask: Bool[Array, "S"]) -> PagePool:
    """Takes all pages from the masked slots; a page that nobody holds any more is free again."""
    return skip_unless(jnp.any(mask), lambda: _release(pool, mask), lambda: pool)


def _release(pool: PagePool, mask: Bool[Array, "S"]) -> PagePool:
    num_pages = pool.free.shape[0]
    held = jnp.arange(pool.page_indices.shape[1])[None, :] < pool.num_pages[:, None]
    given = jnp.where(held & mask[:, None], pool.page_indices, num_pages)
    ref_count = pool.ref_count.at[given].add(-1, mode="drop")
    freed = (pool.ref_count > 0) & (ref_count == 0)
    place = jnp.where(freed, pool.num_free + jnp.cumsum(freed) - 1, num_pages)
    return PagePool(
        page_indices=pool.page_indices,
        num_pages=jnp.where(mask, 0, pool.num_pages),
        free=pool.free.at[place].set(jnp.arange(num_pages, dtype=jnp.int32), mode="drop"),
        num_free=pool.num_free + jnp.sum(freed, dtype=jnp.int32),
        ref_count=ref_count,
    )


def write(
    kv: KVPages,
    layer: int,
    k: Float[Array, "t K h"],
    v: Float[Array, "t K h"],
    page: Int32[Array, "t"],
    offset: Int32[Array, "t"],
) -> KVPages:
    """Stores one layer's keys and values of `t` tokens; tokens whose `page` is `N` are dropped."""

    def put(pages: Array, values: Float[Array, "t K h"]) -> Array:
        values = jax.lax.bitcast_convert_type(values.astype(kv.value_dtype), pages.dtype)
        return pages.at[layer, page, :, offset].set(values, mode="drop", unique_indices=True)

    return KVPages(k=put(kv.k, k), v=put(kv.v, v))
