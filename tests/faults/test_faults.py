"""Faults for real: NumPy candidates in real workers, through pytest, race, journal and report."""

import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs
from poolbench.pytest_run import Launcher, resume_command
from poolbench.store.journal import read_run

SOUND = ("base", "fast", "slow")
# The package may change while these tests run, which they do not test.
SAME_CODE = ("--allow-different", "code")
# candidate: status, what its reason says, what its tail holds.
EXPECTED = {
    "raise": ("error", r"^ValueError: <script>.* \.\./\.\./etc/passwd$", "last words"),
    "segv": ("crashed", "SIGSEGV", "last words"),
    "abort": ("crashed", "SIGABRT", ""),
    "kill": ("crashed", "SIGKILL", "last words"),
    "memory": ("out_of_memory", r"^host memory: killed at \d+ MiB, the limit is 400 MiB", ""),
    "loop": ("timeout", r"no answer within 6 s \(--task-timeout\)", "last words"),
    "sysexit": ("error", r"sys\.exit\('enough'\)", ""),
    "leave": ("crashed", "exited with code 0", ""),
    "flood": ("error", "after the flood", "xxx"),
    "thread": ("error", r"it left \d+ threads that stay", ""),
    "program": ("error", r"it left \d+ processes that stay", ""),
    "state": ("error", "changed numpy.geterr.*changed working directory", ""),
    "descriptors": ("crashed", "exited with code", ""),
    "nan": ("wrong", "finite", ""),
    "shape": ("wrong", "shape", ""),
    "none": ("error", "returned None", ""),
    "late": ("crashed", "SIGABRT", ""),
}


def shapes(count):
    """An axis of so many shapes, one race each."""
    return "shape=" + ",".join(f"4x16x16x{12 * size}" for size in range(1, count + 1))


# An interval over two processes has one degree of freedom: too wide for a verdict on a busy machine.
JUDGED = (*runs.QUICK, "--processes", "5", "--budget", "1.5")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def with_faults(results):
    """The run of every fault beside three sound candidates."""
    words = ("--run", "faults", "--task-timeout", "6", "--memory", "400MiB", *JUDGED)
    status, output = runs.run(results, *words)
    assert status == 1, output  # candidates failed their tests; the run did not
    return results / "faults"


@pytest.fixture(scope="module")
def without_faults(results):
    status, output = runs.run(results, "--run", "sound", "-k", " or ".join(SOUND), *JUDGED)
    assert status == 0, output
    return results / "sound"


@pytest.mark.parametrize("name", EXPECTED)
def test_a_fault_is_one_typed_result(with_faults, name):
    found = [m for m in read_run(with_faults).records if getattr(m, "candidate", "") == name]
    status, reason, tail = EXPECTED[name]
    assert len(found) == 1
    assert found[0].status == status
    assert re.search(reason, found[0].reason), found[0].reason
    assert "\n" not in found[0].reason
    assert tail in found[0].tail
    assert len(found[0].tail) <= 2000


def test_the_candidates_beside_faults_have_the_verdicts_that_they_have_alone(
    with_faults, without_faults
):
    beside, alone = runs.verdicts(with_faults), runs.verdicts(without_faults)
    assert {name: alone[name] for name in SOUND} == {"base": "", "fast": "FASTER", "slow": "SLOWER"}
    assert {name: beside[name] for name in SOUND} == {name: alone[name] for name in SOUND}


def test_the_header_says_what_the_run_was(without_faults):
    header = read_run(without_faults).header
    assert header.seed == 0
    assert {"processes", "budget_seconds", "limit_seconds", "order_of_rounds"} <= set(
        header.options
    )
    assert {"python", "numpy", "pytest"} <= set(header.environment.versions)
    assert {"processor", "features", "memory_nbytes"} <= set(header.environment.machine)
    assert {"code", "numpy_faults.py"} <= set(header.environment.source)


def test_resuming_a_finished_run_runs_nothing_and_rebuilds_benchmark_json(without_faults):
    (without_faults / "benchmark.json").unlink()
    before = runs.lines(without_faults)
    status, output = runs.run(
        without_faults.parent,
        "--resume",
        "sound",
        "-k",
        " or ".join(SOUND),
        *JUDGED,
        *SAME_CODE,
    )
    assert status == 0, output
    assert runs.lines(without_faults) == before
    assert (without_faults / "benchmark.json").stat().st_size > 1000


