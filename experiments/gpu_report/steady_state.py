"""How many tokens per second does the engine serve in a steady state, offline?  Measured without the minutes that lead there.

The engine starts in the middle (`Engine.start_in_the_middle`): as many requests as a full batch has, each at another point
of its output, as if their prompts had been computed; a queue of fresh requests that never empties takes the place of those
that end.  A step then has decode rows and prefill tokens in the proportion that serving has from its second minute on.  The
weights are random, so nothing is lost by keys and values that are.  Counted are the tokens of all steps in a window, after
some that are left out.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanojax.config import ModelConfig
from nanojax.metrics import StepRecord
from nanojax.serve import Engine
from nanojax.workload import PAPER_TABLE_4, Request, SamplingParams, table4_trace

NUM_PARTS = 10
"""Equal parts of the window; the rate's spread is that of the parts."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Prompt and output lengths to draw requests from, in tokens.    name: `512/512`, or a dataset's."""

    name: str
    input_lens: np.ndarray
    output_lens: np.ndarray

    @property
    def max_len(self) -> int:
        """The longest prompt with its output."""
        return int((self.input_lens + self.output_lens).max())

    @property
    def mean_resident_len(self) -> float:
        """Tokens in the cache of a running request, on average over time: long outputs stay longer."""
        weights = self.output_lens / self.output_lens.sum()
        return float(np.sum(weights * (self.input_lens + self.output_lens / 2)))

    @property
    def tokens_per_decode(self) -> float:
        """Tokens that a step computes for each row that decodes: one, and the prompts that keep the rows coming."""
        return 1.0 + float(self.input_lens.sum() / self.output_lens.sum())


@dataclasses.dataclass(frozen=True)
class Plan:
    """Capacities for a steady state: `num_decode` running requests, steps of `token_budget` tokens."""

    num_decode: int
    token_budget: int
    num_slots: int
    num_pages: int
    max_len: int


def lengths(name: str, *, max_len: int, seed: int = 0, num_drawn: int = 4096) -> Lengths:
    """`"512/512"`, or a dataset of the paper's Table 4 without what is longer than `max_len`.

    Raises ValueError for another name, or when nothing is left.
    """
    if name in PAPER_TABLE_4:
        trace = table4_trace(name, num_drawn, np.random.default_rng(seed))
        fits = trace.input_lens + trace.output_lens <= max_len
        if not fits.any():
            raise ValueError(f"{name} has no request of at most {max_len} tokens")
        return Lengths(name, np.maximum(trace.input_lens[fits], 1), np.maximum(trace.output_lens[fits], 1))
    try:
        input_len, output_len = map(int, name.split("/"))
    except ValueError as error:
        raise ValueError(f"{name!r} is neither IN/OUT nor one of {', '.join(PAPER_TABLE_4)}") from error
    return Lengths(name, np.full(64, input_len), np.full(64, output_len))


def plan(
    found: Lengths, model: ModelConfig, *, max_budget: int, kv_bytes: float, page_size: int, spare_slots: int = 16
) -> Plan:
    """The fullest steady state that fits: steps of at most `max_budget` tokens, a cache of `kv_bytes` (2 bytes a value).

    Pages are counted with the half page that each request wastes and a tenth to spare, so that nothing is preempted.
    Raises ValueError when no request fits.
    """
    token_bytes = 2 * model.kv_values_per_token
    num_pages = int(kv_bytes // (token_bytes * page_size))
    tokens_of_one = 1.1 * (found.mean_resident_len + page_size / 2)
    by_memory = int(num_pages * page_size / tokens_of_one)
    num_decode = min(int(max_budget / found.tokens_per_decode), by_memory)
    if num_decode < 1:
        raise ValueError(f"no request of {found.name} fits into {kv_bytes:.3g} bytes and {max_budget} tokens")
    grid = 128 if max_budget >= 512 else 8
    budget = min(grid * math.ceil(num_decode * found.tokens_per_decode / grid), max_budget)
    pages_per_slot = -(-found.max_len // page_size)
    return Plan(num_decode, budget, num_decode + spare_slots, max(num_pages, pages_per_slot), found.max_len)


def residents(found: Lengths, num_decode: int, rng: np.random.Generator) -> list[Request]:
    """Requests at uniformly spread points of their outputs, the longer ones more often, as one finds them at any time."""
    weights = found.output_lens / found.output_lens.sum()
    chosen = rng.choice(len(weights), num_decode, p=weights)
    progress = (rng.permutation(num_decode) + 0.5) / num_decode
    requests = []
    for i, (row, fraction) in enumerate(zip(chosen, progress, strict=True)):
        input_len, output_len = int(found.input_lens[row]), int(found.output_lens[row])
        done = min(int(fraction * output_len), output_len - 1)
        requests.append(_request(f"resident-{i}", input_len + done, output_len - done))
    return requests


def fresh(found: Lengths, rng: np.random.Generator) -> Iterator[Request]:
    """Requests without end."""
    for i in itertools.count():
        row = rng.integers(len(found.input_lens))
        yield _request(f"fresh-{i}", int(found.input_lens[row]), int(found.output_lens[row]))


def serve(
    engine: Engine, found: Lengths, num_decode: int, *, num_warm_steps: int, num_steps: int, max_s: float, seed: int = 0
) -> list[StepRecord]:
    """Steps of a steady state: `num_steps` of them, or as many as end within `max_s`, after `num_warm_steps` that do not count.

    The engine must be compiled and idle; it is left in the middle of its work.
    """
    rng = np.random.default_rng(seed)
    queue = fresh(found, rng)
    engine.reset_metrics()
    engine.start_in_the_middle(residents(found, num_decode, rng))
    start_s = time.monotonic()
    while len(engine.steps) < num_warm_steps + num_steps and time.monotonic() - start_s < max_s:
        while engine.num_unfinished < engine.config.num_slots + 8:
            engine.submit(next(queue))
        engine.poll()
    return engine.steps[num_warm_steps:]


def metrics(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """Rates over the launches after the first, which says when the second began; their spread over `NUM_PARTS` parts.

    Raises ValueError with fewer than 3 launches.
    """
    tokens_at: dict[float, int] = {}  # steps of one launch are read, and dated, together
    for step in steps:
        tokens_at[step.time_s] = tokens_at.get(step.time_s, 0) + step.num_decode_tokens + step.num_prefill_tokens
    if len(tokens_at) < 3:
        raise ValueError(f"{len(steps)} steps in {len(tokens_at)} launches are too few for a rate")
    times, tokens = np.array(list(tokens_at)), np.array(list(tokens_at.values()))[1:]
    taken_s = np.diff(times)
    num_steps = sum(step.time_s > times[0] for step in steps)
    parts = np.array_split(np.arange(len(tokens)), min(NUM_PARTS, len(tokens)))
    rates = [float(tokens[part].sum() / taken_s[part].sum()) for part in parts]
    return {
        "total_tokens_per_s": float(tokens.sum() / taken_s.sum()),
        "low_tokens_per_s": min(rates),
        "high_tokens_per_s": max(rates),
        "num_steps": num_steps,
        "duration_s": float(taken_s.sum()),
        "step_median_s": float(np.median(taken_s)) * len(tokens) / num_steps,
        "decode_tokens_mean": float(np.mean([step.num_decode_tokens for step in steps[1:]])),
        "prefill_tokens_mean": float(np.mean([step.num_prefill_tokens for step in steps[1:]])),
        "pages_in_use_max": max(step.pages_in_use for step in steps),
    }


def _request(name: str, input_len: int, output_len: int) -> Request:
    """Token ids mean nothing to random weights; greedy, and no token ends it."""
    prompt = tuple((np.arange(input_len) % 251 + 1).tolist())
    return Request(name, prompt, SamplingParams(max_tokens=output_len, ignore_eos=True), expected_output_len=output_len)
