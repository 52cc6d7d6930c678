"""How long are prompts and outputs?  Constants, log-normal lengths from published statistics, statistics of a trace."""

import dataclasses
import math

import numpy as np
from jaxtyping import Int64

from nanojax.workload.request import Trace

__all__ = ["PAPER_TABLE_4", "LengthStatistics", "constant_trace", "lognormal_trace", "table4_trace", "trace_statistics"]


@dataclasses.dataclass(frozen=True)
class LengthStatistics:
    """Mean and standard deviation of input and output lengths, in tokens."""

    input_mean: float
    input_std: float
    output_mean: float
    output_std: float


PAPER_TABLE_4: dict[str, LengthStatistics] = {
    "splitwise": LengthStatistics(1155.0, 1109.0, 211.0, 163.0),
    "lmsys": LengthStatistics(102.0, 169.0, 222.0, 210.0),
    "sharegpt": LengthStatistics(246.0, 547.0, 322.0, 244.0),
}
"""NanoFlow, arXiv 2408.12757v2, Table 4 (before the filter of its scripts, see `nanoflow_filter`)."""


def constant_trace(num_requests: int, *, input_len: int, output_len: int) -> Trace:
    """`num_requests` requests of the same lengths, all at 0 s (the paper's 512-512, 1024-512, 512-1024)."""
    if input_len < 1 or output_len < 1:
        raise ValueError(f"input_len={input_len} and output_len={output_len} must be >= 1")
    return _burst(f"{input_len}-{output_len}", np.full(num_requests, input_len), np.full(num_requests, output_len))


def lognormal_trace(name: str, statistics: LengthStatistics, num_requests: int, rng: np.random.Generator) -> Trace:
    """Independent log-normal input and output lengths with the given mean and standard deviation, all at 0 s.

    The moments fix the distribution: sigma**2 = ln(1 + (std / mean)**2), mu = ln(mean) - sigma**2 / 2.  Lengths are
    rounded and clipped to >= 1 token.  A model of the published moments, not of the data: real prompts and outputs
    are correlated, and outputs are bounded by the service.  Filter the result to bound it.
    """
    input_lens = _lognormal_lens(statistics.input_mean, statistics.input_std, num_requests, rng)
    return _burst(name, input_lens, _lognormal_lens(statistics.output_mean, statistics.output_std, num_requests, rng))


def table4_trace(dataset: str, num_requests: int, rng: np.random.Generator) -> Trace:
    """`lognormal_trace` with the paper's Table 4: dataset is splitwise, lmsys or sharegpt."""
    if dataset not in PAPER_TABLE_4:
        raise ValueError(f"dataset={dataset!r} is not in the paper's Table 4: {', '.join(PAPER_TABLE_4)}")
    return lognormal_trace(f"{dataset}-table4", PAPER_TABLE_4[dataset], num_requests, rng)


def trace_statistics(trace: Trace) -> dict[str, int | float]:
    """Mean, std, p50, p99 of both lengths in tokens; duration, rate and gap CV; prefix-block reuse if it is known.

    `prefix_block_hit_fraction`: blocks that an earlier request named, over all blocks: what an infinite cache saves.
    Raises ValueError for an empty trace.
    """
    if not len(trace):
        raise ValueError(f"trace {trace.name!r} is empty: it has no statistics")
    statistics: dict[str, int | float] = {"num_requests": len(trace)}
    for name, lens in (("input_len", trace.input_lens), ("output_len", trace.output_lens)):
        p50, p99 = np.percentile(lens, [50, 99])
        statistics |= {f"{name}_mean": float(lens.mean()), f"{name}_std": float(lens.std())}
        statistics |= {f"{name}_p50": float(p50), f"{name}_p99": float(p99)}
    gaps_s = np.diff(trace.arrival_s)
    if gaps_s.sum() > 0:
        statistics["duration_s"] = float(gaps_s.sum())
        statistics["rate_per_s"] = len(trace) / float(gaps_s.sum())
        statistics["interarrival_cv"] = float(gaps_s.std() / gaps_s.mean())
    if trace.prefix_blocks is not None:
        num_blocks = sum(map(len, trace.prefix_blocks))
        num_unique = len(set().union(*trace.prefix_blocks))
        statistics |= {
            "num_prefix_blocks": num_blocks,
            "prefix_block_hit_fraction": 1 - num_unique / max(num_blocks, 1),
        }
    return statistics


def _lognormal_lens(mean: float, std: float, num_requests: int, rng: np.random.Generator) -> Int64[np.ndarray, "n"]:
    if not (mean > 0 and std >= 0):
        raise ValueError(f"a log-normal length needs mean > 0 and std >= 0, got mean={mean}, std={std}")
    variance = math.log1p((std / mean) ** 2)
    drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), num_requests)
    return np.maximum(np.rint(drawn), 1).astype(np.int64)


def _burst(name: str, input_lens: Int64[np.ndarray, "n"], output_lens: Int64[np.ndarray, "n"]) -> Trace:
    return Trace(name, np.zeros(len(input_lens)), input_lens, output_lens)
