"""What does a GGUF file hold, and how is it read as a checkpoint?

The header is parsed here with `struct` (the `gguf` package's reader makes one array view per vocabulary entry: 2 s
for SmolLM2, against 0.1 s), block formats are decoded by the `gguf` package's own classes, in large slabs.
"""

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from jaxtyping import Float32, UInt8

from nanojax.config import ModelConfig, RopeScaling
from nanojax.weights import chat, tokenizer
from nanojax.weights.checkpoint import Checkpoint, check_tensors, source_shapes

ARCHITECTURES = ("llama", "qwen2")
_SLAB_BLOCKS = 16384
"""Blocks decoded at once: temporaries of a few MB stay in the cache, and the loop costs nothing."""

_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H", GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i", GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f", GGUFValueType.FLOAT64: "<d", GGUFValueType.BOOL: "<?",
}  # fmt: skip
_FLOATS = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
_NAMES = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
_LAYER_NAMES = {
    "attn_norm": "attn_norm.weight", "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight",
    "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias", "out": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight", "gate": "ffn_gate.weight", "up": "ffn_up.weight", "down": "ffn_down.weight",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: row-major shape, block format, byte range in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start_bytes: int
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A parsed header over the mapped bytes of the file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data: UInt8[np.ndarray, "file"]


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

    try:
        tokens = tokenizer.from_gguf(file.metadata).with_vocab_size(config.vocab_size)
    except KeyError as error:
        raise ValueError(f"{path}: metadata key tokenizer.ggml.{error.args[0]} is missing") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    family = chat.family_of(file.metadata.get("tokenizer.chat_template"), config.name)
    return Checkpoint(config, (path,), read, tokens, chat.TEMPLATES[family])


def parse_gguf(path: Path) -> GgufFile:
    """Header of a GGUF file, versions 2 and 3.  Raises FileNotFoundError or ValueError (magic, version, truncated)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: truncated: {path.stat().st_size} bytes; a GGUF header alone has 24")
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    magic, version, num_tensors, num_fields = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF":
        raise ValueError(f"{path}: magic {magic!r}; expected b'GGUF'")
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version}; expected 2 or 3")
    try:
        metadata, at = _fields(data, num_fields)
        infos, at = _tensor_infos(data, num_tensors, at)
    except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as error:
        raise ValueError(f"{path}: truncated or corrupt header: {error}") from error
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    base = -(-at // alignment) * alignment
    tensors = {name: dataclasses.replace(info, start_bytes=base + info.start_bytes) for name, info in infos.items()}
    for name, info in tensors.items():
        if info.start_bytes + info.size_bytes > data.size:
            raise ValueError(
                f"{path}: truncated: tensor {name!r} ends at byte {info.start_bytes + info.size_bytes}; the file has {data.size}"
            )
    return GgufFile(path, metadata, tensors, data)


def dequantize(file: GgufFile, name: str) -> Float32[np.ndarray, "..."]:
    """Tensor `name` in float32, row-major `[out, in]`.  Raises ValueError for a block format that `gguf` cannot decode."""
    tensor = file.tensors[name]
    raw = file.data[tensor.start_bytes : tensor.start_bytes + tensor.size_bytes]
    if tensor.kind in _FLOATS:
        return raw.view(_FLOATS[tensor.kind]).astype(np.float32).reshape(tensor.shape)
    decoder = getattr(gguf.quants, tensor.kind.name, None)
    if decoder is None:
        raise ValueError(f"{file.path}: tensor {name!r} has block format {tensor.kind.name}, which the gguf package cannot decode")
    decoder.init_grid()
    blocks = raw.reshape(-1, decoder.type_size)
    values = np.empty((len(blocks), decoder.block_size), np.float32)
    for start in range(0, len(blocks), _SLAB_BLOCKS):
        slab = slice(start, start + _SLAB_BLOCKS)
        values[slab] = decoder.dequantize_blocks(blocks[slab])
    return values.reshape(tensor.shape)


def unpermute(rows: Float32[np.ndarray, "rows *D"], num_heads: int) -> Float32[np.ndarray, "rows *D"]:
    """Rows of interleaved RoPE pairs (2i, 2i+1) -> half-split pairs (i, i + h/2), head by head."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


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
            raise ValueError(f"{file.path}: {architecture}.{key} is {value(key)!r}, which is not supported; expected {plain!r}")
    head_dim = count("attention.key_length", count("embedding_length") // count("attention.head_count"))
    for key in ("rope.dimension_count", "attention.value_length"):
        if value(key, head_dim) != head_dim:
            raise ValueError(f"{file.path}: {architecture}.{key} is {value(key)}; only the head dimension {head_dim} is supported")
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
        raise ValueError(f"{file.path}: tensor 'rope_freqs.weight' is not the Llama 3.1 scaling of {scaling}; found {divisors[:4]}...")
    return scaling


def _fields(data: UInt8[np.ndarray, "file"], num_fields: int) -> tuple[dict[str, Any], int]:
    fields, at = {}, 24
    for _ in range(num_fields):
        name, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        fields[name], at = _value(data, at + 4, GGUFValueType(kind))
    return fields, at


def _value(data: UInt8[np.ndarray, "file"], at: int, kind: GGUFValueType) -> tuple[Any, int]:
    if kind == GGUFValueType.STRING:
        return _string(data, at)
    if kind != GGUFValueType.ARRAY:
        return struct.unpack_from(_SCALARS[kind], data, at)[0], at + struct.calcsize(_SCALARS[kind])
    item_code, length = struct.unpack_from("<IQ", data, at)
    item_kind, at = GGUFValueType(item_code), at + 12
    if item_kind in _SCALARS:
        item = np.dtype(_SCALARS[item_kind])
        return np.frombuffer(data, item, length, at).tolist(), at + item.itemsize * length
    if item_kind == GGUFValueType.STRING:
        return _strings(data, at, length)
    items = []
    for _ in range(length):
        element, at = _value(data, at, item_kind)
        items.append(element)
    return items, at


def _string(data: UInt8[np.ndarray, "file"], at: int) -> tuple[str, int]:
    (text,), at = _strings(data, at, 1)
    return text, at


def _strings(data: UInt8[np.ndarray, "file"], at: int, count: int) -> tuple[list[str], int]:
    buffer, texts = memoryview(data), []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", buffer, at)
        end = at + 8 + length
        if end > len(buffer):
            raise ValueError(f"a string at byte {at} ends at byte {end}; the file has {len(buffer)}")
        texts.append(str(buffer[at + 8 : end], "utf-8"))
        at = end
    return texts, at


def _tensor_infos(data: UInt8[np.ndarray, "file"], num_tensors: int, at: int) -> tuple[dict[str, GgufTensor], int]:
    """Tensor table; `start_bytes` is still relative to the data section."""
    infos = {}
    for _ in range(num_tensors):
        name, at = _string(data, at)
        (num_dims,) = struct.unpack_from("<I", data, at)
        *dims, code, start = struct.unpack_from(f"<{num_dims}QIQ", data, at + 4)
        at += 4 + 8 * num_dims + 12
        kind, shape = GGMLQuantizationType(code), tuple(reversed(dims))
        block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
        infos[name] = GgufTensor(shape, kind, start, math.prod(shape) // block_size * type_size)
    return infos, at
