"""How fast was the run?  Records of requests and steps -> one flat dict of numbers whose names carry units.

Throughput and latency follow NanoFlow (arXiv 2408.12757): total throughput is (input + output tokens) / execution
time (section 6.2), normalized latency is end-to-end latency / output tokens, per request and then averaged
(section 6.3), the optimum is Compute / (2 * P_model) (Eq. 5).  TTFT and TPOT as the paper's scripts define them.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

__all__ = [
    "RequestRecord",
    "StepRecord",
    "optimal_tokens_per_s",
    "steady_state_tokens_per_s",
    "step_series",
    "summarize",
]


@dataclasses.dataclass(frozen=True)
class RequestRecord:
    """What became of one request.  Times are seconds on one clock, lengths are tokens.

    first_token_s: when the first output token was there; NaN when there was none (`output_len == 0`).
    num_preemptions: times its pages were taken and its tokens computed again.
    Raises ValueError when times run backwards or a length is negative.
    """

    request_id: str
    arrival_s: float
    first_token_s: float
    finish_s: float
    input_len: int
    output_len: int
    num_preemptions: int = 0
    finish_reason: str = "length"

    def __post_init__(self) -> None:
        if self.input_len < 0 or self.output_len < 0:
            raise ValueError(
                f"{self.request_id!r}: input_len={self.input_len}, output_len={self.output_len} must be >= 0"
            )
        times = [self.arrival_s, self.finish_s]
        if self.output_len:
            times.insert(1, self.first_token_s)
        if not all(a <= b for a, b in itertools.pairwise(times)):
            raise ValueError(
                f"{self.request_id!r}: times must not run backwards (arrival, first token, finish): {times} s"
            )


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step of the engine.  `time_s` is its end; counts are those of the step, `pages_in_use` is after it."""

    time_s: float
    token_budget: int
    num_decode_tokens: int
    num_prefill_tokens: int
    num_running: int
    num_waiting: int
    pages_in_use: int


def optimal_tokens_per_s(peak_flops: float, num_active_params: int) -> float:
    """Paper Eq. 5: `Compute / (2 * P_model)`, input and output tokens together.

    peak_flops: FLOP/s that the device reaches in a large matmul (measured, as in the paper: about 260e12 on an
    A100 whose specification says 312e12).    num_active_params: parameters that one token meets.
    """
    if peak_flops <= 0 or num_active_params <= 0:
        raise ValueError(f"peak_flops={peak_flops} and num_active_params={num_active_params} must be > 0")
    return peak_flops / (2 * num_active_params)


def summarize(
    records: Sequence[RequestRecord],
    steps: Sequence[StepRecord] = (),
    *,
    peak_flops: float | None = None,
    num_active_params: int | None = None,
    num_pages: int | None = None,
) -> dict[str, int | float | None]:
    """Every metric of a run.  A metric that is not defined for these records (TPOT of one-token outputs) is None.

    | key | definition |
    |---|---|
    | `duration_s` | last finish - first arrival |
    | `total_tokens_per_s` | (input + output tokens) / duration (paper section 6.2); likewise `input_`, `output_` |
    | `request_throughput_per_s` | requests / duration |
    | `ttft_s_*` | first token - arrival; requests with an output |
    | `tpot_s_*` | (finish - first token) / (output_len - 1); requests with output_len >= 2 |
    | `normalized_latency_s_per_token_*` | (finish - arrival) / output_len (paper section 6.3); as TTFT |
    | `e2e_latency_s_*` | finish - arrival |
    | `optimal_tokens_per_s`, `percent_of_optimal` | paper Eq. 5; when `peak_flops` and `num_active_params` are given |
    | `num_*` | counts: requests, tokens, preemptions, steps |
    | `*_tokens_per_step_mean` | tokens of a step and its decode and prefill parts (recomputed too); mean over steps |
    | `budget_fill_fraction` | tokens of all steps / token budgets of all steps: what padding leaves |
    | `num_running_mean`, `num_waiting_mean`, `pages_in_use_mean`, `_max` | over the steps |
    | `page_occupancy_fraction_mean`, `_max` | pages in use / `num_pages`; when that is given |

    `*` stands for mean, p50, p90, p99 over the requests (linear interpolation between ranks, numpy's default).
    Keys about steps are there only when `steps` are.  Raises ValueError without records, or when no time passed.
    """
    if not records:
        raise ValueError("summarize needs at least 1 RequestRecord, got 0: nothing was served")
    duration_s = max(r.finish_s for r in records) - min(r.arrival_s for r in records)
    if not duration_s > 0:
        raise ValueError(f"the run took {duration_s} s from first arrival to last finish: no rate can be computed")
    input_tokens = sum(r.input_len for r in records)
    output_tokens = sum(r.output_len for r in records)
    answered = [r for r in records if r.output_len >= 1]
    summary: dict[str, int | float | None] = {
        "num_requests": len(records),
        "num_input_tokens": input_tokens,
        "num_output_tokens": output_tokens,
        "num_preemptions": sum(r.num_preemptions for r in records),
        "duration_s": duration_s,
        "total_tokens_per_s": (input_tokens + output_tokens) / duration_s,
        "input_tokens_per_s": input_tokens / duration_s,
        "output_tokens_per_s": output_tokens / duration_s,
        "request_throughput_per_s": len(records) / duration_s,
        **_distribution("ttft_s", [r.first_token_s - r.arrival_s for r in answered]),
        **_distribution(
            "tpot_s", [(r.finish_s - r.first_token_s) / (r.output_len - 1) for r in answered if r.output_len >= 2]
        ),
        **_distribution(
            "normalized_latency_s_per_token", [(r.finish_s - r.arrival_s) / r.output_len for r in answered]
        ),
        **_distribution("e2e_latency_s", [r.finish_s - r.arrival_s for r in records]),
    }
    if peak_flops is not None and num_active_params is not None:
        optimal = optimal_tokens_per_s(peak_flops, num_active_params)
        summary["optimal_tokens_per_s"] = optimal
        summary["percent_of_optimal"] = 100 * (input_tokens + output_tokens) / duration_s / optimal
    return {**summary, **_summarize_steps(steps, num_pages)}


