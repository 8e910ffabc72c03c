"""Workloads: a candidate bound to a case's inputs on a device. This runs inside a worker.

TensorFlow is imported here and in poolbench.ops, inside functions, and nowhere else. The functions at the
end (`open_case`, `open_contender`, `allocate`, `time_batch`, `close_case`) are the tasks that a race sends:
plain data in, plain data out, the state in this module between them.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from poolbench.core.candidate import Candidate
from poolbench.core.case import Case
from poolbench.core.errors import reason_of, status_of
from poolbench.core.plan import WorkerSpec
from poolbench.core.records import Accuracy, Status
from poolbench.core.registry import REGISTRY
from poolbench.machine import smt
from poolbench.machine.idle import kept_awake
from poolbench.machine.nvml import EVICT_NBYTES
from poolbench.worker import isolation

if TYPE_CHECKING:
    from poolbench.worker.check import Answers, Verdict

    Array = np.ndarray[Any, Any]

PROBES = ("bandwidth-read", "bandwidth-write", "bandwidth-copy")
# Below this the call's own cost, not the memory, is what a write probe would measure.
MIN_WRITE_NBYTES = 1 << 20
MIN_DEVICE_WRITE_NBYTES = 1 << 24  # a GPU writes a megabyte faster than it begins to
# The CPU's allocator counts no tensor below 256 KiB: of a small case it would say too little.
MIN_PEAK_NBYTES = 1 << 20
EVICT_CAP_NBYTES = 1 << 30
ENERGY_CALLS = 10  # between two readings of the device's counter
ENERGY_SECONDS, ENERGY_LIMIT_SECONDS = 0.1, 3.0
Call = Callable[..., Any]


def start_tensorflow(setting: WorkerSpec) -> None:
    """Import TensorFlow with a process' settings; they hold until the process ends."""
    import tensorflow as tf

    if setting.threads:
        tf.config.threading.set_intra_op_parallelism_threads(setting.threads)
    if setting.logical_cpus > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * setting.logical_cpus
        )
    for gpu in tf.config.list_physical_devices("GPU"):
        # Processes share the device: without growth the first takes all of its memory.
        tf.config.experimental.set_memory_growth(gpu, True)
    if setting.deterministic:
        tf.config.experimental.enable_op_determinism()
    tf.config.list_logical_devices()
    import keras  # noqa: F401 (takes seconds: the first candidate should not pay for it)

    # What is loaded now stays: collecting garbage between races must not walk through all of it.
    gc.collect()
    gc.freeze()


def list_devices() -> dict[str, str]:
    """What TensorFlow sees: {'cpu:0': 'CPU', 'gpu:0': 'NVIDIA H100 ...'}."""
    import tensorflow as tf

    names = {}
    physical = {kind: tf.config.list_physical_devices(kind) for kind in ("CPU", "GPU")}
    for device in tf.config.list_logical_devices():
        kind, index = device.device_type, int(device.name.rsplit(":", 1)[1])
        if kind not in physical:
            continue
        of_kind = physical[kind]
        details = tf.config.experimental.get_device_details(of_kind[min(index, len(of_kind) - 1)])
        names[f"{kind.lower()}:{index}"] = details.get("device_name", kind)
    return names


def bind(candidate: Candidate, case: Case) -> Call:
    """Return the candidate as the case calls it: (inputs) -> y, or (inputs, dy) -> (y, gradients), in its mode.

    Functions are defined by `def` so that their names can be found in a trace.
    """
    build = candidate.build(case)
    if candidate.framework == "numpy":
        return _bind_numpy(build, case)
    import tensorflow as tf

    places = differentiable_places(case)

    def forward(*inputs: Any) -> Any:
        return build(*inputs)

    def training(*inputs_and_dy: Any) -> Any:
        *inputs, dy = inputs_and_dy
        watched = [inputs[place] for place in places]
        with tf.GradientTape() as tape:
            tape.watch(watched)
            y = build(*inputs)
        return (y, *tape.gradient(y, watched, output_gradients=dy))

    step: Call = forward if case.direction == "forward" else training
    modes: dict[str, Callable[[Call], Call]] = {
        "eager": lambda function: function,
        "graph": tf.function,
        "xla": lambda function: tf.function(function, jit_compile=True),
    }
    return modes[case.mode](step)


