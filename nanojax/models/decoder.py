"""What does a decoder layer compute?  Llama 2/3/3.1, Mistral, Qwen2 and Qwen3 as one Flax NNX module.

A layer is cut into the operations that a NanoFlow pipeline schedules (paper, Figure 1): `qkv`, attention (outside, over the
paged KV cache), `out`, `up_gate`, `down`.  Weights that are used together are stored together: a KV group's queries, key and
value are one kernel, so are gate and up; every kernel splits over KV heads or feed-forward columns for tensor parallelism.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from nanojax.array_types import Array, Float, Int32, Key, Params
from nanojax.config import ModelConfig, RopeScaling
from nanojax.models.layers import WHOLE, Extent, RMSNorm, contract, normal
from nanojax.models.moe import MixtureOfExperts, Routes
from pallas_kernels.device import platform
from pallas_kernels.matmul import is_packed, matmul, operand_dtype, pack, takes_blocks
from pallas_kernels.rope import rotate_qkv

Rope = tuple[Float[Array, "t h2"], Float[Array, "t h2"]]
"""Cosine and sine of each token's rotation, float32."""


class FeedForward(nnx.Module):
    """SwiGLU: `down(silu(gate x) * (up x))`."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.gate_up = normal(rngs, (config.d_model, 2, config.d_ff), dtype)
        self.down = normal(rngs, (config.d_ff, config.d_model), dtype)

    def up_gate(self, x: Float[Array, "t D"], extent: Extent = WHOLE) -> Float[Array, "t F"]:
        """`silu(gate x) * (up x)`, rounded as the next product takes it."""
        kernel = self.gate_up[...]
        return matmul(x, kernel, out_dtype=operand_dtype(kernel), **extent.for_matmul())

    def project_down(
        self, hidden: Float[Array, "t F"], residual: Float[Array, "t D"] | None = None, extent: Extent = WHOLE
    ) -> Float[Array, "t D"]:
        """Back to the model's width; added to `residual`."""
        return matmul(hidden, self.down[...], residual, **extent.for_matmul())


class Attention(nnx.Module):
    """The joint projection of queries, keys and values, by KV head: its G queries, then its key, then its value."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        groups = config.num_heads // config.num_kv_heads
        shape = (config.num_kv_heads, groups + 2, config.head_dim)
        self.kernel = normal(rngs, (config.d_model, *shape), dtype)
        if config.qkv_bias:
            self.bias = nnx.Param(jnp.zeros(shape, jnp.float32))

    def __call__(self, x: Float[Array, "t D"], extent: Extent = WHOLE) -> Float[Array, "t K G2 h"]:
        """All three projections in one product; on a GPU rounded as pages keep them, to spare its memory."""
        kernel = self.kernel[...]
        y = contract(x, kernel, extent, kernel.dtype if platform() == "gpu" else jnp.float32)
        return y + self.bias[...] if hasattr(self, "bias") else y


class OutProjection(nnx.Module):
    """From the attended heads back to the model's width."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        groups = config.num_heads // config.num_kv_heads
        self.kernel = normal(rngs, (config.num_kv_heads, groups, config.head_dim, config.d_model), dtype)

    def __call__(
        self,
        attended: Float[Array, "t H h"],
        residual: Float[Array, "t D"] | None = None,
        extent: Extent = WHOLE,
    ) -> Float[Array, "t D"]:
        """Heads joined, then projected; added to `residual`."""
        kernel = self.kernel[...]
        heads = attended.reshape(attended.shape[0], -1)
        return matmul(heads, kernel.reshape(-1, kernel.shape[-1]), residual, **extent.for_matmul())


