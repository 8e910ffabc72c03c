"""Bisecting points on fake workers, of which those from one point on are slower."""

import itertools
import math

import numpy as np
import pytest
from fakes import FakePool, make_batch
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.core.registry import load_builtin
from poolbench.engine import versions
from poolbench.engine.bisect import Bisection
from poolbench.engine.sides import Side
from poolbench.worker import contender, outputs, timing
from poolbench.worker.program import Program

CASE = load_builtin().ops["global_avg_pool"].sweep("quick").base_case
ANSWER = outputs.Outputs(
    inputs="a", shapes=((1,),), dtypes=("float32",), data=(np.float32(1).tobytes(),)
)


@pytest.fixture(autouse=True)
def few_legs(monkeypatch):
    """Fake workers answer at once: two legs of each visit say as much as all."""
    monkeypatch.setattr(versions, "LEGS", 2)


class Pool(FakePool):
    """Fake workers of numbered points; it counts the released kinds."""

    released = 0

    def release(self, spec):
        self.released += 1


def bisect(
    points=17,
    *,
    slow_from=5,
    factor=1.1,
    noise=0.02,
    broken=(),
    unbuilt=(),
    program=lambda point: None,
    clock=lambda: 0.0,
):
    """Bisect; return what was found and the pool."""
    rng = np.random.default_rng(slow_from)

    def answers_of(spec, process):
        point = int(dict(spec.environment)["POINT"])
        level = factor if point >= slow_from else 1.0

        def time_batch(requests):
            leg = level * math.exp(rng.normal(0, noise if 0 < point < points - 1 else 0.02))
            return make_batch(
                timing.Block(seconds=1e-3 * leg, processor_seconds=1e-3 * leg) for _ in requests
            )

        answers = {
            timing.time_batch: time_batch, outputs.read_outputs: ANSWER,
            contender.read_program: lambda name: program(point),
        }  # fmt: skip
        if point in broken:
            answers[contender.open_contender] = WorkerFailure("error", "KeyError: no candidate")
        return answers

    def make_side(point):
        if int(point) in unbuilt:
            raise UsageError("pip: no")
        return Side(title=point, worker=WorkerSpec(environment=(("POINT", point),)))

    pool = Pool(answers_of)
    bisection = Bisection(
        [str(number) for number in range(points)], make_side, (CASE, "avg_pool2d"), pool,
        say=lambda line: None, clock=clock,
    )  # fmt: skip
    return bisection.run(), pool


@pytest.mark.parametrize("slow_from", [1, 8, 16])
def test_bisection_finds_the_first_slow_point_in_few_races(slow_from):
    found, pool = bisect(slow_from=slow_from)
    assert (found.before, found.first) == (str(slow_from - 1), str(slow_from))
    assert found.ends.wall.ratio == pytest.approx(1.1, rel=0.03)
    assert len(found.steps) <= 6
    assert pool.released == len(found.steps)


def test_bisection_of_equal_ends_says_what_it_could_have_found():
    with pytest.raises(
        UsageError, match=r"16 is not slower than 0: same after \d+ visits; it would have found 2%"
    ):
        bisect(slow_from=99)


def test_bisection_out_of_time_says_that_its_answer_is_a_guess():
    ticks = itertools.count()
    found, _ = bisect(slow_from=5, noise=0.5, clock=lambda: next(ticks) * 5.0)
    guesses = [step for step in found.steps if not step.certain]
    assert guesses
    assert all("not certain" in step.how for step in guesses)
    assert found.headline.startswith(f"a guess ({len(guesses)} of {len(found.steps)} points")
    assert bisect(slow_from=5)[0].headline == "first slower"


def test_bisection_names_the_points_that_cannot_be_judged():
    found, _ = bisect(slow_from=8, broken=(7, 8))
    assert (found.before, found.first) == ("6", "7 or 8 or 9")
    assert {step.verdict for step in found.steps} == {"slower", "as before", "cannot be judged"}


def test_bisection_goes_on_past_a_point_that_cannot_be_built():
    found, _ = bisect(slow_from=8, unbuilt=(7, 8))
    assert (found.before, found.first) == ("6", "7 or 8 or 9")
    assert {step.how for step in found.steps if step.verdict == "cannot be judged"} == {"pip: no"}


def test_bisection_does_not_race_a_point_whose_program_is_that_of_an_end():
    def program(point):
        return Program(
            hash="new" if point >= 5 else "old", key="k", flops=1, bytes_accessed=1,
            peak_buffer_nbytes=1, kernels=1,
        )  # fmt: skip

    found, pool = bisect(slow_from=5, program=program)
    assert found.first == "5"
    raced = {dict(spec.environment)["POINT"] for spec, _ in pool.workers
             if any(task is timing.time_batch for task, _ in pool.workers[spec, 0].tasks)}  # fmt: skip
    assert raced == {"0", "16"}
    assert "the program of the good end" in {step.how for step in found.steps}


def test_bisection_raced_point_with_a_program_of_its_own_is_judged_by_time():
    def program(point):
        return Program(
            hash=str(point), key="k", flops=1, bytes_accessed=1, peak_buffer_nbytes=1, kernels=1
        )

    found, _ = bisect(slow_from=5, program=program)
    assert found.first == "5"
