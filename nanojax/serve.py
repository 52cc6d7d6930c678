"""How do I serve requests?  `Engine`: the one mutable host object.  It feeds the device, reads its reports, keeps the clock.

engine = Engine(config, model, params, policy=policy, tokenizer=tokenizer)
outputs = engine.generate(requests)            # offline
engine.submit(request); events = engine.poll() # online: one launch per poll, tokens as they come
"""

import collections
import dataclasses
import enum
import functools
import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojax import engine as core
from nanojax import intake, invariants, scheduler
from nanojax.array_types import Params
from nanojax.config import EngineConfig, ModelConfig
from nanojax.engine import Arrivals, Finish, Forward
from nanojax.huge_pages import use_huge_pages
from nanojax.invariants import InvariantError
from nanojax.live_request import Event, LiveRequest, Output
from nanojax.metrics import RequestRecord, StepRecord
from nanojax.pipeline import execute
from nanojax.pipeline.compiler_options import Graphs, best_graphs, gpu_options
from nanojax.pipeline.ir import Pipeline
from nanojax.sampling import NO_TOKEN
from nanojax.scheduler import Policy
from nanojax.text_stream import TextStream
from nanojax.weights.tokenizer import Tokenizer
from nanojax.workload import Request


class Driver(enum.Enum):
    """How the host launches steps: waiting for each, one step ahead, or several steps per launch."""

    HOST_SYNC = "host_sync"
    DISPATCH_AHEAD = "dispatch_ahead"
    DEVICE_LOOP = "device_loop"


@dataclasses.dataclass(frozen=True)
class _Launch:
    """A launch whose report was not read yet; `num_loaded` prompt tokens had been loaded when it started."""

    budget: int
    num_loaded: int
    report: core.StepReport


