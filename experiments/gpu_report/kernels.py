"""Is every kernel right on this device?  Each implementation on fresh random inputs at real shapes, against float32.

The law is that of the tests: an implementation's largest error is at most twice that of the plain one in the same dtype.
Before each call a buffer of the result's size full of NaN is freed, which the allocator hands out next: what a kernel does
not write is seen.  Pages that no result may depend on hold NaN as well (`jobs.attention_args`).
"""

from collections.abc import Callable
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
from nanojax import hardware
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.arg_specs import ArgSpec

NUM_LAYERS, LAYER = 2, 1
MAX_ERROR_RATIO = 2.0


def cases(setting: Setting) -> list[Case]:
    """Attention by batch and implementation, products by shape and implementation, pairs by form."""
    small = setting.is_smoke
    specs = mixed_specs(True) if small else [*decode_specs(False), *mixed_specs(False), *prefill_specs(False)]
    found = [
        Case(f"{name} {spec.name}", lambda spec=spec, name=name: [_check_attention(spec, name, setting)])
        for name in forms.attention_names(small)
        for spec in specs
    ]
    found += [
        Case(
            f"{name} {product.name}-{product.num_tokens}",
            lambda p=product, name=name, f=call: [_check_product(p, name, f, setting)],
        )
        for product in products(small, (128, 1024))
        for name, call in forms.matmuls(small).items()
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


def _check_attention(spec: ArgSpec, name: str, setting: Setting) -> Row:
    args = jax.block_until_ready(jax.jit(lambda: _attention_args(spec, setting.seed))())
    attend = jax.jit(forms.attention(name, LAYER))
    row = _errors(attend, jax.jit(_plain_attention), jax.jit(_exact_attention), args)
    padding = attend(*args)[sum(spec.q_lens) :]
    row["num_padding_not_zero"] = int(jnp.sum(padding != 0))
    row["is_ok"] = bool(row["is_ok"] and row["num_padding_not_zero"] == 0)
    return {**attention_columns(spec), "kernel": "paged_attention", "implementation": name, **row}


def _check_product(product: Product, name: str, call: Callable[..., Any], setting: Setting) -> Row:
    args = jax.block_until_ready(jax.jit(lambda: _product_args(product, setting.seed))())
    row = _errors(jax.jit(call), jax.jit(jnp.dot), jax.jit(_exact_product), args)
    return {**product.columns, "kernel": "matmul", "implementation": name, **row}


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
    both = jax.jit(pair)
    checks = {
        "product": (0, lambda x, w, *rest: jnp.dot(x, w), lambda x, w, *rest: _exact_product(x, w)),
        "attention": (1, lambda x, w, *rest: _plain_attention(*rest), lambda x, w, *rest: _exact_attention(*rest)),
    }
    return [
        {
            "job": f"{product.name}-{product.num_tokens} | {spec.name}", "kernel": f"pair, {what}", "implementation": name,
            **_errors(lambda *a, i=i: both(*a)[i], jax.jit(plain), jax.jit(exact), args),
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


def _errors(call: Callable[..., Any], plain: Callable[..., Any], exact: Callable[..., Any], args: tuple) -> Row:
    """Largest absolute errors against `exact`, and whether that of `call` keeps the law; two runs must agree to the bit."""
    truth = exact(*args)
    plain_error = _largest(plain(*args), truth)
    call(*args)  # compiled, and whatever it allocates the first time is there
    found = _poisoned(call, args)
    again = _poisoned(call, args)
    error = _largest(found, truth)
    num_nan = int(jnp.sum(~jnp.isfinite(found.astype(jnp.float32))))
    return {
        "max_error": error,
        "plain_max_error": plain_error,
        "error_ratio": error / plain_error if plain_error else None,
        "num_not_finite": num_nan,
        "is_deterministic": bool(jnp.array_equal(found, again)),
        "is_ok": bool(num_nan == 0 and error <= MAX_ERROR_RATIO * max(plain_error, 1e-6)),
    }


def _poisoned(call: Callable[..., Any], args: tuple) -> jax.Array:
    """The result of a call whose output buffer, most likely, held NaN before."""
    shape = jax.eval_shape(call, *args)
    poison = jax.block_until_ready(jnp.full(shape.shape, jnp.nan, shape.dtype))
    poison.delete()
    return jax.block_until_ready(call(*args))


def _largest(found: jax.Array, truth: jax.Array) -> float:
    return float(jnp.max(jnp.abs(found.astype(jnp.float32) - truth)))
