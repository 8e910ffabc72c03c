"""The store: a journal's lines, what damages them, what is refused, and how runs are found and told apart."""

import math
import random
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from poolbench.core.case import Case, make_case
from poolbench.core.errors import StoreError
from poolbench.core.records import (
    Accuracy,
    Environment,
    Header,
    MatrixCell,
    Measurement,
    ModelResult,
    Samples,
    TraceSummary,
)
from poolbench.core.registry import load_builtin
from poolbench.store import journal, runs
from poolbench.store.journal import JOURNAL, Journal, decode_line, encode_line, read_run
from poolbench.store.schema1 import lift

HEADER = Header(
    run="r",
    created="2026-01-01T00:00:00+00:00",
    environment=Environment(machine={}, devices={}, versions={}, settings={}, source={}),
    options={},
    seed=0,
)
load_builtin()
CASE = make_case(op="depth_max_pool", shape=(1, 2, 2, 6), pool_size=3)


def one(line):
    (record,) = decode_line(line)
    return record


def measurement(**fields):
    return Measurement(**({"case": CASE, "candidate": "a", "status": "ok"} | fields))


def samples(seconds):
    count = len(seconds)
    return Samples(
        process=(0,) * count,
        allocation=(0,) * count,
        round=tuple(range(count)),
        calls=(1,) * count,
        seconds=tuple(seconds),
        contended=(0,) * count,
    )


def write(folder, *records):
    with Journal(folder) as journal:
        for record in records:
            journal.append(record)
    return folder / JOURNAL


@given(st.text(), st.lists(st.floats(1e-12, 1e3), max_size=5))
def test_a_record_comes_back_equal(text, seconds):
    record = measurement(reason=text, tail=text, samples=samples(seconds))
    assert one(encode_line(record)) == record


def test_non_finite_numbers_survive():
    accuracy = Accuracy(worst=math.nan, max_relative=math.inf, max_absolute=-math.inf)
    back = one(encode_line(measurement(accuracy=accuracy))).accuracy
    assert math.isnan(back.worst)
    assert (back.max_relative, back.max_absolute) == (math.inf, -math.inf)


def test_non_finite_figures_survive():
    cell = MatrixCell(
        op="pool",
        candidate="a",
        probe="nan",
        state="wrong",
        figures={"x": math.nan, "y": -math.inf, "z": "text"},
    )
    figures = one(encode_line(cell)).figures
    assert math.isnan(figures["x"])
    assert (figures["y"], figures["z"]) == (-math.inf, "text")


def test_journal_lone_surrogate_is_escaped():
    assert one(encode_line(measurement(reason="a\udc80b"))).reason == "a\\udc80b"


