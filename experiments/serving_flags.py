"""Which flags do all serving experiments share?  Their definitions, the points of a sweep, and the start of a program.

An experiment has `define_flags(values)` and `run(values)`; under `__main__` it calls `launch(define_flags, run)`.
Flags come as an `absl.flags.FlagValues` argument, so that a test or a sweep runs an experiment on flags of its own.
What they stand for (model, engine, requests) is made in `experiments.serving`.
"""

import contextlib
import copy
import dataclasses
import functools
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from experiments.sweep import parse_sweep
from nanojax.admission import ADMISSION_NAMES
from nanojax.config import GREEDY, PRESETS, EngineConfig
from nanojax.pipeline.compiler_options import Graphs
from nanojax.pipeline.library import PIPELINES
from nanojax.scheduler import PRIORITIES, Batching, PhaseOrder
from nanojax.serve import Driver
from nanojax.workload import PAPER_TABLE_4
from pallas_kernels.device import cpu_has, platform

DEFAULT_MODEL = "smollm2"
SMOKE_MODEL = "smoke"
RANDOM_WEIGHTS = "random"
DTYPES = ("bfloat16", "float32")
OVERLAP = ("xla", "sm_exclusive", "capped_grid", "attention_exclusive")
TRACES = ("prompts", "sharegpt_texts", *PAPER_TABLE_4)

