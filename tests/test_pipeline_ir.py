"""Does validation accept what is right and name what is not, and are derived dependencies the ones that are needed?"""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojax.pipeline import library
from nanojax.pipeline.dependencies import with_dependencies
from nanojax.pipeline.ir import NanoBatch, OpKind, Pipeline
from nanojax.pipeline.json_format import from_json, to_json
from nanojax.pipeline.validate import validate
from tests.pipelines import CHOICES, build


def index(pipeline, label):
    return [pipeline.label(i) for i in range(len(pipeline.nodes))].index(label)


def change(pipeline, label, **fields):
    i = index(pipeline, label)
    nodes = list(pipeline.nodes)
    nodes[i] = dataclasses.replace(nodes[i], **fields)
    return dataclasses.replace(pipeline, nodes=tuple(nodes))


def without(pipeline, label):
    """The pipeline less one node; dependencies on it pass to what it waited for."""
    gone = index(pipeline, label)
    heirs = pipeline.nodes[gone]

    def moved(deps, passed_on):
        kept = {d for dep in deps for d in (passed_on if dep == gone else (dep,))}
        return tuple(sorted(d - (d > gone) for d in kept))

    nodes = tuple(
        dataclasses.replace(
            n, deps=moved(n.deps, heirs.deps), carried_deps=moved(n.carried_deps, heirs.carried_deps or heirs.deps)
        )
        for i, n in enumerate(pipeline.nodes)
        if i != gone
    )
    return dataclasses.replace(pipeline, nodes=nodes)


def swap(pipeline, first, second):
    """Two nodes change places in the launch order; dependencies follow them."""
    i, j = index(pipeline, first), index(pipeline, second)
    to = {i: j, j: i}

    def moved(deps):
        return tuple(to.get(dep, dep) for dep in deps)

    nodes = [dataclasses.replace(n, deps=moved(n.deps), carried_deps=moved(n.carried_deps)) for n in pipeline.nodes]
    nodes[i], nodes[j] = nodes[j], nodes[i]
    return dataclasses.replace(pipeline, nodes=tuple(nodes))


RELEASED = library.llama_70b_released()
SPLIT = library.nano_batched(16, (6, 10))
LAGGED = library.llama_8b_single_gpu(16, 6)
TWO_GATHERS = library.nano_batched(16, (6, 10), collectives="gather")

