"""Rows of the user's own beside those of the suite."""

import csv
from pathlib import Path
from statistics import median

import pytest

from hiermoe.analysis.others import own_rows
from hiermoe.analysis.others.foretold import foretell
from hiermoe.analysis.others.measurement_rules import load_measurement_rules
from hiermoe.analysis.others.own_rows import OwnHeld, hold_own
from hiermoe.analysis.others.published_rows import MEASUREMENTS, Measurement, load_measurements
from hiermoe.commands import published_command
from tests.conftest import Command

FEW = ("deepep2_SM90_8x2_", "uccl_rail_")
ENTRIES = """\
rows:
  - {ids: mine_time, kind: absolute, cluster: h100_ib400}
  - {ids: mine_ratio, kind: ratio, over: uccl_rail_cross_8k, cluster: h100_efa400, routing: {pattern: own_rail}}
  - {ids: mine_lost, reason: nobody knows what it was}
systems:
  my_dispatch: {across: hd2_pipelined, inside: hd1, choice_bytes: 8}
"""


def write_rows(path: Path, **changed: str) -> Path:
    """A row like one of DeepEP V2's, one like a rail's, and one of which nothing is known."""
    shipped = {row["id"]: row for row in csv.DictReader(MEASUREMENTS.open())}
    rows = [
        shipped["deepep2_SM90_8x2_dispatch"] | {"id": "mine_time", "system": "my_dispatch"},
        shipped["uccl_rail_aligned_8k"] | {"id": "mine_ratio"},
        shipped["uccl_rail_aligned_8k"] | {"id": "mine_lost"},
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([rows[0] | changed, *rows[1:]])
    return path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Measurement]:
    """A suite with some of its rows, so that it does not take long."""
    rows = [row for row in load_measurements() if row.id.startswith(FEW)]
    monkeypatch.setattr(own_rows, "load_measurements", lambda path=None: load_measurements(path) if path else rows)
    return rows


def held(folder: Path, entries: str = ENTRIES) -> OwnHeld:
    (folder / "mine.yaml").write_text(entries)
    return hold_own(write_rows(folder / "mine.csv"), folder / "mine.yaml")


def test_own_rows_are_predicted_as_the_suites_and_judged_apart(few: list[Measurement], tmp_path: Path) -> None:
    found = held(tmp_path)
    alone, _ = foretell(few, load_measurement_rules())
    by_id = {one.row.id: one for one in alone}
    assert [one.log_error for one in found.shipped.predicted] == [one.log_error for one in alone]
    time, ratio = found.predicted
    assert [one.row.id for one in found.listed] == ["mine_lost"]
    # The same row but for 8 instead of 12 bytes a choice; a ratio over a row of the suite.
    theirs = by_id["deepep2_SM90_8x2_dispatch"]
    assert time.setting.row_bytes == (theirs.setting.row_bytes[0] - 8 * 4,) and time.predicted_ms < theirs.predicted_ms
    assert ratio.log_error == by_id["uccl_rail_aligned_8k"].log_error
    table = found.table.set_index("id")
    alike = [one.factor for one in alone if one.kind == "absolute"]
    assert table.loc["mine_time", "shipped_rows"] == len(alike) == 2
    assert table.loc["mine_time", "shipped_factor"] == pytest.approx(median(alike))


def test_what_does_not_fit_is_refused(few: list[Measurement], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"id=mine_time: 0 entries of .* \(or --entries\)"):
        hold_own(write_rows(tmp_path / "mine.csv"), None)
    with pytest.raises(ValueError, match="id=uccl_rail_cross_8k is a row of the suite"):
        hold_own(write_rows(tmp_path / "mine.csv", id="uccl_rail_cross_8k"), None)
    with pytest.raises(ValueError, match=r"systems\.deepep_v1 is one of reports/measurements\.yaml"):
        held(tmp_path, ENTRIES.replace("my_dispatch", "deepep_v1"))
    with pytest.raises(ValueError, match=r"mine\.yaml: rows\.0\.kinds=absolute: no such key; did you mean kind"):
        held(tmp_path, ENTRIES.replace("kind: absolute", "kinds: absolute"))


def test_command_shows_them_beside(
    few: list[Measurement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(published_command, "write_held", lambda held: tmp_path / "page.md")
    monkeypatch.setattr(published_command, "OWN_ROWS", tmp_path / "own.csv")
    (tmp_path / "mine.yaml").write_text(ENTRIES)
    rows = write_rows(tmp_path / "mine.csv")
    published_command.main(["--rows", str(rows), "--entries", str(tmp_path / "mine.yaml")])
    out = capsys.readouterr().out
    assert f"Of {len(few)} rows that others published" in out.replace("\n", " ")
    assert "mine_lost not predicted: nobody knows what it was" in out
    written = list(csv.DictReader((tmp_path / "own.csv").open()))
    assert [row["id"] for row in written] == ["mine_time", "mine_ratio"]
    shown = next(line for line in out.splitlines() if "mine_time" in line).split()
    assert shown[-3:] == [f"{float(written[0]['factor']):.2f}", f"{float(written[0]['shipped_factor']):.2f}", "(2)"]


def test_command_refuses_in_one_line(tmp_path: Path, hiermoe: Command) -> None:
    code, out, err = hiermoe("published", "--entries", "mine.yaml")
    assert code == 2 and not out and "--rows is missing" in err
    code, out, err = hiermoe("published", "--rows", str(tmp_path / "none.csv"))
    assert code == 2 and not out and "none.csv" in err and len(err.strip().splitlines()) == 1
