"""How does a conversation become one prompt text?  Chat templates as plain functions.

Each template returns the text up to and including the opening of the assistant's answer.  The texts are those of
the models' own Jinja templates (for plain user/system/assistant messages, no tools).
"""

import functools
from collections.abc import Callable, Mapping, Sequence

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""

ChatTemplate = Callable[[Sequence[Message]], str]

SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN2_SYSTEM = "You are a helpful assistant."
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
ROLES = ("system", "user", "assistant")


def chatml(messages: Sequence[Message], default_system: str | None = None) -> str:
    """ChatML.  `default_system` is put in front when the first message is not the system's.

    Raises ValueError for no messages, a message without role or content, or an unknown role.
    """
    turns = _checked(messages)
    if default_system is not None and turns[0][0] != "system":
        turns = [("system", default_system), *turns]
    body = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return body + "<|im_start|>assistant\n"


def llama3(messages: Sequence[Message]) -> str:
    """Llama 3 headers.  Contents are trimmed, as in Meta's template (3.1 adds dates, which are left out).

    Same errors as `chatml`.
    """
    body = "".join(_llama3_header(role) + content.strip() + "<|eot_id|>" for role, content in _checked(messages))
    return "<|begin_of_text|>" + body + _llama3_header("assistant")


def raw(messages: Sequence[Message]) -> str:
    """No markup: the contents, one per line.  For base models.  Same errors as `chatml`."""
    return "\n".join(content for _, content in _checked(messages))


TEMPLATES: dict[str, ChatTemplate] = {
    "smollm2": functools.partial(chatml, default_system=SMOLLM2_SYSTEM),
    "qwen2.5": functools.partial(chatml, default_system=QWEN25_SYSTEM),
    "qwen2": functools.partial(chatml, default_system=QWEN2_SYSTEM),
    "chatml": chatml,
    "llama3": llama3,
    "raw": raw,
}
"""Model family -> template."""

_MARKERS = (
    (SMOLLM2_SYSTEM, "smollm2"),
    (QWEN25_SYSTEM, "qwen2.5"),
    (f"<|im_start|>system\n{QWEN2_SYSTEM}", "qwen2"),
    (f"<|im_start|>system\\n{QWEN2_SYSTEM}", "qwen2"),
    ("<|im_start|>", "chatml"),
    ("<|start_header_id|>", "llama3"),
)
"""Text in a model's own template -> family, the first that is found.  Jinja may write a line break as backslash n."""


def family_of(template_text: str | None, model_name: str) -> str:
    """Key of `TEMPLATES`: by what the model's own Jinja template says, else (no template) by the model's name."""
    if template_text is None:
        plain = "".join(char for char in model_name.lower() if char.isalnum() or char == ".")
        return next((family for family in ("smollm2", "qwen2.5", "qwen2") if family in plain), "raw")
    return next((family for marker, family in _MARKERS if marker in template_text), "raw")


def _llama3_header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _checked(messages: Sequence[Message]) -> list[tuple[str, str]]:
    if not messages:
        raise ValueError("a conversation needs at least one message; found none")
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"}:
            raise ValueError(f"message {index} has the keys {sorted(message)}; expected ['content', 'role']")
        if message["role"] not in ROLES:
            raise ValueError(f"message {index} has role {message['role']!r}; expected one of {ROLES}")
    return [(message["role"], message["content"]) for message in messages]
