"""What is a weight file once it is opened, and how do its separate matrices become the fused parameter tree?

Every file format offers the same view: a `read` function from our names to matrices in the orientation that all
checkpoints share, `[out, in]`, with RoPE already half-split.  The names are

    embed, final_norm, head (untied only),
    layers.{i}.{attn_norm, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, out, ffn_norm},
    layers.{i}.{gate, up, down}                         dense
    layers.{i}.router, layers.{i}.experts.{e}.{gate, up, down}   mixture of experts
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Num

from nanojax.array_types import Array, Params
from nanojax.config import ModelConfig
from nanojax.weights.chat import ChatTemplate
from nanojax.weights.tokenizer import Tokenizer

ReadTensor = Callable[[str], np.ndarray]
"""Our name -> matrix, `[out, in]`, any float dtype."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened, checked weight file whose matrices are not read yet.

    files: every file that the parameters depend on; their contents key the cache.
    tokenizer: None when the source carries none.
    bits: our names of the matrices that the source has in blocks of few bits -> bits of a weight (0: not in blocks);
        `read_blocks` gives those as they are (`gguf_container.Blocks`).
    """

    config: ModelConfig
    files: tuple[Path, ...]
    read: ReadTensor
    tokenizer: Tokenizer | None
    chat: ChatTemplate
    bits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    read_blocks: Callable[[str], Any] = lambda name: None


def source_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of each matrix that a checkpoint of this model holds."""
    width, ffn, head_dim = config.d_model, config.d_ff, config.head_dim
    q_dim, kv_dim = config.num_heads * head_dim, config.num_kv_heads * head_dim
    layer: dict[str, tuple[int, ...]] = {"attn_norm": (width,), "ffn_norm": (width,), "out": (width, q_dim)}
    layer |= {"q": (q_dim, width), "k": (kv_dim, width), "v": (kv_dim, width)}
    if config.qkv_bias:
        layer |= {"q_bias": (q_dim,), "k_bias": (kv_dim,), "v_bias": (kv_dim,)}
    if config.qk_norm:
        layer |= {"q_norm": (head_dim,), "k_norm": (head_dim,)}
    ffn_shapes: dict[str, tuple[int, ...]] = {"gate": (ffn, width), "up": (ffn, width), "down": (width, ffn)}
    if config.num_experts:
        layer["router"] = (config.num_experts, width)
        layer |= {f"experts.{e}.{name}": s for e in range(config.num_experts) for name, s in ffn_shapes.items()}
    else:
        layer |= ffn_shapes
    shapes = {f"layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in layer.items()}
    shapes |= {"embed": (config.vocab_size, width), "final_norm": (width,)}
    return shapes if config.tied_head else shapes | {"head": (config.vocab_size, width)}


def check_tensors(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError for the first missing, wrongly shaped or unknown tensor (names are the file's own)."""
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{path}: tensor {name!r} is missing; expected shape {shape}")
        if tuple(found[name]) != tuple(shape):
            raise ValueError(f"{path}: tensor {name!r} has shape {tuple(found[name])}; expected {tuple(shape)}")
    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} tensors have no place in this architecture, the first is {unknown[0]!r}"
        )


def assemble(
    config: ModelConfig, read: ReadTensor, dtype: DTypeLike, kept: Mapping[str, Callable] | None = None
) -> Params:
    """Reads every matrix and builds the parameter tree: norm scales and biases in float32, all else in `dtype`.

    kept: name of a parameter -> what makes it in another way.

    Layers are built one after the other, so that the host never holds more than one layer beside the result.
    """
    kept = kept or {}
    params: Params = {
        "embed": {"table": jnp.asarray(read("embed"), dtype)},
        "layers": {i: _layer(config, read, dtype, kept, f"layers.{i}.") for i in range(config.num_layers)},
        "final_norm": {"scale": _scale(read("final_norm"))},
    }
    if "head.table" in kept:
        params["head"] = {"table": kept["head.table"]()}
    elif not config.tied_head:
        params["head"] = {"table": jnp.asarray(read("head"), dtype)}
    return params


def check_params(path: Path, params: Params, abstract: Params) -> None:
    """Raises ValueError unless `params` has the names, shapes and dtypes of `abstract`."""
    found, expected = flatten(params), flatten(abstract)
    for name in sorted(found.keys() | expected.keys()):
        have, want = (
            (leaf.shape, jnp.dtype(leaf.dtype).name) if (leaf := tree.get(name)) is not None else None
            for tree in (found, expected)
        )
        if have != want:
            raise ValueError(f"{path}: parameter {name!r} is {have}; the model expects {want}")


def flatten(params: Params, prefix: str = "") -> dict:
    """Tree -> {"layers.0.qkv.kernel": leaf, ...}."""
    flat = {}
    for key, value in params.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def unflatten(flat: Mapping) -> Params:
    """Inverse of `flatten`: names of digits become int keys."""
    params: Params = {}
    for name, leaf in flat.items():
        *parents, last = (int(part) if part.isdigit() else part for part in name.split("."))
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return params


def fused(config: ModelConfig, read: Callable[[str], np.ndarray]) -> dict[str, Callable[[], np.ndarray]]:
    """Name of each dense kernel of a layer -> what makes it of the layer's matrices, `[*out, in]`."""
    return {
        "qkv.kernel": lambda: fuse_qkv(config, read("q"), read("k"), read("v")),
        "out.kernel": lambda: read("out"),
        "ffn.gate_up": lambda: np.stack([read("gate"), read("up")]),
        "ffn.down": lambda: read("down"),
    }


def _layer(
    config: ModelConfig, read_all: ReadTensor, dtype: DTypeLike, kept: Mapping[str, Callable], prefix: str
) -> Params:
    def read(name: str) -> np.ndarray:
        return read_all(prefix + name)

    make = fused(config, read)

    def kernel(name: str) -> Array:
        return kept[prefix + name]() if prefix + name in kept else _transposed(make[name](), dtype)

    layer: Params = {"attn_norm": {"scale": _scale(read("attn_norm"))}, "ffn_norm": {"scale": _scale(read("ffn_norm"))}}
    layer["qkv"] = {"kernel": kernel("qkv.kernel")}
    if config.qkv_bias:
        layer["qkv"]["bias"] = jnp.asarray(
            fuse_qkv(config, read("q_bias"), read("k_bias"), read("v_bias")), jnp.float32
        )
    if config.qk_norm:
        layer |= {name: {"scale": _scale(read(name))} for name in ("q_norm", "k_norm")}
    group_size = config.num_heads // config.num_kv_heads
    layer["out"] = {"kernel": kernel("out.kernel").reshape(config.num_kv_heads, group_size, -1, config.d_model)}
    if not config.num_experts:
        layer["ffn"] = {"gate_up": kernel("ffn.gate_up"), "down": kernel("ffn.down")}
        return layer
    experts = [_layer_expert(read, e, dtype) for e in range(config.num_experts)]
    layer["ffn"] = {"router": _transposed(read("router"), dtype)}
    layer["ffn"] |= {name: jnp.stack([expert[name] for expert in experts]) for name in ("gate_up", "down")}
    return layer


def _layer_expert(read: ReadTensor, expert: int, dtype: DTypeLike) -> Params:
    gate_up = np.stack([read(f"experts.{expert}.gate"), read(f"experts.{expert}.up")])
    return {"gate_up": _transposed(gate_up, dtype), "down": _transposed(read(f"experts.{expert}.down"), dtype)}


def fuse_qkv(
    config: ModelConfig,
    q: Num[np.ndarray, "q_rows *D"],
    k: Num[np.ndarray, "kv_rows *D"],
    v: Num[np.ndarray, "kv_rows *D"],
) -> Num[np.ndarray, "K G2 h *D"]:
    """Three matrices (or biases) -> per key/value head its query heads, its key, its value (`G2 = G + 2`)."""
    heads = (config.num_kv_heads, -1, config.head_dim, *q.shape[1:])
    return np.concatenate([q.reshape(heads), k.reshape(heads), v.reshape(heads)], axis=1)


def unpermute(rows: Num[np.ndarray, "rows *D"], num_heads: int) -> Num[np.ndarray, "rows *D"]:
    """Rows of interleaved RoPE pairs (2i, 2i+1) -> half-split pairs (i, i + h/2), head by head."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _scale(scale: Num[np.ndarray, "width"]) -> Array:
    return jnp.asarray(scale, jnp.float32)


def _transposed(matrix: Num[np.ndarray, "*out inner"], dtype: DTypeLike) -> Array:
    """`[*out, in]` -> `[in, *out]`, cast to `dtype`."""
    flat = matrix.reshape(-1, matrix.shape[-1])
    return jnp.asarray(np.ascontiguousarray(flat.T.astype(dtype))).reshape(matrix.shape[-1], *matrix.shape[:-1])
