"""One recommendation per op: least regret over all cases, without wrong or implausible candidates."""

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import synthetic
from poolbench.core.errors import UsageError
from poolbench.core.records import FASTER_THAN_LIMIT, Accuracy, MatrixCell
from poolbench.report import cards, recommend, support, tables
from poolbench.report.frame import lay_out, load
from poolbench.report.page_data import page_data
from poolbench.report.terminal import headline_text
from poolbench.store.journal import StoredRun


@pytest.fixture(autouse=True)
def _no_reference_run(monkeypatch):
    monkeypatch.setattr(support, "CHECKOUT", Path("no-checkout"))


OP = "depth_max_pool"
PLACE = (OP, "cpu:0")
CASES = [
    synthetic.op_case(OP, mode=mode, direction=direction)
    for mode in synthetic.MODES
    for direction in synthetic.DIRECTIONS
]
# Right in every case, and the fastest or nearly so: by the factors of synthetic.FACTORS.
USUAL = "max_pool2d-reshape"


def run_of(records, head=None):
    head = head or synthetic.header()
    return StoredRun(path=Path("synthetic"), header=head, records=tuple(records))


def frame(change=lambda m: m):
    rng = np.random.default_rng(1)
    return lay_out(run_of(change(m) for case in CASES for m in synthetic.race(case, rng)))


def advice(loaded):
    return recommend.answer(loaded).recommendations[PLACE]


def test_recommendation_has_the_least_largest_loss():
    found = advice(frame())
    assert found.candidate == USUAL
    assert found.complete and found.cases == len(CASES)
    assert 1 < found.largest[0] < 1.3
    assert found.largest[1] <= found.largest[0] <= found.largest[2]
    assert found.mean[0] < found.largest[0]


def test_recommendation_swapped_names_swap_the_answer():
    names = {USUAL: "slices-maximum", "slices-maximum": USUAL}
    swapped = frame(
        lambda m: msgspec.structs.replace(m, candidate=names.get(m.candidate, m.candidate))
    )
    assert advice(swapped).candidate == "slices-maximum"


def test_recommendation_of_equals_fails_the_fewest_checks():
    rng, records = np.random.default_rng(1), []
    for case in CASES:
        race = {m.candidate: m for m in synthetic.race(case, rng)}
        twin = fast(race[USUAL], by=0.9999, name=USUAL, candidate="twin")
        records += [*race.values(), twin]
    assert advice(lay_out(run_of(records))).candidate == USUAL
    cells = [
        MatrixCell(op=OP, candidate=name, probe="save", state=state)
        for name, state in ((USUAL, "error"), ("twin", "pass"))
    ]
    assert advice(lay_out(run_of([*records, *cells]))).candidate == "twin"


def fast(m, by=100, name="slices-maximum", **changes):
    """The measurement of a candidate that would win everywhere, if it might be ranked."""
    if m.candidate != name:
        return m
    seconds = tuple(value / by for value in m.samples.seconds)
    return msgspec.structs.replace(
        m, samples=msgspec.structs.replace(m.samples, seconds=seconds), **changes
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"flags": (FASTER_THAN_LIMIT,)},
        {"accuracy": Accuracy(worst=2.0, max_relative=1, max_absolute=1)},
        {"status": "wrong", "reason": "off by 2"},
        {"status": "timeout", "reason": "60 s are over"},
    ],
)
def test_recommendation_unrankable_winner_is_named_nowhere(changes):
    loaded = frame(lambda m: fast(m, **changes))
    answers = recommend.answer(loaded)
    assert answers.recommendations[PLACE].candidate == USUAL
    assert all("slices-maximum" not in choice.best for choice in answers.choices)
    assert "slices-maximum" not in headline_text(loaded)
    assert "slices-maximum" not in tables.headline_table(loaded, answers).to_csv()
    assert (loaded.table.set_index("candidate").loc["slices-maximum", "verdict"] == "").all()
    (card,) = cards.cards(loaded, answers, [])
    assert "slices-maximum" not in str(card)
    assert all(np.isinf(answers.profiles[PLACE].get("slices-maximum", (np.inf,))))


def test_recommendation_names_the_cases_in_which_another_is_clearly_faster():
    def change(m):
        return fast(m, by=14) if m.case.mode == "eager" and m.case.direction == "forward" else m

    loaded = frame(change)
    found = advice(loaded)
    best = loaded.row(found.exceptions[0].best_row)
    assert (best["candidate"], best["mode"], best["direction"]) == (
        "slices-maximum", "eager", "forward",
    )  # fmt: skip
    (card,) = cards.cards(loaded, recommend.answer(loaded), [])
    assert card.exceptions[0].startswith("in eager mode, forward: slices-maximum is ")


