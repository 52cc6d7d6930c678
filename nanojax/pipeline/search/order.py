"""Stage I: in which order should the nano-operations run?  A mixed-integer program over one period of the layer loop.

The paper (arXiv 2408.12757v2, section 4.1.2; as released, three layers unrolled and big-M constraints) searches a schedule.
Here the loop is periodic and time is counted in layers: with `w` layers per unit of time, and `u_i` layers at the start of i,

    maximize w
    u_c + distance >= u_p + d_p w      c reads what p writes `distance` layers earlier
    u_j + k >= u_i + d_i w             i and j need the same resource: j, k layers on, starts when i has ended,
    u_i + 1 - k >= u_j + d_j w         and the next i when that j has ended
    w * (sum of d_i) <= 1              over the nodes of each resource

It is linear without a large constant, and its only integers are the k, one for each pair on one resource.  Its optimum is
the steady state of the best order: a loop in which each node starts as soon as it can has the throughput of its worst cycle.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from nanojax.pipeline.dependencies import needs
from nanojax.pipeline.ir import OpKind
from nanojax.pipeline.search.problem import Problem, Structure, work_bound_s
from nanojax.pipeline.search.program import LEAST_GAIN, Program, solve
from nanojax.pipeline.search.structure import data_flow

__all__ = ["Order", "best_order", "start_columns"]

NODE_LIMIT = 500
LAYER_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class Order:
    """starts: of each nano-operation, in layers; None if no order is shorter than was asked for.

    layer_time_s: without interference.    bound_s: no order of this structure has a shorter layer.
    """

    starts: tuple[float, ...] | None
    layer_time_s: float
    bound_s: float


def best_order(
    problem: Problem,
    structure: Structure,
    durations_s: Sequence[float],
    *,
    below_s: float = math.inf,
    node_limit: int = NODE_LIMIT,
    time_limit_s: float = 60.0,
) -> Order:
    """The order with the shortest layer, each nano-operation taking its duration; only one shorter than `below_s` counts."""
    least_s = work_bound_s(structure, durations_s)
    if least_s <= 0:
        return Order(tuple(0.0 for _ in structure), 0.0, 0.0)
    if least_s >= below_s * (1 - LEAST_GAIN):
        return Order(None, math.inf, least_s)
    scaled = [seconds / least_s for seconds in durations_s]
    program = Program()
    w = program.column(least_s / (below_s * (1 - LEAST_GAIN)), 1.0)
    u = start_columns(program, structure)
    for need in needs(data_flow(problem, structure)):
        row = {u[need.consumer]: 1.0, u[need.producer]: -1.0, w: -scaled[need.producer]}
        program.row(row, low=-need.distance)
    for i, j in itertools.combinations(range(len(structure)), 2):  # a node without work has its place in a stream, too
        if structure[i][0].resource is structure[j][0].resource:
            k = program.column(-1, 2, is_integral=True)
            program.row({u[j]: 1, u[i]: -1, k: 1, w: -scaled[i]}, low=0)
            program.row({u[i]: 1, u[j]: -1, k: -1, w: -scaled[j]}, low=-1)
    x, bound = solve(program, w, node_limit=node_limit, time_limit_s=time_limit_s)
    bound_s = below_s if bound == -math.inf else max(least_s / max(bound, program.lower[w]), least_s)
    if x is None or x[w] <= 0:  # 0 is a layer without end: feasible where nothing bounds it, and no order
        return Order(None, math.inf, bound_s)
    return Order(tuple(x[column] for column in u), least_s / x[w], bound_s)


def start_columns(program: Program, structure: Structure) -> list[int]:
    """A column for each start, in layers.  The first KQV starts its layer, each other KQV within it; the rest may lag by one."""
    columns = []
    for index, (op, _) in enumerate(structure):
        upper = 0.0 if index == 0 else 1.0 - LAYER_ROUNDING if op is OpKind.KQV else 2.0 - LAYER_ROUNDING
        columns.append(program.column(0.0, upper))
    return columns
