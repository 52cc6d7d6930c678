"""How does a given number of CTAs share the decode rows of a batch, each byte of keys and values read once?

The keys of all (row, KV head) pairs are cut into blocks and laid end to end; each worker takes an equal run of blocks
(flash decoding, stream-K).  Where a run ends inside a pair, the pair is split into parts, to be merged.  Who does what depends
on the lengths only: plain XLA computes it once for all layers.
"""

import dataclasses
import functools
import typing

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.paged_attention import mosaic_tiles as tiles

REDUCTION_BYTES = 2048  # of shared memory, in which Mosaic lets the warps of a warpgroup reduce


class DecodeSchedule(typing.NamedTuple):
    """Which blocks each worker attends to, and which parts make up each (row, KV head) pair.

    parts: [R*K + W, 4] int32, for each part its row, KV head, first block and number of blocks; parts of one worker, and
    parts of one pair, follow one another.  cu_parts_of_run: [W+1].  cu_parts_of_pair: [R*K+1].  kv_lens: [R].
    """

    parts: Int32[Array, "parts 4"]
    cu_parts_of_run: Int32[Array, "W+1"]
    cu_parts_of_pair: Int32[Array, "pairs+1"]
    kv_lens: Int32[Array, "R"]


def decode_schedule(
    kv_lens: Int32[Array, "R"], num_decode: Int32[Array, ""], num_kv_heads: int, block: int, num_runs: int
) -> DecodeSchedule:
    """Equal runs of blocks for all workers but the last ones; rows from `num_decode` on get none."""
    num_rows = kv_lens.shape[0]
    blocks = jnp.where(jnp.arange(num_rows) < num_decode, (kv_lens + block - 1) // block, 0)
    blocks = jnp.broadcast_to(blocks[:, None], (num_rows, num_kv_heads)).reshape(-1)  # of each pair
    end = jnp.cumsum(blocks)
    start = end - blocks
    length = jnp.maximum((end[-1] + num_runs - 1) // num_runs, 1)
    first_run = start // length
    num_parts = jnp.where(blocks > 0, (end - 1) // length - first_run + 1, 0)
    cu_parts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(num_parts)])

    part = jnp.arange(blocks.shape[0] + num_runs)
    pair = jnp.minimum(jnp.searchsorted(cu_parts[1:], part, side="right", method="scan_unrolled"), blocks.shape[0] - 1)
    run = first_run[pair] + part - cu_parts[pair]
    first = jnp.maximum(start[pair], run * length)
    last = jnp.minimum(end[pair], (run + 1) * length)
    parts = jnp.stack([pair // num_kv_heads, pair % num_kv_heads, first - start[pair], last - first], axis=1)

    run = jnp.where(part < cu_parts[-1], run, num_runs)
    cu_parts_of_run = jnp.searchsorted(run, jnp.arange(num_runs + 1), side="left", method="scan_unrolled")
    as_int32 = functools.partial(jnp.asarray, dtype=jnp.int32)
    return DecodeSchedule(as_int32(parts), as_int32(cu_parts_of_run), as_int32(cu_parts), as_int32(kv_lens))


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """What the kernels are compiled for.  `heads` is the padded G'; each worker has `num_stages` blocks in flight.

    A worker is two warpgroups, one that fetches and one that attends, with rings and a run of blocks of its own: one alone
    waits most of its time for its own last instruction.
    """

    group: int
    head_dim: int
    page_size: int
    num_kv_heads: int
    block: int
    num_stages: int
    num_ctas: int
    scale: float  # on the scores, times log2(e)
    num_workers: int = 1  # in a CTA

    @property
    def heads(self) -> int:
        """Query heads of a tile, G'."""
        return -(-self.group // tiles.SUBLANES) * tiles.SUBLANES

    @property
    def pages_per_block(self) -> int:
        """TMA copies for a block of keys."""
        return self.block // self.page_size

    @property
    def num_runs(self) -> int:
        """Workers of all CTAs: equal runs of blocks."""
        return self.num_ctas * self.num_workers

    @property
    def num_slots(self) -> int:
        """Places for blocks in a CTA: the rings of its workers, end to end."""
        return self.num_workers * self.num_stages

    def smem_bytes(self, dtype) -> int:
        """Shared memory of the buffers, with a kilobyte for barriers and 2 KB for each worker's warps to reduce in."""
        rows = self.num_slots * (self.heads + 2 * self.block)
        values = rows * self.head_dim + self.num_workers * self.heads * self.block
        return values * jnp.dtype(dtype).itemsize + 1024 + self.num_workers * REDUCTION_BYTES

    def scratch(self, dtype) -> dict:
        """Shared memory and barriers: for each worker rings of keys with their queries and of values, one block of weights."""
        ring = functools.partial(plgpu.Barrier, num_barriers=self.num_slots)
        return {
            "q_smem": tiles.operand((self.num_slots, self.heads, self.head_dim), dtype),
            "k_smem": tiles.operand((self.num_slots, self.block, self.head_dim), dtype),
            "v_smem": tiles.operand((self.num_slots, self.block, self.head_dim), dtype),
            "p_smem": tiles.operand((self.num_workers, self.heads, self.block), dtype),
            "k_full": ring(num_arrivals=self.pages_per_block + 1),
            "v_full": ring(num_arrivals=self.pages_per_block),
            "k_free": ring(num_arrivals=1),
            "v_free": ring(num_arrivals=1),
        }
