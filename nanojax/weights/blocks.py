"""Which kernels stay in the few bits that their file has them in?  Dense ones, on a CPU with AMX.

They are multiplied as if they had been rounded to bfloat16 at rest, to the last bit; but a step of few tokens takes as long as
reading the weights takes, and those are a third of the bytes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nanojax.array_types import Array, Params
from nanojax.config import ModelConfig
from nanojax.weights.checkpoint import Checkpoint, flatten, fused, unflatten
from pallas_kernels.matmul import blocks_shape, pack_blocks, takes_blocks

_SOURCES = {"qkv.kernel": "q k v", "out.kernel": "out", "ffn.gate_up": "gate up", "ffn.down": "down"}
_NUM_AXES = {"out.kernel": 3}
"""Axes of a kernel that are the rows of its matrix, where there are several."""


def kept_bits(checkpoint: Checkpoint, abstract: Params) -> dict[str, int]:
    """Names of the bfloat16 parameters that stay as they are in the file -> bits of a weight.

    abstract: the parameters as the model expects them.
    """
    config, flat, kept = checkpoint.config, flatten(abstract), {}
    if not config.num_experts:
        for i in range(config.num_layers):
            for kernel, sources in _SOURCES.items():
                name = f"layers.{i}.{kernel}"
                bits = {checkpoint.bits.get(f"layers.{i}.{source}", 0) for source in sources.split()}
                if len(bits) == 1 and _suits(name, flat[name]):
                    kept[name] = bits.pop()
    if _suits("head.table", _head(config, flat["embed.table"].dtype)):
        kept["head.table"] = checkpoint.bits.get(_head_source(config), 0)
    return {name: bits for name, bits in kept.items() if bits}


def abstract_kept(config: ModelConfig, abstract: Params, kept: dict[str, int]) -> Params:
    """`abstract` with what is kept in its place; a head that was tied is a parameter of its own then."""
    flat = flatten(abstract)
    for name, bits in kept.items():
        whole = _head(config, jnp.bfloat16) if name == "head.table" else flat[name]
        flat[name] = blocks_shape(whole.shape, _axes(name), bits)
    return unflatten(flat)


def readers(checkpoint: Checkpoint, kept: dict[str, int]) -> dict[str, Callable[[], Array]]:
    """Name of each kept parameter -> what reads it."""
    return {name: functools.partial(_read, checkpoint, name, bits) for name, bits in kept.items()}


def _read(checkpoint: Checkpoint, name: str, bits: int) -> Array:
    config = checkpoint.config
    if name == "head.table":
        parts = checkpoint.read_blocks(_head_source(config))
    else:
        layer, kernel = name.split(".", 2)[1:]
        read = functools.cache(lambda source: checkpoint.read_blocks(f"layers.{layer}.{source}"))
        parts = [fused(config, lambda source, field=field: read(source)[field])[kernel]() for field in range(3)]
    codes, scale, least = (np.ascontiguousarray(np.moveaxis(part, -1, 0)) for part in parts)
    if name.endswith("out.kernel"):
        codes = codes.reshape(config.num_kv_heads, -1, config.head_dim, config.d_model)
    return pack_blocks(codes, scale, least, _axes(name), bits)


def _axes(name: str) -> int:
    return _NUM_AXES.get(name.split(".", 2)[-1], 1)


def _suits(name: str, kernel: jax.ShapeDtypeStruct) -> bool:
    return kernel.dtype == jnp.bfloat16 and takes_blocks(kernel.shape, _axes(name))


def _head(config: ModelConfig, dtype) -> jax.ShapeDtypeStruct:
    """As the kernel of a product, [D, V]."""
    return jax.ShapeDtypeStruct((config.d_model, config.vocab_size), dtype)


def _head_source(config: ModelConfig) -> str:
    return "embed" if config.tied_head else "head"
