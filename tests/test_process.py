"""Real worker processes, NumPy only: how they end, and that nothing outlives them."""

import contextlib
import fcntl
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from poolbench.cli import main
from poolbench.core.errors import WorkerFailure, one_line, printable, reason_of, status_of
from poolbench.core.plan import WorkerSpec
from poolbench.engine import cleanup, process
from poolbench.engine.process import Worker
from poolbench.engine.watchdog import system_killings

NUMPY = WorkerSpec(backend="numpy")
MEMORY_NBYTES = 400 << 20


def say(text):
    print(text, flush=True)
    return os.getpid()


def raise_it():
    print("before the end")
    raise ValueError("first line\nsecond \x1b[31mline")


def raise_without_text():
    class NoTextError(Exception):
        def __str__(self):
            raise RuntimeError

    raise NoTextError


def leave(code):
    os._exit(code)


def kill_itself(number):
    print("last words", flush=True)
    os.kill(os.getpid(), number)
    time.sleep(60)


def exit_politely():
    sys.exit("enough")


def loop():
    while True:
        pass


def grow():
    held = []
    while True:
        held.append(np.ones(4 << 20))


def flood():
    for _ in range(100):
        os.write(1, b"x" * (1 << 20))
    os.write(1, b"the end")
    return "done"


def flood_and_wait():
    flood()
    time.sleep(0.3)  # long enough for the log to be emptied once more
    return "done"


def run_program(seconds):
    return subprocess.Popen(["sleep", str(seconds)]).pid


def run_daemon(seconds):
    return subprocess.Popen(["sleep", str(seconds)], start_new_session=True).pid


def fork_and_return():
    return os.fork()


def wait(seconds):
    time.sleep(seconds)
    return "done"


def slow_clock():
    from poolbench.worker import timing

    timing.clock = lambda: time.perf_counter() / 8


def raise_memory_error():
    np.ones(1 << 46)


@pytest.fixture(scope="module")
def worker():
    worker = Worker(NUMPY, memory_nbytes=MEMORY_NBYTES)
    yield worker
    worker.close()


