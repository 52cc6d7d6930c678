"""In which order are the slots served?  Sorting by several keys, as fast as a CPU sorts one array of integers."""

import jax
import jax.numpy as jnp

from nanojax.array_types import Array, Int32
from nanojax.control import skip_unless

FEW_SLOTS = 128
"""Where one sort by several keys takes no longer than two sorts, and what is around them."""


def in_order(rank: Int32[Array, "S"], priority: Int32[Array, "S"], arrival: Int32[Array, "S"]) -> Int32[Array, "S"]:
    """The slots by rank (0, 1 or 2), then priority, arrival and number; those of rank 2, which nobody serves, by number alone.

    A CPU sorts one array of integers ten times as fast as several keys; so it sorts twice: by arrival, then by rank, priority
    and the place that the first sort gave.  Few slots, and arrivals or priorities too far apart for that, are sorted by several
    keys.
    """
    num_slots = rank.shape[0]
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    is_served = rank < 2
    priority, arrival = jnp.where(is_served, priority, 0), jnp.where(is_served, arrival, 0)

    def by_keys() -> Int32[Array, "S"]:
        return jax.lax.sort((rank, priority, arrival, slot), num_keys=4, is_stable=False)[-1]

    if num_slots <= FEW_SLOTS:
        return by_keys()

    def from_first(key: Int32[Array, "S"]) -> Int32[Array, "S"]:
        return jnp.where(is_served, key - jnp.min(jnp.where(is_served, key, _LAST)), 0)

    small_priority, small_arrival = from_first(priority), from_first(arrival)  # negative where they overflow
    limit = _LAST // (3 * num_slots)  # so that rank, priority and place are one integer

    def by_integers() -> Int32[Array, "S"]:
        by_arrival = jnp.sort(small_arrival * num_slots + slot) % num_slots
        place = jnp.zeros((num_slots,), jnp.int32).at[by_arrival].set(slot)
        return by_arrival[jnp.sort((rank * limit + small_priority) * num_slots + place) % num_slots]

    largest = jnp.maximum(small_priority, small_arrival)
    smallest = jnp.minimum(small_priority, small_arrival)
    return skip_unless(jnp.any((smallest < 0) | (largest >= limit)), by_keys, by_integers)


_LAST = jnp.iinfo(jnp.int32).max