class DecoderLayer(nnx.Module):
    """One pre-norm layer as operations on any contiguous part `t` of the ragged batch."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.attn_norm = RMSNorm(config.d_model, config.rms_eps)
        self.qkv = Attention(config, dtype, rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_eps)
        self.out = OutProjection(config, dtype, rngs)
        self.ffn_norm = RMSNorm(config.d_model, config.rms_eps)
        self.ffn = (MixtureOfExperts if config.num_experts else FeedForward)(config, dtype, rngs)

    def project_qkv(
        self, x: Float[Array, "t D"], rope: Rope, extent: Extent = WHOLE, out_dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "t H h"], Float[Array, "t K h"], Float[Array, "t K h"]]:
        """Norm, joint projection, optional query/key norm (Qwen3), rotation of queries and keys; rounded to `out_dtype`."""
        y = self.qkv(self.attn_norm(x, extent.num_tokens, operand_dtype(self.qkv.kernel[...])), extent)
        if hasattr(self, "q_norm"):
            y = jnp.concatenate([self.q_norm(y[:, :, :-2]), self.k_norm(y[:, :, -2:-1]), y[:, :, -1:]], axis=2)
        return rotate_qkv(y, *rope, num_tokens=extent.num_tokens, out_dtype=out_dtype)

    def project_out(
        self, x: Float[Array, "t D"], attended: Float[Array, "t H h"], extent: Extent = WHOLE
    ) -> Float[Array, "t D"]:
        """The residual stream after attention."""
        return self.out(attended, x, extent)

    def route(self, x: Float[Array, "t D"]) -> Routes:
        """Norm and router of a mixture of experts: the choice that `up_gate` takes."""
        assert isinstance(self.ffn, MixtureOfExperts)
        return self.ffn.route(self.ffn_norm(x))

    def up_gate(self, x: Float[Array, "t D"], *routes: Routes, extent: Extent = WHOLE):
        """Norm, gate and up projections; what it returns is only for `down`.  A mixture of experts is about all tokens."""
        if isinstance(self.ffn, MixtureOfExperts):
            return self.ffn.up_gate(self.ffn_norm(x), *routes)
        normed = self.ffn_norm(x, extent.num_tokens, operand_dtype(self.ffn.gate_up[...]))
        return self.ffn.up_gate(normed, extent)

    def down(self, x: Float[Array, "t D"], hidden, extent: Extent = WHOLE) -> Float[Array, "t D"]:
        """The residual stream after the feed-forward."""
        if isinstance(self.ffn, MixtureOfExperts):
            return x + self.ffn.project_down(hidden)
        return self.ffn.project_down(hidden, x, extent)


class Embedding(nnx.Module):
    """One row per token: the input embedding, or the head that scores each token."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.table = normal(rngs, (config.vocab_size, config.d_model), dtype)


class Decoder(nnx.Module):
    """A whole model.  Its parameters, named, are the params pytree."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.embed = Embedding(config, dtype, rngs)
        self.layers = nnx.List([DecoderLayer(config, dtype, rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.d_model, config.rms_eps)
        if not config.tied_head:
            self.head = Embedding(config, dtype, rngs)

    def embed_tokens(self, tokens: Int32[Array, "t"]) -> Float[Array, "t D"]:
        """The residual stream that the first layer reads, float32."""
        return self.embed.table[...][tokens].astype(jnp.float32)

    def logits(self, x: Float[Array, "R D"], num_rows: Int32[Array, ""] | None = None) -> Float[Array, "R V"]:
        """Scores of all tokens, float32; of the first `num_rows` rows, if only they are asked for."""
        table = (self.head if hasattr(self, "head") else self.embed).table[...]
        normed = self.final_norm(x, num_rows, operand_dtype(table))
        return matmul(normed, table, num_tokens=num_rows, is_transposed=not is_packed(table))


def rope_angles(config: ModelConfig, positions: Int32[Array, "t"]) -> Rope:
    """Each token's rotation; computed once per step, used by every layer."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = jnp.float32(config.rope_theta) ** -exponent
    if config.rope_scaling is not None:
        frequency = _scale_frequency(frequency, config.rope_scaling)
    angle = positions.astype(jnp.float32)[:, None] * frequency[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def _scale_frequency(frequency: Float[Array, "h2"], scaling: RopeScaling) -> Float[Array, "h2"]:
    """Llama-3.1: wavelengths beyond the original context are stretched, a smooth blend in between."""
    turns = scaling.original_max_len * frequency / (2 * jnp.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


@functools.lru_cache(maxsize=32)
def _definition(config: ModelConfig) -> Callable[[Params], Decoder]:
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, jnp.dtype(jnp.float32), None)))
    return lambda params: nnx.merge(graph, params)


