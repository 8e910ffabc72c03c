"""Shared parts of the pooling ops: axes and positions of dimensions, unknown sizes, and code to paste."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from poolbench import Case, KnownFailure, TensorSpec, candidate, choice_axis, shape_axis

Builder = Callable[[Case], Any]
Call = Callable[..., Any]

# shape is (N, H, W, C) for every data format.
IMAGE_AXES = (
    shape_axis("shape", (32, 56, 56, 96), rank=4),
    choice_axis("data_format", "channels_last", "channels_first", quiet=True),
    choice_axis("distribution", "normal", "relu", quiet=True),
)


def image_spec(case: Case) -> TensorSpec:
    """Return the images of a case as its data format lays them out."""
    n, h, w, c = case.shape
    shape = (n, h, w, c) if case.data_format == "channels_last" else (n, c, h, w)
    return TensorSpec(shape, case.dtype, fill=case.distribution)


def channel_axis(case: Case) -> int:
    """Return the position of the channels: last, or second."""
    return 3 if case.data_format == "channels_last" else 1


def spatial_axes(case: Case) -> tuple[int, int]:
    """Return the positions of height and width."""
    return (1, 2) if case.data_format == "channels_last" else (2, 3)


def sizes(x: Any) -> list[Any]:
    """Return the sizes of a tensor; a number where it is known when traced, else a scalar tensor."""
    import tensorflow as tf

    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]


def accumulator(case: Case) -> str:
    """Return the dtype of sums: float32, or float64."""
    return "float64" if case.dtype == "float64" else "float32"


def known(reason: str, matches: str, when: Callable[[Case], bool], issue: str = "") -> KnownFailure:
    """Return a documented failure; the arguments are those of KnownFailure."""
    return KnownFailure(when=when, matches=matches, reason=reason, issue=issue)


def implementation(*, op: str, name: str, **options: Any) -> Callable[[Builder], Builder]:
    """Register a builder as `poolbench.candidate` does; the code to paste is its own, with the case's values."""

    def enter(build: Builder) -> Builder:
        return candidate(op=op, name=name, snippet=partial(paste, build), **options)(build)

    return enter


def function(*, op: str, name: str, **options: Any) -> Callable[[Call], Call]:
    """Register a function of (case, tf, *inputs), with `tf` the TensorFlow module, as an implementation."""

    def enter(call: Call) -> Call:
        @wraps(call)
        def build(case: Case) -> Call:
            import tensorflow as tf

            return partial(call, case, tf)

        candidate(op=op, name=name, snippet=partial(paste, call), **options)(build)
        return call

    return enter


def paste(code: Call, case: Case) -> str:
    """Return the code of a builder, or of a `function`, with the case's values in place of what it reads of it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    (node,) = tree.body
    assert isinstance(node, ast.FunctionDef)
    arguments = node.args.args
    node.body = node.body[1:]  # without the docstring
    node = _Folded(inspect.unwrap(code).__globals__, case).visit(node)
    ends = [i for i, line in enumerate(node.body) if isinstance(line, ast.Return)]
    node.body = node.body[: ends[0] + 1]
    if len(arguments) > 1:
        node.name, node.decorator_list, node.args.args = "pool", [], arguments[2:]
        return f"import tensorflow as tf\n\n{ast.unparse(node)}\n"
    last = node.body[-1]
    node.body[-1] = ast.parse(f"pool = {ast.unparse(last.value)}").body[0]
    return "\n".join(ast.unparse(line) for line in node.body) + "\n"


class _Folded(ast.NodeTransformer):
    """Replace what depends on the case alone by its value, branches too; drop annotations."""

    def __init__(self, names: dict[str, Any], case: Case) -> None:
        self._names, self._case = names, case

    def visit(self, node: ast.AST) -> Any:
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        if isinstance(node, ast.expr) and "case" in names and names <= {"case", *self._names}:
            value = eval(ast.unparse(node), dict(self._names), {"case": self._case})  # noqa: S307 (our own code)
            if isinstance(value, (bool, int, float, str)):
                return ast.parse(repr(value), mode="eval").body
        node = super().visit(node)
        if isinstance(node, (ast.If, ast.IfExp)) and isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node
