"""How do conversations go on?  Traces of several rounds, in which a prompt repeats all that was said before it."""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int64

from nanojax.workload.request import Trace

__all__ = ["Rounds", "conversation_rounds"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rounds:
    """Requests that belong to conversations; `n` requests in all, a conversation's rounds in order, one after another.

    arrival_s: of each conversation's first round, in order; infinity for the others, whose time depends on the service.
    input_lens: whole prompts in tokens, history included.    output_lens: tokens.
    history_lens: leading prompt tokens that the rounds before have computed: all but their last output token.
    next_round: index of the round that follows, -1 after the last.
    think_s: from the end of the round before to the arrival of this one; 0 for first rounds.
    """

    name: str
    arrival_s: Float64[np.ndarray, "n"]
    input_lens: Int64[np.ndarray, "n"]
    output_lens: Int64[np.ndarray, "n"]
    history_lens: Int64[np.ndarray, "n"]
    next_round: Int64[np.ndarray, "n"]
    think_s: Float64[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.arrival_s)


def conversation_rounds(
    trace: Trace, arrival_s: Float64[np.ndarray, "c"], *, num_rounds: int, think_s_mean: float, max_len: int,
    rng: np.random.Generator,
) -> Rounds:  # fmt: skip
    """Conversations of up to `num_rounds` rounds; the trace's requests in order are what each round adds.

    arrival_s: of the conversations' first rounds, sorted; conversation `i` takes requests `i * num_rounds` and on.
    think_s_mean: mean of the exponential time between an answer and the next question.
    max_len: a conversation ends before the round whose prompt and output would exceed it (in tokens); its first one must fit.
    Our own model: public traces rarely say which requests belong together.
    Raises ValueError for a trace that is too short, unsorted arrivals, or a first round that is too long.
    """
    num_needed = len(arrival_s) * num_rounds
    if num_rounds < 1 or len(trace) < num_needed:
        raise ValueError(
            f"{len(arrival_s)} conversations of num_rounds={num_rounds} need more than {len(trace)} requests"
        )
    if np.any(np.diff(arrival_s) < 0):
        raise ValueError("arrival_s must be sorted")
    shape = (len(arrival_s), num_rounds)
    new_lens, output_lens = (lens[:num_needed].reshape(shape) for lens in (trace.input_lens, trace.output_lens))
    totals = np.cumsum(new_lens + output_lens, axis=1)
    is_kept = totals <= max_len
    if not is_kept[:, 0].all():
        raise ValueError(
            f"trace {trace.name!r}: request {int(np.argmin(is_kept[:, 0])) * num_rounds} exceeds max_len={max_len}"
        )
    said_before = totals - new_lens - output_lens
    is_first = np.zeros(shape, bool)
    is_first[:, 0] = True
    is_followed = np.append(is_kept[:, 1:], np.zeros((len(arrival_s), 1), bool), axis=1)
    arrivals = np.where(is_first, arrival_s[:, None], np.inf)
    thinking = np.where(is_first, 0.0, rng.exponential(think_s_mean, shape))
    index = np.arange(is_kept.sum())
    return Rounds(
        name=f"{trace.name}-{num_rounds}rounds",
        arrival_s=arrivals[is_kept],
        input_lens=(said_before + new_lens)[is_kept],
        output_lens=output_lens[is_kept],
        history_lens=np.maximum(said_before - 1, 0)[is_kept],
        next_round=np.where(is_followed[is_kept], index + 1, -1),
        think_s=thinking[is_kept],
    )
