"""Laws of the text stream: stop strings end the text, and nothing that belongs to one is ever shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanojax.text_stream import TextStream
from nanojax.weights.tokenizer import Tokenizer

BYTES = Tokenizer(str.encode, tuple(bytes((i,)) for i in range(256)), (), None)


def run(text: str, stops: tuple[str, ...]):
    """Feeds bytes one by one: (shown, text, stopped)."""
    stream, shown = TextStream(BYTES, stops), ""
    for byte in text.encode():
        stopped = stream.push(byte)
        shown += stream.take()
        if stopped:
            return shown, stream.text, True
    stopped = stream.close()
    return shown + stream.take(), stream.text, stopped


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_stop_string_that_completes_first(text, stops):
    shown, kept, stopped = run(text, tuple(stops))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stopped == bool(ends)
    first_end = min((end for end, _ in ends), default=len(text))
    expected = text[: min((start for end, start in ends if end == first_end), default=len(text))]
    assert shown == kept == expected


@pytest.mark.parametrize(
    ("text", "shown"), [("hello ST", "hello "), ("hello S", "hello "), ("hello", "hello"), ("ST ST", "ST ")]
)
def test_a_tail_that_may_become_a_stop_string_waits(text, shown):
    stream = TextStream(BYTES, ("STOP",))
    taken = ""
    for byte in text.encode():
        stream.push(byte)
        taken += stream.take()
    assert taken == shown


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None, ())
    assert not stream.push(5)
    assert not stream.close()
    assert stream.take() == stream.text == ""
