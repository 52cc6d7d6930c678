"""Laws of the engine: schedule invariance, conservation, one compile, in-place updates, liveness, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import tiny

from nanojax import engine as core
from nanojax import serve
from nanojax.config import GREEDY, SamplingParts
from nanojax.serve import Driver
from nanojax.weights.tokenizer import Tokenizer
from nanojax.workload import Request, SamplingParams

REQUESTS = tiny.requests(14, temperature=(0.0, 1.0, 0.8), logprobs=True)
TIGHT = dataclasses.replace(tiny.ENGINE, num_pages=13)


@functools.cache
def expected():
    """Tokens of REQUESTS, each served alone on a large budget."""
    engine = tiny.engine(dataclasses.replace(tiny.ENGINE, token_budgets=(64,), num_slots=1))
    return {r.request_id: engine.generate([r])[0].token_ids for r in REQUESTS}


@pytest.fixture(scope="module")
def shared_engine():
    """One idle engine for the tests that leave it idle."""
    engine = tiny.engine()
    yield engine
    assert engine.num_unfinished == 0
    assert int(engine._state.pool.num_free) == tiny.ENGINE.num_pages


@pytest.fixture(scope="module")
def tight_engine():
    return tiny.engine(TIGHT)


def test_greedy_tokens_are_the_argmax_of_an_independent_model():
    for request in REQUESTS:
        if request.sampling.temperature == 0.0:
            known = [*request.prompt_ids]
            for token in expected()[request.request_id]:
                assert token == numpy_decoder.logits(tiny.LLAMA, tiny.params(tiny.LLAMA), known)[-1].argmax()
                known.append(token)


VARIANTS = {
    "one small budget": (dataclasses.replace(tiny.ENGINE, token_budgets=(8,)), {}),
    "a ladder": (dataclasses.replace(tiny.ENGINE, token_budgets=(2, 4, 16, 48)), {}),
    "one token per step": (dataclasses.replace(tiny.ENGINE, token_budgets=(1,)), {}),
    "large pages": (dataclasses.replace(tiny.ENGINE, page_size=16, num_pages=40), {}),
    "tight pages": (TIGHT, {}),
    "tight pages, small budget": (dataclasses.replace(TIGHT, token_budgets=(4, 8)), {}),
    "tight pages, shortest first": (TIGHT, {"policy": tiny.policy(priority="shortest_prompt")}),
    "tight pages, prefill first": (TIGHT, {"policy": tiny.policy(phase_order="prefill_first")}),
    "tight pages, device loop": (
        TIGHT,
        {"driver": Driver.DEVICE_LOOP, "steps_per_launch": 5, "check_invariants": False},
    ),
    "host waits": (tiny.ENGINE, {"driver": Driver.HOST_SYNC}),
    "device loop": (tiny.ENGINE, {"driver": Driver.DEVICE_LOOP, "steps_per_launch": 3, "check_invariants": False}),
    "device loop, each step checked": (TIGHT, {"driver": Driver.DEVICE_LOOP}),
    "peak memory": (TIGHT, {"policy": tiny.policy("peak_memory")}),
    "past future": (TIGHT, {"policy": tiny.policy("past_future")}),
    "reserve": (TIGHT, {"policy": tiny.policy("reserve_max")}),
    "oracle, shortest job": (TIGHT, {"policy": tiny.policy("oracle", priority="shortest_job")}),
    "tight pages, longest output first": (TIGHT, {"policy": tiny.policy(priority="longest_output")}),
    "static batches": (tiny.ENGINE, {"policy": tiny.policy(batching="static")}),
    "few slots": (dataclasses.replace(tiny.ENGINE, num_slots=2), {}),
    "reference attention": (tiny.ENGINE, {"attention": "reference"}),
    "xla attention": (TIGHT, {"attention": "xla"}),
    "tight pages, as on a GPU": (TIGHT, {"policy": tiny.policy("peak_memory")}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_do_not_depend_on_the_schedule(name, request):
    config, options = VARIANTS[name]
    if "as on a GPU" in name:
        request.getfixturevalue("as_on_a_gpu")
    engine = tiny.engine(config, **options)
    outputs = engine.generate(REQUESTS)
    assert {o.request_id: o.token_ids for o in outputs} == expected()
    assert int(engine._state.pool.num_free) == config.num_pages, "every page is free at the end"
    if name in ("tight pages", "tight pages, small budget", "tight pages, device loop", "tight pages, as on a GPU"):
        assert sum(r.num_preemptions for r in engine.records) > 0, "this case must preempt to mean anything"
    if "reserve" in name or "oracle" in name:
        assert sum(r.num_preemptions for r in engine.records) == 0, "these forecasts never over-admit"


def test_on_a_gpu_a_step_leaves_nothing_to_the_host(request):
    """For a launch ahead is none if the host must first see what the device decides.  Greedy: random bits are loops on a CPU."""
    config = dataclasses.replace(tiny.ENGINE, sampling=SamplingParts(random=False))
    logits = jnp.zeros((config.num_slots, tiny.LLAMA.vocab_size))
    step = functools.partial(
        core.step, config, tiny.policy("peak_memory"), lambda params, kv, batch: (logits, kv), config.token_budgets[0]
    )
    leaves, structure = jax.tree.flatten(core.init(config, tiny.LLAMA))

    def decisions():
        code = jax.jit(lambda leaves: step({}, jax.tree.unflatten(structure, leaves))).lower(leaves).as_text()
        return {kind for kind in ("case", "if", "while") if f"stablehlo.{kind}" in code}

    assert decisions() == {"case", "while"}
    request.getfixturevalue("as_on_a_gpu")
    assert decisions() == set()


def test_logprobs_are_the_models(shared_engine):
    engine = shared_engine
    engine.reset_metrics()
    for request, output in zip(REQUESTS[:4], engine.generate(REQUESTS[:4]), strict=True):
        known = [*request.prompt_ids, *output.token_ids]
        logits = numpy_decoder.logits(tiny.LLAMA, tiny.params(tiny.LLAMA), known)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        at = np.arange(len(request.prompt_ids) - 1, len(known) - 1)
        np.testing.assert_allclose(output.logprobs, logprobs[at, output.token_ids], atol=1e-3)


def test_one_trace_serves_everything():
    traces = []

    def forward(params, kv, batch):
        traces.append(batch.tokens.shape[0])
        return serve.execute.forward(tiny.LLAMA, params, kv, batch)

    engine = tiny.engine(forward=forward)
    engine.generate(tiny.requests(9))
    engine.generate(tiny.requests(3, seed=5, temperature=(1.0,), top_k=5))
    assert sorted(traces) == list(tiny.ENGINE.token_budgets), "each rung is traced once"


@pytest.mark.parametrize(
    ("driver", "kv_dtype"), [(Driver.DISPATCH_AHEAD, jnp.float32), (Driver.DEVICE_LOOP, jnp.uint16)]
)
def test_a_launch_updates_kv_in_place_and_calls_no_host(driver, kv_dtype, unchecked):
    """Over a cache that dwarfs everything else, so that a copy of it cannot hide."""
    config = dataclasses.replace(tiny.ENGINE, num_pages=4096)
    engine = tiny.engine(config, driver=driver, kv_dtype=kv_dtype, check_invariants=False)
    kv_bytes = sum(x.nbytes for x in jax.tree.leaves(engine._state.kv))
    lowered = engine._launch[32].lower(engine._params, engine._state)
    assert "callback" not in lowered.as_text()
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= kv_bytes
    assert memory.temp_size_in_bytes < kv_bytes / 4, f"{memory.temp_size_in_bytes} B of temporaries, KV is {kv_bytes} B"


@pytest.fixture(scope="module", params=list(Driver))
def any_driver(request):
    """An engine with a text for each token, of each driver; of several steps a launch where the driver has them."""
    tokenizer = Tokenizer(str.encode, tuple(f"<{i}>".encode() for i in range(tiny.LLAMA.vocab_size)), (), None)
    engine = tiny.engine(
        driver=request.param, tokenizer=tokenizer, steps_per_launch=2,
        check_invariants=request.param is not Driver.DEVICE_LOOP,
    )  # fmt: skip
    yield engine
    assert engine.num_unfinished == 0
    assert int(engine._state.pool.num_free) == tiny.ENGINE.num_pages


def test_a_stop_string_ends_its_request_and_no_other(any_driver):
    """The device does not know of it: it may be a step ahead when the host reads the token that completes the string."""
    asked = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, logprobs=False)) for r in REQUESTS[:6]]
    free = {o.request_id: o for o in any_driver.generate(asked)}
    stopped = max(asked, key=lambda r: len(free[r.request_id].token_ids))
    tokens = free[stopped.request_id].token_ids
    assert len(tokens) > 6
    stop = f"{tokens[2]}><{tokens[3]}>"  # across two tokens, from the middle of one
    text = free[stopped.request_id].text
    assert text == "".join(f"<{token}>" for token in tokens)
    how = dataclasses.replace(stopped.sampling, stop=("nowhere", stop))
    any_driver.reset_metrics()
    outputs = any_driver.generate([dataclasses.replace(r, sampling=how) if r is stopped else r for r in asked])
    for output in outputs:
        whole = free[output.request_id]
        if output.request_id != stopped.request_id:
            assert (output.token_ids, output.text, output.finish_reason) == (whole.token_ids, whole.text, "length")
    output = next(o for o in outputs if o.request_id == stopped.request_id)
    assert (output.finish_reason, output.text) == ("stop", text[: text.index(stop)])
    assert output.text + stop == "".join(f"<{token}>" for token in output.token_ids)


def test_a_cancelled_requests_pages_come_back_at_once(any_driver):
    engine = any_driver
    engine.reset_metrics()
    for request in tiny.requests(4, max_tokens=18):
        engine.submit(request)
    for _ in range(3):
        engine.poll()
    held = np.asarray(engine._state.pool.num_pages)[engine._live[engine._serial_of["r1"]].slot]
    num_free = int(engine._state.pool.num_free)
    partial = engine.cancel("r1")
    assert partial.finish_reason == "cancelled"
    assert held > 0
    assert int(engine._state.pool.num_free) == num_free + held
    assert int(engine._state.scheduler.resident.sum()) == 3
    with pytest.raises(KeyError):
        engine.cancel("r1")
    rest = []
    while engine.num_unfinished:
        rest += [event.output for event in engine.poll() if event.output is not None]
    alone = {o.request_id: o.token_ids for o in engine.generate(tiny.requests(4, max_tokens=18))}
    assert {o.request_id: o.token_ids for o in rest} == {k: v for k, v in alone.items() if k != "r1"}
    assert partial.token_ids == alone["r1"][: len(partial.token_ids)]
    assert int(engine._state.pool.num_free) == tiny.ENGINE.num_pages


def test_a_queued_request_can_be_cancelled():
    engine = tiny.engine(dataclasses.replace(tiny.ENGINE, num_slots=1))
    for request in tiny.requests(3):
        engine.submit(request)
    engine.poll()
    assert engine.cancel("r2").token_ids == ()
    done = []
    while engine.num_unfinished:
        done += [event.request_id for event in engine.poll() if event.output is not None]
    assert done == ["r0", "r1"]


def test_online_arrivals_join_and_stream_the_same_tokens(shared_engine):
    engine = shared_engine
    engine.reset_metrics()
    arriving = [dataclasses.replace(r, arrival_s=0.02 * i) for i, r in enumerate(REQUESTS)]
    streamed: dict[str, list[int]] = {}
    outputs = engine.replay(arriving, lambda e: streamed.setdefault(e.request_id, []).extend(e.token_ids))
    assert {o.request_id: o.token_ids for o in outputs} == expected()
    assert {k: tuple(v) for k, v in streamed.items()} == expected()


def test_a_stop_token_ends_the_request_and_is_part_of_its_tokens(shared_engine):
    greedy = expected()["r0"]
    stop = greedy[len(greedy) // 2]
    how = dataclasses.replace(REQUESTS[0].sampling, stop_tokens=(stop,))
    (output,) = shared_engine.generate([dataclasses.replace(REQUESTS[0], sampling=how)])
    assert output.token_ids == greedy[: greedy.index(stop) + 1]
    assert output.finish_reason == "stop"


def test_seed_alone_decides_the_samples(shared_engine):
    how = SamplingParams(temperature=1.0, seed=7, max_tokens=12)
    same = [Request("a", (1, 2, 3), how), Request("b", (1, 2, 3), how)]
    other = Request("c", (1, 2, 3), dataclasses.replace(how, seed=8))
    noise = tiny.requests(3, temperature=(0.0, 1.3), top_p=0.5)
    a, b, c, *_ = shared_engine.generate([*same, other, *noise])
    assert a.token_ids == b.token_ids != c.token_ids


BAD = {
    "prompt of 60 tokens plus max_tokens=8 exceeds max_len=64": Request("bad", (1,) * 60, SamplingParams(max_tokens=8)),
    "needs 16 pages at its longest, the pool has num_pages=13": Request("bad", (1,) * 60, SamplingParams(max_tokens=4)),
    "prompt token 97 is outside the vocabulary \\[0, 97\\)": Request("bad", (5, 97)),
    "stop token 99 is outside the vocabulary": Request("bad", (5,), SamplingParams(max_tokens=4, stop_tokens=(99,))),
    "3 stop tokens .* exceed max_stop_tokens=2": Request(
        "bad", (5,), SamplingParams(max_tokens=4, stop_tokens=(1, 2, 3))
    ),
    "stop strings \\('x',\\) need a tokenizer": Request("bad", (5,), SamplingParams(max_tokens=4, stop=("x",))),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_requests_are_refused_and_harm_nobody(message, tight_engine):
    engine = tight_engine
    bad = BAD[message]
    if "vocabulary" in message and bad.sampling.max_tokens > 59:
        bad = dataclasses.replace(bad, sampling=SamplingParams(max_tokens=4))
    engine.submit(REQUESTS[0])
    engine.poll()
    with pytest.raises(ValueError, match=message):
        engine.submit(bad)
    with pytest.raises(ValueError, match=message):
        engine.generate([REQUESTS[1], bad])
    with pytest.raises(ValueError, match=message):
        engine.replay([REQUESTS[1], bad])
    assert engine.num_unfinished == 1
    with pytest.raises(ValueError, match="'r0': a request with this id is not finished yet"):
        engine.submit(REQUESTS[0])
    events = []
    while engine.num_unfinished:
        events += engine.poll()
    assert events[-1].output.token_ids == expected()["r0"]
    with pytest.raises(ValueError, match="'r1' is used twice"):
        engine.generate([REQUESTS[1], REQUESTS[1]])


@pytest.mark.parametrize(
    ("asked", "what"),
    [({"temperature": 1.0}, "temperature"), ({"top_p": 0.5}, "top_k or top_p"), ({"logprobs": True}, "logprobs")],
)
def test_a_request_that_asks_for_more_than_was_compiled_is_refused(asked, what):
    engine = tiny.engine(dataclasses.replace(tiny.ENGINE, sampling=GREEDY))
    with pytest.raises(ValueError, match=f"'bad': asks for {what}, .*SamplingParts"):
        engine.submit(Request("bad", (5,), SamplingParams(max_tokens=4, **asked)))


def test_an_engine_longer_than_its_model_is_refused():
    with pytest.raises(ValueError, match="max_len=512 exceeds the 256 tokens"):
        core.init(dataclasses.replace(tiny.ENGINE, max_len=512), tiny.LLAMA)


def test_idle_engine_does_nothing(shared_engine):
    engine = shared_engine
    engine.reset_metrics()
    assert engine.poll() == []
    assert engine.generate([]) == []
    assert engine.steps == []


def test_records_tell_the_order_of_events(shared_engine):
    engine = shared_engine
    engine.reset_metrics()
    engine.generate(REQUESTS)
    assert len(engine.records) == len(REQUESTS)
    for record in engine.records:
        assert record.arrival_s <= record.first_token_s <= record.finish_s
    tokens = sum(s.num_decode_tokens + s.num_prefill_tokens for s in engine.steps)
    assert tokens == sum(r.input_len + r.output_len - 1 for r in engine.records), "each token is computed exactly once"
    assert all(s.num_decode_tokens + s.num_prefill_tokens <= s.token_budget for s in engine.steps)


def test_light_load_runs_on_small_steps(shared_engine):
    engine = shared_engine
    engine.reset_metrics()
    engine.generate([Request("alone", (1, 2, 3), SamplingParams(max_tokens=8))])
    assert {step.token_budget for step in engine.steps} == {min(tiny.ENGINE.token_budgets)}
    engine.reset_metrics()
    engine.generate(tiny.requests(6, max_tokens=4))
    assert engine.steps[0].token_budget == max(tiny.ENGINE.token_budgets)


def test_a_full_budget_is_filled_exactly():
    engine = tiny.engine(dataclasses.replace(tiny.ENGINE, token_budgets=(16,)))
    engine.generate(tiny.requests(6, max_prompt_len=30, max_tokens=2))
    total = sum(s.num_decode_tokens + s.num_prefill_tokens for s in engine.steps)
    full = [s for s in engine.steps if s.num_decode_tokens + s.num_prefill_tokens == 16]
    assert len(full) >= total // 16 - 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_kv_dtypes_serve(dtype):
    outputs = tiny.engine(kv_dtype=dtype).generate(REQUESTS[:3])
    assert [len(o.token_ids) for o in outputs] == [r.sampling.max_tokens for r in REQUESTS[:3]]
