"""Timing hacks: candidates that are correct when checked and cheat when timed; a named check catches each."""

import re
from pathlib import Path

import pytest
from fakes import fake_candidate
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import PROBE_NAMES, WorkerSpec
from poolbench.core.registry import REGISTRY, Registry, import_file
from poolbench.engine.process import Worker
from poolbench.worker import again, spots
from poolbench.worker.backends import BACKENDS
from poolbench.worker.contender import open_contender
from poolbench.worker.session import Session, open_case
from poolbench.worker.timing import BlockRequest, time_batch
from poolbench.worker.verify import verify

FILE = Path(__file__).parent / "candidates" / "numpy_hacks.py"
TENSORFLOW_FILE = FILE.with_name("tensorflow_hacks.py")
OP, TENSORFLOW_OP = "hacked_mean", "hacked_mean_of_images"
# hack: the check that catches it, its status, and what the reason says.
CAUGHT = {
    "memo-by-identity": ("recheck", "wrong", "on inputs that it had not seen: y is beyond"),
    "memo-by-shape": ("recheck", "wrong", "on inputs that it had not seen: y is beyond"),
    "memo-by-some-values": ("recheck", "wrong", "on inputs that it had not seen: y is beyond"),
    "stale-by-count": ("recheck", "wrong", "on inputs that it had not seen: y is beyond"),
    "stale-by-time": ("recheck", "wrong", "on inputs that it had not seen: y is beyond"),
    "captured-constant": ("recheck", "wrong", "on inputs that it had not seen: y is beyond"),
    "correct-at-first": ("recheck", "wrong", "y is beyond"),
    "correct-where-it-is-checked": ("recheck", "wrong", "y is beyond"),
    "half-of-the-batch": ("recheck", "wrong", "y is beyond"),
    "lower-precision": ("open", "wrong", "y is beyond"),
    "changes-its-input": ("recheck", "wrong", "it changed its inputs in place"),
    "output-in-its-input": ("recheck", "wrong", "in the memory of its inputs|in place"),
    "lazy": ("open", "error", "it returned a Lazy, not an array"),
    "patches-the-timer": ("watch", "error", "it replaced time.perf_counter"),
    "patches-the-harness-timer": ("clock", "error", "the worker's clock was changed"),
    "patches-numpy": ("watch", "error", "it replaced numpy.add"),
    "patches-numpy-when-opened": ("open", "error", "it replaced numpy.multiply"),
    "late-thread": ("watch", "error", "it left 1 threads that stay"),
    "late-process": ("verify", "error", "it left 1 processes that stay"),
    "late-setting": ("watch", "error", "it changed numpy.geterr"),
    "stops-collecting-garbage": ("open", "error", "it changed gc.get_threshold"),
}
TENSORFLOW_CAUGHT = {
    "switches-its-graph": ("recheck", "wrong", "on inputs that it had not seen: y is beyond"),
    "patches-reduce-mean": ("watch", "error", "it replaced tensorflow.reduce_mean"),
    "late-floatx": ("watch", "error", "it changed keras.config.floatx"),
    "late-soft-placement": ("watch", "error", "it changed tf.config.get_soft_device_placement"),
    "late-optimizer-options": ("watch", "error", "it changed tf.config.optimizer.get_exp"),
    "late-burning-thread": ("watch", "error", "it left 1 threads that stay"),
    "late-slow-clock": ("watch", "error", "it replaced time.perf_counter"),
}
BATCHES = 20


def race(session: Session, name: str, mode: str = "") -> dict[str, tuple[str, str, str]]:
    """Open, time and check a hack beside an honest candidate; (check, status, reason) by name.

    Args:
        session: of the worker.
        name: of the hack.
        mode: of TensorFlow; '' for a hack in NumPy.
    """
    case = REGISTRY.ops[TENSORFLOW_OP if mode else OP].make_case(mode=mode or "eager")
    session.backend = BACKENDS["tensorflow" if mode else "numpy"]
    open_case(session, case, 0)
    again.SHARE = 1e9  # a random moment is after each batch
    found = {}
    for one in ("honest", name):
        opened = open_contender(session, one, check=True)
        if opened.status != "ok":
            found[one] = ("open", opened.status, opened.reason)
        if opened.tainted:  # a race goes on in another process
            return found
    names = [one for one in ("honest", name) if one not in found]
    for _ in range(BATCHES):
        requests = [BlockRequest(name=one, warmup=2, calls=50) for one in names]
        for request, block in zip(requests, time_batch(session, requests).blocks, strict=True):
            if block.status != "ok":
                check = "recheck" if block.status == "wrong" else "watch"
                found.setdefault(request.name, (check, block.status, block.reason))
    for one, finding in verify(session).items():
        check = "recheck" if finding.status == "wrong" else "verify"
        found.setdefault(one, (check, finding.status, finding.reason))
    return found


