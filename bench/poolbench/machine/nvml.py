"""Read an NVIDIA device's clocks, temperature, slowdowns, other processes and energy from NVML.

nvidia-ml-py is imported on first use. Values are None without it, without a driver, or where the
device does not support the query.
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
# Reasons for a lower clock that make a round differ from the others. The power cap is not one of
# them: many boards reach it in their steady state under load.
SLOWDOWNS = {
    "HwSlowdown": "hardware slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "power brake",
    "SwThermalSlowdown": "thermal slowdown",
}
# Twice the largest last-level cache of a device that TensorFlow runs on (126 MB, B200). Neither NVML
# nor TensorFlow provides its size.
EVICT_NBYTES = 256 << 20
OTHERS_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class DeviceUsage:
    """A device at one moment; None where it does not support the query.

    Attributes:
        clock_mhz: of its multiprocessors.
        celsius: its temperature.
        slowdowns: reasons for a lower clock, values of `SLOWDOWNS`.
        others_share: share of its multiprocessors' time that other processes used since the last
            reading; None also where NVML reports process ids of another namespace (in a container).
    """

    clock_mhz: float | None = None
    celsius: float | None = None
    slowdowns: tuple[str, ...] = ()
    others_share: float | None = None

    def contended(self) -> bool:
        """Tell whether a slowdown or another process affected the round that ends here."""
        return bool(self.slowdowns) or (self.others_share or 0.0) > OTHERS_SHARE


def is_gpu(device: str) -> bool:
    """Tell whether a case's device is a GPU."""
    return device.startswith("gpu:")


@functools.cache
def load_nvml() -> Any:
    """Return the initialised pynvml module; None without it or without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 (NVMLError is known only once it is imported)
        return None
    return pynvml


def nvml_handle(nvml: Any, device: str) -> Any:
    """Return NVML's handle of TensorFlow's 'gpu:0', through CUDA_VISIBLE_DEVICES; None if there is none.

    Workers set CUDA_DEVICE_ORDER=PCI_BUS_ID, which is NVML's order.
    """
    number = device.partition(":")[2]
    if not number.isdigit():  # a kind of GPU in a cluster: 'gpu:H100'
        return None
    index = int(number)
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = visible[index] if visible != [""] and index < len(visible) else str(index)
    with contextlib.suppress(nvml.NVMLError):
        if name.isdigit():
            return nvml.nvmlDeviceGetHandleByIndex(int(name))
        return nvml.nvmlDeviceGetHandleByUUID(name)
    return None


def own_process_ids() -> set[int]:
    """Return the ids of this process and all its descendants."""
    me = psutil.Process()
    return {me.pid, *(child.pid for child in me.children(recursive=True))}


def watch_device(
    device: str,
    *,
    nvml: Any = None,
    own: Callable[[], Iterable[int]] = own_process_ids,
) -> Callable[[], DeviceUsage] | None:
    """Return a function that reads the device; None if it is not a GPU or NVML does not know it."""
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
        """Return the share of other processes since the last reading, averaged over the samples."""
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
    """Return the joules used since the driver was loaded; None if the device does not count them.

    The counter steps every few tens of milliseconds, so take differences over a second.
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
    """Return {'nvidia-driver': '570.86.10'}; {} without a driver."""
    nvml = nvml or load_nvml()
    if nvml is None:
        return {}
    try:
        return {"nvidia-driver": str(nvml.nvmlSystemGetDriverVersion())}
    except nvml.NVMLError:
        return {}
