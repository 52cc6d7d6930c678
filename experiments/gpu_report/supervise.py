"""How does a report survive its parts?  Each runs in a process that may fail, hang or lose its device; results are kept as they come.

A process that dies in a case is followed by one that goes on with the next case.  The record of a part is written anew after
every case, so that a report that is cut off keeps what it had.
"""

import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments.gpu_report.cases import Part, Row, Setting
from experiments.record import make_record, write_record

START_LIMIT_S = 90.0
"""Silence of a process before its first case: imports, and the device's first touch."""
GRACE_S = 10.0
STATUSES = ("ok", "failed", "hung", "died", "cut", "skipped")
"""How a case can end: hung without an answer, died with its process, cut off by the end of the part's time."""


@dataclasses.dataclass
class Outcome:
    """What a part has given so far.

    statuses: (case, one of `STATUSES`, why, seconds).
    """

    part: Part
    rows: list[Row] = dataclasses.field(default_factory=list)
    statuses: list[tuple[str, str, str, float]] = dataclasses.field(default_factory=list)
    device: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def count(self, status: str) -> int:
        """Cases that ended so."""
        return sum(one[1] == status for one in self.statuses)


def run_part(
    part: Part, setting: Setting, seconds: float, *, environment: Mapping[str, str], config: Mapping[str, Any],
    show: Callable[[str], None],
) -> Outcome:  # fmt: skip
    """Runs a part for at most about `seconds`; writes `<part>.json` and `<part>.log` into the folder of the report."""
    outcome, start_s = Outcome(part), time.monotonic()
    environment = {
        **environment,
        **({} if part.needs_device else {"JAX_PLATFORMS": "cpu"}),
        **({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if part.leaves_memory else {}),
    }
    log = setting.out / f"{part.name}.log"
    log.write_text("", encoding="utf-8")
    next_case: int | None = 0
    while next_case is not None:
        left_s = seconds - (time.monotonic() - start_s)
        if next_case and left_s < 5:
            outcome.statuses.append(("rest", "skipped", f"cases from number {next_case} on: no time left", 0.0))
            break
        next_case = _run_process(outcome, setting, next_case, left_s, log, environment, config, show)
    outcome.seconds = time.monotonic() - start_s
    write(outcome, setting, config)
    return outcome


def _run_process(
    outcome: Outcome, setting: Setting, first: int, seconds: float, log: pathlib.Path, environment: Mapping[str, str],
    config: Mapping[str, Any], show: Callable[[str], None],
) -> int | None:  # fmt: skip
    """One process from case `first` on; the case to go on with in another one, None if all is dealt with."""
    plain = json.dumps({**dataclasses.asdict(setting), "out": str(setting.out)})
    command = [
        sys.executable,
        "-m",
        "experiments.gpu_report.one_part",
        outcome.part.module,
        str(first),
        f"{seconds:.1f}",
    ]
    deadline_s = time.monotonic() + seconds + GRACE_S
    begun: tuple[str, int] | None = None
    begun_s, limit_s = time.monotonic(), START_LIMIT_S
    with log.open("a", encoding="utf-8") as log_file:
        process = subprocess.Popen(
            [*command, plain], stdout=subprocess.PIPE, stderr=log_file, text=True, env={**os.environ, **environment}
        )
        lines: queue.Queue[str | None] = queue.Queue()
        pump = threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True)
        pump.start()
        try:
            while True:
                wait_s = min(begun_s + limit_s, deadline_s) - time.monotonic()
                try:
                    line = lines.get(timeout=max(wait_s, 0.01))
                except queue.Empty:
                    ended = "hung" if time.monotonic() < deadline_s else "cut"
                    why = f"no answer for {time.monotonic() - begun_s:.0f} s"
                    break
                if line is None:
                    ended, why = "died", f"exit status {_exit_status(process)}; see {log.name}"
                    break
                message = json.loads(line)
                if message.get("end"):
                    return None
                if "begin" in message:
                    begun, limit_s = (message["begin"], message["index"]), message["limit_s"]
                elif _keep(outcome, message, show):
                    write(outcome, setting, config)
                begun_s = time.monotonic()
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            pump.join(GRACE_S)
    return _after_death(outcome, begun, ended, why, time.monotonic() - begun_s, first, show)


def _after_death(
    outcome: Outcome, begun: tuple[str, int] | None, ended: str, why: str, seconds: float, first: int,
    show: Callable[[str], None],
) -> int | None:  # fmt: skip
    """Books a process that did not end by itself; the case to go on with."""
    if begun is None:
        outcome.statuses.append((f"start at case {first}", ended, why, seconds))
        show(f"  {outcome.part.name}: process {ended} before its first case: {why}")
        return None
    name, index = begun
    if not any(status[0] == name for status in outcome.statuses):
        outcome.statuses.append((name, ended, why, seconds))
        show(f"  {name}: {ended}, {why}")
    return index + 1


def _keep(outcome: Outcome, message: dict[str, Any], show: Callable[[str], None]) -> bool:
    """Books an answer; whether it was about a case."""
    if "device" in message:
        outcome.device = message["device"]
        return False
    name, seconds = message["case"], message.get("seconds", 0.0)
    if "rows" in message:
        outcome.rows += [{"case": name, **row} for row in message["rows"]]
        outcome.statuses.append((name, "ok", "", seconds))
        show(f"  {name}: {len(message['rows'])} rows in {seconds:.1f} s")
    else:
        status = "failed" if "failed" in message else "skipped"
        outcome.statuses.append((name, status, message[status], seconds))
        show(f"  {name}: {status}, {message[status][:160]}")
    return True


def write(outcome: Outcome, setting: Setting, config: Mapping[str, Any]) -> None:
    """The record of a part: series `rows`, one column for each that any row has, and `cases`."""
    names = list(dict.fromkeys(name for row in outcome.rows for name in row))
    rows = {name: [row.get(name) for row in outcome.rows] for name in names}
    cases = {
        name: [status[i] for status in outcome.statuses] for i, name in enumerate(("case", "status", "why", "seconds"))
    }
    metrics = {f"num_cases_{status}": outcome.count(status) for status in STATUSES}
    record = make_record(
        f"gpu_report_{outcome.part.name}", outcome.part.origin, metrics=metrics, seed=setting.seed,
        config={"question": outcome.part.question, "is_smoke": setting.is_smoke, **config},
        series={"rows": rows, "cases": cases}, device=outcome.device or {"name": "unknown"},
    )  # fmt: skip
    write_record(record, setting.out / f"{outcome.part.name}.json")


def _exit_status(process: subprocess.Popen) -> int | str:
    """Of a process that closed its end of the pipe; one that does not end by itself then is ended."""
    try:
        return process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return "none"


def _pump(stream: Any, lines: "queue.Queue[str | None]") -> None:
    """Lines of a pipe into a queue, None at its end, so that waiting for one can have a limit."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)
