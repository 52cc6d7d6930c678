"""What did the report find, on one screen?  Each aim beside the best number of the records in a folder."""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.comparison import text_table

Rows = list[dict[str, Any]]


def rows_of(out: pathlib.Path, part: str) -> Rows:
    """The rows of a part's record; none if there is no record."""
    path = out / f"{part}.json"
    if not path.exists():
        return []
    columns = json.loads(path.read_text(encoding="utf-8"))["series"]["rows"]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def table(out: pathlib.Path, parts: Sequence[str]) -> str:
    """Parts with their cases by status, then the aims."""
    states = []
    for part in parts:
        path = out / f"{part}.json"
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            counts = {k.removeprefix("num_cases_"): v for k, v in record["metrics"].items() if v}
            words = ", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing"
            states.append((part, record["origin"], record["device"]["name"], words))
        else:
            states.append((part, "-", "-", "not run"))
    heads = ("part", "origin", "device", "cases")
    first = text_table({name: [state[i] for state in states] for i, name in enumerate(heads)})
    found = list(aims(out))
    if not found:
        return first
    second = text_table(
        {name: [one[i] for one in found] for i, name in enumerate(("aim", "found", "wanted", "is met"))}
    )
    return f"{first}\n\n{second}"


def aims(out: pathlib.Path) -> Iterator[tuple[str, float | None, str, str]]:
    """(what, the best number found, what is wanted, whether it is met), of what was measured."""
    checked = [row for row in rows_of(out, "kernels") if row.get("is_ok") is not None]
    if checked:
        num_ok = sum(row["is_ok"] for row in checked)
        yield "kernels right", num_ok, f"{len(checked)}", _met(num_ok == len(checked))
    speeds = rows_of(out, "kernel_speed")
    yield from _attention_aims(out, speeds)
    yield from _matmul_aims(speeds)
    pairs = [row for row in rows_of(out, "pairs") if row.get("form")]  # not what was meant to run in turn
    ratio = _best(pairs, "time_over_sum", min)
    if ratio is not None:
        yield "best pair, T / (T1 + T2)", ratio, "<= 0.85", _met(ratio <= 0.85)
    served = rows_of(out, "end_to_end")
    percent = _best(served, "percent_of_optimal", max)
    if percent is not None:
        yield "end to end, % of optimal", percent, ">= 72", _met(percent >= 72)
    for lengths in dict.fromkeys(row.get("lengths") for row in served):
        own = [row for row in served if row.get("lengths") == lengths and row.get("driver") == "dispatch_ahead"]
        in_order = _best([row for row in own if row["pipeline"] == "sequential"], "total_tokens_per_s", max)
        overlapped = _best([row for row in own if row.get("uses_streams")], "total_tokens_per_s", max)
        if in_order and overlapped:
            gain = overlapped / in_order
            yield f"best overlap over sequential, {lengths}", gain, ">= 1.10", _met(gain >= 1.10)


def _attention_aims(out: pathlib.Path, speeds: Rows) -> Iterator[tuple[str, float | None, str, str]]:
    """Decode by bandwidth, whole prompts by FLOP/s."""
    copy = _best([row for row in rows_of(out, "peaks") if row.get("what") == "copy"], "rate_per_s", max)
    attention = [row for row in speeds if row.get("kind") == "attention"]
    for job in dict.fromkeys(row["job"] for row in attention):
        own = [row for row in attention if row["job"] == job]
        bytes_per_s, flops_per_s = (_best(own, column, max) for column in ("bytes_per_s", "flops_per_s"))
        if job.startswith("decode") and copy and bytes_per_s:
            yield f"{job}, % of copy bandwidth", 100 * bytes_per_s / copy, ">= 85", _met(bytes_per_s >= 0.85 * copy)
        if job.startswith("prefill") and flops_per_s:
            yield f"{job}, TFLOP/s", flops_per_s / 1e12, ">= 400", _met(flops_per_s >= 400e12)


def _matmul_aims(speeds: Rows) -> Iterator[tuple[str, float | None, str, str]]:
    """The report's own product beside cuBLAS, operation by operation at 512 tokens and more."""
    matmul = [row for row in speeds if row.get("kind") == "matmul"]
    for job, num_tokens in dict.fromkeys((row["job"], row["num_tokens"]) for row in matmul):
        own = [row for row in matmul if (row["job"], row["num_tokens"]) == (job, num_tokens)]
        cublas_s = _best([row for row in own if row["program"] == "xla"], "median_s", min)
        ours_s = _best([row for row in own if row["program"] != "xla"], "median_s", min)
        if cublas_s and ours_s:
            name = f"matmul {job} x {num_tokens} tokens, % of cuBLAS"
            yield name, 100 * cublas_s / ours_s, ">= 85", _met(cublas_s >= 0.85 * ours_s)


def _best(rows: Sequence[Mapping[str, Any]], column: str, choose: Callable[..., float]) -> float | None:
    return choose((row[column] for row in rows if row.get(column) is not None), default=None)


def _met(is_met: bool) -> str:
    return "yes" if is_met else "no"
