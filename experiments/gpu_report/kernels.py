"""Is every kernel right on this device?  Each implementation on fresh random inputs at real shapes, against float32.

The law is that of the tests: an implementation's largest error is at most twice that of the plain one in the same dtype.
Before each call a buffer of the result's size full of NaN is freed, which the allocator hands out next: what a kernel does
not write is seen.  Pages that no result may depend on hold NaN as well (`jobs.attention_args`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.gpu_report import forms
from experiments.gpu_report.cases import Case, Row, Setting
from experiments.gpu_report.jobs import (
    Product,
    attention_args,
    attention_columns,
    decode_specs,
    mixed_specs,
    prefill_specs,
    products,
)
from experiments.gpu_report.programs import ERROR_CHARACTERS, compile_together
from nanojax import hardware
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.arg_specs import ArgSpec

NUM_LAYERS, LAYER = 2, 1
MAX_ERROR_RATIO = 2.0


def cases(setting: Setting) -> list[Case]:
    """A case for each batch of attention, each product and each form of a pair, with all implementations of it."""
    small = setting.is_smoke
    specs = mixed_specs(True) if small else [*mixed_specs(False), *decode_specs(False), *prefill_specs(False)]
    found = [Case(spec.name, lambda spec=spec: _check_attention(spec, setting)) for spec in specs]
    found += [
        Case(f"{product.name}-{product.num_tokens}", lambda product=product: _check_product(product, setting))
        for product in products(small, (128, 1024))
    ]
    found += [
        Case(f"pair {name}", lambda name=name, make=make: _check_pair(name, make, setting))
        for name, make in forms.pairs(small).items()
    ]
    return found


def _attention_args(spec: ArgSpec, seed: int) -> tuple:
    return attention_args(spec, seed=seed, num_layers=NUM_LAYERS)


def _product_args(product: Product, seed: int) -> tuple:
    x, (weight,) = product.args(seed, num_weights=1)
    return x, weight


def _check_attention(spec: ArgSpec, setting: Setting) -> list[Row]:
    """Errors of each implementation; and the tokens that belong to no row must be zero."""
    args = jax.block_until_ready(jax.jit(lambda: _attention_args(spec, setting.seed))())
    calls = {name: forms.attention(name, LAYER) for name in forms.attention_names(setting.is_smoke)}
    rows = _errors(calls, _plain_attention, _exact_attention, args, num_used=sum(spec.q_lens))
    columns = {**attention_columns(spec), "kernel": "paged_attention"}
    return [{**columns, "implementation": name, **row} for name, row in rows.items()]


def _check_product(product: Product, setting: Setting) -> list[Row]:
    args = jax.block_until_ready(jax.jit(lambda: _product_args(product, setting.seed))())
    rows = _errors(forms.matmuls(setting.is_smoke), jnp.dot, _exact_product, args)
    return [{**product.columns, "kernel": "matmul", "implementation": name, **row} for name, row in rows.items()]


def _check_pair(name: str, make: Callable[..., Any], setting: Setting) -> list[Row]:
    """Both results of a matmul and decode attention side by side."""
    product = next(p for p in products(setting.is_smoke, (1024,)) if p.name == "UG")
    spec = decode_specs(setting.is_smoke)[0]
    num_cores = max(hardware.detect().num_cores, 4)
    num_matmul = round(0.6 * num_cores)
    pair = make(num_matmul, num_cores - num_matmul)(LAYER)
    args = jax.block_until_ready(
        jax.jit(lambda: (*_product_args(product, setting.seed), *_attention_args(spec, setting.seed)))()
    )
    checks = {
        "product": (0, lambda x, w, *rest: jnp.dot(x, w), lambda x, w, *rest: _exact_product(x, w)),
        "attention": (1, lambda x, w, *rest: _plain_attention(*rest), lambda x, w, *rest: _exact_attention(*rest)),
    }
    return [
        {
            "job": f"{product.name}-{product.num_tokens} | {spec.name}", "kernel": f"pair, {what}", "implementation": name,
            **_errors({name: lambda *a, i=i: pair(*a)[i]}, plain, exact, args)[name],
        }
        for what, (i, plain, exact) in checks.items()
    ]  # fmt: skip


def _plain_attention(q, k, v, *rest: Any) -> jax.Array:
    return paged_attention(q, k, v, LAYER, *rest, implementation="reference")


def _exact_attention(q, k, v, *rest) -> jax.Array:
    """In float32, all layers but one left out."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k[LAYER:][:1], v[LAYER:][:1]))
    return paged_attention(q, k, v, 0, *rest, implementation="reference")


def _exact_product(x, w) -> jax.Array:
    return jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _errors(
    calls: Mapping[str, Callable[..., Any]], plain: Callable[..., Any], exact: Callable[..., Any], args: tuple, *,
    num_used: int | None = None,
) -> dict[str, Row]:  # fmt: skip
    """By name the largest absolute errors against `exact`, and whether those keep the law; two runs must agree to the bit.

    Tokens from `num_used` on must be zero.  A row whose implementation does not run here has an `error`.
    """
    *compiled, plain_call, exact_call = compile_together([*calls.values(), plain, exact], args)
    for call in (plain_call, exact_call):
        if isinstance(call, BaseException):
            raise call
    truth = exact_call(*args)
    plain_error = _largest(plain_call(*args), truth)
    rows = {}
    for name, call in zip(calls, compiled, strict=True):
        if isinstance(call, BaseException):
            rows[name] = {"is_ok": False, "error": f"{type(call).__name__}: {call}"[:ERROR_CHARACTERS]}
            continue
        call(*args)  # whatever it allocates the first time is there
        found, again = _poisoned(call, args), _poisoned(call, args)
        error = _largest(found, truth)
        num_nan = int(jnp.sum(~jnp.isfinite(found.astype(jnp.float32))))
        num_padding = 0 if num_used is None else int(jnp.sum(found[num_used:] != 0))
        rows[name] = {
            "max_error": error,
            "plain_max_error": plain_error,
            "error_ratio": error / plain_error if plain_error else None,
            "num_not_finite": num_nan,
            "num_padding_not_zero": num_padding,
            "is_deterministic": bool(jnp.array_equal(found, again)),
            "is_ok": num_nan == num_padding == 0 and error <= MAX_ERROR_RATIO * max(plain_error, 1e-6),
        }
    return rows


def _poisoned(call: Any, args: tuple) -> jax.Array:
    """The result of a compiled call whose output buffer, most likely, held NaN before."""
    shape = call.out_info
    poison = jax.block_until_ready(jnp.full(shape.shape, jnp.nan, shape.dtype))
    poison.delete()
    return jax.block_until_ready(call(*args))


def _largest(found: jax.Array, truth: jax.Array) -> float:
    return float(jnp.max(jnp.abs(found.astype(jnp.float32) - truth)))
