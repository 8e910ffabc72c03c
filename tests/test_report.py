"""The report: table, ranking, written files and command."""

import csv
import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
import synthetic
from click.testing import CliRunner
from markupsafe import escape
from poolbench.cli import main
from poolbench.core.axes import RESERVED
from poolbench.core.errors import StoreError, UsageError
from poolbench.core.records import ModelResult
from poolbench.core.registry import load_builtin
from poolbench.core.text import format_value, inverse, markdown_cell, with_interval
from poolbench.report import figures, formats, page, recommend, tables
from poolbench.report.figures.by_axis import plot_by_axis
from poolbench.report.figures.choice import plot_heatmap
from poolbench.report.frame import (
    COLUMNS,
    axes_in,
    lay_out,
    load,
    with_axes,
)
from poolbench.report.page_data import page_data
from poolbench.report.select import select
from poolbench.report.snippets import snippet
from poolbench.stats import batch, estimate
from poolbench.stats.runs import widen
from poolbench.store.journal import StoredRun
from poolbench.store.runs import find_run

ROOT = Path(__file__).parent.parent
CASE = synthetic.op_case("depth_max_pool")
HOSTILE = "\x1b[31m<script>alert(1)</script>\u2028'\"&../../x\n| a |"


def run_of(records, head=None):
    head = head or synthetic.header()
    return StoredRun(path=Path("synthetic"), header=head, records=tuple(records))


@pytest.fixture(scope="module")
def loaded():
    cases = [CASE, *(synthetic.op_case("global_avg_pool", mode=mode) for mode in synthetic.MODES)]
    return lay_out(run_of(synthetic.records(cases=cases)))


def row_of(loaded, candidate, race=0):
    table = loaded.table
    return table[(table["candidate"] == candidate) & (table["race"] == race)].iloc[0]


def test_frame_has_a_row_per_candidate_and_a_meaning_per_column(loaded):
    assert len(loaded.table) == 7 + 3 * 5
    assert list(loaded.table.columns) == with_axes(COLUMNS, axes_in(loaded.table))
    assert set(COLUMNS) <= RESERVED


def test_ratio_has_the_next_run_s_interval_and_the_verdict_the_mean_s(loaded):
    table = loaded.table
    row = table.index[table["candidate"] == "slices-maximum"][0]
    base = table.index[(table["candidate"] == "reshape-reduce_max") & (table["race"] == 0)][0]
    within = estimate.estimate(loaded.samples[row], loaded.samples[base])
    expected = widen(within, eager=False, one_thread=False)
    assert table.at[row, "ratio"] == pytest.approx(within.ratio)
    assert table.at[row, "ratio_high"] == pytest.approx(expected.next_run.ratio_high)
    assert table.at[row, "mean_high"] == pytest.approx(expected.mean.ratio_high)
    assert within.ratio_high < table.at[row, "mean_high"] < table.at[row, "ratio_high"]
    assert table.at[row, "verdict"] == "SLOWER"


def test_estimate_all_equals_estimate_one_by_one():
    rng = np.random.default_rng(2)
    race = [m for m in synthetic.race(CASE, rng) if len(m.samples)]
    torn = msgspec.structs.replace(
        race[0].samples, contended=(1,) + (0,) * (len(race[0].samples) - 1)
    )
    short = msgspec.structs.replace(
        race[1].samples,
        **{name: getattr(race[1].samples, name)[:-1] for name in race[1].samples.__struct_fields__},
    )
    samples = [m.samples for m in race] + [torn, short]
    pairs = [(one, other) for one in samples for other in samples]
    for found, (one, other) in zip(batch.estimate_all(pairs), pairs, strict=True):
        expected = estimate.estimate(one, other)
        assert found.log_ratio == pytest.approx(expected.log_ratio, abs=1e-12)
        assert found.standard_error == pytest.approx(expected.standard_error, abs=1e-12)
        assert (found.degrees, found.processes) == (expected.degrees, expected.processes)
        assert found.contended_used == expected.contended_used


def test_frame_failed_candidate_has_a_row_with_its_reason(loaded):
    row = row_of(loaded, "recipe-verbatim")
    assert row["status"] == "unsupported"
    assert "padding" in row["reason"]
    assert np.isnan(row["seconds"])


def test_frame_adaptive_run_reports_wider_intervals():
    records = synthetic.race(CASE, np.random.default_rng(1))
    looked = synthetic.header()
    looked = msgspec.structs.replace(looked, options=looked.options | {"max_processes": 10})
    once, often = (
        row_of(lay_out(run_of(records, head)), "slices-maximum") for head in (None, looked)
    )
    assert often["ratio"] == once["ratio"]
    assert often["ratio_low"] < once["ratio_low"] < once["ratio_high"] < often["ratio_high"]


