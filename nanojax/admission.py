"""Will the pages suffice?  Forecasts of the peak page demand, one per admission rule.

A forecast says how many pages a set of requests will need at its peak; the scheduler admits while that fits the pool.
The model of the future (NanoFlow, section 4.2.1): from now on every request gains one token per step until it has got its
remaining output, then gives all its pages back.  The rules differ in what they take for the remaining output.
"""

import functools

import jax
import jax.numpy as jnp

from nanojax.array_types import Array, Bool, Int32
from nanojax.kv_cache import pages_for
from nanojax.scheduler import HISTORY_LEN, Forecast, SchedulerState


def peak_pages(
    num_tokens: Int32[Array, "S"], remaining: Int32[Array, "S"], active: Bool[Array, "S"], page_size: int
) -> Int32[Array, ""]:
    """Largest number of pages in use at any future step.

    Request `i` uses `ceil((num_tokens[i] + t) / page_size)` pages at step `t = 0 .. remaining[i] - 1`, then none.  Use only
    falls when a request ends, so the peak is at some request's last step.  In order of last steps, those still running at the
    `i`-th are the requests from `i` on.  With `num_tokens + page_size - 1 = q * page_size + r`, a request's pages at `t` are
    `q + t // page_size`, and one more if `r + t % page_size` reaches `page_size`: sums over suffixes, not over all pairs.
    Exact for futures of up to 2**31 / S steps.
    """
    num_slots = num_tokens.shape[0]
    last = jnp.minimum(jnp.maximum(remaining, 1) - 1, 2**31 // num_slots - 2)  # so that the sort key is one int32
    key = jax.lax.sort(jnp.where(active, last, -1) * num_slots + jnp.arange(num_slots, dtype=jnp.int32))
    last, slot = jnp.divmod(key, num_slots)
    is_active, num_tokens = last >= 0, num_tokens[slot]
    q, r = jnp.divmod(num_tokens + (page_size - 1), page_size)
    periods, rest = jnp.divmod(last, page_size)
    carries = is_active[:, None] & (
        r[:, None] >= jnp.arange(1, page_size + 1)
    )  # column c: one page more where rest = p - 1 - c
    columns = jnp.concatenate(
        [jnp.where(is_active, q, 0)[:, None], is_active[:, None], carries], axis=1, dtype=jnp.int32
    )
    suffix = jax.lax.cumsum(columns, axis=0, reverse=True)
    carried = jnp.take_along_axis(suffix[:, 2:], (page_size - 1 - rest)[:, None], axis=1)[:, 0]
    return jnp.max(jnp.where(is_active, suffix[:, 0] + suffix[:, 1] * periods + carried, 0))


def greedy(state: SchedulerState, active: Bool[Array, "S"], page_size: int) -> Int32[Array, ""]:
    """No forecast: the pages of the tokens known now and of one more each (what vLLM admits by)."""
    return jnp.sum(jnp.where(active, pages_for(state.num_tokens + 1, page_size), 0), dtype=jnp.int32)


def reserve_max(state: SchedulerState, active: Bool[Array, "S"], page_size: int) -> Int32[Array, ""]:
    """Every request reserves its longest possible length for its whole life (Orca, OSDI '22)."""
    return jnp.sum(jnp.where(active, pages_for(state.max_tokens, page_size), 0), dtype=jnp.int32)


def oracle(state: SchedulerState, active: Bool[Array, "S"], page_size: int) -> Int32[Array, ""]:
    """The output lengths are known (a trace tells them): the least pessimistic forecast that never preempts."""
    return peak_pages(state.num_tokens, state.expected_tokens - state.num_tokens, active, page_size)


def peak_memory(
    state: SchedulerState, active: Bool[Array, "S"], page_size: int, *, expected_output_len: int
) -> Int32[Array, ""]:
    """NanoFlow's rule: every request ends at the average output length.

    The average of the requests that have finished; `expected_output_len` (the user's statistics) until one has.  A request
    that has outlived the average counts as one step from its end.
    """
    known = jnp.minimum(state.num_finished, HISTORY_LEN)
    seen = jnp.arange(HISTORY_LEN) < known
    mean = jnp.sum(jnp.where(seen, state.finished_lens, 0)) / jnp.maximum(known, 1)
    mean = jnp.where(known > 0, jnp.ceil(mean).astype(jnp.int32), expected_output_len)
    generated = state.num_tokens - state.prompt_len
    remaining = jnp.minimum(mean - generated, state.max_tokens - state.num_tokens)
    return peak_pages(state.num_tokens, remaining, active, page_size)


def past_future(
    state: SchedulerState, active: Bool[Array, "S"], page_size: int, *, expected_output_len: int, seed: int
) -> Int32[Array, ""]:
    """LightLLM's rule (ASPLOS '25): each output length is drawn from the finished ones that are longer than what the request
    has generated; without such a one, its maximum.  Draws are a function of seed, request and tokens so far."""
    known = jnp.minimum(state.num_finished, HISTORY_LEN)
    lens = jnp.where(jnp.arange(HISTORY_LEN) < known, state.finished_lens, jnp.iinfo(jnp.int32).max)
    lens = jnp.sort(lens)
    generated = state.num_tokens - state.prompt_len
    shorter = jnp.searchsorted(lens, generated, side="right", method="compare_all")
    longer = known - shorter

    def draw(request_id, num_tokens):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request_id), num_tokens)
        return jax.random.uniform(key)

    index = shorter + (jax.vmap(draw)(state.request_id, state.num_tokens) * longer).astype(jnp.int32)
    drawn = lens[jnp.clip(index, 0, HISTORY_LEN - 1)] - generated
    longest = state.max_tokens - state.num_tokens
    unknown = jnp.where(known > 0, longest, jnp.minimum(expected_output_len - generated, longest))
    remaining = jnp.where(longer > 0, jnp.minimum(drawn, longest), unknown)
    return peak_pages(state.num_tokens, remaining, active, page_size)


def make_forecast(name: str, *, expected_output_len: int = 256, seed: int = 0) -> Forecast:
    """The forecast called `name`; raises ValueError on any other name."""
    match name:
        case "greedy":
            return greedy
        case "reserve_max":
            return reserve_max
        case "oracle":
            return oracle
        case "peak_memory":
            return functools.partial(peak_memory, expected_output_len=expected_output_len)
        case "past_future":
            return functools.partial(past_future, expected_output_len=expected_output_len, seed=seed)
    raise ValueError(f"admission={name!r} is none of {ADMISSION_NAMES}")


ADMISSION_NAMES = ("peak_memory", "greedy", "reserve_max", "past_future", "oracle")
