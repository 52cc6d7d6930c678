"""Which program runs one operation of a model, and nothing else?  Calls for `experiments.profile_ops` to time.

Each runs its operation in every layer, so that weights come from memory as in a real step; a barrier between layers keeps
the compiler from merging products that share an input.  KQV stores keys and values, as in a step.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import serving
from nanojax import kv_cache, sampling
from nanojax.config import GREEDY, ModelConfig
from nanojax.kv_cache import KVPages
from nanojax.models import decoder
from nanojax.models.layers import contract
from nanojax.models.moe import MixtureOfExperts
from nanojax.pipeline.ir import OpKind
from nanojax.weights import LoadedModel
from pallas_kernels.paged_attention import paged_attention

__all__ = ["Point", "attention_points", "dense_points"]

MAX_KV_BYTES = 2**31
"""Attention is timed in as many layers as have room for their keys and values in this."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One program: an operation, or an extra by name, on `num_tokens` tokens (extras: rows).

    num_runs: how often the operation is in it.    call: runs it and gives what it computed.
    """

    op: OpKind | str
    num_tokens: int
    context_len: int | None
    num_runs: int
    call: Callable[[], Any]


def dense_points(values: flags.FlagValues, loaded: LoadedModel, sizes: Sequence[int]) -> list[Point]:
    """Everything that sees no context, at each size."""
    model, params = loaded.config, loaded.params
    programs = {
        kind: jax.jit(f, static_argnums=0) for kind, f in DENSE.items() if model.num_experts or kind != OpKind.ROUTER
    }
    store = jax.jit(_project_qkv, static_argnums=0, donate_argnums=2)
    greedy = jax.jit(functools.partial(sampling.sample, parts=GREEDY))
    points = []
    for t in sizes:
        key = jax.random.key(values.seed)
        x = jax.random.normal(key, (t, model.d_model))
        attended = jax.random.normal(key, (t, model.num_heads, model.head_dim))
        logits = jax.random.normal(key, (t, model.vocab_size))
        hidden = jax.jit(_first_hidden, static_argnums=0)(model, params, x)
        cell = [_pages(values, model, model.num_layers, -(-t // values.page_size))]
        how, slots = sampling.init(t, 1), jnp.arange(t, dtype=jnp.int32)

        def project(x=x, cell=cell):  # its pages are consumed, and kept for the next time
            cell[0], result = store(model, params, cell[0], x)
            return result

        given = {OpKind.O: attended, OpKind.D: hidden}
        points.append(Point(OpKind.KQV, t, None, model.num_layers, project))
        for kind, program in programs.items():
            call = functools.partial(program, model, params, x, given.get(kind))
            points.append(Point(kind, t, None, model.num_layers, call))
        points.append(
            Point("logits", t, None, 1, functools.partial(jax.jit(_logits, static_argnums=0), model, params, x))
        )
        points.append(Point("sampling", t, None, 1, functools.partial(greedy, logits, how, slots, slots)))
    return points


def attention_points(
    values: flags.FlagValues, model: ModelConfig, sizes: Sequence[int], contexts: Sequence[int]
) -> list[Point]:
    """Decode and prefill attention at each size and mean context, on pages scattered over one pool."""
    batches = {
        (kind, t, context): rows(t, context)
        for kind, rows in ((OpKind.DEC_ATTN, _decode_rows), (OpKind.PF_ATTN, _prefill_rows))
        for t in sizes
        for context in contexts
    }
    num_pages = max(sum(-(-n // values.page_size) for n in kv_lens) for _, kv_lens in batches.values())
    token_bytes = 2 * model.num_kv_heads * model.head_dim * jnp.dtype(values.kv_dtype or values.dtype).itemsize
    num_layers = int(np.clip(MAX_KV_BYTES // (num_pages * values.page_size * token_bytes), 1, model.num_layers))
    kv = _pages(values, model, num_layers, num_pages)
    attend = jax.jit(functools.partial(_attend, values.attention))
    points = []
    for (kind, t, context), (q_lens, kv_lens) in batches.items():
        table = _page_table(kv_lens, values.page_size, num_pages, np.random.default_rng(values.seed))
        q = jax.random.normal(jax.random.key(values.seed), (t, model.num_heads, model.head_dim)).astype(kv.value_dtype)
        cu_q_lens = jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32)
        num_decode = jnp.int32(t if kind is OpKind.DEC_ATTN else 0)
        call = functools.partial(attend, kv, q, jnp.asarray(kv_lens, jnp.int32), table, cu_q_lens, num_decode)
        points.append(Point(kind, t, context, num_layers, call))
    return points


def _project_qkv(model: ModelConfig, params, kv: KVPages, x):
    bound, t, page_size = decoder.bind(model, params), x.shape[0], kv.k.shape[3]
    position = jnp.arange(t, dtype=jnp.int32)
    rope, queries = decoder.rope_angles(model, position), []
    for index, layer in enumerate(bound.layers):
        q, k, v = layer.project_qkv(x, rope, out_dtype=kv.value_dtype)
        kv = kv_cache.write(kv, index, k, v, position // page_size, position % page_size)
        x, q = jax.lax.optimization_barrier((x, q))
        queries.append(q)
    return kv, queries


def _project_out(model: ModelConfig, params, x, attended):
    for layer in decoder.bind(model, params).layers:
        x = layer.project_out(x, attended)
    return x


def _up_gate(model: ModelConfig, params, x, _):
    found = []
    for layer in decoder.bind(model, params).layers:
        x, hidden = jax.lax.optimization_barrier((x, layer.up_gate(x)))
        found.append(hidden)
    return found


def _down(model: ModelConfig, params, x, hidden):
    for layer in decoder.bind(model, params).layers:
        x = layer.down(x, hidden)
    return x


def _route(model: ModelConfig, params, x, _):
    found = []
    for layer in decoder.bind(model, params).layers:
        assert isinstance(layer.ffn, MixtureOfExperts)
        scores = contract(layer.ffn_norm(x), layer.ffn.router[...])
        x, chosen = jax.lax.optimization_barrier((x, jax.lax.top_k(scores, model.num_experts_per_token)))
        found.append(chosen)
    return found


DENSE = {OpKind.O: _project_out, OpKind.ROUTER: _route, OpKind.UG: _up_gate, OpKind.D: _down}
"""All of (model, params, x, what comes in besides); `UG` of experts contains the router, which `_profile` takes off."""


def _first_hidden(model: ModelConfig, params, x):
    return decoder.bind(model, params).layers[0].up_gate(x)


def _logits(model: ModelConfig, params, x):
    return decoder.bind(model, params).logits(x)


def _attend(implementation: str | None, kv: KVPages, q, kv_lens, table, cu_q_lens, num_decode):
    """Each layer's result is the next one's query, so that they run in order and none is left out."""
    for layer in range(kv.k.shape[0]):
        q = paged_attention(
            q, kv.k, kv.v, layer, kv_lens, table, cu_q_lens, num_decode, implementation=implementation
        ).astype(kv.value_dtype)
    return q


def _decode_rows(num_tokens: int, context: int) -> tuple[list[int], list[int]]:
    """Query and context lengths of rows with one token each."""
    return [1] * num_tokens, [context] * num_tokens


def _prefill_rows(num_tokens: int, context: int) -> tuple[list[int], list[int]]:
    """Whole prompts whose tokens see `context` tokens on average, and for what remains the middle of such a prompt."""
    prompt_len = 2 * context - 1
    rest = num_tokens % prompt_len
    q_lens = [prompt_len] * (num_tokens // prompt_len) + [rest] * (rest > 0)
    return q_lens, [q if q == prompt_len else context + q // 2 for q in q_lens]


def _page_table(kv_lens: Sequence[int], page_size: int, num_pages: int, rng: np.random.Generator) -> jax.Array:
    """Each row's own pages, scattered over the pool."""
    counts = [-(-n // page_size) for n in kv_lens]
    pages, table = iter(rng.permutation(num_pages)), np.zeros((len(kv_lens), max(counts)), np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = [next(pages) for _ in range(count)]
    return jnp.asarray(table)


def _pages(values: flags.FlagValues, model: ModelConfig, num_layers: int, num_pages: int) -> KVPages:
    """Pages of small values."""
    shape = (num_layers, num_pages, model.num_kv_heads, values.page_size, model.head_dim)
    dtype = serving.kv_dtype(values)
    value = jnp.full(shape, 0.01, jnp.bfloat16 if dtype == jnp.uint16 else dtype)
    value = jax.lax.bitcast_convert_type(value, dtype)
    return KVPages(k=value, v=jnp.copy(value))