def test_frame_candidate_stopped_early_has_no_interval():
    race = [
        msgspec.structs.replace(m, stopped_early=True) if m.candidate == "slices-maximum" else m
        for m in synthetic.race(CASE, np.random.default_rng(1))
    ]
    loaded = lay_out(run_of(race))
    row = row_of(loaded, "slices-maximum")
    assert row["ratio"] > 3
    assert np.isnan(row["ratio_low"])
    assert "(stopped early)" in tables.measurement_table(loaded.table)["time per call"].str.cat()


def test_frame_verdict_finer_than_noise_floor_is_withheld():
    audit = [m for m in synthetic.extras() if type(m).__name__ == "Selftest"]
    noisy = [msgspec.structs.replace(one, noise_floor=0.5) for one in audit]
    race = synthetic.race(CASE, np.random.default_rng(1))
    found = {
        name: lay_out(run_of([*race, *some])).table.set_index("candidate")["verdict"]
        for name, some in (("quiet", audit), ("noisy", noisy))
    }
    assert found["quiet"]["max_pool2d-reshape"] == "FASTER"
    assert found["noisy"]["max_pool2d-reshape"] == "WITHHELD"
    assert found["noisy"]["slices-maximum"] == "SLOWER"


def test_efficiency_is_limit_over_time_from_one_mebibyte_up():
    small = synthetic.op_case("depth_max_pool", shape=(1, 7, 7, 96))
    loaded = lay_out(run_of(synthetic.records(cases=[CASE, small])))
    large = loaded.table[loaded.table["race"] == 0].dropna(subset="efficiency")
    assert len(large) == 6, "all but the one that is not supported"
    assert np.allclose(
        large["efficiency"], large["bandwidth_limit_seconds"] / large["seconds"], rtol=0.1
    )
    assert loaded.table.loc[loaded.table["race"] == 1, "efficiency"].isna().all()


def test_textbook_ratio_where_textbook_fails_is_empty_with_reason():
    case = synthetic.op_case("depth_max_pool", direction="training")
    loaded = lay_out(run_of(synthetic.records(cases=[case])))
    row = row_of(loaded, "transpose-reduce_max")
    assert np.isnan(row["textbook_ratio"])
    assert "MaxPoolingGrad" in row["textbook_reason"]


def test_pick_of_equals_takes_fewest_failed_checks():
    red = {("op", "a"): 2, ("op", "b"): 1, ("op", "c"): 1}
    assert recommend.pick("op", ["a", "b", "c"], red) == "b"


def test_sentences_name_candidate_speed_and_bandwidth_limit(loaded):
    choice = recommend.answer(loaded).choices[0]
    found = tables.sentences(loaded, choice)
    assert choice.recommended in found[0]
    assert any("as fast as the textbook implementation" in text for text in found)
    assert any("of the memory-bandwidth limit" in text for text in found)
    assert max(len(text.split()) for text in found) <= 25


def test_break_even_counts_the_calls_that_pay_for_compiling():
    op = "global_avg_pool"
    cases = [synthetic.op_case(op, mode=mode) for mode in synthetic.MODES]
    loaded = lay_out(run_of(synthetic.records(cases=cases, with_extras=False)))
    at = loaded.table.set_index(["mode", "candidate"])
    eager, xla = at.loc[("eager", "einsum")], at.loc[("xla", "einsum")]
    cost = (xla["first_seconds"] - xla["seconds"]) - (eager["first_seconds"] - eager["seconds"])
    calls = tables.break_even_table(loaded).set_index(["mode", "candidate"])["calls"]
    assert calls[("xla", "einsum")] == pytest.approx(cost / (eager["seconds"] - xla["seconds"]))
    assert np.isnan(calls[("graph", "mean-of-means")]), "slower than in eager mode: it never pays"


def test_snippet_unknown_candidate_is_empty():
    assert snippet(CASE, "unknown") == ""


def test_network_sentence_small_share_advises_support_matrix(loaded):
    assert tables.network_sentence([]) == ""
    assert "support matrix" in tables.network_sentence(loaded.run.networks)


def test_render_empty_run_says_what_is_missing(tmp_path):
    folder = synthetic.write(tmp_path / "empty", [])
    written = page.render(load(folder), tmp_path / "out")
    text = written.page.read_text()
    for words in tables.MISSING.values():
        assert escape(words) in text


