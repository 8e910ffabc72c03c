"""Messages between a run and a worker process: versioned requests and replies over a pair of pipes.

A message is its length (8 bytes, little endian) and MessagePack made by msgspec. Functions are named
'module:function'; arguments and results are plain data, converted by the function's annotations, so
that the two ends may be different interpreters. A worker says hello first, is told how to start, and
then answers requests one by one:

    Hello -> ; <- Start; Reply 0 -> ; <- Request 1; Reply 1 -> ; ...
"""

from __future__ import annotations

import functools
import importlib
import inspect
import struct
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from poolbench.core.errors import Status
from poolbench.core.plan import WorkerSpec

PROTOCOL = 1
LENGTH = struct.Struct("<Q")
MAX_NBYTES = 1 << 30
PACKAGE = "poolbench"
# Comma-separated modules outside the package whose functions may be called, for tests.
MODULES_VARIABLE = "POOLBENCH_TASK_MODULES"


class MessageError(Exception):
    """Invalid bytes, or a message that this end does not know."""


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """The first message of a worker; every version of the protocol has these fields."""

    protocol: int = PROTOCOL
    version: str = ""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The settings with which a worker starts; its reply has number 0.

    Attributes:
        path: entries of sys.path; empty leaves the interpreter's own.
        files: the user's files that register ops and candidates, imported by path.
    """

    spec: WorkerSpec
    path: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a function by name; the reply carries the same number."""

    number: int
    function: str
    args: msgspec.Raw
    keywords: dict[str, msgspec.Raw]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a request.

    Attributes:
        status, reason: 'ok', or what the function raised in one line.
        value: the result, encoded; None unless it is ok.
        clock: readings of the worker's timer right before and right after the call.
    """

    number: int
    status: Status = "ok"
    reason: str = ""
    value: msgspec.Raw
    clock: tuple[float, float] = (0.0, 0.0)


def encode(message: Any) -> bytes:
    """Return the message in MessagePack."""
    return msgspec.msgpack.encode(message, enc_hook=_to_plain)


def pack(message: Any) -> bytes:
    """Return the bytes of a message for the pipe, its length first."""
    data = encode(message)
    return LENGTH.pack(len(data)) + data


def decode(data: bytes | msgspec.Raw, type_: Any) -> Any:
    """Return the message of this type.

    Raises:
        MessageError: the bytes are none.
    """
    try:
        return _decoder(type_).decode(data)
    except msgspec.MsgspecError as error:
        raise MessageError(f"{getattr(type_, '__name__', type_)} expected: {error}") from error


@functools.cache
def _decoder(type_: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(type_, dec_hook=_from_plain)


def _to_plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"a {type(value).__name__} cannot be sent to or from a worker")


def _from_plain(type_: type[Any], value: Any) -> Any:
    if issubclass(type_, Path):
        return type_(value)
    raise NotImplementedError(f"a {type_.__name__} cannot be sent to or from a worker")


def take_frame(buffer: bytearray) -> bytes | None:
    """Remove the first whole message from the buffer and return it; None if there is none yet.

    Raises:
        MessageError: the length cannot be one.
    """
    if len(buffer) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack_from(buffer)
    if length > MAX_NBYTES:
        raise MessageError(f"a message of {length} bytes")
    end = LENGTH.size + length
    if len(buffer) < end:
        return None
    frame = bytes(buffer[LENGTH.size : end])
    del buffer[:end]
    return frame


def make_request(
    number: int, function: Callable[..., Any], args: Sequence[Any]
) -> tuple[Request, Callable[..., Any]]:
    """Return the request for a module-level function, partially applied or not, and that function."""
    keywords: Mapping[str, Any] = {}
    if isinstance(function, functools.partial):
        args = (*function.args, *args)
        keywords, function = function.keywords, function.func
    request = Request(
        number=number,
        function=f"{function.__module__}:{function.__qualname__}",
        args=msgspec.Raw(encode(tuple(args))),
        keywords={name: msgspec.Raw(encode(value)) for name, value in keywords.items()},
    )
    return request, function


def find_function(name: str, modules: Sequence[str] = ()) -> Callable[..., Any]:
    """Return the function that 'module:function' names, in the package or in one of these modules.

    Raises:
        MessageError: it lies elsewhere, or is no function of its module.
    """
    module, _, function = name.partition(":")
    if module.partition(".")[0] != PACKAGE and module not in modules:
        raise MessageError(f"{name} is no task: its module is not part of {PACKAGE}")
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise MessageError(f"{name} is no function of its module")
    return found  # type: ignore[no-any-return]


def arguments_of(
    function: Callable[..., Any], request: Request, given: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert the request's arguments by the function's annotations.

    Args:
        function: as found by its name.
        request: whose arguments are converted.
        given: how many of the first parameters the worker fills itself.
    """
    hints = _hints(function)
    length = len(msgspec.msgpack.decode(request.args, type=list[msgspec.Raw]))
    args = decode(request.args, _positional(function, given, length))
    keywords = {
        name: decode(value, hints.get(name, Any)) for name, value in request.keywords.items()
    }
    return args, keywords


def result_of(function: Callable[..., Any], reply: Reply) -> Any:
    """Convert the reply's result by the function's return annotation."""
    return decode(reply.value, _hints(function).get("return", Any))


@functools.cache
def takes_session(function: Callable[..., Any]) -> bool:
    """Return whether a task's first parameter is the worker's session."""
    return next(iter(inspect.signature(function).parameters), "") == "session"


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function, include_extras=True)


@functools.cache
def _positional(function: Callable[..., Any], given: int, length: int) -> Any:
    """Return the tuple type of this many positional arguments."""
    hints = _hints(function)
    kinds: list[Any] = []
    for parameter in list(inspect.signature(function).parameters.values())[given:]:
        type_ = hints.get(parameter.name, Any)
        several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        kinds += [type_] * (length - len(kinds) if several else 1)
    return types.GenericAlias(tuple, tuple(kinds[:length]))
