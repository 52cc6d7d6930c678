"""How is a Hugging Face model directory read?  `config.json`, safetensors (single or sharded), `tokenizer.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from nanojax.config import ModelConfig, RopeScaling
from nanojax.weights import chat, tokenizer
from nanojax.weights.checkpoint import Checkpoint, check_tensors, source_shapes

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
)
_DTYPES = ("BF16", "F16", "F32")
_NAMES = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight",
    "out": "self_attn.o_proj.weight",
    "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight", "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias", "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
}  # fmt: skip
_MIXTRAL_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}
_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
}
"""Keys of config.json that may be absent or null, or else have one of these values: the model has no other variant."""


def open_hf_directory(path: Path) -> Checkpoint:
    """Opens a directory and checks every tensor's presence and shape.  Without tokenizer.json, `tokenizer` is None.

    Raises FileNotFoundError for a missing config.json, index or shard, ValueError for what is damaged or not
    supported (architecture, sliding window in use, RoPE type, ...); both name the file, and the value found.
    """
    config_path = path / "config.json"
    spec = _read_json(config_path)
    config = _model_config(config_path, spec)
    files = _weight_files(path)
    shards = {file: _open_shard(file) for file in files}
    shard_of = {name: shard for shard in shards.values() for name in shard.keys()}  # noqa: SIM118 (no mapping)
    found = {name: tuple(shard.get_slice(name).get_shape()) for name, shard in shard_of.items()}
    skipped = {"lm_head.weight"} if config.tied_head else set()
    found = {
        name: shape for name, shape in found.items() if name not in skipped and not name.endswith("rotary_emb.inv_freq")
    }
    shapes = source_shapes(config)
    places = {name: _place(name, shapes[name], found, config) for name in shapes}
    check_tensors(path, found, {name: shape for name, shape, _ in places.values()})
    for name in found:
        if (dtype := shard_of[name].get_slice(name).get_dtype()) not in _DTYPES:
            raise ValueError(f"{path}: tensor {name!r} has dtype {dtype}; expected one of {_DTYPES}")

    def read(name: str) -> Float[np.ndarray, "..."]:
        file_name, _, index = places[name]
        part = shard_of[file_name]
        return part.get_tensor(file_name) if index is None else np.asarray(part.get_slice(file_name)[index])

    files = (config_path, *files)
    tokens = _tokenizer(path, spec, config.vocab_size) if (path / "tokenizer.json").is_file() else None
    return Checkpoint(
        config, files, read, tokens, chat.TEMPLATES[chat.family_of(_chat_template(path), path.resolve().name)]
    )


def _place(
    name: str, shape: tuple[int, ...], found: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> tuple[str, tuple[int, ...], Any]:
    """Our name -> the file's tensor, its whole shape, and which part of it is ours (None: all of it)."""
    if name in _NAMES:
        return _NAMES[name], shape, None
    _, layer, role = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    if role in _LAYER_NAMES:
        return prefix + _LAYER_NAMES[role], shape, None
    is_mixtral_style = f"{prefix}block_sparse_moe.gate.weight" in found
    if role == "router":
        return f"{prefix}block_sparse_moe.gate.weight" if is_mixtral_style else f"{prefix}mlp.gate.weight", shape, None
    _, expert, matrix = role.split(".")
    if is_mixtral_style:
        return f"{prefix}block_sparse_moe.experts.{expert}.{_MIXTRAL_MATRICES[matrix]}.weight", shape, None
    if f"{prefix}mlp.experts.gate_up_proj" not in found:
        return f"{prefix}mlp.experts.{expert}.{matrix}_proj.weight", shape, None
    experts, width, ffn, index = config.num_experts, config.d_model, config.d_ff, int(expert)
    if matrix == "down":
        return f"{prefix}mlp.experts.down_proj", (experts, width, ffn), index
    rows = slice(0, ffn) if matrix == "gate" else slice(ffn, 2 * ffn)
    return f"{prefix}mlp.experts.gate_up_proj", (experts, 2 * ffn, width), (index, rows)


