"""Which kernels are there to be measured?  The one place where the report meets the names of implementations."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from nanojax import hardware
from nanojax.pipeline import streams
from pallas_kernels.matmul import matmul
from pallas_kernels.paged_attention import paged_attention

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


def num_cores() -> int:
    """Multiprocessors of the device that is traced for: the abstract one where there is one, else the one here."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return hardware.detect().num_cores if abstract is None else abstract.num_cores


def matmuls(is_smoke: bool) -> Mapping[str, Callable[..., jax.Array]]:
    """Products `f(x, weight)` of bfloat16 with a bfloat16 result, on the whole device, but for XLA's own."""
    if is_smoke:
        return {"matmul api": lambda x, w: matmul(x, w).astype(x.dtype)}
    return {"mosaic_gpu": lambda x, w: _mosaic_matmul(num_cores())(x, w)}


def each(product: Callable[[Any, Any], Any]) -> Callable[[Any, list[Any]], list[Any]]:
    """One product for each weight of a list."""
    return lambda x, weights: [product(x, weight) for weight in weights]


def xla_dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """cuBLAS, as XLA calls it."""
    return jnp.dot(x, weight)


def capped_matmuls(is_smoke: bool) -> Mapping[str, Callable[[int], Callable[..., jax.Array]]]:
    """Name -> (number of CTAs -> product), of products whose grid can be capped."""
    if is_smoke:
        return {"any": lambda num_ctas: xla_dot}
    return {"mosaic_gpu": _mosaic_matmul, "jax hopper_matmul": _hopper_matmul}


def capped_attention(is_smoke: bool) -> Mapping[str, Callable[[int], Callable[[int], Callable[..., jax.Array]]]]:
    """Name -> (number of CTAs -> (layer -> decode attention)), likewise."""
    if is_smoke:
        return {"any": lambda num_ctas: lambda layer: attention("reference", layer)}
    return {}


def pairs(is_smoke: bool) -> Mapping[str, Callable[[int, int], Callable[[int], Callable[..., Any]]]]:
    """Form -> (CTAs of the matmul, CTAs of attention -> (layer -> f(x, weight, q, ...) -> (product, attended)))."""
    return {"two streams, nothing capped": _on_two_streams(is_smoke)}


def _on_two_streams(is_smoke: bool) -> Callable[[int, int], Callable[[int], Callable[..., Any]]]:
    name = attention_names(is_smoke)[0]

    def pair(num_matmul_ctas: int, num_attention_ctas: int) -> Callable[[int], Callable[..., Any]]:
        del num_matmul_ctas, num_attention_ctas
        return lambda layer: (
            lambda x, w, *rest: jax.lax.optimization_barrier(
                (streams.launch(0, xla_dot, x, w), streams.launch(1, attention(name, layer), *rest, has_loops=True))
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
