"""What is one request, and what is a trace of them?"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float64, Int64

__all__ = ["Request", "SamplingParams", "Trace"]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token of a request is drawn, and when the request ends.

    temperature: 0 is greedy.    top_k: keep the k most likely tokens; 0 is off.    top_p: nucleus mass; 1 is off.
    seed: names the request's random stream.    max_tokens: new tokens at most.
    stop_tokens: token ids that end the request.    stop: strings that end it (looked for in the text, on the host).
    ignore_eos: go on after the end-of-sequence token, for output lengths that are fixed in advance.
    logprobs: also report the log-probability of each new token.

    Raises ValueError, naming the field, its value and the limit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 128
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        limits = {
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, "finite and >= 0"),
            "top_k": (0 <= self.top_k < 2**31, "in [0, 2**31) (0 is off)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "seed": (0 <= self.seed < 2**32, "in [0, 2**32)"),
            "max_tokens": (self.max_tokens >= 1, ">= 1"),
            "stop_tokens": (all(token >= 0 for token in self.stop_tokens), "token ids >= 0"),
            "stop": ("" not in self.stop, "non-empty strings"),
        }
        for field, (is_valid, limit) in limits.items():
            if not is_valid:
                raise ValueError(f"{field}={getattr(self, field)!r} must be {limit}")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    prompt_ids: token ids, at least one.    arrival_s: seconds since the start of the run.
    expected_output_len: tokens that the request will produce, where it is known (a replayed trace); the scheduler's
        forecast of the peak page demand may use it, generation does not.

    Raises ValueError for an empty prompt or an arrival before 0.  Limits of an engine (longest prompt, vocabulary)
    are the engine's to check.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    arrival_s: float = 0.0
    expected_output_len: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(f"request {self.request_id!r}: the prompt has 0 tokens, at least 1 is needed")
        if not self.arrival_s >= 0:
            raise ValueError(f"request {self.request_id!r}: arrival_s={self.arrival_s} must be >= 0")


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Lengths and arrivals of `n` requests, in order of arrival.

    arrival_s: seconds since the first request could arrive; all 0 where the source has no time stamps.
    input_lens, output_lens: tokens.
    prefix_blocks: per request the ids of its prompt's blocks of `prefix_block_len` tokens (the last one may be
        partial); two requests share a prefix as far as their ids agree.  None where the source does not tell.
    prompt_ids: per request the recorded prompt tokens.  None where the source has lengths only.

    Raises ValueError when the fields disagree in length, arrivals are not sorted from >= 0, or a length is negative.
    """

    name: str
    arrival_s: Float64[np.ndarray, "n"]
    input_lens: Int64[np.ndarray, "n"]
    output_lens: Int64[np.ndarray, "n"]
    prefix_blocks: tuple[tuple[int, ...], ...] | None = None
    prefix_block_len: int = 512
    prompt_ids: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for field in ("input_lens", "output_lens", "prefix_blocks", "prompt_ids"):
            column = getattr(self, field)
            if column is not None and len(column) != len(self):
                raise ValueError(f"trace {self.name!r}: {field} has {len(column)} entries, arrival_s has {len(self)}")
        for field in ("input_lens", "output_lens"):
            if len(self) and getattr(self, field).min() < 0:
                raise ValueError(f"trace {self.name!r}: {field} holds {getattr(self, field).min()}, lengths are >= 0")
        if self.prompt_ids is not None and any(map(int.__ne__, map(len, self.prompt_ids), self.input_lens.tolist())):
            raise ValueError(f"trace {self.name!r}: prompt_ids disagree with input_lens")
        # `not >=` rather than `<`, so that a NaN is refused too.
        if len(self) and not (self.arrival_s[0] >= 0 and np.all(np.diff(self.arrival_s) >= 0)):
            raise ValueError(f"trace {self.name!r}: arrival_s must be sorted and start at >= 0 s")
        if self.prefix_block_len < 1:
            raise ValueError(f"trace {self.name!r}: prefix_block_len={self.prefix_block_len} must be >= 1")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def select(self, idx: Int64[np.ndarray, "m"]) -> "Trace":
        """The requests `idx` (ascending), with everything that is known of them."""

        def pick(column):
            return None if column is None else tuple(column[i] for i in idx)

        return dataclasses.replace(
            self, arrival_s=self.arrival_s[idx], input_lens=self.input_lens[idx], output_lens=self.output_lens[idx],
            prefix_blocks=pick(self.prefix_blocks), prompt_ids=pick(self.prompt_ids),
        )  # fmt: skip
