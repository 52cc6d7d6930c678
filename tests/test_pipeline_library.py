"""Do the ready-made pipelines hold what they promise, and does JSON say what it cannot read?"""

import dataclasses
import itertools
import json
import re

import pytest

from nanojax.pipeline import library
from nanojax.pipeline.dependencies import waits_for_decode
from nanojax.pipeline.ir import NanoBatch, Node, OpKind
from nanojax.pipeline.json_format import from_json, to_json
from nanojax.pipeline.layer_loop import phases
from nanojax.pipeline.validate import validate
from tests.pipelines import NUM_TOKENS, ready_made

TOKEN_COUNTS = (1, 2, 3, 4, 5, 7, 16, 33, 64, 256, 500, 768, 1000, 1024, 2048, 4096)


@pytest.mark.parametrize("num_tokens", TOKEN_COUNTS)
def test_ready_made_pipelines_are_valid_and_survive_json(num_tokens):
    for identity, num_devices, pipeline in ready_made(num_tokens):
        validate(pipeline, num_devices=num_devices)
        assert from_json(to_json(pipeline)) == pipeline, identity


def ranges(pipeline, op):
    return [(pipeline.tokens_of(n).start, pipeline.tokens_of(n).stop) for n in pipeline.nodes if n.op is op]


@pytest.mark.parametrize(
    ("pipeline", "kqv", "ug"),
    [
        (library.llama_70b_released(2048), [0, 256, 640, 1408, 2048], [0, 640, 2048]),
        (library.llama_70b_released(1024), [0, 256, 384, 640, 1024], [0, 384, 1024]),
        (library.llama_70b_released(768), [0, 128, 384, 512, 768], [0, 384, 768]),
        (library.mixtral_released(), [0, 1024, 2048, 3072, 4096], [0, 2048, 4096]),
        (library.llama_70b_figure6(), [0, 384, 768, 1408, 2048], [0, 768, 2048]),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_published_sizes(pipeline, kqv, ug):
    assert ranges(pipeline, OpKind.KQV) == list(itertools.pairwise(kqv))
    assert ranges(pipeline, OpKind.UG) == list(itertools.pairwise(ug))
    first, second = ranges(pipeline, OpKind.UG)
    assert ranges(pipeline, OpKind.ATTN_AG) == ranges(pipeline, OpKind.O_AG) == [first]
    assert ranges(pipeline, OpKind.O_AR) == [second]


def test_cuts_are_multiples_of_128_where_there_are_enough_tokens_else_of_8():
    for num_tokens, step in ((512, 128), (900, 128), (2000, 128), (256, 8), (64, 8), (48, 8)):
        for name in ("llama_70b_released", "llama_70b_figure6", "mixtral_released", "nano_batched"):
            pipeline = library.PIPELINES[name](num_tokens, False, 8)
            starts = {tokens.start for tokens in pipeline.nano_batches}
            assert len(starts) == (2 if name == "nano_batched" else 4)
            assert all(start % step == 0 for start in starts), (name, num_tokens, starts)


def test_the_order_on_each_stream_of_one_device_is_the_released_one():
    pipeline = library.llama_8b_single_gpu()
    names = {
        stream: [pipeline.label(i) for i, n in enumerate(pipeline.nodes) if n.stream == stream] for stream in (0, 1)
    }
    assert names[0] == ["KQV1", "O2", "UG2", "D2", "KQV2", "O1", "UG1", "D1"]
    assert names[1] == ["DecAttn1", "DecAttn2", "PfAttn1", "DecAttn3", "DecAttn4", "PfAttn2"]
    prefill = next(n for i, n in enumerate(pipeline.nodes) if pipeline.label(i) == "PfAttn2")
    assert "UG1" in [pipeline.label(dep) for dep in prefill.deps]
    assert [pipeline.label(i) for i, n in enumerate(pipeline.nodes) if n.lag] == ["O2", "UG2", "D2"]


def test_decode_attention_of_one_nano_batch_starts_with_the_dense_operations_of_the_other():
    pipeline = library.decode_beside_dense(2048, 768, attention_shares=(0.3, 0.2))
    halves = [{pipeline.label(i) for _, i in phase} for phase in phases(pipeline, 4)][2:-1]
    dense = [{f"{op}{n}" for op in ("PfAttn", "O", "UG", "D", "KQV")} for n in (1, 2)]
    assert halves[::2] == [dense[0] | {"DecAttn2"}] * 3 + [(dense[0] - {"KQV1"}) | {"DecAttn2"}]
    assert halves[1::2] == [dense[1] | {"DecAttn1"}] * 3
    shares = {pipeline.label(i): node.share for i, node in enumerate(pipeline.nodes)}
    assert {name: shares[name] for name in halves[0]} == dict.fromkeys(halves[0] - {"DecAttn2"}, 0.8) | {
        "DecAttn2": 0.2
    }
    assert {name: shares[name] for name in halves[1]} == dict.fromkeys(halves[1] - {"DecAttn1"}, 0.7) | {
        "DecAttn1": 0.3
    }
    prefill = [i for i, node in enumerate(pipeline.nodes) if node.op is OpKind.PF_ATTN]
    assert all(waits_for_decode(pipeline, i) for i in prefill)


def test_prefill_attention_of_the_published_pipelines_waits_for_no_decode_attention():
    for name in ("llama_8b", "llama_70b_figure6", "sequential"):
        pipeline = library.PIPELINES[name](2048, False, 1)
        prefill = [i for i, node in enumerate(pipeline.nodes) if node.op is OpKind.PF_ATTN]
        assert not any(waits_for_decode(pipeline, i) for i in prefill)


def test_on_one_stream_keeps_nodes_and_order():
    pipeline = library.llama_70b_released()
    plain = library.on_one_stream(pipeline)
    validate(plain)
    assert [(n.op, n.nano_batch, n.deps) for n in plain.nodes] == [(n.op, n.nano_batch, n.deps) for n in pipeline.nodes]
    assert {(n.stream, n.share) for n in plain.nodes} == {(0, 1.0)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: library.sequential(0), "num_tokens=0 must be positive"),
        (lambda: library.PIPELINES["nano_batched"](0, False, 1), "num_tokens=0 must be positive"),
        (lambda: library.nano_batched(8, (4, 3)), "splits=(4, 3) must be positive and add up to num_tokens=8"),
        (lambda: library.nano_batched(8, ()), "splits=() must be positive"),
        (lambda: library.nano_batched(8, (4, 4), collectives=("gather",)), "must be one form, or as many as splits"),
        (lambda: library.llama_8b_single_gpu(8, 8), "first=8 must be between 0 and num_tokens=8"),
        (lambda: library.decode_beside_dense(8, 0), "first=0 must be between 0 and num_tokens=8"),
        (lambda: library.PIPELINES["llama_8b"](64, False, 2), "is for one device, got num_devices=2"),
    ],
)
def test_wrong_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


