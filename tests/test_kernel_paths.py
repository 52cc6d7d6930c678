"""Do nodes side by side get the multiprocessors of their shares, and does each one's kernel compute what whole operations do?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_execute
import tiny
from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from experiments import serving, serving_flags
from nanojax.config import PRESETS
from nanojax.pipeline import execute, kernel_paths, library
from nanojax.pipeline.ir import NanoBatch, Node, OpKind, Pipeline
from pallas_kernels import overlap
from pallas_kernels.matmul import api as matmul_api
from pallas_kernels.matmul import mosaic_gpu
from pallas_kernels.paged_attention import paged_attention

LLAMA_8B = library.PIPELINES["llama_8b"](1024, False, 1)


def gpu(kind="NVIDIA H200", num_sms=132):
    """Whatever is traced inside is for this GPU."""
    described = AbstractDevice(device_kind=kind, num_cores=num_sms, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=described))


def nodes_of(*streams_and_shares):
    made = tuple(Node(OpKind.UG, 0, stream=stream, share=share) for stream, share in streams_and_shares)
    return Pipeline("own", 8, (NanoBatch(0, 8),), made)


@pytest.mark.parametrize(
    ("streams_and_shares", "counts"),
    [
        (((0, 0.6), (1, 0.4), (1, 0.4)), {0: 79, 1: 53, 2: 53}),  # 79.2 and 52.8
        (((0, 0.8), (0, 0.4), (1, 0.2)), {0: 106, 1: 53, 2: 26}),  # 105.6 and 26.4; half of 106
        (((0, 0.2), (1, 0.2)), {0: 66, 1: 66}),  # only ratios count
        (((0, 0.4), (1, 0.4), (2, 0.2)), {0: 53, 1: 53, 2: 26}),  # 52.8, 52.8, 26.4
        (((0, 0.6), (0, 0.3)), {}),  # one after the other: nobody to share with
    ],
)
def test_shares_of_streams_by_hand(streams_and_shares, counts):
    assert kernel_paths.divide(nodes_of(*streams_and_shares), range(len(streams_and_shares)), 132) == counts


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(1e-3, 1.0)), min_size=2, max_size=8).filter(
        lambda nodes: len({stream for stream, _ in nodes}) > 1
    ),
    st.integers(8, 200),
)
def test_no_multiprocessor_is_given_to_two_at_once(streams_and_shares, num_sms):
    counts = kernel_paths.divide(nodes_of(*streams_and_shares), range(len(streams_and_shares)), num_sms)
    at_once = {}
    for i, (stream, _) in enumerate(streams_and_shares):
        assert counts[i] >= 1
        at_once[stream] = max(counts[i], at_once.get(stream, 0))
    assert sum(at_once.values()) == num_sms, "the largest shares fill the device"


def paths(model="llama-3-8b", pipeline=LLAMA_8B, dtype=jnp.bfloat16, kv_dtype=jnp.bfloat16, **options):
    config = PRESETS[model]
    pages = jax.ShapeDtypeStruct((config.num_layers, 1000, config.num_kv_heads, 16, config.head_dim), kv_dtype)
    found = execute.paths(
        config, pipeline, dtype=dtype, pages=pages, **{"use_streams": True, "overlap": "sm_exclusive", **options}
    )
    return {
        node: [(row.num_layers, row.path.kernel, row.path.num_sms) for row in found if row.node == node]
        for node in dict.fromkeys(row.node for row in found)
    }, {row.path.reason for row in found}


def test_each_node_of_the_8b_pipeline_has_its_kernel_and_its_multiprocessors():
    with gpu():
        found, reasons = paths()
    product, decode, alone = (kernel_paths.MATMUL, 79), ("sm_exclusive", 53), (kernel_paths.DEFAULT, None)
    assert found.pop("KQV1") == [(1, *alone), (31, *product)]
    for node in ("O2", "UG2", "D2"):
        assert found.pop(node) == [(31, *product), (1, *alone)], "beside the next layer's attention, if there is one"
    for node in ("KQV2", "O1", "UG1", "D1"):
        assert found.pop(node) == [(32, *product)]
    for node in ("DecAttn1", "DecAttn2", "DecAttn3", "DecAttn4"):
        assert found.pop(node) == [(32, *decode)]
    assert found == {node: [(32, *alone)] for node in ("PfAttn1", "PfAttn2")}
    assert {"share 0.6 of 132", "share 0.4 of 132", "nothing beside it"} < reasons


def test_attention_alone_is_given_multiprocessors():
    with gpu():
        found, reasons = paths(overlap="attention_exclusive")
    assert {node for node, rows in found.items() if rows[0][2] is not None} == {f"DecAttn{i}" for i in (1, 2, 3, 4)}
    assert found["DecAttn1"] == [(32, "sm_exclusive", 53)]
    assert "only attention is given multiprocessors" in reasons


def test_who_gets_no_kernel_of_his_own_is_told_why():
    def reason_of(kind="NVIDIA H200", **options):
        with gpu(kind):
            found, reasons = paths(**options)
        assert all(num_sms is None for rows in found.values() for _, _, num_sms in rows)
        return " | ".join(sorted(reasons))

    assert reason_of("NVIDIA A100-SXM4-80GB", overlap="xla") == "not asked for"
    assert "needs operands both bfloat16" in reason_of(dtype=jnp.float32, kv_dtype=jnp.float32)
    on_cpu, reasons = paths(overlap="xla", use_streams=False)
    assert reasons == {"not asked for"}
    assert {row[0][1] for row in on_cpu.values()} == {kernel_paths.DEFAULT}
    with gpu():
        odd, reasons = paths(pipeline=library.llama_8b_single_gpu(1024, 400))
        assert odd["UG1"][0][1] == kernel_paths.DEFAULT, "no multiple of 128 rows"
        assert any("[400, 4096]" in reason for reason in reasons)
        assert paths("mixtral-8x7b", library.PIPELINES["llama_8b"](1024, True, 1))[0]["UG1"][0][1] == "default"
        wide, reasons = paths(kv_dtype=jnp.float32)
        assert (wide["DecAttn1"][0][1], wide["O1"][0][1]) == (kernel_paths.DEFAULT, kernel_paths.MATMUL)
        assert any("wgmma rounds float32" in reason for reason in reasons)


def test_a_form_that_is_named_is_had_or_refused():
    with gpu():
        assert kernel_paths.room_here("capped_grid", use_streams=True) == kernel_paths.Room(132, "capped_grid")
        with pytest.raises(
            NotImplementedError,
            match="overlap='green' is none of 'sm_exclusive', 'capped_grid', 'attention_exclusive', 'xla'",
        ):
            kernel_paths.room_here("green", use_streams=True)
        with pytest.raises(NotImplementedError, match="'capped_grid' needs streams"):
            kernel_paths.room_here("capped_grid", use_streams=False)
    with pytest.raises(NotImplementedError, match="'capped_grid' runs on 'gpu', not on 'cpu'"):
        kernel_paths.room_here("capped_grid", use_streams=True)
    with (
        gpu("NVIDIA A100-SXM4-80GB"),
        pytest.raises(NotImplementedError, match=r"capability 9, which this GPU \(80\) does"),
    ):
        kernel_paths.room_here("capped_grid", use_streams=True)
    assert {*overlap.PREPARE, kernel_paths.ATTENTION_EXCLUSIVE, "xla"} == set(serving_flags.OVERLAP)


def test_a_record_of_a_gpu_says_which_path_each_node_took():
    values = flags.FlagValues()
    serving_flags.define(values)
    serving_flags.define_work(values)
    values(
        [
            "",
            "--model=smollm2-135m",
            "--weights=random",
            "--pipeline=llama_8b",
            "--token_budgets=256,512",
            "--overlap=sm_exclusive",
        ]
    )
    loaded = serving.LoadedModel(PRESETS["smollm2-135m"], {}, serving.byte_tokenizer(257), lambda messages: "")
    assert "paths" not in serving.describe(values, loaded)
    with gpu():
        found = serving.describe(values, loaded)["paths"]
    assert set(found) == {"256", "512"}
    assert found["256"]["O2"] == [
        "default in 29 layers: persistent matmul needs [multiple of 128, of 64] x [.., multiple of 128], "
        "not [128, 576] x [576, 576]",
        "default in 1 layers: nothing beside it",
    ]
    assert found["512"]["DecAttn1"] == ["sm_exclusive on 53 multiprocessors in 30 layers: share 0.4 of 132"]


# 256 tokens, so that each nano-batch has the 128 rows of a tile; shapes that the kernels take.
MODEL = dataclasses.replace(tiny.LLAMA, d_model=128, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=128)
NUM_SMS = 6


@pytest.fixture
def stand_ins(monkeypatch):
    """A Hopper GPU of six multiprocessors, whose kernels do on a CPU what they promise and note how they were called."""
    called = []

    def product(x, kernel, residual=None, *, num_ctas, out_dtype):
        called.append(("product", num_ctas))
        return matmul_api.matmul(x, kernel, residual, implementation="xla", out_dtype=out_dtype)

    def decode_on(form, num_sms, q, k_pages, v_pages, layer, kv_lens, page_indices, num_decode):
        called.append((form, num_sms))
        cu_q_lens = jnp.minimum(jnp.arange(len(kv_lens) + 1, dtype=jnp.int32), num_decode)
        return lambda q: paged_attention(
            q, k_pages, v_pages, layer, kv_lens, page_indices, cu_q_lens, num_decode, implementation="xla"
        )

    for module in (kernel_paths, matmul_api):
        monkeypatch.setattr(module, "why_not_hopper", lambda: None)
    monkeypatch.setattr(kernel_paths, "num_multiprocessors", lambda: NUM_SMS)
    monkeypatch.setattr(mosaic_gpu, "matmul", product)
    monkeypatch.setattr(overlap, "decode_on", decode_on)
    return called


def test_with_kernels_of_their_own_nodes_compute_what_whole_operations_do(stand_ins, monkeypatch):
    monkeypatch.setattr(test_execute, "NUM_TOKENS", 256)
    monkeypatch.setattr(test_execute, "PAGE_SIZE", 8)  # tokens of a tile
    pipeline = library.PIPELINES["llama_8b"](256, False, 1)
    assert [own.num_tokens for own in pipeline.nano_batches[:1]] == [128]
    params = tiny.params(MODEL)
    rows, num_decode = test_execute.BATCHES["decode rows straddle the cuts"]
    batch, kv = test_execute.make_batch(rows, num_decode, MODEL)

    def logits(dtype, **options):
        half = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, kv))
        forward = jax.jit(functools.partial(execute.forward, MODEL, attention="xla", **options))
        return np.asarray(forward(*half, batch)[0])[: len(rows)]

    exact, plain = logits(jnp.float32), logits(jnp.bfloat16)
    assert not stand_ins
    found = logits(jnp.bfloat16, pipeline=pipeline, use_streams=True, overlap="sm_exclusive")
    assert np.abs(found - exact).max() <= 2 * np.abs(plain - exact).max()
    # KQV2, O1, UG1, D1 of layer 0; KQV1 of layer 1, O2, UG2, D2 of layer 0, KQV2 of layer 1; O1, UG1, D1 of layer 1.
    assert stand_ins.count(("product", 4)) == 2 * (4 + 5 + 3), "each is traced for its shape, then on its stream"
    assert stand_ins.count(("sm_exclusive", 2)) == 4 * MODEL.num_layers
    assert set(stand_ins) == {("product", 4), ("sm_exclusive", 2)}
