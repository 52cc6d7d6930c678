"""Do the Mosaic GPU kernels keep the contract, without races (interpreter), and do they compile for an H200?"""

import contextlib
import dataclasses
import functools
import io
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments import compiled_code
from pallas_kernels.paged_attention import api, arg_specs, mosaic_gpu
from pallas_kernels.paged_attention import mosaic_tiles as tiles
from pallas_kernels.paged_attention.arg_specs import ArgSpec, make_args
from pallas_kernels.paged_attention.mosaic_decode import decode_schedule

LAYER, NUM_LAYERS = 1, 2
INTERPRET = InterpretGPUParams(detect_races=True, out_of_bounds_reads="raise")
DEFAULT = mosaic_gpu.Config(num_ctas=132)
CONFIG = mosaic_gpu.Config(block=64, num_stages=2, num_ctas=3)


def poisoned(spec: ArgSpec, dtype) -> dict:
    """Arguments with NaN in all that no token holds: other layers, other pages, the rest of last pages, padding."""
    args = make_args(spec, dtype, num_layers=NUM_LAYERS, num_pages=spec.num_pages_used + 3)
    is_used = np.zeros((NUM_LAYERS, args["k_pages"].shape[1], spec.page_size), bool)
    for row, kv_len in enumerate(spec.kv_lens):
        for s in range(kv_len):
            is_used[LAYER, args["page_indices"][row, s // spec.page_size], s % spec.page_size] = True
    pages = {x: jnp.where(is_used[:, :, None, :, None], args[x], jnp.nan) for x in ("k_pages", "v_pages")}
    is_padding = np.arange(spec.num_tokens) >= sum(spec.q_lens)
    return {**args, **pages, "q": jnp.where(is_padding[:, None, None], jnp.nan, args["q"])}


def without_races(f):
    """The value of `f()`; the interpreter prints races and goes on: they are errors here."""
    printed = io.StringIO()
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    with contextlib.redirect_stdout(printed):
        out = jax.tree.map(np.asarray, f())
    assert "RACE" not in printed.getvalue(), printed.getvalue()
    return out


def interpreted(args):
    """The kernels' result in the interpreter."""
    scale = args["q"].shape[-1] ** -0.5
    attend = functools.partial(mosaic_gpu.paged_attention, layer=LAYER, sm_scale=scale)
    return without_races(lambda: attend(**args, config=CONFIG, interpret=INTERPRET)).astype(np.float32)


def reference(args):
    return np.asarray(api.paged_attention(layer=LAYER, implementation="reference", **args), np.float32)


def assert_close(args):
    in_float32 = {
        name: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for name, x in args.items()
    }
    truth = reference(in_float32)
    error = np.abs(interpreted(args) - truth).max()
    assert error <= 2 * np.abs(reference(args) - truth).max()


# (q_len, kv_len) of each row: decode rows split over CTAs, lengths 0 and 1, ends of pages and blocks, a prefill chunk.
DECODE = ((1, 1), (1, 130), (1, 64))
MIXED = (*DECODE, (5, 70), (0, 0))

# H, K, h, page size, dtype, rows: the groups 1, 2, 3, 4, 7 and 8; the interpreter takes 5 to 20 s for each.
CASES = (
    (3, 1, 64, 32, jnp.float16, DECODE),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            (2, 2, 64, 16, jnp.bfloat16, DECODE),
            (4, 2, 128, 64, jnp.bfloat16, MIXED),
            (4, 1, 128, 16, jnp.bfloat16, DECODE),
            (14, 2, 64, 64, jnp.bfloat16, DECODE),
            (8, 1, 64, 32, jnp.float16, MIXED),
        )
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda x: f"H{x[0]} K{x[1]} h{x[2]} p{x[3]}")
def test_equals_reference_without_races(case):
    num_heads, num_kv_heads, head_dim, page_size, dtype, rows = case
    q_lens, kv_lens = zip(*rows, strict=True)
    spec = ArgSpec("tiny", num_heads, num_kv_heads, head_dim, page_size, 10, len(rows), 192, q_lens, kv_lens)
    assert_close(poisoned(spec, dtype))


def test_a_race_is_seen():
    """The check above can fail: two warpgroups that read each other's memory without a barrier are reported."""

    def body(out, smem):
        warpgroup = jax.lax.axis_index("warpgroup")
        smem[warpgroup] = jnp.ones((128,))
        out[warpgroup] = smem[1 - warpgroup]

    racy = tiles.kernel(
        body,
        interpret=INTERPRET,
        out_type=jax.ShapeDtypeStruct((2, 128), jnp.float32),
        scratch_types=[plgpu.SMEM((2, 128), jnp.float32)],
        num_threads=2,
        thread_name="warpgroup",
    )
    with pytest.raises(AssertionError, match="RACE"):
        without_races(racy)


@pytest.mark.parametrize("num_ctas", [1, 3, 7, 132])
@pytest.mark.parametrize("kv_lens", [(1,), (1, 64, 65, 700), (5000, 1, 1), (0, 0)])
def test_schedule_covers_each_block_once_and_is_balanced(kv_lens, num_ctas):
    num_kv_heads, block = 2, 64
    num_decode = sum(kv_len > 0 for kv_len in kv_lens)
    schedule = jax.tree.map(np.asarray, decode_schedule(jnp.array(kv_lens), jnp.int32(num_decode), 2, block, num_ctas))
    blocks = [
        (row, head, i) for row, n in enumerate(kv_lens) for head in range(num_kv_heads) for i in range(-(-n // block))
    ]
    cu_ctas, cu_pairs = schedule.cu_parts_of_cta, schedule.cu_parts_of_pair
    assert cu_ctas[0] == 0
    assert cu_ctas[-1] == cu_pairs[-1] <= len(schedule.parts)
    runs = [schedule.parts[a:b] for a, b in itertools.pairwise(cu_ctas)]
    done = [[(row, head, first + i) for row, head, first, n in run for i in range(n)] for run in runs]
    assert list(itertools.chain(*done)) == blocks
    assert max(map(len, done)) == -(-len(blocks) // num_ctas)
    for pair, (a, b) in enumerate(itertools.pairwise(cu_pairs)):
        assert all(row * num_kv_heads + head == pair for row, head, _, _ in schedule.parts[a:b])


@pytest.mark.parametrize("options", [{"block": 0}, {"block": 96}, {"num_stages": 0}, {"num_ctas": 0}])
def test_bad_configs_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        mosaic_gpu.Config(**options)


def shapes_of(**changes):
    spec = dataclasses.replace(arg_specs.GPU_SPECS[0], **{"page_size": 64, **changes.pop("spec", {})})
    return arg_specs.arg_shapes(spec, changes.pop("dtype", jnp.bfloat16), num_layers=32, num_pages=8192)


def trace(shapes, config=DEFAULT):
    attend = functools.partial(mosaic_gpu.paged_attention, layer=31, sm_scale=0.1, config=config)
    return jax.eval_shape(lambda args: attend(**args), shapes)


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"num_stages": 4}, "a CTA has 232448"), ({"block": 64}, "no multiple of the page size 128")],
)
def test_configs_that_do_not_fit_the_shapes_are_refused(config, reason):
    spec = {"page_size": 128} if "block" in config else {}
    with pytest.raises(ValueError, match=reason):
        trace(shapes_of(spec=spec), mosaic_gpu.Config(num_ctas=132, **config))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": jnp.float32}, "rounds float32 to tf32"),
        ({"dtype": jnp.uint16}, "pages of bits are for CPUs"),
        ({"spec": {"head_dim": 80}}, "head_dim 64 and 128, not 80"),
        ({"spec": {"page_size": 12}}, "page size 12"),
    ],
)
def test_what_has_no_kernel_is_refused(changes, reason):
    shapes = shapes_of(**changes)
    if shapes["q"].dtype == jnp.uint16:
        shapes["q"] = jax.ShapeDtypeStruct(shapes["q"].shape, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=reason):
        trace(shapes)


