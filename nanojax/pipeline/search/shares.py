"""Stage II: which share of the device does each nano-operation get?  The periodic program again, with shares to choose.

Order and lags are fixed; a node of share R takes d / P(R) (paper, section 4.1.3), and shares of what runs at the same time add
up to at most 1.  With `x` = 1 for the chosen level of a node, and `z` = w for that level and 0 for others, durations are linear:

    duration_i = sum over levels of d_i / P(R) * z        sum of z = w        z <= x * (largest w)        sum of x = 1

Which pairs meet follows from durations.  All of it at once is more than a solver does in minutes (an hour for a good answer),
so one program covers the neighbourhood of a simulated timeline: pairs that are far apart there stay so, pairs that overlap
may, and those that nearly touch choose.  `search` repeats rounds until none gains.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from nanojax.pipeline.ir import Pipeline
from nanojax.pipeline.search.problem import SHARE_LEVELS, Problem, Structure
from nanojax.pipeline.search.program import LEAST_GAIN, Program, solve
from nanojax.pipeline.search.structure import arranged
from nanojax.pipeline.simulate import Timeline
from nanojax.pipeline.validate import validate

__all__ = ["EVERYTHING", "Neighbourhood", "improved_shares", "judged"]


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """How far one program looks from the timeline that it starts from.

    most_gain: not for a layer that is shorter by more than this factor, so that many short rounds are made of a long one.
    width: not for shares that differ by more.
    closeness: in layers; only pairs that overlap by less, or are less apart, choose anew whether they meet.
    """

    most_gain: float = 1.15
    width: float = 0.2
    closeness: float = 0.05


EVERYTHING = Neighbourhood(most_gain=10.0, width=1.0, closeness=1.0)
"""All shares and meetings at once: for a handful of nodes."""
REPAIRS = 3
"""Times that nodes which would start together without room are made to take turns."""

Turn = tuple[int, int, int]
"""(i, j, k): node j of layer l + k starts after node i of layer l has ended."""


def improved_shares(
    problem: Problem,
    timeline: Timeline,
    near: Neighbourhood = Neighbourhood(),
    *,
    node_limit: int = 100,
    time_limit_s: float = 60.0,
) -> Timeline | None:
    """A better timeline of the same nodes in the same order; None if the neighbourhood has none."""
    pipeline = timeline.pipeline
    nodes = pipeline.nodes
    program = Program()
    w = program.column(1 + LEAST_GAIN, near.most_gain)
    starts = [program.column(-1.0, 2.0) for _ in nodes]  # within the iteration, in layers
    program.lower[starts[0]] = program.upper[starts[0]] = 0.0
    durations, shares = _choices(program, problem, timeline, w, near)

    def after(second: int, first: int, layers: int, unless: dict[int, float] | None = None) -> None:
        lasts = {column: -seconds for column, seconds in durations[first].items()}
        program.row({starts[second]: 1.0, starts[first]: -1.0, **lasts, **(unless or {})}, low=-layers)

    for index, node in enumerate(nodes):
        for dep in node.deps:
            after(index, dep, 0)
        for dep in node.carried_deps:
            after(index, dep, 1)
    for stream in sorted({node.stream for node in nodes}):
        line = [i for i, node in enumerate(nodes) if node.stream == stream]
        for first, second in itertools.pairwise(line):
            after(second, first, 0)
        if len(line) > 1:
            after(line[0], line[-1], 1)
    together: dict[tuple[int, int], int] = {}
    turns: dict[tuple[int, int], int] = {}
    for i, j, layers, gap in _pairs(timeline):
        turns[i, j] = layers
        if gap >= near.closeness:
            unless = None
        else:
            together[i, j] = program.column(1.0 if gap <= -near.closeness else 0.0, 1.0, is_integral=True)
            unless = {together[i, j]: 1.0}
            program.row({**shares[i], **shares[j], **unless}, high=2)
        after(j, i, layers, unless)
        after(i, j, 1 - layers, unless)
    for trio in itertools.combinations(range(len(nodes)), 3):
        pairs = list(itertools.combinations(trio, 2))
        if all(pair in together for pair in pairs):
            met = {together[pair]: 1.0 for pair in pairs}
            program.row({**shares[trio[0]], **shares[trio[1]], **shares[trio[2]], **met}, high=4)
    x, _ = solve(program, w, node_limit=node_limit, time_limit_s=time_limit_s)
    if x is None:
        return None
    chosen = [max(levels, key=x.__getitem__) for levels in shares]
    values = [
        levels[column] if seconds else SHARE_LEVELS[0]
        for levels, column, seconds in zip(shares, chosen, timeline.alone_s, strict=True)
    ]
    apart = [
        (i, j, layers + nodes[i].lag - nodes[j].lag)
        for (i, j), layers in turns.items()
        if (i, j) not in together or x[together[i, j]] < 0.5
    ]
    layer_starts = [x[column] + node.lag for column, node in zip(starts, nodes, strict=True)]
    return _best_of(problem, timeline, values, layer_starts, apart)


def judged(problem: Problem, pipeline: Pipeline) -> Timeline | None:
    """The simulator's word.  Nodes that would start together, but have no room, take turns as they did there.

    None for a pipeline that is not valid even then.
    """
    validate(pipeline, num_devices=problem.num_devices, check_shares=False)
    timeline = problem.timeline(pipeline)
    for _ in range(REPAIRS):
        try:
            validate(timeline.pipeline, num_devices=problem.num_devices)
            return timeline
        except ValueError:
            timeline = problem.timeline(_with_waits(timeline))
    return None


def _with_waits(timeline: Timeline) -> Pipeline:
    """The pipeline whose nodes wait for those that they waited for, as there was no room beside them, deep in the loop."""
    nodes, least_s = timeline.pipeline.nodes, 1e-9 * timeline.makespan_s
    middle = (max(span.layer for span in timeline.spans) + 1) // 2
    deps = [(set(node.deps), set(node.carried_deps)) for node in nodes]
    for span in timeline.spans:
        iteration = span.layer + nodes[span.node].lag
        if iteration == middle and span.start_s - span.ready_s > least_s:
            for other in timeline.spans:
                distance = iteration - other.layer - nodes[other.node].lag
                is_earlier = distance == 1 or (distance == 0 and other.node < span.node)
                if abs(other.stop_s - span.start_s) <= least_s and other.stop_s > other.start_s and is_earlier:
                    deps[span.node][distance].add(other.node)
    waiting = (
        dataclasses.replace(node, deps=tuple(sorted(same)), carried_deps=tuple(sorted(carried)))
        for node, (same, carried) in zip(nodes, deps, strict=True)
    )
    return dataclasses.replace(timeline.pipeline, nodes=tuple(waiting))


def _choices(
    program: Program, problem: Problem, timeline: Timeline, w: int, near: Neighbourhood
) -> tuple[list[dict[int, float]], list[dict[int, float]]]:
    """For each node its duration and its share, as coefficients of new columns; the area they take is at most 1."""
    durations, shares, area = [], [], {}
    for node, alone_s in zip(timeline.pipeline.nodes, timeline.alone_s, strict=True):
        duration = alone_s / timeline.layer_time_s
        levels = [share for share in SHARE_LEVELS if abs(share - node.share) < near.width + LEAST_GAIN]
        chosen = [program.column(0.0, 1.0, is_integral=True) for _ in levels]
        rates = [program.column(0.0, near.most_gain) for _ in levels]
        program.row(dict.fromkeys(chosen, 1.0), low=1, high=1)
        program.row(dict.fromkeys(rates, 1.0) | {w: -1.0}, low=0, high=0)
        for x, z in zip(chosen, rates, strict=True):
            program.row({z: 1.0, x: -near.most_gain}, high=0)
        shares.append(dict(zip(chosen, levels, strict=True)))
        lasts = [duration / problem.interference.performance(node.op.resource, share) for share in levels]
        durations.append(dict(zip(rates, lasts, strict=True)) if duration else {})
        area |= {z: share * last for z, share, last in zip(rates, levels, lasts, strict=True) if last}
    program.row(area, high=1)
    return durations, shares


def _pairs(timeline: Timeline) -> Iterator[tuple[int, int, int, float]]:
    """Pairs i, j of different resources that have work: j starts `layers` iterations and less than one more after i.

    Also the smaller of the gaps between them, i to j and j to the next i, in layers; negative where they overlap.
    """
    nodes, scale_s = timeline.pipeline.nodes, timeline.layer_time_s
    middle = (max(span.layer for span in timeline.spans) + 1) // 2
    spans = {span.node: span for span in timeline.spans if span.layer == middle - nodes[span.node].lag}
    busy = [i for i, seconds in enumerate(timeline.alone_s) if seconds > 0]
    for i, j in itertools.combinations(busy, 2):
        if nodes[i].op.resource is not nodes[j].op.resource:
            later = (spans[j].start_s - spans[i].start_s) / scale_s
            layers = -int(later // 1)
            lengths = [(spans[k].stop_s - spans[k].start_s) / scale_s for k in (i, j)]
            yield i, j, layers, min(later + layers - lengths[0], 1 - later - layers - lengths[1])


def _best_of(
    problem: Problem, timeline: Timeline, shares: Sequence[float], starts: Sequence[float], apart: Sequence[Turn]
) -> Timeline | None:
    """The program's answer as a pipeline: as launched before, or in the order of its starts, waiting where shares ask for it."""
    pipeline = timeline.pipeline
    structure: Structure = tuple((node.op, pipeline.tokens_of(node)) for node in pipeline.nodes)
    same = tuple(dataclasses.replace(node, share=share) for node, share in zip(pipeline.nodes, shares, strict=True))
    candidates = [dataclasses.replace(pipeline, nodes=same)]
    crowded = [(i, j, layers) for i, j, layers in apart if shares[i] + shares[j] > 1]
    both = [turn for i, j, layers in crowded for turn in ((i, j, layers), (j, i, 1 - layers))]
    lowest = min(0.0, *starts)
    if lowest < 0:  # an iteration that starts with its first node
        starts = [start - lowest for start in starts]
    for turns in ((), both):
        try:
            candidates.append(arranged(problem, structure, starts, shares, turns))
        except ValueError:  # the shifted starts need a lag that the data flow has not
            continue
    found = [judged(problem, candidate) for candidate in candidates]
    return min((one for one in found if one is not None), key=lambda one: one.layer_time_s, default=None)
