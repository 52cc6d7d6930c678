"""Is each metric what its definition says?  A run of three requests and four steps, worked by hand."""

import math

import numpy as np
import pytest

from nanojax.metrics import (
    RequestRecord,
    StepRecord,
    optimal_tokens_per_s,
    steady_state_tokens_per_s,
    step_series,
    summarize,
)

# Three requests on a clock in seconds, from first arrival at 1 to last finish at 11: 10 s.
#
#   id  arrival  first  finish  in  out |  ttft   tpot           normalized   e2e
#   a      1       2      6     10   5  |   1     (6-2)/4 = 1    5/5 = 1       5
#   b      2       5     11     20   3  |   3     (11-5)/2 = 3   9/3 = 3       9
#   c      3       5      5     30   1  |   2     -              2/1 = 2       2
RECORDS = [
    RequestRecord("a", 1.0, 2.0, 6.0, 10, 5, num_preemptions=0),
    RequestRecord("b", 2.0, 5.0, 11.0, 20, 3, num_preemptions=2),
    RequestRecord("c", 3.0, 5.0, 5.0, 30, 1, num_preemptions=1, finish_reason="stop"),
]

# time_s, token_budget, decode, prefill, running, waiting, pages
STEPS = [
    StepRecord(1.0, 8, 0, 8, 1, 3, 2),
    StepRecord(2.0, 8, 2, 6, 2, 2, 4),
    StepRecord(4.0, 8, 4, 0, 4, 0, 6),
    StepRecord(5.0, 16, 4, 0, 4, 0, 8),
]


def test_throughputs_are_tokens_over_the_time_from_first_arrival_to_last_finish():
    summary = summarize(RECORDS)
    assert summary["duration_s"] == 10
    assert summary["num_requests"] == 3
    assert (summary["num_input_tokens"], summary["num_output_tokens"]) == (60, 9)
    assert summary["total_tokens_per_s"] == 6.9
    assert summary["input_tokens_per_s"] == 6.0
    assert summary["output_tokens_per_s"] == 0.9
    assert summary["request_throughput_per_s"] == 0.3
    assert summary["num_preemptions"] == 3


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ttft_s", [1, 3, 2]),
        ("tpot_s", [1, 3]),
        ("normalized_latency_s_per_token", [1, 3, 2]),
        ("e2e_latency_s", [5, 9, 2]),
    ],
)
def test_latencies_are_means_and_percentiles_over_requests(name, values):
    summary = summarize(RECORDS)
    assert summary[f"{name}_mean"] == pytest.approx(sum(values) / len(values))
    assert summary[f"{name}_p50"] == pytest.approx(np.median(values))
    # Linear interpolation between ranks: rank q * (n - 1) of the sorted values.
    low, high = sorted(values)[-2:]
    for quantile in (0.9, 0.99):
        rank = quantile * (len(values) - 1)
        assert summary[f"{name}_p{round(100 * quantile)}"] == pytest.approx(
            low + (high - low) * (rank - (len(values) - 2))
        )


def test_normalized_latency_averages_ratios_and_is_no_ratio_of_averages():
    summary = summarize(RECORDS)
    assert summary["normalized_latency_s_per_token_mean"] == 2.0
    assert (5 + 9 + 2) / (5 + 3 + 1) != 2.0


def test_latencies_that_no_request_defines_are_none():
    one_token = summarize([RequestRecord("a", 0.0, 1.0, 1.0, 4, 1)])
    assert one_token["tpot_s_mean"] is None
    assert one_token["ttft_s_mean"] == 1.0
    nothing = summarize([RequestRecord("a", 0.0, math.nan, 1.0, 4, 0, finish_reason="aborted")])
    assert nothing["ttft_s_p99"] is None
    assert nothing["normalized_latency_s_per_token_mean"] is None
    assert nothing["e2e_latency_s_mean"] == 1.0


def test_percent_of_optimal_is_eq_5_with_the_measured_peak():
    # 138 FLOP/s and 10 parameters: optimum 138 / 20 = 6.9 tokens/s, which is what the run reached.
    summary = summarize(RECORDS, peak_flops=138.0, num_active_params=10)
    assert summary["optimal_tokens_per_s"] == pytest.approx(6.9)
    assert summary["percent_of_optimal"] == pytest.approx(100)
    assert "percent_of_optimal" not in summarize(RECORDS)