def test_the_named_implementation_is_loud_without_a_gpu():
    spec = ArgSpec("tiny", 2, 1, 64, 16, 1, 1, 64, (1,), (9,))
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' runs on 'gpu', not on 'cpu'"):
        api.paged_attention(layer=0, implementation="mosaic_gpu", **make_args(spec, jnp.bfloat16))


def test_a_cache_of_more_than_2_to_the_31_elements_is_indexed_by_page():
    shapes = shapes_of()
    assert np.prod(shapes["k_pages"].shape) > 2**31
    jaxpr = str(
        jax.make_jaxpr(lambda args: mosaic_gpu.paged_attention(**args, layer=31, sm_scale=0.1, config=DEFAULT))(shapes)
    )
    numbers = [int(x) for x in re.findall(r"(?<![\w.\[,])\d{6,}(?=:i32)", jaxpr)]
    assert 31 * 8192 in numbers  # the layer's first page
    assert max(numbers) < 2**31
    pages = [x for x in re.findall(r"bf16\[([\d,]+)\]", jaxpr) if np.prod(np.array(x.split(","), float)) > 2**31]
    # Always [pages K p h] or with the layers apart: no flat view of the elements.
    assert set(pages) <= {"32,8192,8,64,128", "262144,8,64,128", "2097152,8192"}


@pytest.mark.gpu_compile
@pytest.mark.skipif(compiled_code.why_not() is not None, reason=str(compiled_code.why_not()))
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("spec", arg_specs.GPU_SPECS[:3], ids=lambda spec: spec.name)
def test_compiles_for_h200_without_spills(spec, page_size):
    gpu = compiled_code.target("h200")
    spec = dataclasses.replace(spec, page_size=page_size)
    shapes = arg_specs.arg_shapes(spec, jnp.bfloat16, num_layers=32, num_pages=4096)
    attend = functools.partial(mosaic_gpu.paged_attention, layer=3, sm_scale=0.1)
    code = compiled_code.compile_for(gpu, lambda args: attend(**args), (shapes,))
    kernels = [kernel for kernel in code.kernels if kernel.compiler == "mosaic"]
    assert kernels  # decode, and merge the first time: Mosaic compiles a kernel once in a process
    for kernel in kernels:
        assert kernel.spill_bytes == 0
        assert kernel.registers <= 128
        assert gpu.blocks_per_core(kernel) >= 1
    assert gpu.number("core_count") in [kernel.num_blocks for kernel in kernels]
    cache_bytes = shapes["k_pages"].size * 2
    assert code.temp_bytes < cache_bytes // 8, "a layer of the cache is copied"
