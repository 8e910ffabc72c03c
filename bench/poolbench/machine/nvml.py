"""What an NVIDIA device does beside our work, by NVML: clocks, heat, slowdowns, others, energy.

nvidia-ml-py is imported when a device is first asked for. Without it, without a driver, or where
the device does not know an answer, the answer is None: what cannot be seen is not made up.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
# Reasons for a lower clock that make a round unlike the others. The power cap is not among them:
# under load it is many a board's steady state.
SLOWDOWNS = {
    "HwSlowdown": "hardware slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "power brake",
    "SwThermalSlowdown": "thermal slowdown",
}
# Twice the largest last-level cache of a device that TensorFlow runs on (126 MB, B200), which
# neither NVML nor TensorFlow tells.
EVICT_NBYTES = 256 << 20
OTHERS_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class DeviceUsage:
    """A device at one moment; None where it does not say.

    Attributes:
        clock_mhz: of its processors.
        celsius: its temperature.
        slowdowns: why its clock is held down, values of `SLOWDOWNS`.
        others_share: share of its processors' time that others' processes took since the last
            reading; None also where NVML's process ids are not ours to read (in a container).
    """

    clock_mhz: float | None = None
    celsius: float | None = None
    slowdowns: tuple[str, ...] = ()
    others_share: float | None = None

    def contended(self) -> bool:
        """Whether a round that ends here is unlike one on a quiet, cool device."""
        return bool(self.slowdowns) or (self.others_share or 0.0) > OTHERS_SHARE


def is_gpu(device: str) -> bool:
    """Whether a case's device is a GPU."""
    return device.startswith("gpu:")


@functools.cache
def load_nvml() -> Any:
    """The pynvml module, initialised; None without it or without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 (NVMLError is known only once it is imported)
        return None
    return pynvml


def nvml_handle(nvml: Any, device: str) -> Any:
    """NVML's handle of TensorFlow's 'gpu:0', through CUDA_VISIBLE_DEVICES; None if there is none.

    Workers set CUDA_DEVICE_ORDER=PCI_BUS_ID, NVML's own order.
    """
    index = int(device.partition(":")[2])
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = visible[index] if visible != [""] and index < len(visible) else str(index)
    with contextlib.suppress(nvml.NVMLError):
        if name.isdigit():
            return nvml.nvmlDeviceGetHandleByIndex(int(name))
        return nvml.nvmlDeviceGetHandleByUUID(name)
    return None


def own_process_ids() -> set[int]:
    """This process and all that it started, directly or not."""
    me = psutil.Process()
    return {me.pid, *(child.pid for child in me.children(recursive=True))}


def watch_device(
    device: str,
    *,
    nvml: Any = None,
    own: Callable[[], Iterable[int]] = own_process_ids,
) -> Callable[[], DeviceUsage] | None:
    """A function that reads the device now; None where it is no GPU or NVML does not know it."""
    if not is_gpu(device) or (nvml := nvml or load_nvml()) is None:
        return None
    handle = nvml_handle(nvml, device)
    if handle is None:
        return None
    since_us = 0

    def ask(question: Callable[..., T], *words: Any) -> T | None:
        try:
            return question(handle, *words)
        except nvml.NVMLError:
            return None

    def others_share() -> float | None:
        """The others' share in the samples since the last reading: their sum, a mean over time."""
        nonlocal since_us
        samples = ask(nvml.nvmlDeviceGetProcessUtilization, since_us)
        if not samples:
            return None
        since_us = max(sample.timeStamp for sample in samples)
        ours = set(own())
        if not any(sample.pid in ours for sample in samples):
            return None
        moments = {sample.timeStamp for sample in samples}
        return float(sum(s.smUtil for s in samples if s.pid not in ours)) / len(moments) / 100

    def read() -> DeviceUsage:
        reasons = ask(nvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
        return DeviceUsage(
            clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            celsius=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            slowdowns=tuple(
                words
                for name, words in SLOWDOWNS.items()
                if reasons & getattr(nvml, f"nvmlClocksEventReason{name}")
            ),
            others_share=others_share(),
        )

    return read


def energy_joules(device: str, *, nvml: Any = None) -> float | None:
    """Joules that the device has used since its driver was loaded; None where it keeps no count.

    The counter moves every few tens of milliseconds: take differences over a second.
    """
    if not is_gpu(device) or (nvml := nvml or load_nvml()) is None:
        return None
    handle = nvml_handle(nvml, device)
    if handle is None:
        return None
    try:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except nvml.NVMLError:
        return None


def driver_versions(*, nvml: Any = None) -> dict[str, str]:
    """{'nvidia-driver': '570.86.10'}; {} without a driver."""
    nvml = nvml or load_nvml()
    if nvml is None:
        return {}
    try:
        return {"nvidia-driver": str(nvml.nvmlSystemGetDriverVersion())}
    except nvml.NVMLError:
        return {}
