"""What do the pipeline tests share?  Random valid pipelines, durations by hand, and every ready-made pipeline."""

import dataclasses
import itertools

from hypothesis import strategies as st

from nanojax.pipeline.dependencies import SAME_LAYER, needs, with_dependencies
from nanojax.pipeline.ir import COLLECTIVES, NanoBatch, Node, OpKind, Pipeline
from nanojax.pipeline.library import ONE_DEVICE, PIPELINES

NUM_TOKENS = 12
MAX_NODES = 3 * len(OpKind)
CURVE_SHARES = (0.25, 0.5, 1.0)


def ready_made(num_tokens):
    """(id, number of devices, pipeline) of all ready-made pipelines."""
    for name, make in PIPELINES.items():
        for is_moe in (False, True):
            for num_devices in (1, 8):
                if name not in ONE_DEVICE or num_devices == 1:
                    identity = f"{name}-{num_tokens}-{'moe' if is_moe else 'dense'}-{num_devices}"
                    yield identity, num_devices, make(num_tokens, is_moe, num_devices)


def table(entries):
    """A duration from {(operation, start, stop): seconds}."""

    def duration(op, tokens):
        return entries[op, tokens.start, tokens.stop]

    return duration


@dataclasses.dataclass(frozen=True)
class Choices:
    """What is random about a pipeline; lists have an entry for each of at most `MAX_NODES` nodes."""

    is_parallel: bool
    is_moe: bool
    reduced_from: int
    cuts: list[frozenset[int]]
    streams: list[int]
    shares: list[float]
    lags: list[int]
    order: list[int]


def _lists(entries):
    return st.lists(entries, min_size=MAX_NODES, max_size=MAX_NODES)


CHOICES = st.builds(
    Choices,
    is_parallel=st.booleans(),
    is_moe=st.booleans(),
    reduced_from=st.sampled_from([0, 4, NUM_TOKENS]),
    cuts=_lists(st.frozensets(st.sampled_from([2, 6, 7]), max_size=2)),
    streams=_lists(st.integers(0, 2)),
    shares=_lists(st.sampled_from(CURVE_SHARES)),
    lags=_lists(st.sampled_from([0, 0, 1])),
    order=_lists(st.integers(0, 9)),
)


def build(choices):
    """A valid pipeline of 12 tokens: own cuts, launch order, lags, streams and shares for each operation.

    Decode attention has a stream that only compute shares, and so have the collectives.  (Not in the strategy itself, where
    the type checker's random numbers are not welcome.)
    """
    reduced_from = choices.reduced_from if choices.is_parallel else NUM_TOKENS
    ranges = []
    for op, cuts in zip(OpKind, choices.cuts, strict=False):
        if (op in COLLECTIVES and not choices.is_parallel) or (op is OpKind.ROUTER and not choices.is_moe):
            continue
        start = reduced_from if op is OpKind.O_AR else 0
        stop = reduced_from if op in (OpKind.ATTN_AG, OpKind.O_AG) else NUM_TOKENS
        if op is OpKind.O:
            cuts |= {reduced_from}  # an O node is gathered or reduced, not both
        edges = sorted({start, stop, *(cut for cut in cuts if start < cut < stop)})
        ranges += [(op, NanoBatch(a, b)) for a, b in itertools.pairwise(edges)]
    nano_batches = tuple(dict.fromkeys(tokens for _, tokens in ranges))
    nodes = []
    for (op, tokens), stream, share in zip(ranges, choices.streams, choices.shares, strict=False):
        stream = 1 if op is OpKind.DEC_ATTN else 2 if op in COLLECTIVES else stream
        nodes.append(Node(op, nano_batches.index(tokens), share=share, stream=stream))
    pipeline = Pipeline("drawn", NUM_TOKENS, nano_batches, tuple(nodes))
    return with_dependencies(_reordered(_with_lags(pipeline, choices.lags), choices.order))


def _with_lags(pipeline, drawn):
    """Once a lag is 1, it is 1 for all that follows from it in the layer."""
    lags = []
    edges = [(need.consumer, need.producer) for need in needs(pipeline) if _within_layer(pipeline, need)]
    for index in range(len(pipeline.nodes)):
        inherited = [lags[producer] for consumer, producer in edges if consumer == index]
        lags.append(max([drawn[index], *inherited]))
    nodes = tuple(dataclasses.replace(node, lag=lag) for node, lag in zip(pipeline.nodes, lags, strict=True))
    return dataclasses.replace(pipeline, nodes=nodes)


def _within_layer(pipeline, need):
    return pipeline.nodes[need.producer].op in SAME_LAYER[pipeline.nodes[need.consumer].op]


def _reordered(pipeline, priority):
    """Launched by priority, producers of the same iteration first."""
    left = list(range(len(pipeline.nodes)))
    before = {i: {n.producer for n in needs(pipeline) if n.consumer == i and n.distance == 0} for i in left}
    order = []
    while left:
        order.append(min((i for i in left if not before[i] & set(left)), key=lambda i: (priority[i], i)))
        left.remove(order[-1])
    return dataclasses.replace(pipeline, nodes=tuple(pipeline.nodes[i] for i in order))
