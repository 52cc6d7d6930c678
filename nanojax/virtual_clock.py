"""How is simulated time kept?  Seconds as the sum of two float32, exact to the nanosecond over hours without 64-bit arrays.

One float32 second resolves 0.2 ms after an hour: step times of milliseconds would drift.  The pair carries the rounding error
of each addition along (Knuth's two-sum).
"""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from nanojax.array_types import Array, Bool, Float32


@flax.struct.dataclass
class Seconds:
    """`high + low` seconds; `low` is what `high` rounds away.  Never is infinite in `high` and 0 in `low`."""

    high: Float32[Array, "*n"]
    low: Float32[Array, "*n"]


def from_float64(times_s: Float64[np.ndarray, "*n"]) -> Seconds:
    """Host times, exact to 2**-48 of their size."""
    high = np.asarray(times_s, np.float32)
    is_finite = np.isfinite(high)
    low = np.where(is_finite, times_s - np.where(is_finite, high, 0.0), 0.0)
    return Seconds(high=jnp.asarray(high), low=jnp.asarray(low, jnp.float32))


def to_float64(times: Seconds) -> Float64[np.ndarray, "*n"]:
    """Times for the host."""
    return np.asarray(np.asarray(times.high, np.float64) + np.asarray(times.low, np.float64))


def later(time: Seconds, duration_s: Float32[Array, "*n"]) -> Seconds:
    """`time + duration_s`, without losing what a float32 sum would round away."""
    total = time.high + duration_s
    added = total - time.high
    lost = (time.high - (total - added)) + (duration_s - added)
    low = time.low + lost
    high = total + low
    return Seconds(high=high, low=low - (high - total))


def elapsed_s(time: Seconds, since: Seconds) -> Float32[Array, "*n"]:
    """`time - since`: rounded to float32, but with the right sign however close the two are."""
    return (time.high - since.high) + (time.low - since.low)


def latest(a: Seconds, b: Seconds) -> Seconds:
    """The later of two times."""
    return where(elapsed_s(a, b) >= 0, a, b)


def where(condition: Bool[Array, "*n"], a: Seconds, b: Seconds) -> Seconds:
    """`a` where the condition holds, else `b`."""
    return Seconds(high=jnp.where(condition, a.high, b.high), low=jnp.where(condition, a.low, b.low))
