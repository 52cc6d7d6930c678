"""What do the flags stand for?  Model, policy, engine and requests, made from flag values; nothing runs here."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import rungs, serving_flags
from experiments.prompts import load_prompts
from nanojax import scheduler, workload
from nanojax.admission import make_forecast
from nanojax.config import PRESETS, EngineConfig, ModelConfig, SamplingParts
from nanojax.models import decoder
from nanojax.pipeline import execute
from nanojax.pipeline.compiler_options import Graphs
from nanojax.pipeline.ir import Pipeline
from nanojax.scheduler import Batching, PhaseOrder, Policy
from nanojax.serve import Driver, Engine
from nanojax.weights import LoadedModel, Tokenizer, load_model
from nanojax.weights.chat import TEMPLATES
from nanojax.workload import Request, SamplingParams, Trace
from pallas_kernels.device import platform

SMOKE_CONFIG = ModelConfig(
    "smoke", num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64, vocab_size=257, max_len=2048
)


@dataclasses.dataclass(frozen=True)
class Work:
    """Requests to serve.

    questions: request id -> text to show with its answer.    num_dropped: requests that were too long.
    """

    requests: list[Request]
    questions: dict[str, str]
    num_dropped: int = 0


def load(values: flags.FlagValues) -> LoadedModel:
    """The model that `--model` and `--weights` name, on the default device.  Raises as `load_model` does."""
    source = values.weights or (values.model if values.model == serving_flags.DEFAULT_MODEL else None)
    if source is not None and source != serving_flags.RANDOM_WEIGHTS:
        cache_dir = serving_flags.cache_dir(values)
        return load_model(source, dtype=values.dtype, cache_dir=cache_dir, keep_blocks=values.keep_blocks)
    name = "smollm2-135m" if values.model == serving_flags.DEFAULT_MODEL else values.model
    config = SMOKE_CONFIG if name == serving_flags.SMOKE_MODEL else PRESETS[name]
    params = decoder.pack_params(decoder.init_params(config, jax.random.key(values.seed), jnp.dtype(values.dtype)))
    return LoadedModel(config, jax.block_until_ready(params), byte_tokenizer(config.vocab_size), TEMPLATES["raw"])


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """For random weights: an id per byte, the other ids say nothing and none ends a text."""
    return Tokenizer(str.encode, tuple(bytes((i,)) if i < 256 else b"" for i in range(vocab_size)), (), None)


def policy(values: flags.FlagValues) -> Policy:
    """The scheduling choices."""
    known = {} if values.expected_output_len is None else {"expected_output_len": values.expected_output_len}
    return Policy(
        make_forecast(values.admission, seed=values.seed, **known),
        scheduler.PRIORITIES[values.priority],
        PhaseOrder(values.phase_order),
        Batching(values.batching),
    )


def kv_dtype(values: flags.FlagValues) -> jnp.dtype:
    """What the KV pages are stored as: `--kv_dtype`, else as the weights; on a CPU bfloat16 as its bits (see `KVPages`)."""
    wanted = jnp.dtype(values.kv_dtype or values.dtype)
    return jnp.dtype(jnp.uint16) if wanted == jnp.bfloat16 and platform() == "cpu" else wanted


def engine_config(values: flags.FlagValues, loaded: LoadedModel) -> EngineConfig:
    """Capacities for `loaded`."""
    return serving_flags.engine_config(values, loaded.config.max_len)


def engine(values: flags.FlagValues, loaded: LoadedModel, sampling: SamplingParts | None = None) -> Engine:
    """An engine, not compiled yet (`Engine.warm_up`).  Raises ValueError when capacities do not suit the model.

    sampling: what requests may ask for, if it is not what the flags say.
    """
    config = engine_config(values, loaded)
    return Engine(
        config if sampling is None else dataclasses.replace(config, sampling=sampling),
        loaded.config,
        loaded.params,
        policy=policy(values),
        tokenizer=loaded.tokenizer,
        driver=Driver(values.driver),
        attention=values.attention,
        pipelines=pipelines(values, loaded),
        use_streams=rungs.uses_streams(values),
        overlap=values.overlap,
        graphs=None if values.cuda_graphs is None else Graphs(values.cuda_graphs),
        kv_dtype=kv_dtype(values),
        check_invariants=values.check_invariants,
    )


def pipelines(values: flags.FlagValues, loaded: LoadedModel) -> dict[int, Pipeline]:
    """The pipeline of each token budget that has one.  Raises ValueError as `rungs.choose` does."""
    return {budget: rung.pipeline for budget, rung in rungs.choose(values, loaded.config).items()}


def work(values: flags.FlagValues, loaded: LoadedModel, num_requests: int) -> Work:
    """`num_requests` requests of `--trace`, all arriving at 0 s unless the trace says when.

    Raises ValueError for a trace with fewer requests that fit the engine.
    """
    sampling = SamplingParams(temperature=values.temperature, seed=values.seed)
    match values.trace:
        case "prompts":
            return _prompts(values, loaded, num_requests, sampling)
        case "sharegpt_texts":
            return _sharegpt_texts(values, loaded, num_requests, sampling)
    rng = np.random.default_rng(values.seed)
    trace = length_trace(values, num_requests, rng)
    kept, dropped = workload.length_filter(trace, max_len=engine_config(values, loaded).max_len)
    _check_count(num_requests, len(kept), values)
    kept = kept.select(np.arange(num_requests))
    return Work(workload.synthetic_requests(kept, loaded.config.vocab_size, rng, sampling), {}, sum(dropped.values()))


def describe(values: flags.FlagValues, loaded: LoadedModel) -> dict[str, Any]:
    """For a record's `config`: the model, the capacities and the value of every flag that decides what is computed."""
    shared = flags.FlagValues()
    serving_flags.define(shared)
    serving_flags.define_work(shared)
    names = sorted(set(shared) & set(values) - {"out", "cache_dir", "smoke"})
    shown = {name: _without_folder(values[name].value) for name in names}
    config = engine_config(values, loaded)
    capacities = dataclasses.asdict(config) | {"token_budgets": list(config.token_budgets)}
    del capacities["sampling"]  # the requests' temperature says it
    model = {
        "model": loaded.config.name,
        "num_params": loaded.config.num_params,
        "kv_dtype": values.kv_dtype or values.dtype,
    }
    chosen = rungs.choose(values, loaded.config)
    paths = _paths(values, loaded, chosen) if platform() == "gpu" else {}
    found = {"pipeline_by_budget": rungs.described(chosen), "paths": paths}
    return {**shown, **capacities, **model, **{name: value for name, value in found.items() if value}}


