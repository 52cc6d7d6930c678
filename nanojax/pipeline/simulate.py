"""How long does a layer take?  Discrete-event execution of a pipeline under a cost model and interference.

A node starts when its dependencies are done, its stream is free and there is room for its share.  Room is given in launch
order: one node that waits for room holds back those launched after it, as a device's block scheduler does.
"""

import dataclasses
import enum
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from nanojax.pipeline.interference import Interference
from nanojax.pipeline.ir import NanoBatch, OpKind, Pipeline, Resource

SHARE_ROUNDING = 1e-9
WORK_ROUNDING = 1e-12


class Shares(enum.Enum):
    """What a node's share means while the simulation runs.

    FIXED: a node always runs at P(its share), also where it runs alone: the paper's stage II, duration = D_best / P(R)
    (section 4.1.3).  There R picks the kernel's implementation, thread blocks and tiles, before anything runs.
    FAIR: the whole device is divided among those that run, in proportion to their shares, so that a node that is alone has
    all of it: a device that hands out its cores as kernels come and go.
    """

    FIXED = "fixed"
    FAIR = "fair"


@dataclasses.dataclass(frozen=True)
class Span:
    """A node at work on one layer.  `ready_s`: dependencies done and stream free; from then on it waited for room."""

    node: int
    layer: int
    start_s: float
    stop_s: float
    resource: Resource
    ready_s: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What ran when.

    alone_s: per node, its duration alone on the device (the paper's D_best).
    spans: in order of start.    makespan_s: end of the last one.
    layer_time_s: time between the ends of consecutive layers deep in the loop.
    window_s: a stretch of that length from where a layer deep in the loop starts, for pictures.
    """

    pipeline: Pipeline
    alone_s: tuple[float, ...]
    spans: tuple[Span, ...]
    makespan_s: float
    layer_time_s: float
    window_s: tuple[float, float]

    def utilization(self, resource: Resource) -> float:
        """Mean useful rate of `resource` in steady state: what its nodes take alone, over the time of a layer."""
        work_s = sum(
            s for node, s in zip(self.pipeline.nodes, self.alone_s, strict=True) if node.op.resource is resource
        )
        return work_s / self.layer_time_s if self.layer_time_s else 0.0

    def waits_s(self) -> Mapping[int, float]:
        """Nodes that waited for room, because shares of nodes that met add up to more than 1, and how long in total."""
        waits: dict[int, float] = {}
        for span in self.spans:
            if span.start_s - span.ready_s > WORK_ROUNDING * self.makespan_s:
                waits[span.node] = waits.get(span.node, 0.0) + span.start_s - span.ready_s
        return waits


PeakTime = Callable[[OpKind, NanoBatch], Mapping[Resource, float]]
"""Seconds for which an operation keeps each resource busy, were it at its peak."""


def simulate(
    pipeline: Pipeline,
    duration: Callable[[OpKind, NanoBatch], float],
    interference: Interference,
    *,
    num_layers: int,
    shares: Shares = Shares.FIXED,
    occupancy: Callable[[OpKind, NanoBatch], float] | None = None,
) -> Timeline:
    """Runs `num_layers` layers of the loop.

    duration: seconds of one nano-operation alone on the whole device.
    interference: P of each resource at a share R.  With `NO_INTERFERENCE` the resources are independent of each other.
    occupancy: part of the device that a nano-operation keeps busy while it is alone, in (0, 1]; all of it if None.  One that
        leaves some idle goes on at full speed while P(R) is no less: the paper's D_best / P(R) counts what is idle twice.
    Nodes of the same resource run beside each other only while their shares add up to at most 1, and then do no more
    together than the resource can.  Under interference and FIXED shares that limit holds over all resources.
    Raises ValueError for `num_layers < 1`, a duration that is negative or not finite or an occupancy out of range (naming
    the node), and a pipeline that cannot go on, as a dependency is launched later than its reader.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers} must be positive")
    alone_s = tuple(float(duration(node.op, pipeline.tokens_of(node))) for node in pipeline.nodes)
    busy = tuple(1.0 if occupancy is None else occupancy(node.op, pipeline.tokens_of(node)) for node in pipeline.nodes)
    for index, (seconds, part) in enumerate(zip(alone_s, busy, strict=True)):
        if not 0 <= seconds < math.inf:
            raise ValueError(f"{pipeline.describe(index)}: duration={seconds} s must be finite and not negative")
        if not 0 < part <= 1:
            raise ValueError(f"{pipeline.describe(index)}: occupancy={part} must be in (0, 1]")
    spans = _run(pipeline, alone_s, busy, interference, num_layers, shares)
    done_s = [max(span.stop_s for span in spans if span.layer == layer) for layer in range(num_layers)]
    layer_time_s = _steady_layer_s(done_s)
    start_s = next(span.start_s for span in spans if span.node == 0 and span.layer == num_layers // 2)
    window_s = (start_s, start_s + layer_time_s)
    makespan_s = max(span.stop_s for span in spans)
    return Timeline(pipeline, alone_s, spans, makespan_s, layer_time_s, window_s)


def _steady_layer_s(done_s: Sequence[float]) -> float:
    """Mean time between the ends of layers in the second half, but for the last, which others no longer slow down."""
    if len(done_s) == 1:
        return done_s[0]
    first = (len(done_s) - 1) // 2
    last = max(len(done_s) - 2, first + 1)
    return (done_s[last] - done_s[first]) / (last - first)


def utilization_over_time(
    timeline: Timeline, peak_time: PeakTime, window_s: tuple[float, float]
) -> tuple[list[float], dict[Resource, list[float]]]:
    """Useful rate of each resource over time, as a fraction of its peak (paper, Figure 10).

    A node that would keep a resource busy for w seconds at its peak, and runs for t, uses w / t of it meanwhile.
    Gives n + 1 instants and n values for each resource, constant between instants.
    """
    nodes = timeline.pipeline.nodes
    peak_s = [peak_time(node.op, timeline.pipeline.tokens_of(node)) for node in nodes]
    spans = [span for span in timeline.spans if span.start_s < window_s[1] and span.stop_s > window_s[0]]
    least_s = WORK_ROUNDING * timeline.makespan_s
    instants = [window_s[0]]
    for t in sorted({t for span in spans for t in (span.start_s, span.stop_s)}):
        if instants[-1] + least_s < t < window_s[1] - least_s:
            instants.append(t)
    instants.append(window_s[1])
    fractions: dict[Resource, list[float]] = {resource: [] for resource in Resource}
    for start_s, stop_s in itertools.pairwise(instants):
        middle_s = (start_s + stop_s) / 2
        running = [span for span in spans if span.start_s < middle_s < span.stop_s]
        for resource, values in fractions.items():
            rates = [peak_s[span.node].get(resource, 0.0) / (span.stop_s - span.start_s) for span in running]
            values.append(sum(rates))
    return instants, fractions


@dataclasses.dataclass
class _Running:
    """A node at work in an iteration of the loop.  `work_s` is left of its time alone on the device."""

    iteration: int
    node: int
    work_s: float
    start_s: float
    ready_s: float


@dataclasses.dataclass
class _State:
    """The device at `now_s`.  By stream: what it still has to run (next one last), since when that is ready, what runs."""

    now_s: float
    queues: dict[int, list[tuple[int, int]]]
    ready_s: dict[int, float]
    running: dict[int, _Running]
    last_layer: list[int]  # that each node has done
    spans: list[Span]


def _run(
    pipeline: Pipeline, alone_s: Sequence[float], busy: Sequence[float], interference: Interference, num_layers: int,
    shares: Shares,
) -> tuple[Span, ...]:  # fmt: skip
    """From event to event: whenever a node ends, others become ready, start, and change each other's speed."""
    state = _initial_state(pipeline, num_layers)
    is_free = all(interference.performance(resource, 0.0) == 1 for resource in Resource)
    are_coupled = shares is Shares.FIXED and not is_free
    while True:
        _mark_ready(state, pipeline, num_layers)
        if _start(state, pipeline, alone_s, are_coupled):
            continue
        if not state.running:
            break
        rates = _rates(state.running, pipeline, busy, interference, shares)
        step_s = min(run.work_s / rates[stream] for stream, run in state.running.items())
        state.now_s += step_s
        for stream, run in list(state.running.items()):
            run.work_s -= rates[stream] * step_s
            if run.work_s <= WORK_ROUNDING * alone_s[run.node]:
                del state.running[stream]
                _finish(state, pipeline, stream, run)
    stuck = [pipeline.describe(queue[-1][1]) for queue in state.queues.values() if queue]
    if stuck:
        raise ValueError(f"pipeline {pipeline.name!r} cannot go on: each of {', '.join(stuck)} waits for another")
    return tuple(sorted(state.spans, key=lambda span: (span.start_s, span.stop_s, span.layer, span.node)))


def _initial_state(pipeline: Pipeline, num_layers: int) -> _State:
    queues: dict[int, list[tuple[int, int]]] = {}
    for iteration in reversed(range(num_layers + max(node.lag for node in pipeline.nodes))):
        for index, node in reversed(list(enumerate(pipeline.nodes))):
            if 0 <= iteration - node.lag < num_layers:
                queues.setdefault(node.stream, []).append((iteration, index))
    return _State(0.0, queues, {}, {}, [-1] * len(pipeline.nodes), [])


def _mark_ready(state: _State, pipeline: Pipeline, num_layers: int) -> None:
    nodes = pipeline.nodes
    for stream, queue in state.queues.items():
        if queue and stream not in state.ready_s:
            iteration, index = queue[-1]
            needed = [(dep, iteration - nodes[dep].lag) for dep in nodes[index].deps]
            needed += [(dep, iteration - 1 - nodes[dep].lag) for dep in nodes[index].carried_deps]
            if all(layer <= state.last_layer[dep] or layer >= num_layers for dep, layer in needed):
                state.ready_s[stream] = state.now_s


def _start(state: _State, pipeline: Pipeline, alone_s: Sequence[float], are_coupled: bool) -> bool:
    """Starts what is ready and has room, in launch order.  True if instead nodes without work came and went."""
    ready = [
        (_Running(*state.queues[stream][-1], alone_s[state.queues[stream][-1][1]], state.now_s, ready_s), stream)
        for stream, ready_s in state.ready_s.items()
        if stream not in state.running
    ]
    ready.sort(key=lambda item: (item[0].iteration, item[0].node))
    idle = [(run, stream) for run, stream in ready if run.work_s == 0]
    for run, stream in idle:
        _finish(state, pipeline, stream, run)
    if idle:
        return True
    full: set[Resource | None] = set()
    used = dict.fromkeys([None, *Resource], 0.0)
    for run in state.running.values():
        node = pipeline.nodes[run.node]
        used[_pool(node.op.resource, are_coupled)] += node.share
    for run, stream in ready:
        node = pipeline.nodes[run.node]
        pool = _pool(node.op.resource, are_coupled)
        if pool in full or used[pool] + node.share > 1 + SHARE_ROUNDING:
            full.add(pool)
        else:
            used[pool] += node.share
            state.running[stream] = run
    return False


def _finish(state: _State, pipeline: Pipeline, stream: int, run: _Running) -> None:
    node = pipeline.nodes[run.node]
    layer = run.iteration - node.lag
    state.spans.append(Span(run.node, layer, run.start_s, state.now_s, node.op.resource, run.ready_s))
    state.last_layer[run.node] = layer
    state.queues[stream].pop()
    del state.ready_s[stream]


def _pool(resource: Resource, are_coupled: bool) -> Resource | None:
    """Whose shares must fit together: those of the whole device (None) if the resources are coupled, else of one."""
    return None if are_coupled else resource


def _rates(
    running: Mapping[int, _Running],
    pipeline: Pipeline,
    busy: Sequence[float],
    interference: Interference,
    shares: Shares,
) -> dict[int, float]:
    """Progress of each running node, in seconds of its time alone per second."""
    nodes = {stream: pipeline.nodes[run.node] for stream, run in running.items()}
    total = sum(node.share for node in nodes.values()) if shares is Shares.FAIR else 1.0
    parts = {stream: busy[run.node] for stream, run in running.items()}
    rates = {
        stream: min(1.0, interference.performance(node.op.resource, node.share / total) / parts[stream])
        for stream, node in nodes.items()
    }
    for stream, rate in rates.items():
        if not rate > 0:
            name, share = pipeline.describe(running[stream].node), nodes[stream].share / total
            raise ValueError(f"{name}: its performance at share={share:g} is {rate}, it would never end")
    for resource in {node.op.resource for node in nodes.values()}:
        same = [stream for stream, node in nodes.items() if node.op.resource is resource]
        together = sum(parts[stream] * rates[stream] for stream in same)
        if together > 1:
            rates |= {stream: rates[stream] / together for stream in same}
    return rates
