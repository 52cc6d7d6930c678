"""Into which nano-operations is a layer cut?  First two of each operation, then more where a resource waits."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from nanojax.pipeline.dependencies import Need, needs, with_dependencies
from nanojax.pipeline.ir import NanoBatch, Node, OpKind, Pipeline, Resource
from nanojax.pipeline.library import COMPUTE_STREAM, MEMORY_STREAM, NETWORK_STREAM
from nanojax.pipeline.search.problem import Part, Problem, Structure
from nanojax.pipeline.simulate import Timeline

__all__ = ["arranged", "data_flow", "nano_batched", "split_near_bubbles", "starting_structures", "structure_of"]

STREAMS = {Resource.COMPUTE: COMPUTE_STREAM, Resource.MEMORY: MEMORY_STREAM, Resource.NETWORK: NETWORK_STREAM}
LAG_ROUNDING, LAUNCH_DIGITS = 1e-6, 6
"""A start this close before a layer's end is the next layer's; starts that differ less than the solver's tolerance are equal."""
AROUND_O = {
    None: (),
    "gather": (OpKind.ATTN_AG, OpKind.O_AG, OpKind.D_AR),
    "reduce": (OpKind.O_AR, OpKind.D_AR),
}
"""Collectives by form (see `OpKind`)."""


def structure_of(pipeline: Pipeline) -> Structure:
    """The nano-operations of a pipeline."""
    return _sorted((node.op, pipeline.tokens_of(node)) for node in pipeline.nodes)


def nano_batched(problem: Problem, cuts: Sequence[int], forms: Sequence[str | None]) -> Structure:
    """Every operation cut at the same tokens; `forms` of the collectives by nano-batch, None on one device."""
    ranges = [NanoBatch(a, b) for a, b in itertools.pairwise((0, *cuts, problem.num_tokens))]
    always = [OpKind.KQV, OpKind.DEC_ATTN, OpKind.PF_ATTN, OpKind.O, OpKind.UG, OpKind.D]
    always += [OpKind.ROUTER] if problem.is_moe else []
    return _sorted(
        (op, tokens) for tokens, form in zip(ranges, forms, strict=True) for op in (*always, *AROUND_O[form])
    )


def starting_structures(problem: Problem, num_cuts: int) -> Iterator[Structure]:
    """Two nano-operations per operation (paper, section 4.1.2): `num_cuts` cuts or less, each form of the collectives."""
    forms = (None,) if problem.num_devices == 1 else ("gather", "reduce")
    step = problem.grid * max(1, math.ceil(problem.num_tokens / problem.grid / (num_cuts + 1)))
    for cut in range(step, problem.num_tokens, step):
        for pair in itertools.product(forms, repeat=2):
            yield nano_batched(problem, (cut,), pair)


def split_near_bubbles(problem: Problem, timeline: Timeline) -> list[Structure]:
    """Structures with one nano-operation more: halves of those that border on a time in which the busiest resource waits.

    These are the node that the resource was waiting for, the one that it then ran, and the last one that it had run.
    """
    pipeline = timeline.pipeline
    structure = structure_of(pipeline)
    busiest = max(Resource, key=timeline.utilization)
    spans = [span for span in timeline.spans if span.stop_s > span.start_s]
    mine = [span for span in spans if span.resource is busiest]
    start_s, least_s = timeline.window_s[0], 1e-6 * timeline.layer_time_s
    stop_s = start_s + 2 * timeline.layer_time_s
    found: dict[Structure, None] = {}
    for before, after in itertools.pairwise(mine):
        if after.start_s - before.stop_s > least_s and start_s <= after.start_s <= stop_s:
            waited_for = [span for span in spans if abs(span.stop_s - after.start_s) <= least_s]
            for span in (*waited_for, after, before):
                node = pipeline.nodes[span.node]
                halves = _halved(problem, structure, (node.op, pipeline.tokens_of(node)))
                if halves is not None:
                    found[halves] = None
    return list(found)


