"""Tables of expert loads as people have them: whatever separators, names of columns and marks in numbers."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hiermoe.routing.column_names import find_columns
from hiermoe.routing.load_forms import LOAD_FORMS
from hiermoe.routing.text_file import read_text
from hiermoe.routing.trace import MOST_EXPERTS

_MOST_BYTES = 2**28
_SEPARATORS = ";\t,"  # the first of them that the header has
_NEEDED = ("expert", "load")

_GROUPED = r"[+-]?(?:\d+|[1-9]\d{{0,2}}(?:{thousands}\d{{3}})+)?(?:{decimal}\d*)?(?:[eE][+-]?\d+)?"
_POINTED = re.compile(_GROUPED.format(thousands=",", decimal=r"\."))  # 1,234.5
_COMMAED = re.compile(_GROUPED.format(thousands=r"\.", decimal=","))  # 1.234,5
_SPACES = re.compile(r"(?<=\d)[\s'’_](?=\d{3})")  # 1 234, in any kind of space


@dataclass(frozen=True)
class LoadTable:
    """Loads of one layer.

    Attributes:
        load_E: float64 [E], in the unit of the file.
        layer: its number; None where the file names no layers.
        notes: what was done to the file's rows, in sentences.
    """

    load_E: np.ndarray
    layer: int | None
    notes: tuple[str, ...]


def read_loads(path: Path, num_experts: int | None = None, layer: int = 0) -> LoadTable:
    """Loads of all experts of a layer.

    Args:
        path: a file or folder of one of the forms in hiermoe/routing/load_forms/, else CSV with a column of experts (0
            to E - 1, each once in a layer, in any order), one of loads (at least 0), and perhaps one of layers;
            ``expert_id`` or ``count`` for instance will do as names. Separated by commas, semicolons or tabs, packed or
            not. Files may follow each other with their headers: loads are then added.
        num_experts: E, if it is known; rows that are not there then have no load.
        layer: position among the file's layers.

    Raises:
        OSError: there is no such file.
        ValueError: malformed; the message names the rule.
    """
    if (counted := _counted(path, num_experts, layer)) is not None:
        return counted
    separator, rows = _rows(path)
    if not rows:
        raise ValueError(f"{path} is no CSV file of expert,load: it is empty")
    header = rows[0][1]
    place = find_columns(path, header, _NEEDED, ("layer",))
    body = [row for row in rows if row[1] != header]
    files = len(rows) - len(body)
    if short := next((row for row in body if len(row[1]) != len(header)), None):
        hint = " (a number with commas needs quotes where commas separate)" if len(short[1]) > len(header) else ""
        raise ValueError(
            f"{path} is no CSV file of expert,load: line {short[0]} has {len(short[1])} cells, its header {len(header)}"
            + hint
        )
    notes, number = [], None
    if "layer" in place:
        layers = _integers(path, body, place["layer"], "layer")
        there = sorted(set(layers))
        if not 0 <= layer < max(len(there), 1):
            raise ValueError(f"{path}: layer={layer} is not among its {len(there)} layers")
        number = there[layer] if there else None
        body = [row for row, of in zip(body, layers, strict=True) if of == number]
        if len(there) > 1:
            notes.append(f"One of the file's layers {there}: layer={layer} is number {number}.")
    elif layer:
        raise ValueError(f"{path}: layer={layer}, and the file has no column of layers")
    experts = np.array(_integers(path, body, place["expert"], "expert"), np.int64)
    loads = _numbers(path, [cells[place["load"]] for _, cells in body], experts, separator)
    if files > 1:
        notes.append(f"{files} files in one, each with its header: their loads were added.")
    load_E, left_out = _of_experts(path, experts, loads, num_experts, files)
    if left_out:
        notes.append(f"{left_out} experts have no row in the file and were given no load.")
    return LoadTable(load_E, number, tuple(notes))


def _counted(path: Path, num_experts: int | None, layer: int) -> LoadTable | None:
    """Loads of a form of others; None where the file is of none."""
    if not path.exists():
        return None
    for form in LOAD_FORMS.values():
        if (words := form.recognized(path)) is None:
            continue
        found = form.read(path)
        there = sorted(found.loads)
        if not 0 <= layer < len(there):
            raise ValueError(f"{path}: layer={layer} is not among its {len(there)} layers")
        load_E = found.loads[there[layer]]
        if num_experts not in (None, len(load_E)):
            raise ValueError(f"{path} has {len(load_E)} experts, not {num_experts}: state num_experts={len(load_E)}")
        which = f" One of the layers {there}: layer={layer} is number {there[layer]}." if len(there) > 1 else ""
        return LoadTable(load_E, there[layer], (f"{path.name}: {words}. {found.notes}{which}",))
    return None


def _rows(path: Path) -> tuple[str, list[tuple[int, list[str]]]]:
    """What separates cells; and lines that are not blank: number and cells."""
    lines = read_text(path, _MOST_BYTES).splitlines()
    header = next((line for line in lines if line.strip()), "")
    separator = next((mark for mark in _SEPARATORS if mark in header), ",")
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file of expert,load: line {reader.line_num}: {error}") from None
    return separator, [(line, cells) for line, cells in rows if any(cells)]


def _integers(path: Path, rows: Sequence[tuple[int, list[str]]], column: int, thing: str) -> list[int]:
    found = []
    for line, cells in rows:
        if not re.fullmatch(r"\d{1,9}(?:\.0*)?", cells[column]):
            raise ValueError(f"{path}: line {line}: {thing} {cells[column] or 'nan'} is no number from 0 on")
        found.append(int(float(cells[column])))
    return found


def _numbers(path: Path, cells: Sequence[str], experts: np.ndarray, separator: str) -> np.ndarray:
    """Loads as numbers, with points or commas for decimals, whichever all of them can be.

    Where both make sense, points it is; but semicolons separate where commas are decimals too.

    Raises:
        ValueError: one is no number or below 0, or both readings make sense and differ in more than their unit.
    """
    cells = [_SPACES.sub("", cell) for cell in cells]
    readings = [
        [_number(cell, form, thousands) for cell in cells] for form, thousands in ((_POINTED, ","), (_COMMAED, "."))
    ]
    fitting = [each for each in readings if None not in each]
    if len(fitting) == 2 and separator == ";" and not _in_proportion(*map(np.array, fitting)):
        cell, a, b = next(x for x in zip(cells, *fitting, strict=True) if x[1] != x[2])
        raise ValueError(f"{path}: load {cell} may be {a:g} or {b:g}: write loads without marks for thousands")
    values = fitting[0] if fitting else readings[0]
    for expert, cell, value in zip(experts, cells, values, strict=True):
        if value is None or value < 0:
            raise ValueError(f"{path}: load of expert {expert} is {cell or 'nan'}; the rule is >= 0")
    return np.array(values)


def _in_proportion(a: np.ndarray, b: np.ndarray) -> bool:
    return np.allclose(a * b.sum(), b * a.sum(), rtol=1e-12)


def _number(cell: str, form: re.Pattern[str], thousands: str) -> float | None:
    """A cell read in one form; None where it has not that form."""
    if not cell or not form.fullmatch(cell):
        return None
    try:
        value = float(cell.replace(thousands, "").replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _of_experts(
    path: Path, experts: np.ndarray, loads: np.ndarray, num_experts: int | None, files: int
) -> tuple[np.ndarray, int]:
    """Loads by expert, and how many experts have no row."""
    rule = "experts must be 0 to E - 1, each once"
    if len(experts) == 0:
        raise ValueError(f"{path}: {rule}; there are 0 rows")
    count = num_experts or int(experts.max()) + 1
    if count > MOST_EXPERTS:
        raise ValueError(f"{path}: num_experts={count} is more than {MOST_EXPERTS}")
    if experts.max() >= count:
        raise ValueError(f"{path} has an expert {experts.max()}, num_experts={count}: {rule}")
    rows_E = np.bincount(experts, minlength=count)
    if (rows_E > files).any():
        twice = int((rows_E > files).argmax())
        raise ValueError(f"{path}: {rule}; expert {twice} has {rows_E[twice]} rows")
    missing = int((rows_E == 0).sum())
    if missing and num_experts is None:
        raise ValueError(
            f"{path}: {rule}; {missing} of them, expert {int((rows_E == 0).argmax())} for one, have no row: state "
            "num_experts=... (or model=...) if rows without load were left out"
        )
    if missing and rows_E[: experts.max() + 1].all():  # rows without load that are left out leave gaps
        found = int(experts.max()) + 1
        raise ValueError(
            f"{path} has {found} experts, not {num_experts}: state num_experts={found} if meant, or give "
            f"expert {count - 1} a row of load 0"
        )
    load_E = np.bincount(experts, weights=loads, minlength=count)
    if load_E.sum() == 0:
        raise ValueError(f"{path}: all loads are 0")
    return load_E, missing
