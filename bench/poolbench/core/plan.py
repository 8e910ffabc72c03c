"""Plain data that says how work is to be done: what a process fixes for its whole life."""

from __future__ import annotations

import msgspec

# The bandwidth probes that race beside the candidates.
PROBES = ("bandwidth-read", "bandwidth-write", "bandwidth-copy")


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a process fixes for its whole life, because a framework cannot change it once started.

    Attributes:
        interpreter: path of the Python that runs the worker; '' is the one that runs this.
        threads: intra-op threads; 0 leaves the framework's own choice, every core.
        logical_cpus: logical CPU devices that the machine's CPU is split into.
        deterministic: op determinism.
        tensorflow: import TensorFlow at the start; False for NumPy candidates alone.
        environment: environment variables set before anything is imported.
    """

    interpreter: str = ""
    threads: int = 0
    logical_cpus: int = 1
    deterministic: bool = False
    tensorflow: bool = True
    environment: tuple[tuple[str, str], ...] = ()