def test_recommendation_no_candidate_right_everywhere_says_so():
    def change(m):
        broken = m.case.mode == "xla" and m.case.direction == "training"
        if m.candidate == "layer-depth_max_pool" or not broken:
            return m
        return msgspec.structs.replace(m, status="error", reason="broke")

    def break_layer(m):
        if m.candidate == "layer-depth_max_pool" and m.case.mode == "eager":
            return msgspec.structs.replace(m, status="error", reason="broke")
        return m

    loaded = frame(lambda m: break_layer(change(m)))
    found = advice(loaded)
    assert not found.complete
    assert found.cases == len(CASES) - 1
    (card,) = cards.cards(loaded, recommend.answer(loaded), [])
    assert card.lines[0] == "No implementation is right in all 6 cases: this one is in 5."


def test_recommendation_reference_run_has_one_answer_per_op():
    loaded = load(Path(__file__).parents[1] / "results" / "reference")
    answers = recommend.answer(loaded)
    assert {op for op, _ in answers.recommendations} == set(loaded.table["op"])
    found = cards.cards(loaded, answers, support.supports(loaded))
    assert [len(card.facts) for card in found] == [3] * len(answers.recommendations)
    assert all(fact.interval for card in found for fact in card.facts)


def test_card_textbook_stopped_early_keeps_its_interval():
    def stop(m):
        early = m.candidate == "lambda-max_pool" and m.case.mode == "eager"
        return one_process(m) if early else m

    loaded = frame(stop)
    found = advice(loaded)
    assert found.over == "lambda-max_pool"
    assert found.over_cases == 3  # graph forward, XLA forward and training
    (card,) = cards.cards(loaded, recommend.answer(loaded), [])
    assert all(fact.interval for fact in card.facts)


def one_process(m):
    """The measurement after a stop in its first process."""
    if not len(m.samples):
        return m
    kept = [i for i, process in enumerate(m.samples.process) if process == 0]
    return msgspec.structs.replace(m, samples=rows_of(m.samples, kept), stopped_early=True)


def rows_of(samples, kept):
    """The samples at these places."""
    columns = {
        name: tuple(getattr(samples, name)[i] for i in kept) for name in samples.__struct_fields__
    }
    return msgspec.structs.replace(samples, **columns)


def test_rank_note_explains_a_figure_that_disagrees_with_the_rank():
    """By paired rounds the first is the faster one, by its median not."""

    def uneven(m):
        """Round 1 is slow for all, and the usual one, quick in itself, is timed in that round only."""
        usual = m.candidate == USUAL
        rows = zip(m.samples.round, m.samples.seconds, strict=True)
        pace = 0.6 if usual else 1.0
        seconds = tuple(value * pace * (3 if at == 1 else 1) for at, value in rows)
        slowed = msgspec.structs.replace(m.samples, seconds=seconds)
        kept = [i for i, at in enumerate(slowed.round) if not usual or at == 1]
        return msgspec.structs.replace(m, samples=rows_of(slowed, kept))

    for loaded, disagrees in ((frame(), False), (frame(uneven), True)):
        answers = recommend.answer(loaded)
        table = loaded.table[loaded.table["right"]]
        least = table.loc[table.groupby("race")["seconds"].idxmin()].set_index("race")["candidate"]
        agree = [least[choice.race] == choice.fastest for choice in answers.headline]
        assert all(agree) is not disagrees
        assert bool(tables.rank_note(loaded, answers)) is disagrees


def test_card_user_candidate_shows_the_source_that_the_run_kept():
    source = "def mine(case):\n    return lambda x: x\n"
    head = msgspec.structs.replace(synthetic.header(), sources={OP: {"mine": source}})
    rng = np.random.default_rng(1)
    records = [
        msgspec.structs.replace(m, candidate="mine") if m.candidate == USUAL else m
        for case in CASES
        for m in synthetic.race(case, rng)
    ]
    loaded = lay_out(run_of(records, head))
    (card,) = cards.cards(loaded, recommend.answer(loaded), [])
    assert (card.name, card.code) == ("mine", source)


def test_profile_failure_counts_as_never():
    profile = recommend.answer(frame()).profiles[PLACE]
    failing = np.isinf(profile["lambda-max_pool"])
    assert failing.sum() == 2  # eager and graph training, for want of a gradient
    assert all(min(some) == 1.0 for some in zip(*profile.values(), strict=True))


def test_recommendation_of_absurd_times_is_no_traceback():
    found = advice(frame(lambda m: fast(m, by=1e305, name=USUAL)))
    assert found.candidate == USUAL


def test_sentences_of_a_card_are_short():
    loaded = frame()
    (card,) = cards.cards(loaded, recommend.answer(loaded), [])
    texts = [*card.lines, card.works, *(fact.text for fact in card.facts)]
    sentences = [one for text in texts for one in text.split(". ")]
    assert max(len(one.split()) for one in sentences) <= 25
    assert all(fact.interval for fact in card.facts)


