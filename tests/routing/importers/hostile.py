"""A bad file is imported by the command: one line that says what is wrong, nothing written, little memory taken."""

import resource
from pathlib import Path

from tests.conftest import Command

MOST_MORE_KIB = 2**20


def check_refused(hiermoe: Command, form: str, path: Path, message: str, *options: str) -> None:
    """The command refuses the file in one line that holds the message."""
    output = path.parent / "out" / "a.trace"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name, more = form.split()[:1], form.split()[1:]
    code, out, err = hiermoe("trace", "import", *name, str(path), "--output", str(output), *more, *options)
    assert code == 2, (out, err)
    assert message in err
    assert len(err.strip().splitlines()) == 1 and out == ""
    assert not output.parent.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MORE_KIB, "memory was taken"