def _paths(
    values: flags.FlagValues, loaded: LoadedModel, chosen: Mapping[int, rungs.Rung]
) -> dict[str, dict[str, list[str]]]:
    """Token budget -> node -> what runs it and why, most layers first."""
    config, model = engine_config(values, loaded), loaded.config
    shape = (model.num_layers, config.num_pages, model.num_kv_heads, config.page_size, model.head_dim)
    found: dict[str, dict[str, list[str]]] = {}
    for budget, rung in chosen.items():
        own = found.setdefault(str(budget), {})
        rows = execute.paths(
            model, rung.pipeline, dtype=values.dtype, pages=jax.ShapeDtypeStruct(shape, kv_dtype(values)),
            use_streams=rungs.uses_streams(values), overlap=values.overlap,
        )  # fmt: skip
        for row in sorted(rows, key=lambda row: -row.num_layers):
            where = "" if row.path.num_sms is None else f" on {row.path.num_sms} multiprocessors"
            text = f"{row.path.kernel}{where} in {row.num_layers} layers: {row.path.reason}"
            own.setdefault(row.node, []).append(text)
    return found


def _prompts(values: flags.FlagValues, loaded: LoadedModel, num_requests: int, sampling: SamplingParams) -> Work:
    """The project's own prompts, from the start again (ids `...#2`) when there are not enough."""
    prompts = load_prompts()
    requests, questions = [], {}
    for i in range(num_requests):
        turn, prompt = i // len(prompts), prompts[i % len(prompts)]
        request_id = f"{prompt.id}#{turn + 1}" if turn else prompt.id
        how = dataclasses.replace(sampling, max_tokens=values.max_tokens or prompt.max_tokens, seed=sampling.seed + i)
        requests.append(Request(request_id, loaded.tokenizer.encode(loaded.chat(prompt.messages)), how))
        questions[request_id] = prompt.messages[-1]["content"]
    return Work(requests, questions)


def _sharegpt_texts(values: flags.FlagValues, loaded: LoadedModel, num_requests: int, sampling: SamplingParams) -> Work:
    """First questions of real conversations; each output has the length of the recorded answer."""
    max_len, num_dropped = engine_config(values, loaded).max_len, 0
    requests, questions = [], {}
    for conversation in workload.read_conversations(workload.find_sharegpt()):
        if len(requests) == num_requests:
            break
        if conversation.first_turn is None or not all(conversation.first_turn):
            continue
        question, answer = conversation.first_turn
        prompt_ids = loaded.tokenizer.encode(loaded.chat([{"role": "user", "content": question}]))
        output_len = values.max_tokens or len(loaded.tokenizer.encode(answer))
        if len(prompt_ids) + output_len > max_len:
            num_dropped += 1
            continue
        seed = sampling.seed + len(requests)
        how = dataclasses.replace(sampling, max_tokens=output_len, ignore_eos=True, seed=seed)
        request_id = f"sharegpt-{len(requests)}"
        requests.append(Request(request_id, prompt_ids, how, expected_output_len=output_len))
        questions[request_id] = question
    _check_count(num_requests, len(requests), values)
    return Work(requests, questions, num_dropped)


def length_trace(values: flags.FlagValues, num_requests: int, rng: np.random.Generator) -> Trace:
    """The trace before the engine's limit; more than asked where lengths are drawn, as some may be too long."""
    name = values.trace
    if name.startswith("constant:"):
        input_len, output_len = map(int, name.removeprefix("constant:").split(","))
        trace = workload.constant_trace(num_requests, input_len=input_len, output_len=output_len)
    elif name in workload.PAPER_TABLE_4:
        trace = workload.table4_trace(name, 4 * num_requests + 100, rng)
    else:
        trace = workload.load_trace(name)
    if values.length_divisor > 1:
        trace = workload.scale_lengths(dataclasses.replace(trace, prompt_ids=None), values.length_divisor)
    if values.max_tokens is not None:
        trace = dataclasses.replace(trace, output_lens=np.full(len(trace), values.max_tokens))
    return trace


def _check_count(num_requests: int, num_found: int, values: flags.FlagValues) -> None:
    if num_found < num_requests:
        raise ValueError(
            f"trace {_without_folder(values.trace)!r} has {num_found} requests of at most {values.max_len} tokens, "
            f"{num_requests} are wanted"
        )


def _without_folder(value: Any) -> Any:
    """A path of this machine says nothing to the reader of a record: its last part does."""
    return pathlib.Path(value).name if isinstance(value, str) and "/" in value else value
