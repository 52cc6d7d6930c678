"""How does paged attention run on Hopper: one Mosaic GPU kernel for decode rows, one for prefill chunks.

Decode rows go through `mosaic_decode`, rows from `num_decode` on through `mosaic_prefill`; where that has no tile for a
group of query heads (`mosaic_prefill_plan.why_not`), through `xla` in the same call.
"""

import dataclasses
import functools
import math
import typing

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt16

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.paged_attention import mosaic_prefill_plan, xla
from pallas_kernels.paged_attention import mosaic_tiles as tiles
from pallas_kernels.paged_attention.arg_specs import Rows
from pallas_kernels.paged_attention.mosaic_decode import decode_attention
from pallas_kernels.paged_attention.mosaic_decode_plan import DecodeShape, decode_schedule
from pallas_kernels.paged_attention.mosaic_prefill import prefill_attention
from pallas_kernels.paged_attention.mosaic_prefill_plan import PrefillShape, prefill_schedule
from pallas_kernels.paged_attention.mosaic_tiles import Interpret


@dataclasses.dataclass(frozen=True)
class Config:
    """Key tokens in a block, blocks in flight, and CTAs, each of which has an SM to itself where blocks are this large.

    num_workers: of a decode CTA, each with `num_stages` blocks in flight; 1 to 3.
    `num_ctas` is the share of the SMs that attention takes, all if None: give the rest of them to a matmul.
    """

    block: int = 128
    num_stages: int = 3
    num_ctas: int | None = None
    num_workers: int = 1
    prefill_block: int = 128
    prefill_stages: int = 2

    def __post_init__(self) -> None:
        for name in ("block", "prefill_block"):
            size = getattr(self, name)
            if size <= 0 or size % tiles.HALF:
                raise ValueError(f"{name}={size} must be a positive multiple of {tiles.HALF}, the rows of one wgmma")
        for name in ("num_stages", "prefill_stages", "num_ctas"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name}={count} must be positive")
        if self.num_workers not in (1, 2, 3):
            raise ValueError(f"num_workers={self.num_workers} must be 1, 2 or 3")

    def decode_shape(self, q_shape, pages_shape, dtype, sm_scale: float) -> DecodeShape:
        """The decode kernel for q [T H h] and pages [L N K p h].

        Raises:
          ValueError: the block is no whole number of pages, or the stages need more shared memory than there is; or
            nobody says how many CTAs and the device does not either.
        """
        sizes = {"block": self.block, "num_stages": self.num_stages}
        kind = functools.partial(DecodeShape, num_workers=self.num_workers)
        return self._checked(kind, sizes, q_shape, pages_shape, dtype, sm_scale)

    def prefill_shape(self, q_shape, pages_shape, dtype, sm_scale: float) -> PrefillShape:
        """The prefill kernel for q [T H h] and pages [L N K p h].  Raises ValueError as `decode_shape` does."""
        sizes = {"prefill_block": self.prefill_block, "prefill_stages": self.prefill_stages}
        return self._checked(PrefillShape, sizes, q_shape, pages_shape, dtype, sm_scale)

    def _checked(self, kind, sizes, q_shape, pages_shape, dtype, sm_scale) -> typing.Any:
        _, num_heads, head_dim = q_shape
        _, _, num_kv_heads, page_size, _ = pages_shape
        (block_name, block), (stages_name, num_stages) = sizes.items()
        if block % page_size:
            raise ValueError(f"{block_name}={block} is no multiple of the page size {page_size}")
        group = num_heads // num_kv_heads
        scale = sm_scale * math.log2(math.e)
        num_ctas = num_multiprocessors() if self.num_ctas is None else self.num_ctas
        shape = kind(group, head_dim, page_size, num_kv_heads, block, num_stages, num_ctas, scale)
        if shape.smem_bytes(dtype) > tiles.SMEM_BYTES:
            raise ValueError(
                f"{stages_name}={num_stages} of {block_name}={block} need {shape.smem_bytes(dtype)} B of shared memory, "
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
    only: Rows | None = None,
    interpret: Interpret = None,
) -> Float[Array, "T H h"]:
    """Attention as `api.paged_attention` defines it.

    Indices are page numbers and places within a page, so that a cache may have more than 2**31 elements.

    Raises:
      ValueError: `config` does not fit the shapes, or `sm_scale` is negative.
      NotImplementedError: see `why_not`.
    """
    reason = why_not(q, k_pages, v_pages)
    if reason is not None:
        raise NotImplementedError(f"implementation='mosaic_gpu' {reason}")
    num_tokens = q.shape[0]
    rows = (kv_lens, page_indices)
    decoded = jnp.zeros((), q.dtype)
    if only != "prefill":
        decoded = decode_rows(
            q, k_pages, v_pages, layer, *rows, num_decode, sm_scale=sm_scale, config=config, interpret=interpret
        )
        decoded = jnp.pad(decoded, ((0, num_tokens - len(decoded)), (0, 0), (0, 0)))
    if only == "decode":
        return decoded
    if mosaic_prefill_plan.why_not(q.shape[1], k_pages.shape[2]) is None:
        rest = prefill_rows(
            q, k_pages, v_pages, layer, *rows, cu_q_lens, num_decode, sm_scale=sm_scale, config=config, interpret=interpret
        )  # fmt: skip
    else:  # without their tokens the decode rows are rows with nothing to do
        cu_of_rest, no_decode = jnp.maximum(cu_q_lens, num_decode), jnp.zeros_like(num_decode)
        rest = xla.paged_attention(q, k_pages, v_pages, layer, *rows, cu_of_rest, no_decode, sm_scale=sm_scale)
    token = jnp.arange(num_tokens)[:, None, None]
    return jnp.where(token < num_decode, decoded, jnp.where(token < cu_q_lens[-1], rest, 0))


