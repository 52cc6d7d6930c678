"""How does text become token ids, and token ids text?

One small frozen `Tokenizer` for all sources.  Encoding is the source's own algorithm (Hugging Face `tokenizers`, or
score-merged pieces); decoding is always the same: join the bytes of the tokens and read them as UTF-8.
"""

import codecs
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import decoders, models, pre_tokenizers

from nanojax.weights.pieces import piece_encoder

_STOP_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")

# Split patterns of llama.cpp's pre-types (llama.cpp src/llama-vocab.cpp), checked there against Hugging Face.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT_PATTERNS = {"qwen2": _WORDS + r"\p{N}" + _REST, "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST}
PRE_TYPES = ("gpt-2", "smollm", *_SPLIT_PATTERNS)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text <-> ids.

    encode_text: text -> ids, no BOS added; special tokens written out in the text become their ids.
    token_bytes: what each id stands for; ids that the model has but the vocabulary lacks are empty.
    eos_ids: any of them ends a generation.
    add_bos: whether the model wants `bos_id` in front of every prompt.
    space_after_bos: the encoder puts a space in front of the text, which `decode` takes off again after a BOS.
    """

    encode_text: Callable[[str], Sequence[int]]
    token_bytes: tuple[bytes, ...]
    eos_ids: tuple[int, ...]
    bos_id: int | None
    add_bos: bool = False
    space_after_bos: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of ids, `0 <= id < vocab_size`."""
        return len(self.token_bytes)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of `text`, with one BOS in front where the model wants it (also when the text already begins with it)."""
        ids = tuple(self.encode_text(text))
        if self.add_bos and self.bos_id is not None and ids[:1] != (self.bos_id,):
            return (self.bos_id, *ids)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens written out.  Bytes that are not UTF-8 read as U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        stream = StreamDecoder(self)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def with_vocab_size(self, vocab_size: int) -> "Tokenizer":
        """The same tokenizer over a model's (padded) vocabulary.  Raises ValueError if the model has fewer ids."""
        if vocab_size < self.vocab_size:
            raise ValueError(f"the tokenizer has {self.vocab_size} ids; the model has only {vocab_size}")
        padding = (b"",) * (vocab_size - self.vocab_size)
        return dataclasses.replace(self, token_bytes=self.token_bytes + padding)


class StreamDecoder:
    """Decodes ids one at a time; an unfinished UTF-8 character waits until it is whole.

    The texts returned by `push` and the last `flush` join to `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = False

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes, possibly empty.  Raises ValueError for an id outside the vocabulary."""
        if not 0 <= token_id < self._tokenizer.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary [0, {self._tokenizer.vocab_size})")
        piece = self._tokenizer.token_bytes[token_id]
        if self._strip_space:
            piece = piece.removeprefix(b" ")
        self._strip_space = self._tokenizer.space_after_bos and token_id == self._tokenizer.bos_id
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is left of an unfinished character (U+FFFD), and a fresh start."""
        self._strip_space = False
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Tokenizer of a GGUF file's metadata (`tokenizer.ggml.*`).

    Score-merged vocabularies (`llama`) read special tokens in a text as plain text.
    As in llama.cpp, bytes for which the vocabulary has no token are left out (SmolLM2 lacks six control bytes).
    Raises ValueError for a tokenizer model other than `gpt2` and `llama`, or a pre-type outside `PRE_TYPES`.
    """
    prefix = "tokenizer.ggml."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    match fields.get("model"):
        case "gpt2":
            return _from_byte_level_fields(fields)
        case "llama":
            return _from_scored_fields(fields)
        case other:
            raise ValueError(f"{prefix}model is {other!r}; expected 'gpt2' or 'llama'")


def _from_byte_level_fields(fields: Mapping[str, Any]) -> Tokenizer:
    texts, kinds, pre_type = fields["tokens"], fields["token_type"], fields.get("pre", "gpt-2")
    is_special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    specials = [text for text, kind in zip(texts, kinds, strict=True) if kind in is_special]
    backend = _byte_level_bpe(texts, fields["merges"], specials, pre_type)
    return Tokenizer(
        _backend_encoder(backend),
        _byte_level_bytes(texts, {i for i, kind in enumerate(kinds) if kind != TokenType.NORMAL}),
        eos_ids=_eos_ids(fields),
        bos_id=fields.get("bos_token_id"),
        add_bos=bool(fields.get("add_bos_token", pre_type == "llama-bpe")),
    )


