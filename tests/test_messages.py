"""Messages between a run and its workers: frames, named functions, and arguments by their annotations."""

from pathlib import Path

import numpy as np
import pytest
from poolbench.worker import messages
from poolbench.worker.messages import Hello, MessageError


def places_of(folder: Path, count: int, *more: Path):
    """A task: only its annotations count."""


def test_take_frame_removes_whole_messages_only():
    first, second = (messages.pack(Hello(version=text)) for text in ("1", "2"))
    buffer = bytearray(first + second[:-1])
    assert messages.decode(messages.take_frame(buffer), Hello).version == "1"
    assert messages.take_frame(buffer) is None
    assert buffer == second[:-1]
    buffer += second[-1:]
    assert messages.decode(messages.take_frame(buffer), Hello).version == "2"
    assert buffer == b""


def test_take_frame_of_an_impossible_length_is_refused():
    buffer = bytearray(messages.LENGTH.pack(messages.MAX_NBYTES + 1))
    with pytest.raises(MessageError, match=f"a message of {messages.MAX_NBYTES + 1} bytes"):
        messages.take_frame(buffer)


def test_decode_bytes_of_no_message_says_what_was_expected():
    with pytest.raises(MessageError, match="Hello expected: "):
        messages.decode(b"\xc1", Hello)


def test_arguments_are_converted_by_the_annotations_of_the_function():
    request, function = messages.make_request(
        1, places_of, (Path("a"), np.int64(3), Path("b"), Path("c"))
    )
    assert request.function == f"{__name__}:places_of"
    args, keywords = messages.arguments_of(function, request)
    assert (args, keywords) == ((Path("a"), 3, Path("b"), Path("c")), {})


def test_find_function_name_that_its_module_lacks_is_refused():
    with pytest.raises(MessageError, match="session:nothing is no function of its module"):
        messages.find_function("poolbench.worker.session:nothing")