class Engine:
    """Continuous batching over one model on the default device.

    `clock` gives seconds; everything else that the engine touches comes in through its arguments.  `records` and `steps` grow
    as requests finish and steps are read; `reset_metrics` empties them.  `pipelines` says how steps of a token budget run
    (ValueError as `execute.forward_per_budget`), `use_streams` whether on the GPU streams they name, `overlap` how these divide the
    GPU (as in `execute.forward`), `graphs` what the host launches there (`compiler_options.best_graphs` if None); `forward` takes
    the place of the model, pipelines included.  `check_invariants` checks the state's laws after every step, so that a launch of
    the device loop is one step, not `steps_per_launch`.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        params: Params,
        *,
        policy: Policy,
        tokenizer: Tokenizer | None = None,
        driver: Driver = Driver.DISPATCH_AHEAD,
        attention: str | None = None,
        pipelines: Mapping[int, Pipeline] | None = None,
        use_streams: bool = False,
        overlap: str = "xla",
        graphs: Graphs | None = None,
        kv_dtype=jnp.float32,
        forward: Forward | None = None,
        steps_per_launch: int = 8,
        check_invariants: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config, self.model, self.tokenizer, self.driver = config, model, tokenizer, driver
        self.records: list[RequestRecord] = []
        self.steps: list[StepRecord] = []
        # Committed from the start: what a step returns is, and a program compiles once for each case it meets.
        device = next(iter(jax.tree.leaves(params)[0].devices()))
        self._params, self._state = jax.device_put((params, _init(config, model, kv_dtype)), device)
        use_huge_pages(self._state.kv)  # a step updates it in place
        self._clock = clock
        forwards = execute.forward_per_budget(
            model, config.token_budgets, pipelines or {}, attention=attention, use_streams=use_streams,
            overlap=overlap,
        )  # fmt: skip
        if forward is not None:
            forwards = dict.fromkeys(config.token_budgets, forward)
        self._load = jax.jit(core.load, donate_argnums=0)
        self._cancel = jax.jit(core.cancel, donate_argnums=0)

        def options(budget: int) -> dict[str, Any] | None:
            own = graphs or best_graphs((pipelines or {}).get(budget), use_streams=use_streams)
            return dict(gpu_options(own)) if device.platform == "gpu" else None

        self._launch = {
            budget: jax.jit(
                _launch_fn(driver, config, policy, own, budget, 1 if check_invariants else steps_per_launch),
                donate_argnums=1,
                compiler_options=options(budget),
            )
            for budget, own in forwards.items()
        }
        self._holds = jax.jit(functools.partial(invariants.holds, config)) if check_invariants else None
        self._queue_key = _QUEUE_KEYS.get(policy.priority, lambda request: 0)
        self._depth = 1 if driver is Driver.DISPATCH_AHEAD else 0
        self._flying: collections.deque[_Launch] = collections.deque()
        self._num_loaded = 0
        self._num_todo = 0
        self._live: dict[int, LiveRequest] = {}
        self._serial_of: dict[str, int] = {}
        self._queue: list[tuple[int, int]] = []
        self._free_slots = list(range(config.num_slots))[::-1]
        self._num_submitted = 0
        self._ready = config.token_budgets

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not yet finished, as far as the host knows."""
        return len(self._live)

    def check(self, request: Request) -> None:
        """Raises ValueError, naming the value and the limit, if this engine can never serve `request`."""
        stop_tokens = self._stop_tokens(request)
        intake.check(self.config, self.model, request, stop_tokens, can_decode=self.tokenizer is not None)
        if request.request_id in self._serial_of:
            raise ValueError(f"request {request.request_id!r}: a request with this id is not finished yet")

    def submit(self, request: Request) -> None:
        """Queues a request; it arrives now.  Raises ValueError as `check` does."""
        self.check(request)
        serial = self._num_submitted
        self._num_submitted += 1
        self._live[serial] = LiveRequest(request, self._clock(), TextStream(self.tokenizer, request.sampling.stop))
        self._serial_of[request.request_id] = serial
        heapq.heappush(self._queue, (self._queue_key(request), serial))

    def poll(self) -> list[Event]:
        """Feeds free slots, launches once, and returns what has become known; does nothing when all is finished."""
        self._fill_slots()
        if self._live:
            budget = self._pick_budget()
            self._state, report = self._launch[budget](self._params, self._state)
            self._flying.append(_Launch(budget, self._num_loaded, report))
            if self._holds is not None:
                invariants.check(self.config, self._state, self._holds(self._state))
        events: list[Event] = []
        while len(self._flying) > (self._depth if self._live else 0):
            events += self._read(self._flying.popleft())
        return events

    def cancel(self, request_id: str) -> Output:
        """Ends a request now and returns what it had.  Its pages are free when the next step is planned.

        Raises KeyError for a request that is not running or queued.
        """
        serial = self._serial_of[request_id]
        return self._finish(serial, "cancelled", self._clock())

    def generate(
        self, requests: Sequence[Request], on_event: Callable[[Event], None] = lambda event: None
    ) -> list[Output]:
        """Serves all requests, offered at once, and returns their outputs in the order given.

        Raises ValueError for the first request that cannot be served, or an id used twice, before any is started.
        """
        self._check_all(requests)
        for request in requests:
            self.submit(request)
        outputs: dict[str, Output] = {}
        while self._live:
            self._poll_into(outputs, on_event)
        return [outputs[request.request_id] for request in requests]

    def replay(
        self, requests: Sequence[Request], on_event: Callable[[Event], None] = lambda event: None
    ) -> list[Output]:
        """Serves requests that arrive at their `arrival_s`, in real time from now; idle until the next arrival.

        Raises ValueError as `generate` does, before any is started.
        """
        self._check_all(requests)
        start = self._clock()
        waiting = collections.deque(sorted(requests, key=lambda request: request.arrival_s))
        outputs: dict[str, Output] = {}
        while waiting or self._live:
            while waiting and waiting[0].arrival_s <= self._clock() - start:
                self.submit(waiting.popleft())
            if not self._live:
                time.sleep(max(0.0, min(0.01, waiting[0].arrival_s - (self._clock() - start))))
            self._poll_into(outputs, on_event)
        return [outputs[request.request_id] for request in requests]

    def start_in_the_middle(self, requests: Sequence[Request]) -> None:
        """Submits requests as if their prompts had been computed before; what they then say means nothing.

        For measurements of a steady state, which else takes minutes to reach.  Raises ValueError as `check` does, or when
        slots or pages are not enough for all of them, or some others are not finished.
        """
        num_pages = sum(-(-len(request.prompt_ids) // self.config.page_size) for request in requests)
        if self._live or len(requests) > self.config.num_slots or num_pages > self.config.num_pages:
            raise ValueError(
                f"{len(requests)} requests of {num_pages} pages beside {len(self._live)} unfinished ones do not fit "
                f"num_slots={self.config.num_slots}, num_pages={self.config.num_pages}"
            )
        self._check_all(requests)
        for request in requests:
            self.submit(request)
        self._fill_slots()
        self._state = jax.jit(functools.partial(core.assume_computed, self.config), donate_argnums=0)(self._state)
        self._num_todo = len(requests)

    def warm_up(self, budgets: Sequence[int] | None = None) -> None:
        """Compiles everything that serving needs, so that no request waits for it.

        budgets: only for steps of so many tokens, some of the engine's; all steps are such until this is called again.
        """
        self._ready = self.config.token_budgets if budgets is None else tuple(budgets)
        nothing = self._arrivals([])
        self._state = self._load(self._state, nothing)
        self._state = self._cancel(self._state, jnp.zeros((self.config.num_slots,), bool))
        for budget in self._ready:
            self._state, report = self._launch[budget](self._params, self._state)
            jax.block_until_ready(report)

    def reset_metrics(self) -> None:
        """Forgets all records of requests and steps."""
        self.records, self.steps = [], []

    def _check_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.check(request)
        ids = [request.request_id for request in requests]
        if len(set(ids)) < len(ids):
            raise ValueError(f"request id {next(i for i in ids if ids.count(i) > 1)!r} is used twice")

    def _poll_into(self, outputs: dict[str, Output], on_event: Callable[[Event], None]) -> None:
        """Polls once, tells the news, and collects what is finished."""
        for event in self.poll():
            on_event(event)
            if event.output is not None:
                outputs[event.request_id] = event.output

    def _fill_slots(self) -> None:
        while self._queue and self._free_slots:
            serials = []
            while self._queue and self._free_slots and len(serials) < intake.LOAD_ROWS:
                _, serial = heapq.heappop(self._queue)
                if serial in self._live:  # else cancelled while queued
                    self._live[serial].slot = self._free_slots.pop()
                    serials.append(serial)
            if serials:
                self._state = self._load(self._state, self._arrivals(serials))
                num_tokens = sum(len(self._live[serial].request.prompt_ids) for serial in serials)
                self._num_loaded += num_tokens
                self._num_todo += num_tokens

    def _arrivals(self, serials: Sequence[int]) -> Arrivals:
        live = [self._live[serial] for serial in serials]
        rows = [
            intake.Row(serial, entry.slot, entry.request, self._stop_tokens(entry.request))
            for serial, entry in zip(serials, live, strict=True)
            if entry.slot is not None
        ]
        return intake.arrivals(self.config, rows)

    def _stop_tokens(self, request: Request) -> tuple[int, ...]:
        eos = () if request.sampling.ignore_eos or self.tokenizer is None else self.tokenizer.eos_ids
        return tuple(dict.fromkeys((*request.sampling.stop_tokens, *eos)))

    def _pick_budget(self) -> int:
        """The smallest budget that holds the work there will be, as far as the host can tell; else the largest.

        `_num_todo` is exact after the last report that was read plus what was loaded since.  A launch still under way takes up
        to its budget off that, and each running request comes back with one new token.
        """
        todo = self._num_todo
        num_rows = self.config.num_slots - len(self._free_slots)
        for launch in self._flying:
            todo = max(todo - launch.budget, 0) + min(num_rows, launch.budget)
        return next((budget for budget in self._ready if budget >= todo), self._ready[-1])

    def _read(self, launch: _Launch) -> list[Event]:
        """Turns one launch's report (stacked reports for the device loop) into events; waits for the device if it must."""
        report = jax.device_get(launch.report)
        fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
        now = self._clock()
        if fields["token"].ndim == 1:
            return self._read_step(launch, fields, now)
        steps = ({name: values[i] for name, values in fields.items()} for i in range(len(fields["token"])))
        return [event for step in steps for event in self._read_step(launch, step, now)]

    def _read_step(self, launch: _Launch, step: dict[str, np.ndarray], now: float) -> list[Event]:
        """Books one step, given as the fields of its report."""
        if step["num_running"] == 0 and step["num_waiting"] == 0:
            return []  # launched before the host knew that all is done
        names = ("num_decode_tokens", "num_prefill_tokens", "num_running", "num_waiting", "pages_in_use")
        self.steps.append(StepRecord(now, launch.budget, **{name: int(step[name]) for name in names}))
        if self.steps[-1].num_decode_tokens + self.steps[-1].num_prefill_tokens == 0:
            raise InvariantError("no request can move\n" + invariants.describe(self.config, self._state))
        self._num_todo = int(step["num_todo"]) + self._num_loaded - launch.num_loaded
        ids = step["request_id"]
        for slot in np.flatnonzero(step["preempted"]):
            if (entry := self._live.get(int(ids[slot]))) is not None:
                entry.num_preemptions += 1
        events = []
        for slot in np.flatnonzero(step["token"] != NO_TOKEN):
            serial = int(ids[slot])
            if serial in self._live:  # else cancelled, or ended by a stop string, while the step was under way
                finish = Finish(step["finish"][slot])
                events.append(self._append(serial, int(step["token"][slot]), float(step["logprob"][slot]), finish, now))
        return events

    def _append(self, serial: int, token: int, logprob: float, finish: Finish, now: float) -> Event:
        entry = self._live[serial]
        reason = entry.add(token, logprob, finish, now)
        output = self._finish(serial, reason, now, on_device=finish is Finish.NOT) if reason is not None else None
        return Event(entry.request.request_id, (token,), entry.stream.take(), output)

    def _finish(self, serial: int, reason: str, now: float, *, on_device: bool = True) -> Output:
        """Closes the books of a request; `on_device`: the device still holds it and must forget it."""
        entry = self._live.pop(serial)
        del self._serial_of[entry.request.request_id]
        if entry.slot is not None:
            if on_device:
                self._state = self._cancel(self._state, jnp.arange(self.config.num_slots) == entry.slot)
            self._free_slots.append(entry.slot)
        output = entry.output(reason, now, has_text=self.tokenizer is not None)
        self.records.append(output.record)
        return output


_init = jax.jit(core.init, static_argnums=(0, 1, 2))  # one program, not one for each array


def _launch_fn(
    driver: Driver, config: EngineConfig, policy: Policy, forward: Forward, budget: int, steps_per_launch: int
) -> Callable:
    if driver is Driver.DEVICE_LOOP:
        return functools.partial(core.run, config, policy, forward, budget, steps_per_launch)
    return functools.partial(core.step, config, policy, forward, budget)


def _output_len(request: Request) -> int:
    """Tokens that the request will get, as far as anybody knows."""
    return request.expected_output_len or request.sampling.max_tokens


_QUEUE_KEYS: dict[scheduler.PriorityFn, Callable[[Request], int]] = {
    scheduler.shortest_prompt: lambda request: len(request.prompt_ids),
    scheduler.shortest_job: lambda request: len(request.prompt_ids) + _output_len(request),
    scheduler.longest_output: lambda request: -_output_len(request),
}
"""The host's queue of requests that have no slot yet is in the order of the device's."""
