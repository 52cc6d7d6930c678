"""Which nodes must be done before a node starts?  The data flow of a decoder layer, and the dependencies that it asks for.

Two nodes depend on each other if their operations do and their token ranges intersect (paper, section 4.1.2).  One rule
is wider: prefill attention reads the keys and values of every token before its end, also those that another nano-batch
writes, because a chunk of a prompt can straddle a cut.
"""

import dataclasses
from collections.abc import Collection

from nanojax.pipeline.ir import OpKind, Pipeline

SAME_LAYER: dict[OpKind, tuple[OpKind, ...]] = {
    OpKind.KQV: (),
    OpKind.DEC_ATTN: (OpKind.KQV,),
    OpKind.PF_ATTN: (OpKind.KQV,),
    OpKind.ATTN_AG: (OpKind.DEC_ATTN, OpKind.PF_ATTN),
    OpKind.O: (OpKind.DEC_ATTN, OpKind.PF_ATTN, OpKind.ATTN_AG),
    OpKind.O_AG: (OpKind.O,),
    OpKind.O_AR: (OpKind.O,),
    OpKind.ROUTER: (OpKind.O, OpKind.O_AG, OpKind.O_AR),
    OpKind.UG: (OpKind.O, OpKind.O_AG, OpKind.O_AR, OpKind.ROUTER),
    OpKind.D: (OpKind.UG,),
    OpKind.D_AR: (OpKind.D,),
}
"""Operation -> operations of the same layer whose results it reads, where the pipeline has them."""
LAYER_OUTPUT = (OpKind.D, OpKind.D_AR)
"""Operations whose results the next layer's KQV reads."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Node `consumer` reads what node `producer` writes `distance` iterations of the layer loop earlier (0: the same)."""

    consumer: int
    producer: int
    distance: int


def needs(pipeline: Pipeline) -> tuple[Need, ...]:
    """What the data flow asks for, whatever the pipeline's `deps` say.  A distance other than 0 or 1 is a wrong `lag`."""
    found = []
    for i, consumer in enumerate(pipeline.nodes):
        reads = pipeline.tokens_of(consumer)
        for j, producer in enumerate(pipeline.nodes):
            writes = pipeline.tokens_of(producer)
            is_prefill = consumer.op is OpKind.PF_ATTN
            is_read = writes.start < reads.stop if is_prefill else reads.intersects(writes)
            if is_read and producer.op in SAME_LAYER[consumer.op]:
                found.append(Need(i, j, consumer.lag - producer.lag))
            elif is_read and consumer.op is OpKind.KQV and producer.op in LAYER_OUTPUT:
                found.append(Need(i, j, 1 + consumer.lag - producer.lag))
    return tuple(found)


def order_problem(pipeline: Pipeline, need: Need) -> str | None:
    """Why no `deps` can satisfy `need`: the lags do not fit, or the reader is launched first.  None if they can."""
    consumer, producer = pipeline.describe(need.consumer), pipeline.describe(need.producer)
    if need.distance not in (0, 1):
        lags = pipeline.nodes[need.consumer].lag, pipeline.nodes[need.producer].lag
        return f"{consumer} of lag {lags[0]} reads what {producer} of lag {lags[1]} writes: these lags do not fit"
    if need.distance == 0 and need.producer > need.consumer:
        return f"{consumer} reads what {producer} writes, but is launched before it"
    return None


def ancestors(pipeline: Pipeline, num_iterations: int, *, with_streams: bool = False) -> list[list[int]]:
    """What each node waits for, directly or not, over `num_iterations` of the layer loop.

    Gives bit sets `[iteration][node]`; bit `i * num_nodes + n` is node n of iteration i.  `with_streams` adds that the
    nodes of a stream run in order.  The pipeline's `deps` must name earlier nodes.
    """
    num_nodes = len(pipeline.nodes)
    found: list[list[int]] = []
    last_of_stream: dict[int, tuple[int, int]] = {}
    for iteration in range(num_iterations):
        found.append([])
        for index, node in enumerate(pipeline.nodes):
            before = [(iteration, dep) for dep in node.deps]
            if iteration > 0:
                before += [(iteration - 1, dep) for dep in node.carried_deps]
            if with_streams and node.stream in last_of_stream:
                before.append(last_of_stream[node.stream])
            last_of_stream[node.stream] = (iteration, index)
            bits = 0
            for i, dep in before:
                bits |= found[i][dep] | 1 << (i * num_nodes + dep)
            found[-1].append(bits)
    return found


def waits_for_decode(pipeline: Pipeline, index: int) -> bool:
    """Whether a prefill attention node depends on decode attention of all of its tokens; the data flow does not ask for it."""
    node, reach = pipeline.nodes[index], ancestors(pipeline, 3)
    twins = [
        (i, node.lag - other.lag)
        for i, other in enumerate(pipeline.nodes)
        if other.op is OpKind.DEC_ATTN and pipeline.tokens_of(other).intersects(pipeline.tokens_of(node))
    ]
    return all(
        distance >= 0 and reach[2][index] >> ((2 - distance) * len(pipeline.nodes) + i) & 1 for i, distance in twins
    )


def with_dependencies(pipeline: Pipeline, nodes: Collection[int] | None = None) -> Pipeline:
    """The pipeline with `deps` and `carried_deps` that satisfy the data flow, so that one can write only nodes in order.

    What the nodes already state is kept; what follows from other dependencies is not added.  `nodes` limits the additions
    to these indices.  Raises ValueError, naming the nodes, if a node is launched before one whose result it reads.
    """
    stated = {(i, dep, distance) for i in range(len(pipeline.nodes)) for dep, distance in _edges(pipeline, i)}
    full, wanted = set(stated), range(len(pipeline.nodes)) if nodes is None else nodes
    for need in needs(pipeline):
        if need.consumer in wanted:
            if (problem := order_problem(pipeline, need)) is not None:
                raise ValueError(problem)
            full.add((need.consumer, need.producer, need.distance))
    reach = ancestors(_with_edges(pipeline, full), 3)

    def is_implied(consumer: int, producer: int, distance: int) -> bool:
        bit = 1 << ((2 - distance) * len(pipeline.nodes) + producer)
        others = [(dep, back) for i, dep, back in full if i == consumer and (dep, back) != (producer, distance)]
        return any(reach[2 - back][dep] & bit for dep, back in others)

    return _with_edges(pipeline, stated | {edge for edge in full - stated if not is_implied(*edge)})


def _edges(pipeline: Pipeline, index: int) -> list[tuple[int, int]]:
    node = pipeline.nodes[index]
    return [(dep, 0) for dep in node.deps] + [(dep, 1) for dep in node.carried_deps]


def _with_edges(pipeline: Pipeline, edges: Collection[tuple[int, int, int]]) -> Pipeline:
    nodes = []
    for index, node in enumerate(pipeline.nodes):
        deps = tuple(sorted(dep for i, dep, distance in edges if i == index and distance == 0))
        carried = tuple(sorted(dep for i, dep, distance in edges if i == index and distance == 1))
        same = set(deps) == set(node.deps) and set(carried) == set(node.carried_deps)
        nodes.append(node if same else dataclasses.replace(node, deps=deps, carried_deps=carried))
    return dataclasses.replace(pipeline, nodes=tuple(nodes))
