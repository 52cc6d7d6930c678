"""Does a matrix product beside decode attention give what both give alone, and do both find room on a GPU?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from experiments import compiled_code
from pallas_kernels.matmul.mosaic_gpu import Config
from pallas_kernels.overlap import Split, matmul_and_decode_attention, path_for, reference
from pallas_kernels.paged_attention.arg_specs import ArgSpec, make_args

INTERPRET = InterpretGPUParams(detect_races=True, out_of_bounds_reads="raise")
# One more row than decodes, and lengths of no page, one token, part of a page, a split block.
ROWS = ArgSpec("rows", 4, 2, 64, 16, 5, 5, 160, (1, 1, 1, 1), (1, 9, 150, 64))


def operands(columns, with_residual):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (128, 128)).astype(jnp.bfloat16)
    kernel = (jax.random.normal(keys[1], (128, *columns)) / 8).astype(jnp.bfloat16)
    residual = jax.random.normal(keys[2], (128, columns[-1])) if with_residual else None
    args = make_args(ROWS, jnp.bfloat16, num_layers=2)
    del args["cu_q_lens"]
    return (x, kernel, residual), args


@pytest.mark.parametrize(
    ("form", "columns", "with_residual"),
    [
        ("capped_grid", (128,), True),
        ("fused", (128,), True),
        pytest.param("sm_exclusive", (2, 128), False, marks=pytest.mark.slow),
    ],
)
def test_equals_reference_without_races(form, columns, with_residual, capfd):
    product_args, args = operands(columns, with_residual)
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    product, attended = matmul_and_decode_attention(
        *product_args, layer=1, form=form, share=Split(2, 1), num_sms=3, interpret=INTERPRET,
        config=Config(tile_n=128, num_stages=2), **args,
    )  # fmt: skip
    expected, exact = reference.matmul_and_decode_attention(*product_args, layer=1, sm_scale=64**-0.5, **args)
    plain, same_dtype = matmul_and_decode_attention(*product_args, layer=1, form="xla", **args)
    for found, xla, right in ((product, plain, expected), (attended, same_dtype, exact)):
        limit = 2 * np.abs(np.asarray(xla, np.float32) - right).max() + 1e-5
        assert np.abs(np.asarray(found, np.float32) - right).max() <= limit
    captured = capfd.readouterr()
    assert "RACE" not in captured.out + captured.err


def test_the_path_is_named_with_its_reason():
    (x, kernel, _), args = operands((128,), False)
    arrays = (x, kernel, args["q"], args["k_pages"], args["v_pages"])
    assert path_for(None, *arrays, platform="gpu").form == "sm_exclusive"
    on_cpu = path_for(None, *arrays, platform="cpu")
    assert (on_cpu.form, on_cpu.reason) == ("xla", "sm_exclusive runs on 'gpu', not on 'cpu'")
    odd = path_for("capped_grid", x[:100], *arrays[1:], platform="gpu")
    assert odd.form == "xla"
    assert "100" in odd.reason
    wide = jax.ShapeDtypeStruct((1, 4, 2, 128, 64), jnp.bfloat16)
    assert "page size 128" in path_for(None, x, kernel, args["q"], wide, wide, platform="gpu").reason
    with pytest.raises(
        NotImplementedError, match="form='green' is none of 'sm_exclusive', 'capped_grid', 'fused', 'xla'"
    ):
        path_for("green", *arrays, platform="gpu")
    with pytest.raises(NotImplementedError, match="runs on 'gpu', not on 'cpu'"):
        matmul_and_decode_attention(x, kernel, None, layer=0, form="sm_exclusive", **args)


def pair_on(gpu, form, split):
    """Nano-batch 2's O beside nano-batch 1's decode attention, LLaMA-3-8B at 1024 tokens: the code, and the pages' shape."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((640, 4096), (4096, 4096)))
    q = jax.ShapeDtypeStruct((384, 32, 128), jnp.bfloat16)
    pages = jax.ShapeDtypeStruct((32, 4096, 8, 16, 128), jnp.bfloat16)
    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((384,), (384, 256), ())]

    def pair(x, kernel, q, k_pages, v_pages, kv_lens, page_indices, num_decode):
        return matmul_and_decode_attention(
            x, kernel, None, q, k_pages, v_pages, 5, kv_lens, page_indices, num_decode, form=form, share=split
        )

    return compiled_code.compile_for(gpu, pair, (x, kernel, q, pages, pages, *ints)), pages.shape


@pytest.mark.gpu_compile
@pytest.mark.skipif(compiled_code.why_not() is not None, reason=str(compiled_code.why_not()))
def test_one_kernel_of_a_cta_for_each_multiprocessor():
    gpu = compiled_code.target("h200")
    num_sms = gpu.number("core_count")
    code, pages_shape = pair_on(gpu, "fused", Split(num_sms - 40, 40))
    assert code.copies_of(pages_shape) == 0
    mosaic = [kernel for kernel in code.kernels if kernel.compiler == "mosaic"]
    both = max(mosaic, key=lambda kernel: kernel.smem_bytes)
    assert both.spill_bytes == 0
    assert both.num_blocks == num_sms
    assert gpu.blocks_per_core(both) == 1


@pytest.mark.gpu_compile
@pytest.mark.skipif(compiled_code.why_not() is not None, reason=str(compiled_code.why_not()))
@pytest.mark.parametrize("form", ["sm_exclusive", "capped_grid"])
def test_two_branches_of_one_graph_and_room_for_both(form):
    gpu = compiled_code.target("h200")
    num_sms = gpu.number("core_count")
    # Not the same numbers for both: Mosaic compiles a kernel once in a process.
    part = num_sms // {"sm_exclusive": 3, "capped_grid": 6}[form]
    split = Split(num_sms - part, part)
    code, pages_shape = pair_on(gpu, form, split)
    assert sum(code.overlap.is_there) >= 2
    assert code.graphs.count("kCommandBuffer") == 1
    assert code.copies_of(pages_shape) == 0
    mosaic = [kernel for kernel in code.kernels if kernel.compiler == "mosaic"]
    assert all(kernel.spill_bytes == 0 for kernel in mosaic)
    product = next(kernel for kernel in mosaic if kernel.num_blocks == split.matmul)
    per_sm = {"sm_exclusive": 1, "capped_grid": 2}[form]
    attention = next(kernel for kernel in mosaic if kernel.num_blocks == per_sm * split.attention)
    assert gpu.blocks_per_core(product) == 1
    assert gpu.blocks_per_core(attention) == per_sm
    if form == "sm_exclusive":  # no two CTAs of any kind fit one multiprocessor, and there is one for each
        room = gpu.number("shared_memory_per_core")
        assert 2 * min(product.smem_bytes, attention.smem_bytes) + 2048 > room
        assert product.num_blocks + attention.num_blocks == num_sms
