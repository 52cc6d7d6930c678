"""Does every implementation of paged attention keep the contract of `api.py`?  One class, run over all of them."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.device import cpu_has_amx
from pallas_kernels.paged_attention import api, arg_specs, xla
from pallas_kernels.paged_attention.arg_specs import ArgSpec, make_args

LAYER, NUM_LAYERS = 1, 3
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")
TINY = {
    "name": "tiny",
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "page_size": 16,
    "num_rows": 6,
    "max_len": 320,
}

SERVING_SPECS = [
    spec for spec in arg_specs.SERVING_SPECS if spec.num_tokens <= 256
]  # a larger one takes longer to check

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


def as_bits(args: dict) -> dict:
    """Pages as the uint16 bits of bfloat16 values."""
    bits = {x: jax.lax.bitcast_convert_type(args[x].astype(jnp.bfloat16), jnp.uint16) for x in ("k_pages", "v_pages")}
    return {**args, **bits}


def readable(args: dict, implementation: str) -> dict:
    """`args` with bfloat16 pages as bits where the implementation reads no others."""
    return as_bits(args) if implementation == "numba" and args["k_pages"].dtype == jnp.bfloat16 else args


@functools.partial(jax.jit, static_argnames=("implementation", "sm_scale"))
def attend(args, implementation, sm_scale=None):
    return api.paged_attention(layer=LAYER, implementation=implementation, sm_scale=sm_scale, **args)


def error(out, truth) -> float:
    return float(np.abs(np.asarray(out, np.float32) - np.asarray(truth, np.float32)).max(initial=0))


def assert_close(args, implementation):
    args = readable(args, implementation)
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


@pytest.mark.parametrize("implementation", ["xla", pytest.param("numba", marks=needs_numba)])
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

    @pytest.mark.parametrize("heads", arg_specs.HEADS, ids=[name for name, *_ in arg_specs.HEADS])
    def test_pages_of_bits(self, implementation, heads):
        _, num_heads, num_kv_heads, head_dim = heads
        shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        spec = tiny(BATCHES["decode then prefill"], num_tokens=64, **shape)
        assert_close(as_bits(tiny_args(spec)), implementation)

    @pytest.mark.parametrize("head_dim", [3, 20, 80])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_head_dims_that_no_vector_divides(self, implementation, head_dim, dtype):
        spec = tiny(BATCHES["decode then prefill"], num_tokens=64, head_dim=head_dim, page_size=5)
        assert_close(tiny_args(spec, dtype), implementation)

    def test_more_rows_than_tokens(self, implementation):
        spec = tiny(((1, 7), (1, 33)), num_tokens=4, num_rows=9)
        assert_close(tiny_args(spec), implementation)

    @pytest.mark.parametrize("spec", SERVING_SPECS, ids=[spec.name for spec in SERVING_SPECS])
    def test_serving_shapes(self, implementation, spec):
        assert_close(make_args(spec, jnp.bfloat16, num_layers=NUM_LAYERS), implementation)

    def test_scale(self, implementation):
        args = tiny_args(tiny(BATCHES["decode then prefill"]))
        doubled = {**args, "q": 2 * args["q"]}
        out, expected = attend(args, implementation, sm_scale=0.5), attend(doubled, implementation, sm_scale=0.25)
        assert error(out, expected) < 1e-6

    @pytest.mark.parametrize("poison", [np.nan, np.inf])
    @pytest.mark.parametrize("convert", [dict, as_bits])
    @pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
    def test_what_is_not_visible_never_reaches_a_result(self, implementation, batch, convert, poison):
        spec = tiny(batch)
        args = tiny_args(spec)
        is_used = np.zeros((NUM_LAYERS, args["k_pages"].shape[1], spec.page_size), bool)
        for row, kv_len in enumerate(spec.kv_lens):
            for s in range(kv_len):
                is_used[LAYER, args["page_indices"][row, s // spec.page_size], s % spec.page_size] = True
        pages = {x: jnp.where(is_used[:, :, None, :, None], args[x], poison) for x in ("k_pages", "v_pages")}
        padding = np.arange(spec.num_tokens) >= sum(spec.q_lens)
        poisoned = {**args, **pages, "q": jnp.where(padding[:, None, None], poison, args["q"])}
        out, expected = (attend(convert(x), implementation) for x in (poisoned, args))
        np.testing.assert_array_equal(out, expected)

    def test_padding_tokens_are_zero(self, implementation):
        spec = tiny(BATCHES["decode then prefill"])
        out = attend(tiny_args(spec), implementation)
        assert sum(spec.q_lens) < spec.num_tokens
        assert not np.asarray(out[sum(spec.q_lens) :]).any()

    def test_prefill_rows_complete_the_others(self, implementation):
        spec = tiny(BATCHES["decode then prefill"])
        args = tiny_args(spec)
        num_decode = int(args["num_decode"])
        assert 0 < num_decode < spec.num_tokens
        decoded = jnp.full_like(args["q"], 7)
        out = api.paged_attention(layer=LAYER, implementation=implementation, only="prefill", others=decoded, **args)
        np.testing.assert_array_equal(out[:num_decode], decoded[:num_decode])
        np.testing.assert_array_equal(out[num_decode:], attend(args, implementation)[num_decode:])

    def test_one_trace_serves_every_batch_of_a_shape(self, implementation):
        traces = []

        def traced(args):
            traces.append(None)
            return api.paged_attention(layer=LAYER, implementation=implementation, **args)

        call = jax.jit(traced)
        for batch in BATCHES.values():
            call(tiny_args(tiny(batch)))
        assert len(traces) == 1


@needs_numba
@pytest.mark.parametrize(
    ("convert", "dtype", "head_dim"), [(dict, jnp.float32, 8), (as_bits, jnp.float32, 8), (as_bits, jnp.bfloat16, 64)]
)
def test_a_decode_row_of_numba_depends_on_no_other_row(convert, dtype, head_dim):
    together = convert(tiny_args(tiny(BATCHES["decode only"], head_dim=head_dim), dtype))
    row = 2
    alone = {**together, "kv_lens": jnp.zeros_like(together["kv_lens"]).at[0].set(together["kv_lens"][row])}
    alone["page_indices"] = jnp.roll(together["page_indices"], -row, axis=0)
    alone["q"] = jnp.roll(together["q"], -row, axis=0)
    alone["cu_q_lens"] = jnp.minimum(together["cu_q_lens"], 1)
    alone["num_decode"] = jnp.ones_like(together["num_decode"])
    np.testing.assert_array_equal(attend(alone, "numba")[0], attend(together, "numba")[row])


@needs_numba
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint16])
def test_a_step_with_numba_copies_no_cache(dtype):
    spec = tiny(BATCHES["decode only"])
    shapes = jax.eval_shape(lambda: make_args(spec, jnp.float32, num_layers=NUM_LAYERS))
    cache = jax.ShapeDtypeStruct((NUM_LAYERS, 1 << 12, *shapes["k_pages"].shape[2:]), dtype)
    shapes |= {"k_pages": cache, "v_pages": cache}

    def step(args):
        for layer in range(NUM_LAYERS):
            new = args["q"][: spec.num_rows, : spec.num_kv_heads].astype(dtype)
            place = (layer, args["page_indices"][:, 0], slice(None), args["kv_lens"] % spec.page_size)
            args = {**args, **{x: args[x].at[place].set(new, mode="drop") for x in ("k_pages", "v_pages")}}
            args["q"] = api.paged_attention(layer=layer, implementation="numba", **args)
        return args

    compiled = jax.jit(step, donate_argnums=0).lower(shapes).compile()
    cache_shape = f"[{','.join(map(str, cache.shape))}]"
    assert compiled.memory_analysis().temp_size_in_bytes < cache.size
    assert not [line for line in compiled.as_text().splitlines() if cache_shape in line and " copy(" in line]


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
    names = "'mosaic_gpu', 'numba', 'reference', 'triton', 'xla'"
    with pytest.raises(NotImplementedError, match=f"'cuda' is none of {names}"):
        api.paged_attention(layer=0, implementation="cuda", **args)


def test_a_layer_beyond_the_cache_is_refused():
    args = tiny_args(tiny(BATCHES["decode only"]))
    with pytest.raises(ValueError, match=r"layer=3 is not in \[0, 3\)"):
        api.paged_attention(layer=3, **args)


def test_heads_that_do_not_divide_are_refused():
    args = tiny_args(tiny(BATCHES["decode only"], num_heads=3))
    with pytest.raises(ValueError, match="H=3 query heads are no multiple of K=2"):
        api.paged_attention(layer=0, **args)


@pytest.mark.parametrize("only", [None, "decode"])
def test_others_are_refused_where_they_are_wanted(only):
    args = tiny_args(tiny(BATCHES["decode only"]))
    with pytest.raises(ValueError, match=f"not of only={only!r}"):
        api.paged_attention(layer=0, only=only, others=args["q"], **args)


@pytest.mark.parametrize("sm_scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_turns_the_order_of_scores_is_refused(sm_scale):
    args = tiny_args(tiny(BATCHES["decode only"]))
    with pytest.raises(ValueError, match=f"sm_scale={sm_scale} must be positive"):
        api.paged_attention(layer=0, sm_scale=sm_scale, **args)


@needs_numba
def test_a_kernel_whose_machine_code_would_not_be_found_again_is_refused():
    """One that closes over a compiled function, which is another one in each process."""
    import numba

    from pallas_kernels import numba_ffi

    @numba.njit
    def one():
        return 1

    @numba.cfunc(numba_ffi.Describe)
    def describe(frame_at, job_at):
        return one()

    with pytest.raises(TypeError, match=r"a_target: describe closes over .*one.*, not an integer"):
        numba_ffi.register("a_target", lambda sources: (describe, describe), num_words=1)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(xla.Config)])
def test_an_empty_tile_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        xla.Config(**{field: 0})


@needs_numba
@pytest.mark.parametrize("convert", [dict, as_bits])
def test_none_is_numba_where_it_can_run(convert):
    args = convert(tiny_args(tiny(BATCHES["decode then prefill"])))
    assert numba_calls(args) == 1
    np.testing.assert_array_equal(attend(args, None), attend(args, "numba"))


def numba_calls(args: dict) -> int:
    """Calls of numba's code in the program that None makes of `args`."""
    call = jax.jit(lambda args: api.paged_attention(layer=LAYER, **args))
    return call.lower(args).as_text().count("custom_call @paged_attention_")


