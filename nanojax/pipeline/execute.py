"""How is a step's forward pass run?  The operations of every layer in order, attention over the paged KV cache."""

import jax
import jax.numpy as jnp

from nanojax import kv_cache
from nanojax.array_types import Array, Float32, Params
from nanojax.batch import RaggedBatch
from nanojax.config import ModelConfig
from nanojax.kv_cache import KVPages
from nanojax.models import decoder
from pallas_kernels.paged_attention import paged_attention


def forward(
    config: ModelConfig, params: Params, kv: KVPages, batch: RaggedBatch, *, attention: str | None = None
) -> tuple[Float32[Array, "R V"], KVPages]:
    """Logits after the last token of each row, and the cache with this step's keys and values.

    `attention` names the implementation of `paged_attention`; None lets it choose.  Layers are unrolled: a scan would copy
    each layer's weights and keep XLA from overlapping operations of neighbouring layers.
    """
    model = decoder.bind(config, params)
    # Behind a barrier, or XLA computes the sines and cosines again inside every layer's fusion.
    rope = jax.lax.optimization_barrier(decoder.rope_angles(config, batch.positions))
    offset = batch.positions % kv.k.shape[3]
    x = model.embed_tokens(batch.tokens)
    for index, layer in enumerate(model.layers):
        with jax.named_scope(f"layer{index}"):
            with jax.named_scope("KQV"):
                q, k, v = layer.project_qkv(x, rope)
                kv = kv_cache.write(kv, index, k, v, batch.pages, offset)
            with jax.named_scope("Attn"):
                attended = paged_attention(
                    q.astype(kv.value_dtype), kv.k, kv.v, index, batch.kv_lens, batch.page_indices, batch.cu_q_lens,
                    batch.num_decode, implementation=attention,
                )  # fmt: skip
            with jax.named_scope("O"):
                x = layer.project_out(x, attended)
            with jax.named_scope("UG"):
                hidden = layer.up_gate(x)
            with jax.named_scope("D"):
                x = layer.down(x, hidden)
    with jax.named_scope("logits"):
        last = jnp.maximum(batch.cu_q_lens[1:] - 1, 0)
        return model.logits(x[last]), kv
