"""JAX backend, also for Keras: jax.jit, which compiles with XLA."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from poolbench.core.plan import WorkerSpec
from poolbench.core.program import Program
from poolbench.machine.info import usable_threads
from poolbench.worker.backends.base import Array, Backend, Call, count_threads, freeze, on_off
from poolbench.worker.program import jax_program


class JaxBackend(Backend):
    """Backend of candidates that are functions of JAX arrays."""

    name = "jax"

    def start(self, spec: WorkerSpec) -> None:
        """Import JAX with a process' settings; they hold until the process ends."""
        if spec.threads:
            os.environ["NPROC"] = str(spec.threads)  # the size of XLA's thread pool on a CPU
        os.environ |= {"KERAS_BACKEND": "jax", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        flags = [f"--xla_force_host_platform_device_count={spec.logical_devices}"]
        flags += ["--xla_gpu_deterministic_ops=true"] * spec.deterministic
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
        import jax

        # float64 stays float64, as in the other frameworks. JAX multiplies float32 as they do by default.
        jax.config.update("jax_enable_x64", True)
        jax.devices()
        freeze()

    def devices(self) -> dict[str, str]:
        """Return the devices of JAX: {'cpu:0': 'CPU', 'gpu:0': 'NVIDIA H100 ...'}."""
        import jax

        found = [*jax.devices("cpu")]
        with contextlib.suppress(RuntimeError):  # there is no GPU
            found += jax.devices("gpu")
        kinds = {"cpu": "CPU"}
        return {self._name(one): kinds.get(one.device_kind, one.device_kind) for one in found}

    @staticmethod
    def _name(device: Any) -> str:
        kind = "cpu" if device.platform == "cpu" else "gpu"
        return f"{kind}:{device.local_hardware_id or 0 if kind == 'gpu' else device.id}"

    def _device(self, name: str) -> Any:
        import jax

        kind, _, index = name.partition(":")
        return jax.devices(kind)[int(index)]

    def on(self, device: str) -> Any:
        """Return a context in which new arrays are on the device."""
        import jax

        return jax.default_device(self._device(device))

    def put(self, arrays: Sequence[Array], device: str) -> tuple[Any, ...]:
        """Return copies of the arrays on the device."""
        import jax.numpy as jnp

        with self.on(device):
            # device_put would share the array's memory on a CPU.
            return tuple(jnp.array(array, copy=True).block_until_ready() for array in arrays)

    def overwrite(self, value: Any, array: Array) -> bool:
        """Write into an array in host memory directly: to JAX it cannot change."""
        if not self.device_of(value).startswith("cpu") or not array.nbytes:
            return False
        ctypes.memmove(value.unsafe_buffer_pointer(), array.ctypes.data, array.nbytes)
        return True

    def compile(self, function: Call, mode: str) -> Call:  # noqa: ARG002 (there is one)
        """Return the compiled function, which waits for its results: JAX returns before they are there."""
        import jax

        compiled = jax.jit(function)

        def call(*arguments: Any) -> Any:
            result = compiled(*arguments)
            for value in result if isinstance(result, tuple) else (result,):
                value.block_until_ready()
            return result

        call.lower = compiled.lower  # type: ignore[attr-defined]  # a function's, for its program
        return call

    def vjp(self, function: Call, places: Sequence[int]) -> Call:
        """Return the function with its gradients."""
        import jax

        def training(*inputs_and_dy: Any) -> Any:
            *inputs, dy = inputs_and_dy

            def of_watched(*watched: Any) -> Any:
                given = [*inputs]
                for place, value in zip(places, watched, strict=True):
                    given[place] = value
                return function(*given)

            y, pull_back = jax.vjp(of_watched, *(inputs[place] for place in places))
            return (y, *pull_back(dy))

        return training

    def device_of(self, value: Any) -> str:
        """Return the device of an array: 'gpu:0'."""
        return self._name(next(iter(value.devices())))

    def make_evict(self, device: str, nbytes: int) -> Callable[[], None]:
        """Return a function that touches this many bytes of the device's memory and waits."""
        import jax

        (words,) = self.put([np.zeros(nbytes // 4, np.float32)], device)
        add = jax.jit(lambda x: x + 1.0)
        return lambda: add(words).block_until_ready()

    def bandwidth_probes(self, kind: str, device: str, count: int) -> dict[str, Call]:
        """Return on a GPU a reduction that reads, a fill that writes and a negation that copies."""
        if device.startswith("cpu"):  # NumPy's are as fast
            return {}
        import jax.numpy as jnp

        ways: dict[str, Call] = {
            "read": jnp.max,
            "write": lambda x: jnp.full(count, 1.0, jnp.float32) + 0 * x.reshape(-1)[0],
            "copy": lambda x: -x,
        }
        return {"xla": self.compile(ways[kind], "xla")}

    def identity(self, mode: str) -> Call:  # noqa: ARG002
        """Return one element: XLA copies what a program returns."""
        return lambda value: value.reshape(-1)[:1]

    def settings(self, mode: str, device: str) -> dict[str, str]:
        """Return the settings that affect times, as JAX has them."""
        import jax

        found = {
            "threads": str(count_threads("tf_XLAEigen") or usable_threads()),
            "float64": on_off(jax.config.jax_enable_x64),
            "float32": jax.config.jax_default_matmul_precision or "default",
            "determinism": on_off("xla_gpu_deterministic_ops" in os.environ.get("XLA_FLAGS", "")),
            "compiler": "XLA" if mode == "xla" else "none",
        }
        if found["float32"] == "default":
            found["float32"] = "full" if device.startswith("cpu") else "TF32"
        return found

    def program(self, call: Call, arguments: Sequence[Any], mode: str) -> Program | None:  # noqa: ARG002
        """Return what XLA made of a compiled call; it is compiled once more."""
        return jax_program(call, *arguments)

    def clear(self) -> None:
        """Release compiled functions, and what Keras keeps."""
        import jax
        import keras

        keras.backend.clear_session()
        jax.clear_caches()
