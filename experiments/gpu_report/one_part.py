"""How does one part run in a process of its own?  Its cases in order; each result is a line of JSON for the parent.

    python -m experiments.gpu_report.one_part MODULE FIRST_CASE SECONDS SETTING_AS_JSON

Lines, on what was standard output (whatever a library prints there goes to standard error instead):

    {"begin": "name", "index": 3, "limit_s": 60}   a case starts; silence for longer than its limit means that it hangs
    {"rows": [...], "case": "name", "seconds": 1.2}   what it measured
    {"failed": "why", "case": "name", "seconds": 1.2}   it raised
    {"skipped": "why", "case": "name"}   no time left
    {"device": {...}, "versions": {...}}   first, once
    {"end": true}   all cases are dealt with
"""

import importlib
import json
import math
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, TextIO

import jax

from experiments.gpu_report.cases import Case, Row, Setting
from nanojax import hardware

MESSAGE_CHARACTERS = 400
# A kernel that faults leaves the process without a usable device: what comes after it would fail for no fault of its own.
POISON = ("CUDA_ERROR", "illegal memory access", "unspecified launch failure", "misaligned address", "CUDA error")
POISONED = 3
"""Exit status of a process that lost its device."""


def main(argv: Sequence[str]) -> int:
    """Runs the cases; gives the process's exit status."""
    module, first, seconds, setting_json = argv
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    given = json.loads(setting_json)
    setting = Setting(**{**given, "out": pathlib.Path(given["out"])})
    deadline_s = time.monotonic() + float(seconds)
    cases = importlib.import_module(module).cases(setting)
    _say(answers, device=device())
    for index, case in list(enumerate(cases))[int(first) :]:
        left_s = deadline_s - time.monotonic()
        if left_s < case.needs_s:
            _say(answers, skipped=f"needs {case.needs_s:.0f} s, {max(left_s, 0):.0f} s are left", case=case.name)
            continue
        _say(answers, begin=case.name, index=index, limit_s=case.limit_s)
        if _run(answers, case):
            return POISONED
    _say(answers, end=True)
    return 0


def _run(answers: TextIO, case: Case) -> bool:
    """Runs one case, says what came of it; whether the device is lost."""
    start_s = time.monotonic()
    try:
        rows = [plain(row) for row in case.run()]
    except (Exception, SystemExit) as error:  # whatever it is, the other cases shall run
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        _say(answers, failed=text[:MESSAGE_CHARACTERS], case=case.name, seconds=time.monotonic() - start_s)
        return any(word in text for word in POISON)
    _say(answers, rows=rows, case=case.name, seconds=time.monotonic() - start_s)
    return False


def _say(answers: TextIO, **message: Any) -> None:
    print(json.dumps(message), file=answers, flush=True)


def device() -> dict[str, Any]:
    """What a record says of it."""
    found = hardware.detect()
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return {
        "name": found.name, "kind": found.kind, "num_cores": found.num_cores, "num_devices": found.num_devices,
        "memory_bytes": memory,
    }  # fmt: skip


def plain(row: Row) -> Row:
    """What JSON and a record can hold: no numpy scalars, no infinities."""
    values = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
