"""How is a GGUF file read as a checkpoint?  Architectures `llama` and `qwen2`."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from nanojax.config import ModelConfig, RopeScaling
from nanojax.weights import chat, tokenizer
from nanojax.weights.checkpoint import Checkpoint, check_tensors, source_shapes, unpermute
from nanojax.weights.gguf_container import Blocks, GgufFile, dequantize, num_bits, parse_gguf, read_blocks

ARCHITECTURES = ("llama", "qwen2")
_NAMES = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
_LAYER_NAMES = {
    "attn_norm": "attn_norm.weight", "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight",
    "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias", "out": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight", "gate": "ffn_gate.weight", "up": "ffn_up.weight", "down": "ffn_down.weight",
}  # fmt: skip


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file of architecture `llama` or `qwen2` and checks every tensor's presence and shape.

    Raises FileNotFoundError, or ValueError that names the file, what was expected and what was found.
    """
    file = parse_gguf(path)
    config = _model_config(file)
    shapes = source_shapes(config)
    found = {name: tensor.shape for name, tensor in file.tensors.items() if name != "rope_freqs.weight"}
    check_tensors(path, found, {_file_name(name): shape for name, shape in shapes.items()})
    heads = {"q": config.num_heads, "k": config.num_kv_heads} if _architecture(file) == "llama" else {}
    heads |= {f"{name}_bias": count for name, count in heads.items()}

    def read(name: str) -> Float32[np.ndarray, "..."]:
        values = dequantize(file, _file_name(name))
        role = name.rpartition(".")[2]
        return unpermute(values, heads[role]) if role in heads else values

    def blocks(name: str) -> Blocks:
        found, role = read_blocks(file, _file_name(name)), name.rpartition(".")[2]
        return Blocks(*(unpermute(part, heads[role]) for part in found)) if role in heads else found

    try:
        tokens = tokenizer.from_gguf(file.metadata).with_vocab_size(config.vocab_size)
    except KeyError as error:
        raise ValueError(f"{path}: metadata key tokenizer.ggml.{error.args[0]} is missing") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    family = chat.family_of(file.metadata.get("tokenizer.chat_template"), config.name)
    bits = {name: num_bits(file, _file_name(name)) for name in shapes}
    return Checkpoint(config, (path,), read, tokens, chat.TEMPLATES[family], bits, blocks)


def _file_name(name: str) -> str:
    """Our name -> the file's."""
    if name in _NAMES:
        return _NAMES[name]
    _, layer, role = name.split(".")
    return f"blk.{layer}.{_LAYER_NAMES[role]}"


def _architecture(file: GgufFile) -> str:
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"{file.path}: general.architecture is {name!r}; expected one of {ARCHITECTURES}")
    return name


def _model_config(file: GgufFile) -> ModelConfig:
    architecture = _architecture(file)

    def value(key: str, default: Any = None) -> Any:
        found = file.metadata.get(f"{architecture}.{key}", default)
        if found is None:
            raise ValueError(f"{file.path}: metadata key {architecture}.{key} is missing")
        return found

    def count(key: str, default: Any = None) -> int:
        found = value(key, default)
        if not isinstance(found, int) or found <= 0:
            raise ValueError(f"{file.path}: {architecture}.{key} is {found!r}; expected a positive integer")
        return found

    for key, plain in (("expert_count", 0), ("attention.sliding_window", 0), ("rope.scaling.type", "none")):
        if value(key, plain) != plain:
            raise ValueError(
                f"{file.path}: {architecture}.{key} is {value(key)!r}, which is not supported; expected {plain!r}"
            )
    head_dim = count("attention.key_length", count("embedding_length") // count("attention.head_count"))
    for key in ("rope.dimension_count", "attention.value_length"):
        if value(key, head_dim) != head_dim:
            raise ValueError(
                f"{file.path}: {architecture}.{key} is {value(key)}; only the head dimension {head_dim} is supported"
            )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: tensor 'token_embd.weight' is missing")
    return ModelConfig(
        name=str(file.metadata.get("general.name", file.path.stem)),
        num_layers=count("block_count"),
        d_model=count("embedding_length"),
        num_heads=count("attention.head_count"),
        num_kv_heads=count("attention.head_count_kv", count("attention.head_count")),
        head_dim=head_dim,
        d_ff=count("feed_forward_length"),
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        max_len=count("context_length"),
        rope_theta=float(value("rope.freq_base", 1e4)),
        rms_eps=float(np.format_float_scientific(np.float32(value("attention.layer_norm_rms_epsilon")), unique=True)),
        rope_scaling=_rope_scaling(file, head_dim, float(value("rope.freq_base", 1e4))),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        tied_head="output.weight" not in file.tensors,
    )


def _rope_scaling(file: GgufFile, head_dim: int, theta: float) -> RopeScaling | None:
    """Llama 3.1 scaling, which GGUF stores as one divisor per frequency: the divisors must be those of its formula.

    The largest divisor is `factor`; the other constants are the same in all of Meta's models (llama.cpp,
    convert_hf_to_gguf.py).
    """
    if "rope_freqs.weight" not in file.tensors:
        return None
    divisors = dequantize(file, "rope_freqs.weight")
    scaling = RopeScaling(factor=float(divisors.max()))
    turns = scaling.original_max_len * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    expected = 1 / ((1 - smooth) / scaling.factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"{file.path}: tensor 'rope_freqs.weight' is not the Llama 3.1 scaling of {scaling}")
    return scaling