def differentiable_places(case: Case) -> list[int]:
    """Return which of the op's inputs training computes a gradient of; the first of an unregistered op."""
    op = REGISTRY.ops.get(case.op)
    specs = op.inputs(case).values() if op else ()
    return [place for place, spec in enumerate(specs) if spec.differentiable] if op else [0]


def _bind_numpy(build: Call, case: Case) -> Call:
    if case.direction != "forward":
        raise NotImplementedError("a NumPy candidate has no gradient")
    return build


def to_numpy(value: Any) -> Array:
    """A result on the host, in its own dtype.

    Raises:
        TypeError: it is no array.
    """
    if value is None:
        raise TypeError("it returned None (a gradient that does not exist?)")
    array = value.numpy() if hasattr(value, "numpy") else value
    if not isinstance(array, np.ndarray) and not np.isscalar(array):
        raise TypeError(f"it returned a {type(value).__name__}, not an array")
    return np.asarray(array)


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """What opening a case came to.

    Attributes:
        nbytes: of the inputs.
        seconds: by kind: 'allocation'.
    """

    nbytes: int
    devices: dict[str, str]
    seconds: float


class OpenedContender(msgspec.Struct, frozen=True, kw_only=True):
    """What opening a contender came to.

    Attributes:
        status, reason: 'ok', or why it cannot race.
        first_call_seconds: trace and compile and the first run.
        call_seconds: a rough time of one call, to plan blocks by; 0 where it was not checked, for
            then an earlier process knows it.
        read_nbytes, written_nbytes: fewest bytes a call reads and writes.
        check_seconds, calibration_seconds: what else opening took.
        tainted: it left the process other than it was: its other candidates need a fresh one.
    """

    status: Status = "ok"
    reason: str = ""
    accuracy: Accuracy | None = None
    first_call_seconds: float = 0.0
    call_seconds: float = 0.0
    read_nbytes: int = 0
    written_nbytes: int = 0
    peak_nbytes: int | None = None
    check_seconds: float = 0.0
    calibration_seconds: float = 0.0
    tainted: bool = False


class BlockRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What one contender is to do in a round: `warmup` untimed calls, then `calls` timed ones."""

    name: str
    warmup: int
    calls: int


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """What a block came to.

    Attributes:
        seconds: of one call.
        warmup_seconds: the untimed calls before it.
        status, reason: 'ok', or what the call raised; the seconds then say nothing.
    """

    seconds: float = 0.0
    warmup_seconds: float = 0.0
    status: Status = "ok"
    reason: str = ""


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that were timed in a row, and what the process used of the machine meanwhile.

    Attributes:
        cpu_seconds: processor time of this process, all threads.
        switches: involuntary context switches.
        smt_sibling_busy: share of the looks, before and after, at which a processor's sibling was at work for another
            guest of the host (poolbench.machine.smt); None where that is not to be seen.
    """

    blocks: tuple[Block, ...]
    cpu_seconds: float
    switches: int
    smt_sibling_busy: float | None = None


@dataclass
class _State:
    """What this process holds of the race that is open."""

    case: Case
    device: str
    tensorflow: bool
    host: tuple[Array, ...]
    inputs: tuple[Any, ...] = ()
    calls: dict[str, tuple[Call, tuple[int, ...]]] = field(default_factory=dict)
    evict: Callable[[], None] | None = None
    answers: Answers | None = None
    pool: ThreadPoolExecutor | None = None


_STATE: list[_State] = []
_CONVERTED: set[tuple[str, str]] = set()  # candidates that this process has traced
# The fastest way of a probe over so many bytes on a device, and its seconds: sizes recur from case to case.
_FASTEST: dict[tuple[str, int, str], tuple[str, float]] = {}


def _state() -> _State:
    if not _STATE:
        raise RuntimeError("no case is open in this worker")
    return _STATE[0]


def open_case(case: Case, seed: int, *, tensorflow: bool = True) -> Opened:
    """Make the case's inputs, on the host and on the device."""
    from poolbench.worker.check import make_inputs

    close_case()
    return hold(case, make_inputs(case, seed), tensorflow=tensorflow)