def test_format_value_scales_units():
    assert format_value(0.0012, "s") == "1.20 ms"
    assert format_value(0.0009996, "s") == "1.00 ms"
    assert format_value(9.996, "s") == "10.0 s"
    assert format_value(0.91, "%") == "91%"
    assert format_value(38.5 * 2**20, "B") == "38.5 MiB"
    assert format_value(np.nan, "s") == ""
    assert with_interval(5.2, 4.9, 5.5) == "5.20x [4.90, 5.50]"
    assert inverse(0.5, 0.4, 0.8) == (2.0, 1.25, 2.5)


@pytest.mark.fault(
    "a figure that cannot be drawn",
    "the page has the others, and says which is missing and why",
)
def test_render_figure_that_fails_leaves_the_others_and_says_so(loaded, tmp_path, monkeypatch):
    def broken(*_):
        raise PendingDeprecationWarning("set_bad goes away")

    monkeypatch.setattr(figures, "makers", lambda _: [broken, figures.plot_mode_direction])
    written = page.render(loaded, tmp_path)
    assert (
        "could not be drawn: PendingDeprecationWarning: set_bad goes away"
        in written.page.read_text()
    )
    drawn = sorted(path.stem for path in (tmp_path / "figures").glob("*.svg"))
    assert any("mode" in name for name in drawn), drawn
    monkeypatch.setattr(figures, "makers", lambda _: [broken])
    monkeypatch.setattr(figures, "plot_support", broken)
    text = page.render(loaded, tmp_path / "none").page.read_text()
    assert "set_bad goes away" in text, "of an op that has no other figure"
    assert [int(name[:2]) for name in drawn] == list(range(1, len(drawn) + 1))


