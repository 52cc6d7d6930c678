"""How are public traces read?  One loader; the format is recognised by its header (csv) or first keys (jsonl).

| source | columns or keys | times |
|---|---|---|
| Azure 2023 (Splitwise), NanoFlow | `TIMESTAMP,ContextTokens,GeneratedTokens` | date and time, or `XXX` for none |
| Vidur, Sarathi | `[arrived_at,]num_prefill_tokens,num_decode_tokens[,...]` | s, or none |
| Mooncake (jsonl) | `timestamp, input_length, output_length, hash_ids` | ms |
| LLMServingSim (jsonl) | `input_toks, output_toks, arrival_time_ns, input_tok_ids, output_tok_ids` | ns |
| ShareGPT lengths, derived | `conversation_index,id,num_turns,prompt_tokens,response_tokens` | none |

Files may be gzip'ed.  Requests are sorted by arrival (stable) and the first one arrives at 0 s.
"""

import csv
import gzip
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from nanojax.workload.request import Trace

__all__ = ["load_trace"]

# input column, output column, time column
CSV_FORMATS = (
    ("ContextTokens", "GeneratedTokens", "TIMESTAMP"),
    ("num_prefill_tokens", "num_decode_tokens", "arrived_at"),
    ("prompt_tokens", "response_tokens", None),
)
# input key, output key, time key, ticks per second
JSONL_FORMATS = (
    ("input_length", "output_length", "timestamp", 1e3),
    ("input_toks", "output_toks", "arrival_time_ns", 1e9),
)
NO_TIMESTAMP = "XXX"
MOONCAKE_BLOCK_LEN = 512


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Reads a trace file of one of the formats above; its name is the file name without extensions.

    Raises FileNotFoundError; ValueError, naming the file and line, for an unknown format, an empty file, a row that
    cannot be read, or a row with a missing field.
    """
    path = pathlib.Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    name = path.name.split(".")[0]
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        lines = (line for line in file if line.strip())
        first = next(lines, None)
        if first is None:
            raise ValueError(f"{path}: the file is empty")
        rest = [first, *lines]
    return _load_jsonl(name, path, rest) if first.lstrip().startswith("{") else _load_csv(name, path, rest)


def _load_csv(name: str, path: pathlib.Path, lines: Iterable[str]) -> Trace:
    rows = list(csv.reader(lines))
    header = [column.strip() for column in rows[0]]
    columns = next((c for c in CSV_FORMATS if {c[0], c[1]} <= set(header)), None)
    if columns is None:
        known = "; ".join(",".join(filter(None, c)) for c in CSV_FORMATS)
        raise ValueError(f"{path}: unknown trace format, header {','.join(header)!r}; known columns: {known}")
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise ValueError(f"{path}, row {line}: {len(row)} fields, the header has {len(header)}: {','.join(row)!r}")
    input_column, output_column, time_column = columns
    texts = {column: [row[i] for row in rows[1:]] for i, column in enumerate(header)}
    return _trace(
        name,
        _times_s(path, texts[time_column]) if time_column in texts else np.zeros(len(rows) - 1),
        _lens(path, input_column, texts[input_column]),
        _lens(path, output_column, texts[output_column]),
    )


def _load_jsonl(name: str, path: pathlib.Path, lines: Iterable[str]) -> Trace:
    rows = []
    for line, text in enumerate(lines, start=1):
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, row {line}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {line}: a JSON object was expected, got {text[:40]!r}")
        rows.append(row)
    keys = next((k for k in JSONL_FORMATS if {k[0], k[1]} <= rows[0].keys()), None)
    if keys is None:
        known = "; ".join(", ".join(k[:3]) for k in JSONL_FORMATS)
        raise ValueError(f"{path}: unknown trace format, keys {', '.join(rows[0])!r}; known keys: {known}")
    input_key, output_key, time_key, ticks_per_s = keys
    for line, row in enumerate(rows, start=1):
        if missing := {input_key, output_key, time_key} - row.keys():
            raise ValueError(f"{path}, row {line}: no {', '.join(sorted(missing))}")
    times = _numbers(path, time_key, [row[time_key] for row in rows], np.float64)
    return _trace(
        name,
        times / ticks_per_s,
        _lens(path, input_key, [row[input_key] for row in rows]),
        _lens(path, output_key, [row[output_key] for row in rows]),
        prefix_blocks=_id_lists(path, "hash_ids", rows),
        prompt_ids=_id_lists(path, "input_tok_ids", rows),
    )


def _trace(name: str, times_s: np.ndarray, input_lens: np.ndarray, output_lens: np.ndarray, **ids) -> Trace:
    order = np.argsort(times_s, kind="stable")
    return Trace(
        name,
        times_s[order] - times_s[order][:1],
        input_lens[order],
        output_lens[order],
        prefix_block_len=MOONCAKE_BLOCK_LEN,
        **{key: None if lists is None else tuple(lists[i] for i in order) for key, lists in ids.items()},
    )


def _times_s(path: pathlib.Path, texts: Sequence[str]) -> Float64[np.ndarray, "n"]:
    if all(text == NO_TIMESTAMP for text in texts):
        return np.zeros(len(texts))
    try:
        return np.array(texts, np.float64)  # seconds, as Vidur and Sarathi write them
    except ValueError:
        pass
    try:
        ticks = np.array(texts, "datetime64[ns]")
    except ValueError as error:
        raise ValueError(f"{path}: a time stamp cannot be read: {error}") from error
    return (ticks - ticks.min()).astype(np.int64) / 1e9


def _lens(path: pathlib.Path, column: str, values: Sequence) -> Int64[np.ndarray, "n"]:
    return _numbers(path, column, values, np.int64)


def _numbers(path: pathlib.Path, column: str, values: Sequence, dtype: type) -> np.ndarray:
    try:
        return np.array(values, dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: column {column} holds something that is no number: {error}") from error


def _id_lists(path: pathlib.Path, key: str, rows: Sequence[dict]) -> list[tuple[int, ...]] | None:
    if key not in rows[0]:
        return None
    bad = next((line for line, row in enumerate(rows, start=1) if not isinstance(row.get(key), list)), None)
    if bad is not None:
        raise ValueError(f"{path}, row {bad}: {key} must be a list of ids")
    return [tuple(row[key]) for row in rows]
