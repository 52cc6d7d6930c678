"""What does a search without a solver find?  List scheduling, then local search: to compare the mixed-integer programs with."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from nanojax.pipeline.dependencies import needs
from nanojax.pipeline.ir import Pipeline, Resource
from nanojax.pipeline.search.problem import SHARE_LEVELS, Problem, Structure
from nanojax.pipeline.search.program import LEAST_GAIN
from nanojax.pipeline.search.shares import judged
from nanojax.pipeline.search.structure import arranged, data_flow, starting_structures
from nanojax.pipeline.simulate import Timeline

__all__ = ["heuristic_search", "list_schedule"]

NUM_CUTS = 8
NUM_LAYERS = 6
USUAL_SHARES = {Resource.COMPUTE: 0.4, Resource.MEMORY: 0.4, Resource.NETWORK: 0.2}
"""Where local search starts: Figure 6's where three resources overlap."""


def heuristic_search(problem: Problem, *, num_trials: int = 2000) -> Timeline:
    """The best list schedule over cuts and forms, improved by neighbours until none is better or `num_trials` were judged."""
    best: Timeline | None = None
    for structure in starting_structures(problem, NUM_CUTS):
        durations_s = problem.durations_s(structure)
        starts = list_schedule(problem, structure, durations_s)
        shares = [
            USUAL_SHARES[op.resource] if seconds else SHARE_LEVELS[0]
            for (op, _), seconds in zip(structure, durations_s, strict=True)
        ]
        try:
            timeline = judged(problem, arranged(problem, structure, starts, shares))
        except ValueError:  # a schedule that lags by more than one layer
            continue
        if timeline is not None and (best is None or timeline.layer_time_s < best.layer_time_s):
            best = timeline
    if best is None:
        raise ValueError(f"no list schedule of num_tokens={problem.num_tokens} at grid={problem.grid} is a pipeline")
    while True:
        before_s = best.layer_time_s
        for neighbour in _neighbours(best.pipeline):
            if num_trials == 0:
                return best
            num_trials -= 1
            try:
                timeline = judged(problem, neighbour)
            except ValueError:  # an order that the data flow does not allow
                continue
            if timeline is not None and timeline.layer_time_s < best.layer_time_s * (1 - LEAST_GAIN):
                best = timeline
                break
        if best.layer_time_s >= before_s:
            return best


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


def _neighbours(pipeline: Pipeline) -> Iterator[Pipeline]:
    """One share a level up or down, or two nodes that follow each other on a stream exchanged."""
    nodes = pipeline.nodes
    for i, node in enumerate(nodes):
        at = min(range(len(SHARE_LEVELS)), key=lambda k, share=node.share: abs(SHARE_LEVELS[k] - share))
        for level in (at + 1, at - 1):
            if 0 <= level < len(SHARE_LEVELS):
                changed = dataclasses.replace(node, share=SHARE_LEVELS[level])
                yield dataclasses.replace(pipeline, nodes=(*nodes[:i], changed, *nodes[i + 1 :]))
    for i, node in enumerate(nodes):
        j = next((j for j in range(i + 1, len(nodes)) if nodes[j].stream == node.stream), None)
        if j is not None:
            order = [*range(i), j, *range(i + 1, j), i, *range(j + 1, len(nodes))]
            place = {old: new for new, old in enumerate(order)}
            moved = (
                dataclasses.replace(
                    nodes[old],
                    deps=tuple(sorted(place[dep] for dep in nodes[old].deps)),
                    carried_deps=tuple(sorted(place[dep] for dep in nodes[old].carried_deps)),
                )
                for old in order
            )
            yield dataclasses.replace(pipeline, nodes=tuple(moved))
