"""How does paged attention run on Hopper: Mosaic GPU kernels for decode rows, XLA's loop for prefill chunks.

Decode rows go through `mosaic_decode`.  There is no wgmma prefill kernel yet: rows from `num_decode` on, if any, go
through `xla` in the same call, and its loops take no iteration where a batch has none.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt16

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.paged_attention import mosaic_tiles as tiles
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.mosaic_decode import DecodeShape, decode_attention, decode_schedule
from pallas_kernels.paged_attention.mosaic_tiles import Interpret


@dataclasses.dataclass(frozen=True)
class Config:
    """Key tokens in a block, blocks in flight, and CTAs, each of which has an SM to itself where blocks are this large.

    `num_ctas` is the share of the SMs that decode attention takes, all if None: give the rest of them to a matmul.
    """

    block: int = 128
    num_stages: int = 3
    num_ctas: int | None = None

    def __post_init__(self) -> None:
        if self.block <= 0 or self.block % tiles.HALF:
            raise ValueError(f"block={self.block} must be a positive multiple of {tiles.HALF}, the rows of one wgmma")
        if self.num_stages < 1 or (self.num_ctas is not None and self.num_ctas < 1):
            raise ValueError(f"num_stages={self.num_stages} and num_ctas={self.num_ctas} must be positive")

    def decode_shape(self, q_shape, pages_shape, dtype, sm_scale: float) -> DecodeShape:
        """The decode kernel for q [T H h] and pages [L N K p h].

        Raises:
          ValueError: the block is no whole number of pages, or the stages need more shared memory than there is; or
            nobody says how many CTAs and the device does not either.
        """
        _, num_heads, head_dim = q_shape
        _, _, num_kv_heads, page_size, _ = pages_shape
        if self.block % page_size:
            raise ValueError(f"block={self.block} is no multiple of the page size {page_size}")
        group = num_heads // num_kv_heads
        scale = sm_scale * math.log2(math.e)
        num_ctas = num_multiprocessors() if self.num_ctas is None else self.num_ctas
        shape = DecodeShape(group, head_dim, page_size, num_kv_heads, self.block, self.num_stages, num_ctas, scale)
        if shape.smem_bytes(dtype) > tiles.SMEM_BYTES:
            raise ValueError(
                f"num_stages={self.num_stages} of block={self.block} need {shape.smem_bytes(dtype)} B of shared memory, "
                f"a CTA has {tiles.SMEM_BYTES}"
            )
        return shape


def why_not(q, k_pages, v_pages) -> str | None:
    """What keeps the kernels from arguments of these shapes and dtypes, None if nothing does."""
    dtypes = {x.dtype.name for x in (q, k_pages, v_pages)}
    head_dim, page_size = k_pages.shape[-1], k_pages.shape[-2]
    if dtypes not in ({"bfloat16"}, {"float16"}):
        return (
            f"multiplies bfloat16 or float16, one of them throughout, not {sorted(dtypes)}: "
            "wgmma rounds float32 to tf32, and pages of bits are for CPUs"
        )
    if head_dim not in (64, 128):
        return f"has tiles for head_dim 64 and 128, not {head_dim}"
    if page_size % tiles.SUBLANES:
        return f"copies whole tiles of {tiles.SUBLANES} tokens, which page size {page_size} is no multiple of"
    return None


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
    interpret: Interpret = None,
) -> Float[Array, "T H h"]:
    """Attention as `api.paged_attention` defines it.

    Indices are page numbers and places within a page, so that a cache may have more than 2**31 elements.

    Raises:
      ValueError: `config` does not fit the shapes.
      NotImplementedError: see `why_not`.
    """
    reason = why_not(q, k_pages, v_pages)
    if reason is not None:
        raise NotImplementedError(f"implementation='mosaic_gpu' {reason}")
    num_tokens = q.shape[0]
    num_layers, num_pages = k_pages.shape[:2]
    num_rows = min(num_tokens, kv_lens.shape[0])  # rows that can be decode rows: row r has token r
    shape = config.decode_shape(q.shape, k_pages.shape, q.dtype, sm_scale)
    schedule = decode_schedule(kv_lens[:num_rows], num_decode, shape.num_kv_heads, shape.block, shape.num_ctas)
    # All layers end to end is a bitcast; to take one layer out would copy it.
    flat = (num_layers * num_pages, *k_pages.shape[2:])
    decoded = decode_attention(
        q[:num_rows],
        k_pages.reshape(flat),
        v_pages.reshape(flat),
        layer * num_pages,
        page_indices[:num_rows],
        schedule,
        shape,
        interpret=interpret,
    )
    # Without their tokens the decode rows are rows with nothing to do.
    cu_q_lens = jnp.maximum(cu_q_lens, num_decode)
    no_decode = jnp.zeros_like(num_decode)
    rest = xla.paged_attention(
        q, k_pages, v_pages, layer, kv_lens, page_indices, cu_q_lens, no_decode, sm_scale=sm_scale
    )
    is_decode = (jnp.arange(num_rows) < num_decode)[:, None, None]
    first = jnp.where(is_decode, decoded, rest[:num_rows])
    return jax.lax.dynamic_update_slice_in_dim(rest, first, 0, 0)
