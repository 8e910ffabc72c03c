"""What a worker does with TensorFlow, in this process."""

import pytest
from poolbench.core.case import make_case
from poolbench.core.registry import REGISTRY
from poolbench.worker import session


@pytest.fixture
def bound(monkeypatch):
    """The names of the candidates that were bound, in their order; no case stays open."""
    import poolbench.ops  # noqa: F401 (registers the ops that ship)

    names = []

    def bind(candidate, case):
        names.append(candidate.name)
        return bind_really(candidate, case)

    bind_really = session.bind
    monkeypatch.setattr(session, "bind", bind)
    monkeypatch.setattr(session, "_CONVERTED", set())
    yield names
    session.close_case()


def test_a_first_call_is_timed_when_autograph_has_seen_the_candidate(bound):
    case = make_case(
        op="depth_max_pool", shape=(1, 8, 8, 12), pool_size=3, padding="valid", mode="graph"
    )
    name = REGISTRY.ops[case.op].baseline
    session.open_case(case, 0)
    converted, again = (session.open_contender(name, check=True) for _ in range(2))
    assert converted.status == again.status == "ok"
    assert bound == [name] * 3, "once to convert it, then once a contender"
    assert converted.calibration_seconds > again.calibration_seconds
