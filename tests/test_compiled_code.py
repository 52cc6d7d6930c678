"""What XLA makes of programs for GPUs that are not there, and that it is read right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from experiments import compiled_code, gpu_steps, kernel_resources, scheduled_hlo, thunk_plan
from experiments.gpu_report import layer_times
from nanojax.config import PRESETS
from nanojax.pipeline import compiler_options, execute, library, streams
from nanojax.pipeline.ir import OpKind

gpu_compile = pytest.mark.gpu_compile
needs_plugin = pytest.mark.skipif(compiled_code.why_not() is not None, reason=str(compiled_code.why_not()))

PLAN = """\
001: kCustomKernel   [source       | next=002 (1)] loop_fusion grid: [8, 2, 1] threads: [128, 1, 1]  shared_memory: 64 bytes
003: kAsyncStart     [prev=001 (1) | next=005 (2)] stream=computation_stream[1], async_id=3
    002: kCublasLtMatmul [source | sink] kCublasLtMatmul
005: kAsyncStart     [prev=001 (1) | next=008 (2)] stream=computation_stream[2], async_id=5
    004: kCustomCall [source | sink] kCustomCall
006: kAsyncDone      [source       | sink        ] async_id=3
008: kAsyncStart     [prev=001 (1) | next=009 (2)] stream=computation_stream[2], async_id=8
    007: kCustomCall [source | sink] kCustomCall
009: kAsyncDone      [source       | sink        ] async_id=5
010: kAsyncDone      [source       | sink        ] async_id=8
011: kWhile          [prev=000 (1) | sink        ]
condition:
        No thunks.      body:
    012: kCopy           [source | sink] kCopy
"""


def test_a_plan_is_read_as_xla_writes_it():
    thunks = thunk_plan.parse(PLAN)
    assert [thunk.depth for thunk in thunks] == [0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert thunks[0].kernel == ("loop_fusion", (8, 2, 1), (128, 1, 1), 64)
    assert thunks[2].kernel is None
    found = thunk_plan.regions(thunks)
    assert [(r.stream, r.start, r.done) for r in found] == [
        ("computation_stream[1]", 1, 5), ("computation_stream[2]", 3, 8), ("computation_stream[2]", 6, 9),
    ]  # fmt: skip
    assert [thunk.kind for thunk in found[0].thunks] == ["kCublasLtMatmul"]
    assert thunk_plan.beside(found) == ((1,), (0,), ()), "two of one stream do not overlap"
    with pytest.raises(ValueError, match="no thunks"):
        thunk_plan.parse("condition:\n")


HLO = """\
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%product (x: f32[8,8]) -> f32[8,8] {
  ROOT %cublas = (f32[8,8]) custom-call(%x), custom_call_target="__cublas$lt$matmul"
}

%loop (x: f32[8,8]) -> f32[8,8] {
  ROOT %while = f32[8,8] while(%x), condition=%sum, body=%product
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8] parameter(0)
  %call-start = ((f32[8,8]), f32[8,8]) call-start(%x), to_apply=%product, metadata={op_name="jit(f)/layer3/UG[0:8]/dot"}
  %call-done = f32[8,8] call-done(%call-start)
  %call-start.1 = ((f32[8,8]), f32[8,8]) call-start(%call-done), to_apply=%loop, metadata={op_name="jit(f)/layer3/D[0:8]/dot"}
  %psum.1 = f32[8,8] all-reduce(%x), to_apply=%sum, metadata={op_name="jit(f)/layer3/O.AR[8:9]/psum"}
  %call-done.1 = f32[8,8] call-done(%call-start.1)
  %both = (f32[8,8], f32[8,8]) tuple(%call-done.1, %psum.1)
  %one = f32[8,8] get-tuple-element(%both), index=1
  ROOT %all-gather-start = (f32[8,8], f32[64,8]) all-gather-start(%one), metadata={op_name="jit(f)/logits/all_gather"}
}
"""

PLAN_WITH_COLLECTIVES = """\
001: kAsyncStart     [source | next] stream=computation_stream[1], async_id=1
    002: kCublasLtMatmul [source | sink] kCublasLtMatmul
003: kAsyncDone      [source | sink] async_id=1
004: kAsyncStart     [source | next] stream=computation_stream[1], async_id=4
    005: kCublasLtMatmul [source | sink] kCublasLtMatmul
006: kAllReduce      [source | next] kAllReduce
007: kAsyncDone      [source | sink] async_id=4
008: kAsyncStart     [source | next] stream=communication_stream[0], async_id=8
    009: kAllGather      [source | sink] kAllGather
