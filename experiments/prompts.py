"""What is served in the main job?  64 prompts of our own: questions, summaries, code, arithmetic, dialogues, stories.

`prompts.jsonl` holds one JSON object per line, `{id, category, messages, max_tokens}`; categories take turns, so the
first few prompts are a fair sample.  The texts were written for this project and share its licence.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

__all__ = ["CATEGORIES", "Prompt", "load_prompts"]

CATEGORIES = ("question", "summary", "code", "arithmetic", "dialogue", "story")
PATH = pathlib.Path(__file__).with_name("prompts.jsonl")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One conversation to be continued.

    messages: dicts with `role` (system, user, assistant) and `content`, as chat templates take them; the last one is
    the user's.    max_tokens: new tokens at most.
    """

    id: str
    category: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int


def load_prompts(
    num_prompts: int | None = None,
    *,
    categories: Sequence[str] = CATEGORIES,
    path: str | os.PathLike[str] = PATH,
) -> list[Prompt]:
    """The first `num_prompts` (all if None) prompts of the `categories`, in file order.

    Raises ValueError for an unknown category, for more prompts than there are, and, with the line, for a bad entry.
    """
    if unknown := set(categories) - set(CATEGORIES):
        raise ValueError(f"category {sorted(unknown)} is unknown: {', '.join(CATEGORIES)}")
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    prompts = [_parse(text, f"{path}, line {line}") for line, text in enumerate(lines, start=1)]
    chosen = [prompt for prompt in prompts if prompt.category in categories]
    if num_prompts is not None and not 0 <= num_prompts <= len(chosen):
        raise ValueError(f"num_prompts={num_prompts} must be in [0, {len(chosen)}]")
    return chosen[:num_prompts]


def _parse(text: str, where: str) -> Prompt:
    try:
        entry = json.loads(text)
        prompt = Prompt(entry["id"], entry["category"], tuple(entry["messages"]), entry["max_tokens"])
        is_good = (
            prompt.category in CATEGORIES
            and prompt.max_tokens >= 1
            and all(set(message) == {"role", "content"} and message["content"] for message in prompt.messages)
            and prompt.messages[-1]["role"] == "user"
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: not a prompt: {error!r}") from error
    if not is_good:
        raise ValueError(f"{where}: not a prompt: {text[:80]!r}")
    return prompt
