"""Whether the report that is there is what would be written now; drawing it anew takes most of a minute."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hiermoe.records.groups import OWN
from hiermoe.records.index import Index, Renewal
from hiermoe.records.project import CONF, PUBLISHED, RULES, STATEMENT_RULES, STATEMENTS, TEMPLATES
from hiermoe.records.run_id import code_digest
from hiermoe.records.store import RunStore

_HEAD_BYTES = 4096  # a page says in its first lines what it was made from


def made_from(index: Index, store: RunStore, stale: Sequence[Renewal] = ()) -> str:
    """One name for all that a report shows: its runs and their records, the rules, names and colours, the code.

    The commit does not count: where none of these has changed, a report tells of the one that it was made at.
    """
    content = {
        "runs": {name: [(entry.run_id, entry.swept) for entry in sweep] for name, sweep in index.items()},
        "records": {entry.run_id: store.written(entry.run_id) for sweep in index.values() for entry in sweep},
        "all records": store.run_ids(),
        "stale": [(renewal.command, renewal.run_ids) for renewal in stale],
        "files": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in _files()},
        "code": code_digest(("hiermoe.analysis.report",)),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def is_up_to_date(page: Path, made: str) -> bool:
    """Whether a page was made from this, and nothing that belongs to it is missing."""
    try:
        head = page.read_bytes()[:_HEAD_BYTES].decode(errors="replace")
        text = page.with_suffix(".md").read_text()
    except FileNotFoundError:
        return False
    beside = [
        page.parent / "verdicts.csv",
        *(page.parent / image for image in re.findall(r"\]\((figures/.+?)\)", text)),
    ]
    return f'content="{made}"' in head and all(path.exists() for path in beside)


def _files() -> Iterator[Path]:
    yield from (RULES, PUBLISHED, STATEMENT_RULES, STATEMENTS)
    for folder in dict.fromkeys((TEMPLATES, CONF, OWN)):
        yield from sorted(path for path in folder.rglob("*") if path.is_file())
