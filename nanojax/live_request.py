"""What does the host know of a request, and what does it tell of it?  From its arrival to its output; nothing on the device."""

import dataclasses

from nanojax.engine import Finish
from nanojax.metrics import RequestRecord
from nanojax.text_stream import TextStream
from nanojax.workload import Request


@dataclasses.dataclass(frozen=True)
class Output:
    """A finished request.  `token_ids` includes the stop token, `text` (None without a tokenizer) does not."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str | None
    logprobs: tuple[float, ...] | None
    finish_reason: str
    """`stop`, `length` or `cancelled`."""
    record: RequestRecord


@dataclasses.dataclass(frozen=True)
class Event:
    """News of one request: its new tokens and text, and the whole output once it is finished."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    output: Output | None = None


@dataclasses.dataclass
class LiveRequest:
    """A request that is queued (`slot` is None) or on the device, and what it has got so far.  Times by the engine's clock."""

    request: Request
    arrival_s: float
    stream: TextStream
    slot: int | None = None
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    first_token_s: float = float("nan")
    num_preemptions: int = 0

    def add(self, token: int, logprob: float, finish: Finish, now_s: float) -> str | None:
        """Books a new token, with which the device said `finish`; why the request ends with it, None if it goes on."""
        if not self.token_ids:
            self.first_token_s = now_s
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        reason = _REASONS[finish]
        is_stopped = finish is not Finish.STOP and self.stream.push(token)
        if reason is not None:
            is_stopped |= self.stream.close()
        return "stop" if is_stopped else reason

    def output(self, reason: str, now_s: float, *, has_text: bool) -> Output:
        """What it got, as it ends now."""
        request = self.request
        record = RequestRecord(
            request_id=request.request_id, arrival_s=self.arrival_s, first_token_s=self.first_token_s, finish_s=now_s,
            input_len=len(request.prompt_ids), output_len=len(self.token_ids), num_preemptions=self.num_preemptions,
            finish_reason=reason,
        )  # fmt: skip
        text = self.stream.text if has_text else None
        logprobs = tuple(self.logprobs) if request.sampling.logprobs else None
        return Output(request.request_id, tuple(self.token_ids), text, logprobs, reason, record)


_REASONS = {Finish.NOT: None, Finish.STOP: "stop", Finish.LENGTH: "length"}
