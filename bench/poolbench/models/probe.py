"""Identify by values what a function of one tensor computes: run it, and compare it with the ops' references.

Nothing is inferred from names or code. A form is an op on a view of the tensor; every form and parameter that fits the
shapes is compared on random and adversarial inputs, values first, then gradients.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from poolbench.core.axes import Shape
from poolbench.core.case import Case, make_case
from poolbench.core.errors import UsageError
from poolbench.core.op import Op
from poolbench.core.registry import REGISTRY
from poolbench.worker.check import BOUNDS, Answers, bound_for, compare, judge
from poolbench.worker.inputs import numpy_dtype

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# (x, training) -> y, in TensorFlow.
Function = Callable[[Any, bool], Any]
# Number of values tried for an axis of sizes, those nearest to the ratio of input to output.
MAX_VALUES = 64
# The largest output of an op that makes as many windows of any image.
MAX_OUTPUT = 16
# The axes that say how an image lies in memory, and its values: a form gives the first two.
IMAGE = ("shape", "data_format", "distribution")
FORMATS = ("channels_last", "channels_first")


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """An op on a tensor seen as four axes.

    Attributes:
        op: name of the op.
        merged: axes after the batch that are merged into it.
        first, second: where the remaining axes are split into three groups; each group becomes one axis.
        data_format: how the op reads the four axes.
        parameters: of the op: {'pool_size': 3, 'padding': 'valid'}.
    """

    op: str
    merged: int = 0
    first: int = 1
    second: int = 2
    data_format: str = "channels_last"
    parameters: dict[str, str | int] = {}

    @property
    def sizes(self) -> list[int]:
        """Return the parameters that are sizes."""
        return [value for value in self.parameters.values() if isinstance(value, int)]

    def layout(self, shape: Sequence[int]) -> Shape:
        """Return the four sizes that a tensor of this shape is seen as, in memory order."""
        batch, rest = shape[: self.merged + 1], shape[self.merged + 1 :]
        groups = rest[: self.first], rest[self.first : self.second], rest[self.second :]
        return (math.prod(batch), *(math.prod(group) for group in groups))

    def case(self, shape: Sequence[int], dtype: str, **fields: Any) -> Case:
        """Return the op's case for a tensor of this shape."""
        n, a, b, c = self.layout(shape)
        four = (n, a, b, c) if self.data_format == "channels_last" else (n, b, c, a)
        formats = "data_format" in REGISTRY.ops[self.op].axis_names
        return make_case(
            op=self.op, shape=four, dtype=dtype, data_format=self.data_format if formats else None,
            **self.parameters, **fields,
        )  # fmt: skip

    def is_view(self, shape: Sequence[int]) -> bool:
        """Tell whether a tensor of this shape has to be reshaped first."""
        return self.layout(shape) != tuple(shape)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of running a function.

    Attributes:
        form: the op that it equals on every input; None: none.
        inputs: on how many inputs values were compared.
        gradients: on how many of them gradients agreed too; 0: its gradient does not run here, or differs.
        note: what it is instead, or why its gradient was not compared.
    """

    form: Form | None = None
    inputs: int = 0
    gradients: int = 0
    note: str = ""


def probe_inputs(shape: Shape, dtype: str, seed: int = 0) -> list[Array]:
    """Return inputs on which functions that look alike differ.

    Normal; ties; all negative; channels of unlike scale and offset; magnitudes from 1e-6 to 1e3; half zeros, as after
    ReLU; large positive; one element of -inf.
    """
    random = np.random.default_rng(seed)
    normal = random.standard_normal(shape)
    channels = np.linspace(-3, 3, shape[-1])[random.permutation(shape[-1])]
    spread = np.sign(normal) * 10.0 ** random.uniform(-6, 3, shape)
    lowest = random.standard_normal(shape)
    # One element only: correct implementations differ on a window of -inf alone.
    lowest.reshape(shape[0], -1)[:, 0] = -np.inf
    found = [
        normal,
        random.integers(-2, 3, shape).astype(np.float64),
        -np.abs(random.standard_normal(shape)) - 0.5,
        normal * np.abs(channels) + 10 * channels,
        spread,
        np.maximum(random.standard_normal(shape), 0.0),
        100 + 50 * random.random(shape),
        lowest,
    ]
    return [np.asarray(x).astype(numpy_dtype(dtype)) for x in found]


def forms(shape: Shape, size: int) -> Iterator[Form]:
    """Yield the forms of every shipped op of one tensor that could turn this shape into `size` elements.

    The tensor's own four axes come first, then views of it; of the ops, those with the fewest parameters.
    """
    seen: set[tuple[Any, ...]] = set()
    views = [(0, 1, 2)] if len(shape) == 4 else []
    for merged in range(max(1, len(shape) - 3)):
        rest = len(shape) - 1 - merged
        views += [(merged, i, j) for i in range(rest + 1) for j in range(i, rest + 1)]
    ops = sorted((op for op in REGISTRY.ops.values() if op.builtin), key=lambda op: len(op.axes))
    for (merged, first, second), op, data_format in itertools.product(views, ops, FORMATS):
        form = Form(op=op.name, merged=merged, first=first, second=second, data_format=data_format)
        key = (op.name, form.layout(shape), data_format)
        known = data_format == FORMATS[0] or "data_format" in op.axis_names
        if key not in seen and known:
            seen.add(key)
            yield from _with_parameters(op, form, shape, size)


def _with_parameters(op: Op, form: Form, shape: Shape, size: int) -> Iterator[Form]:
    own = [axis for axis in op.axes if axis.name not in IMAGE]
    free = [axis for axis in own if not axis.choices]
    n, *space = form.layout(shape)
    channels = space.pop(2 if form.data_format == FORMATS[0] else 0)
    # Windows over several axes at once, and those of two sizes, have hundreds of forms, which no layer is made for.
    if len(free) > 1 or (free and channels not in shape[1:]):
        return
    wanted = channels * size / math.prod(shape)
    windows = sorted(
        range(2, channels + 1 if free else 2), key=lambda k: abs(channels / k - wanted)
    )[:MAX_VALUES]
    fitting = [k for k in windows if abs(channels / k - wanted) <= 1]
    outputs = range(2, min(MAX_OUTPUT, max(space)) + 1)
    values = [axis.choices or dict.fromkeys([*fitting, *outputs]) for axis in own]
    if not free:  # each channel is pooled by itself
        n, channels = n * channels, 1
    for chosen in itertools.product(*values):
        parameters = {axis.name: value for axis, value in zip(own, chosen, strict=True)}
        if size == n * _size(op.name, channels, math.prod(space), tuple(parameters.items())):
            yield msgspec.structs.replace(form, parameters=parameters)


def _size(op: str, channels: int, pixels: int, parameters: tuple[tuple[str, Any], ...]) -> int:
    """Return how many elements the op makes of an image, without pooling all of it; 0 if it takes more than x.

    An op keeps the pixels or pools over them: two pixels tell which.
    """
    one, two = (_size_of(op, (1, height, 1, channels), parameters) for height in (1, 2))
    return one * pixels if two > one else one


@functools.lru_cache(4096)
def _size_of(name: str, shape: Shape, parameters: tuple[tuple[str, Any], ...]) -> int:
    op = REGISTRY.ops[name]
    try:
        case = make_case(op=name, shape=shape, **dict(parameters))
        return op.output_size(case) if len(op.inputs(case)) == 1 else 0
    except (ValueError, UsageError):  # it takes tensors of another rank
        return 0


class Runner:
    """Runs a function in graph mode, with XLA if TensorFlow's kernels fail, and in eager mode last."""

    def __init__(self, function: Function, *, eager: bool) -> None:
        import tensorflow as tf

        self._eager = eager

        def slope(x: Any, dy: Any) -> tuple[Any, Any]:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x, True)
            return y, tape.gradient(y, x, output_gradients=tf.reshape(dy, tf.shape(y)))

        self._values = self._ways(function)
        self._slopes = self._ways(slope)

    def _ways(self, function: Callable[..., Any]) -> list[Any]:
        import tensorflow as tf

        compiled = [tf.function(function, jit_compile=xla) for xla in (False, True)]
        return [*compiled, function] if self._eager else compiled

    @staticmethod
    def _first(functions: list[Any], *arguments: Any) -> Any:
        import tensorflow as tf

        while len(functions) > 1:
            try:
                return functions[0](*arguments)
            except (tf.errors.OpError, LookupError, ValueError):  # noqa: PERF203 (three ways at most)
                functions.pop(0)  # failed once: not tried again
        return functions[0](*arguments)

    def values(self, x: Array, *, training: bool = False) -> Array:
        """Return y of x."""
        import tensorflow as tf

        y: Array = self._first(self._values, tf.constant(x), training).numpy()
        return y

    def slopes(self, x: Array, dy: Array) -> tuple[Array, Array] | None:
        """Return (y, dx) of x and dy; None if no gradient reaches x."""
        import tensorflow as tf

        y, dx = self._first(self._slopes, tf.constant(x), tf.constant(dy))
        return None if dx is None else (y.numpy(), tf.convert_to_tensor(dx).numpy())