def decode_rows(
    q: Float[Array, "T H h"],
    k_pages: Float[Array, "L N K p h"],
    v_pages: Float[Array, "L N K p h"],
    layer: int,
    kv_lens: Int32[Array, "R"],
    page_indices: Int32[Array, "R P"],
    num_decode: Int32[Array, ""],
    *,
    sm_scale: float,
    config: Config,
    interpret: Interpret = None,
) -> Float[Array, "rows H h"]:
    """Attention of the rows that can be decode rows, min(R, T) of them: row r has token r.  0 from `num_decode` on."""
    num_rows = min(q.shape[0], kv_lens.shape[0])
    shape = config.decode_shape(q.shape, k_pages.shape, q.dtype, sm_scale)
    schedule = decode_schedule(kv_lens[:num_rows], num_decode, shape.num_kv_heads, shape.block, shape.num_runs)
    cache = end_to_end(k_pages, v_pages, layer)
    return decode_attention(q[:num_rows], *cache, page_indices[:num_rows], schedule, shape, interpret=interpret)


def prefill_rows(
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
    config: Config,
    interpret: Interpret = None,
) -> Float[Array, "T H h"]:
    """Attention of the tokens of rows from `num_decode` on; anything for the other tokens."""
    shape = config.prefill_shape(q.shape, k_pages.shape, q.dtype, sm_scale)
    schedule = prefill_schedule(kv_lens, cu_q_lens, num_decode, shape.padded(q.shape[0]), shape.tokens)
    cache = end_to_end(k_pages, v_pages, layer)
    return prefill_attention(q, *cache, page_indices, schedule, shape, interpret=interpret)


def end_to_end(k_pages, v_pages, layer):
    """The pages of all layers end to end, and the layer's first one: a bitcast; to take one layer out would copy it."""
    num_layers, num_pages, *page = k_pages.shape
    flat = (num_layers * num_pages, *page)
    return k_pages.reshape(flat), v_pages.reshape(flat), layer * num_pages
