"""Worker tasks that the tests of traces record, with TensorFlow."""

from pathlib import Path

from poolbench.core.case import Case, make_case
from poolbench.core.records import TraceSummary
from poolbench.core.registry import load_builtin
from poolbench.engine.tracing import trace_name
from poolbench.worker.session import Session
from poolbench.worker.trace import load_trace, record_trace, trace_candidate
from poolbench.worker.xspace import Reading, read_device_seconds, read_trace

load_builtin()  # declares the axes of the cases below, whichever test runs first

# So large that launching it is little of a step, on a busy machine too.
LARGE = make_case(op="depth_max_pool", shape=(32, 112, 112, 96), pool_size=3, padding="valid")
GRADIENT = make_case(
    op="depth_max_pool", shape=(32, 56, 56, 96), pool_size=3, padding="valid", mode="xla",
    direction="training",
)  # fmt: skip
MEBIBYTE = 1 << 20


def trace(session: Session, case: Case, name: str, profiles: Path) -> TraceSummary:
    return trace_candidate(session, case, name, str(Path(profiles) / trace_name(case, name)))


def read(path) -> Reading:
    return read_trace(load_trace(Path(path)))


def allocate_known(folder) -> Reading:
    """A step that holds 32 MiB, then 16 MiB beside them; a leading slice is no copy."""
    import tensorflow as tf

    ones = tf.ones([8 * MEBIBYTE])

    def step():
        doubled = ones + ones
        half = doubled[: 4 * MEBIBYTE] + 1.0
        del doubled, half

    step()
    return read(record_trace(step, Path(folder), name="known", steps=5))


def two_within_a_second(first, second):
    import tensorflow as tf

    for folder, name in ((first, "one"), (second, "two")):
        record_trace(lambda: tf.constant(1.0) + 1.0, Path(folder), name=name, steps=2)


def raise_at_step(folder, after) -> tuple[str, Reading, Reading]:
    """(the error's text, the reading of what was recorded, of the session after it)."""
    import tensorflow as tf

    calls = []

    def step():
        calls.append(tf.constant(1.0) + 1.0)
        if len(calls) == 3:
            raise ValueError("the third step")

    try:
        record_trace(step, Path(folder), name="raising")
    except ValueError as error:
        said = str(error)
    record_trace(lambda: tf.constant(1.0) + 1.0, Path(after), name="after", steps=4)
    return said, *(read(next(Path(f).glob("*.xplane.pb"))) for f in (folder, after))


def record_named(folder, name, steps):
    import tensorflow as tf

    record_trace(lambda: tf.constant(1.0) + 1.0, Path(folder), name=name, steps=steps)


def read_device_clock(path) -> tuple[dict[str, list[float]], Reading]:
    """Seconds by step and the trace summary of a recording that was made on a GPU."""
    space = load_trace(Path(path))
    return read_device_seconds(space), read_trace(space, device="gpu:0")
