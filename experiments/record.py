"""What does a run leave behind?  One JSON record: where its numbers come from, how to get them again, the numbers.

    {experiment, origin, command, commit, device, versions, seed, config, metrics, series}

`metrics` maps names that carry their unit to numbers (or null).  `series` maps a table's name to its columns, lists of
equal length: `timeline` (`nanojax.metrics.step_series`), `latency` (one row per request rate), `sweep` (one row per
point).  Plots are made from records only (`experiments/plots.py`).
"""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nanojax import hardware

__all__ = ["ORIGINS", "command_line", "make_record", "read_record", "validate_record", "write_record"]

ORIGINS = ("measured", "compiled", "simulated", "published")
ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "nanojax")
SCHEMA: dict[str, type] = {
    "experiment": str, "origin": str, "command": str, "commit": str, "device": dict, "versions": dict, "seed": int,
    "config": dict, "metrics": dict, "series": dict,
}  # fmt: skip
# One of these words, between underscores, gives a metric's unit (`ttft_s_p50`, `num_pages`, `budget_fill_fraction`).
UNITS = (
    "bytes", "flops", "fraction", "num", "pages", "percent", "ratio", "registers", "s", "steps", "token", "tokens",
)  # fmt: skip
SERIES_DIGITS = 6


def make_record(
    experiment: str,
    origin: str,
    *,
    metrics: Mapping[str, int | float | None],
    config: Mapping[str, Any],
    seed: int,
    series: Mapping[str, Mapping[str, Sequence]] | None = None,
    device: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """A valid record of a run in this process.

    origin: measured (wall clock on `device`), compiled (read off code compiled for a `device` that is not there),
    simulated (modelled), published (the source belongs into `config`).
    device: what `detect()` says unless given; its `name` is shown in plots.    command: this process's unless given.
    Series are rounded to 6 significant digits, which keeps records small; metrics are kept as they are.
    Raises ValueError as `validate_record` does.
    """
    record = {
        "experiment": experiment,
        "origin": origin,
        "command": command_line(sys.argv) if command is None else command,
        "commit": _commit(),
        "device": _device() if device is None else dict(device),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "seed": seed,
        "config": dict(config),
        "metrics": dict(metrics),
        "series": {
            table: {column: [_rounded(value) for value in values] for column, values in columns.items()}
            for table, columns in (series or {}).items()
        },
    }
    validate_record(record)
    return record


def write_record(record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a valid record (ValueError else); makes the folder.  One line per entry, lists on one line."""
    validate_record(record)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_to_json(record) + "\n", encoding="utf-8")


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and validates.  Raises FileNotFoundError, or ValueError that names the file and the offending key."""
    try:
        record = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        validate_record(record)
    except ValueError as error:  # a JSONDecodeError is one
        raise ValueError(f"{path}: {error}") from error
    return record


def validate_record(record: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first offending key, what it holds and what it should."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a record is a JSON object, got {type(record).__name__}")
    for key in (*SCHEMA, *record):
        if key not in SCHEMA:
            raise ValueError(f"key {key!r} is not part of a record: {', '.join(SCHEMA)}")
        if key not in record:
            raise ValueError(f"key {key!r} is missing")
        if not isinstance(record[key], SCHEMA[key]) or isinstance(record[key], bool):
            raise ValueError(f"{key}={record[key]!r} must be of type {SCHEMA[key].__name__}")
    if record["origin"] not in ORIGINS:
        raise ValueError(f"origin={record['origin']!r} must be one of {', '.join(ORIGINS)}")
    if not isinstance(record["device"].get("name"), str):
        raise ValueError(f"device={record['device']!r} must have a 'name'")
    for name, value in record["metrics"].items():
        if not (value is None or _is_number(value)):
            raise ValueError(f"metrics[{name!r}]={value!r} must be a finite number or null")
        if not set(name.split("_")) & set(UNITS):
            raise ValueError(
                f"metrics[{name!r}]: the name carries no unit; one of its words must be {', '.join(UNITS)}"
            )
    for table, columns in record["series"].items():
        _validate_table(table, columns)
    try:
        json.dumps(record["config"], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config cannot be written as JSON: {error}") from error


def command_line(argv: Sequence[str], root: pathlib.Path = ROOT) -> str:
    """The command as one would type it in the checkout: no absolute path of this machine is in it."""
    script, *arguments = argv
    path = pathlib.Path(script).resolve()
    if path.is_relative_to(root) and path.suffix == ".py":
        words = ["python", "-m", ".".join(path.relative_to(root).with_suffix("").parts)]
    else:
        words = [path.name]
    return shlex.join([*words, *(_without_folders(argument, root) for argument in arguments)])


def _without_folders(argument: str, root: pathlib.Path) -> str:
    flag, equals, value = argument.rpartition("=")
    path = pathlib.Path(value)
    if not path.is_absolute():
        return argument
    return flag + equals + (str(path.relative_to(root)) if path.is_relative_to(root) else path.name)


def _validate_table(table: str, columns: Any) -> None:
    if not isinstance(columns, Mapping):
        raise ValueError(f"series[{table!r}] must map column names to lists, got {type(columns).__name__}")
    lengths = {}
    for name, column in columns.items():
        if not isinstance(column, list):
            raise ValueError(f"series[{table!r}][{name!r}] must be a list, got {type(column).__name__}")
        for value in column:
            if not (value is None or isinstance(value, (str, bool)) or _is_number(value)):
                raise ValueError(f"series[{table!r}][{name!r}] holds {value!r}, not a finite number, text or null")
        lengths[name] = len(column)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"series[{table!r}] has columns of different lengths: {lengths}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _rounded(value: Any) -> Any:
    return float(f"{value:.{SERIES_DIGITS}g}") if isinstance(value, float) else value


def _to_json(value: Any, indent: str = "") -> str:
    if isinstance(value, Mapping) and value:
        inner = indent + "  "
        lines = [f"{inner}{json.dumps(key)}: {_to_json(entry, inner)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + "\n" + indent + "}"
    return json.dumps(value, allow_nan=False)


def _device() -> dict[str, Any]:
    device = hardware.detect()
    return {"name": device.name, "kind": device.kind, "num_cores": device.num_cores, "num_devices": device.num_devices}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _commit(root: pathlib.Path = ROOT) -> str:
    """Commit of the checkout, `-dirty` when tracked files differ from it; "unknown" without git or without a commit."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
