"""How are several programs for one job compared?  Same arrays, repeats in turn, the roofline beside them.

The arguments are made on the device, by a traceable function: so that a machine without a GPU can compile every program
of the report for one (`compile_all`).
"""

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from experiments.gpu_report.cases import Case, Row, Setting
from experiments.gpu_report.peaks import Limits, limits
from experiments.gpu_report.timing import Run, time_interleaved
from nanojax.pipeline.compiler_options import Graphs, gpu_options

ERROR_CHARACTERS = 300
NUM_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One job in several ways.

    args: makes the arrays; traceable.    programs: name -> function of the arrays; each does the job `num_inner` times.
    flops, num_bytes: of one job, as little as it can do with; what the roofline is made of.    columns: what the job is.
    num_ctas, or whatever else tells programs apart in numbers, goes into `program_columns`, by program.
    graphs: one for each program, or none where programs use several streams, which a graph of XLA's runs one after another.
    """

    name: str
    args: Callable[[], tuple]
    programs: Mapping[str, Callable[..., Any]]
    flops: float
    num_bytes: float
    num_inner: int = 1
    columns: Row = dataclasses.field(default_factory=dict)
    program_columns: Mapping[str, Row] = dataclasses.field(default_factory=dict)
    needs_s: float = 5.0
    graphs: Graphs = Graphs.ONE


def timing_case(comparison: Comparison, setting: Setting) -> Case:
    """A case that times it: a row per program, `error` in that of one that cannot be compiled or run."""
    limit_s = 60.0 + 10.0 * len(comparison.programs)
    return Case(comparison.name, lambda: measure(comparison, setting), comparison.needs_s, limit_s)


def measure(comparison: Comparison, setting: Setting) -> list[Row]:
    """Times all programs that compile.  Raises RuntimeError when none does."""
    args = jax.block_until_ready(jax.jit(comparison.args)())
    start_s = time.monotonic()
    compiled, errors = _compile(comparison, args)
    compile_s = time.monotonic() - start_s
    if not compiled:
        raise RuntimeError("; ".join(f"{name}: {text}" for name, text in errors.items()))
    runs = {name: Run(lambda f=f: f(*args), comparison.num_inner) for name, f in compiled.items()}
    timings = time_interleaved(runs, num_repeats=setting.num_repeats)
    bounds = limits(setting)
    rows = [
        _row(comparison, name, bounds) | timings[name].row() | rates(comparison, timings[name].median_s, bounds)
        for name in compiled
    ]
    rows[0]["compile_all_s"] = compile_s
    return [*rows, *({**_row(comparison, name, bounds), "error": text} for name, text in errors.items())]


def _compile(comparison: Comparison, args: Sequence[Any]) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """The programs that compile, and why the others do not."""
    programs = list(comparison.programs.values())
    found = dict(zip(comparison.programs, compile_together(programs, args, comparison.graphs), strict=True))
    errors = {  # one implementation that does not support a shape shall not hide the others
        name: f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
        for name, error in found.items()
        if isinstance(error, BaseException)
    }
    return {name: program for name, program in found.items() if name not in errors}, errors


def compile_together(
    programs: Sequence[Callable[..., Any]], args: Sequence[Any], graphs: Graphs = Graphs.ONE
) -> list[Any]:
    """Each program compiled for these arguments, or the error; several at a time, as most of it is not Python."""
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        waiting = [pool.submit(_compiled, program, args, graphs) for program in programs]
        return [future.exception() or future.result() for future in waiting]


def compile_program(comparison: Comparison, name: str, args: Sequence[Any]) -> Callable[..., Any]:
    """The compiled program for arguments, or shapes of arguments, `args`."""
    return _compiled(comparison.programs[name], args, comparison.graphs)


def _compiled(program: Callable[..., Any], args: Sequence[Any], graphs: Graphs = Graphs.ONE) -> Callable[..., Any]:
    return jax.jit(program).lower(*args).compile(compiler_options=options_here(graphs))


def options_here(graphs: Graphs = Graphs.ONE) -> dict[str, Any] | None:
    """XLA's options on a GPU: products never merged, everything in one CUDA graph unless `graphs` says otherwise."""
    return dict(gpu_options(graphs)) if jax.default_backend() == "gpu" else None


def rates(comparison: Comparison, seconds: float, bounds: Limits) -> Row:
    """What a time means: rates, and the part of the roofline that was reached."""
    return {
        "flops_per_s": comparison.flops / seconds,
        "bytes_per_s": comparison.num_bytes / seconds,
        "roofline_fraction": bounds.seconds(comparison.flops, comparison.num_bytes) / seconds,
    }


def _row(comparison: Comparison, name: str, bounds: Limits) -> Row:
    return {
        **comparison.columns,
        "program": name,
        **comparison.program_columns.get(name, {}),
        "roofline_s": bounds.seconds(comparison.flops, comparison.num_bytes),
    }
