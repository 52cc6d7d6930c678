"""Do Hugging Face directories give the parameters that were written, and do damaged ones say what is wrong?"""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from weight_files import (
    MIXTRAL,
    QWEN2,
    QWEN3,
    TINY,
    assert_same,
    expected_params,
    hf_config,
    hf_name,
    random_tensors,
    write_hf,
)

from nanojax.config import RopeScaling
from nanojax.weights import load_model, load_params, open_checkpoint


def load_hf(path):
    checkpoint = open_checkpoint(path)
    return checkpoint.config, load_params(checkpoint, jnp.float32)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("LlamaForCausalLM", TINY),
        ("MistralForCausalLM", TINY),
        ("Qwen2ForCausalLM", QWEN2),
        ("Qwen3ForCausalLM", QWEN3),
        ("MixtralForCausalLM", MIXTRAL),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hf_directory_gives_what_was_written(tmp_path, architecture, config, num_shards):
    tensors = random_tensors(config)
    path = write_hf(
        tmp_path / "tiny", hf_config(config, architecture), {hf_name(n): t for n, t in tensors.items()}, num_shards
    )
    found, params = load_hf(path)
    assert found == config
    assert_same(params, expected_params(config, tensors))


def test_hf_mixtral_fused_naming(tmp_path):
    tensors = random_tensors(MIXTRAL)
    stored = {hf_name(name, moe="fused"): value for name, value in tensors.items() if ".experts." not in name}
    for i in range(MIXTRAL.num_layers):
        gate, up, down = (
            np.stack([tensors[f"layers.{i}.experts.{e}.{matrix}"] for e in range(3)])
            for matrix in ("gate", "up", "down")
        )
        stored[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        stored[f"model.layers.{i}.mlp.experts.down_proj"] = down
    found, params = load_hf(write_hf(tmp_path / "tiny", hf_config(MIXTRAL, "MixtralForCausalLM"), stored))
    assert found == MIXTRAL
    assert_same(params, expected_params(MIXTRAL, tensors))


def test_hf_qwen3_moe(tmp_path):
    config = dataclasses.replace(MIXTRAL, qk_norm=True)
    tensors = random_tensors(config)
    spec = hf_config(
        config, "Qwen3MoeForCausalLM", num_local_experts=None, num_experts=3, intermediate_size=1, norm_topk_prob=True
    )
    stored = {hf_name(name, moe="qwen"): value for name, value in tensors.items()}
    found, params = load_hf(write_hf(tmp_path / "tiny", spec | {"moe_intermediate_size": config.d_ff}, stored))
    assert found == config
    assert_same(params, expected_params(config, tensors))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_hf_half_precision_files(tmp_path, dtype):
    tensors = {name: value.astype(dtype) for name, value in random_tensors(QWEN2).items()}
    path = write_hf(
        tmp_path / "tiny", hf_config(QWEN2, "Qwen2ForCausalLM"), {hf_name(n): t for n, t in tensors.items()}
    )
    _, params = load_hf(path)
    assert_same(params, expected_params(QWEN2, {name: value.astype(np.float32) for name, value in tensors.items()}))


def test_hf_tied_head_may_be_stored_all_the_same(tmp_path):
    tensors = {hf_name(name): value for name, value in random_tensors(QWEN2).items()}
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    _, params = load_hf(write_hf(tmp_path / "tiny", hf_config(QWEN2, "Qwen2ForCausalLM"), tensors | extra))
    assert "head" not in params


SCALING = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}},
    ],
    ids=["rope_scaling", "rope_parameters"],
)
def test_hf_llama3_scaling_in_both_spellings(tmp_path, changes):
    tensors = {hf_name(name): value for name, value in random_tensors(TINY).items()}
    config = open_checkpoint(
        write_hf(tmp_path / "tiny", hf_config(TINY, "LlamaForCausalLM", **changes), tensors)
    ).config
    assert config == dataclasses.replace(TINY, rope_theta=5e5, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported"),
        ({"sliding_window": 16}, "sliding_window 16 is in use"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE type 'linear' is not supported"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
            "llama3 RoPE scaling lacks the key 'original_max_position_embeddings'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is"),
        ({"num_hidden_layers": None}, "key num_hidden_layers is None"),
    ],
)
def test_unsupported_hf_models_are_named(tmp_path, changes, message):
    tensors = {hf_name(name): value for name, value in random_tensors(TINY).items()}
    path = write_hf(tmp_path / "tiny", hf_config(TINY, "LlamaForCausalLM") | changes, tensors)
    if changes == {"num_hidden_layers": None}:
        path = write_hf(path, hf_config(TINY, "LlamaForCausalLM", **changes), tensors)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        load_model(str(path))


@pytest.mark.parametrize(
    "window", [{"sliding_window": 32}, {"sliding_window": 16, "use_sliding_window": False}, {"sliding_window": None}]
)
def test_a_window_that_never_closes_is_accepted(tmp_path, window):
    tensors = {hf_name(name): value for name, value in random_tensors(TINY).items()}
    assert (
        open_checkpoint(write_hf(tmp_path / "tiny", hf_config(TINY, "MistralForCausalLM") | window, tensors)).config
        == TINY
    )


def test_damaged_hf_directories_are_named(tmp_path):
    tensors = {hf_name(name): value for name, value in random_tensors(TINY).items()}
    spec = hf_config(TINY, "LlamaForCausalLM")
    path = write_hf(tmp_path / "tiny", spec, tensors)
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json"):
        load_model(str(path))
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt"):
        load_model(str(path))
    write_hf(path, spec, {name: value for name, value in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"tiny: tensor 'model\.norm\.weight' is missing; expected shape \(64,\)"):
        load_model(str(path))
    write_hf(path, spec, tensors | {"model.norm.weight": np.zeros(63, np.float32)})
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has shape \(63,\); expected \(64,\)"):
        load_model(str(path))
    write_hf(path, spec, tensors | {"model.norm.weight": np.zeros(64, np.int8)})
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has dtype I8"):
        load_model(str(path))
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_model(str(path))
    write_hf(path, spec, tensors, num_shards=2)
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors: no such file"):
        load_model(str(path))
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load_model(str(path))
