"""The findings of the support matrix: states, evidence, comparisons of arrays."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from matrix_candidates import OP
from poolbench.core.candidate import KnownFailure
from poolbench.core.case import make_case
from poolbench.core.errors import own_folders
from poolbench.core.op import Tolerance
from poolbench.core.registry import REGISTRY
from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Finding
from poolbench.matrix.probe import combine, error_words, explain_error
from poolbench.matrix.probes import repeat, threads, values
from poolbench.matrix.trial import Trial
from poolbench.worker.check import Answers, Difference, compare


def test_combine_keeps_worst_state_and_merges_equal_evidence():
    found = combine(
        {
            "eager": Finding(state="pass", evidence="exact", figures={"error": 0.0}),
            "graph": Finding(state="pass", evidence="exact", figures={"error": 0.0}),
            "xla": Finding(
                state="wrong", evidence="off", figures={"error": 0.5}, issue="tensorflow#1"
            ),
        }
    )
    assert (found.state, found.evidence) == ("wrong", "eager, graph: exact; xla: off")
    assert (found.figures["error (xla)"], found.issue) == (0.5, "tensorflow#1")


def test_combine_wrong_is_worse_than_error():
    states = ("error", "wrong", "unsupported")
    found = combine({state: Finding(state=state, evidence=state) for state in states})
    assert found.state == "wrong"


def test_explain_error_known_failure_is_unsupported_with_issue():
    failure = KnownFailure(
        when=lambda case: True, matches="no window", reason="as documented", issue="a#1"
    )
    entry = SimpleNamespace(failures=(failure,))
    found = explain_error(entry, make_case(op=OP), RuntimeError("there is no window"))
    assert (found.state, found.issue) == ("unsupported", "a#1")
    assert found.evidence == "as documented [RuntimeError: there is no window]"


def test_explain_error_unknown_error_is_an_error():
    found = explain_error(SimpleNamespace(failures=()), make_case(op=OP), KeyError("x"))
    assert (found.state, found.evidence) == ("error", "KeyError: 'x'")


def test_error_words_local_folders_are_left_out():
    place = own_folders()[0]
    words = error_words(ValueError(f"FlatBuffer.{place}/lib/keras.py:1: it is refused"))
    assert words == "ValueError: FlatBuffer.lib/keras.py:1: it is refused"


def test_error_words_stack_traces_and_node_names_are_left_out():
    text = (
        "Graph execution error:\n\nDetected at node grad/MaxPoolGrad defined at (most recent call last):\n"
        '  File "<string>", line 1, in <module>\n\n  File "/somewhere/x.py", line 3, in f\n\n'
        "Not yet supported.\n\t [[{{node grad/MaxPoolGrad}}]] [Op:__inference_f_12] name: "
    )
    assert error_words(ValueError(text)) == "ValueError: Not yet supported."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "Reshape 252 to 240\n\ttf2xla conversion failed while converting __f_1[a=b]",
            "Reshape 252 to 240",
        ),
        (
            "'T' of int32 is not in the list ; NodeDef: {{node X}}; Op<name=X>",
            "'T' of int32 is not in the list",
        ),
        (
            "<class 'M'> could not be made.\n\nconfig={1}.\n\nException encountered: No class 'P'",
            "No class 'P'",
        ),
    ],
)
def test_error_words_message_is_kept(text, words):
    assert error_words(ValueError(text)) == f"ValueError: {words}"


def test_compare_equal_infinities_and_nan_are_zero():
    array = np.array([np.inf, -np.inf, np.nan, 1.0])
    assert compare(array, array.copy()) == Difference(worst=0.0, relative=0.0, absolute=0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_compare_nonfinite_in_one_array_is_infinite(value):
    bound = Tolerance(relative=1e-3, absolute=1e-3)
    assert compare(np.array([value]), np.array([-np.inf]), bound).worst == np.inf


@pytest.mark.parametrize(
    ("share", "words"),
    [
        ([[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]], "first, sums to one"),
        ([[0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 1]], "last, sums to one"),
        ([[1 / 3] * 3, [0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]], "split equally, sums to one"),
        (
            [[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]],
            "all of it to every tied value; it sums to 3",
        ),
        ([[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], "one of them, sums to one"),
        ([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]], "it sums to 0 of what came in"),
        ([[1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]], "goes to values below the maximum"),
    ],
)
def test_judge_ties_shares_are_distinguished(share, words):
    case = make_case(op=OP, shape=(1, 1, 1, 12), pool_size=3, direction="training")
    x = np.array([[5, 5, 5], [5, 5, 1], [1, 5, 5], [5, 1, 5]], np.float32).reshape(1, 1, 1, 12)
    dy = np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 1, 4)
    answers = Answers(op=REGISTRY.ops[OP], case=case, inputs=(x, dy))
    dx = (np.array(share, float) * dy.reshape(4, 1)).reshape(x.shape)
    found = values.judge_ties(answers, dx)
    assert words in found.evidence
    assert found.state == ("pass" if words.endswith("sums to one") else "wrong")


def test_distinct_input_has_no_ties_and_is_exact_in_bfloat16():
    case = make_case(op=OP, shape=(2, 3, 4, 50), dtype="bfloat16")
    trial = Trial(op=REGISTRY.ops[OP], candidate=None)
    (x,) = trials.distinct_inputs(trial, case)
    assert (np.diff(np.sort(x.astype(np.float64), axis=-1), axis=-1) > 0).all()
    (wide,) = trials.distinct_inputs(trial, case.replace(dtype="float64"))
    assert np.array_equal(x.astype(np.float64), wide)


def test_distinct_input_of_few_values_has_no_ties_at_all():
    trial = Trial(op=REGISTRY.ops[OP], candidate=None)
    (x,) = trials.distinct_inputs(trial, make_case(op=OP, shape=(2, 4, 5, 6)))
    assert len(np.unique(x)) == x.size


def test_inputs_with_a_fill_of_their_own_keep_it_in_every_check():
    op = REGISTRY.ops["masked_global_pool"]
    trial = Trial(op=op, candidate=REGISTRY.candidates[op.name, "add-lowest"])
    case = trial.case()
    assert case.reduction == "max", "the case is one in which the candidate competes"
    for make in (trials.distinct_inputs, trials.uniform_inputs, trials.negative_inputs):
        mask = make(trial, case)[1]
        assert mask.dtype == bool and (np.diff(mask.astype(int), axis=1) <= 0).all()


def test_same_digests_different_bits_name_the_mode():
    first = Finding(state="pass", figures={"digest (eager)": "a", "digest (xla)": "b"})
    second = Finding(state="pass", figures={"digest (eager)": "a", "digest (xla)": "c"})
    assert repeat.same_digests([first, first]).state == "pass"
    assert repeat.same_digests([first, second]).evidence == "two processes differ: digest (xla)"


def test_scaling_two_cores_gives_the_ratio(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    found = scale(0.5, 0.2, 0.3, 0.2)
    assert found.figures["seconds, one thread"] == 0.3
    assert (found.state, found.evidence.split(" as ")[0]) == ("pass", "1.50 times")


def test_scaling_more_than_the_cores_is_not_run(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert scale(0.4, 0.1).state == "not_run"


def test_scaling_one_core_is_not_run(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert scale(0.4, 0.4).state == "not_run"


def scale(*seconds):
    return threads.scaling([Finding(state="pass", figures={"seconds": s}) for s in seconds])