def hold(case: Case, host: tuple[Array, ...], *, tensorflow: bool = True) -> Opened:
    """Open a case on these inputs: for what brings its own, such as a network's step."""
    start = time.perf_counter()
    state = _State(case=case, device=case.device, tensorflow=tensorflow, host=host)
    if case.cache == "cold":
        state.evict = _make_evict(state)
    _STATE.append(state)
    allocate()
    return Opened(
        nbytes=sum(array.nbytes for array in host),
        devices=list_devices() if tensorflow else {"cpu:0": "CPU"},
        seconds=time.perf_counter() - start,
    )


def close_case() -> None:
    """Let go of all that the last case held, compiled functions included."""
    if not _STATE:
        return
    uses_tensorflow = _STATE[0].tensorflow
    if _STATE[0].pool is not None:
        _STATE[0].pool.shutdown()
    _STATE.clear()
    if uses_tensorflow:
        import keras

        keras.backend.clear_session()
    gc.collect()


def allocate() -> float:
    """Allocate the inputs anew, for every contender; seconds that it took.

    The old ones are let go only afterwards, so that the new ones lie elsewhere: addresses decide by
    up to 20% how fast a call is, and an interval from one allocation is too narrow.
    """
    start = time.perf_counter()
    state = _state()
    if state.tensorflow:
        import tensorflow as tf

        with tf.device(state.device):
            # A constant may lie in the array's own memory; what is added to it does not.
            old = state.inputs or tuple(tf.constant(array) for array in state.host)
            state.inputs = tuple(value + 0 for value in old)
        tf.test.experimental.sync_devices()
    else:
        state.inputs = tuple(array.copy() for array in state.host)
    return time.perf_counter() - start


def open_contender(name: str, *, check: bool) -> OpenedContender:
    """Build a candidate or a probe and call it first; `check`: hold it to the reference, estimate its time.

    A candidate that raises comes back with status 'error' and its text; so does one that leaves
    threads or processes behind, or changes what its other candidates share with it.
    """
    before = isolation.read()
    try:
        if name in PROBES:
            return _open_probe(name)
        contender = _open_candidate(name, check=check)
    except Exception as error:  # noqa: BLE001 (what a candidate raises is a result)
        contender = OpenedContender(status=status_of(error), reason=reason_of(error))
    if left := isolation.left_behind(before):
        reason = left if contender.status == "ok" else f"{contender.reason}; {left}"
        status = "error" if contender.status == "ok" else contender.status
        return msgspec.structs.replace(contender, status=status, reason=reason, tainted=True)
    return contender


def _open_candidate(name: str, *, check: bool) -> OpenedContender:
    state = _state()
    case = state.case
    candidate = REGISTRY.candidates[case.op, name]

    start = time.perf_counter()
    if case.mode != "eager" and (case.op, name) not in _CONVERTED:
        # AutoGraph converts a candidate's Python once a process, and the first of all pays for AutoGraph
        # itself, a quarter of a second: neither is what tracing and compiling cost in this case.
        function = bind(candidate, case)
        if hasattr(function, "get_concrete_function"):  # a NumPy candidate's has none
            with _device(state):
                function.get_concrete_function(*state.inputs)
        _CONVERTED.add((case.op, name))
    converting = time.perf_counter() - start

    def judge(outputs: tuple[Array, ...]) -> Verdict:
        from poolbench.worker import check

        if state.answers is None:
            state.answers = check.Answers(op=REGISTRY.ops[case.op], case=case, inputs=state.host)
        return check.judge(state.answers, outputs)

    contender = open_call(
        name,
        lambda: bind(candidate, case),
        judge=judge if check else None,
        calibrate=check,
        measure_peak=check and sum(array.nbytes for array in state.host) >= MIN_PEAK_NBYTES,
    )
    return msgspec.structs.replace(
        contender, calibration_seconds=contender.calibration_seconds + converting
    )


