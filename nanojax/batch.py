"""What does one step compute on?  The ragged batch: flat tokens of many requests, decode rows first."""

import dataclasses

import flax.struct
import jax.numpy as jnp

from nanojax.array_types import Array, Int32


@flax.struct.dataclass
class RaggedBatch:
    """`T` flat tokens of `R` rows; row `r` owns `tokens[cu_q_lens[r]:cu_q_lens[r+1]]`, the rest is padding.

    Rows with one token come first (`num_decode` of them), then prefill chunks, then empty rows.
    """

    tokens: Int32[Array, "T"]
    positions: Int32[Array, "T"]
    pages: Int32[Array, "T"]
    """Page that takes each token's key and value; `N` for padding, which no write reaches."""
    row_slots: Int32[Array, "R"]
    kv_lens: Int32[Array, "R"]
    page_indices: Int32[Array, "R P"]
    cu_q_lens: Int32[Array, "R+1"]
    num_decode: Int32[Array, ""]


def pack(
    order: Int32[Array, "S"],
    q_lens: Int32[Array, "S"],
    num_decode: Int32[Array, ""],
    num_computed: Int32[Array, "S"],
    tokens: Int32[Array, "S M"],
    page_indices: Int32[Array, "S P"],
    *,
    token_budget: int,
    page_size: int,
    num_pages: int,
) -> RaggedBatch:
    """Lays out the first `R = min(S, token_budget)` slots of `order`, each with its next `q_lens` tokens."""
    num_rows = min(order.shape[0], token_budget)
    slots = order[:num_rows]
    lens = q_lens[slots]
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lens, dtype=jnp.int32)])
    index = jnp.arange(token_budget, dtype=jnp.int32)
    row = jnp.repeat(jnp.arange(num_rows, dtype=jnp.int32), lens, total_repeat_length=token_budget)
    is_token = index < cu_q_lens[-1]
    position = num_computed[slots][row] + index - cu_q_lens[row]
    position = jnp.where(is_token, position, 0)
    slot = slots[row]
    return RaggedBatch(
        tokens=tokens[slot, position],
        positions=position,
        pages=jnp.where(is_token, page_indices[slot, position // page_size], num_pages),
        row_slots=slots,
        kv_lens=jnp.where(lens > 0, num_computed[slots] + lens, 0),
        page_indices=page_indices[slots],
        cu_q_lens=cu_q_lens,
        num_decode=num_decode,
    )


def num_rows(batch: RaggedBatch) -> Int32[Array, ""]:
    """Rows up to the last that is not empty."""
    place = jnp.arange(1, batch.cu_q_lens.shape[0], dtype=jnp.int32)
    return jnp.max(jnp.where(jnp.diff(batch.cu_q_lens) > 0, place, 0))


def last_tokens(batch: RaggedBatch) -> Int32[Array, "R"]:
    """Where each row's last token is; anywhere for an empty row."""
    return jnp.maximum(batch.cu_q_lens[1:] - 1, 0)


def cut(batch: RaggedBatch, start: int, stop: int) -> RaggedBatch:
    """Tokens `start` to `stop` (exclusive) as a batch of their own; at most that many rows.

    A row is cut to its tokens in the range, and its cache to what it holds after the last of them.
    """
    if (start, stop) == (0, batch.tokens.shape[0]):
        return batch
    size = stop - start
    total_rows = batch.kv_lens.shape[0]
    bounds = jnp.clip(batch.cu_q_lens - start, 0, size)
    lens = jnp.diff(bounds)
    first = jnp.sum(batch.cu_q_lens[1:] <= start, dtype=jnp.int32)
    rows = (first + jnp.arange(min(total_rows, size), dtype=jnp.int32)) % total_rows
    lens = lens[rows]
    beyond = jnp.maximum(batch.cu_q_lens[1:] - stop, 0)
    return RaggedBatch(
        tokens=batch.tokens[start:stop],
        positions=batch.positions[start:stop],
        pages=batch.pages[start:stop],
        row_slots=batch.row_slots[rows],
        kv_lens=jnp.where(lens > 0, (batch.kv_lens - beyond)[rows], 0),
        page_indices=batch.page_indices[rows],
        cu_q_lens=jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lens, dtype=jnp.int32)]),
        num_decode=jnp.clip(batch.num_decode - start, 0, size),
    )


def decode_part(batch: RaggedBatch) -> RaggedBatch:
    """The batch with its decode rows only: the other rows have no tokens."""
    is_decode = jnp.arange(batch.kv_lens.shape[0]) < batch.num_decode
    return dataclasses.replace(
        batch,
        kv_lens=jnp.where(is_decode, batch.kv_lens, 0),
        cu_q_lens=jnp.minimum(batch.cu_q_lens, batch.num_decode),
    )


def prefill_part(batch: RaggedBatch) -> RaggedBatch:
    """The batch with its prefill rows; a decode row stays, to hold its place, but reads one key only."""
    is_decode = jnp.arange(batch.kv_lens.shape[0]) < batch.num_decode
    return dataclasses.replace(batch, kv_lens=jnp.where(is_decode, jnp.minimum(batch.kv_lens, 1), batch.kv_lens))