HAND_WRITTEN = """{
  "name": "by hand", "num_tokens": 12,
  "nodes": [
    {"op": "KQV", "tokens": [0, 12]},
    {"op": "DecAttn", "tokens": [0, 12], "stream": 1, "share": 0.4},
    {"op": "PfAttn", "tokens": [0, 12], "share": 0.6},
    {"op": "O", "tokens": [0, 12]},
    {"op": "UG", "tokens": [0, 5]},
    {"op": "UG", "tokens": [5, 12]},
    {"op": "D", "tokens": [0, 12]}
  ]
}"""


def test_a_pipeline_can_be_written_as_nodes_in_order():
    pipeline = from_json(HAND_WRITTEN)
    validate(pipeline, num_devices=1)
    assert [node.deps for node in pipeline.nodes] == [(), (0,), (0,), (1, 2), (3,), (3,), (4, 5)]
    assert pipeline.nodes[0].carried_deps == (6,)
    assert pipeline.nodes[1] == Node(OpKind.DEC_ATTN, 0, (0,), 0.4, 1)


def test_a_node_that_states_some_dependencies_gets_no_others():
    entry = json.loads(HAND_WRITTEN)
    entry["nodes"][0]["deps"] = []
    entry["nodes"][3]["carried_deps"] = [6]
    nodes = from_json(json.dumps(entry)).nodes
    assert (nodes[0].deps, nodes[0].carried_deps) == ((), ())
    assert (nodes[3].deps, nodes[3].carried_deps) == ((), (6,))
    assert nodes[4].deps == (3,)


def test_json_is_short_where_nothing_is_special():
    lines = to_json(library.sequential(NUM_TOKENS)).splitlines()
    assert '    {"op": "O", "tokens": [0, 12], "deps": [1, 2]},' in lines


def test_an_unused_nano_batch_survives_json():
    split = library.nano_batched(16, (6, 10))
    pipeline = dataclasses.replace(split, nano_batches=(*split.nano_batches, NanoBatch(0, 16)))
    assert from_json(to_json(pipeline)) == pipeline


def edited(**fields):
    """The hand-written pipeline with one field of one entry changed (`node` says which), or removed (None)."""
    entry = json.loads(HAND_WRITTEN)
    target = entry["nodes"][fields.pop("node")] if "node" in fields else entry
    for name, value in fields.items():
        target[name] = value
        if value is None:
            del target[name]
    return json.dumps(entry)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "pipeline: this is no JSON"),
        ("[]", "pipeline must be a JSON object, got []"),
        (edited(num_tokens=None), "pipeline: field 'num_tokens' is missing"),
        (edited(num_tokens="12"), "pipeline: num_tokens='12' must be an integer"),
        (edited(name=3), "pipeline: name=3 must be text"),
        (edited(nodes={}), "pipeline: nodes must be a list, got {}"),
        (edited(layers=[]), "pipeline: field 'layers' is unknown: name, num_tokens, nano_batches, nodes"),
        (edited(nano_batches=[[0]]), "nano_batches[0]=[0] must be [start, stop]"),
        (edited(node=2, op="PfAtn"), "node 2: op='PfAtn' is none of KQV, DecAttn, PfAttn, "),
        (edited(node=2, op=None), "node 2: field 'op' is missing"),
        (edited(node=2, tokens=None), "node 2: field 'tokens' is missing"),
        (edited(node=2, tokens=[0, 12.5]), "node 2: tokens=[0, 12.5] must be [start, stop]"),
        (edited(node=2, tokens=[0, True]), "node 2: tokens=[0, True] must be [start, stop]"),
        (edited(node=2, share="all"), "node 2: share='all' must be a number"),
        (edited(node=2, stream=0.5), "node 2: stream=0.5 must be an integer"),
        (edited(node=2, lag=False), "node 2: lag=False must be an integer"),
        (edited(node=2, deps=["KQV"]), "node 2: deps=['KQV'] must be a list of node positions"),
        (edited(node=2, dep=[0]), "node 2: field 'dep' is unknown: op, tokens, share,"),
    ],
)
def test_what_cannot_be_read_is_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_json(text)


def test_nodes_in_the_wrong_order_are_refused_when_dependencies_are_derived():
    entry = json.loads(HAND_WRITTEN)
    entry["nodes"][2], entry["nodes"][3] = entry["nodes"][3], entry["nodes"][2]
    message = "node 2 (O on tokens 0..12) reads what node 3 (PfAttn on tokens 0..12) writes, but is launched before it"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_json(json.dumps(entry))
