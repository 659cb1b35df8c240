"""A run is named by its content: its options and what the code that produces its numbers says.

Code counts by its syntax tree, without docstrings, comments and formatting, and wherever its files lie: a module counts
under its last name, which no two have in common. Only the modules count that a run can reach by imports from where it
begins, what its configuration names in ``_target_`` among them, and a user's own in the workplace as the project's.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hiermoe.records.options import options
from hiermoe.records.project import CODE, WORKPLACE

_PACKAGES = ("hiermoe", "baselines")
_SCHEMA = "hiermoe.records.schema"  # old columns must not be read as new ones


def run_id(
    config: dict[str, Any],
    modules: Sequence[str],
    inputs: tuple[Path, ...] = (),
    *,
    host: str | None = None,
) -> str:
    """Name of a run.

    Args:
        config: the resolved configuration, without what does not change numbers (logging); its options count.
        modules: dotted names of those that the run begins in.
        inputs: files that the run reads; their content counts, not their path. A missing file counts as missing.
        host: where its numbers are measured, if they are that machine's. The nodes of a cluster are as good as each
            other; its constants count, in ``config``.

    Returns:
        ``<system>-<model>-<16 hexadecimal digits>``; without a system ``<measure>-<cluster>-...``.
    """
    targets = sorted({target.rpartition(".")[0] for target in _targets(config)})
    content = {
        "config": options(config),
        "code": code_digest((_SCHEMA, *modules, *targets)),
        "inputs": [file_digest(path) for path in inputs],
    }
    if host is not None:
        content["host"] = host
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    if config.get("system") is None:
        return f"{config['measure']}-{config['cluster']['name']}-{digest}"
    return f"{config['system']['name']}-{config['model']['name']}-{digest}"


@lru_cache(maxsize=64)
def code_digest(modules: tuple[str, ...], root: Path = CODE) -> str:
    """Hash of the project's code that can be reached from some modules.

    Args:
        modules: dotted names.
        root: folder that the project's packages are in.
    """
    digests = sorted((module.rpartition(".")[2], _read(module, root).code) for module in reachable(modules, root))
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def reachable(modules: Iterable[str], root: Path = CODE) -> set[str]:
    """The project's modules that these import, directly or not, anywhere in their text; themselves included."""
    found: set[str] = set()
    waiting = [module for module in modules if _path(module, root) is not None]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += _read(module, root).imported
    return found


@dataclass(frozen=True)
class _Module:
    """A module as it is read.

    Attributes:
        imported: what its text imports of the project; a user's own too, of another own one.
        code: hash of what it says.
    """

    imported: tuple[str, ...]
    code: str


@lru_cache(maxsize=1024)
def _read(module: str, root: Path) -> _Module:
    path = _path(module, root)
    assert path is not None
    tree = ast.parse(path.read_bytes())
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    named = [name if _path(name, root) is not None else asked for node in imports for asked, name, _ in _names(node)]
    ours = [name for name in named if _path(name, root) is not None and (_is_ours(name) or not _is_ours(module))]
    for node in nodes:
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, _meant(statements, root))
    return _Module(tuple(ours), hashlib.sha256(ast.dump(tree).encode()).hexdigest())


def _meant(statements: list[ast.stmt], root: Path) -> list[ast.AST]:
    """Statements without strings that only stand there, and with one sorted list of names in the place of imports."""
    kept, imported = [], []
    for statement in statements:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for module, name, known_as in _names(statement):
                ours = _is_ours(name)
                where = module if ours and _path(name, root) is None else name  # of ours only the last name counts
                imported.append(f"{where.rpartition('.')[2]} {name.rpartition('.')[2]}" if ours else name)
                imported[-1] += f" as {known_as}"
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            kept.append(statement)
    return [*(ast.Constant(name) for name in sorted(imported)), *kept]


def _names(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str, str]]:
    """Of each imported thing the module that it is asked from, its whole dotted name, and what it is called here."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            yield alias.name, alias.name, alias.asname or alias.name.partition(".")[0]
        else:
            yield node.module or "", f"{node.module}.{alias.name}", alias.asname or alias.name


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in _PACKAGES


def _path(module: str, root: Path) -> Path | None:
    """The file of a module of the project, or of a user's own in the workplace; None for anything else."""
    stem = (root if _is_ours(module) else WORKPLACE) / module.replace(".", "/")
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def _targets(value: Any) -> Iterator[str]:
    """Every ``_target_`` of a configuration."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield str(value["_target_"])
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _targets(item)


def file_digest(path: Path) -> str | None:
    """Of what a file says; None of one that is not there."""
    return _file_digest(path, path.stat().st_mtime_ns) if path.exists() else None


@lru_cache(maxsize=256)
def _file_digest(path: Path, modified_ns: int) -> str:
    """Content hash; the modification time only keys the cache."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