def test_none_is_xla_where_numba_cannot_read_the_pages():
    args = tiny_args(tiny(BATCHES["decode then prefill"]), kv_dtype=jnp.bfloat16)
    assert numba_calls(args) == 0
    np.testing.assert_array_equal(attend(args, None), attend(args, "xla"))


def test_none_is_xla_where_numba_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = tiny_args(tiny(BATCHES["decode only"]))
    assert numba_calls(args) == 0
    with pytest.raises(NotImplementedError, match="'numba' needs the package numba, which is not installed"):
        api.paged_attention(layer=LAYER, implementation="numba", **args)


def test_none_is_xla_on_other_platforms(monkeypatch):
    args = tiny_args(tiny(BATCHES["decode only"]))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert numba_calls(args) == 0
    with pytest.raises(NotImplementedError, match="'numba' runs on 'cpu', not on 'gpu'"):
        api.paged_attention(layer=LAYER, implementation="numba", **args)


@needs_numba
def test_pages_that_numba_cannot_read_are_refused():
    args = tiny_args(tiny(BATCHES["decode only"]), kv_dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"not in \('bfloat16', 'bfloat16'\)"):
        api.paged_attention(layer=LAYER, implementation="numba", **args)


def poisoned(spec: ArgSpec, args: dict) -> dict:
    """Not a number wherever no token of the batch lies."""
    table, pages = (
        np.asarray(args["page_indices"]),
        {name: np.asarray(args[name]).copy() for name in ("k_pages", "v_pages")},
    )
    is_free = np.ones((pages["k_pages"].shape[1], spec.page_size), bool)
    for row, kv_len in enumerate(spec.kv_lens):
        for s in range(kv_len):
            is_free[table[row, s // spec.page_size], s % spec.page_size] = False
    for values in pages.values():
        values.swapaxes(2, 3)[:, is_free] = 0x7FC0  # of bfloat16
    return {**args, **{name: jnp.asarray(values) for name, values in pages.items()}}


@pytest.mark.skipif(not cpu_has_amx(), reason="needs a CPU with AMX")
class TestOnTheMatrixUnit:
    @pytest.mark.parametrize(
        "shape",
        [(6, 2, 64, 16), (4, 4, 64, 32), (4, 2, 128, 64), (7, 1, 64, 16), (16, 1, 64, 16), (17, 1, 64, 16)],
        ids=str,
    )
    @pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_nothing_but_what_is_in_sight_counts(self, batch, shape, dtype):
        spec = tiny(batch, **dict(zip(("num_heads", "num_kv_heads", "head_dim", "page_size"), shape, strict=True)))
        args = as_bits(tiny_args(spec, dtype))
        truth = attend(in_float32(args), "reference")
        out = attend(poisoned(spec, args), "numba")
        if dtype == jnp.bfloat16:  # 16 bits of each weight: few results are rounded the other way
            assert np.mean(np.asarray(out != truth.astype(dtype))) <= 0.02
        assert error(out, truth) <= (4e-6 if dtype == jnp.float32 else 0.02)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_a_token_does_not_depend_on_its_chunk(self, dtype):
        shape = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64}
        whole = as_bits(tiny_args(tiny(((1, 40), (150, 290)), **shape), dtype))
        out = np.asarray(attend(whole, "numba"))[1:151]
        for first, stop in ((0, 2), (0, 70), (70, 150), (5, 38)):
            part = tiny(((1, 40), (stop - first, 290 - 150 + stop)), **shape)
            args = {
                **as_bits(tiny_args(part, dtype)),
                **{name: whole[name] for name in ("k_pages", "v_pages", "page_indices")},
            }
            args["q"] = args["q"].at[1 : 1 + stop - first].set(whole["q"][1 + first : 1 + stop])
            np.testing.assert_array_equal(attend(args, "numba")[1 : 1 + stop - first], out[first:stop])

    @pytest.mark.parametrize(
        ("dtype", "head_dim", "page_size", "reason"),
        [("float32", 64, 16, "pages are float32"), ("uint16", 48, 16, "head_dim=48"), ("uint16", 64, 8, "page_size=8")],
    )
    def test_what_it_cannot_do_is_said(self, dtype, head_dim, page_size, reason):
        from pallas_kernels.paged_attention import numba_chunks

        assert reason in str(numba_chunks.why_not(dtype, head_dim, page_size))
        assert numba_chunks.why_not("uint16", 64, 16) is None
