"""Does every implementation of paged attention keep the contract of `api.py`?  One class, run over all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import api, arg_specs, xla
from pallas_kernels.paged_attention.arg_specs import ArgSpec, make_args

LAYER, NUM_LAYERS = 1, 3
TINY = {
    "name": "tiny",
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "page_size": 16,
    "num_rows": 6,
    "max_len": 320,
}

# Rows of one batch as (q_len, kv_len), and what is special about it.
BATCHES = {
    "decode only": ((1, 1), (1, 16), (1, 17), (1, 300)),
    "prefill only": ((40, 40), (17, 17)),
    "decode then prefill": ((1, 5), (1, 129), (33, 33), (7, 200)),
    "chunk straddles pages": ((1, 64), (20, 30), (18, 130)),
    "prefill of one token": ((1, 9), (2, 2), (1, 1), (1, 40)),
    "longer than a tile": ((150, 290),),
    "nothing but padding": (),
    "rows without tokens": ((1, 3), (4, 4), (0, 0), (0, 0)),
}


def tiny(batch, num_tokens=192, **changes) -> ArgSpec:
    q_lens, kv_lens = zip(*batch, strict=True) if batch else ((), ())
    return ArgSpec(**{**TINY, "num_tokens": num_tokens, **changes}, q_lens=q_lens, kv_lens=kv_lens)


def tiny_args(spec: ArgSpec, dtype=jnp.float32, **options) -> dict:
    """Arguments whose shapes are the same for all batches, so that they share a compilation."""
    return make_args(spec, dtype, num_layers=NUM_LAYERS, num_pages=80, **options)


def in_float32(args: dict) -> dict:
    return {name: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for name, x in args.items()}


@functools.partial(jax.jit, static_argnames=("implementation", "sm_scale"))
def attend(args, implementation, sm_scale=None):
    return api.paged_attention(layer=LAYER, implementation=implementation, sm_scale=sm_scale, **args)


def error(out, truth) -> float:
    return float(np.abs(np.asarray(out, np.float32) - np.asarray(truth, np.float32)).max(initial=0))


def assert_close(args, implementation):
    out = attend(args, implementation)
    truth = attend(in_float32(args), "reference")
    assert out.dtype == args["q"].dtype
    limit = 2 * error(attend(args, "reference"), truth) if args["q"].dtype != jnp.float32 else 4e-6
    assert error(out, truth) <= limit


def brute_force(spec: ArgSpec, args: dict) -> np.ndarray:
    """Attention with nothing but Python loops: each query head of each token, one visible position after another."""
    q, keys, values = (np.asarray(args[name], np.float64) for name in ("q", "k_pages", "v_pages"))
    out, token = np.zeros(q.shape), 0
    group = spec.num_heads // spec.num_kv_heads
    for row, (q_len, kv_len) in enumerate(zip(spec.q_lens, spec.kv_lens, strict=True)):
        for position in range(kv_len - q_len, kv_len):
            for head in range(spec.num_heads):
                places = [
                    (int(args["page_indices"][row, s // spec.page_size]), s % spec.page_size)
                    for s in range(position + 1)
                ]
                scores = [q[token, head] @ keys[LAYER, n, head // group, s] / spec.head_dim**0.5 for n, s in places]
                weights = np.exp(np.array(scores) - max(scores))
                weighted = [w * values[LAYER, n, head // group, s] for w, (n, s) in zip(weights, places, strict=True)]
                out[token, head] = sum(weighted) / weights.sum()
            token += 1
    return out


def test_reference_equals_brute_force():
    spec = tiny(((1, 1), (1, 18), (5, 20), (3, 3)), num_tokens=12)
    args = tiny_args(spec)
    assert error(attend(args, "reference"), brute_force(spec, args)) < 1e-6


@pytest.mark.parametrize("implementation", ["xla"])
class TestContract:
    @pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_batches(self, implementation, batch, dtype):
        assert_close(tiny_args(tiny(batch), dtype), implementation)

    @pytest.mark.parametrize("heads", arg_specs.HEADS, ids=[name for name, *_ in arg_specs.HEADS])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_heads(self, implementation, heads, dtype):
        _, num_heads, num_kv_heads, head_dim = heads
        shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        spec = tiny(BATCHES["decode then prefill"], num_tokens=64, **shape)
        assert_close(tiny_args(spec, dtype), implementation)

    @pytest.mark.parametrize("page_size", [16, 32, 64, 128])
    def test_page_sizes(self, implementation, page_size):
        spec = tiny(BATCHES["decode then prefill"], num_tokens=64, page_size=page_size)
        assert_close(tiny_args(spec), implementation)

    def test_cache_dtype_differs_from_query_dtype(self, implementation):
        spec = tiny(BATCHES["decode then prefill"], num_tokens=64)
        assert_close(tiny_args(spec, kv_dtype=jnp.bfloat16), implementation)

    def test_more_rows_than_tokens(self, implementation):
        spec = tiny(((1, 7), (1, 33)), num_tokens=4, num_rows=9)
        assert_close(tiny_args(spec), implementation)

    @pytest.mark.parametrize("spec", arg_specs.SERVING_SPECS, ids=[spec.name for spec in arg_specs.SERVING_SPECS])
    def test_serving_shapes(self, implementation, spec):
        assert_close(make_args(spec, jnp.bfloat16, num_layers=NUM_LAYERS), implementation)

    def test_scale(self, implementation):
        args = tiny_args(tiny(BATCHES["decode then prefill"]))
        doubled = {**args, "q": 2 * args["q"]}
        out, expected = attend(args, implementation, sm_scale=0.5), attend(doubled, implementation, sm_scale=0.25)
        assert error(out, expected) < 1e-6

    @pytest.mark.parametrize("poison", [np.nan, np.inf])
    @pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
    def test_what_is_not_visible_never_reaches_a_result(self, implementation, batch, poison):
        spec = tiny(batch)
        args = tiny_args(spec)
        is_used = np.zeros((NUM_LAYERS, args["k_pages"].shape[1], spec.page_size), bool)
        for row, kv_len in enumerate(spec.kv_lens):
            for s in range(kv_len):
                is_used[LAYER, args["page_indices"][row, s // spec.page_size], s % spec.page_size] = True
        pages = {x: jnp.where(is_used[:, :, None, :, None], args[x], poison) for x in ("k_pages", "v_pages")}
        padding = np.arange(spec.num_tokens) >= sum(spec.q_lens)
        poisoned = {**args, **pages, "q": jnp.where(padding[:, None, None], poison, args["q"])}
        np.testing.assert_array_equal(attend(poisoned, implementation), attend(args, implementation))

    def test_padding_tokens_are_zero(self, implementation):
        spec = tiny(BATCHES["decode then prefill"])
        out = attend(tiny_args(spec), implementation)
        assert sum(spec.q_lens) < spec.num_tokens
        assert not np.asarray(out[sum(spec.q_lens) :]).any()

    def test_one_trace_serves_every_batch_of_a_shape(self, implementation):
        traces = []

        def traced(args):
            traces.append(None)
            return api.paged_attention(layer=LAYER, implementation=implementation, **args)

        call = jax.jit(traced)
        for batch in BATCHES.values():
            call(tiny_args(tiny(batch)))
        assert len(traces) == 1


def temp_bytes(implementation: str, spec: ArgSpec, dtype, num_pages: int) -> int:
    args = tiny_args(spec, dtype)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    for name in ("k_pages", "v_pages"):
        shape = (NUM_LAYERS, num_pages, *args[name].shape[2:])
        shapes[name] = jax.ShapeDtypeStruct(shape, dtype)
    compiled = attend.lower(shapes, implementation=implementation).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
class TestMemoryOfXla:
    spec = tiny(BATCHES["decode then prefill"])

    def test_temp_does_not_grow_with_the_pool(self, dtype):
        small, large = (temp_bytes("xla", self.spec, dtype, num_pages) for num_pages in (64, 1 << 16))
        assert large == small

    def test_temp_grows_with_the_page_table_but_not_with_what_it_could_address(self, dtype):
        wide = dataclasses.replace(self.spec, max_len=1 << 16)
        table_bytes = self.spec.num_rows * wide.pages_per_row * 4
        small, large = (temp_bytes("xla", spec, dtype, 64) for spec in (self.spec, wide))
        assert large - small <= 6 * table_bytes  # its keys and values would be 128 (bfloat16: 64) times the table


def test_layers_of_a_step_share_the_work_list():
    shapes = jax.eval_shape(lambda: make_args(tiny(BATCHES["decode then prefill"]), jnp.float32, num_layers=4))

    def num_operations(num_layers: int) -> int:
        def step(args):
            for layer in range(num_layers):
                args = {**args, "q": api.paged_attention(layer=layer, implementation="xla", **args)}
            return args["q"]

        entry = jax.jit(step).lower(shapes).compile().as_text().split("\nENTRY ")[1]
        return sum(" fusion(" in line for line in entry.splitlines())

    one, two, four = (num_operations(num_layers) for num_layers in (1, 2, 4))
    assert four - two == 2 * (two - one)
    assert two - one < one / 2  # what a further layer adds is less than what the first one shares with it


def test_an_unknown_implementation_is_refused():
    args = tiny_args(tiny(BATCHES["decode only"]))
    with pytest.raises(NotImplementedError, match="'cuda' is none of 'reference', 'xla'"):
        api.paged_attention(layer=0, implementation="cuda", **args)


def test_a_layer_beyond_the_cache_is_refused():
    args = tiny_args(tiny(BATCHES["decode only"]))
    with pytest.raises(ValueError, match=r"layer=3 is not in \[0, 3\)"):
        api.paged_attention(layer=3, **args)


def test_heads_that_do_not_divide_are_refused():
    args = tiny_args(tiny(BATCHES["decode only"], num_heads=3))
    with pytest.raises(ValueError, match="H=3 query heads are no multiple of K=2"):
        api.paged_attention(layer=0, **args)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(xla.Config)])
def test_an_empty_tile_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        xla.Config(**{field: 0})


def test_none_is_the_fast_path():
    args = tiny_args(tiny(BATCHES["decode then prefill"]))
    np.testing.assert_array_equal(attend(args, None), attend(args, "xla"))
