"""Which kernels are there to be measured?  The one place where the report meets the names of implementations."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import compute_on
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.matmul import matmul
from pallas_kernels.paged_attention import paged_attention

# jax 0.11 gave the newer function the older one's name.
_annotate: Callable[..., Any] = getattr(compute_on, "compute_on2", None) or compute_on.compute_on

FORMS = ("sm_exclusive", "capped_grid", "fused")
"""Forms of `pallas_kernels.overlap`, which loads slowly: only where it is used."""
GPU_ATTENTION = ("mosaic_gpu", "triton", "xla")
CPU_ATTENTION = ("reference",)


def attention_names(is_smoke: bool) -> tuple[str, ...]:
    """Implementations of `paged_attention`; in a smoke run one that compiles fast on a CPU."""
    return CPU_ATTENTION if is_smoke and jax.default_backend() == "cpu" else GPU_ATTENTION


def attention(name: str, layer: int) -> Callable[..., jax.Array]:
    """`f(q, k_pages, v_pages, kv_lens, page_indices, cu_q_lens, num_decode)` in one layer of the cache."""

    def attend(q, k_pages, v_pages, *rest):
        return paged_attention(q, k_pages, v_pages, layer, *rest, implementation=name).astype(q.dtype)

    return attend


def attention_in_layers(name: str, num_layers: int) -> Callable[..., jax.Array]:
    """The same in one layer after the other."""
    return in_layers(lambda layer: attention(name, layer), num_layers)


def in_layers(make: Callable[[int], Callable[..., jax.Array]], num_layers: int) -> Callable[..., jax.Array]:
    """`make(layer)` in one layer after the other, each result being the next query: in order, and none left out."""

    def attend(q, *rest):
        for layer in range(num_layers):
            q = make(layer)(q, *rest)
        return q

    return attend


def matmuls(is_smoke: bool) -> Mapping[str, Callable[..., jax.Array]]:
    """Products `f(x, weight)` of bfloat16 with a bfloat16 result, on the whole device, but for XLA's own."""
    if is_smoke:
        return {"matmul api": lambda x, w: matmul(x, w).astype(x.dtype)}
    return {"mosaic_gpu": lambda x, w: _mosaic_matmul(num_multiprocessors())(x, w)}


def each(product: Callable[[Any, Any], Any]) -> Callable[[Any, list[Any]], list[Any]]:
    """One product for each weight of a list."""
    return lambda x, weights: [product(x, weight) for weight in weights]


def xla_dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """cuBLAS, as XLA calls it."""
    return jax.lax.dot(x, weight)  # jnp.dot is a nested jit, which a stream call does not bear