def bind(config: ModelConfig, params: Params) -> Decoder:
    """The modules of `config` over the arrays of `params`; to be used inside a pure function.

    A head of their own (`pack_params`) is used even where it is tied.
    """
    config = dataclasses.replace(config, tied_head=config.tied_head and "head" not in params)
    return _definition(config)(params)


def init_params(config: ModelConfig, key: Key[Array, ""], dtype=jnp.float32) -> Params:
    """Random weights (normal, deviation 0.02) of the real shapes, made on the default device.

    All layers are made by one program: a program for the whole model would take long to compile.
    """
    rest_key, *layer_keys = jax.random.split(key, config.num_layers + 1)

    @jax.jit
    def make_layer(key: Key[Array, ""]) -> Params:
        return _params(DecoderLayer(config, jnp.dtype(dtype), nnx.Rngs(key)))

    @jax.jit
    def make_rest(key: Key[Array, ""]) -> Params:
        one_layer = dataclasses.replace(config, num_layers=1)
        return _params(Decoder(one_layer, jnp.dtype(dtype), nnx.Rngs(key))) | {"layers": {}}

    return make_rest(rest_key) | {"layers": {i: make_layer(key) for i, key in enumerate(layer_keys)}}


def pack_params(params: Params) -> Params:
    """The same parameters with the dense kernels of all layers as this CPU's unit for bfloat16 reads them, if it has one.

    So is the head, turned, [D V]; where it is tied, the embedding stays beside it.
    """

    def pack_layer(layer: Params) -> Params:
        dense = layer["ffn"]["gate_up"].ndim == 3
        ffn = {name: pack(layer["ffn"][name], 1) for name in ("gate_up", "down")} if dense else {}
        return layer | {
            "qkv": layer["qkv"] | {"kernel": pack(layer["qkv"]["kernel"], 1)},
            "out": layer["out"] | {"kernel": pack(layer["out"]["kernel"], 3)},
            "ffn": layer["ffn"] | ffn,
        }

    table = params.get("head", params["embed"])["table"]
    if not is_packed(table) and takes_blocks(table.shape[::-1], 1):  # by AVX512-BF16 XLA's product is the faster one
        table = pack(table.T, 1)
    heads = {"head": {"table": table}} if is_packed(table) else {}
    return params | heads | {"layers": {i: pack_layer(layer) for i, layer in params["layers"].items()}}


def first_layers(config: ModelConfig, params: Params, num_layers: int) -> tuple[ModelConfig, Params]:
    """The model with its first `num_layers` layers only.  Raises ValueError where it has fewer."""
    if num_layers > config.num_layers:
        raise ValueError(f"num_layers={num_layers} > {config.num_layers} of {config.name}")
    layers = {i: layer for i, layer in params["layers"].items() if i < num_layers}
    return dataclasses.replace(config, num_layers=num_layers), {**params, "layers": layers}


def abstract_params(config: ModelConfig, dtype=jnp.float32) -> Params:
    """The params pytree as `jax.ShapeDtypeStruct`s: what loaders must produce.  Norms and biases stay float32."""
    one_layer = dataclasses.replace(config, num_layers=1)
    found = jax.eval_shape(lambda: _params(Decoder(one_layer, jnp.dtype(dtype), None)))
    layer = found["layers"][0]
    return found | {"layers": {i: jax.tree.map(lambda leaf: leaf, layer) for i in range(config.num_layers)}}


def _params(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))