def open_call(
    name: str,
    make: Callable[[], Call],
    *,
    places: tuple[int, ...] | None = None,
    judge: Callable[[tuple[Array, ...]], Verdict] | None = None,
    calibrate: bool = True,
    measure_peak: bool = False,
) -> OpenedContender:
    """Make a call, call it first, judge what it returned, and estimate its time.

    Args:
        name: of the contender, for a BlockRequest.
        make: makes the call; its time is part of the first call's.
        places: which of the case's inputs it takes; None: all.
        judge: given the outputs of the first call; None: they are not checked.
        calibrate: whether to estimate the time of a call.
        measure_peak: whether to read the peak of the device's memory.
    """
    state = _state()
    places = tuple(range(len(state.inputs))) if places is None else places
    arguments = [state.inputs[i] for i in places]
    start = time.perf_counter()
    with _device(state):
        call = make()
        result = call(*arguments)
        synchronise(state)
    first_call = time.perf_counter() - start
    outputs = tuple(
        to_numpy(value) for value in (result if isinstance(result, tuple) else (result,))
    )
    del result
    state.calls[name] = (call, places)
    start = time.perf_counter()
    verdict = judge(outputs) if judge else None
    check_seconds = time.perf_counter() - start
    start = time.perf_counter()
    peak = _peak_nbytes(state, call, arguments) if measure_peak else None
    call_seconds = _estimate(state, name) if calibrate else 0.0
    return OpenedContender(
        status=verdict.status if verdict else "ok",
        reason=verdict.reason if verdict else "",
        accuracy=verdict.accuracy if verdict else None,
        first_call_seconds=first_call,
        call_seconds=call_seconds,
        read_nbytes=sum(state.host[i].nbytes for i in places),
        written_nbytes=sum(array.nbytes for array in outputs),
        peak_nbytes=peak,
        check_seconds=check_seconds,
        calibration_seconds=time.perf_counter() - start,
    )


def _estimate(state: _State, name: str) -> float:
    """Rough seconds a call: the least of three after one that warms up."""
    call, places = state.calls[name]
    arguments = [state.inputs[i] for i in places]
    seconds = []
    with _device(state):
        for _ in range(4):
            start = time.perf_counter()
            call(*arguments)
            synchronise(state)
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _peak_nbytes(state: _State, call: Call, arguments: list[Any]) -> int | None:
    """Peak of the device's memory during one call above what was held before it.

    None where the allocator keeps no count: NumPy, and on the CPU tensors below 256 KiB.
    """
    if not state.tensorflow:
        return None
    import tensorflow as tf

    device = state.device.upper()
    try:
        before = tf.config.experimental.get_memory_info(device)["current"]
        tf.config.experimental.reset_memory_stats(device)
        with _device(state):
            call(*arguments)
            synchronise(state)
        peak = tf.config.experimental.get_memory_info(device)["peak"]
    except (ValueError, tf.errors.OpError):  # this device or allocator keeps no count
        return None
    return int(max(0, peak - before)) or None


def _open_probe(name: str) -> OpenedContender:
    """The fastest of several ways to read, write or copy as many bytes as the case does; tried once a process."""
    state = _state()
    nbytes = state.host[0].nbytes
    if name == "bandwidth-write":
        least = MIN_WRITE_NBYTES if _on_cpu(state) else MIN_DEVICE_WRITE_NBYTES
        op = REGISTRY.ops.get(state.case.op)
        nbytes = max(least, op.traffic_of(state.case).written_nbytes if op else nbytes)
    start = time.perf_counter()
    ways = PROBE_WAYS[name](state, nbytes)
    key = (name, nbytes, state.device)
    if key not in _FASTEST:
        seconds = {}
        for way, call in ways.items():
            state.calls[name] = (call, (0,))
            seconds[way] = _estimate(state, name)
        best = min(seconds, key=lambda way: seconds[way])
        _FASTEST[key] = best, seconds[best]
    best, call_seconds = _FASTEST[key]
    state.calls[name] = (ways[best], (0,))
    return OpenedContender(
        call_seconds=call_seconds,
        read_nbytes=0 if name == "bandwidth-write" else nbytes,
        written_nbytes=0 if name == "bandwidth-read" else nbytes,
        calibration_seconds=time.perf_counter() - start,
    )


def _words(value: Any) -> Any:
    """The bytes of a tensor as float32, without a copy, where their number allows it."""
    import tensorflow as tf

    flat = tf.reshape(value, [-1])
    if value.dtype.size == 2 and flat.shape[0] % 2 == 0:
        return tf.bitcast(tf.reshape(flat, [-1, 2]), tf.float32)
    return flat