@pytest.mark.fault(
    "a journal with HTML or Markdown in names and reasons",
    "escaped in the page and in Markdown",
)
def test_render_hostile_text_is_escaped(tmp_path):
    case = synthetic.op_case("depth_max_pool")
    race = [
        msgspec.structs.replace(m, candidate=HOSTILE, reason=HOSTILE)
        if m.candidate == "slices-maximum"
        else m
        for m in synthetic.race(case, np.random.default_rng(1))
    ]
    written = page.render(lay_out(run_of(race)), tmp_path / "out")
    text = written.page.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "\x1b" not in text
    assert "\u2028" not in text.partition('id="data"')[2].partition("</script>")[0]
    markdown = (tmp_path / "out" / "tables" / "all.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "\x1b" not in markdown
    assert len(markdown.splitlines()) == 2 + 7, "a heading, and a line per candidate"
    names = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_./") for name in names)


def test_embed_json_cannot_end_a_script_element():
    text = page.embed_json({"a": "</script><!--\u2028&"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!--\u2028&"}


def test_markdown_cell_stays_one_cell():
    assert "\n" not in markdown_cell("a\n|b")
    assert markdown_cell("a|b") == "a\\|b"
    assert "<" not in markdown_cell("<img>")


def test_as_markdown_own_markup_column_is_kept():
    frame = pd.DataFrame({"ours": ["**no**"], "theirs": ["**no**"]})
    rows = formats.as_markdown(frame, markup=["ours"]).splitlines()
    assert rows[-1] == "| **no** | \\*\\*no\\*\\* |"


@pytest.mark.fault(
    "a journal with a spreadsheet formula in a name",
    "an apostrophe precedes it in CSV",
)
@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\n=1", "\uff1d1"])
def test_as_csv_formula_gets_an_apostrophe(text):
    head, cell = csv.reader(io.StringIO(formats.as_csv(pd.DataFrame({text: [text]})), newline=""))
    assert head == cell == [f"'{text}"]


@pytest.mark.fault("warnings as errors (`python -W error`)", "the page has all its figures")
@pytest.mark.filterwarnings("error")
def test_styled_heatmap_is_drawn_where_warnings_are_errors():
    cases = [synthetic.op_case("global_avg_pool", shape=shape) for shape in synthetic.SHAPES[:2]]
    found = lay_out(run_of(synthetic.records(cases=cases, with_extras=False)))
    with figures.styled():
        plot = plot_heatmap(xla=False)(found, "global_avg_pool", "cpu:0")
    assert figures.png_of(plot.figure)


def run_in_modes(*modes, **fields):
    """The base case of depthwise max pooling, as if raced in these modes."""
    records = []
    for seed, mode in enumerate(modes):
        case = synthetic.op_case("depth_max_pool", **fields)
        other = synthetic.op_case("depth_max_pool", mode=mode, **fields)
        found = synthetic.race(case, np.random.default_rng(seed))
        records += [msgspec.structs.replace(m, case=other) for m in found]
    return lay_out(run_of(records))


def test_figures_of_torch_compile_have_its_marks():
    loaded = run_in_modes("eager", "compile")
    plot = figures.plot_mode_direction(loaded, "depth_max_pool", "cpu:0")
    marks = {handle.get_text() for handle in plot.figure.legends[0].get_texts()}
    assert marks == {"in eager mode", "with torch.compile"}
    alone = run_in_modes("compile")
    assert plot_heatmap(xla=False)(alone, "depth_max_pool", "cpu:0") is None  # one race


def test_heatmap_of_one_mode_that_tensorflow_lacks_is_drawn():
    records = [run_in_modes("compile", shape=(n, 8, 8, 96)).run.records for n in (1, 2)]
    loaded = lay_out(run_of([record for some in records for record in some]))
    plot = plot_heatmap(xla=False)(loaded, "depth_max_pool", "cpu:0")
    assert [axis.get_title() for axis in plot.figure.axes] == ["forward, compile"]


def test_axis_with_all_threads_has_a_mark_per_value():
    cases = [synthetic.op_case("depth_max_pool", threads=n) for n in (0, 1, 2)]
    loaded = lay_out(
        run_of([m for case in cases for m in synthetic.race(case, np.random.default_rng(1))])
    )
    plot = plot_by_axis("threads")(loaded, "depth_max_pool", "cpu:0")
    assert len(plot.figure.legends[0].get_texts()) == 3


def test_mode_direction_without_a_row_at_the_base_case_is_no_figure():
    mixed = [("float16", 2), ("bfloat16", 2), ("float32", 3), ("float32", 4)]
    cases = [synthetic.op_case("depth_max_pool", dtype=d, pool_size=k) for d, k in mixed]
    found = [m for case in cases for m in synthetic.race(case, np.random.default_rng(1))]
    assert figures.plot_mode_direction(lay_out(run_of(found)), "depth_max_pool", "cpu:0") is None


def test_page_data_names_the_axes_of_a_case():
    cases = [synthetic.op_case("depth_max_pool", padding="same", pool_size=5)]
    loaded = lay_out(
        run_of([m for c in cases for m in synthetic.race(c, np.random.default_rng(1))])
    )
    (settings,) = page_data(loaded, recommend.answer(loaded), [])["settings"]
    op, label, axes = settings
    assert (op, label) == ("depth_max_pool", "k5, same")
    assert axes == [["pool_size", "5"], ["padding", "same"]]


def test_pooled_run_named_twice_is_refused(tmp_path):
    folder = synthetic.write(tmp_path / "one", synthetic.records(1, cases=[CASE]))
    with pytest.raises(UsageError, match="named twice"):
        load(folder, folder)


def test_textbook_is_named_by_its_name_not_by_its_ratio(loaded):
    """One process has no interval: another candidate within 0.5% reads 1.00x."""
    at = loaded.row(0) | {
        "textbook_reason": "", "textbook_ratio": 1.001, "textbook_low": np.nan, "textbook_high": np.nan,
    }  # fmt: skip
    at["candidate"], at["op"] = "max_pool2d-view", "depth_max_pool"
    assert tables.textbook_text(at) == "0.999x"
    at["candidate"] = load_builtin().ops["depth_max_pool"].textbook
    assert tables.textbook_text(at) == "is the textbook"


def test_as_json_number_that_is_not_finite_is_null():
    text = formats.as_json(pd.DataFrame({"a": [np.nan, -np.inf, 1.5]}))
    assert json.loads(text) == [{"a": None}, {"a": None}, {"a": 1.5}]


def test_as_html_markup_is_escaped():
    text = formats.as_html(pd.DataFrame({"name": ["<script>"]}))
    assert "&lt;script&gt;" in text and "<script" not in text


def test_as_csv_carriage_return_begins_no_row():
    assert formats.as_csv(pd.DataFrame({"name": ["a\r=1"]})) == "name\na\\r=1\n"


def test_find_run_takes_newest_run_or_reference(tmp_path):
    with pytest.raises(StoreError, match="poolbench run"):
        find_run(tmp_path, None)
    reference = synthetic.write(tmp_path / "reference", [])
    assert find_run(tmp_path, None) == reference
    own = synthetic.write(tmp_path / "mine", [])
    assert find_run(tmp_path, None) == own
    assert find_run(tmp_path, "mine") == own


def test_select_unknown_column_or_value_is_refused_by_name(loaded):
    kept = select(loaded.table, [("op", ("depth_max_pool",)), ("pool_size", ("3",))])
    assert set(kept["op"]) == {"depth_max_pool"}
    with pytest.raises(UsageError, match="no column 'nope'; there are line, race, op"):
        select(loaded.table, [("nope", ("1",))])
    with pytest.raises(UsageError, match="no measurement has pool_size in 4, 5"):
        select(loaded.table, [("pool_size", ("4", "5"))])


@pytest.mark.parametrize(
    "arguments",
    [["report", "nowhere"], ["compare", "a", "b"], ["import", "nowhere.json"]],
    ids=lambda words: words[0],
)
def test_cli_unreadable_input_is_one_line_and_exit_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "start"),
    [("markdown", "| op | case |"), ("csv", "line,race,op,"), ("json", "[\n"), ("html", "<table")],
)
def test_report_format_prints_the_selected_table(kind, start, tmp_path):
    synthetic.write(tmp_path / "one", synthetic.records(cases=[CASE]))
    words = ["report", "one", "--format", kind, "--select", "status=ok", "--results", str(tmp_path)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(start)
    assert "slices-maximum" in done.stdout
    assert "recipe-verbatim" not in done.stdout


@pytest.mark.slow
def test_report_command_renders_a_page_without_tensorflow(tmp_path):
    code = (
        "import sys; from poolbench.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "assert 'pandas' not in sys.modules\n"
        "assert main(['report', %r, '--out', %r], standalone_mode=False) == 0\n"
        "assert not {'tensorflow.python', 'keras.src'} & set(sys.modules)\n"
    )
    cases = [CASE.replace(mode=mode) for mode in ("eager", "graph")]
    folder = synthetic.write(tmp_path / "one", synthetic.records(cases=cases))
    script = code % (str(folder), str(tmp_path / "out"))
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    own = own_text((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert any("right wherever it was raced" in part for part in own)
    assert not [part for part in own if "`" in part]
    assert [one for part in own for one in SENTENCE.split(part) if len(one.split()) > 25] == []


def own_text(page):
    """Return the parts of a page's text between two tags, without tables, figures, code and navigation."""
    left_out = r"<(style|script|svg|pre|code|table|datalist|small|nav)\b.*?</\1>"
    text = re.sub(left_out, " ", page, flags=re.DOTALL)
    text = re.sub(r"</?(?:strong|a|em)\b[^>]*>", "", text)
    return [html.unescape(" ".join(part.split())) for part in re.split(r"<[^>]*>", text)]


SENTENCE = re.compile(r"(?<=[.!?:;])\s")


def test_report_without_libraries_prints_the_command(tmp_path):
    copy = tmp_path / "report.py"
    copy.write_text((ROOT / "report.py").read_text())
    found = subprocess.run(
        [sys.executable, "-S", "-E", str(copy)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "pip install nox && nox -s report" in found.stderr
    assert found.stderr.count("\n") == 1


def test_report_continues_in_the_environment_of_nox(tmp_path):
    copy = tmp_path / "report.py"
    copy.write_text((ROOT / "report.py").read_text())
    home = tmp_path / ".nox" / "cpu"
    place = home / "lib" / "python3.11" / "site-packages"
    for name in ("click", "msgspec", "pandas", "seaborn", "jinja2", "itables"):
        (place / name).mkdir(parents=True)
    (home / "bin").mkdir()
    python = home / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    found = subprocess.run(
        [sys.executable, "-S", "-E", str(copy), "some-run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "going on with .nox/cpu/bin/python" in found.stderr
    assert found.stdout.split()[-1] == "some-run"


def test_network_sentence_is_of_whole_models_as_built():
    def record(network, op, candidate, share, **fields):
        fields = {"direction": "training", "mode": "graph", "batch": 8} | fields
        return ModelResult(
            model=network, op=op, candidate=candidate, baseline=candidate, share=share, **fields
        )

    found = [
        record("book", "depth_max_pool", "reshape-reduce_max", (0.2, 0.21, 0.22)),
        record("book", "all pooling", "as-built", (0.1, 0.11, 0.12)),
        record("book", "all pooling", "as-built", (0.3, 0.31, 0.32), mode="xla"),
        record("book-head", "all pooling", "as-built", (0.7, 0.71, 0.72)),
    ]
    text = tables.network_sentence(found)
    assert "11% [10, 12] of book's training step" in text
    assert text.count("step") == 2
    assert "71%" in tables.network_sentence(found[-1:])