def test_eq_5_gives_the_papers_1857_tokens_per_s():
    # Section 3.5, LLaMA-2-70B on an A100: 1857 follows from a measured peak of 260e12, not from the printed 280e12.
    assert optimal_tokens_per_s(260e12, 70_000_000_000) == pytest.approx(1857, abs=0.5)
    with pytest.raises(ValueError, match="peak_flops=0"):
        optimal_tokens_per_s(0.0, 1)


def test_step_statistics_are_plain_means_and_ratios_of_sums():
    summary = summarize(RECORDS, STEPS, num_pages=16)
    assert summary["num_steps"] == 4
    assert summary["tokens_per_step_mean"] == (8 + 8 + 4 + 4) / 4
    assert summary["decode_tokens_per_step_mean"] == (0 + 2 + 4 + 4) / 4
    assert summary["prefill_tokens_per_step_mean"] == (8 + 6) / 4
    assert summary["budget_fill_fraction"] == 24 / 40
    assert summary["num_running_mean"] == 11 / 4
    assert summary["num_waiting_mean"] == 5 / 4
    assert (summary["pages_in_use_mean"], summary["pages_in_use_max"]) == (5, 8)
    assert summary["page_occupancy_fraction_mean"] == 5 / 16
    assert summary["page_occupancy_fraction_max"] == 0.5


def test_metrics_are_plain_numbers_or_none():
    summary = summarize(RECORDS, STEPS, peak_flops=1e12, num_active_params=10**9, num_pages=16)
    assert {type(value) for value in summary.values()} <= {int, float, type(None)}


def test_steady_state_estimator_counts_retired_requests_and_floors_the_trace_means():
    # a (6 s) and b (11 s) finish in (5, 11], c (5 s) does not; 2 * (20 + 3) / 6 s / 2 devices.
    tokens_per_s = steady_state_tokens_per_s(
        RECORDS, 5.0, 11.0, mean_input_len=20.9, mean_output_len=3.9, num_devices=2
    )
    assert tokens_per_s == pytest.approx(2 * 23 / 6 / 2)
    with pytest.raises(ValueError, match="empty"):
        steady_state_tokens_per_s(RECORDS, 5.0, 5.0, mean_input_len=1.0, mean_output_len=1.0)


def test_step_series_reads_rates_and_counts_off_the_steps():
    # Five bins of 1 s: the third step runs from 2 s to 4 s, so its 4 tokens are 2 per second in two bins.
    series = step_series(STEPS, num_bins=5)
    assert series["time_s"] == pytest.approx([0.5, 1.5, 2.5, 3.5, 4.5])
    assert series["decode_tokens_per_s"] == pytest.approx([0, 2, 2, 2, 4])
    assert series["prefill_tokens_per_s"] == pytest.approx([8, 6, 0, 0, 0], abs=1e-9)
    assert series["num_running"] == [1, 2, 4, 4, 4]
    assert series["num_waiting"] == [3, 2, 0, 0, 0]
    assert series["pages_in_use"] == [2, 4, 6, 6, 8]


@pytest.mark.parametrize("num_bins", [1, 3, 7, 100])
def test_step_series_loses_no_token(num_bins):
    series = step_series(STEPS, start_s=0.5, num_bins=num_bins)
    width_s = 4.5 / num_bins
    assert sum(series["decode_tokens_per_s"]) * width_s == pytest.approx(10)
    assert sum(series["prefill_tokens_per_s"]) * width_s == pytest.approx(14)


def test_nothing_to_summarize_is_a_clear_error():
    with pytest.raises(ValueError, match="at least 1 RequestRecord, got 0"):
        summarize([])
    with pytest.raises(ValueError, match=r"took 0\.0 s"):
        summarize([RequestRecord("a", 1.0, 1.0, 1.0, 4, 1)])
    with pytest.raises(ValueError, match="at least 1 StepRecord, got 0"):
        step_series([])
    with pytest.raises(ValueError, match=r"after start_s=9\.0"):
        step_series(STEPS, start_s=9.0)


def test_times_that_run_backwards_are_refused():
    with pytest.raises(ValueError, match=r"'late'.*backwards"):
        RequestRecord("late", 5.0, 4.0, 6.0, 1, 1)
    with pytest.raises(ValueError, match="backwards"):
        RequestRecord("nan", 0.0, math.nan, 1.0, 1, 1)
    with pytest.raises(ValueError, match="output_len=-1"):
        RequestRecord("negative", 0.0, 1.0, 2.0, 1, -1)
