"""How does a request get onto the device?  Checked against the engine's limits, then as rows of arrays.  Pure functions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanojax.config import EngineConfig, ModelConfig
from nanojax.engine import Arrivals
from nanojax.sampling import NO_TOKEN
from nanojax.workload import Request

LOAD_ROWS = 8
"""Requests that one `engine.load` carries; each row holds a whole prompt buffer."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A request on its way into `slot`.  `serial` names it on the device and says which came first."""

    serial: int
    slot: int
    request: Request
    stop_tokens: tuple[int, ...]


def check(
    config: EngineConfig, model: ModelConfig, request: Request, stop_tokens: Sequence[int], *, can_decode: bool
) -> None:
    """Raises ValueError, naming the value and the limit, if an engine of these capacities can never serve `request`.

    stop_tokens: all that end it, end-of-sequence included.  can_decode: there is a tokenizer to turn tokens into text.
    """
    who, how = f"request {request.request_id!r}", request.sampling
    total = len(request.prompt_ids) + how.max_tokens
    if total > config.max_len:
        raise ValueError(
            f"{who}: prompt of {len(request.prompt_ids)} tokens plus max_tokens={how.max_tokens} exceeds "
            f"max_len={config.max_len}"
        )
    num_pages = -(-total // config.page_size)
    if num_pages > config.num_pages:
        raise ValueError(f"{who}: needs {num_pages} pages at its longest, the pool has num_pages={config.num_pages}")
    for name, ids in (("prompt token", request.prompt_ids), ("stop token", how.stop_tokens)):
        unknown = next((i for i in ids if not 0 <= i < model.vocab_size), None)
        if unknown is not None:
            raise ValueError(f"{who}: {name} {unknown} is outside the vocabulary [0, {model.vocab_size})")
    if len(stop_tokens) > config.max_stop_tokens:
        raise ValueError(
            f"{who}: {len(stop_tokens)} stop tokens (end-of-sequence included) exceed "
            f"max_stop_tokens={config.max_stop_tokens}"
        )
    asked = {
        "random": ("temperature", how.temperature > 0), "top": ("top_k or top_p", how.top_k > 0 or how.top_p < 1),
        "logprobs": ("logprobs", how.logprobs),
    }  # fmt: skip
    for part, (what, is_asked) in asked.items():
        if is_asked and not getattr(config.sampling, part):
            raise ValueError(f"{who}: asks for {what}, which this engine was not made for: sampling={config.sampling}")
    if how.stop and not can_decode:
        raise ValueError(f"{who}: stop strings {how.stop} need a tokenizer")


def arrivals(config: EngineConfig, rows: Sequence[Row]) -> Arrivals:
    """Up to `LOAD_ROWS` rows as arrays, the rest padding."""
    tokens: Any = np.zeros((LOAD_ROWS, config.max_len), np.int32)
    stop_tokens: Any = np.full((LOAD_ROWS, config.max_stop_tokens), NO_TOKEN, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.request.prompt_ids)] = row.request.prompt_ids
        stop_tokens[i, : len(row.stop_tokens)] = row.stop_tokens

    def column(values, fill, dtype: Any = np.int32) -> Any:
        return np.array([*values, *[fill] * (LOAD_ROWS - len(rows))], dtype)

    how = [row.request.sampling for row in rows]
    prompt_lens = [len(row.request.prompt_ids) for row in rows]
    expected = [row.request.expected_output_len or row.request.sampling.max_tokens for row in rows]
    serials = [row.serial for row in rows]
    return Arrivals(
        slot=column([row.slot for row in rows], config.num_slots),
        request_id=column(serials, -1),
        arrival=column(serials, 0),
        tokens=tokens,
        prompt_len=column(prompt_lens, 0),
        max_tokens=column([n + h.max_tokens for n, h in zip(prompt_lens, how, strict=True)], 0),
        expected_tokens=column([n + e for n, e in zip(prompt_lens, expected, strict=True)], 0),
        temperature=column([h.temperature for h in how], 0.0, np.float32),
        top_k=column([h.top_k for h in how], 0),
        top_p=column([h.top_p for h in how], 1.0, np.float32),
        seed=column([h.seed for h in how], 0, np.uint32),
        stop_tokens=stop_tokens,
        wants_logprob=column([h.logprobs for h in how], False, bool),
    )
