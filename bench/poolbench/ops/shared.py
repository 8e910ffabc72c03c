"""Shared parts of the pooling ops: axes of an image, known failures of several ops, and parts of snippets."""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable
from typing import Any

from poolbench import Case, KnownFailure, TensorSpec, Tolerance, candidate, choice_axis, shape_axis

Snippet = Callable[[Case], str]

# shape is (N, H, W, C) for every data format.
IMAGE_AXES = (
    shape_axis("shape", (32, 56, 56, 96), rank=4),
    choice_axis("data_format", "channels_last", "channels_first", quiet=True),
    choice_axis("distribution", "normal", "relu", quiet=True),
)


def image_spec(case: Case) -> TensorSpec:
    """Return the images of a case as its data format lays them out."""
    n, *space, c = case.shape
    shape = (n, *space, c) if channels_last(case) else (n, c, *space)
    return TensorSpec(shape, case.dtype, fill=case.distribution)


def channels_last(case: Case) -> bool:
    """Tell whether the channels are the last dimension."""
    return bool(case.data_format == "channels_last")


def channel_axis(case: Case) -> int:
    """Return the position of the channels: last, or second."""
    return len(case.shape) - 1 if channels_last(case) else 1


def spatial_axes(case: Case) -> tuple[int, ...]:
    """Return the positions of height and width, or those of as many dimensions as there are."""
    first = 1 if channels_last(case) else 2
    return tuple(range(first, first + len(case.shape) - 2))


def sizes(x: Any) -> list[Any]:
    """Return the sizes of a tensor; a number where it is known when traced, else a scalar tensor."""
    import tensorflow as tf

    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]


# A sum in half precision stops growing when its terms fall below its last digit.
NARROW_SUM = KnownFailure(
    when=lambda case: case.dtype in ("float16", "bfloat16"),
    matches="beyond the bound|not finite",
    reason="It accumulates in the input's own 16 bits, and large sums lose their small terms.",
)
CHANNELS_LAST_ONLY = KnownFailure(
    when=lambda case: case.device.startswith("cpu") and not channels_last(case),
    matches="only supports NHWC|NHWC tensor format|NCHW",
    reason="The CPU kernel takes channels_last only.",
)


def narrow_window(window: Callable[[Case], tuple[int, ...]]) -> KnownFailure:
    """Return the known failure of tf.nn.max_pool2d's gradient, given the window of a case."""
    return KnownFailure(
        when=lambda case: (
            case.device.startswith("cpu")
            and (case.mode, case.direction) == ("graph", "training")
            and case.dtype in ("float16", "bfloat16")
            and math.prod(window(case)) >= 256
        ),
        matches="beyond the bound",
        reason="oneDNN's half-precision gradient is wrong for windows of 256 elements and more.",
    )


def no_error(case: Case) -> Tolerance:
    """Allow no error: a maximum is one of its elements."""
    del case
    return Tolerance(relative=0.0, absolute=0.0, reason="a maximum is one of its elements")


def dtype_words(case: Case) -> list[str]:
    """Return the dtype as an argument of a layer, for a snippet; none for the default."""
    return [] if case.dtype == "float32" else [f'dtype="{case.dtype}"']


def layer_words(case: Case) -> list[str]:
    """Return the arguments of a stock layer that are not its defaults, for a snippet."""
    words = [] if channels_last(case) else ['data_format="channels_first"']
    return [*words, *dtype_words(case)]


def function_snippet(*lines: str, imports: str = "tensorflow as tf") -> str:
    """Return the code of a function `pool` with these lines."""
    head = f"import {imports}\n\n\ndef pool(x):"
    return "\n".join([head, *(f"    {line}" for line in lines)]) + "\n"


def code_candidate(op: str, name: str, **words: Any) -> Callable[[Snippet], Snippet]:
    """Register the decorated function, `code(case) -> text that defines pool`, as a candidate.

    The code that a report shows to paste is the code that is timed.
    """

    def register_code(code: Snippet) -> Snippet:
        def build(case: Case) -> Callable[..., Any]:
            text = code(case)
            file = f"<{name} {hash(text)}>"
            # AutoGraph reads the source of what it traces.
            linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
            space: dict[str, Any] = {}
            exec(compile(text, file, "exec"), space)  # noqa: S102 (a text of this package)
            pool: Callable[..., Any] = space["pool"]
            return pool

        about = (code.__doc__ or "").partition("\n")[0]
        candidate(op=op, name=name, about=about, snippet=code, **words)(build)
        return code

    return register_code
