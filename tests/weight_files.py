"""What do weight files look like, and what must come out of them?  Writers for tiny files, and the oracle of the tests.

The oracle is `expected_params`: the fused tree written down with Python loops, head by head.
"""

import dataclasses
import json
import struct

import gguf
import numpy as np
import safetensors.numpy
from gguf import GGMLQuantizationType as Kind

from nanojax.config import ModelConfig
from nanojax.weights.checkpoint import flatten, source_shapes
from nanojax.weights.tokenizer import _byte_alphabet

TINY = ModelConfig(
    "tiny", num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=96, vocab_size=260, max_len=32
)
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
                [head_rows("q" + suffix, k * groups + g) for g in range(groups)]
                + [head_rows(r + suffix, k) for r in "kv"]
                for k in range(heads)
            ]
            return np.array(per_head)

        layer = {"attn_norm": {"scale": get["attn_norm"]}, "ffn_norm": {"scale": get["ffn_norm"]}}
        layer["qkv"] = {"kernel": np.moveaxis(fused(""), -1, 0)}
        if config.qkv_bias:
            layer["qkv"]["bias"] = fused("_bias")
        if config.qk_norm:
            layer |= {name: {"scale": get[name]} for name in ("q_norm", "k_norm")}
        layer["out"] = {
            "kernel": np.array(
                [[get["out"].T[(k * groups + g) * h :][:h] for g in range(groups)] for k in range(heads)]
            )
        }
        prefixes = [f"experts.{e}." for e in range(config.num_experts)] or [""]
        gate_up = np.array([np.stack([get[p + "gate"].T, get[p + "up"].T], axis=1) for p in prefixes])
        down = np.array([get[p + "down"].T for p in prefixes])
        layer["ffn"] = (
            {"gate_up": gate_up, "down": down} if config.num_experts else {"gate_up": gate_up[0], "down": down[0]}
        )
        if config.num_experts:
            layer["ffn"]["router"] = get["router"].T
        params["layers"][i] = layer
    return params


def assert_same(params, expected):
    flat = flatten(expected)
    assert flatten(params).keys() == flat.keys()
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), flat[name], err_msg=name)


def permuted(rows, num_heads):
    """Half-split rows -> interleaved: dimension i of a head goes to 2i, dimension i + h/2 to 2i + 1."""
    heads = rows.reshape(num_heads, -1, *rows.shape[1:])
    half = heads.shape[1] // 2
    out = np.empty_like(heads)
    for i in range(half):
        out[:, 2 * i], out[:, 2 * i + 1] = heads[:, i], heads[:, i + half]
    return out.reshape(rows.shape)


def damage(path, data):
    path.write_bytes(data)
    return str(path)


def gguf_name(name):
    table = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
    if name in table:
        return table[name]
    roles = {
        "attn_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "out": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    _, layer, role = name.split(".")
    role, suffix = (role[0], "bias") if role.endswith("_bias") else (role, "weight")
    return f"blk.{layer}.{roles.get(role, 'attn_' + role)}.{suffix}"


def write_gguf(
    path,
    config,
    tensors,
    architecture="llama",
    quantize=lambda name: False,
    extra=None,
    drop=(),
    tokens=TOKENS,
    **changes,
):
    """Writes the file; returns the tensors as their block format rounds them, RoPE half-split.

    quantize: a tensor's name -> its block format; True is Q8_0, False is none.
    """
    writer = gguf.GGUFWriter(path, architecture)
    fields = {
        "block_count": config.num_layers, "context_length": config.max_len, "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff, "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads, "rope.dimension_count": config.head_dim,
    } | changes  # fmt: skip
    for key, value in fields.items():
        if value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_eps)
    writer.add_name(config.name)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 257 + [3] * (len(tokens) - 259))
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
            kind = Kind.Q8_0 if quantize(name) is True else quantize(name)
            blocks = gguf.quants.quantize(stored, kind)
            rounded = gguf.quants.dequantize(blocks, kind)
            half = rounded.reshape(heads, -1, 2, *value.shape[1:]) if heads else None
            written[name] = np.concatenate([half[:, :, 0], half[:, :, 1]], 1).reshape(value.shape) if heads else rounded
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), stored)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def hf_name(name, moe="mixtral"):
    table = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
    if name in table:
        return table[name]
    roles = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "out": "self_attn.o_proj"}
    roles |= {role: f"self_attn.{role}_proj" for role in "qkv"} | {
        role: f"mlp.{role}_proj" for role in ("gate", "up", "down")
    }
    roles |= {role: f"self_attn.{role}" for role in ("q_norm", "k_norm")}
    roles["router"] = "block_sparse_moe.gate" if moe == "mixtral" else "mlp.gate"
    _, layer, role = name.split(".", 2)
    role, suffix = (role[0], "bias") if role.endswith("_bias") else (role, "weight")
    if role.startswith("experts"):
        _, expert, matrix = role.split(".")
        middle = f"block_sparse_moe.experts.{expert}.{ {'gate': 'w1', 'up': 'w3', 'down': 'w2'}[matrix] }"
        return f"model.layers.{layer}.{middle if moe == 'mixtral' else f'mlp.experts.{expert}.{matrix}_proj'}.weight"
    return f"model.layers.{layer}.{roles[role]}.{suffix}"


def hf_config(config, architecture, **changes):
    spec = {
        "architectures": [architecture], "hidden_size": config.d_model, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "intermediate_size": config.d_ff, "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.rms_eps, "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head, "hidden_act": "silu",
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
    header = (
        config.d_model,
        config.d_ff,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        vocab,
        config.max_len,
    )
    path = folder / f"{config.name}.bin"
    path.write_bytes(struct.pack("<7i", *header) + b"".join(part.tobytes() for part in parts))
    pieces = [b"piece"] * config.vocab_size
    words = b"".join(struct.pack("<fi", 0.0, len(piece)) + piece for piece in pieces)
    (folder / f"tok{config.vocab_size}.bin").write_bytes(struct.pack("<i", 5) + words)
    return path
