"""`hiermoe trace fetch`: a public set of routing is brought by git, or taken from a folder, and becomes a trace."""

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from hiermoe.records.project import shown
from hiermoe.routing.importers import IMPORTERS
from hiermoe.routing.importers.as_trace import to_trace
from hiermoe.routing.importers.detection import detected
from hiermoe.routing.importers.recording import Source
from hiermoe.routing.public import PublicSet
from hiermoe.routing.trace import RoutingTrace

_SECONDS = 1800  # that git may take


def fetch(known: PublicSet, folder: Path | None, output: Path, say: Callable[[str], None]) -> RoutingTrace:
    """Bring a set and write its trace.

    Args:
        known: the set.
        folder: that holds it already; None to bring it by git.
        output: the trace to write.
        say: takes what was found.

    Raises:
        ValueError: it cannot be brought, in one line that says what to put where; or what is there is not the set.
    """
    if folder is not None:
        return _imported(known, _in_folder(known, folder), output, say)
    if known.needs is not None:
        raise ValueError(_by_hand(known, known.needs))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".fetch-") as scratch:
        _clone(known, Path(scratch))
        return _imported(known, _in_folder(known, Path(scratch)), output, say)


def _clone(known: PublicSet, folder: Path) -> None:
    """Only the set's files of one commit."""
    steps = [
        ["init", "-q"],
        ["remote", "add", "origin", known.url],
        ["sparse-checkout", "set", "--no-cone", f"/{known.path}/" if known.path else "/*"],
        ["fetch", "-q", "--depth=1", "--filter=blob:none", "origin", known.commit or "HEAD"],
        ["checkout", "-q", "FETCH_HEAD"],
    ]
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1"}
    for step in steps:
        try:
            done = subprocess.run(
                ["git", *step], cwd=folder, env=quiet, capture_output=True, text=True, check=False, timeout=_SECONDS
            )
        except FileNotFoundError:
            raise ValueError(_by_hand(known, "there is no git here")) from None
        except subprocess.TimeoutExpired:
            raise ValueError(_by_hand(known, f"git took more than {_SECONDS} s")) from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"git {step[0]} failed"]
            raise ValueError(_by_hand(known, next((line for line in lines if line.startswith("fatal")), lines[-1])))


def _by_hand(known: PublicSet, reason: str) -> str:
    what = f"{known.path} of {known.url}" if known.path else f"files of {known.url}"
    return (
        f"{known.name} cannot be fetched: {reason}; put {what} into a folder and name it: "
        f"hiermoe trace fetch {known.name} --from FOLDER"
    )


def _in_folder(known: PublicSet, folder: Path) -> Path:
    """Where a folder has the set: as the repository has it, as an archive of its name, or the folder itself."""
    places = [folder / known.path] if known.path else []
    found = next((each for each in (*places, folder / f"{known.name}.npz") if each.exists()), folder)
    if not found.exists():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    return found


def _imported(known: PublicSet, path: Path, output: Path, say: Callable[[str], None]) -> RoutingTrace:
    form, words = detected(path)
    if form not in (known.form, "npz"):
        raise ValueError(f"{path}: {words} (form {form}); {known.name} is of the form {known.form}")
    by_place = known.first_layer if form == "npz" else None
    source = Source(path, topk=known.topk, first_layer=by_place)
    asked = known.num_experts if known.num_experts is not None else "infer"
    command = f"hiermoe trace fetch {known.name}"
    trace = to_trace(IMPORTERS[form].read(source), source, form, known.model or known.name, asked, command)
    origin = f"{known.url}{f', {known.path}' if known.path else ''}{f' at {known.commit}' if known.commit else ''}"
    notes = f"Public set {known.name}: {known.what}; {origin}; licence {known.licence}. {trace.metadata.notes}"
    trace = RoutingTrace(
        trace.expert_ids, trace.num_tokens, trace.metadata.model_copy(update={"notes": notes}), trace.weights
    )
    trace.save(output)
    say(f"{path}: {words} (form {form})")
    say(f"{shown(output)}: {' x '.join(map(str, trace.expert_ids.shape))} of {trace.metadata.num_experts} experts")
    return trace
