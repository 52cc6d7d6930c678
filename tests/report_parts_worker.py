"""Runs all parts of the GPU report on tiny shapes in one process: `python -m tests.report_parts_worker FOLDER [PART ...]`.

A process of its own, without the run-time type checks of the tests: a compiled step shows them states of mere shapes.
"""

import importlib
import pathlib
import sys

import jax

from experiments.gpu_report import one_part, supervise
from experiments.gpu_report.cases import PARTS, Setting


def main(folder: str, names: list[str]) -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # most of what tiny shapes take is the compiler's time
    setting = Setting(pathlib.Path(folder), is_smoke=True, num_repeats=2)
    for part in PARTS:
        if part.name in names:
            outcome = supervise.Outcome(part, device=one_part.device())
            for case in importlib.import_module(part.module).cases(setting):
                outcome.rows += [{"case": case.name, **one_part.plain(row)} for row in case.run()]
                outcome.statuses.append((case.name, "ok", "", 0.0))
            supervise.write(outcome, setting, {})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
