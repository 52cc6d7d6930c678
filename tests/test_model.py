"""Law: logits equal an independent numpy model, for every architecture."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import tiny

from nanojax.config import PRESETS
from nanojax.models import decoder
from nanojax.pipeline import execute


@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_equal_numpy(name):
    model, params = tiny.MODELS[name], tiny.params(tiny.MODELS[name])
    tokens = np.random.default_rng(3).integers(0, model.vocab_size, 40)
    expected = numpy_decoder.logits(model, params, tokens)
    for length in (1, 17, 40):  # the row's last token is the one whose logits come back
        batch, kv = tiny.full_batch(tokens[:length], model)
        logits, _ = execute.forward(model, params, kv, batch, attention="reference")
        np.testing.assert_allclose(logits[0], expected[length - 1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_shapes_that_count_their_parameters(name):
    config = PRESETS[name]
    tree = decoder.abstract_params(config, jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == config.num_params


PUBLISHED_PARAMS = {
    "llama-2-7b": 6.74e9, "llama-2-13b": 13.02e9, "llama-2-70b": 68.98e9, "llama-3-8b": 8.03e9, "llama-3-70b": 70.55e9,
    "mixtral-8x7b": 46.70e9, "mixtral-8x22b": 140.6e9, "qwen2-72b": 72.71e9, "deepseek-67b": 67.43e9,
    "smollm2-135m": 0.1345e9,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_presets_count_the_published_parameters(name):
    assert PRESETS[name].num_params == pytest.approx(PUBLISHED_PARAMS[name], rel=1e-3)


def test_experts_that_are_copies_equal_the_dense_model():
    dense, moe = tiny.LLAMA, tiny.MODELS["mixtral"]
    params = tiny.params(dense)
    copied = {**params, "layers": {}}
    for i, layer in params["layers"].items():
        experts = {name: jnp.broadcast_to(x, (moe.num_experts, *x.shape)) for name, x in layer["ffn"].items()}
        router = jax.random.normal(jax.random.key(i), (moe.d_model, moe.num_experts))
        copied["layers"][i] = {**layer, "ffn": {**experts, "router": router}}
    batch, kv = tiny.full_batch(range(30), dense)
    ours, _ = execute.forward(moe, copied, kv, batch)
    expected, _ = execute.forward(dense, params, kv, batch)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)


def test_init_makes_what_abstract_params_says():
    made = decoder.init_params(tiny.LLAMA, jax.random.key(0), jnp.bfloat16)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), made)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), decoder.abstract_params(tiny.LLAMA, jnp.bfloat16))


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="num_heads=5 is no multiple of num_kv_heads=2"):
        tiny.dataclasses.replace(tiny.LLAMA, num_heads=5)
    with pytest.raises(ValueError, match="num_experts_per_token=3 > num_experts=2"):
        tiny.dataclasses.replace(tiny.LLAMA, num_experts=2, num_experts_per_token=3)