DEFECTS = {
    "uncovered": (
        dataclasses.replace(RELEASED, nano_batches=(NanoBatch(0, 200), *RELEASED.nano_batches[1:])),
        "tokens 200..256 are in no KQV node",
    ),
    "overlapping": (
        change(SPLIT, "UG1", nano_batch=1),
        "node 8 (UG on tokens 6..16) and node 9 (UG on tokens 6..16) overlap",
    ),
    "operation missing": (without(library.sequential(16), "UG"), "operation UG is missing"),
    "half an operation missing": (without(SPLIT, "D2"), "tokens 6..16 are in no D node"),
    "half a router": (
        without(library.nano_batched(16, (6, 10), is_moe=True), "Router1"),
        "tokens 0..6 are in no Router node",
    ),
    "no dependency in the layer": (
        change(SPLIT, "UG2", deps=()),
        "node 9 (UG on tokens 6..16) reads what node 7 (O on tokens 6..16) writes, but does not wait for it: add 7 to its deps",
    ),
    "no dependency between layers": (
        change(SPLIT, "KQV1", carried_deps=()),
        "node 0 (KQV on tokens 0..6) reads what node 10 (D on tokens 0..6) writes, "
        "but does not wait for it: add 10 to its carried_deps",
    ),
    "no dependency on the collective between layers": (
        change(RELEASED, "KQV3", carried_deps=(19,)),
        "node 5 (KQV on tokens 640..1408) reads what node 20 (D.AR on tokens 640..1408) writes",
    ),
    "keys of another nano-batch": (
        change(SPLIT, "PfAttn2", deps=(1,)),
        "node 5 (PfAttn on tokens 6..16) reads the keys and values that node 0 (KQV on tokens 0..6) writes",
    ),
    "carried dependency as one of the same iteration": (
        change(LAGGED, "O2", carried_deps=(8, 9)),
        "node 4 (O on tokens 6..16) reads what node 12 (PfAttn on tokens 6..16) writes",
    ),
    "lag": (
        change(LAGGED, "KQV2", lag=1),
        "node 8 (DecAttn on tokens 6..11) of lag 0 reads what node 7 (KQV on tokens 6..16) of lag 1 writes",
    ),
    "lag that is none": (change(LAGGED, "O1", lag=2), "node 10 (O on tokens 0..6): lag=2 must be 0 or 1"),
    "both forms": (
        change(RELEASED, "O.AG", nano_batch=RELEASED.nodes[index(RELEASED, "O.AR")].nano_batch),
        "node 12 (O.AG on tokens 640..2048) and node 14 (O.AR on tokens 640..2048) overlap",
    ),
    "neither form": (without(RELEASED, "O.AR"), "tokens 640..2048 are in no O.AG or O.AR node"),
    "one node in both forms": (
        dataclasses.replace(
            RELEASED,
            nodes=tuple(
                dataclasses.replace(n, nano_batch=len(RELEASED.nano_batches)) if n.op is OpKind.O else n
                for n in without(RELEASED, "O2").nodes
            ),
            nano_batches=(*RELEASED.nano_batches, NanoBatch(0, 2048)),
        ),
        "node 11 (O on tokens 0..2048) is partly gathered (O.AG) and partly reduced (O.AR)",
    ),
    "gather without the gather before O": (without(TWO_GATHERS, "Attn.AG2"), "tokens 6..16 are in no Attn.AG node"),
    "reduce with a gather before O": (
        change(RELEASED, "Attn.AG", nano_batch=RELEASED.nano_batches.index(NanoBatch(640, 2048))),
        "node 7 (Attn.AG on tokens 640..2048) has tokens 640..2048, on which Attn.AG has nothing to do",
    ),
    "down projection without its reduce": (without(RELEASED, "D.AR3"), "tokens 1408..2048 are in no D.AR node"),
    "cycle": (
        change(SPLIT, "O1", deps=(2, 4, 8)),
        "these wait for each other: node 6 (O on tokens 0..6), node 8 (UG on tokens 0..6)",
    ),
    "waits for itself": (change(SPLIT, "O1", deps=(6,)), "these wait for each other: node 6 (O on tokens 0..6)"),
    "launched before its dependency": (
        swap(SPLIT, "O2", "UG2"),
        "node 7 (UG on tokens 6..16) waits for node 9 (O on tokens 6..16), which is launched after it",
    ),
    "bad nano-batch": (change(SPLIT, "O1", nano_batch=2), "node 6 (O): nano_batch=2 is none of the 2 nano-batches"),
    "bad dependency": (
        change(SPLIT, "O1", deps=(12,)),
        "node 6 (O on tokens 0..6): deps has 12, which is none of the 12",
    ),
    "bad carried dependency": (change(SPLIT, "O1", carried_deps=(-1,)), "carried_deps has -1"),
    "bad stream": (change(SPLIT, "O1", stream=-1), "node 6 (O on tokens 0..6): stream=-1 must not be negative"),
    "no share": (change(SPLIT, "O1", share=0.0), "node 6 (O on tokens 0..6): share=0.0 must be above 0 and at most 1"),
    "share above 1": (change(SPLIT, "O1", share=1.5), "share=1.5 must be above 0 and at most 1"),
    "shares of nodes that start together": (
        change(RELEASED, "D.AR2", share=0.7),
        "these start together, but their shares add up to 1.1 > 1: "
        "node 20 (D.AR on tokens 640..1408) with 0.7, node 0 (KQV on tokens 0..256) with 0.4",
    ),
    "empty range": (
        dataclasses.replace(SPLIT, nano_batches=(NanoBatch(0, 0), NanoBatch(0, 16))),
        "nano_batches[0] = 0..0 must satisfy 0 <= start < stop <= 16",
    ),
    "range beyond the batch": (dataclasses.replace(SPLIT, num_tokens=15), "nano_batches[1] = 6..16 must satisfy"),
    "range twice": (
        dataclasses.replace(SPLIT, nano_batches=(*SPLIT.nano_batches, NanoBatch(0, 6))),
        "nano_batches[2] = 0..6 is there twice",
    ),
    "no tokens": (Pipeline("none", 0, (), ()), "num_tokens=0 must be positive"),
}


