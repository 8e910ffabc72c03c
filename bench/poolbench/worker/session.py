"""Session: the state of a worker process between its tasks.

One object, made when the process starts and handed to each task as its first argument: the case that
is open, its inputs on the host and on the device, and the compiled callables of its contenders.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from poolbench.core.candidate import Candidate
from poolbench.core.case import Case
from poolbench.core.errors import NotRunError
from poolbench.core.registry import REGISTRY
from poolbench.machine.info import last_level_cache_nbytes
from poolbench.machine.nvml import EVICT_NBYTES
from poolbench.worker import isolation
from poolbench.worker.backends import BACKENDS, Array, Backend, Call
from poolbench.worker.inputs import make_inputs

if TYPE_CHECKING:
    from poolbench.worker.check import Answers

EVICT_CAP_NBYTES = 1 << 30


@dataclass
class OpenCase:
    """An open case.

    Attributes:
        case: which.
        backend: holds the inputs.
        host: the inputs on the host.
        inputs: the inputs on the device, as they were allocated last.
        calls: the callable of each contender, and which of the inputs it takes.
        evict: empties the caches before a call; None where they stay warm.
        answers: the reference's answers, once a candidate was held to them.
        pools: threads of the bandwidth probes.
        seed: of the inputs.
        brings_inputs: whether they are no op's, so that others cannot be made for a check.
        rechecked: how often other inputs were made for a check after timing.
        recheck_seconds: what such checks took at random moments.
    """

    case: Case
    backend: Backend
    host: tuple[Array, ...]
    inputs: tuple[Any, ...] = ()
    calls: dict[str, tuple[Call, tuple[int, ...]]] = field(default_factory=dict)
    evict: Callable[[], None] | None = None
    answers: Answers | None = None
    pools: list[ThreadPoolExecutor] = field(default_factory=list)
    seed: int = 0
    brings_inputs: bool = False
    rechecked: int = 0
    recheck_seconds: float = 0.0

    @property
    def device(self) -> str:
        """Return the case's device: 'cpu:0'."""
        return str(self.case.device)

    @property
    def on_cpu(self) -> bool:
        """Tell whether the inputs are in host memory."""
        return self.device.startswith("cpu")

    def is_users(self, name: str) -> bool:
        """Tell whether a contender is a candidate from a file of the user's."""
        candidate = REGISTRY.candidates.get((self.case.op, name))
        return candidate is not None and not candidate.builtin

    def bound(self, name: str) -> tuple[Call, list[Any]]:
        """Return a contender's callable and the inputs that it takes."""
        call, places = self.calls[name]
        return call, [self.inputs[place] for place in places]

    def make_step(self, name: str) -> Callable[[], None]:
        """Return a call of a contender that returns when the device has finished."""
        call, arguments = self.bound(name)

        def step() -> None:
            with self.backend.on(self.device):
                call(*arguments)
                self.backend.synchronize(self.device)

        return step


