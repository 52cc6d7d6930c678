"""What do paged attention's Triton kernels become on GPUs that are not there?  Registers, shared memory, graphs, caches."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from experiments import compiled_code
from nanojax import kv_cache
from nanojax.pipeline import streams
from pallas_kernels import triton_call
from pallas_kernels.paged_attention import arg_specs, paged_attention, triton_gpu
from pallas_kernels.paged_attention.arg_specs import ArgSpec

reason = compiled_code.why_not() or (None if importlib.util.find_spec("triton") else "needs triton")
pytestmark = [pytest.mark.gpu_compile, pytest.mark.skipif(reason is not None, reason=str(reason))]

SPECS = {spec.name: spec for spec in arg_specs.GPU_SPECS}
MIXED = SPECS["8b-mixed-2048"]
# Blocks of each kernel that a multiprocessor holds at once, as the sizes were chosen.
BLOCKS_PER_CORE = {"h200": {"decode": 4, "merge": 4, "prefill": 1}, "a100": {"decode": 3, "merge": 4, "prefill": 1}}


def shapes(spec: ArgSpec, dtype, num_pages: int = 45_000, num_layers: int = 32) -> dict:
    """Arguments of a call; the default cache has 2.4e10 elements for 8 KV heads of 128."""
    cache = (num_layers, num_pages, spec.num_kv_heads, spec.page_size, spec.head_dim)
    return {
        "q": jax.ShapeDtypeStruct((spec.num_tokens, spec.num_heads, spec.head_dim), dtype),
        "k_pages": jax.ShapeDtypeStruct(cache, dtype),
        "v_pages": jax.ShapeDtypeStruct(cache, dtype),
        "kv_lens": jax.ShapeDtypeStruct((spec.num_rows,), jnp.int32),
        "page_indices": jax.ShapeDtypeStruct((spec.num_rows, spec.pages_per_row), jnp.int32),
        "cu_q_lens": jax.ShapeDtypeStruct((spec.num_rows + 1,), jnp.int32),
        "num_decode": jax.ShapeDtypeStruct((), jnp.int32),
    }


def two_layers(args):
    """Attention of two layers; nobody says which implementation."""
    for layer in (0, 31):
        args = {**args, "q": paged_attention(layer=layer, **args)}
    return args["q"]


def assert_fits(code: compiled_code.CompiledCode) -> dict:
    found = {kernel.name: kernel for kernel in code.kernels if kernel.compiler == "triton"}
    assert set(found) == {"decode", "merge", "prefill"}
    for kernel in found.values():
        assert kernel.spill_bytes == 0, kernel
        assert kernel.smem_bytes <= code.target.number("shared_memory_per_block_optin"), kernel
    return found


@pytest.mark.parametrize("name", compiled_code.TARGETS)
@pytest.mark.parametrize("spec", [MIXED, SPECS["70b/8-mixed-2048"]], ids=lambda spec: spec.name)
def test_real_shapes(name, spec):
    gpu = compiled_code.target(name)
    args = shapes(spec, jnp.bfloat16)
    code = compiled_code.compile_for(gpu, two_layers, (args,))
    for kernel in assert_fits(code).values():
        assert gpu.blocks_per_core(kernel) >= BLOCKS_PER_CORE[name][kernel.name], kernel
        assert kernel.num_blocks == 4 * gpu.number("core_count")
    assert code.graphs == ("kCommandBuffer",)
    assert len(code.plan) == 6, "three launches for a layer and nothing else"
    assert code.copies_of(args["k_pages"].shape) == 0
    assert code.temp_bytes < 64e6


OTHERS = {
    "float16, 7 heads of 64, pages of 32": ({"num_heads": 14, "num_kv_heads": 2, "head_dim": 64, "page_size": 32}, "float16"),
    "bfloat16, 1 head, pages of 64": ({"num_heads": 8, "num_kv_heads": 8, "page_size": 64}, "bfloat16"),
    "float32": ({"num_heads": 9, "num_kv_heads": 3}, "float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", compiled_code.TARGETS)
@pytest.mark.parametrize("other", OTHERS)
def test_other_shapes(name, other):
    changes, dtype = OTHERS[other]
    args = shapes(dataclasses.replace(MIXED, **changes), dtype, num_pages=1000)
    assert_fits(compiled_code.compile_for(compiled_code.target(name), two_layers, (args,)))


def test_a_step_writes_its_tokens_in_place_and_compiles_each_kernel_once():
    gpu, args = compiled_code.target("a100"), shapes(MIXED, jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((MIXED.num_tokens,), jnp.int32)
    before = triton_call.compile_kernel.cache_info().misses

    cache = args["k_pages"]

    def step(k_pages, v_pages, args, page, offset):
        q, kv = args["q"], kv_cache.KVPages(k=k_pages, v=v_pages)
        for layer in range(3):
            kv = kv_cache.write(kv, layer, q[:, :8], q[:, 8:16], page, offset)
            q = paged_attention(layer=layer, **{**args, "q": q, "k_pages": kv.k, "v_pages": kv.v})
        return kv.k, kv.v, q

    rest = {name: shape for name, shape in args.items() if name not in ("k_pages", "v_pages")}
    code = compiled_code.compile_for(gpu, step, (cache, cache, rest, tokens, tokens), donate=[0, 1])
    assert code.alias_bytes == 2 * 2 * cache.size
    assert cache.size > 2**31
    assert code.copies_of(cache.shape) == 0
    assert code.temp_bytes < 128e6
    assert code.graphs == ("kCommandBuffer",)
    assert triton_call.compile_kernel.cache_info().misses - before <= 3
    assert_fits(code)


def test_batches_of_any_size_share_the_code_up_to_a_power_of_2_of_rows():
    before = triton_call.compile_kernel.cache_info().misses
    for num_tokens, num_rows, num_pages in ((640, 600, 1000), (768, 700, 1000), (2048, 1024, 45_000)):
        spec = dataclasses.replace(
            MIXED, num_tokens=num_tokens, num_rows=num_rows, max_len=16 * num_rows, num_kv_heads=4
        )
        compiled_code.compile_for(compiled_code.target("h200"), two_layers, (shapes(spec, jnp.bfloat16, num_pages),))
    assert triton_call.compile_kernel.cache_info().misses - before <= 3


@pytest.mark.parametrize("num_pages", [45_000, 300_000])
def test_writes_reach_beyond_2_31_elements_without_atomics(num_pages):
    layer, kv_heads, page_size, head_dim = 31, 8, 16, 128
    pages = jax.ShapeDtypeStruct((32, num_pages, kv_heads, page_size, head_dim), jnp.bfloat16)
    new, tokens = (
        jax.ShapeDtypeStruct((2048, kv_heads, head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((2048,), jnp.int32),
    )

    def write(k_pages, v_pages, k, page, offset):
        kv = kv_cache.write(kv_cache.KVPages(k=k_pages, v=v_pages), layer, k, k, page, offset)
        return kv.k, kv.v

    code = compiled_code.compile_for(
        compiled_code.target("a100"), write, (pages, pages, new, tokens, tokens), donate=[0, 1]
    )
    assert code.alias_bytes == 2 * 2 * pages.size
    assert code.copies_of(pages.shape) == code.temp_bytes == 0
    (scatter,) = code.kernels
    assert "atom." not in scatter.ptx
    page_bytes = 2 * kv_heads * page_size * head_dim
    assert f", {layer * num_pages * page_bytes};" in scatter.ptx, "where the layer begins, added in 64 bits"
    if num_pages * page_bytes // 2 > 2**32:
        assert re.search(rf"mul\.wide\.u32\s+%rd\d+, %r\d+, {page_bytes};", scatter.ptx), "32 bits times 32 bits are 64"


def test_a_cap_on_programs_holds_for_every_kernel():
    gpu, config = compiled_code.target("h200"), triton_gpu.Config(num_programs=44)
    code = compiled_code.compile_for(
        gpu, lambda args: triton_gpu.paged_attention(layer=0, sm_scale=0.1, config=config, **args),
        (shapes(SPECS["8b-decode-64x2k"], jnp.bfloat16),),
    )  # fmt: skip
    assert [kernel.num_blocks for kernel in assert_fits(code).values()] == [44, 44, 44]


def test_attention_runs_beside_a_matmul_on_another_stream():
    gpu = compiled_code.target("h200")
    x = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)

    def pair(args, x, w):
        attended = streams.launch(1, lambda: paged_attention(layer=0, **args))
        return jax.lax.optimization_barrier((attended, streams.launch(0, lambda: x @ w)))

    code = compiled_code.compile_for(gpu, pair, (shapes(SPECS["8b-decode-64x2k"], jnp.bfloat16), x, w))
    assert code.overlap.is_possible == code.overlap.is_there == (True, True)
    assert code.graphs == ("kCommandBuffer",)
