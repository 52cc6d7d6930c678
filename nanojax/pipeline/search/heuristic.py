"""What does a search without a solver find?  List scheduling, then local search: to compare the mixed-integer programs with."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from nanojax.pipeline.dependencies import needs
from nanojax.pipeline.ir import Pipeline, Resource
from nanojax.pipeline.library import sequential
from nanojax.pipeline.search.problem import SHARE_LEVELS, Problem, Structure
from nanojax.pipeline.search.program import LEAST_GAIN
from nanojax.pipeline.search.shares import judged
from nanojax.pipeline.search.structure import arranged, data_flow, starting_structures
from nanojax.pipeline.simulate import Timeline

__all__ = ["heuristic_search", "list_schedule"]

NUM_CUTS = 8
NUM_LAYERS = 6
OTHERS_SHARES = {Resource.MEMORY: 0.4, Resource.NETWORK: 0.2}
"""Where local search starts, as in Figure 6 where three resources overlap; compute has the rest."""


def heuristic_search(problem: Problem, *, num_trials: int = 2000) -> Timeline:
    """The best list schedule over cuts and forms, improved by single changes until none helps or `num_trials` were judged.

    `sequential` is the answer where nothing is better.
    """
    form = None if problem.num_devices == 1 else "gather"
    plain = problem.timeline(sequential(problem.num_tokens, collectives=form, is_moe=problem.is_moe))
    scheduled = [*filter(None, (_scheduled(problem, s) for s in starting_structures(problem, NUM_CUTS)))]
    best = min(scheduled, key=lambda one: one.layer_time_s, default=plain)
    before_s = math.inf
    while best.layer_time_s < before_s:
        before_s = best.layer_time_s
        for index, change in itertools.product(range(len(best.pipeline.nodes)), (_more, _less, _later)):
            is_better = True
            while is_better and num_trials > 0:
                num_trials -= 1
                timeline = _judged(problem, change(best.pipeline, index))
                is_better = timeline is not None and timeline.layer_time_s < best.layer_time_s * (1 - LEAST_GAIN)
                best = timeline if is_better and timeline is not None else best
    return min(best, plain, key=lambda one: one.layer_time_s)


def list_schedule(problem: Problem, structure: Structure, durations_s: Sequence[float]) -> tuple[float, ...]:
    """Starts in layers: each resource takes, of what is ready, the lowest layer's node with the longest way to its end."""
    flow = needs(data_flow(problem, structure))
    remaining_s = list(durations_s)
    for i in reversed(range(len(structure))):  # data flows from left to right
        after = [remaining_s[need.consumer] for need in flow if need.producer == i and need.distance == 0]
        remaining_s[i] = durations_s[i] + max(after, default=0.0)
    stop_s: dict[tuple[int, int], float] = {}
    start_s: dict[tuple[int, int], float] = {}
    free_s = dict.fromkeys(Resource, 0.0)
    waiting = {(layer, i) for layer in range(NUM_LAYERS) for i in range(len(structure))}
    while waiting:
        ready = []
        for layer, i in waiting:
            before = [(layer - need.distance, need.producer) for need in flow if need.consumer == i]
            before = [key for key in before if key[0] >= 0]
            if all(key in stop_s for key in before):
                earliest_s = max(free_s[structure[i][0].resource], *(stop_s[key] for key in before), 0.0)
                ready.append((earliest_s, layer, -remaining_s[i], i))
        at_s, layer, _, i = min(ready)
        start_s[layer, i], stop_s[layer, i] = at_s, at_s + durations_s[i]
        free_s[structure[i][0].resource] = stop_s[layer, i]
        waiting.remove((layer, i))
    middle = NUM_LAYERS // 2
    first_s = start_s[middle, 0]
    period_s = start_s[middle + 1, 0] - first_s or math.inf
    return tuple(max(start_s[middle, i] - first_s, 0.0) / period_s for i in range(len(structure)))


def _scheduled(problem: Problem, structure: Structure) -> Timeline | None:
    durations_s = problem.durations_s(structure)
    used = {op.resource for (op, _), seconds in zip(structure, durations_s, strict=True) if seconds > 0}
    rest = 1 - sum(share for resource, share in OTHERS_SHARES.items() if resource in used)
    usual = OTHERS_SHARES | {Resource.COMPUTE: round(rest, 1)}
    shares = [
        usual[op.resource] if seconds else SHARE_LEVELS[0]
        for (op, _), seconds in zip(structure, durations_s, strict=True)
    ]
    starts = list_schedule(problem, structure, durations_s)
    try:
        return judged(problem, arranged(problem, structure, starts, shares))
    except ValueError:  # it lags by more than a layer
        return None


def _judged(problem: Problem, pipeline: Pipeline | None) -> Timeline | None:
    try:
        return None if pipeline is None else judged(problem, pipeline)
    except ValueError:  # an order that the data flow does not allow
        return None


def _more(pipeline: Pipeline, index: int) -> Pipeline | None:
    """A node's share a level up."""
    return _with_level(pipeline, index, 1)


def _less(pipeline: Pipeline, index: int) -> Pipeline | None:
    """A node's share a level down."""
    return _with_level(pipeline, index, -1)


def _with_level(pipeline: Pipeline, index: int, step: int) -> Pipeline | None:
    nodes = pipeline.nodes
    at = min(range(len(SHARE_LEVELS)), key=lambda k: abs(SHARE_LEVELS[k] - nodes[index].share)) + step
    if not 0 <= at < len(SHARE_LEVELS):
        return None
    changed = dataclasses.replace(nodes[index], share=SHARE_LEVELS[at])
    return dataclasses.replace(pipeline, nodes=(*nodes[:index], changed, *nodes[index + 1 :]))


def _later(pipeline: Pipeline, index: int) -> Pipeline | None:
    """A node in exchange with the next one of its stream."""
    nodes = pipeline.nodes
    other = next((j for j in range(index + 1, len(nodes)) if nodes[j].stream == nodes[index].stream), None)
    if other is None:
        return None
    order = [*range(index), other, *range(index + 1, other), index, *range(other + 1, len(nodes))]
    place = {old: new for new, old in enumerate(order)}
    moved = (
        dataclasses.replace(
            nodes[old],
            deps=tuple(sorted(place[dep] for dep in nodes[old].deps)),
            carried_deps=tuple(sorted(place[dep] for dep in nodes[old].carried_deps)),
        )
        for old in order
    )
    return dataclasses.replace(pipeline, nodes=tuple(moved))
