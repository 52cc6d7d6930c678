"""When do requests arrive?  Burst, Poisson, gamma, or the recorded times at another speed.

Processes start at 0 s and their first request comes after the first gap, as in the paper's scripts.  Every function
gives sorted seconds, float64 [n]; put them on a trace with `with_arrivals`.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64

from nanojax.workload.request import Trace

__all__ = ["burst_arrivals", "gamma_arrivals", "poisson_arrivals", "replay_arrivals", "with_arrivals"]


def burst_arrivals(num_requests: int) -> Float64[np.ndarray, "n"]:
    """Everything is there at 0 s: offline throughput, the paper's "rate 0"."""
    return np.zeros(num_requests)


def poisson_arrivals(num_requests: int, *, rate_per_s: float, rng: np.random.Generator) -> Float64[np.ndarray, "n"]:
    """Exponential gaps with mean `1 / rate_per_s` (paper section 6.3).  Raises ValueError unless `rate_per_s > 0`."""
    return gamma_arrivals(num_requests, rate_per_s=rate_per_s, cv=1.0, rng=rng)


def gamma_arrivals(
    num_requests: int, *, rate_per_s: float, cv: float, rng: np.random.Generator
) -> Float64[np.ndarray, "n"]:
    """Gamma gaps with mean `1 / rate_per_s` and coefficient of variation `cv`.

    cv > 1 is burstier than Poisson (cv = 1), cv < 1 more regular.  shape = 1 / cv**2, scale = cv**2 / rate.
    Raises ValueError unless both are > 0.
    """
    if not (rate_per_s > 0 and cv > 0):
        raise ValueError(f"rate_per_s={rate_per_s} and cv={cv} must be > 0")
    return np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate_per_s, num_requests))


def replay_arrivals(trace: Trace, *, speed: float = 1.0) -> Float64[np.ndarray, "n"]:
    """The recorded times, from 0 s on, `speed` times as fast.

    Raises ValueError unless `speed > 0`, and for a trace without time stamps (all of them equal).
    """
    if not speed > 0:
        raise ValueError(f"speed={speed} must be > 0")
    if len(trace) > 1 and trace.arrival_s[0] == trace.arrival_s[-1]:
        raise ValueError(f"trace {trace.name!r} has no arrival times to replay: all are {trace.arrival_s[0]} s")
    return (trace.arrival_s - trace.arrival_s[:1]) / speed


def with_arrivals(trace: Trace, arrival_s: Float64[np.ndarray, "n"]) -> Trace:
    """The trace with other arrival times (sorted, one per request, else ValueError)."""
    return dataclasses.replace(trace, arrival_s=arrival_s)