def identify(
    function: Function, shape: Shape, dtype: str, *, eager: bool = True, explains: bool = True
) -> Finding:
    """Run a function on inputs of this shape and say which op it equals, if any.

    Args:
        function: of one tensor.
        shape: of its input, with N.
        dtype: of its input.
        eager: whether it may run outside a graph where it does not run in one.
        explains: whether to say what another function is, which takes a call per channel.
    """
    if dtype not in BOUNDS or len(shape) < 3 or math.prod(shape) < 2:
        return Finding()
    runner = Runner(function, eager=eager)
    inputs = probe_inputs(shape, dtype)
    try:
        outputs = [runner.values(x, training=i % 2 == 1) for i, x in enumerate(inputs)]
    except Exception as error:  # noqa: BLE001 (the function is untrusted)
        return Finding(note=f"it does not run alone ({type(error).__name__})")
    if not 0 < outputs[0].size < inputs[0].size or outputs[0].dtype != inputs[0].dtype:
        return Finding(inputs=len(inputs), note="no pooling")
    for form in forms(shape, outputs[0].size):
        if all(equals(form, x, y) for x, y in zip(inputs, outputs, strict=True)):
            return _with_gradients(runner, form, inputs)
    return Finding(inputs=len(inputs), note=explain(runner, shape, dtype) if explains else "")


