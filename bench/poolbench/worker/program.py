"""What a framework makes of a function: XLA's program, TensorFlow's graph after grappler, the operators of a call."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from poolbench.core.program import Program
from poolbench.machine.info import usable_threads
from poolbench.worker.hlo import count_cost, normalise_hlo

MAX_OPERATIONS = 60  # of a list that is stored
# Names and places in StableHLO.
LOCATION = re.compile(r"^#loc.*\n|^module @\S+| loc\([^()]*(?:\([^()]*\)[^()]*)*\)", re.MULTILINE)


def hash_program(text: str, source: Callable[[], str]) -> str:
    """Return 16 hexadecimal digits that name the program.

    Args:
        text: optimised HLO.
        source: returns StableHLO of the same program. XLA elides constants of more than 10 elements
            from its text. The source has them, so it counts where the text has such a constant.
    """
    text = normalise_hlo(text)
    if "{...}" in text:
        text += LOCATION.sub("", source())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def buffer_nbytes(serialized: bytes) -> tuple[int, int]:
    """Return the bytes of results and temporaries, and of temporaries, in an HloProto's buffer assignment."""
    from tensorflow.compiler.xla.service import hlo_pb2

    proto = hlo_pb2.HloProto()
    proto.ParseFromString(serialized)
    buffers = [
        buffer
        for buffer in proto.buffer_assignment.buffer_allocations
        if not (
            buffer.is_entry_computation_parameter or buffer.is_constant or buffer.is_thread_local
        )
    ]
    temporary = sum(int(buffer.size) for buffer in buffers if not buffer.maybe_live_out)
    return sum(int(buffer.size) for buffer in buffers), temporary


def tensorflow_program(function: Any, *inputs: Any) -> Program:
    """Return the program that TensorFlow compiles with XLA for the current device.

    The function compiles twice more: XLA hands out nothing of an earlier compilation.

    Raises:
        ValueError: a tf.function that lacks jit_compile=True.
    """
    import tensorflow as tf

    if not hasattr(function, "experimental_get_compiler_ir"):
        function = tf.function(function, jit_compile=True)
    show = function.experimental_get_compiler_ir(*inputs)
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    return _program(
        show(stage="optimized_hlo"),
        lambda: str(show(stage="stablehlo")),
        key=f"tensorflow {tf.__version__}, threads={threads or usable_threads()}",
        buffers=buffer_nbytes(show(stage="optimized_hlo_proto_serialized")),
    )


def jax_program(function: Any, *inputs: Any) -> Program:
    """Return the program that JAX compiles; the function compiles once more."""
    import jax

    lowered = (function if hasattr(function, "lower") else jax.jit(function)).lower(*inputs)
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes
    return _program(
        str(compiled.as_text()),
        lowered.as_text,
        key=f"jax {jax.__version__}, threads={usable_threads()}",
        buffers=(memory.output_size_in_bytes + temporary, temporary),
    )


def _program(
    text: str, source: Callable[[], str], *, key: str, buffers: tuple[int, int]
) -> Program:
    return Program(
        hash=hash_program(text, source),
        key=key,
        peak_buffer_nbytes=buffers[0],
        temporary_nbytes=buffers[1],
        **count_cost(text)._asdict(),
    )


def tensorflow_operations(function: Any, *inputs: Any) -> Program:
    """Return the operations that TensorFlow runs: of a graph after grappler and oneDNN, or of an eager call."""
    import tensorflow as tf

    key = f"tensorflow {tf.__version__}"
    if not hasattr(function, "python_function"):
        return _operations(_eager_operations(function, *inputs), key)
    key += ", graph"  # earlier versions hashed its nodes in the order of the graph
    from tensorflow.python.eager import context  # there is no public way to see an optimised graph

    current = context.context()
    again = tf.function(function.python_function)  # what has run is optimised and shown no more
    current.enable_run_metadata()
    try:
        again(*inputs)
        metadata = current.export_run_metadata()
    finally:
        current.disable_run_metadata()
    # The last: earlier ones are of operations that ran eagerly.
    nodes = [n for part in metadata.function_graphs[-1].partition_graphs for n in part.node]
    lines = _lines(nodes, {})
    if any(_called(value) for node in nodes for value in node.attr.values()):
        # What such a node calls, a cluster of XLA's, is not among them: the graph as traced stands for it.
        traced = again.get_concrete_function(*inputs).graph.as_graph_def()
        bodies = {one.signature.name: one for one in traced.library.function}
        lines += _lines(traced.node, bodies)
    return _operations([node.op for node in nodes if node.op not in UNSEEN], key, lines)


