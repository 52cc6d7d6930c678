"""Law: every pipeline computes what whole operations one after another compute, whatever the batch is."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_engine
import tiny
from absl import flags

from experiments import offline_throughput, serving, serving_flags
from nanojax import batch as batches
from nanojax.batch import RaggedBatch
from nanojax.kv_cache import KVPages
from nanojax.pipeline import execute, layer_loop, library
from nanojax.pipeline.dependencies import with_dependencies
from nanojax.pipeline.ir import NanoBatch, Node, OpKind, Pipeline
from nanojax.pipeline.json_format import to_json
from nanojax.pipeline.ladder import choose_per_rung
from nanojax.pipeline.pieces import Pieces

NUM_TOKENS, NUM_ROWS, PAGE_SIZE, PAGES_PER_ROW = 24, 12, 4, 8
DENSE, MOE = tiny.LLAMA, tiny.MODELS["mixtral"]

# Rows of a batch as (tokens of this step, tokens in all), decode rows first, and how many rows decode.
BATCHES = {
    "a chunk straddles the cuts": (((1, 9), (1, 1), (1, 30), (15, 21)), 3),
    "decode rows straddle the cuts": (((1, 5),) * 8 + ((1, 12), (1, 32), (6, 6), (8, 20)), 10),
    "chunks straddle the cuts, one of one token": (((1, 2), (7, 7), (1, 31), (2, 2), (13, 13)), 1),
    "decode rows only": (((1, 3), (1, 8), (1, 25), (1, 17), (1, 1)), 5),
    "one prompt fills it": (((24, 29),), 0),
    "nothing but padding": ((), 0),
}


def make_batch(rows, num_decode, model) -> tuple[RaggedBatch, KVPages]:
    """The batch, and pages that hold NaN but for the tokens of earlier steps."""
    rng = np.random.default_rng(5)
    num_pages = NUM_ROWS * PAGES_PER_ROW
    table = rng.permutation(num_pages).reshape(NUM_ROWS, PAGES_PER_ROW).astype(np.int32)
    positions, pages = np.zeros(NUM_TOKENS, np.int32), np.full(NUM_TOKENS, num_pages, np.int32)
    cu_q_lens, kv_lens = np.zeros(NUM_ROWS + 1, np.int32), np.zeros(NUM_ROWS, np.int32)
    shape = (model.num_layers, num_pages, model.num_kv_heads, PAGE_SIZE, model.head_dim)
    k, v = np.full((2, *shape), np.nan, np.float32)
    for row, (q_len, kv_len) in enumerate(rows):
        start = cu_q_lens[row]
        cu_q_lens[row + 1 :] = start + q_len
        kv_lens[row] = kv_len
        positions[start : start + q_len] = at = np.arange(kv_len - q_len, kv_len)
        pages[start : start + q_len] = table[row, at // PAGE_SIZE]
        for position in range(kv_len - q_len):
            place = (slice(None), table[row, position // PAGE_SIZE], slice(None), position % PAGE_SIZE)
            k[place], v[place] = rng.normal(size=(2, model.num_layers, model.num_kv_heads, model.head_dim))
    tokens = rng.integers(0, model.vocab_size, NUM_TOKENS).astype(np.int32)
    return RaggedBatch(
        tokens=tokens, positions=positions, pages=pages, row_slots=np.arange(NUM_ROWS, dtype=np.int32), kv_lens=kv_lens,
        page_indices=table, cu_q_lens=cu_q_lens, num_decode=np.asarray(num_decode, np.int32),
    ), KVPages(k=k, v=v)  # fmt: skip


@functools.cache
def expected(model, batch_name, attention):
    """Of whole operations: logits of the rows that are there, and the pages."""
    batch, kv = make_batch(*BATCHES[batch_name], model)
    logits, kv = _plain(model, attention)(tiny.params(model), kv, batch)
    return np.asarray(logits)[: len(BATCHES[batch_name][0])], jax.tree.map(np.asarray, kv)


@functools.cache
def _plain(model, attention):
    return jax.jit(functools.partial(execute.forward, model, attention=attention))


def assert_equal_to_whole_operations(pipeline, model, attention=None, **options):
    forward = jax.jit(functools.partial(execute.forward, model, pipeline=pipeline, attention=attention, **options))
    for name, (rows, num_decode) in BATCHES.items():
        batch, kv = make_batch(rows, num_decode, model)
        logits, kv = forward(tiny.params(model), kv, batch)
        wanted, wanted_kv = expected(model, name, attention)
        np.testing.assert_allclose(logits[: len(rows)], wanted, atol=1e-5, rtol=1e-5, err_msg=name)
        assert np.all(np.isfinite(logits[: len(rows)]))
        for ours, theirs in ((kv.k, wanted_kv.k), (kv.v, wanted_kv.v)):  # NaN where nothing was ever written
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5, err_msg=name)


def pipeline_of(*nodes, name="own"):
    """A pipeline of (operation, start, stop, lag, stream), its dependencies filled in."""
    ranges = tuple(dict.fromkeys(NanoBatch(start, stop) for _, start, stop, *_ in nodes))
    made = [
        Node(op, ranges.index(NanoBatch(start, stop)), lag=(*rest, 0)[0], stream=(*rest, 0, 0)[1])
        for op, start, stop, *rest in nodes
    ]
    return with_dependencies(Pipeline(name, NUM_TOKENS, ranges, tuple(made)))


def cut_at_random(seed, *, is_moe):
    """Each operation has its own random cuts; one operation after another."""
    rng = np.random.default_rng(seed)
    nodes = []
    for op in (OpKind.KQV, *layer_loop.ATTENTION, OpKind.O, *([OpKind.ROUTER] * is_moe), OpKind.UG, OpKind.D):
        inner = rng.choice(np.arange(1, NUM_TOKENS), size=rng.integers(0, 4), replace=False)
        bounds = [0, *sorted(map(int, inner)), NUM_TOKENS]
        nodes += [(op, *bounds[i : i + 2]) for i in rng.permutation(len(bounds) - 1)]
    return pipeline_of(*nodes)


A, B = (0, 10), (10, NUM_TOKENS)
FFN = (OpKind.O, OpKind.UG, OpKind.D)
OWN = {
    "cut at random": cut_at_random(8, is_moe=False),
    "a layer behind": pipeline_of(
        *((op, *part, 1) for part in (B, A) for op in FFN),
        *((op, *part) for part in (A, B) for op in (OpKind.KQV, *layer_loop.ATTENTION)),
    ),
}
READY_MADE = {name: make(NUM_TOKENS, False, 1) for name, make in library.PIPELINES.items()}


@pytest.mark.parametrize("name", [*READY_MADE, *OWN])
def test_any_pipeline_equals_whole_operations(name):
    assert_equal_to_whole_operations({**READY_MADE, **OWN}[name], DENSE)


@pytest.mark.parametrize("attention", ["reference", "xla"])
def test_with_any_attention(attention):
    assert_equal_to_whole_operations(READY_MADE["llama_8b"], DENSE, attention)


@pytest.mark.parametrize("name", ["llama_8b", "mixtral_released", "cut at random"])
def test_of_a_mixture_of_experts(name):
    random = cut_at_random(3, is_moe=True)
    ups, downs = ({random.tokens_of(n) for n in random.nodes if n.op is op} for op in (OpKind.UG, OpKind.D))
    assert ups != downs, "UG and D must be cut at different tokens"
    pipeline = random if name == "cut at random" else library.PIPELINES[name](NUM_TOKENS, True, 1)
    assert_equal_to_whole_operations(pipeline, MOE)


def test_streams_change_nothing_but_where_it_runs():
    assert_equal_to_whole_operations(READY_MADE["llama_8b"], DENSE, use_streams=True)


def traced(pipeline, model=DENSE, num_pages=NUM_ROWS * PAGES_PER_ROW, **options):
    """The forward pass with its KV pages donated, as a function of flat arguments: they may be mere shapes."""
    batch, _ = make_batch(*BATCHES["decode rows only"], model)
    shape = (model.num_layers, num_pages, model.num_kv_heads, PAGE_SIZE, model.head_dim)
    leaves, structure = jax.tree.flatten((tiny.params(model), batch))

    def forward(leaves, k, v):
        params, batch = jax.tree.unflatten(structure, leaves)
        return jax.tree.leaves(execute.forward(model, params, KVPages(k, v), batch, pipeline=pipeline, **options))

    pages = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.jit(forward, donate_argnums=(1, 2)).trace(leaves, pages, pages), 2 * 4 * np.prod(shape)


def test_dense_operations_on_gpu_streams_call_nothing():
    trace, _ = traced(READY_MADE["llama_8b"], use_streams=True, attention="xla")
    text = trace.lower(lowering_platforms=("cuda",)).as_text()
    streams = re.findall(r'_xla_stream_annotation = "(\d+)"', text)
    assert set(streams) == {"1", "2"}
    bodies = dict(re.findall(r"func\.func private @(compute_on\w*)\((.*?)\n  }", text, re.DOTALL))
    dense = [body for body in bodies.values() if "stablehlo.while" not in body]
    assert len(dense) >= len({(node.op, node.nano_batch) for node in READY_MADE["llama_8b"].nodes if node.op in FFN})
    assert not [body for body in dense if re.search(r"\bcall @", body)]


def test_each_node_is_named_by_layer_operation_and_range():
    text = traced(READY_MADE["llama_8b"])[0].lower().as_text(debug_info=True)
    nodes = [(node.op.value, READY_MADE["llama_8b"].tokens_of(node)) for node in READY_MADE["llama_8b"].nodes]
    wanted = {f"layer{i}/{op}[{own.start}:{own.stop}]" for op, own in nodes for i in range(DENSE.num_layers)}
    assert wanted == set(re.findall(r"layer\d+/[\w+]+\[\d+:\d+\]", text))


def test_attention_operations_on_one_range_share_a_call():
    both = layer_loop.ATTENTION
    assert list(layer_loop.attention_calls(library.sequential(8)).values()) == [both, ()]
    assert list(layer_loop.attention_calls(library.nano_batched(8, (3, 5))).values()) == [both, both, (), ()]
    late = library.llama_8b_single_gpu(8, 4)
    assert () not in layer_loop.attention_calls(late).values(), "ranges differ"
    two = pipeline_of(
        (OpKind.KQV, 0, 24), (OpKind.DEC_ATTN, 0, 24, 0, 1), (OpKind.PF_ATTN, 0, 24), *((op, 0, 24) for op in FFN)
    )
    assert () not in layer_loop.attention_calls(two).values(), "streams differ"


@pytest.mark.parametrize("name", ["llama_8b", "llama_70b_figure6"])
def test_kv_is_updated_in_place(name):
    trace, kv_bytes = traced(READY_MADE[name], num_pages=4096)
    memory = trace.lower().compile().memory_analysis()
    assert memory.alias_size_in_bytes >= kv_bytes
    assert memory.temp_size_in_bytes < kv_bytes / 4, f"{memory.temp_size_in_bytes} B of temporaries, KV is {kv_bytes} B"


@pytest.mark.parametrize("part", [(0, 10), (10, 24), (3, 11), (21, 24)])
def test_a_part_of_a_batch_has_the_rows_and_lengths_of_its_tokens(part):
    start, stop = part
    cut = jax.jit(lambda batch: batches.cut(batch, start, stop))
    for rows, num_decode in BATCHES.values():
        batch, _ = make_batch(rows, num_decode, DENSE)
        own = cut(batch)
        wanted = [(i - start, *rest) for i, *rest in rows_of_tokens(batch) if start <= i < stop]
        assert list(rows_of_tokens(own)) == wanted
        assert int(own.num_decode) == sum(start <= i < stop for i in range(num_decode))
        decode, prefill = batches.decode_part(own), batches.prefill_part(own)
        assert int(decode.cu_q_lens[-1]) == int(own.num_decode)
        assert list(decode.kv_lens) == [n if i < own.num_decode else 0 for i, n in enumerate(own.kv_lens)]
        assert list(prefill.kv_lens) == [1 if i < own.num_decode else n for i, n in enumerate(own.kv_lens)]
        filled = np.asarray(own.kv_lens) > 0
        assert list(filled) == sorted(filled, reverse=True), "rows without tokens come last"


def rows_of_tokens(batch):
    """(token, first page of its row, position that its row's lengths give it) for each real token."""
    for row, (start, stop) in enumerate(itertools.pairwise(np.asarray(batch.cu_q_lens).tolist())):
        for i in range(start, stop):
            yield i, int(batch.page_indices[row, 0]), int(batch.kv_lens[row]) - stop + i


def test_what_no_piece_holds_is_an_error():
    pieces = Pieces()
    pieces.put("q", 1, NanoBatch(4, 8), jnp.arange(4))
    pieces.put("q", 1, NanoBatch(0, 4), jnp.arange(10, 14))
    assert pieces.get("q", 1, NanoBatch(2, 6)).tolist() == [12, 13, 0, 1]
    for layer, tokens, gap in ((1, NanoBatch(6, 9), "8..9"), (0, NanoBatch(0, 2), "0..2")):
        with pytest.raises(ValueError, match=f"q of layer {layer} is not known on tokens {gap}"):
            pieces.get("q", layer, tokens)


BAD = {
    "'sequential' is for 8 tokens, not for batches of 24": (library.sequential(8), DENSE),
    "'sequential' has a router, but tiny-llama has no experts": (library.sequential(24, is_moe=True), DENSE),
    "is to run on one device, but has collectives": (library.sequential(24, collectives="reduce"), DENSE),
    "are in no D node": (pipeline_of((OpKind.KQV, 0, 24), (OpKind.D, 0, 9)), DENSE),
}


@pytest.mark.parametrize("message", BAD)
def test_a_pipeline_that_cannot_run_is_refused(message):
    pipeline, model = BAD[message]
    with pytest.raises(ValueError, match=message):
        traced(pipeline, model)


def test_the_engines_tokens_do_not_depend_on_the_pipelines():
    pipelines = {8: library.PIPELINES["nano_batched"](8, False, 1), 32: library.PIPELINES["llama_8b"](32, False, 1)}
    engine = tiny.engine(test_engine.TIGHT, pipelines=pipelines)
    outputs = engine.generate(test_engine.REQUESTS)
    assert {r.sampling.temperature for r in test_engine.REQUESTS} == {0.0, 0.8, 1.0}
    assert {o.request_id: o.token_ids for o in outputs} == test_engine.expected()
    assert {step.token_budget for step in engine.steps} == {8, 32}


def test_an_engine_refuses_a_pipeline_of_no_budget_or_of_another():
    with pytest.raises(ValueError, match=r"is for budget 16, which is none of \(8, 32\)"):
        tiny.engine(pipelines={16: library.sequential(16)})
    with pytest.raises(ValueError, match="is for 16 tokens, not for batches of 32"):
        tiny.engine(pipelines={32: library.sequential(16)})


def test_a_rung_on_which_a_split_loses_runs_sequentially():
    gains = {16: 0.9, 64: 1.0, 256: 1.1}
    chosen = choose_per_rung(
        lambda budget: library.PIPELINES["llama_8b"](budget, False, 1),
        gains,
        lambda pipeline: gains[pipeline.num_tokens],
    )
    assert {budget: pipeline.name for budget, pipeline in chosen.items()} == {
        16: "sequential", 64: "sequential", 256: "llama_8b",
    }  # fmt: skip
    assert all(pipeline.num_tokens == budget for budget, pipeline in chosen.items())


def parsed(*arguments) -> flags.FlagValues:
    values = flags.FlagValues()
    offline_throughput.define_flags(values)
    values(["experiment", "--smoke", *arguments])
    return serving_flags.with_smoke(values)


def test_the_pipeline_flag_takes_a_name_or_a_file(tmp_path):
    plain, named = parsed(), parsed("--pipeline=llama_8b")
    loaded = serving.load(plain)
    assert serving.pipelines(plain, loaded) == {}
    assert {b: p.name for b, p in serving.pipelines(named, loaded).items()} == {16: "llama_8b", 64: "llama_8b"}
    path = tmp_path / "mine.json"
    for num_tokens in (64, 48):
        path.write_text(to_json(dataclasses.replace(library.sequential(num_tokens), name="mine")))
        values = parsed(f"--pipeline={path}")
        if num_tokens == 64:
            assert {b: p.name for b, p in serving.pipelines(values, loaded).items()} == {64: "mine"}
            assert serving.describe(values, loaded)["pipeline"] == "mine.json"
        else:
            with pytest.raises(ValueError, match=r"'mine' is for 48 tokens, which is none of token_budgets=\(16, 64\)"):
                serving.pipelines(values, loaded)
    with pytest.raises(flags.Error, match=r"pipeline.*must be one of sequential"):
        parsed("--pipeline=sequentail")
