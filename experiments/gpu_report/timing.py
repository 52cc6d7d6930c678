"""How long does a program take on the device?  Medians of interleaved repeats, each long enough to hide the host.

A repeat queues several launches and waits for the last: the device runs them one after another, so that the time of one
launch is what it takes there, provided that it takes longer than the host needs to launch it (about 50 us).  Programs here
therefore hold an operation several times over (`num_inner`).
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

MAX_LAUNCHES = 16
"""Launches in flight: each holds its outputs in memory."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one operation: median, fastest and slowest of `num_repeats` repeats of `num_launches` launches."""

    median_s: float
    low_s: float
    high_s: float
    num_repeats: int
    num_launches: int

    def row(self, prefix: str = "") -> dict[str, float | int]:
        """Columns of a table."""
        times = {f"{prefix}median_s": self.median_s, f"{prefix}low_s": self.low_s, f"{prefix}high_s": self.high_s}
        return {**times, f"{prefix}num_repeats": self.num_repeats}


@dataclasses.dataclass(frozen=True)
class Run:
    """`call()` launches a program that holds the operation `num_inner` times, and gives what can be waited for."""

    call: Callable[[], Any]
    num_inner: int = 1


def time_interleaved(runs: Mapping[str, Run], *, num_repeats: int = 10, repeat_s: float = 0.01) -> dict[str, Timing]:
    """Times of all runs, their repeats in turn, because clocks and neighbours drift.

    Each run is first called twice: once to compile, once to be warm; a third call says how many launches fill `repeat_s`.
    Raises ValueError unless `num_repeats >= 1`, and whatever a run raises.
    """
    if num_repeats < 1:
        raise ValueError(f"num_repeats={num_repeats} must be >= 1")
    num_launches = {}
    for name, run in runs.items():
        for _ in range(2):
            jax.block_until_ready(run.call())
        once_s = _seconds(run, 1)
        num_launches[name] = int(np.clip(round(repeat_s / once_s), 1, MAX_LAUNCHES))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_repeats):
        for name, run in runs.items():
            seconds[name].append(_seconds(run, num_launches[name]) / run.num_inner)
    return {
        name: Timing(float(np.median(own)), min(own), max(own), num_repeats, num_launches[name])
        for name, own in seconds.items()
    }


def time_one(call: Callable[[], Any], num_inner: int = 1, *, num_repeats: int = 10) -> Timing:
    """The same for a single run."""
    return time_interleaved({"": Run(call, num_inner)}, num_repeats=num_repeats)[""]


def _seconds(run: Run, num_launches: int) -> float:
    start_s = time.perf_counter()
    last = None
    for _ in range(num_launches):
        last = run.call()
    jax.block_until_ready(last)
    return (time.perf_counter() - start_s) / num_launches