def equals(form: Form, x: Array, y: Array) -> bool:
    """Tell whether y is the form's output of x, within the op's tolerance."""
    op = REGISTRY.ops[form.op]
    case = form.case(x.shape, str(x.dtype))
    seen = x.astype(np.float64).reshape(form.layout(x.shape))
    expected = op.reference(case, seen).ravel()
    # A sum's error grows with its terms, not with the remainder when they cancel.
    scale = op.reference(case, np.where(np.isfinite(seen), np.abs(seen), 0.0)).ravel()
    size = np.maximum(np.abs(expected), scale)
    return compare(y.ravel(), expected, bound_for(op, case), size=size).agrees


def _with_gradients(runner: Runner, form: Form, inputs: list[Array]) -> Finding:
    op, agreed, note = REGISTRY.ops[form.op], 0, ""
    finding = functools.partial(Finding, form=form, inputs=len(inputs))
    for i, x in enumerate(inputs[:4] if op.vjp else ()):
        case = form.case(x.shape, str(x.dtype), direction="training")
        seen = x.reshape(form.layout(x.shape))
        shape = op.output_shape(case)
        dy = np.random.default_rng(i).standard_normal(shape).astype(x.dtype)
        try:
            found = runner.slopes(x, dy)
        except Exception as error:  # noqa: BLE001 (the function is untrusted)
            return finding(note=f"no gradient here ({type(error).__name__})")
        if found is None:
            return finding(note="it has no gradient")
        y, dx = (value.reshape(s) for value, s in zip(found, (shape, seen.shape), strict=True))
        verdict = judge(Answers(op=op, case=case, inputs=(seen, dy)), (y, dx))
        if verdict.status != "ok":
            note = f"its gradient differs: {verdict.reason}"
        else:
            agreed += 1
    return finding(gradients=0 if note else agreed, note=note)


def explain(runner: Runner, shape: Shape, dtype: str) -> str:
    """Say what a function does to channels, where that is simple: which of them compete."""
    channels = shape[-1]
    if channels > 256:
        return "none of the shipped ops"
    base = np.random.default_rng(1).standard_normal(shape).astype(numpy_dtype(dtype))
    before = runner.values(base)
    if before.ndim != base.ndim or before.shape[-1] >= channels:
        return "none of the shipped ops"
    first: list[int] = []
    for channel in range(channels):
        raised = base.copy()
        raised[..., channel] += 100
        changed = (runner.values(raised) != before).reshape(-1, before.shape[-1]).any(axis=0)
        if changed.sum() > 1:
            return "no pooling: each channel changes several of its outputs"
        if changed[0]:
            first.append(channel)
    if len(first) < 2:
        return "none of the shipped ops"
    if first == list(range(len(first))):
        return "none of the shipped ops, though neighbouring channels compete"
    named = ", ".join(f"j+{i}" if i else "j" for i in (c - first[0] for c in first[:4]))
    return f"none of the shipped ops: channels {named} compete, not neighbours"
