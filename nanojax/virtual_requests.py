"""Which requests are simulated, when do they come, and what became of them?  A trace as arrays, and its books.

Requests keep their row from beginning to end; the slots of the scheduler name rows.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from nanojax import scheduler, virtual_clock
from nanojax.array_types import Array, Bool, Float32, Int32
from nanojax.scheduler import Policy, SchedulerState
from nanojax.virtual_clock import Seconds

NO_REQUEST = jnp.iinfo(jnp.int32).max


@flax.struct.dataclass
class TraceArrays:
    """Requests to simulate.  A row that never arrives (at infinity) is padding, or waits for its conversation's last round."""

    arrival: Seconds
    input_len: Int32[Array, "*n"]
    output_len: Int32[Array, "*n"]
    max_tokens: Int32[Array, "*n"]
    """Prompt and output at most, as the scheduler is told."""
    offloaded_len: Int32[Array, "*n"]
    """Leading prompt tokens whose keys and values an earlier round has left in the offload tier."""
    next_round: Int32[Array, "*n"] | None
    """The request that this one's user sends next, `n` for none.  None: there are no conversations, rows ascend in arrival."""
    think_s: Float32[Array, "*n"] | None
    """Seconds from the end of the round before to this request's arrival."""


@flax.struct.dataclass
class Requests:
    """What has become of each request so far; infinite times have not come."""

    arrival: Seconds
    first_token: Seconds
    finish: Seconds
    num_preemptions: Int32[Array, "*n"]
    is_loaded: Bool[Array, "*n"]


def init(trace: TraceArrays) -> Requests:
    """Nothing has happened."""
    num_requests = trace.input_len.shape[0]

    def never() -> Seconds:
        return Seconds(high=jnp.full((num_requests,), jnp.inf), low=jnp.zeros((num_requests,)))

    return Requests(
        arrival=jax.tree.map(jnp.array, trace.arrival), first_token=never(), finish=never(),
        num_preemptions=jnp.zeros((num_requests,), jnp.int32), is_loaded=jnp.zeros((num_requests,), bool),
    )  # fmt: skip


def next_arrival(requests: Requests) -> Seconds:
    """When the earliest request comes that has no slot yet; never if there is none."""
    high = jnp.min(jnp.where(requests.is_loaded, jnp.inf, requests.arrival.high))
    is_first = ~requests.is_loaded & (requests.arrival.high == high)
    low = jnp.min(jnp.where(is_first, requests.arrival.low, jnp.inf))
    return Seconds(high=high, low=jnp.where(jnp.isfinite(high), low, 0.0))


def head_of_queue(
    priority: Int32[Array, "n"], requests: Requests, is_loaded: Bool[Array, "n"], seen: Seconds
) -> Int32[Array, ""]:
    """Of the requests that have come by `seen` and have no slot, the first by priority, then arrival; or `NO_REQUEST`."""
    wait_s = virtual_clock.elapsed_s(requests.arrival, seen)
    # Three minima, each one vectorised pass; an argmin is 30 times slower on a CPU.
    is_next = ~is_loaded & (wait_s <= 0)
    is_next &= priority == jnp.min(jnp.where(is_next, priority, NO_REQUEST))
    is_next &= wait_s == jnp.min(jnp.where(is_next, wait_s, jnp.inf))
    return jnp.min(jnp.where(is_next, jnp.arange(wait_s.shape[0], dtype=jnp.int32), NO_REQUEST))


def priorities(policy: Policy, trace: TraceArrays) -> Int32[Array, "n"]:
    """The policy's rank of each request while it has no slot; who came first is told by the clock, not by the rank."""
    num_requests = trace.input_len.shape[0]
    zeros = jnp.zeros((num_requests,), jnp.int32)
    as_slots: SchedulerState = dataclasses.replace(
        scheduler.init(num_requests), request_id=jnp.arange(num_requests, dtype=jnp.int32), num_tokens=trace.input_len,
        num_computed=zeros, prompt_len=trace.input_len, max_tokens=trace.max_tokens,
        expected_tokens=trace.input_len + trace.output_len, arrival=zeros,
    )  # fmt: skip
    return policy.priority(as_slots)


def book(
    trace: TraceArrays,
    requests: Requests,
    row: Int32[Array, "S"],
    end: Seconds,
    is_first: Bool[Array, "S"],
    is_last: Bool[Array, "S"],
    preempted: Bool[Array, "S"],
) -> Requests:
    """Notes first tokens, ends and preemptions of the slots' rows, and when the users of finished rounds will be back."""
    num_requests = requests.is_loaded.shape[0]

    def note(times: Seconds, mask: Bool[Array, "S"]) -> Seconds:
        place = jnp.where(mask, row, num_requests)
        return jax.tree.map(lambda old, new: old.at[place].set(new, mode="drop"), times, end)

    arrival = requests.arrival
    if trace.next_round is not None and trace.think_s is not None:
        follower = jnp.where(is_last, trace.next_round[row], num_requests)
        due = virtual_clock.later(end, trace.think_s[jnp.minimum(follower, num_requests - 1)])
        arrival = jax.tree.map(lambda old, new: old.at[follower].set(new, mode="drop"), arrival, due)
    return dataclasses.replace(
        requests,
        arrival=arrival,
        first_token=note(requests.first_token, is_first),
        finish=note(requests.finish, is_last),
        num_preemptions=requests.num_preemptions.at[jnp.where(preempted, row, num_requests)].add(1, mode="drop"),
    )