def is_gone(pid):
    """Whether a process has ended, at once or soon."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("function", "arguments", "status", "reason", "tail", "lost"),
    [
        (raise_it, (), "error", r"^ValueError: first line second line$", "before the end", False),
        (raise_without_text, (), "error", "NoTextError: .*cannot be made", "", False),
        (exit_politely, (), "error", r"sys.exit\('enough'\)", "", False),
        (raise_memory_error, (), "out_of_memory", "^host memory: ", "", False),
        (leave, (3,), "crashed", "exited with code 3", "", True),
        (leave, (0,), "crashed", "exited with code 0", "", True),
        (kill_itself, (signal.SIGSEGV,), "crashed", "SIGSEGV", "last words", True),
        (kill_itself, (signal.SIGABRT,), "crashed", "SIGABRT", "last words", True),
        (kill_itself, (signal.SIGKILL,), "crashed", "SIGKILL", "last words", True),
        (kill_itself, (signal.SIGSTOP,), "timeout", "no answer within 2 s", "last words", True),
        (loop, (), "timeout", r"no answer within 2 s \(--task-timeout\)", "", True),
        (grow, (), "out_of_memory", r"host memory: killed at \d+ MiB, the limit is 400 MiB", "", True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_task_that_ends_badly_is_one_typed_failure(
    worker, function, arguments, status, reason, tail, lost
):
    with pytest.raises(WorkerFailure) as caught:
        worker.call(function, *arguments, timeout=2 if status == "timeout" else 600)
    failure = caught.value
    assert failure.status == status
    assert failure.lost == lost
    assert not failure.blameless
    assert failure.stopped == (arguments == (signal.SIGSTOP,))
    assert tail in failure.tail
    assert "\n" not in failure.reason
    assert re.search(reason, failure.reason), failure.reason
    assert worker.call(say, "alive", timeout=600)  # a fresh one, where it was lost
    assert worker.tail == "alive"


def test_tail_holds_the_output_of_its_own_task_only(worker):
    worker.call(say, "of the first task", timeout=600)
    with pytest.raises(WorkerFailure) as caught:
        worker.call(raise_it, timeout=600)
    assert caught.value.tail == "before the end"


def test_flood_of_output_is_cut_to_its_end(worker):
    assert worker.call(flood, timeout=600) == "done"
    assert worker.tail.endswith("the end")
    assert len(worker.tail) <= 2000
    assert (worker._folder / "log").stat().st_size < 1 << 20


def test_flood_with_nothing_after_it_keeps_its_end(worker):
    assert worker.call(flood_and_wait, timeout=600) == "done"
    assert worker.tail.endswith("the end")


def test_worker_that_dies_between_two_tasks_blames_neither(worker):
    pid = worker.call(say, "", timeout=600)
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(
        ChildProcessError
    ):  # all its threads have ended, and its pipes are closed
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(WorkerFailure) as caught:
        worker.call(say, "", timeout=600)
    assert (caught.value.lost, caught.value.blameless) == (True, True)
    assert worker.call(say, "", timeout=600) != pid


def test_worker_that_ended_closes_no_pipe_of_a_number_twice():
    worker = Worker(NUMPY)
    worker.call(say, "", timeout=600)
    ended = worker._process
    ended.kill()
    ended.end()
    number = ended._request_number
    reused = fcntl.fcntl(0, fcntl.F_DUPFD, number)
    assert reused == number
    worker.close()  # ends the process once more
    os.close(reused)  # raises where it was closed already


def test_forked_child_that_returns_answers_nothing(worker):
    child = worker.call(fork_and_return, timeout=600)
    assert child > 0
    assert is_gone(child)
    assert worker.call(say, "", timeout=600) == worker.call(say, "", timeout=600)


@pytest.mark.parametrize("start", [run_program, run_daemon])
def test_program_that_a_task_started_does_not_outlive_the_worker(start):
    worker = Worker(NUMPY)
    child = worker.call(start, 600, timeout=600)
    worker.close()
    assert is_gone(child)


def test_worker_that_was_closed_starts_no_process():
    worker = Worker(NUMPY)
    worker.close()
    with pytest.raises(WorkerFailure, match="the worker was closed"):
        worker.call(say, "", timeout=600)


def test_user_file_that_cannot_be_imported_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import nothing_of_this_name\n")
    worker = Worker(NUMPY, files=[file])
    with pytest.raises(WorkerFailure, match="nothing_of_this_name"):
        worker.call(say, "", timeout=600)
    worker.close()


def write_interpreter(folder, text):
    file = folder / "python"
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


OTHER_VERSION = f"""#!{sys.executable}
import os, sys
from poolbench.worker.messages import Hello, pack
os.write(int(sys.argv[4]), pack(Hello(protocol=99, version="9.9")))
"""


@pytest.mark.fault(
    "an interpreter that cannot start a worker",
    "`error` in one line with the cause",
)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be run: "),
        (
            f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n',
            "cannot start a worker: .*No module named",
        ),
        (
            OTHER_VERSION,
            "has poolbench 9.9, which speaks version 99 of the workers' protocol; this one ",
        ),
    ],
    ids=["missing", "without the package", "another protocol"],
)
def test_worker_of_an_unusable_interpreter_is_one_clear_line(tmp_path, text, reason):
    interpreter = write_interpreter(tmp_path, text) if text else str(tmp_path / "no-python")
    if "Hello" in text:  # another interpreter is not given this one's package
        text = text.replace(
            "import os, sys", f"import os, sys; sys.path.append({process.SOURCE!r})"
        )
        write_interpreter(tmp_path, text)
    worker = Worker(WorkerSpec(interpreter=interpreter, backend="numpy"))
    with pytest.raises(WorkerFailure, match=reason) as caught:
        worker.call(say, "", timeout=600)
    worker.close()
    assert "\n" not in caught.value.reason
    assert interpreter in caught.value.reason


def test_function_outside_the_package_is_not_called(worker):
    with pytest.raises(WorkerFailure, match=":getcwd is no task"):
        worker.call(os.getcwd, timeout=600)


@pytest.mark.fault(
    "the run or the machine is suspended",
    "the time counts towards no limit",
)
def test_time_asleep_does_not_count_for_a_limit(worker, monkeypatch):
    asleep = itertools.count(0, 1000)
    clock = time.monotonic
    monkeypatch.setattr(process.time, "monotonic", lambda: clock() + next(asleep))
    # A wait counts for half a second here, whatever it took: far fewer than 200 of them end the task.
    assert worker.call(wait, 0.2, timeout=100) == "done"


def test_worker_that_was_stopped_for_a_while_slept(worker):
    assert worker.call(wait, 0.0, timeout=600) == "done"
    assert not worker.slept
    pid = worker.call(say, "", timeout=600)

    def wake_when_seen():
        while not worker.slept:
            time.sleep(0.02)
        os.kill(pid, signal.SIGCONT)

    os.kill(pid, signal.SIGSTOP)
    threading.Thread(target=wake_when_seen, daemon=True).start()
    assert worker.call(wait, 0.0, timeout=600) == "done"
    assert worker.slept


def test_call_whose_clock_was_changed_is_refused(worker):
    with pytest.raises(WorkerFailure, match="the worker's clock was changed"):
        worker.call(slow_clock, timeout=600)


RUN = """
import signal, sys, time, threading
from poolbench.core.plan import WorkerSpec
from poolbench.engine.process import Worker
from tests import test_process as there
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
workers = [Worker(WorkerSpec(backend="numpy")) for _ in range(2)]
pids = [worker.call(there.say, "", timeout=600) for worker in workers]
pids += [worker.call(there.run_program, 600, timeout=600) for worker in workers]
pids += [workers[0].call(there.run_daemon, 600, timeout=600)]
print(workers[0]._folder.parent, *pids, flush=True)
workers[0].call(there.loop, timeout=600)
"""


@pytest.mark.fault(
    "the process of a run is killed",
    "no process and no temporary folder is left",
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_run_that_is_killed_leaves_no_process_and_no_folder(number):
    root = Path(__file__).parent.parent
    run = subprocess.Popen(
        [sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True, cwd=root,
        start_new_session=True,
    )  # fmt: skip
    folder, *pids = run.stdout.readline().split()
    os.killpg(run.pid, number)
    run.wait(timeout=600)
    left = [psutil.Process(int(pid)).cmdline() for pid in pids if not is_gone(int(pid))]
    assert left == []
    deadline = time.monotonic() + 120
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(folder).exists()


def test_program_that_is_just_starting_is_killed(tmp_path, monkeypatch):
    """The system shows no environment of it yet."""
    program = subprocess.Popen(["sleep", "600"], env=os.environ | {cleanup.MARKER: str(tmp_path)})
    ended = subprocess.Popen(["true"])
    assert is_gone(ended.pid)  # not waited for: it has no environment, and never gets one
    read, empty = Path.read_bytes, [b""] * 20

    def shown(path):
        return empty.pop() if empty and str(program.pid) in path.parts else read(path)

    monkeypatch.setattr(Path, "read_bytes", shown)
    before = time.monotonic()
    cleanup.kill_processes(tmp_path)
    assert time.monotonic() - before < cleanup.STARTING_SECONDS
    assert program.wait(60) == -signal.SIGKILL
    assert ended.wait(60) == 0


def test_folder_of_a_run_and_a_cleanup_process_that_are_dead_is_removed(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    for name, owner in {
        "dead": dead.stdout.decode(),
        "alive": str(os.getpid()),
        "odd": "x",
        "reused": f"{os.getpid()} 12345",
    }.items():
        (tmp_path / f"poolbench-{name}").mkdir()
        (tmp_path / f"poolbench-{name}" / cleanup.OWNER).write_text(owner)
    cleanup.remove_orphans(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poolbench-alive", "poolbench-odd"]


def test_folder_that_a_link_leads_to_is_left_alone(tmp_path):
    """Anybody may write into a folder for temporary files."""
    noted = tmp_path / "elsewhere" / "worker" / cleanup.PROCESSES
    noted.parent.mkdir(parents=True)
    noted.write_text(f"{os.getpid()} 12345\n")
    (tmp_path / "elsewhere" / cleanup.OWNER).write_text(f"{os.getpid()} 12345")
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / "poolbench-link").symlink_to(tmp_path / "elsewhere")
    cleanup.remove_orphans(tmp_path / "temporary")
    assert noted.read_text() == f"{os.getpid()} 12345\n"


@pytest.mark.fault(
    "the run and its cleanup process are killed",
    "the next command of poolbench removes what is left",
)
def test_command_removes_the_folder_of_a_run_that_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stale = tmp_path / "poolbench-stale"
    stale.mkdir()
    (stale / cleanup.OWNER).write_text(f"{os.getpid()} 12345")
    CliRunner().invoke(main, ["devices", "--help"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "another process has the number of a worker that is dead",
    "it is not killed: its start time differs",
)
def test_process_that_only_has_the_number_of_a_worker_is_not_killed(tmp_path):
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (tmp_path / cleanup.PROCESSES).write_text(f"{other.pid} 12345\n{other.pid}\n")
    cleanup.kill_processes(tmp_path)
    assert other.poll() is None
    cleanup.note_process(tmp_path, other.pid)
    cleanup.kill_processes(tmp_path)
    assert other.wait(timeout=120) == -signal.SIGKILL


class ResourceExhaustedError(Exception):
    """By the name that TensorFlow gives it."""


@pytest.mark.parametrize(
    ("error", "status", "start"),
    [
        (MemoryError("too much"), "out_of_memory", "host memory: "),
        (ResourceExhaustedError("OOM when allocating on /device:GPU:0 by allocator GPU_0_bfc"), "out_of_memory", "device memory: "),
        (ResourceExhaustedError("OOM when allocating on /device:CPU:0 by allocator cpu"), "out_of_memory", "host memory: "),
        (ValueError("out of memory"), "error", "ValueError: "),
    ],
)  # fmt: skip
def test_memory_error_names_the_host_or_the_device(error, status, start):
    assert status_of(error) == status
    assert reason_of(error).startswith(start)


def test_one_line_of_an_error_is_printable_and_short():
    line = one_line(ValueError("a\nb\x00\udc80" + "x" * 1000))
    assert line.startswith(r"ValueError: a b\x00\udc80x")
    assert len(line) == 400
    assert printable("a\n\tb") == "a\n\tb"


def test_system_killings_reads_the_counter_of_the_system(tmp_path):
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 5\noom_kill 7\n")
    assert system_killings(counters) == 7
    assert system_killings(tmp_path / "nothing") == 0


def test_printable_leaves_out_the_folders_of_this_machine():
    said = printable(f'File "{sys.prefix}/lib/keras/a.py", {process.__file__}, /usr/lib/b.py')
    assert said == 'File "lib/keras/a.py", poolbench/engine/process.py, /usr/lib/b.py'