@pytest.mark.parametrize(("pipeline", "message"), DEFECTS.values(), ids=DEFECTS)
def test_defects_are_named(pipeline, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        validate(pipeline)
    assert str(caught.value).startswith(f"pipeline {pipeline.name!r}: ")


def test_shares_of_three_that_start_together_are_added_up():
    def attention(share):
        rows = [("PfAttn", 0, 12, 0, 0.4), ("DecAttn", 0, 5, 1, 0.4), ("DecAttn", 5, 12, 2, share)]
        nodes = [{"op": op, "tokens": [a, b], "stream": stream, "share": r} for op, a, b, stream, r in rows]
        rest = [{"op": op, "tokens": [0, 12]} for op in ("KQV", "O", "UG", "D")]
        return from_json(json.dumps({"name": "three", "num_tokens": 12, "nodes": [rest[0], *nodes, *rest[1:]]}))

    validate(attention(0.2))
    message = "shares add up to 1.1 > 1: node 1 (PfAttn on tokens 0..12) with 0.4, node 2 (DecAttn on tokens 0..5) with"
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(attention(0.3))


def test_the_number_of_devices_decides_on_collectives():
    with pytest.raises(
        ValueError, match=r"one device, but has collectives: node 7 \(Attn.AG on tokens 0..640\), node 12"
    ):
        validate(RELEASED, num_devices=1)
    with pytest.raises(ValueError, match="it has no collectives, but is to run on 8 devices"):
        validate(SPLIT, num_devices=8)


def test_shares_can_be_left_out_of_a_plan_that_has_none_yet():
    unplanned = dataclasses.replace(
        RELEASED, nodes=tuple(dataclasses.replace(node, share=1.0) for node in RELEASED.nodes)
    )
    validate(unplanned, check_shares=False)
    with pytest.raises(ValueError, match="these start together"):
        validate(unplanned)


def reads(pipeline, node):
    """(operation, layers back, token) of all that a node reads, token by token: the oracle of the data flow."""
    ops = {n.op for n in pipeline.nodes}
    reduced = {t for n in pipeline.nodes if n.op is OpKind.O_AR for t in span(pipeline, n)}
    attention = (OpKind.DEC_ATTN, OpKind.PF_ATTN)
    for t in span(pipeline, node):
        after_o = OpKind.O_AR if t in reduced else OpKind.O_AG if OpKind.O_AG in ops else OpKind.O
        sources = {
            OpKind.KQV: [],
            OpKind.DEC_ATTN: [OpKind.KQV],
            OpKind.PF_ATTN: [],
            OpKind.ATTN_AG: attention,
            OpKind.O: attention if after_o is not OpKind.O_AG else [OpKind.ATTN_AG],
            OpKind.O_AG: [OpKind.O],
            OpKind.O_AR: [OpKind.O],
            OpKind.ROUTER: [after_o],
            OpKind.UG: [after_o, *([OpKind.ROUTER] if OpKind.ROUTER in ops else [])],
            OpKind.D: [OpKind.UG],
            OpKind.D_AR: [OpKind.D],
        }[node.op]
        yield from ((op, 0, t) for op in sources)
        if node.op is OpKind.KQV:
            yield (OpKind.D_AR if OpKind.D_AR in ops else OpKind.D), 1, t
    if node.op is OpKind.PF_ATTN:
        yield from ((OpKind.KQV, 0, t) for t in range(pipeline.tokens_of(node).stop))


def span(pipeline, node):
    return range(pipeline.tokens_of(node).start, pipeline.tokens_of(node).stop)


def first_bad_read(pipeline, late, num_layers=3):
    """Runs the loop, always taking the node that is least in `late` among those whose dependencies are done.

    Gives what was read before it was written, None if nothing was.
    """
    instances = [
        (iteration, i)
        for iteration in range(num_layers + 1)
        for i, node in enumerate(pipeline.nodes)
        if 0 <= iteration - node.lag < num_layers
    ]
    todo, written = list(instances), set()
    while todo:

        def is_free(instance):
            iteration, i = instance
            node = pipeline.nodes[i]
            before = [(iteration, dep) for dep in node.deps] + [(iteration - 1, dep) for dep in node.carried_deps]
            return not any(one in todo for one in before)

        iteration, i = min(filter(is_free, todo), key=lambda one: (late(one[1]), one))
        node = pipeline.nodes[i]
        layer = iteration - node.lag
        for op, back, token in reads(pipeline, node):
            if layer - back >= 0 and (op, layer - back, token) not in written:
                return i, op, token
        written |= {(node.op, layer, token) for token in span(pipeline, node)}
        todo.remove((iteration, i))
    return None


@settings(max_examples=40, deadline=None)
@given(choices=CHOICES, data=st.data())
def test_derived_dependencies_are_enough_and_none_too_many(choices, data):
    """In any order that they allow, everything is written before it is read; without any one of them it is not."""
    pipeline = build(choices)
    validate(pipeline, check_shares=False)
    assert from_json(to_json(pipeline)) == pipeline
    late = data.draw(st.permutations(range(len(pipeline.nodes))))
    assert first_bad_read(pipeline, late.__getitem__) is None

    reader = data.draw(st.sampled_from([i for i, n in enumerate(pipeline.nodes) if n.deps or n.carried_deps]))
    node = pipeline.nodes[reader]
    field = data.draw(st.sampled_from([f for f in ("deps", "carried_deps") if getattr(node, f)]))
    lost = data.draw(st.sampled_from(getattr(node, field)))
    kept = tuple(dep for dep in getattr(node, field) if dep != lost)
    nodes = list(pipeline.nodes)
    nodes[reader] = dataclasses.replace(node, **{field: kept})
    broken = dataclasses.replace(pipeline, nodes=tuple(nodes))
    with pytest.raises(ValueError, match=re.escape(pipeline.describe(reader))):
        validate(broken, check_shares=False)
    assert first_bad_read(broken, lambda i: i == lost) is not None


@settings(max_examples=20, deadline=None)
@given(choices=CHOICES, data=st.data())
def test_stated_dependencies_are_kept_and_completed(choices, data):
    """From any part of the dependencies, and some that nobody needs, a valid pipeline comes back that has them all."""
    pipeline, nodes = build(choices), []
    for i, node in enumerate(pipeline.nodes):
        some = data.draw(st.lists(st.integers(0, i - 1), max_size=2, unique=True)) if i else []
        nodes.append(dataclasses.replace(node, deps=tuple(sorted(some)), carried_deps=()))
    stated = dataclasses.replace(pipeline, nodes=tuple(nodes))
    completed = with_dependencies(stated)
    validate(completed, check_shares=False)
    assert all(set(a.deps) <= set(b.deps) for a, b in zip(stated.nodes, completed.nodes, strict=True))
    assert with_dependencies(completed) == completed