@pytest.mark.fault(
    "`--run NAME` of an existing run",
    "refused in one line; the run is unchanged",
)
def test_run_existing_name_is_refused_and_unchanged(without_faults):
    before = (without_faults / "benchmark.json").read_bytes(), runs.lines(without_faults)
    status, output = runs.run(without_faults.parent, "--run", "sound", *JUDGED)
    assert status == 4
    assert "ERROR: sound holds a run already; go on with it by --resume sound" in output
    assert ((without_faults / "benchmark.json").read_bytes(), runs.lines(without_faults)) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "7"], "other options: seed differ; go on by --allow-different seed"),
        (["--processes", "4"], "other options: processes differ; "),
        (["--allow-different", "sede"], "got 'sede', did you mean seed?"),
    ],
)
def test_a_resume_that_asks_for_other_measurements_is_refused(without_faults, words, said):
    status, output = runs.run(
        without_faults.parent, "--resume", "sound", *JUDGED, *SAME_CODE, *words
    )
    assert status == 4
    assert said in output


@pytest.mark.fault(
    "`--resume` with other code, options or another machine",
    "refused by the names of what differs",
)
@pytest.mark.slow
def test_resume_with_other_code_is_refused_unless_allowed(results, tmp_path):
    suite = tmp_path / "mine.py"
    suite.write_bytes(runs.NUMPY.read_bytes())
    words = ("-k", "base or fast", *runs.QUICK)
    assert runs.run(results, "--run", "code", *words, suite=suite)[0] == 0
    suite.write_bytes(runs.NUMPY.read_bytes() + b"# changed\n")
    status, output = runs.run(results, "--resume", "code", *words, suite=suite)
    assert status == 4
    assert re.search(r"mine\.py differ; go on by .*--allow-different mine\.py", output)
    words += ("--allow-different", "mine.py", *SAME_CODE)
    assert runs.run(results, "--resume", "code", *words, suite=suite)[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume", "nothing"], "there is no run nothing to go on with"),
        (
            ["--memory", "lots"],
            "--poolbench-memory: expected a size above 0, such as 8GiB; got 'lots'",
        ),
        pytest.param(["--run", "../up"], "expected a run's name", marks=pytest.mark.slow),
        pytest.param(
            ["--sweep", "x"],
            "--poolbench-sweep: 'x' is not one of 'default'",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--axis", "mode=x"], "mode must be one of", marks=pytest.mark.slow),
        pytest.param(["--candidates", "no.py"], "there is no no.py", marks=pytest.mark.slow),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line_and_exit_4(results, words, said):
    status, output = runs.run(results, *words)
    assert status == 4
    assert len([line for line in output.splitlines() if line.startswith("ERROR: ")]) == 1
    assert said in output
    assert "Traceback" not in output


def test_resume_command_keeps_the_words_of_pytest():
    words = ("suites", "--poolbench-run", "a b", "--poolbench-axis=mode=xla", "--poolbench-run=x")
    called = SimpleNamespace(args=(*words, "-k", "a or b"), dir=Path("/a folder"))
    command = resume_command(called, None, "night")
    assert command.startswith("cd '/a folder' && ")
    assert command.endswith(
        "-m pytest suites --poolbench-axis=mode=xla -k 'a or b' --poolbench-resume night"
    )


def test_resume_command_keeps_the_words_of_poolbench_run():
    launcher = Launcher(words=["run", "network", "--run", "a", "--sweep", "quick"])
    command = resume_command(SimpleNamespace(args=(), dir=Path("/x")), launcher, "a")
    assert command.endswith("run network --sweep quick --resume a")


def test_a_case_too_large_is_refused_with_its_figures(results):
    words = ("--run", "large", "-k", "base", "--axis", "shape=4096x4096x4096x3", *runs.QUICK)
    status, output = runs.run(results, *words)
    assert status == 0, output
    measurements = read_run(results / "large").measurements
    assert {m.status for m in measurements} == {"not_run"}
    assert re.search(r"needs about 7680 GiB .* [\d.]+ [GM]iB are free", measurements[0].reason)


def test_benchmark_json_that_cannot_be_written_is_one_line(results):
    (results / "end" / "benchmark.json").mkdir(parents=True)
    status, output = runs.run(results, "--run", "end", "-k", "base or fast", *runs.QUICK)
    assert status == 3, output
    assert "cannot write benchmark.json: Is a directory" in output
    assert "--poolbench-resume end" in output
    assert "Traceback" not in output
    assert len(runs.measured(results / "end")) == 6


@pytest.mark.fault(
    "the disk is full",
    "one line and the command to resume; finished races are kept",
)
@pytest.mark.slow
def test_full_disk_stops_the_run_and_keeps_synced_races(results):
    words = ("-k", "base or fast", "--axis", shapes(6), *runs.QUICK)
    status, output = runs.run(results, "--run", "full", *words, limit_nbytes=24_000)
    assert status == 3, output
    assert "cannot write journal.jsonl: File too large; what was finished is kept" in output
    assert "--poolbench-resume full" in output
    assert "Traceback" not in output
    kept = runs.lines(results / "full")
    assert len(kept) > 1
    assert (results / "full" / "journal.jsonl").stat().st_size <= 24_000
    status, output = runs.run(results, "--resume", "full", *words, *SAME_CODE)
    assert status == 0, output
    assert runs.lines(results / "full")[: len(kept)] == kept
    found = runs.measured(results / "full")
    assert len(found) == len(set(found)) == 6 * 6


@pytest.mark.fault(
    "Ctrl-C, once or twice, or SIGTERM",
    "the run ends at once and prints the command to resume",
)
@pytest.mark.parametrize(
    ("signals", "delay_seconds"),
    [
        pytest.param("SIGINT", 0.0, marks=pytest.mark.slow),
        pytest.param("SIGINT", 0.15, marks=pytest.mark.slow),
        ("SIGINT SIGINT", 0.6),
        pytest.param("SIGTERM", 0.6, marks=pytest.mark.slow),
        pytest.param("SIGINT", 2.5, marks=pytest.mark.slow),
    ],
)
def test_signal_ends_a_run_at_once_and_prints_the_resume_command(results, signals, delay_seconds):
    name = f"stop-{signals.replace(' ', '-')}-{delay_seconds}"
    words = ("--run", name, "-k", "base or loop", "--task-timeout", "600", *runs.QUICK)
    begin = time.monotonic()
    started = runs.Started(results, *words)
    folder = results / name
    runs.wait_for(lambda: (folder / "journal.jsonl").exists())
    start_seconds = time.monotonic() - begin
    # While modules are imported; while workers start; while they race; while one hangs.
    time.sleep(delay_seconds)
    begin = time.monotonic()
    for number in signals.split():
        started.signal(signal.Signals[number])
    status, output = started.wait()
    assert started.nothing_left()
    # At once: in seconds here, where to start took seconds, and the hung task has ten minutes.
    assert time.monotonic() - begin < 5 * start_seconds
    assert status == 2, output
    kept, nothing = f" measurements are kept in {folder}; go on with:", "nothing was stored yet; go"
    assert kept in output or nothing in output
    assert f"--poolbench-resume {name}" in output
    assert "Traceback" not in output


@pytest.mark.fault(
    "kill -9 at any moment",
    "finished races are kept; resuming completes the run",
)
@pytest.mark.slow
def test_killed_run_leaves_nothing_and_resumes(results):
    kill_and_go_on(results, "killed", delays=[0.3], sizes=4)


@pytest.mark.slow
def test_twenty_kills_lose_at_most_the_races_under_way(results):
    import random

    generator = random.Random(6)
    delays = [generator.uniform(0.0, 0.8) for _ in range(20)]
    kill_and_go_on(results, "killed20", delays=delays, sizes=21)


def kill_and_go_on(results, name, *, delays, sizes):
    """Kill a run again and again and go on; then hold it against an undisturbed one.

    Every third kill comes at a moment after the start, while pytest or the workers start; the others
    come at a moment after the run has got further: while a race runs or its lines are written.
    """
    words = ("-k", "base or fast or raise", "--axis", shapes(sizes), *runs.QUICK, *SAME_CODE)
    folder = results / name
    kept = []
    for number, delay in enumerate(delays):
        begin = "--resume" if folder.is_dir() else "--run"
        started = runs.Started(results, begin, name, *words)
        if number % 3 != 2:
            runs.wait_for_more(started, folder, len(kept))
        time.sleep(delay)
        started.signal(signal.SIGKILL)
        started.wait()
        assert started.nothing_left()
        assert runs.lines(folder)[: len(kept)] == kept
        whole = len(runs.measured(folder))
        assert whole % 7 == 0  # three candidates, four probes: a race is whole or not there
        kept = runs.lines(folder)[: whole + 1 if whole else 0]
    status, output = runs.run(results, "--resume", name, *words)
    assert status == 1, output  # `raise` fails its test
    assert runs.lines(folder)[: len(kept)] == kept
    found = runs.measured(folder)
    assert len(found) == len(set(found)) == 7 * sizes  # nothing twice, nothing missing
    cases = {case for case, _, _ in found}
    undisturbed = {"base": "ok", "fast": "ok", "raise": "error", "bandwidth-read": "ok",
                   "bandwidth-write": "ok", "bandwidth-copy": "ok", "identity-call": "ok"}  # fmt: skip
    assert set(found) == {(c, n, s) for c in cases for n, s in undisturbed.items()}
