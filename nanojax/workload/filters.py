"""Which requests of a trace are run?  Filters that count what they drop, sampling, and scaling to small models."""

import dataclasses

import numpy as np

from nanojax.workload.request import Trace

__all__ = ["length_filter", "nanoflow_filter", "sample", "scale_lengths"]


def length_filter(
    trace: Trace,
    *,
    max_len: int | None = None,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
    min_input_len: int = 1,
    min_output_len: int = 1,
) -> tuple[Trace, dict[str, int]]:
    """Drops the requests that exceed a limit (all in tokens; None is no limit; `max_len` is input + output).

    Returns the rest and how many requests each limit dropped, keyed by the limit's name.  A request that breaks
    several counts for the first of them in the order of the signature, so the counts add up.
    """
    limits = {
        "max_len": None if max_len is None else trace.input_lens + trace.output_lens <= max_len,
        "max_input_len": None if max_input_len is None else trace.input_lens <= max_input_len,
        "max_output_len": None if max_output_len is None else trace.output_lens <= max_output_len,
        "min_input_len": trace.input_lens >= min_input_len,
        "min_output_len": trace.output_lens >= min_output_len,
    }
    is_kept = np.ones(len(trace), bool)
    dropped = {}
    for name, passes in limits.items():
        if passes is not None:
            dropped[name] = int(np.sum(is_kept & ~passes))
            is_kept &= passes
    return trace.select(np.flatnonzero(is_kept)), dropped


def nanoflow_filter(trace: Trace) -> tuple[Trace, dict[str, int]]:
    """The filter that the paper's data sets went through: input + output <= 4096, input <= 3072, output <= 1024.

    The trace that is run thus differs from the paper's Table 4: Splitwise has a mean input of 850, not 1155, tokens.
    Source: efeslab/Nanoflow, datasets/utils (described, not copied).
    """
    return length_filter(trace, max_len=4096, max_input_len=3072, max_output_len=1024)


def sample(trace: Trace, num_requests: int, rng: np.random.Generator) -> Trace:
    """`num_requests` distinct requests, uniformly drawn, still in order of arrival."""
    if not 0 <= num_requests <= len(trace):
        raise ValueError(f"num_requests={num_requests} must be in [0, {len(trace)}], the size of trace {trace.name!r}")
    return trace.select(np.sort(rng.choice(len(trace), num_requests, replace=False)))


def scale_lengths(trace: Trace, divisor: int) -> Trace:
    """The trace for a smaller model: every length becomes `ceil(len / divisor)` tokens, arrivals stay.

    Prefix blocks shrink likewise (512 tokens / 32 = one page of 16), so who shares how many blocks with whom is
    unchanged.  Our own rule.  Raises ValueError when `divisor` does not divide the block length, and for a trace
    with recorded prompts, which cannot be scaled.
    """
    if divisor < 1 or (trace.prefix_blocks is not None and trace.prefix_block_len % divisor):
        raise ValueError(f"divisor={divisor} must be >= 1 and divide prefix_block_len={trace.prefix_block_len}")
    if trace.prompt_ids is not None:
        raise ValueError(f"trace {trace.name!r} has recorded prompts; drop them (prompt_ids=None) before scaling")
    return dataclasses.replace(
        trace,
        name=f"{trace.name}/{divisor}",
        input_lens=-(-trace.input_lens // divisor),
        output_lens=-(-trace.output_lens // divisor),
        prefix_block_len=trace.prefix_block_len // divisor
        if trace.prefix_blocks is not None
        else trace.prefix_block_len,
    )
