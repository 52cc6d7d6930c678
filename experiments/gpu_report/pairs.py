"""What do a matmul and decode attention take side by side, in each form and division of the multiprocessors?

The matmul is UG's of one nano-batch, the attention that of the other: about the same time each, as in the pipeline for one
device.  A row has T(pair) / (T1 + T2) and T(pair) / max(T1, T2); T1 is the fastest matmul alone on the whole device (cuBLAS
among them), T2 the fastest attention.  Then the proof that the two run at the same time: a profiler's trace of the real
kernels, and `placement`, two kernels of their shape that do nothing but note by `%smid` and `%globaltimer` where and when.
"""

import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu_report import forms
from experiments.gpu_report.cases import Case, Row, Setting
from experiments.gpu_report.jobs import attention_args, decode_spec, num_inner, products, small
from experiments.gpu_report.programs import Comparison, compile_program, measure, options_here
from experiments.gpu_report.trace_times import read_trace, seconds_by_depth
from nanojax import hardware
from nanojax.pipeline.compiler_options import Graphs

MATMUL_SHARES = (0.5, 0.6, 0.7, 0.8)
NOT_CAPPED = "not capped"
"""In the name of a form to which numbers of CTAs mean nothing."""
PROBE_SMEM_BYTES, PROBE_NS = (229_376, 196_608), 300_000
"""Shared memory like that of a matmul's CTA and of an attention kernel's: no two fit on one multiprocessor of Hopper."""


def cases(setting: Setting) -> list[Case]:
    """One comparison in a few cases, so that a form that fails leaves the others; then the probe."""
    num_cores = max(hardware.detect().num_cores, 4)
    found = [
        Case(one.name, lambda one=one: _with_ratios(measure(one, setting)), needs_s=6.0, limit_s=150)
        for one in comparisons(setting.is_smoke, num_cores)
    ]
    found += [
        Case(f"trace of {one.name}", lambda one=one: [_trace(one, setting)], needs_s=6.0)
        for one in comparisons(setting.is_smoke, num_cores)
    ]
    if setting.is_smoke and jax.default_backend() == "cpu":
        return found
    return [*found, Case("placement", lambda: _placement(num_cores), needs_s=6.0)]


def comparisons(is_smoke: bool, num_cores: int) -> list[Comparison]:
    """One comparison per form, each with both operations alone and one after the other beside it."""
    inner = num_inner(is_smoke)
    product = next(p for p in products(is_smoke, (1024,)) if p.name == "UG")
    spec = small(decode_spec(64, 64)) if is_smoke else decode_spec(384, 1024)

    def args() -> tuple:
        return (*product.args(num_weights=inner), *attention_args(spec, num_layers=inner))

    found = []
    for name, make in forms.pairs(is_smoke).items():
        programs: dict[str, Callable[..., Any]] = _alone(is_smoke)
        columns: dict[str, Row] = {}
        for n in sorted(
            {
                round(share * num_cores)
                for share in (MATMUL_SHARES[:1] if is_smoke or NOT_CAPPED in name else MATMUL_SHARES)
            }
        ):
            label = f"{name} {n}+{num_cores - n}"
            programs[label] = pairs_in_a_row(make(n, num_cores - n))
            columns[label] = {"form": name, "num_matmul_ctas": n, "num_attention_ctas": num_cores - n}
        found.append(
            Comparison(
                name,
                args,
                programs,
                flops=product.flops + spec.flops(),
                num_bytes=product.num_bytes + spec.kv_bytes(jnp.bfloat16),
                num_inner=inner,
                columns={"job": f"{product.name}-{product.num_tokens} | {spec.name}"},
                program_columns=columns,
                graphs=Graphs.NO,
            )
        )
    return found


def _alone(is_smoke: bool) -> dict[str, Callable[..., Any]]:
    """Each operation alone on the whole device, and both in turn."""
    found: dict[str, Callable[..., Any]] = {"matmul alone: xla": lambda x, ws, *_: forms.each(forms.xla_dot)(x, ws)}
    for name in forms.attention_names(is_smoke):
        if name != "xla":
            found[f"attention alone: {name}"] = lambda x, ws, *rest, name=name: forms.attention_in_layers(
                name, len(ws)
            )(*rest)
            found[f"in turn: {name}"] = pairs_in_a_row(_in_turn(name))
    return found


def _in_turn(name: str) -> Callable[..., Any]:
    def pair(layer: int) -> Callable[..., Any]:
        attend = forms.attention(name, layer)

        def run(x, w, q, *rest):
            y = forms.xla_dot(x, w)
            return y, attend(_after(q, y), *rest)

        return run

    return pair


