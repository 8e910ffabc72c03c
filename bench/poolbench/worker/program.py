"""The program that XLA compiles from a function: its hash, its cost and its buffers.

Equal hashes are evidence that two functions are one program. The counts explain a time and do not
predict it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import msgspec

from poolbench.machine.info import usable_threads
from poolbench.worker.hlo import count_cost, normalise_hlo

# Names and places in StableHLO.
LOCATION = re.compile(r"^#loc.*\n|^module @\S+| loc\([^()]*(?:\([^()]*\)[^()]*)*\)", re.MULTILINE)


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled program.

    Attributes:
        hash: 16 hexadecimal digits of the SHA-256 of its normalised text.
        key: 'tensorflow 2.21.0, threads=2'; hashes compare only where the keys are equal.
        flops: floating-point and integer operations per call, transcendental functions not counted.
        bytes_accessed: bytes that its kernels read and write per call.
        peak_buffer_nbytes: bytes of results and temporaries in XLA's buffer assignment.
        kernels: fusions and other instructions that run as a kernel of their own.
    """

    hash: str
    key: str
    flops: int
    bytes_accessed: int
    peak_buffer_nbytes: int
    kernels: int


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


def buffer_nbytes(serialized: bytes) -> int:
    """Return the bytes of results and temporaries in the buffer assignment of an HloProto."""
    from tensorflow.compiler.xla.service import hlo_pb2

    proto = hlo_pb2.HloProto()
    proto.ParseFromString(serialized)
    return sum(
        int(buffer.size)
        for buffer in proto.buffer_assignment.buffer_allocations
        if not (
            buffer.is_entry_computation_parameter or buffer.is_constant or buffer.is_thread_local
        )
    )


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
        peak_buffer_nbytes=buffer_nbytes(show(stage="optimized_hlo_proto_serialized")),
    )


def jax_program(function: Any, *inputs: Any) -> Program:
    """Return the program that JAX compiles; the function compiles once more."""
    import jax

    lowered = (function if hasattr(function, "lower") else jax.jit(function)).lower(*inputs)
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    return _program(
        str(compiled.as_text()),
        lowered.as_text,
        key=f"jax {jax.__version__}, threads={usable_threads()}",
        peak_buffer_nbytes=memory.output_size_in_bytes + memory.temp_size_in_bytes,
    )


def _program(text: str, source: Callable[[], str], *, key: str, peak_buffer_nbytes: int) -> Program:
    return Program(
        hash=hash_program(text, source),
        key=key,
        peak_buffer_nbytes=peak_buffer_nbytes,
        **count_cost(text)._asdict(),
    )