def on_stream(stream: int, operation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`operation`, one array as its result and no jit in it, on a computation stream of its own."""
    return _annotate(operation, compute_type=f"gpu_stream:{stream}", out_memory_spaces=jax.memory.Space.Device)


def capped_matmuls(is_smoke: bool) -> Mapping[str, Callable[[int], Callable[..., jax.Array]]]:
    """Name -> (number of CTAs -> product), of products whose grid can be capped."""
    if is_smoke:
        return {"any": lambda num_ctas: xla_dot}
    return {"mosaic_gpu": _mosaic_matmul, "jax hopper_matmul": _hopper_matmul}


def capped_attention(is_smoke: bool) -> Mapping[str, Callable[[int], Callable[[int], Callable[..., jax.Array]]]]:
    """Name -> (number of multiprocessors -> (layer -> decode attention)), likewise."""
    if is_smoke:
        return {"any": lambda num_ctas: lambda layer: attention("reference", layer)}
    return {"mosaic decode": _mosaic_decode, "triton": _triton_decode}


def _triton_decode(num_cores: int) -> Callable[[int], Callable[..., jax.Array]]:
    """As many programs as fill so many multiprocessors; where they run is the GPU's choice."""
    from pallas_kernels.paged_attention import triton_gpu

    config = triton_gpu.Config()
    config = dataclasses.replace(config, num_programs=num_cores * config.programs_per_core)

    def in_layer(layer: int) -> Callable[..., jax.Array]:
        def attend(q, k_pages, v_pages, *rest):
            scale = q.shape[-1] ** -0.5
            return triton_gpu.paged_attention(q, k_pages, v_pages, layer, *rest, sm_scale=scale, config=config)

        return attend

    return in_layer


def _mosaic_decode(num_cores: int) -> Callable[[int], Callable[..., jax.Array]]:
    """The decode kernel of the SM-exclusive pair: a fat CTA per multiprocessor."""

    def in_layer(layer: int) -> Callable[..., jax.Array]:
        def attend(q, k_pages, v_pages, kv_lens, page_indices, cu_q_lens, num_decode):
            from pallas_kernels.overlap import decode_on

            del cu_q_lens
            rows = (kv_lens, page_indices, num_decode)
            return decode_on("sm_exclusive", num_cores, q, k_pages, v_pages, layer, *rows)(q)

        return attend

    return in_layer


def pairs(is_smoke: bool) -> Mapping[str, Callable[[int, int], Callable[[int], Callable[..., Any]]]]:
    """Form -> (CTAs of the matmul, CTAs of attention -> (layer -> f(x, weight, q, ...) -> (product, attended)))."""
    if is_smoke:
        return {"two streams": _on_two_streams("reference")}
    ours = {form: _overlap_form(form) for form in FORMS}
    return {
        **ours,
        "capped mosaic | triton": _capped_and_triton,
        "cuBLAS | mosaic decode": _cublas_and_mosaic_decode,
        "cuBLAS | triton, not capped": _on_two_streams("triton"),
    }


def _overlap_form(form: str) -> Callable[[int, int], Callable[[int], Callable[..., Any]]]:
    """A form of `pallas_kernels.overlap`."""

    def pair(num_matmul_ctas: int, num_attention_ctas: int) -> Callable[[int], Callable[..., Any]]:
        def in_layer(layer: int) -> Callable[..., Any]:
            def run(x, weight, q, k_pages, v_pages, kv_lens, page_indices, cu_q_lens, num_decode):
                from pallas_kernels.overlap import Split, matmul_and_decode_attention

                del cu_q_lens
                split = Split(num_matmul_ctas, num_attention_ctas)
                return matmul_and_decode_attention(
                    x, weight, None, q, k_pages, v_pages, layer, kv_lens, page_indices, num_decode, form=form,
                    share=split, out_dtype=x.dtype,
                )  # fmt: skip

            return run

        return in_layer

    return pair


def _capped_and_triton(num_matmul_ctas: int, num_attention_ctas: int) -> Callable[[int], Callable[..., Any]]:
    """The persistent matmul, and Triton's attention with few programs."""

    def in_layer(layer: int) -> Callable[..., Any]:
        product, attend = _mosaic_matmul(num_matmul_ctas), _triton_decode(num_attention_ctas)(layer)
        return lambda x, w, *rest: jax.lax.optimization_barrier(
            (on_stream(1, product)(x, w), on_stream(2, attend)(*rest))
        )

    return in_layer


def _cublas_and_mosaic_decode(num_matmul_ctas: int, num_attention_ctas: int) -> Callable[[int], Callable[..., Any]]:
    """Attention in CTAs that have a multiprocessor each, and cuBLAS, which finds the others."""
    del num_matmul_ctas

    def in_layer(layer: int) -> Callable[..., Any]:
        def run(x, weight, q, k_pages, v_pages, kv_lens, page_indices, cu_q_lens, num_decode):
            from pallas_kernels.overlap import decode_on

            del cu_q_lens
            attend = decode_on(
                "sm_exclusive", num_attention_ctas, q, k_pages, v_pages, layer, kv_lens, page_indices, num_decode
            )
            return jax.lax.optimization_barrier((on_stream(1, xla_dot)(x, weight), on_stream(2, attend)(q)))

        return run

    return in_layer


def _on_two_streams(name: str) -> Callable[[int, int], Callable[[int], Callable[..., Any]]]:
    """XLA's matmul and an attention side by side without any room made."""

    def pair(num_matmul_ctas: int, num_attention_ctas: int) -> Callable[[int], Callable[..., Any]]:
        del num_matmul_ctas, num_attention_ctas
        return lambda layer: (
            lambda x, w, *rest: jax.lax.optimization_barrier(
                (on_stream(1, xla_dot)(x, w), on_stream(2, attention(name, layer))(*rest))
            )
        )

    return pair


def _mosaic_matmul(num_ctas: int) -> Callable[..., jax.Array]:
    from pallas_kernels.matmul import mosaic_gpu  # takes a second: only where it is used

    return lambda x, weight: mosaic_gpu.matmul(x, weight, num_ctas=num_ctas, out_dtype=x.dtype)


def _hopper_matmul(num_ctas: int) -> Callable[..., jax.Array]:
    """JAX's own example kernel, which takes its grid from the abstract device's number of cores."""
    from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu

    config = hopper_matmul_mgpu.TuningConfig(tile_m=128, tile_n=128, tile_k=64, max_concurrent_steps=4)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=num_ctas, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)

    def multiply(x, weight):
        with jax.sharding.use_abstract_mesh(mesh):
            return hopper_matmul_mgpu.matmul(x, weight, None, config=config)

    return multiply
