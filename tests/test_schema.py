"""results/README.md tells every field of every record."""

import re
from pathlib import Path

import msgspec
import pytest

from bench import measurement

TEXT = (Path(__file__).parent.parent / "results" / "README.md").read_text()
RECORDS = [
    measurement.Header, measurement.Node, measurement.Measurement, measurement.Capability,
    measurement.Account, measurement.Selftest, measurement.Network, measurement.Shares,
    measurement.Environment, measurement.Samples, measurement.Accuracy, measurement.Contention,
]  # fmt: skip


@pytest.mark.parametrize("struct", RECORDS, ids=lambda struct: struct.__name__)
def test_every_field_is_told(struct):
    title = struct.__struct_config__.tag or struct.__name__
    section = re.search(rf"^### {title}\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert section, title
    told = re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)
    assert told == [field.name for field in msgspec.structs.fields(struct)]


def test_the_version_is_told():
    assert f"Schema version {measurement.SCHEMA_VERSION};" in TEXT