def _lines(
    nodes: Sequence[Any], bodies: Mapping[str, Any], arguments: Sequence[str] = ()
) -> list[str]:
    """Return a label per node without names, then those of the functions that it calls, where they are known.

    The order of two clusters changes from call to call. A label therefore tells what a node is, and the labels
    of what it reads, until a round of labels tells no more nodes apart (colour refinement).
    """
    given = [*arguments, *(node.name for node in nodes if node.op == "Placeholder")]
    places = {name: f"argument {number}" for number, name in enumerate(given)}
    texts = {node.name: places.get(node.name) or _text(node) for node in nodes}
    labels, count = texts, 0
    while count < len(found := set(labels.values())):
        count = len(found)
        labels = places | {node.name: _label(node, texts[node.name], labels) for node in nodes}
    lines = []
    for node in sorted(nodes, key=lambda node: labels[node.name]):
        if node.op in UNSEEN:
            continue
        lines.append(labels[node.name])
        for value in _kept(node).values():
            for function in _called(value):
                if body := bodies.get(function.name):
                    names = [one.name for one in body.signature.input_arg]
                    lines += _lines(body.node_def, bodies, names)
    return lines


def _kept(node: Any) -> dict[str, Any]:
    return {k: v for k, v in node.attr.items() if not k.startswith("_") and k != SETTINGS}


def _text(node: Any) -> str:
    """Return a node's operation and the attributes that are not functions."""
    values = [
        f"{k}={v.SerializeToString(deterministic=True)!r}"
        for k, v in _kept(node).items()
        if not _called(v)
    ]
    return f"{node.op} {' '.join(sorted(values))}"


def _label(node: Any, text: str, labels: Mapping[str, str]) -> str:
    """Return a digest of a node's text and the labels of its inputs; what it only waits for has no order."""

    def place(one: str) -> str:
        name, _, output = one.lstrip("^").partition(":")
        return f"{labels.get(name, '')}:{output or 0}"

    read = [place(one) for one in node.input if not one.startswith("^")]
    awaited = [place(one) for one in node.input if one.startswith("^")]
    return hashlib.sha256("\n".join([text, *read, "", *sorted(awaited)]).encode()).hexdigest()


def _called(value: Any) -> Sequence[Any]:
    """Return the functions that an attribute names: one, or the branches of a case."""
    return [value.func] if value.HasField("func") else value.list.func


SETTINGS = "config_proto"  # of the session, in an order that changes from process to process
# What a graph has for its arguments and results.
UNSEEN = ("_Arg", "_DeviceArg", "_Retval", "_DeviceRetval")


def _eager_operations(function: Any, *inputs: Any) -> list[str]:
    from tensorflow.python.framework import op_callbacks

    names: list[str] = []

    def note(op_type: Any, *_: Any, **__: Any) -> None:
        text = op_type if isinstance(op_type, str) else op_type.decode()
        names.append(re.sub(r"(__\w+?)(_\d+)+$", r"\1", text))

    op_callbacks.add_op_callback(note)
    try:
        function(*inputs)
    finally:
        op_callbacks.remove_op_callback(note)
    return names


def torch_program(function: Any, *inputs: Any) -> Program:
    """Return the operators that an eager call of PyTorch dispatches, views and copies included."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Note(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(str(func).removesuffix(".default"))
            return func(*args, **(kwargs or {}))

    with Note():
        function(*inputs)
    return _operations(names, f"torch {torch.__version__}")


def _operations(names: list[str], key: str, lines: list[str] | None = None) -> Program:
    text = "\n".join(names if lines is None else lines)
    return Program(
        hash=hashlib.sha256(text.encode()).hexdigest()[:16],
        key=key,
        kernels=len(names),
        operations=tuple(names[:MAX_OPERATIONS]),
    )
