"""PyTorch backend, also for Keras: eager mode and torch.compile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from poolbench.core.plan import WorkerSpec
from poolbench.core.program import Program
from poolbench.worker.backends.base import Array, Backend, Call, freeze, on_off
from poolbench.worker.program import torch_program


class TorchBackend(Backend):
    """Backend of candidates that are functions of PyTorch tensors."""

    name = "torch"

    def start(self, spec: WorkerSpec) -> None:
        """Import PyTorch with a process' settings; they hold until the process ends."""
        os.environ["KERAS_BACKEND"] = "torch"
        # Else a pool of processes stays.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        import torch

        if spec.threads:
            torch.set_num_threads(spec.threads)
        if spec.deterministic:
            torch.use_deterministic_algorithms(True)
        torch.backends.mkldnn.enabled = os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"
        if torch.cuda.is_available():  # as TensorFlow and JAX do by default
            torch.set_float32_matmul_precision("high")
        import torch._dynamo.convert_frame  # which raises Python's recursion limit

        freeze()

    def devices(self) -> dict[str, str]:
        """Return the devices of PyTorch: {'cpu:0': 'CPU', 'gpu:0': 'NVIDIA H100 ...'}."""
        import torch

        gpus = {f"gpu:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return {"cpu:0": "CPU"} | gpus

    @staticmethod
    def _device(name: str) -> str:
        return "cpu" if name.startswith("cpu") else name.replace("gpu", "cuda")

    def on(self, device: str) -> Any:
        """Return a context in which Keras, too, makes its tensors on the device."""
        import torch

        if device.startswith("cpu") and not torch.cuda.is_available():
            # Entering a device's context would slow each call of a function that makes no tensor.
            return contextlib.nullcontext()
        return torch.device(self._device(device))

    def put(self, arrays: Sequence[Array], device: str) -> tuple[Any, ...]:
        """Return copies of the arrays on the device."""
        import torch

        def copy(array: Array) -> Any:
            if array.dtype.name == "bfloat16":  # PyTorch does not know NumPy's
                narrow = torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
                return narrow.to(self._device(device))
            return torch.from_numpy(array.copy()).to(self._device(device))

        return tuple(map(copy, arrays))

    def copy(self, values: Sequence[Any], device: str) -> tuple[Any, ...]:
        """Copy the tensors into new memory."""
        return tuple(value.to(self._device(device)).clone() for value in values)

    def overwrite(self, value: Any, array: Array) -> bool:
        """Write the array into the tensor's memory."""
        value.copy_(self.put([array], "cpu:0")[0])
        return True

    def compile(self, function: Call, mode: str) -> Call:
        """Return the function itself, or compiled by torch.compile."""
        if mode == "eager":
            return function
        import torch

        compiled: Call = torch.compile(function, fullgraph=False)
        return compiled

    def vjp(self, function: Call, places: Sequence[int]) -> Call:
        """Return the function with its gradients."""
        import torch

        def training(*inputs_and_dy: Any) -> Any:
            *inputs, dy = inputs_and_dy
            for place in places:
                inputs[place] = inputs[place].detach().requires_grad_()
            y = function(*inputs)
            watched = [inputs[place] for place in places]
            return (y.detach(), *torch.autograd.grad(y, watched, dy))

        return training

    def synchronize(self, device: str) -> None:
        """Wait for a GPU; on a CPU a call has finished when it returns."""
        if not device.startswith("cpu"):
            import torch

            torch.cuda.synchronize(self._device(device))

    def device_of(self, value: Any) -> str:
        """Return the device of a tensor: 'gpu:0'."""
        kind = "cpu" if value.device.type == "cpu" else "gpu"
        return f"{kind}:{value.device.index or 0}"

    def peak_nbytes(self, step: Callable[[], None], device: str) -> int | None:
        """Return the allocator's peak on a GPU; None on a CPU, where it does not count."""
        if device.startswith("cpu"):
            return None
        import torch

        name = self._device(device)
        before = torch.cuda.memory_allocated(name)
        torch.cuda.reset_peak_memory_stats(name)
        step()
        return int(max(0, torch.cuda.max_memory_allocated(name) - before)) or None

    def make_evict(self, device: str, nbytes: int) -> Callable[[], None]:
        """Return a function that touches this many bytes of the device's memory and waits."""
        import torch

        words = torch.zeros(nbytes // 4, device=self._device(device))

        def evict() -> None:
            words.add_(1.0)
            self.synchronize(device)

        return evict

    def bandwidth_probes(self, kind: str, device: str, count: int) -> dict[str, Call]:
        """Return a reduction that reads, a fill that writes and a negation that copies."""
        import torch

        written = torch.empty(count, device=self._device(device))
        ways: dict[str, Call] = {
            "read": lambda x: x.max(),
            "write": lambda _: written.fill_(1.0),
            "copy": lambda x: -x,
        }
        return {"torch": ways[kind]}

    def identity(self, mode: str) -> Call:  # noqa: ARG002
        """Return a function that makes a view."""
        return lambda value: value.view(value.shape)

    def settings(self, mode: str, device: str) -> dict[str, str]:
        """Return the settings that affect times, as PyTorch has them."""
        import torch

        precise = torch.get_float32_matmul_precision() == "highest"
        return {
            "threads": str(torch.get_num_threads()),
            "float64": "on",
            "float32": "full" if precise or device.startswith("cpu") else "TF32",
            "determinism": on_off(torch.are_deterministic_algorithms_enabled()),
            "compiler": "inductor" if mode == "compile" else "none",
            "oneDNN": on_off(
                torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
            ),
        }

    def program(self, call: Call, arguments: Sequence[Any], mode: str) -> Program | None:
        """Return the operators that an eager call runs."""
        return torch_program(call, *arguments) if mode == "eager" else None

    def clear(self) -> None:
        """Release compiled functions, and what Keras keeps."""
        import keras
        import torch

        keras.backend.clear_session()
        torch._dynamo.reset()  # noqa: SLF001 (its documented use)
