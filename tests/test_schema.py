"""results/README.md documents every field of every record."""

import re
from pathlib import Path

import msgspec
import pytest
from poolbench.core import axes, case, program, records

TEXT = (Path(__file__).parent.parent / "results" / "README.md").read_text()
RECORDS = [
    records.Header, records.Node, records.Measurement, records.MatrixCell,
    records.TraceSummary, records.Selftest, records.ModelResult, records.TimeBreakdown,
    case.Case, axes.AxisInfo, records.Environment, records.Samples, records.Accuracy, records.Contention,
    program.Program,
]  # fmt: skip


@pytest.mark.parametrize("struct", RECORDS, ids=lambda struct: struct.__name__)
def test_every_field_is_documented(struct):
    title = struct.__struct_config__.tag or struct.__name__
    section = re.search(rf"^### {title}\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert section, title
    told = re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)
    assert told == [field.name for field in msgspec.structs.fields(struct)]


def test_schema_version_is_documented():
    assert f"Schema version {records.SCHEMA_VERSION};" in TEXT