def race_twice(session: Session, name: str, batches: int = 4) -> tuple[dict[str, str], int]:
    """Race a hack and an honest candidate in a further process; the reasons by name, and the hack's calls.

    What the first process accepted is the honest candidate's. No moment is one of the random ones.
    """
    session.backend = BACKENDS["numpy"]
    names, again.SHARE = ("honest", name), 0.0
    case = REGISTRY.ops[OP].make_case()
    open_case(session, case, 0)
    open_contender(session, "honest", check=True)
    assert verify(session) == {}
    accepted = spots.accepted(session)
    assert set(accepted) == {again.FRESH, again.OLD}
    expected = {words: dict.fromkeys(names, found["honest"]) for words, found in accepted.items()}

    open_case(session, case, 0)
    for one in names:
        open_contender(session, one, check=False)
    call, arguments = session.open.calls[name]
    calls = []
    session.open.calls[name] = (lambda *xs: (calls.append(1), call(*xs))[1], arguments)
    spots.expect(session, expected)
    found = {}
    for _ in range(batches):
        requests = [BlockRequest(name=one, warmup=2, calls=5) for one in names]
        for request, block in zip(requests, time_batch(session, requests).blocks, strict=True):
            if block.status != "ok":
                found.setdefault(request.name, block.reason)
    for one, finding in verify(session, fresh=False, old=False).items():
        found.setdefault(one, finding.reason)
    return found, len(calls)


@pytest.fixture
def worker():
    worker = Worker(WorkerSpec(backend="numpy"), files=[FILE])
    yield worker
    worker.close()


@pytest.mark.parametrize("name", CAUGHT)
def test_timing_hack_is_caught_and_the_honest_candidate_is_not(worker, name):
    check, status, reason = CAUGHT[name]
    try:
        found = worker.call(race, name, timeout=600)
    except WorkerFailure as failure:
        found = {name: ("clock", failure.status, failure.reason)}
    # Without a trace of which call did it, the other candidates of the user are not believed either.
    accused = {"honest": found.pop("honest")} if "one of these" in found[name][2] else {}
    assert all("one of these" in reason for *_, reason in accused.values())
    assert list(found) == [name]
    assert found[name][:2] == (check, status)
    assert re.search(reason, found[name][2]), found[name][2]


@pytest.mark.parametrize(
    "name",
    [one for one in CAUGHT if CAUGHT[one][0] == "recheck" and one != "output-in-its-input"],
)
def test_hack_that_was_honest_in_the_first_process_is_caught_in_a_further_one(worker, name):
    found, _ = worker.call(race_twice, name, timeout=600)
    assert list(found) == [name]
    unseen = "on inputs that it had not seen|on the inputs that were timed"
    expected = "changed its inputs in place" if name == "changes-its-input" else unseen
    assert re.search(expected, found[name]), found[name]


def test_check_in_a_further_process_makes_no_call_more(worker):
    found, calls = worker.call(race_twice, "half-of-the-batch", timeout=600)
    assert (found.keys(), calls) == ({"half-of-the-batch"}, 4 * (2 + 5))


def test_candidate_without_a_block_is_called_once_on_each_set_of_inputs(worker):
    found, calls = worker.call(race_twice, "captured-constant", 0, timeout=600)
    assert (found.keys(), calls) == ({"captured-constant"}, 2)


@pytest.mark.parametrize(("size", "count"), [(0, 0), (7, 7), (1024, 1024), (10**6, 1024)])
def test_places_are_all_of_a_small_output_and_the_same_ones_of_a_large_one(size, count):
    places = spots.places(size)
    assert len(places) == count
    assert set(places) <= set(range(size))
    spots.places.cache_clear()
    assert (spots.places(size) == places).all()


@pytest.fixture(scope="module")
def found_in_tensorflow():
    """What is found of each hack in TensorFlow, in one worker, one after another."""
    worker = Worker(WorkerSpec(), files=[TENSORFLOW_FILE])
    found = {}
    for name in TENSORFLOW_CAUGHT:
        mode = "graph" if name == "switches-its-graph" else "eager"
        found[name] = worker.call(race, name, mode, timeout=600)
    worker.close()
    return found


@pytest.mark.parametrize("name", TENSORFLOW_CAUGHT)
def test_timing_hack_in_tensorflow_is_caught_and_named(found_in_tensorflow, name):
    check, status, reason = TENSORFLOW_CAUGHT[name]
    found = found_in_tensorflow[name]
    assert list(found) == [name]
    assert found[name][:2] == (check, status)
    assert re.search(reason, found[name][2]), found[name][2]


def test_all_hacks_have_a_test():
    import_file(FILE)
    import_file(TENSORFLOW_FILE)
    assert set(REGISTRY.of(OP)) == {"honest", *CAUGHT}
    assert set(REGISTRY.of(TENSORFLOW_OP)) == {"honest", *TENSORFLOW_CAUGHT}


@pytest.mark.fault("a candidate with the name of a probe", "refused in one line")
@pytest.mark.parametrize("name", PROBE_NAMES)
def test_candidate_with_the_name_of_a_probe_is_refused(name):
    with pytest.raises(UsageError, match=f"'{name}' is the name of a probe"):
        Registry().add_candidate(fake_candidate(name))


@pytest.mark.fault(
    "a file of candidates that changes settings when it is imported",
    "`error` for all its candidates, with the setting",
)
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import numpy as np; np.add = np.multiply", "it replaced numpy.add"),
        ("import numpy as np; np.seterr(all='raise')", "it changed numpy.geterr"),
    ],
)
def test_file_that_changes_what_candidates_share_when_imported_is_refused(tmp_path, line, reason):
    file = tmp_path / "mine.py"
    file.write_text(line + "\n")
    worker = Worker(WorkerSpec(backend="numpy"), files=[file])
    with pytest.raises(WorkerFailure, match=f"importing mine.py: {reason}"):
        worker.call(race, "honest", timeout=600)
    worker.close()