@dataclass
class Session:
    """The state of this process.

    Attributes:
        backend: the framework that it has imported.
        opened: the case that is open.
        extras: what else tasks keep for as long as the case is open, by name.
        converted: candidates that this process has traced.
        fastest: the fastest way of a probe over so many bytes on a device, and its seconds.
        settings: what candidates share, as it was when the case was opened.
        suspects: candidates of the open case after whose calls something was other than before, and what.
    """

    backend: Backend = BACKENDS["tensorflow"]
    opened: OpenCase | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    converted: set[tuple[str, str]] = field(default_factory=set)
    fastest: dict[tuple[str, int, str], tuple[str, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    suspects: dict[str, str] = field(default_factory=dict)

    @property
    def open(self) -> OpenCase:
        """Return the open case.

        Raises:
            RuntimeError: there is none.
        """
        if self.opened is None:
            raise RuntimeError("no case is open in this worker")
        return self.opened


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """The result of opening a case.

    Attributes:
        nbytes: of the inputs.
        devices: name to description, as the backend sees them.
        seconds: that the allocation took.
    """

    nbytes: int
    devices: dict[str, str]
    seconds: float


def open_case(session: Session, case: Case, seed: int) -> Opened:
    """Make the case's inputs, on the host and on the device."""
    close_case(session)
    opened = hold(session, case, make_inputs(case, seed))
    session.open.seed, session.open.brings_inputs = seed, False
    return opened


def hold(session: Session, case: Case, host: tuple[Array, ...]) -> Opened:
    """Open a case on given inputs, such as those of a model's step.

    Raises:
        NotRunError: this machine has no such device.
    """
    start = time.perf_counter()
    backend = session.backend
    devices = backend.devices()
    if case.device not in devices:
        raise NotRunError(f"there is no {case.device} here; there is {', '.join(devices)}")
    opened = OpenCase(case=case, backend=backend, host=host, brings_inputs=True)
    if case.cache == "cold":
        evicting, nbytes = backend, EVICT_NBYTES
        if opened.on_cpu:  # NumPy evicts the host's caches for every backend
            evicting = BACKENDS["numpy"]
            # So many that no input stays in a cache.
            nbytes = min(2 * last_level_cache_nbytes(), EVICT_CAP_NBYTES)
        opened.evict = evicting.make_evict(opened.device, nbytes)
    session.opened = opened
    session.settings = isolation.read()
    allocate(session)
    if opened.inputs and (seen := backend.device_of(opened.inputs[0])) != case.device:
        close_case(session)
        raise NotRunError(f"inputs asked for on {case.device} were put on {seen}")
    return Opened(
        nbytes=sum(array.nbytes for array in host),
        devices=devices,
        seconds=time.perf_counter() - start,
    )


def close_case(session: Session) -> None:
    """Release everything that the last case held, including compiled functions."""
    session.extras.clear()
    session.suspects.clear()
    if session.opened is None:
        return
    backend, pools = session.opened.backend, session.opened.pools
    session.opened = None
    for pool in pools:
        pool.shutdown()
    backend.clear()
    gc.collect()


def allocate(session: Session) -> float:
    """Allocate new inputs for every contender; return the seconds that it took.

    The old ones are let go only afterwards, so that the new ones lie elsewhere: addresses decide by
    up to 20% how fast a call is, and an interval from one allocation is too narrow.
    """
    start = time.perf_counter()
    opened = session.open
    if opened.inputs:
        opened.inputs = opened.backend.copy(opened.inputs, opened.device)
    else:
        opened.inputs = opened.backend.put(opened.host, opened.device)
    return time.perf_counter() - start


def bind(candidate: Candidate, case: Case, backend: Backend = BACKENDS["tensorflow"]) -> Call:
    """Return the candidate as the case calls it: (inputs) -> y, or (inputs, dy) -> (y, gradients), in its mode.

    A NumPy candidate is called as it is, with any backend.

    Functions are defined by `def` so that their names can be found in a trace.
    """
    if candidate.backends == ("numpy",):
        backend = BACKENDS["numpy"]
    build = candidate.build(case)

    def forward(*inputs: Any) -> Any:
        return build(*inputs)

    if case.direction == "forward":
        return backend.compile(build if backend.name == "numpy" else forward, case.mode)
    return backend.compile(backend.vjp(build, differentiable_places(case)), case.mode)


def differentiable_places(case: Case) -> list[int]:
    """Return the positions of the inputs that have a gradient in training; the first for an unregistered op."""
    op = REGISTRY.ops.get(case.op)
    specs = op.inputs(case).values() if op else ()
    return [place for place, spec in enumerate(specs) if spec.differentiable] if op else [0]


def list_devices(session: Session) -> dict[str, str]:
    """Return the devices of the backend: {'cpu:0': 'CPU', 'gpu:0': 'NVIDIA H100 ...'}."""
    return session.backend.devices()


def end_process(session: Session) -> None:  # noqa: ARG001
    """End this worker at once, even if a candidate has installed handlers that would prevent it."""
    os._exit(1)


def process_id(session: Session) -> int:  # noqa: ARG001
    """Return this worker's process id."""
    return os.getpid()
