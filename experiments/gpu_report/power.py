"""How much power does the card draw, at which clock, while a measurement runs?  What `nvidia-smi` says every tenth of a second.

A card that draws all it may lowers its clock: then operations side by side slow each other down, however well they fit together.
"""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator

import numpy as np

from experiments.gpu_report.cases import Row

FIELDS = {"power_w": "power.draw.instant", "sm_clock_mhz": "clocks.sm"}
PERIOD_MS = 100


@contextlib.contextmanager
def sampled() -> Iterator[Row]:
    """Gives a row that has the means of `FIELDS` when the block ends; None where there is no `nvidia-smi` or it says nothing."""
    row: Row = dict.fromkeys(FIELDS)
    query = [f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits", f"-lms={PERIOD_MS}"]
    with tempfile.TemporaryFile("w+") as said:
        try:
            sampler = subprocess.Popen(["nvidia-smi", *query], stdout=said, stderr=subprocess.DEVNULL)
        except OSError:
            yield row
            return
        try:
            yield row
        finally:
            sampler.terminate()
            sampler.wait()
            said.seek(0)
            row.update(means(said.read()))


def means(text: str) -> Row:
    """Of each column of the sampler's lines, those left out that are cut off or no numbers."""
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            values = [float(word) for word in line.split(",")]
            if len(values) == len(FIELDS):
                rows.append(values)
    return dict(zip(FIELDS, np.mean(rows, axis=0).tolist(), strict=True)) if rows else dict.fromkeys(FIELDS)
