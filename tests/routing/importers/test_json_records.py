"""Objects come out the same however a text lays them out, each with the line that it begins in."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiermoe.routing import text_file
from hiermoe.routing.importers.json_records import objects

VALUES = st.recursive(
    st.integers(-9, 9) | st.text('a{}"\\[],\n', max_size=6) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k{"\\', max_size=3), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(st.text("ab", max_size=2), VALUES, max_size=3), max_size=5)


def laid_out(records: list[Any], form: str) -> str:
    return {
        "lines": "".join(json.dumps(each) + "\n" for each in records),
        "blank lines": "".join("\n" + json.dumps(each) + " \r\n\n" for each in records),
        "pretty": "\n".join(json.dumps(each, indent=2) for each in records),
        "array": json.dumps(records),
        "pretty array": json.dumps(records, indent=1),
        "arrays": json.dumps(records[:2]) + "\n" + json.dumps(records[2:], indent=1),
        "without anything between": "".join(map(json.dumps, records)),
        "marked": "\ufeff" + "\n\ufeff".join(map(json.dumps, records)),
    }[form]


FORMS = ("lines", "blank lines", "pretty", "array", "pretty array", "arrays", "without anything between", "marked")


@pytest.mark.parametrize("form", FORMS)
@given(records=RECORDS, size=st.integers(1, 60))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_objects_do_not_depend_on_the_layout(form: str, records: list[Any], size: int) -> None:
    text = laid_out(records, form)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_file, "_PART_BYTES", size)
        path = Path(folder) / "a.json"
        path.write_text(text)
        found = list(objects(path))
    assert [json.loads(each) for _, each in found] == records
    lines = text.split("\n")
    assert all("{" in lines[line - 1] for line, _ in found)
    assert all(b"\n" not in each for _, each in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": [1, 2', "line 2 is truncated or malformed: its object has no end"),
        ('{"a": 1}\n{"a": [1, 2\n{"a": 1}\n', "line 2 is truncated or malformed: its object has no end"),
        ('{"a": 1}\n\n7\n', "line 3 is truncated or malformed: '7'"),
        ('{"a": 1}}\n', "line 1 is malformed: a brace closes nothing"),
        ("layer,expert\n0,1\n", "line 1 is truncated or malformed: 'layer,expert"),
        ('{"a": "\\', "line 1 is truncated or malformed: its object has no end"),
    ],
)
def test_what_is_no_object_is_named_by_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError) as raised:
        list(objects(tmp_path / "a.jsonl"))
    assert message in str(raised.value)
