"""What may be shown of a request's text so far?  Decoding as tokens come, and stop strings that end it."""

from collections.abc import Sequence

from nanojax.weights.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """The text of one request; a tail that could still become a stop string is held back.

    Without a tokenizer the text stays empty.  Stop strings are no part of the text.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self.text = ""
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._stops = stops
        self._num_taken = 0
        self._is_closed = False

    def push(self, token_id: int) -> bool:
        """Adds a token's text; True when that completed a stop string, which ends the text before it."""
        return self._decoder is not None and self._add(self._decoder.push(token_id))

    def close(self) -> bool:
        """Adds what is left of an unfinished character; no token follows.  True as for `push`."""
        self._is_closed = True
        return self._decoder is not None and self._add(self._decoder.flush())

    def take(self) -> str:
        """The text that may be shown and was not taken yet."""
        held = 0 if self._is_closed else self._num_held_back()
        end = max(self._num_taken, len(self.text) - held)
        taken, self._num_taken = self.text[self._num_taken : end], end
        return taken

    def _add(self, text: str) -> bool:
        self.text += text
        found = [at for stop in self._stops if (at := self.text.find(stop, self._num_taken)) >= 0]
        if found:
            self.text, self._is_closed = self.text[: min(found)], True
        return bool(found)

    def _num_held_back(self) -> int:
        """Length of the longest tail that begins a stop string."""
        text = self.text
        tails = (
            n for stop in self._stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])
        )
        return max(tails, default=0)
