"""How does a line of JSON become a request, and an output a line of JSON?  Pure functions; one bad line harms no other.

    {"id": "a", "prompt": "Once upon a time", "max_tokens": 32}
    {"id": "b", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.8, "seed": 7, "logprobs": true}
    {"id": 3, "prompt_ids": [1, 403, 9], "ignore_eos": true}

`id` is text or an integer.  `prompt` is taken as it is, `messages` go through the model's chat template.  Everything
else is optional and as in `nanojax.workload.SamplingParams`; `stop` is a text or a list of texts.  What a line does not say is
as the caller's `defaults`.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from nanojax.live_request import Output
from nanojax.weights import ChatTemplate, Tokenizer
from nanojax.workload import Request, SamplingParams

MAX_TOP_K = 2**31 - 1
DEFAULTS = SamplingParams()
PROMPT_KEYS = ("prompt", "prompt_ids", "messages")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text_or_texts(value: Any) -> bool:
    return all(isinstance(text, str) for text in (value if isinstance(value, list) else [value]))


SAMPLING_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (_is_int, "an integer"),
    "temperature": (_is_number, "a number"),
    "top_k": (lambda value: _is_int(value) and value <= MAX_TOP_K, f"an integer of at most {MAX_TOP_K}"),
    "top_p": (_is_number, "a number"),
    "seed": (_is_int, "an integer"),
    "stop": (_is_text_or_texts, "a text or a list of texts"),
    "ignore_eos": (_is_bool, "true or false"),
    "logprobs": (_is_bool, "true or false"),
}
KEYS = ("id", *PROMPT_KEYS, *SAMPLING_TYPES)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the input: `request` where it is good, else `error`.  `given_id` is the id as it was written."""

    given_id: str | int | None
    request: Request | None = None
    error: str | None = None


def parse_requests(
    data: bytes,
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    check: Callable[[Request], None] = lambda request: None,
    defaults: SamplingParams = DEFAULTS,
) -> list[Line]:
    """The lines of a file, in order; blank ones are left out.

    check: raises ValueError for a request that the engine cannot serve (`Engine.check`).
    """
    lines, seen = [], set()
    for number, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        given_id, error, request = None, None, None
        try:
            entry = _parse_object(text)
            given_id = _id_of(entry)
            request = to_request(entry, tokenizer, chat, defaults)
            if request.request_id in seen:
                raise ValueError(f"id {given_id!r} is used twice")
            check(request)
            seen.add(request.request_id)
        except ValueError as problem:
            error, request = f"line {number}: {problem}", None
        lines.append(Line(given_id, request, error))
    return lines


def to_request(
    entry: dict[str, Any], tokenizer: Tokenizer, chat: ChatTemplate, defaults: SamplingParams = DEFAULTS
) -> Request:
    """The request of one parsed line.  Raises ValueError naming the key, its value and what is allowed."""
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"key {key!r} is unknown; known are {', '.join(KEYS)}")
    given = [key for key in PROMPT_KEYS if key in entry]
    if len(given) != 1:
        raise ValueError(f"one of {', '.join(PROMPT_KEYS)} is needed, got {' and '.join(given) or 'none'}")
    sampling = {}
    for key, (is_good, rule) in SAMPLING_TYPES.items():
        if key in entry:
            if not is_good(entry[key]):
                raise ValueError(f"{key}={_short(entry[key])} must be {rule}")
            sampling[key] = entry[key]
    if "stop" in sampling:
        sampling["stop"] = tuple([sampling["stop"]] if isinstance(sampling["stop"], str) else sampling["stop"])
    for key in ("temperature", "top_p"):
        if key in sampling:
            sampling[key] = _to_float(key, sampling[key])
    return Request(str(_id_of(entry)), _prompt_ids(entry, tokenizer, chat), dataclasses.replace(defaults, **sampling))


def format_line(line: Line, output: Output | None) -> str:
    """The answer to `line`, as JSON without a line break."""
    if output is None:
        return json.dumps({"id": line.given_id, "error": line.error})
    return json.dumps({
        "id": line.given_id, "token_ids": output.token_ids, "text": output.text, "logprobs": output.logprobs,
        "finish_reason": output.finish_reason,
    })  # fmt: skip


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON object is needed, got {_short(entry)}")
    return entry


def _id_of(entry: dict[str, Any]) -> str | int:
    found: Any = entry.get("id")
    if not (isinstance(found, str) or _is_int(found)):
        raise ValueError(f"id={_short(found)} must be a text or an integer")
    return found


def _prompt_ids(entry: dict[str, Any], tokenizer: Tokenizer, chat: ChatTemplate) -> tuple[int, ...]:
    if "prompt_ids" in entry:
        ids = entry["prompt_ids"]
        if not (isinstance(ids, list) and all(map(_is_int, ids))):
            raise ValueError(f"prompt_ids={_short(ids)} must be a list of integers")
        return tuple(ids)
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str):
            raise ValueError(f"prompt={_short(entry['prompt'])} must be a text")
        return _encode(tokenizer, entry["prompt"])
    messages = entry["messages"]
    if not (isinstance(messages, list) and all(map(_is_message, messages))):
        raise ValueError(f"messages={_short(messages)} must be a list of objects with texts as role and content")
    return _encode(tokenizer, chat(messages))


def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    try:
        return tokenizer.encode(text)
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise ValueError(f"the text is not valid Unicode at character {error.start}") from error


def _to_float(key: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{key}={_short(value)} is too large") from error


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