def _from_scored_fields(fields: Mapping[str, Any]) -> Tokenizer:
    token_bytes = tuple(
        _byte_of(text) if kind == TokenType.BYTE else text.replace("\u2581", " ").encode()
        for text, kind in zip(fields["tokens"], fields["token_type"], strict=True)
    )
    kinds = list(enumerate(fields["token_type"]))
    mergeable = {i for i, kind in kinds if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)}
    byte_ids = {token_bytes[i][0]: i for i, kind in kinds if kind == TokenType.BYTE}
    prefix_space = bool(fields.get("add_space_prefix", True))
    return Tokenizer(
        piece_encoder(token_bytes, fields["scores"], mergeable, byte_ids, prefix_space),
        token_bytes,
        eos_ids=_eos_ids(fields),
        bos_id=fields.get("bos_token_id"),
        add_bos=bool(fields.get("add_bos_token", True)),
        space_after_bos=prefix_space,
    )


def _eos_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that the file names, and control tokens whose text is a known end."""
    named = {fields[key] for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in fields}
    tokens = enumerate(zip(fields["tokens"], fields["token_type"], strict=True))
    known = {i for i, (text, kind) in tokens if kind == TokenType.CONTROL and text in _STOP_TEXTS}
    return tuple(sorted(named | known))


def from_json(path: Path, eos_ids: Sequence[int], bos_id: int | None) -> Tokenizer:
    """Tokenizer of a Hugging Face `tokenizer.json` (byte-level BPE, or SentencePiece BPE with byte fallback).

    BOS is added if the file's own post-processor adds it.  Raises FileNotFoundError, or ValueError that names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a Hugging Face directory needs its tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        spec = json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises bare Exception for every malformed file
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from error
    added = {token["id"]: token["content"] for token in spec["added_tokens"]}
    texts = [backend.id_to_token(i) or "" for i in range(max(backend.get_vocab(with_added_tokens=True).values()) + 1)]
    decoder_steps = _steps(spec["decoder"], "decoders")
    if "ByteLevel" in decoder_steps:
        token_bytes = _byte_level_bytes(texts, set(added))
    elif "ByteFallback" in decoder_steps:
        vocab_bytes = (_byte_of(text) if _is_byte(text) else text.replace("\u2581", " ").encode() for text in texts)
        token_bytes = tuple(added[i].encode() if i in added else piece for i, piece in enumerate(vocab_bytes))
    else:
        raise ValueError(f"{path}: decoder {decoder_steps} is not supported; expected ByteLevel or ByteFallback")
    starts_with_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]
    prefix_space = bool({"Strip", "Metaspace"} & set(decoder_steps))
    return Tokenizer(_backend_encoder(backend), token_bytes, tuple(eos_ids), bos_id, starts_with_bos, prefix_space)


def _byte_level_bpe(
    texts: Sequence[str], merges: Sequence[str], specials: Sequence[str], pre_type: str
) -> tokenizers.Tokenizer:
    if pre_type not in PRE_TYPES:
        raise ValueError(f"tokenizer.ggml.pre is {pre_type!r}; expected one of {PRE_TYPES}")
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    vocab = {text: i for i, text in enumerate(texts)}
    try:
        model = models.BPE(vocab, pairs, ignore_merges=pre_type == "llama-bpe")
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from error
    backend = tokenizers.Tokenizer(model)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_type not in _SPLIT_PATTERNS)
    if pre_type in _SPLIT_PATTERNS:
        pattern = tokenizers.Regex(_SPLIT_PATTERNS[pre_type])
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), words])
    elif pre_type == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    else:
        backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in specials])
    return backend


def _backend_encoder(backend: tokenizers.Tokenizer) -> Callable[[str], Sequence[int]]:
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _byte_level_bytes(texts: Sequence[str], verbatim_ids: set[int]) -> tuple[bytes, ...]:
    """Bytes of each token of GPT-2's byte alphabet; `verbatim_ids` (added tokens) stand for their own text."""
    byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
    return tuple(
        text.encode()
        if i in verbatim_ids
        else b"".join(bytes((byte_of[c],)) if c in byte_of else c.encode() for c in text)
        for i, text in enumerate(texts)
    )


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next code point from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _byte_of(text: str) -> bytes:
    return bytes((int(text[3:5], 16),))


def _steps(node: Mapping | None, children: str) -> list[str]:
    """Types of a tokenizer.json component and its children, in order."""
    if node is None:
        return []
    return [node["type"], *(child["type"] for child in node.get(children, ()))]
