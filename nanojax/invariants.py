"""Is the state sound?  The laws that hold after every step, and an error that prints the state when one breaks."""

import jax.numpy as jnp
import numpy as np

from nanojax.array_types import Array, Bool
from nanojax.config import EngineConfig
from nanojax.engine import EngineState
from nanojax.kv_cache import pages_for


class InvariantError(RuntimeError):
    """A law is broken: a bug in the engine, never in a request."""


LAWS = (
    "free + owned == all",
    "reference counts equal the page tables",
    "free pages are distinct and owned by nobody",
    "only active requests hold pages, only residents are active",
    "each request holds exactly the pages of its computed tokens",
    "0 <= computed < known <= limit for each resident",
    "page tables name existing pages",
)


def holds(config: EngineConfig, state: EngineState) -> Bool[Array, "7"]:
    """Which of `LAWS` hold.  Pure; costs about one pass over the page tables."""
    s, pool, num_pages = state.scheduler, state.pool, config.num_pages
    column = jnp.arange(config.pages_per_slot)
    held = column[None, :] < pool.num_pages[:, None]
    counted = jnp.zeros_like(pool.ref_count).at[jnp.where(held, pool.page_indices, num_pages)].add(1, mode="drop")
    in_stack = jnp.arange(num_pages) < pool.num_free
    times_free = jnp.zeros_like(pool.ref_count).at[jnp.where(in_stack, pool.free, num_pages)].add(1, mode="drop")
    owned = jnp.sum(pool.ref_count > 0)
    is_bounded = (s.num_computed >= 0) & (s.num_computed < s.num_tokens) & (s.num_tokens <= s.max_tokens)
    return jnp.stack([
        pool.num_free + owned == num_pages,
        jnp.all(counted == pool.ref_count),
        jnp.all(times_free == (pool.ref_count == 0)),
        jnp.all(s.active | (pool.num_pages == 0)) & jnp.all(s.resident | ~s.active),
        jnp.all(~s.active | (pool.num_pages == pages_for(s.num_computed, config.page_size))),
        jnp.all(~s.resident | (is_bounded & (s.max_tokens <= config.max_len))),
        jnp.all(~held | ((pool.page_indices >= 0) & (pool.page_indices < num_pages))),
    ])  # fmt: skip


def check(config: EngineConfig, state: EngineState, law_holds: Bool[Array, "7"]) -> None:
    """Raises InvariantError with the broken laws and the whole state unless all of `law_holds`."""
    broken = [law for law, is_true in zip(LAWS, np.asarray(law_holds), strict=True) if not is_true]
    if broken:
        raise InvariantError("broken: " + "; ".join(broken) + "\n" + describe(config, state))


def describe(config: EngineConfig, state: EngineState) -> str:
    """The state in text: one line per occupied slot, then the pool."""
    s, pool = state.scheduler, state.pool
    lines = [f"{config}"]
    for slot in np.flatnonzero(np.asarray(s.resident) | (np.asarray(pool.num_pages) > 0)):
        pages = np.asarray(pool.page_indices[slot, : int(pool.num_pages[slot])]).tolist()
        lines.append(
            f"slot {slot}: request {int(s.request_id[slot])} resident={bool(s.resident[slot])} active={bool(s.active[slot])} "
            f"tokens={int(s.num_tokens[slot])} computed={int(s.num_computed[slot])} limit={int(s.max_tokens[slot])} pages={pages}"
        )
    free = np.asarray(pool.free[: int(pool.num_free)]).tolist()
    counts = {int(i): int(n) for i, n in enumerate(np.asarray(pool.ref_count)) if n}
    return "\n".join(
        [*lines, f"free ({int(pool.num_free)} of {config.num_pages}): {free}", f"reference counts: {counts}"]
    )