def steady_state_tokens_per_s(
    records: Sequence[RequestRecord],
    start_s: float,
    end_s: float,
    *,
    mean_input_len: float,
    mean_output_len: float,
    num_devices: int = 1,
) -> float:
    """The throughput estimator of the paper's scripts: an estimate for a stationary run, not a count of tokens.

    (requests that finish in (start_s, end_s]) * (mean input + mean output length of the *trace*, each floored to an
    integer) / (end_s - start_s) / devices.  It keeps the warm-up and the drain out of the number, and is right only
    while requests of average length retire.  `summarize` counts tokens instead; report which of the two it is.
    Source: efeslab/Nanoflow, 2024 release, pipeline evaluation scripts.
    """
    if not end_s > start_s:
        raise ValueError(f"the window ({start_s}, {end_s}] s is empty")
    if num_devices < 1:
        raise ValueError(f"num_devices={num_devices} must be >= 1")
    num_retired = sum(start_s < r.finish_s <= end_s for r in records)
    tokens_per_request = math.floor(mean_input_len) + math.floor(mean_output_len)
    return num_retired * tokens_per_request / (end_s - start_s) / num_devices


def step_series(steps: Sequence[StepRecord], *, start_s: float = 0.0, num_bins: int = 120) -> dict[str, list[float]]:
    """Throughput and occupancy over time, on `num_bins` equal bins from `start_s` to the end of the last step.

    Keys: `time_s` (middle of the bin), `decode_tokens_per_s`, `prefill_tokens_per_s`, `num_running`, `num_waiting`,
    `pages_in_use`.  A step's tokens are spread evenly from the end of the step before (`start_s` for the first), so
    no token is lost: rate * bin width sums to the tokens of the run.  Counts are those of the step under way.
    Raises ValueError without steps, with times that do not ascend, or with a step that ends at or before `start_s`.
    """
    if not steps:
        raise ValueError("step_series needs at least 1 StepRecord, got 0")
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins} must be >= 1")
    ends_s = np.array([s.time_s for s in steps], np.float64)
    if not (ends_s[0] > start_s and np.all(np.diff(ends_s) >= 0)):
        raise ValueError(f"steps must end in order and after start_s={start_s}; the first ends at {ends_s[0]} s")
    edges_s = np.linspace(start_s, ends_s[-1], num_bins + 1)
    middle_s = (edges_s[:-1] + edges_s[1:]) / 2
    current = np.minimum(np.searchsorted(ends_s, middle_s), len(steps) - 1)

    def rate(field: str) -> list[float]:
        # cumulative count at the step ends, read off at the bin edges
        total = np.concatenate([[0.0], np.cumsum(_column(steps, field))])
        at_edges = np.interp(edges_s, np.concatenate([[start_s], ends_s]), total)
        return (np.diff(at_edges) / np.diff(edges_s)).tolist()

    return {
        "time_s": middle_s.tolist(),
        "decode_tokens_per_s": rate("num_decode_tokens"),
        "prefill_tokens_per_s": rate("num_prefill_tokens"),
        **{field: _column(steps, field)[current].tolist() for field in ("num_running", "num_waiting", "pages_in_use")},
    }


def _column(steps: Sequence[StepRecord], field: str) -> Float64[np.ndarray, "n"]:
    return np.array([getattr(s, field) for s in steps], np.float64)


def _distribution(name: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {f"{name}_{statistic}": None for statistic in ("mean", "p50", "p90", "p99")}
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {
        f"{name}_mean": float(np.mean(values)),
        f"{name}_p50": float(p50),
        f"{name}_p90": float(p90),
        f"{name}_p99": float(p99),
    }


def _summarize_steps(steps: Sequence[StepRecord], num_pages: int | None) -> dict[str, int | float]:
    if not steps:
        return {}
    decode, prefill, pages = (_column(steps, f) for f in ("num_decode_tokens", "num_prefill_tokens", "pages_in_use"))
    summary = {
        "num_steps": len(steps),
        "tokens_per_step_mean": float((decode + prefill).mean()),
        "decode_tokens_per_step_mean": float(decode.mean()),
        "prefill_tokens_per_step_mean": float(prefill.mean()),
        "budget_fill_fraction": float((decode + prefill).sum() / _column(steps, "token_budget").sum()),
        "num_running_mean": float(_column(steps, "num_running").mean()),
        "num_waiting_mean": float(_column(steps, "num_waiting").mean()),
        "pages_in_use_mean": float(pages.mean()),
        "pages_in_use_max": float(pages.max()),
    }
    if num_pages is not None:
        summary["page_occupancy_fraction_mean"] = float(pages.mean() / num_pages)
        summary["page_occupancy_fraction_max"] = float(pages.max() / num_pages)
    return summary
