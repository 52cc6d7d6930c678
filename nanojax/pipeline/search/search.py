"""Which pipeline is best for a model, a machine and a batch?  The paper's two stages, started from what is known.

arXiv 2408.12757v2, section 4.1.  Every candidate is judged by the layer simulator, and the ready-made pipelines are
candidates: the answer is never worse than any of them.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

from nanojax.pipeline.interference import NO_INTERFERENCE
from nanojax.pipeline.ir import Pipeline, Resource
from nanojax.pipeline.library import PIPELINES
from nanojax.pipeline.search.order import best_order
from nanojax.pipeline.search.problem import SHARE_LEVELS, Problem, Structure, area_bound_s, work_bound_s
from nanojax.pipeline.search.program import LEAST_GAIN
from nanojax.pipeline.search.shares import EVERYTHING, Neighbourhood, improved_shares, judged
from nanojax.pipeline.search.structure import arranged, split_near_bubbles, starting_structures, structure_of
from nanojax.pipeline.simulate import Timeline

__all__ = ["Found", "known_pipelines", "search"]

NUM_CUTS = 8
"""Cuts of the batch to start from; finer ones are tried around the best."""
NUM_ANTICIPATED, NUM_FINALISTS, NUM_POLISHED = 12, 4, 2
"""Structures that stage II looks at, orders of them whose shares it improves, and how many of those thoroughly."""
NUM_EXACT = 6
"""So few nodes with work get shares from one program over all of them."""
ANTICIPATED = ((0.4, 0.2), (0.4, 0.1), (0.2, 0.2))
"""Shares of memory- and network-bound nodes under which stage II looks for an order to start from."""
ANTICIPATED_COMPUTE = 0.8

Report = Callable[[str, float, float], None]
"""Called with the stage, the best layer so far and the bound (seconds), whenever either may have changed."""


@dataclasses.dataclass(frozen=True)
class Found:
    """timeline: the best pipeline, simulated.    bound_s: no pipeline of the structures tried has a shorter layer.

    order: the best of stage I, without shares or interference; order_s: its layer; order_bound_s: no order of the structures
    tried has a shorter one.    num_structures: so many were tried.    is_complete: the time limit cut nothing.
    """

    timeline: Timeline
    bound_s: float
    order: Pipeline
    order_s: float
    order_bound_s: float
    num_structures: int
    is_complete: bool


def known_pipelines(problem: Problem) -> list[Pipeline]:
    """Every ready-made pipeline that fits the problem, `sequential` first."""
    known = []
    for make in PIPELINES.values():
        try:
            known.append(make(problem.num_tokens, problem.is_moe, problem.num_devices))
        except ValueError:  # for one device only
            continue
    return known


def search(
    problem: Problem,
    remaining_s: Callable[[], float] = lambda: math.inf,
    report: Report = lambda stage, best_s, bound_s: None,
) -> Found:
    """The best pipeline found, and what is proven about others.

    remaining_s: seconds left; the answer depends on it only where the search does not end before.
    Raises ValueError for durations that are not finite, or all 0.
    """
    free = dataclasses.replace(problem, interference=NO_INTERFERENCE)
    known = [judged(problem, pipeline) for pipeline in known_pipelines(problem)]
    best = min((one for one in known if one is not None), key=lambda one: one.layer_time_s)
    if not best.layer_time_s > 0:
        raise ValueError("all durations are 0 s: there is nothing to arrange")
    stage1 = _stage1(free, remaining_s, report)
    return _stage2(problem, stage1, best, remaining_s, report)


@dataclasses.dataclass(frozen=True)
class _Stage1:
    """structures: all that were tried, the best first.    bound_s: the least of their bounds."""

    structures: tuple[Structure, ...]
    pipeline: Pipeline
    layer_time_s: float
    bound_s: float
    is_complete: bool


def _stage1(problem: Problem, remaining_s: Callable[[], float], report: Report) -> _Stage1:
    """Structure and order without interference: ready-made structures, two nano-operations each, then more near bubbles."""
    known = [(problem.timeline(pipeline).layer_time_s, pipeline) for pipeline in known_pipelines(problem)]
    best_s, best = min(known, key=lambda pair: pair[0])
    tried: dict[Structure, float] = {structure_of(pipeline): layer_s for layer_s, pipeline in known}
    bounds: dict[Structure, float] = {}
    is_complete = True

    def attempt(structure: Structure) -> None:
        nonlocal best_s, best, is_complete
        if structure in bounds:
            return
        durations_s = problem.durations_s(structure)
        bounds[structure] = work_bound_s(structure, durations_s)
        if remaining_s() <= 0:
            is_complete = False
            return
        order = best_order(problem, structure, durations_s, below_s=best_s, time_limit_s=remaining_s())
        bounds[structure] = order.bound_s
        tried[structure] = min(order.layer_time_s, tried.get(structure, math.inf))
        if order.starts is not None:
            candidate = arranged(problem, structure, order.starts, [1 / len(Resource)] * len(structure))
            layer_s = problem.timeline(candidate).layer_time_s
            if layer_s < best_s:
                best_s, best = layer_s, candidate
        report("stage I", best_s, min(bounds.values()))

    first = sorted({*tried, *starting_structures(problem, NUM_CUTS)}, key=lambda s: _promise(problem, s))
    for structure in first:
        attempt(structure)
    before_s = math.inf
    while best_s < before_s * (1 - LEAST_GAIN):
        before_s = best_s
        for structure in split_near_bubbles(problem, problem.timeline(best)):
            attempt(structure)
    ranked = sorted(bounds, key=lambda s: (tried.get(s, math.inf), bounds[s], len(s)))
    return _Stage1(tuple(ranked), best, best_s, min(best_s, *bounds.values()), is_complete)


def _promise(problem: Problem, structure: Structure) -> tuple[float, int, Structure]:
    return work_bound_s(structure, problem.durations_s(structure)), len(structure), structure


def _stage2(
    problem: Problem, stage1: _Stage1, best: Timeline, remaining_s: Callable[[], float], report: Report
) -> Found:
    """Shares under interference: the most promising structures first roughly, the best of them to the end."""
    bound_s = min(area_bound_s(problem, s, problem.durations_s(s)) for s in stage1.structures)
    is_complete = stage1.is_complete
    if problem.is_free:
        third = [dataclasses.replace(node, share=1 / len(Resource)) for node in stage1.pipeline.nodes]
        found = problem.timeline(dataclasses.replace(stage1.pipeline, nodes=tuple(third)))
        best = min(best, found, key=lambda one: one.layer_time_s)
        return _found(stage1, best, stage1.bound_s, is_complete)

    def improve(timeline: Timeline, node_limit: int) -> Timeline:
        nonlocal best, is_complete
        while True:
            if remaining_s() <= 0:
                is_complete = False
                return timeline
            few = sum(seconds > 0 for seconds in timeline.alone_s) <= NUM_EXACT
            near = EVERYTHING if few else Neighbourhood()
            better = improved_shares(problem, timeline, near, node_limit=node_limit, time_limit_s=remaining_s())
            if better is None or better.layer_time_s >= timeline.layer_time_s * (1 - LEAST_GAIN):
                return timeline
            timeline = better
            best = min(best, timeline, key=lambda one: one.layer_time_s)
            report("stage II", best.layer_time_s, bound_s)

    report("stage II", best.layer_time_s, bound_s)
    two_each = [s for s in stage1.structures if max(collections.Counter(op for op, _ in s).values()) == 2]
    promising = _anticipated(problem, two_each[:NUM_ANTICIPATED], remaining_s)
    finalists = [improve(one, 1) for one in promising[:NUM_FINALISTS]]
    before_s = math.inf
    while best.layer_time_s < before_s * (1 - LEAST_GAIN):
        before_s = best.layer_time_s
        for one in _anticipated(problem, split_near_bubbles(problem, best), remaining_s)[:NUM_POLISHED]:
            finalists.append(improve(one, 1))
    finalists.sort(key=lambda one: one.layer_time_s)
    for one in finalists[:NUM_POLISHED]:
        improve(one, 100)
    return _found(stage1, best, bound_s, is_complete and remaining_s() > 0)


def _anticipated(problem: Problem, structures: Sequence[Structure], remaining_s: Callable[[], float]) -> list[Timeline]:
    """Where stage II starts: orders that are best if every node ran at its resource's usual share, the best first."""
    found: dict[Pipeline, tuple[float, Timeline]] = {}
    for structure in structures:
        durations_s = problem.durations_s(structure)
        used = {op.resource for (op, _), s in zip(structure, durations_s, strict=True) if s > 0}
        combinations = dict.fromkeys(
            (memory if Resource.MEMORY in used else 0.0, network if Resource.NETWORK in used else 0.0)
            for memory, network in ANTICIPATED
        )
        for memory, network in combinations:
            if remaining_s() <= 0:
                break
            share = {Resource.COMPUTE: 1 - memory - network, Resource.MEMORY: memory, Resource.NETWORK: network}
            usual = share | {Resource.COMPUTE: ANTICIPATED_COMPUTE}
            longer_s = [
                s / problem.interference.performance(op.resource, usual[op.resource]) if s else 0.0
                for (op, _), s in zip(structure, durations_s, strict=True)
            ]
            order = best_order(problem, structure, longer_s, node_limit=20, time_limit_s=remaining_s())
            if order.starts is None:
                continue
            shares = [
                round(share[op.resource], 1) if s else SHARE_LEVELS[0]
                for (op, _), s in zip(structure, durations_s, strict=True)
            ]
            timeline = judged(problem, arranged(problem, structure, order.starts, shares))
            if timeline is not None:
                found[timeline.pipeline] = (order.layer_time_s, timeline)
    return [timeline for _, timeline in sorted(found.values(), key=lambda pair: pair[0])]


def _found(stage1: _Stage1, best: Timeline, bound_s: float, is_complete: bool) -> Found:
    return Found(
        best, bound_s, stage1.pipeline, stage1.layer_time_s, stage1.bound_s, len(stage1.structures), is_complete
    )
