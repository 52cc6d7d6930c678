"""Do the Mosaic GPU kernels keep the contract, without races (interpreter), and do they compile for an H200?"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import api, arg_specs, mosaic_decode, mosaic_gpu
from pallas_kernels.paged_attention import mosaic_tiles as tiles
from pallas_kernels.paged_attention.arg_specs import ArgSpec, make_args
from pallas_kernels.paged_attention.mosaic_decode_plan import decode_schedule
from tests.mosaic_checks import INTERPRET, SPECS, assert_close, compiled_for_h200, name_of, needs_plugin, without_races

DEFAULT = mosaic_gpu.Config(num_ctas=132)
CONFIG = mosaic_gpu.Config(block=64, num_stages=2, num_ctas=3)


# (q_len, kv_len) of each row: lengths 0 and 1, ends of pages and blocks, rows split over CTAs.
DECODE = ((1, 1), (1, 130), (1, 64))

# H, K, h, page size, dtype, rows: the groups 1, 2, 3, 4, 7 and 8; the interpreter takes 5 to 20 s for each.
DECODE_CASES = (
    (3, 1, 64, 32, jnp.float16, DECODE),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            (2, 2, 64, 16, jnp.bfloat16, DECODE),
            (4, 2, 128, 64, jnp.bfloat16, DECODE),
            (4, 1, 128, 16, jnp.bfloat16, DECODE),
            (14, 2, 64, 64, jnp.bfloat16, DECODE),
            (8, 1, 64, 32, jnp.float16, DECODE),
        )
    ),
)


@pytest.mark.parametrize("case", DECODE_CASES, ids=name_of)
def test_decode_rows_equal_the_reference_without_races(case):
    num_decode = len(case[-1])
    assert_close(case, mosaic_gpu.decode_rows, CONFIG, left_out={"cu_q_lens"}, is_checked=slice(num_decode))


@pytest.mark.parametrize("num_workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_of_a_cta_share_its_rows_without_races(num_workers):
    config = mosaic_gpu.Config(block=64, num_stages=2, num_ctas=1, num_workers=num_workers)
    case = DECODE_CASES[0]
    assert_close(case, mosaic_gpu.decode_rows, config, left_out={"cu_q_lens"}, is_checked=slice(len(DECODE)))


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
    cu_ctas, cu_pairs = schedule.cu_parts_of_run, schedule.cu_parts_of_pair
    assert cu_ctas[0] == 0
    assert cu_ctas[-1] == cu_pairs[-1] <= len(schedule.parts)
    runs = [schedule.parts[a:b] for a, b in itertools.pairwise(cu_ctas)]
    done = [[(row, head, first + i) for row, head, first, n in run for i in range(n)] for run in runs]
    assert list(itertools.chain(*done)) == blocks
    assert max(map(len, done)) == -(-len(blocks) // num_ctas)
    for pair, (a, b) in enumerate(itertools.pairwise(cu_pairs)):
        assert all(row * num_kv_heads + head == pair for row, head, _, _ in schedule.parts[a:b])


@pytest.mark.parametrize(
    "options",
    [{"block": 0}, {"block": 96}, {"num_stages": 0}, {"prefill_block": 96}, {"num_ctas": 0}, {"num_workers": 4}],
)
def test_bad_configs_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        mosaic_gpu.Config(**options)


def shapes_of(**changes):
    spec = dataclasses.replace(arg_specs.GPU_SPECS[0], **{"page_size": 64, **changes.pop("spec", {})})
    return arg_specs.arg_shapes(spec, changes.pop("dtype", jnp.bfloat16), num_layers=32, num_pages=8192)


def trace(shapes, config=DEFAULT):
    attend = functools.partial(mosaic_gpu.paged_attention, layer=31, sm_scale=0.1, config=config)
    return jax.eval_shape(lambda args: attend(**args), shapes)


@pytest.mark.parametrize(("only", "num_kernels"), [(None, 3), ("decode", 2), ("prefill", 1)])
def test_kernels_for_rows_that_are_not_wanted_are_left_out(only, num_kernels):
    attend = functools.partial(mosaic_gpu.paged_attention, layer=31, sm_scale=0.1, config=DEFAULT, only=only)
    assert str(jax.make_jaxpr(lambda args: attend(**args))(shapes_of())).count("= mpmd_map[") == num_kernels


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"num_stages": 4}, "a CTA has 232448"),
        ({"prefill_stages": 3}, "a CTA has 232448"),
        ({"block": 64}, "no multiple of the page size 128"),
    ],
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


@needs_plugin
@pytest.mark.gpu_compile
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("name", ["8b-decode-64x2k", "8b-decode-512x1k"])
def test_decode_compiles_for_h200_without_spills(name, page_size):
    kernels = compiled_for_h200(mosaic_gpu.decode_rows, SPECS[name], page_size, left_out={"cu_q_lens"})
    assert all(kernel.registers is not None and kernel.registers <= 128 for kernel in kernels)


@needs_plugin
@pytest.mark.gpu_compile
@pytest.mark.parametrize(("num_workers", "num_stages", "num_registers"), [(2, 3, 128), (3, 2, 80)])
def test_workers_fit_a_multiprocessor(num_workers, num_stages, num_registers):
    """Three workers begin with 80 registers a thread, and hand around no more than their CTA has: one too many and it hangs."""
    config = mosaic_gpu.Config(block=64, num_stages=num_stages, num_workers=num_workers)
    kernels = compiled_for_h200(
        mosaic_gpu.decode_rows, SPECS["8b-decode-64x2k"], 64, left_out={"cu_q_lens"}, config=config
    )
    kernel = max(kernels, key=lambda kernel: kernel.num_threads)
    assert kernel.num_threads == 256 * num_workers
    assert kernel.registers <= num_registers
    handed_out = 384 * (mosaic_decode.CONSUMER_REGISTERS + mosaic_decode.PRODUCER_REGISTERS)
    assert num_workers < 3 or handed_out <= kernel.registers * kernel.num_threads