def test_journal_torn_race_is_left_out_whole(tmp_path):
    path = write(tmp_path, HEADER, measurement(candidate="before"))
    kept = path.read_bytes()
    with Journal(tmp_path) as journal:
        journal.append(*(measurement(candidate=name) for name in "abc"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    run = read_run(tmp_path)
    assert [m.candidate for m in run.measurements] == ["before"]
    assert "the last race was torn" in run.dropped
    Journal(tmp_path).close()
    assert path.read_bytes() == kept
    path.write_bytes(whole)
    assert [m.candidate for m in read_run(tmp_path).measurements] == ["before", "a", "b", "c"]


def schema1_line(name, more):
    case = {"op": CASE.op, **CASE.axes, "distribution": "normal"}
    body = msgspec.json.encode(
        {"type": "measurement", "case": case, "candidate": name, "status": "ok"}
    )
    return b'{"crc32":"%08x","more":%d,"record":%s}\n' % (zlib.crc32(body), more, body)


def test_journal_schema_1_batch_is_read_whole_or_not_at_all(tmp_path):
    path = write(tmp_path, HEADER)
    whole = path.read_bytes() + schema1_line("a", 1) + schema1_line("b", 0)
    path.write_bytes(whole + schema1_line("c", 2) + schema1_line("d", 1))
    run = read_run(tmp_path)
    assert [m.candidate for m in run.measurements] == ["a", "b"]
    assert "the last race was torn" in run.dropped
    assert run.measurements[0].case == CASE


@pytest.mark.fault(
    "one changed bit in a journal, or a foreign line",
    "that race is left out and reported; the others are read",
)
def test_journal_damaged_line_costs_its_own_race_and_is_reported(tmp_path):
    path = write(tmp_path, HEADER, *(measurement(candidate=name) for name in "abc"))
    lines = path.read_bytes().splitlines(keepends=True)
    flipped = bytearray(lines[2])
    flipped[60] ^= 1
    path.write_bytes(b"".join([*lines[:2], bytes(flipped), *lines[3:]]))
    run = read_run(tmp_path)
    assert [m.candidate for m in run.measurements] == ["a", "c"]
    assert "line 3 is damaged" in run.dropped
    with Journal(tmp_path) as journal:
        journal.append(measurement(candidate="b"))
    assert [m.candidate for m in read_run(tmp_path).measurements] == ["a", "c", "b"]


KINDS = {
    type(r).__name__: r
    for r in (HEADER, measurement(), *synthetic.extras(), synthetic.unusual()[1][0])
}


@pytest.mark.fault(
    "a changed bit or a cut in a line of any kind",
    "it is reported, or refused in one line, and changes nothing else",
)
@pytest.mark.parametrize("kind", KINDS)
def test_journal_damage_in_a_line_of_any_kind_is_told(tmp_path, kind):
    generator = random.Random(kind)
    found = list(KINDS.values())
    path = write(tmp_path, *found)
    lines = path.read_bytes().splitlines(keepends=True)
    number = list(KINDS).index(kind)
    rest = found[1:number] + found[number + 1 :]
    for flip in [True, False] * 30:
        damaged = bytearray(lines[number])
        place = generator.randrange(
            len(damaged) - 1
        )  # without its end the next line is damaged too
        if flip:
            damaged[place] ^= 1 << generator.randrange(8)
        else:
            del damaged[place : place + generator.randint(1, len(damaged) - 1 - place)]
        path.write_bytes(b"".join([*lines[:number], damaged, *lines[number + 1 :]]))
        try:
            run = read_run(tmp_path)
        except StoreError as error:
            assert number == 0, error
            assert "\n" not in str(error)
            continue
        assert "damaged" in run.dropped
        assert list(run.records) == rest


def test_journal_of_many_damaged_lines_is_refused(tmp_path):
    path = write(tmp_path, HEADER)
    path.write_bytes(path.read_bytes() + b"{}\n" * (journal.MAX_DAMAGED + 1))
    with pytest.raises(StoreError, match="cannot be read"):
        read_run(tmp_path)


@pytest.mark.fault(
    "a journal above the limit",
    "refused in one line; the file is unchanged",
)
def test_journal_above_the_limit_is_refused_untouched(tmp_path, monkeypatch):
    path = write(tmp_path, HEADER, measurement())
    whole = path.read_bytes() + b"torn"
    path.write_bytes(whole)
    monkeypatch.setattr(journal, "MAX_NBYTES", len(whole) - 1)
    with pytest.raises(StoreError, match="too large"):
        Journal(tmp_path)
    assert path.read_bytes() == whole


def test_journal_writes_nothing_that_cannot_be_read(tmp_path, monkeypatch):
    path = write(tmp_path, HEADER)
    whole = path.read_bytes()
    monkeypatch.setattr(journal, "MAX_NBYTES", len(whole) + 100)
    with Journal(tmp_path) as opened, pytest.raises(StoreError, match="is full"):
        opened.append(measurement())
    monkeypatch.setattr(journal, "MAX_LINE_NBYTES", 100)
    with Journal(tmp_path) as opened, pytest.raises(StoreError, match="a line has at most 100"):
        opened.append(measurement())
    assert path.read_bytes() == whole


@given(st.data())
def test_a_journal_cut_anywhere_holds_whole_races(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    path = write(folder, HEADER)
    with Journal(folder) as journal:
        journal.append(measurement(candidate="a"), measurement(candidate="b"))
        journal.append(measurement(candidate="c"), measurement(candidate="d"))
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    path.write_bytes(whole[: data.draw(st.integers(header, len(whole)))])
    names = [m.candidate for m in read_run(folder).measurements]
    assert names == list("abcd")[: len(names)]
    assert len(names) % 2 == 0


def test_a_race_that_is_run_again_replaces_itself(tmp_path):
    write(tmp_path, HEADER, measurement(reason="old"), measurement(reason="new"))
    assert [m.reason for m in read_run(tmp_path).measurements] == ["new"]


def test_a_run_is_read_back_in_order(tmp_path):
    write(tmp_path, HEADER, measurement(candidate="a"), measurement(candidate="b"))
    assert [m.candidate for m in read_run(tmp_path).measurements] == ["a", "b"]


def test_the_next_writer_cuts_a_torn_line(tmp_path):
    path = write(tmp_path, HEADER)
    with path.open("ab") as file:
        file.write(b'{"crc32":')
    with Journal(tmp_path) as journal:
        journal.append(measurement())
    assert len(read_run(tmp_path).measurements) == 1


def test_journal_changed_byte_is_noticed(tmp_path):
    path = write(tmp_path, HEADER, measurement(reason="quick"))
    path.write_bytes(path.read_bytes().replace(b"quick", b"quack"))
    run = read_run(tmp_path)
    assert not run.measurements
    assert "line 2 is damaged and is left out: its checksum does not match" in run.dropped
    path.write_bytes(path.read_bytes().replace(b"2026", b"2027"))
    with pytest.raises(StoreError, match=r"line 1 .* checksum"):
        read_run(tmp_path)


def test_another_schema_version_is_named(tmp_path):
    path = tmp_path / JOURNAL
    path.write_bytes(encode_line(msgspec.structs.replace(HEADER, schema=999)))
    with pytest.raises(StoreError, match="schema version 999; this poolbench reads"):
        read_run(tmp_path)


def test_line_of_another_schema_version_is_named():
    line = b'{"crc32":"%08x","schema":99,"records":[]}' % zlib.crc32(b"[]")
    with pytest.raises(StoreError, match="its schema is 99; this version reads 1 to 2"):
        decode_line(line)


def test_read_run_first_line_of_another_kind_is_refused(tmp_path):
    write(tmp_path, measurement())
    with pytest.raises(StoreError, match="does not begin with a header line"):
        read_run(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\n", b"not json\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n"])
def test_read_run_invalid_journal_is_one_line(tmp_path, data):
    (tmp_path / JOURNAL).write_bytes(data)
    with pytest.raises(StoreError) as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (measurement(case=CASE.replace(dtype="../../etc")), "dtype must be one of"),
        (measurement(case=CASE.replace(shape=(1, 2))), "shape must be like"),
        (measurement(case=CASE.replace(shape=(1, 2, 3, 10**10))), "shape must be like"),
        (measurement(samples=Samples(seconds=(1.0,), process=(0, 1))), "unequal lengths"),
        (measurement(samples=Samples(seconds=(1.0,), calls=(1,))), "lack process"),
        (measurement(samples=samples([math.nan])), "seconds"),
        (measurement(samples=samples([-1.0])), "float. >= 0.0 - at .*seconds"),
        (measurement(samples=samples([0.0])), "seconds above 0"),
        (measurement(samples=samples([1e308, 1e308])), "seconds above 0 and below 1e"),
        (measurement(read_nbytes=-1), "bytes count from 0"),
        (measurement(first_call_seconds=(math.inf,)), "first calls"),
        (TraceSummary(case=CASE, candidate="a", trace="../../home"), "named by a folder's name"),
        (ModelResult(model="n", op="o", candidate="s", direction="forward", mode="xla", batch=1,
                     samples=samples([math.inf])), "finite"),
        (measurement(case=Case(op=CASE.op, axes={"mode": "graph"})), "not as a case is written"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_validate_checks_rules_beyond_types(record, said):
    with pytest.raises(StoreError, match=said):
        one(encode_line(record))


def test_what_is_too_large_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, HEADER, measurement())
    monkeypatch.setattr(journal, "MAX_LINE_NBYTES", 100)
    with pytest.raises(StoreError, match="a line has at most 100"):
        read_run(tmp_path)
    monkeypatch.setattr(journal, "MAX_NBYTES", path.stat().st_size - 1)
    with pytest.raises(StoreError, match="too large; a journal has at most"):
        read_run(tmp_path)


def test_two_runs_in_one_journal_are_refused(tmp_path):
    write(tmp_path, HEADER, HEADER)
    with pytest.raises(StoreError, match="second header"):
        read_run(tmp_path)


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_store import HEADER, measurement
from poolbench.store.journal import Journal
from poolbench.core.errors import StoreError
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
with Journal(folder) as journal:
    journal.append(HEADER)
    try:
        for number in range(1000):
            journal.append(measurement(candidate=f"a{number}"), measurement(candidate=f"b{number}"))
    except StoreError as error:
        print(error)
"""


def test_a_full_disk_keeps_what_was_synced(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), "5000"], cwd=Path(__file__).parent.parent,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "what was finished is kept" in done.stdout
    run = read_run(tmp_path)
    assert run.dropped == ""
    assert len(run.measurements) > 2
    assert [m.candidate[0] for m in run.measurements] == ["a", "b"] * (len(run.measurements) // 2)


def test_journal_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write to"):
        Journal(tmp_path / "file" / "run")


def test_journal_of_a_disk_that_refuses_every_change_is_reported(tmp_path):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    with Journal(tmp_path) as opened:
        opened._file.close()
        opened._file = SimpleNamespace(
            seek=lambda *_: 0, write=refuse, truncate=refuse, close=lambda: None
        )
        with pytest.raises(StoreError, match="Read-only file system; what was finished is kept"):
            opened.append(HEADER)


@pytest.mark.fault(
    "two runs of one name",
    "the second is refused in one line",
)
def test_a_second_writer_is_kept_out(tmp_path):
    with Journal(tmp_path), pytest.raises(StoreError, match="another run is writing"):
        Journal(tmp_path)


def test_a_dead_writer_does_not_hold_the_lock(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from poolbench.store.journal import Journal;"
        "journal = Journal(Path(sys.argv[1])); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    Journal(tmp_path).close()


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_a_store_error(data):
    try:
        decode_line(data)
    except StoreError as error:
        assert "\n" not in str(error)


def test_networks_of_a_model_measured_twice_are_the_last(tmp_path):
    first, second = (
        ModelResult(
            model="m", op="pool", candidate="a", direction="forward", mode="graph", batch=batch,
            figures={"peak_nbytes": nbytes},
        )
        for batch, nbytes in ((1, 1), (2, 2))
    )  # fmt: skip
    again = msgspec.structs.replace(first, figures={"peak_nbytes": 3})
    with Journal(tmp_path / "run") as journal_:
        journal_.append(HEADER)
        journal_.append(first, second, again)
    assert read_run(tmp_path / "run").networks == [again, second]


def test_lift_renames_what_the_machine_says_of_idle_states():
    environment = {"machine": {"cores": 2, "kept_awake": True}, "devices": {}}
    lifted = lift({"type": "node", "name": "n", "environment": environment})
    assert lifted["environment"]["machine"] == {"cores": 2, "idle_states_disabled": True}
    assert environment["machine"] == {"cores": 2, "kept_awake": True}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"type": "capability", "probe": "repeat-replicas"}, {"type": "matrix_cell", "probe": "repeat-processes"}),
        ({"type": "network", "network": "m", "direction": "inference"},
         {"type": "model", "model": "m", "direction": "forward"}),
        ({"type": "shares", "seconds": {"lead_in": 1.0}}, {"type": "time", "seconds": {"warmup": 1.0}}),
        ({"type": "selftest", "figures": {"replicas": 5}}, {"type": "selftest", "figures": {"processes": 5}}),
        ({"type": "header", "options": {"max_replicas": 9}},
         {"type": "header", "options": {"max_processes": 9}, "schema": 2}),
        ({"type": "measurement", "candidate": "ceiling-read", "settled": True, "samples": {"replica": [0]}},
         {"type": "measurement", "candidate": "bandwidth-read", "stopped_early": True, "samples": {"process": [0]},
          "flags": []}),
    ],
    ids=lambda record: record["type"],
)  # fmt: skip
def test_lift_renames_the_fields_of_a_kind(old, new):
    assert lift(old) == new


@pytest.mark.parametrize(
    "record",
    [
        {"type": "measurement"},
        {"type": "measurement", "candidate": ["a"]},
        {"type": "measurement", "candidate": "a", "flags": None},
        {"type": "measurement", "candidate": "a", "flags": [{}]},
        {"type": "capability"},
        {"type": "capability", "probe": {}},
    ],
    ids=str,
)
def test_line_of_schema_1_with_a_field_missing_or_of_another_type_is_refused(record):
    body = msgspec.json.encode(record)
    with pytest.raises(StoreError):
        decode_line(b'{"crc32":"%08x","record":%s}' % (zlib.crc32(body), body))


def test_new_run_folder_of_a_taken_name_is_another(tmp_path):
    first = runs.new_run_folder(tmp_path, "quick")
    write(first, HEADER)
    assert runs.new_run_folder(tmp_path, "quick") != first


def test_differing_fields_and_options_are_named():
    def environment(cores, **versions):
        return msgspec.structs.replace(
            HEADER.environment, machine={"cores": cores, "threads": 4}, versions=versions
        )

    old, new = environment(2, numpy="2.0", jax="0.7"), environment(4, numpy="2.0")
    assert runs.differing_fields(old, new) == ["cores", "jax"]
    options = {"processes": 5, "margin": 0.05, "sweep": "quick"}
    stored = msgspec.structs.replace(HEADER, options=options)
    asked = {"processes": 5, "margin": 0.1, "sweep": "full", "seed": 1}
    assert runs.differing_options(stored, asked) == ["seed", "margin"]


def test_source_digests_changed_report_is_the_same_code(tmp_path, monkeypatch):
    package = tmp_path / "poolbench"
    for name in ("store/runs.py", "engine/race.py", "report/page.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1")
    monkeypatch.setattr(runs, "__file__", str(package / "store/runs.py"))
    before = runs.source_digests(())
    (package / "report/page.py").write_text("2")
    assert runs.source_digests(()) == before
    (package / "engine/race.py").write_text("2")
    assert runs.source_digests(()) != before