def _model_config(path: Path, spec: Mapping[str, Any]) -> ModelConfig:
    architectures = spec.get("architectures") or [None]
    architecture = architectures[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; expected one of {ARCHITECTURES}")
    for key, plain in _PLAIN_VALUES.items():
        if spec.get(key) is not None and spec[key] not in plain:
            expected = plain[0] if plain else None
            raise ValueError(f"{path}: {key} is {spec[key]!r}, which is not supported; expected {expected!r}")
    is_moe, is_qwen_moe = (
        architecture in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"),
        architecture == "Qwen3MoeForCausalLM",
    )

    def value(*keys: str) -> Any:
        found = next((spec[key] for key in keys if spec.get(key) is not None), None)
        if not isinstance(found, int | float) or found <= 0:
            raise ValueError(f"{path}: key {' or '.join(keys)} is {found!r}; expected a positive number")
        return found

    if is_qwen_moe and not spec.get("norm_topk_prob"):
        raise ValueError(
            f"{path}: norm_topk_prob is {spec.get('norm_topk_prob')!r}, which is not supported; expected True"
        )
    _refuse_sliding_window(path, spec)
    theta, scaling = _rope(path, spec, default_theta=1e6 if architecture == "MixtralForCausalLM" else 1e4)
    heads = value("num_attention_heads")
    return ModelConfig(
        name=path.parent.resolve().name,
        num_layers=value("num_hidden_layers"),
        d_model=value("hidden_size"),
        num_heads=heads,
        num_kv_heads=spec.get("num_key_value_heads") or heads,
        head_dim=spec.get("head_dim") or value("hidden_size") // heads,
        d_ff=value("moe_intermediate_size") if is_qwen_moe else value("intermediate_size"),
        vocab_size=value("vocab_size"),
        max_len=value("max_position_embeddings"),
        rope_theta=theta,
        rms_eps=float(value("rms_norm_eps")),
        rope_scaling=scaling,
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture.startswith("Qwen3"),
        tied_head=bool(spec.get("tie_word_embeddings", False)),
        num_experts=value("num_local_experts", "num_experts") if is_moe else 0,
        num_experts_per_token=value("num_experts_per_tok") if is_moe else 0,
    )


def _refuse_sliding_window(path: Path, spec: Mapping[str, Any]) -> None:
    """A window that is switched off, or that no sequence outgrows, is no window."""
    window = spec.get("sliding_window")
    if window is not None and spec.get("use_sliding_window", True) and window < spec["max_position_embeddings"]:
        limit = spec["max_position_embeddings"]
        raise ValueError(
            f"{path}: sliding_window {window} is in use (max_position_embeddings {limit}), which is not supported"
        )
    kinds = set(spec.get("layer_types") or ()) - {"full_attention"}
    if kinds and window is not None and window < spec["max_position_embeddings"]:
        raise ValueError(f"{path}: layer_types {sorted(kinds)} are not supported; expected 'full_attention'")


def _rope(path: Path, spec: Mapping[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    rope = spec.get("rope_parameters") or spec.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or spec.get("rope_theta") or default_theta)
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return theta, None
        case "llama3":
            try:
                factors = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
                return theta, RopeScaling(*factors, original_max_len=rope["original_max_position_embeddings"])
            except KeyError as error:
                raise ValueError(f"{path}: llama3 RoPE scaling lacks the key {error.args[0]!r}") from error
        case other:
            raise ValueError(f"{path}: RoPE type {other!r} is not supported; expected 'default' or 'llama3'")


def _weight_files(path: Path) -> tuple[Path, ...]:
    index_path, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if not index_path.is_file():
        if not single.is_file():
            raise FileNotFoundError(f"{path}: neither {single.name} nor {index_path.name} is there")
        return (single,)
    index = _read_json(index_path)
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{index_path}: no weight_map")
    files = tuple(path / name for name in sorted(set(index["weight_map"].values())))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; {index_path.name} names it")
    return files


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error


def _tokenizer(path: Path, spec: Mapping[str, Any], vocab_size: int) -> tokenizer.Tokenizer:
    generation_path = path / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    eos = generation.get("eos_token_id", spec.get("eos_token_id"))
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    try:
        return tokenizer.from_json(path / "tokenizer.json", eos_ids, spec.get("bos_token_id")).with_vocab_size(
            vocab_size
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _chat_template(path: Path) -> str | None:
    """Text of the model's own Jinja template, wherever it is kept."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    if (path / "tokenizer_config.json").is_file():
        template = _read_json(path / "tokenizer_config.json").get("chat_template")
        return template if isinstance(template, str) else None
    return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content
