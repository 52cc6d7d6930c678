"""Does every program of the report compile for a GPU that is not there?  `python -m experiments.gpu_report.compile_all [--gpu=h200]`.

Each program of the parts that time kernels is compiled at its real shapes, by the harness of `experiments.compiled_code` (an
environment with JAX's CUDA plugin, `make test-gpu-compile`); a row says what became of it.  The whole serving step is
compiled by that harness's own experiment.

    out/gpu_report_compiled.json   record: series `programs`
"""

import collections
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import compiled_code
from experiments.comparison import text_table
from experiments.gpu_report import baselines, cta_curves, kernel_speed, pairs
from experiments.gpu_report.cases import Row
from experiments.gpu_report.programs import Comparison
from experiments.record import make_record, write_record

PARTS = {
    "kernel_speed": lambda num_cores: kernel_speed.comparisons(False),
    "cta_curves": lambda num_cores: cta_curves.comparisons(False, num_cores),
    "pairs": lambda num_cores: pairs.comparisons(False, num_cores),
    "baselines": lambda num_cores: baselines.comparisons(False),
}


def programs(num_cores: int) -> Iterator[tuple[str, Comparison, str]]:
    """(part, comparison, program) of a device with `num_cores` multiprocessors; the probe of placement last."""
    for part, comparisons in PARTS.items():
        for comparison in comparisons(num_cores):
            for name in comparison.programs:
                yield part, comparison, name
    first = num_cores - num_cores // 3
    yield "pairs", probe(first, num_cores - first), "probe"


def probe(num_first: int, num_second: int) -> Comparison:
    """The two kernels that note where they run."""
    run = pairs.probe_pair(num_first, num_second)
    return Comparison("placement", lambda: (jnp.zeros(128, jnp.int32),), {"probe": run}, flops=0, num_bytes=0)


def compile_one(gpu: compiled_code.Target, part: str, comparison: Comparison, name: str) -> Row:
    """Compiles one program; says what it needs, or why it cannot be compiled."""
    start_s = time.process_time()
    row: dict[str, Any] = {"part": part, "job": comparison.name, "program": name}
    try:
        found = compiled_code.compile_for(gpu, comparison.programs[name], jax.eval_shape(comparison.args))
    except Exception as error:  # the table shall have all
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return row | {"is_ok": False, "error": text[:200], "compile_cpu_s": time.process_time() - start_s}
    return row | {
        "is_ok": True, "num_kernels": len(found.kernels), "temp_bytes": found.temp_bytes,
        "registers": max((kernel.registers or 0 for kernel in found.kernels), default=0),
        "spill_bytes": sum(kernel.spill_bytes or 0 for kernel in found.kernels),
        "smem_bytes": max((kernel.smem_bytes or 0 for kernel in found.kernels), default=0),
        "num_overlapped": sum(found.overlap.is_there) if found.regions else 0, "error": None,
        "compile_cpu_s": time.process_time() - start_s,
    }  # fmt: skip


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("gpu", "h200", list(compiled_code.TARGETS), "What to compile for.", flag_values=values)
    flags.DEFINE_string("only", "", "Compile programs whose part, job or name has this text in it.", flag_values=values)
    flags.DEFINE_bool("first", False, "Of each implementation only the first program of a part.", flag_values=values)
    flags.DEFINE_string("out", "out", "Folder for the record.", flag_values=values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Compiles, prints, writes the record."""
    gpu = compiled_code.target(values.gpu)
    chosen = [one for one in programs(gpu.number("core_count")) if values.only in f"{one[0]} {one[1].name} {one[2]}"]
    if values.first:
        chosen = list(first_of_each(chosen))
    rows = []
    for part, comparison, name in chosen:
        rows.append(compile_one(gpu, part, comparison, name))
        print(
            f"{part}, {comparison.name}, {name}: {rows[-1]['error'] or 'ok'} ({rows[-1]['compile_cpu_s']:.1f} s)",
            flush=True,
        )
    table = {column: [row.get(column) for row in rows] for column in dict.fromkeys(c for row in rows for c in row)}
    counts = collections.Counter(row["is_ok"] for row in rows)
    record = make_record(
        "gpu_report_compiled", "compiled", metrics={"num_compiled": counts[True], "num_refused": counts[False]}, seed=0,
        config={"gpu": values.gpu}, series={"programs": table}, device={"name": gpu.spec.name},
    )  # fmt: skip
    write_record(record, f"{values.out}/gpu_report_compiled.json")
    print(text_table(table))
    return record


def first_of_each(chosen: list[tuple[str, Comparison, str]]) -> Iterator[tuple[str, Comparison, str]]:
    """The first program of each implementation in each part: numbers of CTAs at a name's end do not tell them apart."""
    seen = set()
    for part, comparison, name in chosen:
        key = (part, comparison.columns.get("kind"), name.rstrip("0123456789+ "))
        if key not in seen:
            seen.add(key)
            yield part, comparison, name


def main(argv: list[str]) -> None:
    del argv
    run(flags.FLAGS)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