def test_headline_text_is_ten_lines_without_control_characters():
    hostile = "\x1b[31m[bold]red[/bold]"
    loaded = frame(
        lambda m: msgspec.structs.replace(m, candidate=hostile) if m.candidate == USUAL else m
    )
    text = headline_text(loaded)
    lines = text.splitlines()
    assert len(lines) <= 10
    assert "[bold]red[/bold]" in text and "\x1b" not in text
    assert lines[0].split()[:4] == ["op", "mode", "pass", "recommended"]
    assert "shipped prior" in lines[-1]


def test_headline_text_of_many_rows_leaves_out_eager_mode():
    cases = [
        synthetic.op_case(op, mode=mode, direction=direction)
        for op in synthetic.FACTORS
        for mode in synthetic.MODES
        for direction in synthetic.DIRECTIONS
    ]
    text = headline_text(lay_out(run_of(synthetic.records(cases=cases, with_extras=False))))
    assert len(text.splitlines()) == 10
    assert "eager" not in text
    assert text.endswith("4 more rows are on the page.")


def test_frame_pools_runs_of_one_machine(tmp_path):
    folders = [
        synthetic.write(tmp_path / name, synthetic.records(seed, cases=CASES, with_extras=False))
        for name, seed in (("one", 1), ("two", 2), ("three", 3))
    ]
    alone, pooled = load(folders[0]), load(*folders)
    assert pooled.source == "this machine: 3 runs"
    assert "this machine: 3 runs" in headline_text(pooled)
    assert len(pooled.table) == len(alone.table)
    widths = [
        np.log(one.table["mean_high"] / one.table["mean_low"]).median() for one in (alone, pooled)
    ]
    assert widths[1] < widths[0]
    assert advice(pooled).candidate == USUAL


def test_frame_wrong_in_one_run_is_not_ranked_in_the_pool(tmp_path):
    good = synthetic.records(1, cases=CASES, with_extras=False)
    bad = [
        msgspec.structs.replace(r, status="wrong") if r.candidate == USUAL else r
        for r in synthetic.records(2, cases=CASES, with_extras=False)
    ]
    loaded = load(synthetic.write(tmp_path / "a", good), synthetic.write(tmp_path / "b", bad))
    assert not loaded.table.set_index("candidate").loc[USUAL, "right"].any()


@pytest.mark.parametrize(
    "environment",
    [
        {"devices": {"cpu:0": "Another CPU"}},
        {"source": {"commit": "1111111", "dirty": False}},
        {"versions": {**synthetic.ENVIRONMENT.versions, "tensorflow": "2.20.0"}},
    ],
)
def test_frame_unlike_runs_do_not_pool(tmp_path, environment):
    records = synthetic.records(1, cases=CASES[:1], with_extras=False)
    one = synthetic.write(tmp_path / "one", records)
    two = synthetic.write(tmp_path / "two", records, synthetic.header("two", **environment))
    with pytest.raises(UsageError, match="do not pool"):
        load(one, two)


def test_support_reference_run_stands_in_for_the_same_version(tmp_path):
    cell = MatrixCell(op=OP, candidate=USUAL, probe="save-keras", state="wrong")
    synthetic.write(tmp_path / "reference", [cell])
    records = synthetic.records(1, cases=CASES, with_extras=False)
    mine = load(synthetic.write(tmp_path / "mine", records))
    (found,) = support.supports(mine)
    assert found.borrowed and found.of(USUAL) == [cell]
    # A candidate that was not checked has not passed.
    for name, caveats in ((USUAL, [[]]), ("another", [])):
        passed = msgspec.structs.replace(cell, candidate=name, state="pass")
        matrix = dataclasses.replace(found, cells=(passed,))
        shown = page_data(frame(), recommend.answer(frame()), [matrix])["caveats"]
        assert [lines for *_, name, lines in shown if name == USUAL] == caveats
    other = {"versions": {**synthetic.ENVIRONMENT.versions, "tensorflow": "2.20.0"}}
    newer = synthetic.write(tmp_path / "newer", records, synthetic.header("newer", **other))
    assert support.supports(load(newer)) == []


def test_support_reference_run_of_the_checkout_stands_in_elsewhere(tmp_path, monkeypatch):
    cell = MatrixCell(op=OP, candidate=USUAL, probe="save-keras", state="wrong")
    checkout = synthetic.write(tmp_path / "checkout" / "reference", [cell]).parent
    records = synthetic.records(1, cases=CASES, with_extras=False)
    loaded = load(synthetic.write(tmp_path / "elsewhere" / "mine", records))
    monkeypatch.setattr(support, "CHECKOUT", checkout)
    (found,) = support.supports(loaded)
    assert found.borrowed and found.of(USUAL) == [cell]
    monkeypatch.setattr(support, "CHECKOUT", tmp_path / "no-checkout")  # as of a wheel
    assert support.supports(loaded) == []
    (card,) = cards.cards(loaded, recommend.answer(loaded), [])
    assert card.works.endswith("type: poolbench matrix")
