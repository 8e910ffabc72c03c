"""Tasks of a worker, in this process."""

from types import SimpleNamespace

import pytest
from poolbench.core.case import make_case
from poolbench.core.errors import NotRunError
from poolbench.core.registry import load_builtin
from poolbench.worker import contender, timing
from poolbench.worker.backends import BACKENDS
from poolbench.worker.contender import open_contender
from poolbench.worker.session import Session, close_case, open_case

SHAPE = {"shape": (1, 8, 8, 12), "pool_size": 3, "padding": "valid"}


@pytest.fixture
def session():
    load_builtin()
    session = Session()
    yield session
    close_case(session)


@pytest.fixture
def bound(monkeypatch):
    """The names of the candidates that were bound, in their order."""
    names = []

    def bind(candidate, case, backend):
        names.append(candidate.name)
        return bind_really(candidate, case, backend)

    bind_really = contender.bind
    monkeypatch.setattr(contender, "bind", bind)
    monkeypatch.setattr(contender, "clock", lambda: float(len(names)))  # only binding takes time
    return names


def test_open_case_boolean_input_is_copied(session):
    case = make_case(op="masked_global_pool", mode="eager", shape=(2, 8, 4))
    open_case(session, case, 0)
    mask = session.open.inputs[1].numpy()
    assert mask.dtype == bool and (mask == session.open.host[1]).all()


def test_open_contender_new_candidate_is_timed_after_autograph_has_seen_it(session, bound):
    case = make_case(op="depth_max_pool", mode="graph", **SHAPE)
    name = load_builtin().ops[case.op].baseline
    open_case(session, case, 0)
    converted, again = (open_contender(session, name, check=True) for _ in range(2))
    assert converted.status == again.status == "ok"
    assert bound == [name] * 3, "once to convert it, then once a contender"
    assert converted.calibration_seconds > again.calibration_seconds


@pytest.mark.parametrize(
    ("seconds", "calls", "estimate"),
    [
        ([0.004, 0.003, 0.002, 0.003, 0.001], 4, 0.002),
        ([0.001, 0.06, 0.05], 2, 0.06),  # long: one call is enough
    ],
)
def test_estimate_seconds_is_the_least_of_the_calls_after_the_first(
    monkeypatch, seconds, calls, estimate
):
    now, left = [0.0], list(seconds)
    monkeypatch.setattr(timing, "clock", lambda: now[0])

    def step():
        now[0] += left.pop(0)

    found = timing.estimate_seconds(SimpleNamespace(make_step=lambda name: step), "one")
    assert found == pytest.approx(estimate)
    assert len(seconds) - len(left) == calls


@pytest.mark.fault(
    "`--axis device=gpu:0` without a GPU",
    "`not_run`, with the devices that exist",
)
@pytest.mark.parametrize("backend", ["numpy", "tensorflow"])
def test_open_case_device_that_is_not_there_is_not_run(session, backend):
    case = make_case(op="depth_max_pool", device="gpu:3", **SHAPE)
    session.backend = BACKENDS[backend]
    with pytest.raises(NotRunError, match="there is no gpu:3 here; there is cpu:0"):
        open_case(session, case, 0)
