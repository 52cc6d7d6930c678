"""How is a llama2.c model read?  Weights of format v0 (`stories260K.bin`) and its `tok512.bin` vocabulary.

Source: karpathy/llama2.c, run.c (`memory_map_weights`, `build_tokenizer`, `encode`, `decode`).
"""

import itertools
import math
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from nanojax.config import ModelConfig
from nanojax.weights import chat
from nanojax.weights.checkpoint import Checkpoint, source_shapes, unpermute
from nanojax.weights.pieces import piece_encoder
from nanojax.weights.tokenizer import Tokenizer

_HEADER = "<7i"
_BOS, _EOS, _FIRST_BYTE, _FIRST_PIECE = 1, 2, 3, 259


def open_llama2c(path: Path) -> Checkpoint:
    """Opens a v0 `.bin`.  Its vocabulary is `tok{V}.bin` or `tokenizer.bin` in the same folder.

    Raises FileNotFoundError for a missing file, ValueError for a size that does not match the header.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    config = _model_config(path)
    offsets, num_floats = _layout(config)
    header_bytes = struct.calcsize(_HEADER)
    expected_bytes = header_bytes + 4 * num_floats
    if path.stat().st_size != expected_bytes:
        raise ValueError(
            f"{path}: truncated or corrupt: {path.stat().st_size} bytes; its header needs {expected_bytes}"
        )
    floats = np.memmap(path, "<f4", mode="r", offset=header_bytes)
    shapes = source_shapes(config)

    def read(name: str) -> Float32[np.ndarray, "..."]:
        shape = shapes[name]
        values = np.array(floats[offsets[name] :][: math.prod(shape)]).reshape(shape)
        heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(name.rpartition(".")[2])
        return values if heads is None else unpermute(values, heads)

    tokenizer = _find_tokenizer(path, config.vocab_size)
    return Checkpoint(config, (path,), read, tokenizer, chat.TEMPLATES["raw"])


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Tokenizer of a llama2.c vocabulary file.  BOS 1 and EOS 2 have no text; ids 3..258 are bytes.

    Raises FileNotFoundError, or ValueError if the file does not hold exactly `vocab_size` pieces.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    data, at = path.read_bytes(), 4
    pieces: list[bytes] = []
    scores: list[float] = []
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, at)
            (piece,) = struct.unpack_from(f"{length}s", data, at + 8)
            pieces.append(piece)
            scores.append(score)
            at += 8 + length
    except struct.error as error:
        raise ValueError(f"{path}: truncated after {len(pieces)} of {vocab_size} pieces") from error
    if at != len(data):
        raise ValueError(
            f"{path}: {len(data) - at} bytes follow the {vocab_size} pieces; corrupt, or another vocabulary"
        )
    pieces[_BOS] = pieces[_EOS] = b""
    pieces[_FIRST_BYTE:_FIRST_PIECE] = [bytes((byte,)) for byte in range(256)]
    byte_ids = {byte: _FIRST_BYTE + byte for byte in range(256)}
    encode = piece_encoder(pieces, scores, frozenset(range(_FIRST_PIECE, vocab_size)), byte_ids, prefix_space=True)
    return Tokenizer(encode, tuple(pieces), eos_ids=(_BOS, _EOS), bos_id=_BOS, add_bos=True, space_after_bos=True)


def _model_config(path: Path) -> ModelConfig:
    with path.open("rb") as stream:
        header = stream.read(struct.calcsize(_HEADER))
    if len(header) < struct.calcsize(_HEADER):
        raise ValueError(f"{path}: truncated: {len(header)} bytes; the header alone has {struct.calcsize(_HEADER)}")
    fields = struct.unpack(_HEADER, header)
    width, ffn, layers, heads, kv_heads, vocab, max_len = fields
    if min(width, ffn, layers, heads, kv_heads, max_len, abs(vocab)) <= 0 or width % heads or heads % kv_heads:
        raise ValueError(
            f"{path}: no llama2.c v0 header: (dim, hidden, layers, heads, kv_heads, vocab, seq_len) = {fields}"
        )
    return ModelConfig(
        name=path.stem, num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=width // heads, d_ff=ffn, vocab_size=abs(vocab), max_len=max_len, tied_head=vocab > 0,
    )  # fmt: skip


def _layout(config: ModelConfig) -> tuple[dict[str, int], int]:
    """Our name -> offset in floats behind the header, and the number of floats in all.

    Each role is stored for all layers in a row; two unused RoPE tables follow the final norm.
    """
    shapes = source_shapes(config)
    roles = ("attn_norm", "q", "k", "v", "out", "ffn_norm", "gate", "down", "up")
    names = ["embed", *(f"layers.{i}.{role}" for role in roles for i in range(config.num_layers)), "final_norm"]
    sizes = [math.prod(shapes[name]) for name in names]
    offsets = dict(zip(names, itertools.accumulate(sizes, initial=0), strict=False))
    end = sum(sizes) + config.max_len * config.head_dim
    if config.tied_head:
        return offsets, end
    return offsets | {"head": end}, end + math.prod(shapes["head"])


def _find_tokenizer(path: Path, vocab_size: int) -> Tokenizer | None:
    for name in (f"tok{vocab_size}.bin", "tokenizer.bin"):
        if (path.parent / name).is_file():
            return read_tokenizer(path.parent / name, vocab_size)
    return None
