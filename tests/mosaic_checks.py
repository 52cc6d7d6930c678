"""What is checked of each Mosaic kernel of paged attention: numbers and races in JAX's interpreter, what it compiles to."""

import contextlib
import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from experiments import compiled_code
from pallas_kernels.paged_attention import api, arg_specs, mosaic_gpu
from pallas_kernels.paged_attention.arg_specs import ArgSpec, make_args

LAYER, NUM_LAYERS = 1, 2
INTERPRET = InterpretGPUParams(detect_races=True, out_of_bounds_reads="raise")
SPECS = {spec.name: spec for spec in arg_specs.GPU_SPECS}
needs_plugin = pytest.mark.skipif(compiled_code.why_not() is not None, reason=str(compiled_code.why_not()))


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


def interpreted(attend, args, config):
    """The kernels' result in the interpreter."""
    scale = args["q"].shape[-1] ** -0.5
    run = functools.partial(attend, **args, layer=LAYER, sm_scale=scale, config=config, interpret=INTERPRET)
    return without_races(run).astype(np.float32)


def reference(args):
    return np.asarray(api.paged_attention(layer=LAYER, implementation="reference", **args), np.float32)


def assert_close(case, attend, config, left_out=(), is_checked=slice(None)):
    """`attend` of the case's arguments but `left_out` is as near to the result in float32 as the reference is."""
    num_heads, num_kv_heads, head_dim, page_size, dtype, rows = case
    q_lens, kv_lens = zip(*rows, strict=True)
    num_tokens = sum(q_lens) + 3
    spec = ArgSpec("tiny", num_heads, num_kv_heads, head_dim, page_size, num_tokens, len(rows), 192, q_lens, kv_lens)
    args = poisoned(spec, dtype)
    in_float32 = {
        name: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for name, x in args.items()
    }
    truth = reference(in_float32)
    out = interpreted(attend, {name: x for name, x in args.items() if name not in left_out}, config)
    error = np.abs(out[is_checked] - truth[is_checked]).max()
    assert error <= 2 * np.abs(reference(args) - truth).max()


def name_of(case):
    return f"H{case[0]} K{case[1]} h{case[2]} p{case[3]}"


def compiled_for_h200(attend, spec, page_size=16, dtype=jnp.bfloat16, left_out=(), config=None):
    """The program's Mosaic kernels, checked for what all of them promise, and its temporary memory."""
    spec = dataclasses.replace(spec, page_size=page_size)
    shapes = arg_specs.arg_shapes(spec, dtype, num_layers=32, num_pages=4096)
    shapes = {name: x for name, x in shapes.items() if name not in left_out}
    gpu = compiled_code.target("h200")
    code = compiled_code.compile_for(
        gpu, lambda args: attend(**args, layer=3, sm_scale=0.1, config=config or mosaic_gpu.Config()), (shapes,)
    )
    kernels = [kernel for kernel in code.kernels if kernel.compiler == "mosaic"]
    for kernel in kernels:
        assert kernel.spill_bytes == 0
        assert gpu.blocks_per_core(kernel) >= 1
    assert gpu.number("core_count") in [kernel.num_blocks for kernel in kernels]
    assert code.temp_bytes < shapes["k_pages"].size * 2 // 8, "a layer of the cache is copied"
    return kernels
