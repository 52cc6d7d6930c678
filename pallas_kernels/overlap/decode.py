"""What does decode attention need beside a matrix product?  Its kernel's shape, inputs and schedule, for whichever form runs it."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.paged_attention import mosaic_gpu
from pallas_kernels.paged_attention.mosaic_decode import decode_attention
from pallas_kernels.paged_attention.mosaic_decode_plan import DecodeSchedule, DecodeShape, decode_schedule

BLOCK = 64  # keys: the rows of one wgmma
_schedule = jax.jit(decode_schedule, static_argnums=(2, 3, 4))  # traced once for all layers


@dataclasses.dataclass(frozen=True)
class Decode:
    """A call, ready to be put on CTAs.  `schedule` depends on lengths only, so XLA shares it among the layers of a step.

    inputs: as in `prepare`: q, k_pages, v_pages, page_indices.  XLA starts a stream's call right after the last of its operands is
      made, which for a view of the pages would be just before their next use, late: whoever is called makes the view.
    """

    shape: DecodeShape
    layer: int
    inputs: tuple[Array, ...]
    schedule: DecodeSchedule


def why_not(q, k_pages, v_pages) -> str | None:
    """What keeps the kernel from arrays of these shapes [R H h] and [L N K p h] and dtypes; None if nothing does."""
    reason = mosaic_gpu.why_not(q, k_pages, v_pages)
    if reason is None and BLOCK % k_pages.shape[3]:
        reason = f"takes blocks of {BLOCK} keys, no multiple of page size {k_pages.shape[3]}"
    return reason


def smem_bytes(q, k_pages, num_stages: int, num_workers: int = 1) -> int:
    """Shared memory of a CTA.  Raises ValueError where it is more than a CTA can have."""
    config = mosaic_gpu.Config(BLOCK, num_stages, num_ctas=1, num_workers=num_workers)
    return config.decode_shape(q.shape, k_pages.shape, q.dtype, sm_scale=1.0).smem_bytes(q.dtype)


def prepare(
    q: Float[Array, "R H h"],
    k_pages: Float[Array, "L N K p h"],
    v_pages: Float[Array, "L N K p h"],
    layer: int,
    kv_lens: Int32[Array, "R"],
    page_indices: Int32[Array, "R P"],
    num_decode: Int32[Array, ""],
    *,
    sm_scale: float,
    num_ctas: int,
    num_stages: int,
    num_workers: int = 1,
) -> Decode:
    """The call for `num_ctas` CTAs whose workers each have `num_stages` blocks of keys and values in flight."""
    config = mosaic_gpu.Config(BLOCK, num_stages, num_ctas, num_workers)
    shape = config.decode_shape(q.shape, k_pages.shape, q.dtype, sm_scale)
    schedule = _schedule(kv_lens, num_decode, shape.num_kv_heads, shape.block, shape.num_runs)
    return Decode(shape, layer, (q, k_pages, v_pages, page_indices), schedule)


def attend(call: Decode, inputs: tuple[Array, ...], schedule: DecodeSchedule, interpret: Any) -> Float[Array, "R H h"]:
    """Two kernels of its own: all CTAs, then the merge.  No nested jit: may run in a stream call."""
    q, k_pages, v_pages, page_indices = inputs
    k_pages, v_pages, first_page = mosaic_gpu.end_to_end(k_pages, v_pages, call.layer)
    return decode_attention(q, k_pages, v_pages, first_page, page_indices, schedule, call.shape, interpret=interpret)
