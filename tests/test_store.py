import math
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.case import make_case
from bench.measurement import Accuracy, Environment, Header, Measurement, Samples
from bench.store import JOURNAL, Journal, StoreError, decode_line, encode_line, read_run

HEADER = Header(
    run="r",
    created="2026-01-01T00:00:00+00:00",
    environment=Environment(machine={}, devices={}, versions={}, settings={}, source={}),
    options={},
    seed=0,
)
CASE = make_case(op="pool", shape=(1, 2, 2, 6), pool_size=3)


def measurement(**fields):
    return Measurement(**({"case": CASE, "candidate": "a", "status": "ok"} | fields))


def write(folder, *records):
    with Journal(folder) as journal:
        for record in records:
            journal.append(record)
    return folder / JOURNAL


@given(st.text(), st.lists(st.floats(0, 1e3), max_size=5))
def test_a_record_comes_back_equal(text, seconds):
    record = measurement(
        reason=text, tail=text, samples=Samples(seconds=tuple(seconds), calls=(1,) * len(seconds))
    )
    assert decode_line(encode_line(record)) == record


def test_non_finite_numbers_survive():
    accuracy = Accuracy(worst=math.nan, max_relative=math.inf, max_absolute=-math.inf)
    back = decode_line(encode_line(measurement(accuracy=accuracy))).accuracy
    assert math.isnan(back.worst)
    assert (back.max_relative, back.max_absolute) == (math.inf, -math.inf)


def test_a_run_is_read_back_in_order(tmp_path):
    write(tmp_path, HEADER, measurement(candidate="a"), measurement(candidate="b"))
    assert [m.candidate for m in read_run(tmp_path).measurements] == ["a", "b"]


def test_a_torn_last_line_is_dropped_and_said(tmp_path):
    path = write(tmp_path, HEADER, measurement())
    with path.open("ab") as file:
        file.write(encode_line(measurement())[:-20])
    run = read_run(tmp_path)
    assert len(run.measurements) == 1
    assert "torn" in run.dropped


def test_the_next_writer_cuts_a_torn_line(tmp_path):
    path = write(tmp_path, HEADER)
    with path.open("ab") as file:
        file.write(b'{"crc32":')
    with Journal(tmp_path) as journal:
        journal.append(measurement())
    assert len(read_run(tmp_path).measurements) == 1


def test_a_changed_byte_is_noticed(tmp_path):
    path = write(tmp_path, HEADER, measurement(reason="quick"))
    path.write_bytes(path.read_bytes().replace(b"quick", b"quack"))
    with pytest.raises(StoreError, match="line 2 .* checksum"):
        read_run(tmp_path)


def test_another_schema_version_is_named(tmp_path):
    path = tmp_path / JOURNAL
    path.write_bytes(encode_line(msgspec.structs.replace(HEADER, schema=999)))
    with pytest.raises(StoreError, match="schema version 999; this poolbench reads"):
        read_run(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\n", b"not json\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n"])
def test_what_is_no_journal_is_said_in_one_line(tmp_path, data):
    (tmp_path / JOURNAL).write_bytes(data)
    with pytest.raises(StoreError) as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_second_writer_is_kept_out(tmp_path):
    with Journal(tmp_path), pytest.raises(StoreError, match="another run is writing"):
        Journal(tmp_path)


def test_a_dead_writer_does_not_hold_the_lock(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from bench.store import Journal;"
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
