"""TensorFlow backend, also for Keras: eager mode, graph mode, XLA."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from poolbench.core.candidate import OWN_LAYERS
from poolbench.core.plan import WorkerSpec
from poolbench.core.program import Program
from poolbench.machine.info import usable_threads
from poolbench.worker.backends.base import Array, Backend, Call, freeze, on_off
from poolbench.worker.program import tensorflow_operations, tensorflow_program


class TensorFlowBackend(Backend):
    """Backend of candidates that are functions of TensorFlow tensors."""

    name = "tensorflow"

    def start(self, spec: WorkerSpec) -> None:
        """Import TensorFlow with a process' settings; they hold until the process ends."""
        os.environ["KERAS_BACKEND"] = "tensorflow"
        import tensorflow as tf

        if spec.threads:
            tf.config.threading.set_intra_op_parallelism_threads(spec.threads)
        if spec.logical_devices > 1:
            cpu = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * spec.logical_devices
            )
        for gpu in tf.config.list_physical_devices("GPU"):
            # Processes share the device. Without memory growth the first one takes all of its memory.
            tf.config.experimental.set_memory_growth(gpu, True)
        if spec.deterministic:
            tf.config.experimental.enable_op_determinism()
        tf.config.list_logical_devices()
        freeze()

    def devices(self) -> dict[str, str]:
        """Return the devices of TensorFlow: {'cpu:0': 'CPU', 'gpu:0': 'NVIDIA H100 ...'}."""
        import tensorflow as tf

        names = {}
        physical = {kind: tf.config.list_physical_devices(kind) for kind in ("CPU", "GPU")}
        for device in tf.config.list_logical_devices():
            kind, index = device.device_type, int(device.name.rsplit(":", 1)[1])
            if kind not in physical:
                continue
            of_kind = physical[kind]
            details = tf.config.experimental.get_device_details(
                of_kind[min(index, len(of_kind) - 1)]
            )
            names[f"{kind.lower()}:{index}"] = details.get("device_name", kind)
        return names

    def on(self, device: str) -> Any:
        """Return the device's scope."""
        import tensorflow as tf

        return tf.device(device)

    def put(self, arrays: Sequence[Array], device: str) -> tuple[Any, ...]:
        """Return the arrays as tensors of the device."""
        import tensorflow as tf

        with tf.device(device):
            constants = tuple(tf.constant(array) for array in arrays)
        # A constant may share the array's memory; a copy of it does not.
        return self.copy(constants, device)

    def copy(self, values: Sequence[Any], device: str) -> tuple[Any, ...]:
        """Copy the tensors into new memory."""
        import tensorflow as tf

        with tf.device(device):
            # Not value + 0, which makes 0 of -0.
            copies = tuple(value & True if value.dtype.is_bool else value * 1 for value in values)
        tf.test.experimental.sync_devices()
        return copies

    def overwrite(self, value: Any, array: Array) -> bool:
        """Write into a tensor in host memory directly, without TensorFlow."""
        if not self.device_of(value).startswith("cpu") or not array.nbytes:
            return False
        ctypes.memmove(value._numpy().ctypes.data, array.ctypes.data, array.nbytes)  # noqa: SLF001
        return True

    def compile(self, function: Call, mode: str) -> Call:
        """Return the function itself, as a graph, or compiled by XLA."""
        import tensorflow as tf

        if mode == "eager":
            return function
        compiled: Call = tf.function(function, jit_compile=True if mode == "xla" else None)
        return compiled

    def vjp(self, function: Call, places: Sequence[int]) -> Call:
        """Return the function with its gradients, under a name that traces show."""
        import tensorflow as tf

        def training(*inputs_and_dy: Any) -> Any:
            *inputs, dy = inputs_and_dy
            watched = [inputs[place] for place in places]
            with tf.GradientTape() as tape:
                tape.watch(watched)
                y = function(*inputs)
            found = tape.gradient(y, watched, output_gradients=dy)
            # The gradient of tf.gather is a sparse one.
            return (
                y,
                *(tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in found),
            )

        return training

    def convert(self, call: Call, arguments: Sequence[Any]) -> None:
        """Trace a function, which AutoGraph converts once per process."""
        if hasattr(call, "get_concrete_function"):
            call.get_concrete_function(*arguments)

    def synchronize(self, device: str) -> None:
        """Wait for a GPU.

        On a CPU a call has finished when it returns, and waiting again takes a tenth of a
        millisecond: threads are woken for it, which would be a quarter of a short block.
        """
        if not device.startswith("cpu"):
            import tensorflow as tf

            tf.test.experimental.sync_devices()

    def device_of(self, value: Any) -> str:
        """Return the device of a tensor: 'gpu:0'."""
        kind, _, index = str(value.device).rpartition("/device:")[2].partition(":")
        return f"{kind.lower()}:{index}"

    def peak_nbytes(self, step: Callable[[], None], device: str) -> int | None:
        """Return the allocator's peak; None if it does not count, as for tensors below 256 KiB."""
        import tensorflow as tf

        name = device.upper()
        try:
            before = tf.config.experimental.get_memory_info(name)["current"]
            tf.config.experimental.reset_memory_stats(name)
            step()
            peak = tf.config.experimental.get_memory_info(name)["peak"]
        except (ValueError, tf.errors.OpError):  # this device or allocator does not count
            return None
        return int(max(0, peak - before)) or None

    def make_evict(self, device: str, nbytes: int) -> Callable[[], None]:
        """Return a function that touches this many bytes of the device's memory and waits.

        A GPU's caches are its own: touching the host's memory would leave them as they are.
        """
        import tensorflow as tf

        with tf.device(device):
            words = tf.Variable(tf.zeros([nbytes // 4], tf.float32))

        def evict() -> None:
            with tf.device(device):
                words.assign(words + 1.0)
            tf.test.experimental.sync_devices()

        return evict

    def bandwidth_probes(self, kind: str, device: str, count: int) -> dict[str, Call]:
        """Return reductions that read, fills that write and a negation that copies; on a GPU also with XLA."""
        import tensorflow as tf

        scalar = tf.constant(1.0)
        ways: dict[str, dict[str, Call]] = {
            "read": {
                "reduce_sum": lambda x: tf.reduce_sum(_words(x)),
                "reduce_max": lambda x: tf.reduce_max(_words(x)),
            },
            "write": {"fill": lambda _: tf.fill([count], 1.0)},
            "copy": {"negative": lambda x: tf.negative(_words(x))},
        }
        found = ways[kind]
        if device.startswith("cpu"):
            return found
        broadcast = tf.function(lambda s: tf.broadcast_to(s, [count]), jit_compile=True)
        compiled: dict[str, Call] = {
            "read": tf.function(lambda x: tf.reduce_max(_words(x)), jit_compile=True),
            "write": lambda _: broadcast(scalar),
            "copy": tf.function(lambda x: -_words(x), jit_compile=True),
        }
        return found | {"xla": compiled[kind]}

    def settings(self, mode: str, device: str) -> dict[str, str]:
        """Return the settings that affect times, as TensorFlow has them; XLA does not use oneDNN here."""
        import tensorflow as tf
        from tensorflow.python.framework import config  # there is no public way to ask

        experimental = tf.config.experimental
        narrow = experimental.tensor_float_32_execution_enabled() and not device.startswith("cpu")
        threads = tf.config.threading.get_intra_op_parallelism_threads()
        onednn = {} if mode == "xla" else {"oneDNN": on_off(_uses_onednn())}
        return onednn | {
            "threads": str(threads or usable_threads()),
            "float64": "on",
            "float32": "TF32" if narrow else "full",
            "determinism": on_off(config.is_op_determinism_enabled()),
            "compiler": "XLA" if mode == "xla" else "none",
        }

    def program(self, call: Call, arguments: Sequence[Any], mode: str) -> Program | None:
        """Return what XLA made of a call, or the operations of its graph after grappler, or of its eager call."""
        if mode == "xla":
            return tensorflow_program(call, *arguments)
        return tensorflow_operations(call, *arguments)

    def identity(self, mode: str) -> Call:
        """Return an op that copies nothing; XLA copies what a program returns: there, one element."""
        import tensorflow as tf

        if mode == "xla":
            return lambda value: tf.reshape(value, [-1])[:1]
        return lambda value: tf.raw_ops.Identity(input=value)

    def clear(self) -> None:
        """Clear Keras' global state, which holds graphs, and the functions that this package's layers compiled."""
        import keras

        keras.backend.clear_session()
        for module in filter(None, map(sys.modules.get, OWN_LAYERS.values())):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@functools.cache
def _uses_onednn() -> bool:
    """Tell whether oneDNN replaces operations: a matrix product's, in a graph."""
    import tensorflow as tf

    square = tf.ones([64, 64])
    found = tensorflow_operations(tf.function(lambda x: tf.matmul(x, x)), square)
    return any("Mkl" in name for name in found.operations)


def _words(value: Any) -> Any:
    """Return a tensor's bytes as float32 without a copy, if their number allows it."""
    import tensorflow as tf

    flat = tf.reshape(value, [-1])
    if value.dtype.size == 2 and flat.shape[0] % 2 == 0:
        return tf.bitcast(tf.reshape(flat, [-1, 2]), tf.float32)
    return flat