def data_flow(problem: Problem, structure: Structure) -> Pipeline:
    """The structure as a pipeline without an order or lags, to ask for its needs."""
    ranges = tuple(dict.fromkeys(tokens for _, tokens in structure))
    nodes = tuple(Node(op, ranges.index(tokens), stream=STREAMS[op.resource]) for op, tokens in structure)
    return Pipeline("searched", problem.num_tokens, ranges, nodes)


def arranged(
    problem: Problem,
    structure: Structure,
    starts: Sequence[float],
    shares: Sequence[float],
    turns: Iterable[tuple[int, int, int]] = (),
) -> Pipeline:
    """The pipeline that launches nodes in the order of their `starts`, counted in layers: the whole part is a node's lag.

    turns: (i, j, k) makes node j of layer l + k wait for node i of layer l, though it reads nothing of it.
    Raises ValueError where the data flow allows no such order.
    """
    flow, durations_s = needs(data_flow(problem, structure)), problem.durations_s(structure)
    lags = [int(start + LAG_ROUNDING) for start in starts]
    for need in sorted(
        flow, key=lambda need: need.consumer
    ):  # data flows from left to right; a solver's starts may not, by a hair
        if need.distance == 0:
            lags[need.consumer] = max(lags[need.consumer], lags[need.producer])
    offsets = [
        (round(start - lag, LAUNCH_DIGITS), s > 0) for start, lag, s in zip(starts, lags, durations_s, strict=True)
    ]
    launch = _launch_order(offsets, lags, flow)
    place = {i: at for at, i in enumerate(launch)}
    waits: dict[tuple[int, int], list[int]] = {}
    for first, second, layers in turns:
        distance = layers + lags[second] - lags[first]
        if distance == 1 or (distance == 0 and place[first] < place[second]):
            waits.setdefault((second, distance), []).append(place[first])
    ranges = tuple(dict.fromkeys(structure[i][1] for i in launch))
    nodes = tuple(
        Node(
            structure[i][0],
            ranges.index(structure[i][1]),
            deps=tuple(sorted(waits.get((i, 0), ()))),
            share=shares[i],
            stream=STREAMS[structure[i][0].resource],
            lag=lags[i],
            carried_deps=tuple(sorted(waits.get((i, 1), ()))),
        )
        for i in launch
    )
    return with_dependencies(Pipeline("searched", problem.num_tokens, ranges, nodes))


def _launch_order(offsets: Sequence[tuple[float, bool]], lags: Sequence[int], flow: Sequence[Need]) -> list[int]:
    """By offset in the iteration and whether there is work; first of all, what is read in the same iteration.

    Raises ValueError where nodes of an iteration would wait for each other.
    """
    before: list[set[int]] = [set() for _ in offsets]
    for need in flow:
        if need.distance + lags[need.consumer] - lags[need.producer] == 0:
            before[need.consumer].add(need.producer)
    launch: list[int] = []
    while len(launch) < len(offsets):
        ready = [i for i in range(len(offsets)) if i not in launch and before[i] <= set(launch)]
        if not ready:
            raise ValueError(f"these lags let nodes wait for each other: {tuple(lags)}")
        launch.append(min(ready, key=lambda i: (offsets[i], i)))
    return launch


def _sorted(parts: Iterable[Part]) -> Structure:
    kinds = list(OpKind)
    return tuple(sorted(parts, key=lambda part: (kinds.index(part[0]), part[1])))


def _halved(problem: Problem, structure: Structure, part: Part) -> Structure | None:
    """The structure with `part` in two; None if the grid does not cut it."""
    op, tokens = part
    middle = problem.grid * round((tokens.start + tokens.stop) / 2 / problem.grid)
    if not tokens.start < middle < tokens.stop:
        return None
    halves = ((op, NanoBatch(tokens.start, middle)), (op, NanoBatch(middle, tokens.stop)))
    return _sorted((*(other for other in structure if other != part), *halves))
