"""What does a GGUF file hold?  Its metadata, its tensor table, and tensors decoded to float32.

The header is parsed here with `struct` (the `gguf` package's reader makes an array view per vocabulary entry: 2 s for
SmolLM2, against 0.1 s); block formats are decoded by the `gguf` package's own classes, in large slabs.
"""

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from jaxtyping import Float16, Float32, UInt8

_SLAB_BLOCKS = 16384
"""Blocks decoded at once: temporaries of a few MB stay in the cache, and the loop costs nothing."""

_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H", GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i", GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f", GGUFValueType.FLOAT64: "<d", GGUFValueType.BOOL: "<?",
}  # fmt: skip
_BLOCK = 32
_BITS = {GGMLQuantizationType.Q4_0: 4, GGMLQuantizationType.Q4_1: 4, GGMLQuantizationType.Q8_0: 8}
_FLOATS = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


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


def parse_gguf(path: Path) -> GgufFile:
    """Header of a GGUF file, versions 2 and 3.  Raises FileNotFoundError or ValueError (magic, version, truncated)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: truncated: {path.stat().st_size} bytes; a GGUF header alone has 24")
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    magic, version, num_tensors, num_fields = struct.unpack_from("<4sIQQ", data.data)
    if magic != b"GGUF":
        raise ValueError(f"{path}: magic {magic!r}; expected b'GGUF'")
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version}; expected 2 or 3")
    try:
        metadata, at = _fields(data.data, num_fields)
        infos, at = _tensor_infos(data.data, num_tensors, at)
    except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as error:
        raise ValueError(f"{path}: truncated or corrupt header: {error}") from error
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    base = -(-at // alignment) * alignment
    tensors = {name: dataclasses.replace(info, start_bytes=base + info.start_bytes) for name, info in infos.items()}
    for name, info in tensors.items():
        if info.start_bytes + info.size_bytes > data.size:
            end = info.start_bytes + info.size_bytes
            raise ValueError(f"{path}: truncated: tensor {name!r} ends at byte {end}; the file has {data.size}")
    return GgufFile(path, metadata, tensors, data)


class Blocks(NamedTuple):
    """A matrix as `scale * codes + least`, scale and least value of 32 weights of a row each."""

    codes: UInt8[np.ndarray, "*out inner"]
    scale: Float16[np.ndarray, "*out blocks"]
    least: Float16[np.ndarray, "*out blocks"]


def num_bits(file: GgufFile, name: str) -> int:
    """Bits of a weight of tensor `name`, if `read_blocks` reads its format; else 0."""
    return _BITS.get(file.tensors[name].kind, 0)


def read_blocks(file: GgufFile, name: str) -> Blocks:
    """Tensor `name`, `[out, in]`, as it lies in the file.  Raises KeyError where `num_bits` is 0."""
    tensor = file.tensors[name]
    bits = _BITS[tensor.kind]
    num_heads = 2 if tensor.kind == GGMLQuantizationType.Q4_1 else 1  # float16 numbers before the codes
    raw = file.data[tensor.start_bytes : tensor.start_bytes + tensor.size_bytes]
    raw = raw.reshape(-1, 2 * num_heads + _BLOCK * bits // 8)
    heads = np.ascontiguousarray(raw[:, : 2 * num_heads]).view(np.float16)
    codes = raw[:, 2 * num_heads :]
    codes = codes ^ np.uint8(128) if bits == 8 else np.concatenate([codes & 15, codes >> 4], axis=1)
    scale = heads[:, 0]
    least = heads[:, 1] if num_heads == 2 else scale * np.float16(-(1 << bits - 1))
    shape = *tensor.shape[:-1], -1
    return Blocks(codes.reshape(tensor.shape), scale.reshape(shape), least.reshape(shape))


def dequantize(file: GgufFile, name: str) -> Float32[np.ndarray, "..."]:
    """Tensor `name` in float32, row-major `[out, in]`.

    Raises ValueError for a block format that the `gguf` package cannot decode.
    """
    tensor = file.tensors[name]
    raw = file.data[tensor.start_bytes : tensor.start_bytes + tensor.size_bytes]
    if tensor.kind in _FLOATS:
        return raw.view(_FLOATS[tensor.kind]).astype(np.float32).reshape(tensor.shape)
    decoder = getattr(gguf.quants, tensor.kind.name, None)
    if decoder is None:
        raise ValueError(
            f"{file.path}: tensor {name!r} has block format {tensor.kind.name}, which the gguf package cannot decode"
        )
    decoder.init_grid()
    blocks = raw.reshape(-1, decoder.type_size)
    values = np.empty((len(blocks), decoder.block_size), np.float32)
    for start in range(0, len(blocks), _SLAB_BLOCKS):
        slab = slice(start, start + _SLAB_BLOCKS)
        values[slab] = decoder.dequantize_blocks(blocks[slab])
    return values.reshape(tensor.shape)


def _fields(data: memoryview, num_fields: int) -> tuple[dict[str, Any], int]:
    fields, at = {}, 24
    for _ in range(num_fields):
        name, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        fields[name], at = _value(data, at + 4, GGUFValueType(kind))
    return fields, at


def _value(data: memoryview, at: int, kind: GGUFValueType) -> tuple[Any, int]:
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


def _string(data: memoryview, at: int) -> tuple[str, int]:
    (text,), at = _strings(data, at, 1)
    return text, at


def _strings(data: memoryview, at: int, count: int) -> tuple[list[str], int]:
    texts = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", data, at)
        end = at + 8 + length
        if end > len(data):
            raise ValueError(f"a string at byte {at} ends at byte {end}; the file has {len(data)}")
        texts.append(str(data[at + 8 : end], "utf-8"))
        at = end
    return texts, at


def _tensor_infos(data: memoryview, num_tensors: int, at: int) -> tuple[dict[str, GgufTensor], int]:
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
