"""Which small models and engines do the tests use?"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import admission, config, scheduler
from nanojax.config import EngineConfig, ModelConfig, RopeScaling
from nanojax.models import decoder
from nanojax.scheduler import Policy
from nanojax.serve import Engine
from nanojax.workload import Request, SamplingParams

LLAMA = ModelConfig(
    name="tiny-llama", num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, vocab_size=97, max_len=256,
)  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "llama3.1": dataclasses.replace(
        LLAMA,
        rope_theta=5e5,
        rope_scaling=RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=16),
    ),
    "tied": dataclasses.replace(LLAMA, tied_head=True, num_heads=6, num_kv_heads=2),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, rms_eps=1e-6),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_dim=16),
    "mixtral": dataclasses.replace(LLAMA, num_experts=4, num_experts_per_token=2),
}


@functools.cache
def params(model: ModelConfig):
    """Random weights, large enough that logits differ and routing varies; biases and scales are not trivial."""
    tree = decoder.init_params(model, jax.random.key(1))
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [
        x * 10 if x.ndim > 1 and x.std() > 0 else x + 0.2 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def policy(
    admission_rule="greedy",
    priority="first_come",
    phase_order="decode_first",
    batching="continuous",
    expected_output_len=8,
) -> Policy:
    return Policy(
        admission.make_forecast(admission_rule, expected_output_len=expected_output_len),
        scheduler.PRIORITIES[priority],
        scheduler.PhaseOrder(phase_order),
        scheduler.Batching(batching),
    )


ENGINE = EngineConfig(token_budgets=(8, 32), num_slots=6, page_size=4, num_pages=64, max_len=64, max_stop_tokens=2)
GREEDY = dataclasses.replace(ENGINE, sampling=config.GREEDY)
"""For tests of what is not sampling: it compiles in half of the time."""


def engine(config: EngineConfig = ENGINE, model: ModelConfig = LLAMA, **options) -> Engine:
    options = {"policy": policy(), "check_invariants": True, **options}
    return Engine(config, model, params(model), **options)


def requests(
    num: int, model: ModelConfig = LLAMA, *, seed: int = 0, max_prompt_len: int = 30, temperature: Sequence[float] = (0.0,),
    **sampling,
) -> list[Request]:  # fmt: skip
    """Random prompts and output lengths; `temperature` is dealt out in turn."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(num):
        how = {"max_tokens": int(rng.integers(1, 20)), "ignore_eos": True, "seed": i, **sampling}
        prompt = rng.integers(0, model.vocab_size, rng.integers(1, max_prompt_len + 1)).tolist()
        made.append(
            Request(f"r{i}", tuple(prompt), SamplingParams(temperature=temperature[i % len(temperature)], **how))
        )
    return made


def full_batch(tokens: Sequence[int], model: ModelConfig, page_size: int = 4, *, start: int = 0):
    """One prompt as one prefill chunk over pages in order: (batch, empty KV pages)."""
    from nanojax.batch import RaggedBatch
    from nanojax.kv_cache import KVPages

    n = len(tokens)
    num_pages = -(-n // page_size)
    positions = jnp.arange(n, dtype=jnp.int32)
    pages = jnp.zeros((model.num_layers, num_pages, model.num_kv_heads, page_size, model.head_dim))
    one = lambda value: jnp.array([value], jnp.int32)  # noqa: E731
    return RaggedBatch(
        tokens=jnp.array(tokens, jnp.int32), positions=positions, pages=positions // page_size, row_slots=one(0),
        kv_lens=one(n), page_indices=jnp.arange(num_pages, dtype=jnp.int32)[None], cu_q_lens=jnp.array([0, n], jnp.int32),
        num_decode=jnp.int32(0),
    ), KVPages(k=pages, v=pages)  # fmt: skip
