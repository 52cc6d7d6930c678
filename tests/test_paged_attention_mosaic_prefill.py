"""Do prefill chunks in the Mosaic GPU kernel keep the contract, without races, and does it compile for an H200?"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import arg_specs, mosaic_gpu, mosaic_prefill_plan
from pallas_kernels.paged_attention import mosaic_tiles as tiles
from pallas_kernels.paged_attention.mosaic_prefill_plan import PrefillShape, item_of, num_items_of, prefill_schedule
from tests.mosaic_checks import SPECS, assert_close, compiled_for_h200, name_of, needs_plugin

DEFAULT = mosaic_gpu.Config(num_ctas=132)
# The interpreter compiles the kernel once for each CTA: one, with several tiles.
CONFIG = mosaic_gpu.Config(block=64, num_stages=2, prefill_block=64, num_ctas=1)

# (q_len, kv_len) of each row: chunks of no token, of less and of more than a tile of queries, with and without tokens
# before them, that start at any token; ends of pages and blocks.
CHUNKS = ((8, 70), (0, 0), (43, 43), (1, 3))

# H, K, h, page size, dtype, rows; the interpreter takes 10 s for each.
CHUNKS_OF_3 = (3, 1, 64, 32, jnp.float16, CHUNKS)
MIXED_OF_7 = (7, 1, 64, 16, jnp.bfloat16, ((1, 1), (1, 130), (19, 70), (0, 0), (20, 20)))


def test_chunks_equal_the_reference_without_races():
    num_tokens = sum(q_len for q_len, _ in CHUNKS)
    assert_close(CHUNKS_OF_3, mosaic_gpu.prefill_rows, CONFIG, is_checked=slice(num_tokens))


@pytest.mark.slow
def test_a_mixed_batch_equals_the_reference_without_races():
    assert_close(MIXED_OF_7, mosaic_gpu.paged_attention, CONFIG)


NUM_TOKENS = 256  # with the padding


@functools.partial(jax.jit, static_argnames="tokens")
def schedule_of(kv_lens, cu_q_lens, num_decode, tokens):
    return prefill_schedule(kv_lens, cu_q_lens, num_decode, NUM_TOKENS, tokens)


@pytest.mark.parametrize(
    ("q_lens", "num_decode"),
    [
        ((1, 0, 0, 0, 0, 0, 0), 1),
        ((1, 1, 5, 40, 0, 1, 79), 2),
        ((1,) * 7, 0),
        ((0,) * 7, 0),
        ((250, 0, 0, 0, 0, 0, 0), 0),
        ((34, 34, 34, 34, 34, 34, 34), 0),
    ],
)
@pytest.mark.parametrize("tokens", [8, 40])
def test_tiles_cover_each_token_of_a_chunk_once_longest_first(q_lens, num_decode, tokens):
    kv_lens = np.array(q_lens) + np.arange(len(q_lens)) * 10
    cu_q_lens = np.cumsum([0, *q_lens])
    schedule = schedule_of(kv_lens, cu_q_lens, num_decode, tokens)
    (num_tiles,) = np.asarray(schedule.num_tiles)
    assert num_tiles <= len(schedule.tiles)
    covered, num_keys = [], []
    for row, eighth, first, last, to_position, kv_len in np.asarray(schedule.tiles)[:num_tiles]:
        assert 8 * eighth <= first < last <= 8 * eighth + tokens <= NUM_TOKENS
        assert cu_q_lens[row] <= first
        assert last <= cu_q_lens[row + 1]
        assert kv_len == kv_lens[row] == to_position + cu_q_lens[row + 1]
        covered += range(first, last)
        num_keys.append(to_position + last)
    assert sorted(covered) == list(range(cu_q_lens[num_decode], cu_q_lens[-1]))
    assert num_keys == sorted(num_keys, reverse=True)


@pytest.mark.parametrize(("num_items", "num_ctas"), [(0, 3), (7, 1), (7, 3), (8, 3), (12, 3), (5, 132)])
def test_each_item_is_taken_once_and_late_ones_by_those_who_took_early_ones(num_items, num_ctas):
    counts = [int(num_items_of(cta, num_ctas, num_items)) for cta in range(num_ctas)]
    taken = [[int(item_of(i, cta, num_ctas)) for i in range(n)] for cta, n in enumerate(counts)]
    assert sorted(itertools.chain(*taken)) == list(range(num_items))
    # Of an even number of rounds each CTA has as many early places as late ones.
    assert {sum(x[:2]) for x in taken if len(x) > 1} <= {2 * num_ctas - 1}


@pytest.mark.parametrize("group", [*range(1, 9), 16])
def test_pieces_hold_each_query_of_a_tile_once(group):
    shape = PrefillShape(group, 64, 16, 1, 128, 2, 132, scale=1.0)
    rows, queries = [], []
    for warpgroup in range(2):
        for first_row, head, first_token, n in shape.pieces(warpgroup):
            assert first_row % 8 == first_token % 8 == n % 8 == 0  # whole tiles in shared memory
            rows += [64 * warpgroup + first_row + i for i in range(n)]
            queries += [(head, first_token + i) for i in range(n)]
    assert rows == list(range(group * shape.tokens))
    assert queries == [(head, token) for head in range(group) for token in range(shape.tokens)]
    assert len(rows) >= 96  # of 128


def test_a_group_that_fills_no_tile_goes_through_xla():
    assert "not 17" in str(mosaic_prefill_plan.why_not(34, 2))
    shapes = {group: shapes_of(num_heads=2 * group, num_kv_heads=2) for group in (16, 17)}
    assert "set_max_registers" in jaxpr_of(shapes[16])  # the prefill kernel's alone
    assert "set_max_registers" not in jaxpr_of(shapes[17])


def shapes_of(**changes):
    spec = dataclasses.replace(SPECS["8b-prefill-2048"], **changes)
    return arg_specs.arg_shapes(spec, jnp.bfloat16, num_layers=32, num_pages=4096)


def jaxpr_of(shapes):
    attend = functools.partial(mosaic_gpu.paged_attention, layer=31, sm_scale=0.1, config=DEFAULT)
    return str(jax.make_jaxpr(lambda args: attend(**args))(shapes))


def test_negative_scales_are_refused():
    with pytest.raises(ValueError, match="scale=-1"):
        PrefillShape(1, 64, 16, 1, 128, 2, 132, scale=-1.0)


# H, K, h, page size, dtype: each group of the models served, each head and page size.
PREFILL_SHAPES = (
    (32, 32, 128, 64, jnp.bfloat16),
    (4, 2, 64, 32, jnp.float16),
    (9, 3, 64, 16, jnp.bfloat16),
    (32, 8, 128, 16, jnp.bfloat16),
    (28, 4, 128, 16, jnp.bfloat16),
    (8, 1, 128, 32, jnp.float16),
)


@needs_plugin
@pytest.mark.gpu_compile
@pytest.mark.parametrize("case", PREFILL_SHAPES, ids=name_of)
def test_prefill_compiles_for_h200_without_spills(case):
    num_heads, num_kv_heads, head_dim, page_size, dtype = case
    spec = dataclasses.replace(
        SPECS["8b-prefill-2048"], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    (kernel,) = compiled_for_h200(mosaic_gpu.prefill_rows, spec, page_size, dtype)
    assert (kernel.num_threads, kernel.registers) == (384, 168)  # of 65,536; they are handed out anew in the kernel
    pages_shape = (32, 4096, num_kv_heads, page_size, head_dim)
    shape = DEFAULT.prefill_shape((2048, num_heads, head_dim), pages_shape, dtype, 0.1)
    assert kernel.smem_bytes <= shape.smem_bytes(dtype) <= tiles.SMEM_BYTES


@needs_plugin
@pytest.mark.gpu_compile
@pytest.mark.parametrize("name", ["8b-mixed-2048", "8b-chunk-2k-of-4k"])
def test_a_call_compiles_for_h200_without_copies(name):
    kernels = compiled_for_h200(mosaic_gpu.paged_attention, SPECS[name])
    assert {kernel.num_threads for kernel in kernels} >= {256, 384}  # decode and prefill