def _read_ways(state: _State, nbytes: int) -> dict[str, Call]:
    words = state.host[0].reshape(-1).view(np.uint8)[: nbytes // 8 * 8].view(np.int64)
    ways = _host_ways(state, lambda part: part.max(), words)
    if state.tensorflow:
        import tensorflow as tf

        ways["reduce_sum"] = lambda x: tf.reduce_sum(_words(x))
        ways["reduce_max"] = lambda x: tf.reduce_max(_words(x))
        if not _on_cpu(state):
            ways["xla"] = tf.function(lambda x: tf.reduce_max(_words(x)), jit_compile=True)
    return ways


def _write_ways(state: _State, nbytes: int) -> dict[str, Call]:
    count = nbytes // 4
    ways = _host_ways(state, lambda part: part.fill(1.0), np.ones(count, np.float32))
    if state.tensorflow:
        import tensorflow as tf

        ways["fill"] = lambda _: tf.fill([count], 1.0)
        if not _on_cpu(state):
            scalar = tf.constant(1.0)
            broadcast = tf.function(lambda s: tf.broadcast_to(s, [count]), jit_compile=True)
            ways["xla"] = lambda _: broadcast(scalar)
    return ways


def _copy_ways(state: _State, nbytes: int) -> dict[str, Call]:  # noqa: ARG001 (one of a table)
    source = state.host[0].reshape(-1)
    ways = _host_ways(state, np.copyto, np.ones_like(source), source)
    if state.tensorflow:
        import tensorflow as tf

        ways["negative"] = lambda x: tf.negative(_words(x))
        if not _on_cpu(state):
            ways["xla"] = tf.function(lambda x: -_words(x), jit_compile=True)
    return ways


def _host_ways(state: _State, work: Call, *arrays: Array) -> dict[str, Call]:
    """NumPy's ways, by one thread and by as many as the case has; none for what lies on a GPU.

    One thread's call costs least, which counts where the input is small; several read more where it is
    large. They are Python's threads, which NumPy's loops let run side by side.
    """
    if not _on_cpu(state):
        return {}
    ways: dict[str, Call] = {"numpy": lambda _: work(*arrays)}
    threads = state.case.threads or os.cpu_count() or 1
    if threads > 1:
        parts = list(zip(*(np.array_split(array, threads) for array in arrays), strict=True))
        state.pool = state.pool or ThreadPoolExecutor(threads)
        pool = state.pool
        ways["numpy-threads"] = lambda _: list(pool.map(lambda part: work(*part), parts))
    return ways


PROBE_WAYS: dict[str, Callable[[_State, int], dict[str, Call]]] = {
    "bandwidth-read": _read_ways,
    "bandwidth-write": _write_ways,
    "bandwidth-copy": _copy_ways,
}


def _on_cpu(state: _State) -> bool:
    return state.device.startswith("cpu")


def _device(state: _State) -> Any:
    import contextlib

    if not state.tensorflow:
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.device(state.device)


def synchronise(state: _State) -> None:
    """Return when the device has finished all that it was given.

    On a CPU a call has finished when it returns, and waiting again takes a tenth of a millisecond:
    threads are woken for it, which would be a quarter of a short block.
    """
    if state.tensorflow and not _on_cpu(state):
        import tensorflow as tf

        tf.test.experimental.sync_devices()


def time_batch(requests: Sequence[BlockRequest]) -> Batch:
    """Every block in turn; what a call raises ends its own block only."""
    start = resource.getrusage(resource.RUSAGE_SELF)
    blocks = []
    with kept_awake():
        looks = [smt.busy_share()]
        for request in requests:
            try:
                blocks.append(time_block(request.name, request.warmup, request.calls))
            except Exception as error:  # noqa: BLE001, PERF203 (what a candidate raises is a result)
                blocks.append(Block(status=status_of(error), reason=reason_of(error)))
        looks.append(smt.busy_share())
    seen = [look for look in looks if look is not None]
    end = resource.getrusage(resource.RUSAGE_SELF)
    return Batch(
        blocks=tuple(blocks),
        cpu_seconds=end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime,
        switches=end.ru_nivcsw - start.ru_nivcsw,
        smt_sibling_busy=statistics.fmean(seen) if seen else None,
    )


def time_block(name: str, warmup: int, calls: int) -> Block:
    """Seconds a call over `calls` calls in a row, after `warmup` untimed ones.

    This is the one timing loop of the project.
    """
    state = _state()
    call, places = state.calls[name]
    arguments = [state.inputs[i] for i in places]
    with _device(state):
        if state.evict is not None:
            return _time_cold_block(state, call, arguments, calls)
        start = time.perf_counter()
        for _ in repeat(None, warmup):
            call(*arguments)
        synchronise(state)
        gc.disable()
        try:
            begin = time.perf_counter()
            for _ in repeat(None, calls):
                call(*arguments)
            synchronise(state)
            end = time.perf_counter()
        finally:
            gc.enable()
    return Block(seconds=(end - begin) / calls, warmup_seconds=begin - start)


def _time_cold_block(state: _State, call: Call, arguments: list[Any], calls: int) -> Block:
    """As time_block, with the caches emptied before every call and that not timed."""
    assert state.evict is not None
    total = evicting = 0.0
    for _ in repeat(None, calls):
        start = time.perf_counter()
        state.evict()
        begin = time.perf_counter()
        call(*arguments)
        synchronise(state)
        total += time.perf_counter() - begin
        evicting += begin - start
    return Block(seconds=total / calls, warmup_seconds=evicting)


def make_step(name: str) -> Callable[[], None]:
    """A call of a contender on the case's inputs that returns when the device has finished."""
    state = _state()
    call, places = state.calls[name]
    arguments = [state.inputs[i] for i in places]

    def step() -> None:
        with _device(state):
            call(*arguments)
            synchronise(state)

    return step


def time_on_device(names: Sequence[str], calls: int) -> list[float | None]:
    """Seconds a call, over `calls` calls, of each contender in turn by the device's own clock; None where it has none.

    Where the case asks for cold caches they are emptied before every call, and that not timed.
    """
    from poolbench.engine import tracing

    evict = _state().evict
    return tracing.time_on_device([(make_step(name), evict) for name in names], calls=calls)


def measure_energy(
    name: str,
    seconds: float = ENERGY_SECONDS,
    *,
    read: Callable[[str], float | None] | None = None,
) -> float | None:
    """Joules a call, the device's idle power included; None where it keeps no count.

    The counter steps several times a second: what is counted is the calls between the step that comes first
    and the first one after `seconds` more.
    """
    from poolbench.machine.nvml import energy_joules

    state = _state()
    read = read or energy_joules
    joules = read(state.device)
    if joules is None:
        return None
    calls = 0
    first: tuple[float, float, int] | None = None  # when, joules, calls
    limit = time.perf_counter() + ENERGY_LIMIT_SECONDS
    while (now := time.perf_counter()) < limit:
        time_block(name, 0, ENERGY_CALLS)
        calls += ENERGY_CALLS
        before, joules = joules, read(state.device)
        if joules is None:
            return None
        if joules == before:
            continue
        if first is None:
            first = now, joules, calls
        elif now - first[0] >= seconds:
            return (joules - first[1]) / (calls - first[2])
    return None


def _make_evict(state: _State) -> Callable[[], None]:
    """What empties the caches of the case's device: it touches twice the bytes that they hold."""
    if not state.tensorflow or _on_cpu(state):
        words = np.ones(_evict_nbytes() // 8, np.int64)

        def evict_host() -> None:
            np.add(words, 1, out=words)

        return evict_host
    return make_device_evict(state.device, EVICT_NBYTES)


def make_device_evict(device: str, nbytes: int) -> Callable[[], None]:
    """A function that reads and writes `nbytes` of the device's own memory and waits until it has.

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


def _evict_nbytes() -> int:
    """Bytes to touch so that nothing of the inputs is left in a cache."""
    from poolbench.machine.info import last_level_cache_nbytes

    return min(2 * last_level_cache_nbytes(), EVICT_CAP_NBYTES)


def end_process() -> None:
    """End this worker at once, without the chance to refuse that a candidate may have taken."""
    os._exit(1)


def process_id() -> int:
    """This worker's process id."""
    return os.getpid()
