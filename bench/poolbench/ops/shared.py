"""Shared parts of the pooling ops: axes and positions of dimensions, unknown sizes, and code to paste."""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import math
import textwrap
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from poolbench import Case, KnownFailure, TensorSpec, Tolerance, candidate, choice_axis, shape_axis

Builder = Callable[[Case], Any]
Call = Callable[..., Any]

# shape is (N, H, W, C) for every data format.
IMAGE_AXES = (
    shape_axis("shape", (32, 56, 56, 96), rank=4),
    choice_axis("data_format", "channels_last", "channels_first", quiet=True),
    choice_axis("distribution", "normal", "relu", quiet=True),
)
# The largest shape of a sweep.
LARGEST = (32, 112, 112, 96)


def trainable_size(case: Case) -> bool:
    """Exclude training at the largest shape, whose gradients take seconds to compile and to run."""
    return bool(case.direction == "forward" or case.shape != LARGEST)


def image_spec(case: Case) -> TensorSpec:
    """Return the images of a case as its data format lays them out."""
    n, *space, c = case.shape
    shape = (n, *space, c) if channels_last(case) else (n, c, *space)
    return TensorSpec(shape, case.dtype, fill=case.distribution)


def channels_last(case: Case) -> bool:
    """Tell whether the channels are the last dimension."""
    return bool(case.data_format == "channels_last")


def kernel_layout(case: Case) -> str:
    """Return the data format as TensorFlow's kernels name it."""
    return "NHWC" if channels_last(case) else "NCHW"


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

    known = list(x.shape)
    dynamic = tf.shape(x) if None in known else known
    return [dynamic[i] if size is None else size for i, size in enumerate(known)]


WRONG = "beyond the bound|not finite"  # as the check says it


def known(
    reason: str, when: Callable[[Case], bool], *, matches: str = WRONG, issue: str = ""
) -> KnownFailure:
    """Return a documented failure; the arguments are those of KnownFailure."""
    return KnownFailure(when=when, matches=matches, reason=reason, issue=issue)


MEANS = known("It computes the average alone.", lambda case: case.reduction == "max")
# A sum in half precision stops growing when its terms fall below its last digit.
NARROW_SUM = known(
    "It accumulates in the input's own 16 bits, and large sums lose their small terms.",
    lambda case: case.dtype in ("float16", "bfloat16"),
    issue="tensorflow#57057",
)
CHANNELS_LAST_ONLY = known(
    "The CPU kernel takes channels_last only.",
    lambda case: case.device.startswith("cpu") and not channels_last(case),
    matches="only supports NHWC|NHWC tensor format|NCHW",
)


def narrow_window(window: Callable[[Case], tuple[int, ...]]) -> KnownFailure:
    """Return the known failure of tf.nn.max_pool2d's gradient, given the window of a case."""
    return known(
        "oneDNN's half-precision gradient is wrong for windows of 256 elements and more.",
        lambda case: (
            (case.device, case.mode, case.direction) == ("cpu:0", "graph", "training")
            and case.dtype in ("float16", "bfloat16")
            and math.prod(window(case)) >= 256
        ),
        matches="beyond the bound",
        issue="oneDNN#2386",
    )


def no_error(case: Case) -> Tolerance:
    """Allow no error: a maximum is one of its elements."""
    del case
    return Tolerance(relative=0.0, absolute=0.0, reason="a maximum is one of its elements")


def accumulator(case: Case) -> str:
    """Return the dtype of sums: float32, or float64."""
    return "float64" if case.dtype == "float64" else "float32"


def implementation(*, op: str, name: str, **options: Any) -> Callable[[Builder], Builder]:
    """Register a builder as `poolbench.candidate` does; the code to paste is its own, with the case's values."""

    def enter(build: Builder) -> Builder:
        return candidate(op=op, name=name, snippet=partial(paste, build), **options)(build)

    return enter


MODULES = {"tensorflow": "tensorflow", "jax": "jax.numpy", "torch": "torch"}


def function(
    *, op: str, name: str, backend: str = "tensorflow", **options: Any
) -> Callable[[Call], Call]:
    """Register a function of (case, module, *inputs), with the backend's module of MODULES, as an implementation.

    What runs is the code to paste: reading the case takes microseconds, which each eager call would pay.
    """

    def enter(call: Call) -> Call:
        snippet = partial(paste, call, module=MODULES[backend])

        @wraps(call)
        def build(case: Case) -> Call:
            code, space = snippet(case), dict[str, Any]()
            file = f"<{name} {hash(code)}>"
            linecache.cache[file] = (len(code), None, code.splitlines(True), file)  # for AutoGraph
            exec(compile(code, file, "exec"), space)  # noqa: S102 (our own code)
            pool: Call = space["pool"]
            return pool

        candidate(op=op, name=name, backends=(backend,), snippet=snippet, **options)(build)
        return call

    return enter


def paste(code: Call, case: Case, module: str = "tensorflow") -> str:
    """Return the code of a builder, or of a `function`, with the case's values in place of what it reads of it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    (node,) = tree.body
    assert isinstance(node, ast.FunctionDef)
    arguments = node.args.args
    node.body = node.body[1:]  # without the docstring
    node = _Folded(inspect.unwrap(code).__globals__, case).visit(node)
    ends = [i for i, line in enumerate(node.body) if isinstance(line, (ast.Return, ast.Raise))]
    node.body = node.body[: ends[0] + 1]
    if len(arguments) > 1:
        node.name, node.decorator_list, node.args.args = "pool", [], arguments[2:]
        named = "" if module == arguments[1].arg else f" as {arguments[1].arg}"
        return f"import {module}{named}\n\n{ast.unparse(node)}\n"
    last = node.body[-1]
    node.body[-1] = ast.parse(f"pool = {ast.unparse(last.value)}").body[0]
    return "\n".join(ast.unparse(line) for line in node.body) + "\n"


def _is_literal(value: Any) -> bool:
    """Tell whether a value reads as itself in Python: a number or text, or a tuple or list of them."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_literal, value))
    return isinstance(value, (bool, int, float, str))


# What a Keras layer does without being told.
USUAL = {("data_format", "channels_last"), ("dtype", "float32")}


class _Folded(ast.NodeTransformer):
    """Replace what depends on the case alone by its value, branches too; drop annotations and a layer's defaults."""

    def __init__(self, names: dict[str, Any], case: Case) -> None:
        self._names, self._case = names, case
        self._known = {"case", *names, *dir(builtins)}

    def visit(self, node: ast.AST) -> Any:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == sizes.__name__
        ):
            return ast.parse(repr([-1, *image_spec(self._case).shape[1:]]), mode="eval").body
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        if isinstance(node, ast.expr) and "case" in names and names <= self._known:
            value = eval(ast.unparse(node), dict(self._names), {"case": self._case})  # noqa: S307 (our own code)
            if _is_literal(value):
                return ast.parse(repr(value), mode="eval").body
        node = super().visit(node)
        # Of classes alone: a function's dtype is not float32 unless it is told.
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2][0].isupper():
            node.keywords = [
                word
                for word in node.keywords
                if not (
                    isinstance(word.value, ast.Constant) and (word.arg, word.value.value) in USUAL
                )
            ]
        if isinstance(node, (ast.If, ast.IfExp)) and isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node
