"""What does the engine have to serve?  Requests, traces of real services, length statistics, arrival processes.

A `Trace` is lengths and arrival times (numpy, on the host); a `Request` adds prompt tokens and sampling parameters.

    trace, dropped = nanoflow_filter(load_trace(path))      # or table4_trace("sharegpt", n, rng)
    trace = with_arrivals(trace, poisson_arrivals(len(trace), rate_per_s=8.0, rng=rng))
    requests = synthetic_requests(trace, vocab_size, rng)
"""

from nanojax.workload.arrivals import burst_arrivals, gamma_arrivals, poisson_arrivals, replay_arrivals, with_arrivals
from nanojax.workload.filters import length_filter, nanoflow_filter, sample, scale_lengths
from nanojax.workload.lengths import (
    PAPER_TABLE_4,
    LengthStatistics,
    constant_trace,
    lognormal_trace,
    table4_trace,
    trace_statistics,
)
from nanojax.workload.load import load_trace
from nanojax.workload.request import Request, SamplingParams, Trace
from nanojax.workload.rounds import Rounds, conversation_rounds
from nanojax.workload.sharegpt import Conversation, find_sharegpt, read_conversations
from nanojax.workload.synthetic import recorded_requests, synthetic_requests

__all__ = [
    "PAPER_TABLE_4", "Conversation", "LengthStatistics", "Request", "Rounds", "SamplingParams", "Trace",
    "burst_arrivals", "constant_trace", "conversation_rounds", "find_sharegpt", "gamma_arrivals", "length_filter", "load_trace",
    "lognormal_trace", "nanoflow_filter", "poisson_arrivals", "read_conversations", "recorded_requests",
    "replay_arrivals", "sample", "scale_lengths", "synthetic_requests", "table4_trace", "trace_statistics",
    "with_arrivals",
]  # fmt: skip