SMOKE = {
    "model": SMOKE_MODEL, "token_budgets": "16,64", "num_slots": 8, "page_size": 16, "num_pages": 640, "max_len": 1280,
    "num_requests": 7, "max_tokens": 6, "request_rates": "20,40", "duration_s": 0.25, "cache_dir": "",
}  # fmt: skip
"""What `--smoke` changes, where the command line does not say otherwise: a tiny random model and little work."""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of model, engine, policy and work.  Defaults of the engine are those of `EngineConfig()`."""
    engine = EngineConfig()
    enum, text, flag, count = _definers(values)
    enum("model", DEFAULT_MODEL, [DEFAULT_MODEL, SMOKE_MODEL, *PRESETS], "smollm2: the real weights; else random ones.")
    text("weights", None, f"A .gguf or llama2.c .bin file, a Hugging Face directory, or {RANDOM_WEIGHTS!r}.")
    enum("dtype", DTYPES[0], DTYPES, "Of the weights; float32 if not given on a CPU without AVX2.")
    flag("keep_blocks", True, "Keep bfloat16 weights that a file has in 4 or 8 bits so, on a CPU that reads them.")
    enum("kv_dtype", None, DTYPES, "Of the KV cache; if not given the weights'.")

    enum("driver", Driver.DISPATCH_AHEAD.value, [driver.value for driver in Driver], "How the host launches steps.")
    enum("admission", ADMISSION_NAMES[0], ADMISSION_NAMES, "Forecast of the peak page demand.")
    enum("priority", "first_come", list(PRIORITIES), "Who is served first.")
    enum("phase_order", PhaseOrder.DECODE_FIRST.value, [order.value for order in PhaseOrder], "Who gets tokens first.")
    enum("batching", Batching.CONTINUOUS.value, [kind.value for kind in Batching], "When requests join the batch.")
    enum(
        "attention",
        None,
        ["mosaic_gpu", "numba", "reference", "triton", "xla"],
        "Implementation; the platform's best if not given.",
    )
    text(
        "pipeline", None,
        f"{', '.join(PIPELINES)}: on all token budgets; or a JSON file: only on the budget that equals its num_tokens.",
    )  # fmt: skip
    flag("switch", True, "Run sequential on the budgets where the cost model says that the pipeline loses.")
    text("op_profile", None, "That cost model: a file of experiments.profile_ops; else the roofline of a known GPU.")
    flag("streams", None, "Run the pipeline on the GPU streams that it names; so on a GPU if not given.")
    enum("overlap", OVERLAP[0], OVERLAP, "How streams divide a Hopper GPU; xla: not at all.")
    enum(
        "cuda_graphs",
        None,
        [graphs.value for graphs in Graphs],
        "What a GPU is told to launch: see `Graphs`; if not given concurrent ones for steps on several streams, else some.",
    )
    count("expected_output_len", None, "Mean output in tokens, until one is known.")

    text("token_budgets", ",".join(map(str, engine.token_budgets)), "Ladder of tokens per step; + for , in a sweep.")
    count("page_size", engine.page_size, "Tokens per KV page.")
    count("num_pages", engine.num_pages, "KV pages in the pool.")
    count("num_slots", engine.num_slots, "Requests resident at once.")
    count("max_len", engine.max_len, "Longest prompt + output; the model's limit if that is lower and this not given.")
    flag("check_invariants", False, "Check the laws of the state after every step.")

    flags.DEFINE_integer("seed", 0, "Of prompts, arrivals and samples.", lower_bound=0, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0, flag_values=values)
    count("max_tokens", None, "New tokens per request, in place of the prompt's or trace's own.")
    text("cache_dir", "~/.cache/nanojax", "For converted weights and compiled programs; '' for none.")
    flag("smoke", False, "A tiny random model and little work: a check that takes seconds.")
    for name, is_good, rule in (
        ("token_budgets", lambda text: _ladder(text) is not None, "must be ascending positive integers: 16,64,256"),
        ("weights", _is_weights, f"must be a file or folder that exists, or {RANDOM_WEIGHTS!r}"),
        ("pipeline", _is_pipeline, f"must be one of {', '.join(PIPELINES)}, or a file that exists"),
        ("op_profile", lambda text: text is None or pathlib.Path(text).is_file(), "must be a file that exists"),
    ):
        flags.register_validator(name, is_good, rule, flag_values=values)


def define_work(values: flags.FlagValues) -> None:
    """Defines the flags of experiments that choose their requests themselves and write a record."""
    _, text, _, count = _definers(values)
    text("trace", TRACES[0], f"{', '.join(TRACES)}, constant:INPUT,OUTPUT, or a trace file.")
    count("num_requests", 64, "Requests to serve.")
    count("length_divisor", 1, "Divides the lengths of a trace, for a small model.")
    text("out", "out", "Folder for records and figures.")
    rule = f"must be one of {', '.join(TRACES)}, constant:INPUT,OUTPUT, or a file that exists"
    flags.register_validator("trace", _is_trace, rule, flag_values=values)


def engine_config(values: flags.FlagValues, model_max_len: int) -> EngineConfig:
    """Capacities as the flags say; a `max_len` that was not given is cut to the model's.

    For requests that ask for no more of sampling than the flags do, which is a temperature.
    """
    max_len = min(values.max_len, model_max_len) if values["max_len"].using_default_value else values.max_len
    names = {field.name for field in dataclasses.fields(EngineConfig)} & set(values) - {"token_budgets", "max_len"}
    given: dict[str, Any] = {name: values[name].value for name in sorted(names)}
    sampling = dataclasses.replace(GREEDY, random="temperature" in values and values.temperature > 0)
    return EngineConfig(token_budgets=_ladder(values.token_budgets) or (), max_len=max_len, sampling=sampling, **given)


def sweep_points(values: flags.FlagValues, text: str) -> list[tuple[dict, flags.FlagValues]]:
    """The points of `--sweep`, each with a copy of the flags that has its values.

    Raises ValueError for a sweep that cannot be read or a flag that does not exist, `flags.Error` for a value that the
    flag does not take.
    """
    points = []
    for point in parse_sweep(text):
        own = copy.deepcopy(values)
        for name, value in point.items():
            if name not in own:
                raise ValueError(f"sweep: there is no flag --{name}")
            own[name].parse(str(value).lower() if isinstance(value, bool) else str(value))
            own[name].using_default_value = False
        own.validate_all_flags()
        points.append((point, own))
    return points


def with_smoke(values: flags.FlagValues) -> flags.FlagValues:
    """The flags, with the defaults of `SMOKE` where `--smoke` is set."""
    values = copy.deepcopy(values)
    for name, value in SMOKE.items() if values.smoke else ():
        if name in values:
            values.set_default(name, value)
    return values


def numbers(text: str) -> list[float]:
    """`"1,2.5"` -> [1.0, 2.5].  Raises ValueError unless all are positive numbers."""
    found = [float(word) for word in text.split(",")]
    if not all(0 < number < float("inf") for number in found):
        raise ValueError(f"{text!r} must be positive numbers, separated by commas")
    return found


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line, not a traceback, when flags, weights or files are at fault."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError, flags.Error) as error:
        sys.exit(f"error: {error}")


def cache_dir(values: flags.FlagValues) -> pathlib.Path | None:
    """Folder of the caches, None for none."""
    return pathlib.Path(values.cache_dir).expanduser() if values.cache_dir else None


def launch(define_flags: Callable[[flags.FlagValues], None], run: Callable[[flags.FlagValues], object]) -> None:
    """The whole program: flags from the command line, caches of compiled programs, `run`."""
    define_flags(flags.FLAGS)
    for name in list(flags.FLAGS):  # so that --help shows them
        if flags.FLAGS.find_module_defining_flag(name) == __name__:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def main(argv: Sequence[str]) -> None:
        if argv[1:]:
            sys.exit(f"error: unexpected argument {argv[1]!r}; flags are written --name=value")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        values = with_smoke(flags.FLAGS)
        if "dtype" in values and platform() == "cpu" and not cpu_has("avx2"):
            values.set_default("dtype", "float32")
        if (folder := cache_dir(values)) is not None:
            jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        run(values)

    app.run(main)


def _definers(values: flags.FlagValues) -> tuple[Callable[..., Any], ...]:
    """How a flag of each kind is defined: one of several words, any text, true or false, a count of at least 1."""
    kinds = (flags.DEFINE_enum, flags.DEFINE_string, flags.DEFINE_bool)
    return (
        *(functools.partial(kind, flag_values=values) for kind in kinds),
        functools.partial(flags.DEFINE_integer, lower_bound=1, flag_values=values),
    )


def _ladder(text: str) -> tuple[int, ...] | None:
    """`"16,64"` or `"16+64"` -> (16, 64); None if that is no ladder."""
    words = re.split("[,+]", text)
    if not all(word.strip().isdecimal() for word in words):
        return None
    rungs = tuple(int(word) for word in words)
    return rungs if rungs[0] > 0 and list(rungs) == sorted(set(rungs)) else None


def _is_weights(text: str | None) -> bool:
    return text is None or text == RANDOM_WEIGHTS or pathlib.Path(text).exists()


def _is_pipeline(text: str | None) -> bool:
    return text is None or text in PIPELINES or pathlib.Path(text).is_file()


def _is_trace(text: str) -> bool:
    return text in TRACES or re.fullmatch(r"constant:\d+,\d+", text) is not None or pathlib.Path(text).is_file()