010: kAsyncDone      [source | sink] async_id=8
"""


def test_collectives_on_the_main_stream_are_beside_what_is_on_its_way():
    found, starts = thunk_plan.regions(thunk_plan.parse(PLAN_WITH_COLLECTIVES)), scheduled_hlo.starts(HLO)
    assert [(start.kind, start.label, start.layer, start.tokens, start.path) for start in starts] == [
        ("call-start", "UG", 3, "0:8", "cuBLASLt"), ("call-start", "D", 3, "0:8", "cuBLASLt"),
        ("all-reduce", "O.AR", 3, "8:9", "NCCL"), ("all-gather-start", "logits", None, "", "NCCL"),
    ]  # fmt: skip
    assert [start.needs for start in starts] == [0, 0b1, 0, 0b100], "of a tuple only the part that is taken"
    assert [region.collective for region in found] == [None, None, "kAllReduce", "kAllGather"]
    overlap = compiled_code.Overlap(found, starts)
    assert overlap.beside == ((), (2,), (1,), ())
    assert overlap.is_possible == (True, True, True, True), "the reduction needs nobody, the gathering not the products"
    assert overlap.fraction == 0.5


@pytest.mark.parametrize("name", compiled_code.TARGETS)
def test_a_target_says_what_its_data_sheet_says(name):
    gpu = compiled_code.target(name)
    assert gpu.number("core_count") == gpu.spec.num_cores
    assert gpu.number("memory_bandwidth") == gpu.spec.memory_bytes_per_s
    assert 1 <= gpu.number("device_memory_size") / gpu.spec.memory_bytes < 1.1, "a maker's GB are not the driver's"
    assert gpu.capability == {"h200": 90, "a100": 80}[name]
    with pytest.raises(ValueError, match="no number 'colour'"):
        gpu.number("colour")
    with pytest.raises(ValueError, match="target 'h900' is none of h200, a100"):
        compiled_code.target("h900")


def test_blocks_of_a_kernel_fit_a_core_by_its_scarcest_resource():
    core = {"smem_bytes": 233_472, "registers": 65_536, "threads": 2_048}

    def kernel(threads, smem_bytes, registers):
        return kernel_resources.Kernel("k", "xla", 1, 1, threads, smem_bytes, registers, 0)

    assert kernel(128, 38_912, 78).blocks_per_core(**core) == 5, "shared memory: 233472 / 39936"
    assert kernel(256, 0, 121).blocks_per_core(**core) == 2, "registers: 65536 / (128 * 256)"
    assert kernel(1024, 0, 8).blocks_per_core(**core) == 2, "threads"


@gpu_compile
@needs_plugin
@pytest.mark.parametrize("name", compiled_code.TARGETS)
def test_two_stream_calls_run_beside_each_other_in_one_graph(name):
    gpu = compiled_code.target(name)
    x, w = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)

    def pair(a, b, w):
        one = streams.launch(0, lambda: a @ w)
        two = streams.launch(1, lambda: jnp.tanh(b) @ w)
        return jax.lax.optimization_barrier((one, two))

    code = compiled_code.compile_for(gpu, pair, (x, x, w))
    assert len(code.regions) == 2
    assert code.overlap.is_possible == code.overlap.is_there == (True, True)
    assert code.graphs == ("kCommandBuffer",)
    assert code.matmuls == {(256, 512): 2}
    assert code.argument_bytes == 2 * (2 * 256 * 1024 + 1024 * 512)
    tanh = next(kernel for kernel in code.kernels if kernel.compiler == "xla").assembled(gpu.capability)
    assert tanh.spill_bytes == 0
    assert 0 < tanh.registers < 255

    def chained(a, w):
        product = streams.launch(0, lambda: a @ w)
        return streams.launch(1, lambda: jnp.tanh(product))

    chain = compiled_code.compile_for(gpu, chained, (x, w))
    assert chain.overlap.is_possible == chain.overlap.is_there == (False, False), "the second needs the first"


@gpu_compile
@needs_plugin
def test_a_donated_cache_is_updated_in_place_and_a_copy_is_seen():
    gpu = compiled_code.target("h200")
    cache, rows = jax.ShapeDtypeStruct((64, 16, 128), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.int32)
    code = compiled_code.compile_for(gpu, lambda cache, rows: cache.at[rows, 0].set(1), (cache, rows), donate=[0])
    assert code.alias_bytes == 2 * 64 * 16 * 128
    assert code.copies_of(cache.shape) == 0
    kept = compiled_code.compile_for(gpu, lambda cache, rows: cache.at[rows, 0].set(1), (cache, rows))
    assert kept.alias_bytes == 0
    assert kept.copies_of(cache.shape) == 1


@gpu_compile
@needs_plugin
def test_mosaic_kernels_tell_their_resources():
    from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu as matmul

    gpu = compiled_code.target("h200")
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    config = matmul.TuningConfig(tile_m=128, tile_n=128, tile_k=64, max_concurrent_steps=4)
    code = compiled_code.compile_for(gpu, lambda a, b: matmul.matmul(a, b, None, config=config), (x, x))
    (kernel,) = [kernel for kernel in code.kernels if kernel.compiler == "mosaic"]
    assert (kernel.num_blocks, kernel.num_threads, kernel.spill_bytes) == (gpu.number("core_count"), 384, 0)
    assert 100_000 < kernel.smem_bytes <= gpu.number("shared_memory_per_block_optin")
    assert code.target.blocks_per_core(kernel) == 1


def test_the_products_of_a_pipeline_are_counted_by_shape():
    model = dataclasses.replace(PRESETS["llama-3-8b"], num_layers=3)
    wanted = {
        (384, 6144): 3, (640, 6144): 3, (384, 4096): 6, (640, 4096): 6, (384, 28672): 3, (640, 28672): 3,
    }  # fmt: skip
    assert gpu_steps.matmuls(model, library.PIPELINES["llama_8b"](1024, False, 1)) == wanted


@functools.cache
def llama_8b_step(num_tokens, overlap):
    """Two layers of LLaMA-3-8B at full width."""
    model = dataclasses.replace(PRESETS["llama-3-8b"], num_layers=2)
    pipeline = library.PIPELINES["llama_8b"](num_tokens, False, 1)
    return gpu_steps.compile_step(
        compiled_code.target("h200"), model, pipeline, kv_bytes=100e9 * 2 / 32, overlap=overlap
    )


@gpu_compile
@needs_plugin
@pytest.mark.parametrize(("num_tokens", "overlap"), [(1024, "sm_exclusive"), (2048, "xla")])
def test_a_llama_8b_step_is_one_graph_that_overlaps_nano_batches_and_updates_the_cache_in_place(num_tokens, overlap):
    step = llama_8b_step(num_tokens, overlap)
    code = step.code
    assert code.graphs == ("kCommandBuffer",)
    assert code.alias_bytes >= step.kv_bytes
    assert step.num_kv_copies == 0
    assert step.num_merged_matmuls == 0
    # O, UG and D of the last layer's second nano-batch have nothing left to run beside.
    is_there = zip(code.overlap.is_possible, code.overlap.is_there, strict=True)
    assert list(is_there).count((True, False)) <= 3
    # Attention is launched before all products beside it, not when these are almost done: 3 attentions beside KQV2, in the
    # second layer beside the first one's O2, UG2, D2, too; 2 beside O1 and UG1; one beside D1 and the next KQV1.
    assert step.pairs == (26, 26)
    assert {region.stream for region in code.regions} == {"computation_stream[1]", "computation_stream[2]"}
    assert not [kernel for kernel in code.kernels if kernel.spill_bytes]
    assert all(code.target.blocks_per_core(kernel) >= 1 for kernel in code.kernels)


@gpu_compile
@needs_plugin
def test_decode_attention_on_multiprocessors_of_its_own_begins_with_what_is_beside_it():
    """Two layers as the report times them: an H200 ran attention beside the last product only, behind all others."""
    step = layer_times.step_of(False)
    step = dataclasses.replace(step, model=dataclasses.replace(step.model, num_layers=2))
    forward = functools.partial(
        execute.forward, step.model, pipeline=library.decode_beside_dense(step.num_tokens, 768),
        use_streams=True, overlap="sm_exclusive",
    )  # fmt: skip
    args = jax.eval_shape(lambda: layer_times.arguments(step, 0))
    code = compiled_code.compile_for(
        compiled_code.target("h200"), forward, args, donate=[1], graphs=compiler_options.Graphs.CONCURRENT
    )
    dense = ["PfAttn", "O", "UG", "D", "KQV"]
    overlap = code.overlap
    beside = {
        (start.layer, start.tokens): [overlap.starts[j].label for j in overlap.beside[i]]
        for i, start in enumerate(overlap.starts)
        if start.label == "DecAttn"
    }
    assert beside[1, "0:768"] == dense
    assert beside[1, "768:2048"] == dense[:-1], "no layer after the last one"
    assert code.graphs == ("kCommandBuffer",)


@gpu_compile
@needs_plugin
def test_shares_become_ctas_that_have_the_device_to_themselves():
    """Products and decode attention side by side, one CTA a core."""
    step = llama_8b_step(1024, "sm_exclusive")
    code, pipeline = step.code, step.pipeline
    num_ctas = {
        name: {kernel.num_blocks for kernel in code.kernels if kernel.name.startswith(name)}
        for name in ("persistent_matmul", "decode_attention_parts")
    }
    assert num_ctas == {"persistent_matmul": {79}, "decode_attention_parts": {53}}, "0.6 and 0.4 of 132"
    assert code.target.number("core_count") == 79 + 53
    fat = [kernel for kernel in code.kernels if kernel.name.startswith(tuple(num_ctas))]
    assert {code.target.blocks_per_core(kernel) for kernel in fat} == {1}
    # Only where an operation has nothing beside it is the product the library's; the logits are, too.
    first, second = (pipeline.tokens_of(node).num_tokens for node in pipeline.nodes if node.op is OpKind.KQV)
    assert code.matmuls == {
        (first, 6144): 1, (second, 4096): 2, (second, 28672): 1, (1024, step.model.vocab_size): 1,
    }  # fmt: skip
    in_streams = [thunk.kind for region in code.regions for thunk in region.thunks if "Cublas" in thunk.kind]
    assert len(in_streams) == 4
