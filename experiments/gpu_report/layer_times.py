"""What does a layer of LLaMA-3-8B take in order, and what with decode attention beside it, by attention's multiprocessors?

A step of 2,048 tokens as serving of 512/512 has it, on two small numbers of layers, whose programs compile in seconds; all run in
turn, so that they can be compared.  The difference is the time of a layer, without logits, launching, and the ends of a pipeline.
Numbers in the name of a way are the first nano-batch's tokens and attention's shares.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import serving
from experiments.gpu_report.cases import Case, Row, Setting
from experiments.gpu_report.programs import ERROR_CHARACTERS, NUM_THREADS, options_here
from experiments.gpu_report.timing import Run, time_interleaved
from nanojax import batch as batches
from nanojax.batch import RaggedBatch
from nanojax.config import PRESETS, ModelConfig
from nanojax.kv_cache import KVPages
from nanojax.models import decoder
from nanojax.pipeline import execute, library
from nanojax.pipeline.compiler_options import Graphs, best_graphs
from nanojax.pipeline.ir import Pipeline
from nanojax.pipeline.kernel_paths import ATTENTION_EXCLUSIVE

DEPTHS = (5, 2)
IN_ORDER = "sequential"
FIRST_TOKENS = (640, 768, 896)
SHARES = {
    ATTENTION_EXCLUSIVE: ((0.3, 0.3),),
    "sm_exclusive": ((0.2, 0.15), (0.227, 0.15), (0.25, 0.2)),
}
"""Form -> attention's share of the multiprocessors beside either nano-batch's dense operations."""
CHOSEN = "sm_exclusive", (0.227, 0.15)
"""Of those, what cuts and graphs are compared with."""


@dataclasses.dataclass(frozen=True)
class Step:
    """Decode rows of `context_len` tokens on average, and whole prompts."""

    model: ModelConfig
    num_decode: int
    context_len: int
    prompt_lens: tuple[int, ...]
    page_size: int

    @property
    def num_tokens(self) -> int:
        """Of the batch."""
        return self.num_decode + sum(self.prompt_lens)


@dataclasses.dataclass(frozen=True)
class Way:
    """How a step is run."""

    pipeline: Pipeline | None = None
    use_streams: bool = False
    overlap: str = "xla"
    graphs: Graphs | None = None

    @property
    def launched(self) -> Graphs:
        """What the host launches."""
        return self.graphs or best_graphs(self.pipeline, use_streams=self.use_streams)


def step_of(is_smoke: bool) -> Step:
    """What is run."""
    if is_smoke:
        return Step(dataclasses.replace(serving.SMOKE_CONFIG, num_layers=max(DEPTHS)), 6, 10, (7, 3), 16)
    model = dataclasses.replace(PRESETS["llama-3-8b"], num_layers=max(DEPTHS))
    return Step(model, 1024, 768, (512, 512), 64)


def ways(step: Step, is_smoke: bool) -> dict[str, dict[str, Way]]:
    """Case -> name -> way; each case has the layers in order."""
    base = {IN_ORDER: Way()}
    make = functools.partial(library.decode_beside_dense, step.num_tokens)
    if is_smoke:
        return {"shares": base | {"decode_beside_dense": Way(make(8))}}
    named, first = library.PIPELINES["llama_8b"](step.num_tokens, False, 1), FIRST_TOKENS[1]

    def divided(form: str, n: int, shares: tuple[float, float]) -> dict[str, Way]:
        name = f"decode_beside_dense, {form} {n} {shares[0]} {shares[1]}"
        return {name: Way(make(n, attention_shares=shares), True, form)}

    shares = {
        name: way for form, own in SHARES.items() for one in own for name, way in divided(form, first, one).items()
    }
    shares |= {
        f"{name}, concurrent graph": dataclasses.replace(way, graphs=Graphs.CONCURRENT)
        for name, way in divided(CHOSEN[0], first, CHOSEN[1]).items()
    }
    cuts = {name: way for n in FIRST_TOKENS if n != first for name, way in divided(CHOSEN[0], n, CHOSEN[1]).items()}
    forms = {
        "sequential, no graphs": Way(graphs=Graphs.NO),
        "llama_8b": Way(named, True),
        "decode_beside_dense": Way(make(first), True),
        "decode_beside_dense, one stream": Way(library.on_one_stream(make(first))),
    }
    return {"shares": base | shares, "forms": base | forms, "first tokens": base | cuts}


def cases(setting: Setting) -> list[Case]:
    """Shares, forms, cuts."""
    step = step_of(setting.is_smoke)
    return [
        Case(name, lambda own=own: _measure(own, step, setting), 0.0 if setting.is_smoke else 20.0, limit_s=150)
        for name, own in ways(step, setting.is_smoke).items()
    ]


def _measure(wanted: Mapping[str, Way], step: Step, setting: Setting) -> list[Row]:
    args = arguments(step, setting.seed)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        waiting = {
            (name, depth): pool.submit(_compiled, way, step, depth, args)
            for name, way in wanted.items()
            for depth in DEPTHS
        }
    errors = {name: future.exception() for (name, _), future in waiting.items() if future.exception() is not None}
    if IN_ORDER in errors:
        raise RuntimeError(f"{IN_ORDER} does not compile: {errors[IN_ORDER]}")
    params, kv, batch = args
    held = [kv]
    del args, kv

    def launch(name: str, depth: int) -> jax.Array:
        _, own = decoder.first_layers(step.model, params, depth)
        logits, new = waiting[name, depth].result()(own, held.pop(), batch)
        held.append(new)
        return logits

    runs = {
        f"{name} {depth}": Run(functools.partial(launch, name, depth)) for name, depth in waiting if name not in errors
    }
    timings = time_interleaved(runs, num_repeats=setting.num_repeats, repeat_s=0.1)
    whole, part = DEPTHS
    layer_s = {
        name: (timings[f"{name} {whole}"].median_s - timings[f"{name} {part}"].median_s) / (whole - part)
        for name in wanted
        if name not in errors
    }
    return [
        {
            "program": name, "overlap": way.overlap, "graphs": way.launched.value, "num_tokens": step.num_tokens,
            "num_layers": whole,
            **({"error": f"{errors[name]}"[:ERROR_CHARACTERS]} if name in errors else timings[f"{name} {whole}"].row()),
            "layer_s": layer_s.get(name), "speedup": layer_s[IN_ORDER] / layer_s[name] if name in layer_s else None,
        }
        for name, way in wanted.items()
    ]  # fmt: skip


def _compiled(way: Way, step: Step, depth: int, args: tuple) -> Callable[..., Any]:
    params, kv, batch = args
    config, params = decoder.first_layers(step.model, params, depth)
    forward = functools.partial(
        execute.forward, config, pipeline=way.pipeline, use_streams=way.use_streams, overlap=way.overlap
    )
    lowered = jax.jit(forward, donate_argnums=1).lower(params, kv, batch)
    return lowered.compile(compiler_options=options_here(way.launched))


def arguments(step: Step, seed: int) -> tuple[Any, KVPages, RaggedBatch]:
    """Random weights, keys and values, and the batch; pages lie scattered.  Traceable."""
    model, rng = step.model, np.random.default_rng(seed)
    params = jax.jit(lambda key: decoder.init_params(model, key, jnp.dtype("bfloat16")))(jax.random.key(seed))
    spread = np.linspace(0.5, 1.5, step.num_decode) * step.context_len
    kv_lens = np.concatenate([rng.permutation(spread.astype(np.int32)) + 1, np.array(step.prompt_lens, np.int32)])
    q_lens = np.concatenate([np.ones(step.num_decode, np.int32), np.array(step.prompt_lens, np.int32)])
    counts = -(-kv_lens // step.page_size)
    table = np.zeros((len(kv_lens), counts.max()), np.int32)
    free = rng.permutation(int(counts.sum())).astype(np.int32)
    for own_row, own in zip(table, np.split(free, np.cumsum(counts)[:-1]), strict=True):
        own_row[: len(own)] = own
    tokens = rng.integers(0, model.vocab_size, (len(kv_lens), kv_lens.max()), np.int32)
    batch = batches.pack(
        jnp.arange(len(kv_lens)), jnp.asarray(q_lens), jnp.int32(step.num_decode), jnp.asarray(kv_lens - q_lens),
        jnp.asarray(tokens), jnp.asarray(table), token_budget=step.num_tokens, page_size=step.page_size,
        num_pages=len(free),
    )  # fmt: skip
    one_layer = (len(free), model.num_kv_heads, step.page_size, model.head_dim)
    all_layers = (model.num_layers, *one_layer)
    make = jax.jit(lambda key: jnp.broadcast_to(jax.random.normal(key, one_layer, jnp.bfloat16), all_layers))
    return params, KVPages(*map(make, jax.random.split(jax.random.key(seed + 1), 2))), batch
