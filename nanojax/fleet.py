"""How do many engines serve together?  N replicas of the simulated engine behind a router.

Time runs in windows.  At the start of each the router hands out the requests that arrive in it, in order of arrival, by what it
knows: the loads that the replicas reported at the end of the last window, and what it has handed out since.  Then every
replica serves its own up to the end of the window, with the exact scheduler; replicas meet nowhere else, so a replica's
records are those of `nanojax.simulate` on its share of the trace.  What is traded for speed is the age of the loads (up to
`window_s`, as with real routers, which poll), and a user who comes back within a window is routed in the next one.
"""

import collections
import dataclasses
import enum
import functools
import heapq
from collections.abc import Callable, Iterable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64

from nanojax import virtual_clock, virtual_engine, virtual_run
from nanojax.array_types import Array, Bool, Int32
from nanojax.config import EngineConfig
from nanojax.invariants import InvariantError
from nanojax.scheduler import Policy
from nanojax.simulate import PLAIN_HOST, check
from nanojax.step_time import StepTime
from nanojax.virtual_clock import Seconds
from nanojax.virtual_engine import Host, SimulatorState
from nanojax.virtual_requests import Requests, TraceArrays
from nanojax.workload import Rounds, Trace

MIN_SLOTS = 64
"""What replicas start with."""


