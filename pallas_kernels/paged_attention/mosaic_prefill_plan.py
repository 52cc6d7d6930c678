"""What are the tiles that the queries of prefill chunks are cut into, and who takes which?

A tile is a run of a chunk's query tokens for one KV head, with the group's query heads packed one below the other, so
that a page is read once for all of them:

    rows of a tile, G = 3, 40 tokens:  | head 0, tokens 0..39 | head 1 | head 2 | 8 unused |
    warpgroup, 64 rows each:           |          0          |            1           |

Which tiles there are depends on the lengths only: plain XLA lists them once for all layers, the ones with most keys first,
and CTAs take them to and fro, so that a CTA gets long ones and short ones.
"""

import dataclasses
import functools
import typing

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.paged_attention import mosaic_tiles as tiles
from pallas_kernels.paged_attention.mosaic_tiles import HALF

NUM_CONSUMERS = 2  # warpgroups 0 and 1; the one after them fetches
ROWS = NUM_CONSUMERS * HALF  # of a tile
QUERY_SLOTS = 2


class PrefillSchedule(typing.NamedTuple):
    """The tiles of a batch, those with most keys first.

    tiles: int32, for each tile its row, an eighth of the token in its first row (TMA copies tiles of 8 tokens, so there
    may be tokens of another row before its own), its own first token and the one after its last, the distance from a
    token's place in the batch to its position, and the row's keys.  num_tiles: [1], how many of them there are.
    """

    tiles: Int32[Array, "tiles 6"]
    num_tiles: Int32[Array, "1"]


class Piece(typing.NamedTuple):
    """Rows of a warpgroup's half of a tile that hold consecutive tokens of one query head of the group."""

    first_row: int
    head: int
    first_token: int
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """What the kernel is compiled for: `num_stages` blocks of `block` keys in flight in each of `num_ctas` CTAs."""

    group: int
    head_dim: int
    page_size: int
    num_kv_heads: int
    block: int
    num_stages: int
    num_ctas: int
    scale: float  # on the scores, times log2(e)

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"scale={self.scale} must not be negative: the peaks are taken of the scores before it")

    @property
    def tokens(self) -> int:
        """Query tokens of a tile: a multiple of 8, so that each head starts a new row of a tiled buffer."""
        return ROWS // self.group // tiles.SUBLANES * tiles.SUBLANES

    def padded(self, num_tokens: int) -> int:
        """Tokens that the kernel's queries and results have room for: whole eighths, and a tile at least."""
        return max(-(-num_tokens // tiles.SUBLANES) * tiles.SUBLANES, self.tokens)

    @property
    def pages_per_block(self) -> int:
        """TMA copies for a block of keys."""
        return self.block // self.page_size

    def num_blocks(self, num_keys):
        """Blocks with at least one of the first keys of a row."""
        return (num_keys + self.block - 1) // self.block

    def pieces(self, warpgroup: int) -> list[Piece]:
        """What lies in the rows of a consumer."""
        found = []
        for head in range(self.group):
            first = max(head * self.tokens, warpgroup * HALF)
            last = min((head + 1) * self.tokens, (warpgroup + 1) * HALF)
            if first < last:
                found.append(Piece(first - warpgroup * HALF, head, first - head * self.tokens, last - first))
        return found

    def smem_bytes(self, dtype) -> int:
        """Shared memory of the buffers, with a kilobyte for barriers and 2 KB in which warps reduce."""
        rows = (QUERY_SLOTS + 1) * ROWS + 2 * self.num_stages * self.block
        return rows * self.head_dim * jnp.dtype(dtype).itemsize + 3072

    def scratch(self, dtype) -> dict:
        """Shared memory and barriers: rings of queries, keys and values; rows of results that are no whole tile."""
        half = (NUM_CONSUMERS, HALF, self.head_dim)
        block = (self.num_stages, self.block, self.head_dim)
        ring = functools.partial(plgpu.Barrier, num_barriers=self.num_stages)
        query_ring = functools.partial(plgpu.Barrier, num_barriers=QUERY_SLOTS)
        num_pieces = sum(len(self.pieces(warpgroup)) for warpgroup in range(NUM_CONSUMERS))
        return {
            "q_smem": tiles.operand((QUERY_SLOTS, *half), dtype),
            "k_smem": tiles.operand(block, dtype),
            "v_smem": tiles.operand(block, dtype),
            "rows_smem": plgpu.SMEM(half, dtype),
            "q_full": query_ring(num_arrivals=num_pieces),
            "q_free": query_ring(num_arrivals=NUM_CONSUMERS),
            "k_full": ring(num_arrivals=self.pages_per_block),
            "v_full": ring(num_arrivals=self.pages_per_block),
            "k_free": ring(num_arrivals=NUM_CONSUMERS),
            "v_free": ring(num_arrivals=NUM_CONSUMERS),
            "turn": plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
        }


def why_not(num_heads: int, num_kv_heads: int) -> str | None:
    """What keeps the kernel from query heads in such groups, None if nothing does."""
    group, most = num_heads // num_kv_heads, ROWS // tiles.SUBLANES
    return None if group <= most else f"packs up to {most} query heads for each KV head into a tile, not {group}"


def item_of(i, cta, num_ctas: int):
    """Which (tile, KV head) pair, in the order of the tiles, a CTA takes as its i-th one: rounds go to and fro."""
    return i * num_ctas + jnp.where(i % 2 == 0, cta, num_ctas - 1 - cta)


def num_items_of(cta, num_ctas: int, num_items):
    """How many pairs a CTA takes."""
    num_rounds = num_items // num_ctas
    return num_rounds + (item_of(num_rounds, cta, num_ctas) < num_items)


def prefill_schedule(
    kv_lens: Int32[Array, "R"],
    cu_q_lens: Int32[Array, "R+1"],
    num_decode: Int32[Array, ""],
    num_tokens: int,
    tokens: int,
) -> PrefillSchedule:
    """Tiles of `tokens` query tokens for rows from `num_decode` on, in a batch padded to `num_tokens`."""
    num_rows = kv_lens.shape[0]
    start, end = cu_q_lens[:-1], cu_q_lens[1:]
    aligned = start // tiles.SUBLANES * tiles.SUBLANES
    has_tiles = (jnp.arange(num_rows) >= num_decode) & (start < end)
    num_tiles = jnp.where(has_tiles, (end - aligned + tokens - 1) // tokens, 0)
    cu_tiles = jnp.cumsum(num_tiles)

    # A row of n tokens has at most 1 + (n + 6) // tokens tiles, and the quotient is at most n // (tokens - 6).
    tile = jnp.arange(min(num_rows, num_tokens) + num_tokens // (tokens - tiles.SUBLANES + 2))
    row = jnp.minimum(jnp.searchsorted(cu_tiles, tile, side="right", method="scan_unrolled"), num_rows - 1)
    token = aligned[row] + (tile - cu_tiles[row] + num_tiles[row]) * tokens
    first, last = jnp.maximum(token, start[row]), jnp.minimum(token + tokens, end[row])
    token = jnp.minimum(token, num_tokens - tokens)  # all that a tile reads is there
    to_position = kv_lens[row] - end[row]
    listed = jnp.stack([row, token // tiles.SUBLANES, first, last, to_position, kv_lens[row]], axis=1)
    num_keys = jnp.where(tile < cu_tiles[-1], last + to_position, 0)
    return PrefillSchedule(listed[jnp.argsort(-num_keys)].astype(jnp.int32), cu_tiles[-1:].astype(jnp.int32))