def pairs_in_a_row(pair: Callable[[int], Callable[..., Any]]) -> Callable[..., Any]:
    """A pair for each weight, each after the one before: its activations and queries need both results.

    All products are results: of one that nobody asks for XLA leaves the product out.
    """

    def run(x, weights, q, *rest):
        products = []
        for layer, weight in enumerate(weights):
            y, attended = pair(layer)(x, weight, q, *rest)
            products.append(y)
            x, q = _after(x, y, attended), _after(attended.astype(q.dtype), y)
        return products, q

    return run


def _after(value: jax.Array, *results: jax.Array) -> jax.Array:
    """`value`, when the results are there: a barrier alone would be gone before kernels are launched."""
    for result in results:
        value = jnp.where(jnp.isinf(result.ravel()[0]), jnp.zeros((), value.dtype), value)
    return value


def _with_ratios(rows: list[Row]) -> list[Row]:
    """Adds the ratios to the rows of pairs."""

    def fastest(what: str) -> float | None:
        return min((r["median_s"] for r in rows if r["program"].startswith(what) and "median_s" in r), default=None)

    matmul_s, attention_s = fastest("matmul alone"), fastest("attention alone")
    if matmul_s is None or attention_s is None:
        return rows
    return [
        row | {"time_over_sum": row["median_s"] / (matmul_s + attention_s), "time_over_max": row["median_s"] / max(matmul_s, attention_s)}
        if "median_s" in row and "alone" not in row["program"]
        else row
        for row in rows
    ]  # fmt: skip


def _trace(comparison: Comparison, setting: Setting) -> Row:
    """Seconds in which two streams were busy at a time, by the profiler, in the first division of the form's."""
    name = next(iter(comparison.program_columns))
    args = jax.block_until_ready(jax.jit(comparison.args)())
    program = compile_program(comparison, name, args)
    jax.block_until_ready(program(*args))
    folder = setting.out / "trace_pairs"
    shutil.rmtree(folder, ignore_errors=True)
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(program(*args))
    depths = seconds_by_depth(read_trace(folder))
    shutil.rmtree(folder, ignore_errors=True)
    both_s = sum(depths[2:]) / comparison.num_inner
    return {"program": f"trace of {name}", "both_s": both_s, "span_s": sum(depths) / comparison.num_inner}


def probe_pair(num_first: int, num_second: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Two kernels that wait and note where they are, on two streams."""
    from pallas_kernels.placement import occupy

    def one(num_ctas: int, smem_bytes: int) -> Callable[[jax.Array], jax.Array]:
        return lambda token: occupy(token, num_ctas=num_ctas, smem_bytes=smem_bytes, spin_ns=PROBE_NS)

    def run(token: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = forms.on_stream(1, one(num_first, PROBE_SMEM_BYTES[0]))(token)
        second = forms.on_stream(2, one(num_second, PROBE_SMEM_BYTES[1]))(token)
        return jax.lax.optimization_barrier((first, second))

    return run


def _placement(num_cores: int) -> list[Row]:
    """Whether the two kernels' blocks ran at the same time, and on different multiprocessors."""
    from pallas_kernels.placement import read_stamps

    rows = []
    for first in (num_cores - num_cores // 3, num_cores // 2):
        program = jax.jit(probe_pair(first, num_cores - first)).lower(jnp.zeros(128, jnp.int32))
        compiled = program.compile(compiler_options=options_here())
        for _ in range(3):  # the last one counts: by then the graph is there
            stamps = jax.block_until_ready(compiled(jnp.zeros(128, jnp.int32)))
        rows.append(co_execution(*(read_stamps(one) for one in stamps)))
    return rows


def co_execution(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> Row:
    """From stamps of two kernels: time in which both ran, and multiprocessors that both used."""
    start_ns = max(one["start_ns"].min(), two["start_ns"].min())
    end_ns = min(one["end_ns"].max(), two["end_ns"].max())
    span_ns = max(one["end_ns"].max(), two["end_ns"].max()) - min(one["start_ns"].min(), two["start_ns"].min())
    shared = np.intersect1d(one["sm"], two["sm"])
    return {
        "program": f"placement {len(one['sm'])}+{len(two['sm'])}",
        "num_matmul_ctas": len(one["sm"]), "num_attention_ctas": len(two["sm"]),
        "num_multiprocessors": len(np.union1d(one["sm"], two["sm"])), "num_shared_multiprocessors": len(shared),
        "both_s": 1e-9 * max(int(end_ns - start_ns), 0), "span_s": 1e-9 * int(span_ns),
    }  # fmt: skip