class Routing(enum.Enum):
    """Who gets the next request: the next in turn; the one with the fewest unfinished requests; the one that served the
    conversation's last round, unless it is overloaded (first rounds: the least loaded)."""

    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    PREFIX_AFFINITY = "prefix_affinity"


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """Replicas and router.

    window_s: how old the router's knowledge of loads can be.
    max_overload: prefix affinity goes elsewhere when the home replica has more than `max_overload` times the mean load, plus 1.
    chunk_size: replicas that one call of the compiled program advances, one after another.
    requests_per_replica: capacity of each replica's table of requests over the whole run; if None twice the mean, plus 16.
    """

    num_replicas: int
    routing: Routing = Routing.ROUND_ROBIN
    window_s: float = 1.0
    max_overload: float = 1.5
    chunk_size: int = 32
    requests_per_replica: int | None = None

    def __post_init__(self) -> None:
        for field in ("num_replicas", "window_s", "max_overload", "chunk_size"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be positive")


@dataclasses.dataclass(frozen=True, eq=False)
class FleetResult:
    """By request, in the order of the trace.  Infinite times have not come; `replica` is -1 for requests never routed.

    reused_len: prompt tokens that the replica got from its offload tier instead of computing them.
    num_steps: by replica.
    """

    arrival_s: Float64[np.ndarray, "n"]
    first_token_s: Float64[np.ndarray, "n"]
    finish_s: Float64[np.ndarray, "n"]
    replica: Int64[np.ndarray, "n"]
    reused_len: Int64[np.ndarray, "n"]
    num_steps: Int64[np.ndarray, "r"]


def simulate_fleet(
    config: EngineConfig,
    policy: Policy,
    step_time: StepTime,
    trace: Trace | Rounds,
    fleet: FleetConfig,
    *,
    duration_s: float,
    host: Host = PLAIN_HOST,
    run_all: Callable[[Callable, Iterable], Iterable] = map,
    on_window: Callable[[float, int], None] = lambda time_s, num_done: None,
) -> FleetResult:
    """Serves what arrives in `duration_s` seconds; requests that are not finished then stay unfinished.

    run_all: how the chunks of a window are run; `ThreadPoolExecutor(n).map` runs `n` at a time.
    on_window: hears the end of each window and how many requests are done.
    Raises ValueError for requests that the engine could never serve, and when a replica gets more than its table holds.
    """
    check(config, trace)
    router = _Router(trace, fleet, host.offloads_kv)
    chunks = []
    for start in range(0, fleet.num_replicas, fleet.chunk_size):
        replicas = range(start, min(start + fleet.chunk_size, fleet.num_replicas))
        num_slots = min(config.num_slots, MIN_SLOTS)
        chunks.append(_Chunk(replicas, num_slots, _init(config, num_slots, router.arrays(replicas))))
    reports: list[_Report] = []
    num_windows = int(np.ceil(duration_s / fleet.window_s))
    for window in range(1, num_windows + 1):
        end_s = min(window * fleet.window_s, duration_s)
        router.route(end_s)
        until = virtual_clock.from_float64(np.array(end_s))
        serve = functools.partial(_serve, config, policy, host, step_time, router, until)
        reports = list(run_all(serve, chunks))
        for chunk, report in zip(chunks, reports, strict=True):
            router.read(chunk.replicas, report)
        on_window(end_s, router.num_done)
    return router.result(reports)


@dataclasses.dataclass
class _Chunk:
    """Some replicas, and the arrays of their states on the device (a state as such has no batch dimension).

    All have as many slots as the one that needs most (`nanojax.virtual_run`).
    """

    replicas: range
    num_slots: int
    arrays: list[jax.Array]


class _Router:
    """What the router knows: tables of requests by replica and row, loads, who comes when."""

    def __init__(self, trace: Trace | Rounds, fleet: FleetConfig, has_offload: bool) -> None:
        self.trace, self.fleet, self.num_done = trace, fleet, 0
        rows = fleet.requests_per_replica or 2 * -(-len(trace) // fleet.num_replicas) + 16
        shape = (fleet.num_replicas, rows)
        self.has_offload = has_offload
        self.request = np.full(shape, -1)
        self.arrival_s = np.full(shape, np.inf)
        self.finish_s = np.full(shape, np.inf)
        self.lens = np.zeros((*shape, 3), np.int32)
        """Input, output and offloaded tokens."""
        self.num_assigned = np.zeros(fleet.num_replicas, np.int64)
        self.load = np.zeros(fleet.num_replicas, np.int64)
        self.replica = np.full(len(trace), -1)
        self.next_in_turn = 0
        first = np.flatnonzero(np.isfinite(trace.arrival_s))
        self.new = collections.deque(zip(trace.arrival_s[first].tolist(), first.tolist(), strict=True))
        self.returning: list[tuple[float, int]] = []
        self.previous = np.full(len(trace), -1)
        if isinstance(trace, Rounds):
            followed = np.flatnonzero(trace.next_round >= 0)
            self.previous[trace.next_round[followed]] = followed

    def route(self, end_s: float) -> None:
        """Hands out what arrives before `end_s`."""
        due = []
        while self.new and self.new[0][0] < end_s:
            due.append(self.new.popleft())
        while self.returning and self.returning[0][0] < end_s:
            due.append(heapq.heappop(self.returning))
        queue = [(load, i) for i, load in enumerate(self.load.tolist())]
        heapq.heapify(queue)
        total = int(self.load.sum())
        for arrival_s, request in sorted(due):
            replica = self._pick(request, queue, total)
            self._assign(replica, request, arrival_s)
            heapq.heappush(queue, (int(self.load[replica]), replica))
            total += 1

    def _pick(self, request: int, queue: list[tuple[int, int]], total: int) -> int:
        if self.fleet.routing is Routing.ROUND_ROBIN:
            self.next_in_turn += 1
            return (self.next_in_turn - 1) % self.fleet.num_replicas
        if self.fleet.routing is Routing.PREFIX_AFFINITY and self.previous[request] >= 0:
            home = int(self.replica[self.previous[request]])
            if self.load[home] <= self.fleet.max_overload * total / self.fleet.num_replicas + 1:
                return home
        while queue[0][0] != self.load[queue[0][1]]:
            heapq.heappop(queue)  # out of date: the replica has got a request since
        return heapq.heappop(queue)[1]

    def _assign(self, replica: int, request: int, arrival_s: float) -> None:
        row, trace = self.num_assigned[replica], self.trace
        if row == self.request.shape[1]:
            raise ValueError(f"replica {replica} got more requests than requests_per_replica={row}")
        before = self.previous[request]
        is_home = self.has_offload and before >= 0 and self.replica[before] == replica
        history_len = trace.history_lens[request] if is_home and isinstance(trace, Rounds) else 0
        self.request[replica, row], self.arrival_s[replica, row] = request, arrival_s
        self.lens[replica, row] = trace.input_lens[request], trace.output_lens[request], history_len
        self.replica[request] = replica
        self.num_assigned[replica] += 1
        self.load[replica] += 1

    def arrays(self, replicas: range) -> TraceArrays:
        """What those replicas have been given so far."""
        mine = slice(replicas.start, replicas.stop)
        input_len, output_len, offloaded_len = (jnp.asarray(self.lens[mine, :, i]) for i in range(3))
        return TraceArrays(
            arrival=virtual_clock.from_float64(self.arrival_s[mine]), input_len=input_len, output_len=output_len,
            max_tokens=input_len + output_len, offloaded_len=offloaded_len, next_round=None, think_s=None,
        )  # fmt: skip

    def read(self, replicas: range, report: "_Report") -> None:
        """Reads the loads of those replicas, and which users will come back."""
        if bool(np.any(report.is_stuck)):
            raise InvariantError(f"in one of the replicas {replicas} no request can move")
        mine = slice(replicas.start, replicas.stop)
        num_done = np.asarray(report.num_done)
        self.num_done += int(num_done.sum() - (self.num_assigned[mine] - self.load[mine]).sum())
        self.load[mine] = self.num_assigned[mine] - num_done
        if isinstance(self.trace, Rounds):
            finish_s = virtual_clock.to_float64(report.requests.finish)
            is_new = np.isfinite(finish_s) & ~np.isfinite(self.finish_s[mine])
            self.finish_s[mine] = finish_s
            for request, end_s in zip(self.request[mine][is_new].tolist(), finish_s[is_new].tolist(), strict=True):
                follower = int(self.trace.next_round[request])
                if follower >= 0:
                    heapq.heappush(self.returning, (end_s + float(self.trace.think_s[follower]), follower))

    def result(self, reports: list["_Report"]) -> FleetResult:
        """All replicas' tables, sorted back into the order of the trace."""
        known = self.request >= 0
        request = self.request[known]

        def by_request(table: np.ndarray, blank: int | float) -> np.ndarray:
            column = np.full(len(self.trace), blank, table.dtype)
            column[request] = table[known]
            return column

        first_token_s, finish_s = (
            np.concatenate([virtual_clock.to_float64(getattr(report.requests, name)) for report in reports])
            for name in ("first_token", "finish")
        )
        return FleetResult(
            arrival_s=by_request(self.arrival_s, np.inf),
            first_token_s=by_request(first_token_s, np.inf),
            finish_s=by_request(finish_s, np.inf),
            replica=self.replica,
            reused_len=by_request(self.lens[:, :, 2].astype(np.int64), 0),
            num_steps=np.concatenate([np.asarray(report.num_steps, np.int64) for report in reports]),
        )


@flax.struct.dataclass
class _Report:
    """What the router can read of the replicas of a chunk."""

    num_done: Int32[Array, "*n"]
    num_steps: Int32[Array, "*n"]
    is_stuck: Bool[Array, "*n"]
    is_short: Bool[Array, "*n"]
    """It stopped before the end of the window, for want of slots."""
    requests: Requests


def _serve(
    config: EngineConfig,
    policy: Policy,
    host: Host,
    step_time: StepTime,
    router: _Router,
    until: Seconds,
    chunk: _Chunk,
) -> _Report:
    """Advances a chunk to the end of the window."""
    traces = router.arrays(chunk.replicas)
    while True:
        chunk.arrays, report = _advance(config, policy, host, step_time, traces, until, chunk.arrays)
        if not np.any(report.is_short):
            return report
        chunk.num_slots = min(2 * chunk.num_slots, config.num_slots)
        chunk.arrays = _with_slots(config, chunk.num_slots, traces, chunk.arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(config: EngineConfig, num_slots: int, traces: TraceArrays) -> list[jax.Array]:
    return jax.vmap(lambda trace: jax.tree.leaves(virtual_engine.init(config, trace, num_slots)))(traces)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _with_slots(config: EngineConfig, num_slots: int, traces: TraceArrays, arrays: list[jax.Array]) -> list[jax.Array]:
    def one(trace: TraceArrays, leaves: list[jax.Array]) -> list[jax.Array]:
        return jax.tree.leaves(virtual_run.with_slots(config, trace, num_slots, _state(config, trace, leaves)))

    return jax.vmap(one)(traces, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def _advance(
    config: EngineConfig,
    policy: Policy,
    host: Host,
    step_time,
    traces: TraceArrays,
    until: Seconds,
    arrays: list[jax.Array],
) -> tuple[list[jax.Array], _Report]:
    def one(its: tuple[TraceArrays, list[jax.Array]]) -> tuple[list[jax.Array], _Report]:
        trace, leaves = its
        state = _state(config, trace, leaves)
        state = dataclasses.replace(state, requests=dataclasses.replace(state.requests, arrival=trace.arrival))
        state = virtual_run.advance(config, policy, host, step_time, trace, until, state)
        is_short = virtual_run.has_work(state, until) & ~virtual_run.has_room(config, state)
        report = _Report(state.num_done, state.num_steps, state.is_stuck, is_short, state.requests)
        return jax.tree.leaves(state), report

    # One after another: `vmap` would run every branch and as many steps as the busiest replica needs, on all of them.
    return jax.lax.map(one, (traces, arrays))


def _state(config: EngineConfig, trace: TraceArrays, leaves: list[jax.Array]) -> SimulatorState:
    return jax.tree.unflatten(jax.tree.structure(virtual_engine.init(config, trace)), leaves)
