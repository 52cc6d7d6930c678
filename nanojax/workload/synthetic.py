"""How does a trace become requests?  Random prompts with exact output lengths, or the prompts that were recorded."""

import dataclasses

import numpy as np

from nanojax.workload.request import Request, SamplingParams, Trace

__all__ = ["recorded_requests", "synthetic_requests"]

GREEDY = SamplingParams()


def synthetic_requests(
    trace: Trace, vocab_size: int, rng: np.random.Generator, sampling: SamplingParams = GREEDY
) -> list[Request]:
    """Requests with uniformly random prompt ids and the exact output lengths of the trace.

    Output lengths are forced (`ignore_eos`, `max_tokens`), as in the paper's measurements; `seed` becomes
    `sampling.seed + position in the trace`.  With `trace.prefix_blocks`, equal blocks get equal tokens, so prefixes
    are shared exactly as recorded.  Request ids are `<trace name>-<position>`.
    Raises ValueError for a length of 0 (use `length_filter` first).
    """
    _check_lengths(trace, vocab_size)
    if trace.prefix_blocks is None:
        flat = rng.integers(0, vocab_size, int(trace.input_lens.sum()))
        prompts = np.split(flat, np.cumsum(trace.input_lens)[:-1])
    else:
        blocks = {
            block: rng.integers(0, vocab_size, trace.prefix_block_len)
            for block in dict.fromkeys(block for row in trace.prefix_blocks for block in row)
        }
        prompts = [
            np.concatenate([blocks[block] for block in row])[:input_len]
            for row, input_len in zip(trace.prefix_blocks, trace.input_lens, strict=True)
        ]
    return _requests(trace, [tuple(prompt.tolist()) for prompt in prompts], sampling)


def recorded_requests(trace: Trace, vocab_size: int, sampling: SamplingParams = GREEDY) -> list[Request]:
    """Requests with the prompts that the trace recorded and its exact output lengths.

    Raises ValueError for a trace without prompts, a length of 0, or a token id that is not below `vocab_size`.
    """
    if trace.prompt_ids is None:
        raise ValueError(f"trace {trace.name!r} recorded no prompts; use synthetic_requests")
    _check_lengths(trace, vocab_size)
    largest = max((max(prompt, default=0) for prompt in trace.prompt_ids), default=0)
    if largest >= vocab_size:
        raise ValueError(f"trace {trace.name!r} holds token id {largest}, the vocabulary has {vocab_size} tokens")
    return _requests(trace, list(trace.prompt_ids), sampling)


def _check_lengths(trace: Trace, vocab_size: int) -> None:
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} must be >= 1")
    for name, lens in (("input", trace.input_lens), ("output", trace.output_lens)):
        if len(lens) and lens.min() < 1:
            raise ValueError(
                f"trace {trace.name!r}: request {lens.argmin()} has {name} length 0; drop it with length_filter"
            )
    if trace.prefix_blocks is not None:
        covered = np.array([len(row) for row in trace.prefix_blocks], np.int64) * trace.prefix_block_len
        if np.any(covered < trace.input_lens):
            idx = int(np.argmax(covered < trace.input_lens))
            raise ValueError(
                f"trace {trace.name!r}: the prefix blocks of request {idx} hold {covered[idx]} tokens, "
                f"its input has {trace.input_lens[idx]}"
            )


def _requests(trace: Trace, prompts: list[tuple[int, ...]], sampling: SamplingParams) -> list[Request]:
    return [
        Request(
            request_id=f"{trace.name}-{idx}",
            prompt_ids=prompt,
            sampling=dataclasses.replace(
                sampling, max_tokens=int(output_len), ignore_eos=True, seed=sampling.seed + idx
            ),
            arrival_s=float(arrival_s),
            expected_output_len=int(output_len),
        )
        for idx, (prompt, output_len, arrival_s) in enumerate(
            zip(prompts, trace.output_lens, trace.arrival_s, strict=True)
        )
    ]
