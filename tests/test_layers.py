"""The rules of the house that its source files keep, and that each of them would be noticed if it were broken."""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePosixPath

import pytest

from hiermoe.records.project import CODE

ORDER = ["records", "routing", "model", "topology", "planner", "policies", "dispatch", "ranks", "megatron", "narrow"]
ORDER += ["measure", "runs", "analysis", "advice", "commands"]
LAST_OF_BASELINES = "dispatch"
READERS = ("analysis", "advice")  # of records: they take an index of runs, and neither compose nor run anything

FILES = [path for package in ("hiermoe", "baselines") for path in sorted((CODE / package).rglob("*.py"))]
SOURCES = {path.relative_to(CODE).as_posix(): path.read_text() for path in FILES}

MODULE = re.compile(r"(hiermoe|baselines)(\.\w+)*\.\w*")  # or the beginning of one, in an f-string

Sources = dict[str, str]  # text by path from the project's root


@cache
def parsed(text: str) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(text)


def ours(sources: Sources) -> Iterator[tuple[str, ast.Module]]:
    """The files of hiermoe/, parsed."""
    return ((path, parsed(text)) for path, text in sources.items() if path.startswith("hiermoe/"))


def folder_of(path: str) -> str:
    """Where in the order a file stands: its folder, or itself where it lies beside the folders."""
    parts = PurePosixPath(path).with_suffix("").parts
    return parts[0] if parts[0] == "baselines" else parts[1]


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Everything that a module imports, dotted, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from ((f"{dots}{node.module or ''}.{alias.name}", node.lineno) for alias in node.names)


def named_in_strings(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Modules that are named in strings, to be imported by them, with their line. Docstrings name nothing."""
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in said and MODULE.fullmatch(str(node.value)):
            yield str(node.value), node.lineno


def imports_run_downwards(sources: Sources) -> list[str]:
    """Each folder imports from those above it alone, and hiermoe/ never imports baselines/."""
    return _upwards(sources, imported)


def strings_run_downwards(sources: Sources) -> list[str]:
    """So do names of modules in strings."""
    return _upwards(sources, named_in_strings)


def _upwards(sources: Sources, names: Callable[[ast.Module], Iterator[tuple[str, int]]]) -> list[str]:
    found = []
    for path, text in sources.items():
        folder = folder_of(path)
        last = {"baselines": LAST_OF_BASELINES, "__init__": None, "__main__": ORDER[-1]}.get(folder, folder)
        allowed = ORDER[: ORDER.index(last) + 1] if last else []
        for name, line in names(parsed(text)):
            package, _, rest = name.partition(".")
            below = package == "hiermoe" and rest.split(".")[0] in ORDER and rest.split(".")[0] not in allowed
            if below or package == "" or (package == "baselines" and folder != "baselines"):
                found.append(f"{path}:{line} imports {name}")
    return found


def files_import_in_no_circle(sources: Sources) -> list[str]:
    """No file imports another that imports it, straight or over others, be it inside a function."""
    files = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    graph = {
        path: {files[name if name in files else name.rpartition(".")[0]] for name in names} - {path}
        for path, text in sources.items()
        for names in [[n for n, _ in imported(parsed(text)) if {n, n.rpartition(".")[0]} & files.keys()]]
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def readers_run_nothing(sources: Sources) -> list[str]:
    """analysis/ and advice/ read records: they import neither runs/ nor Hydra."""
    return [
        f"{path}:{line} imports {name}"
        for path, tree in ours(sources)
        if folder_of(path) in READERS
        for name, line in (*imported(tree), *named_in_strings(tree))
        if name.split(".")[0] == "hydra" or name.split(".")[:2] == ["hiermoe", "runs"]
    ]


def file_names_are_unique(sources: Sources) -> list[str]:
    """No file name stands twice under hiermoe/, but ``__init__.py``."""
    names = Counter(PurePosixPath(path).name for path, _ in ours(sources))
    return [name for name, number in names.items() if number > 1 and name != "__init__.py"]


def peers_alone_know_lanes(sources: Sources) -> list[str]:
    """Which GPU of a group one is (a remainder by the group's size) is for topology/ alone to say."""
    found = []
    for path, tree in ours(sources):
        sizes = {"lanes"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and any(_asks_lanes(part) for part in ast.walk(node.value)):
                sizes |= {part.id for to in node.targets for part in ast.walk(to) if isinstance(part, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
                by_lanes = _asks_lanes(node.right) or (isinstance(node.right, ast.Name) and node.right.id in sizes)
                found += [f"{path}:{node.lineno} takes a lane"] * (by_lanes and folder_of(path) != "topology")
    return found


def _asks_lanes(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "lanes"


def bytes_are_priced_in_one_place(sources: Sources) -> list[str]:
    """One file multiplies beta; all of them where there are several."""
    places = []
    for path, tree in ours(sources):
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            products = (x for x in ast.walk(function) if isinstance(x, ast.BinOp) and isinstance(x.op, ast.Mult))
            places += [f"{path}: {function.name}" for x in products if _is_beta(x.left) or _is_beta(x.right)]
    return places if len({place.partition(":")[0] for place in places}) > 1 else []


def _is_beta(node: ast.expr) -> bool:
    named = {ast.Attribute: "attr", ast.Name: "id"}.get(type(node))
    name = getattr(node, named) if named else getattr(getattr(node, "slice", None), "value", "")
    return isinstance(name, str) and name.endswith("beta_ms_per_byte")


def files_are_short(sources: Sources) -> list[str]:
    """No file has more than 400 lines."""
    return [path for path, text in sources.items() if len(text.splitlines()) > 400]


def files_are_named_for_what_they_do(sources: Sources) -> list[str]:
    """No module is called utils, helpers or common."""
    return [path for path in sources if PurePosixPath(path).stem in ("utils", "helpers", "common")]


def modules_say_what_they_are(sources: Sources) -> list[str]:
    """Every module begins with a docstring."""
    return [path for path, tree in ours(sources) if not ast.get_docstring(tree)]


# What breaks each rule, in a house of two files.
BROKEN: list[tuple[Callable[[Sources], list[str]], Sources]] = [
    (imports_run_downwards, {"hiermoe/planner/a.py": "from hiermoe.measure.walk import walk"}),
    (imports_run_downwards, {"hiermoe/planner/a.py": "from hiermoe import measure"}),
    (imports_run_downwards, {"hiermoe/model.py": "def f():\n    import hiermoe.topology.cluster"}),
    (strings_run_downwards, {"hiermoe/ranks/a.py": '"""Docs."""\nPRELOAD = ["hiermoe.narrow.models"]'}),
    (strings_run_downwards, {"hiermoe/ranks/a.py": 'name = f"hiermoe.measure.{kind}"'}),
    (imports_run_downwards, {"hiermoe/commands/a.py": "import baselines.megatron"}),
    (strings_run_downwards, {"hiermoe/commands/a.py": 'default = "baselines.megatron"'}),
    (imports_run_downwards, {"hiermoe/commands/a.py": "from .b import c"}),
    (imports_run_downwards, {"hiermoe/__init__.py": "import hiermoe.records.store"}),
    (imports_run_downwards, {"baselines/a.py": "import hiermoe.ranks.launch"}),
    (
        files_import_in_no_circle,
        {
            "hiermoe/measure/a.py": "from hiermoe.measure.b import B",
            "hiermoe/measure/b.py": "def f():\n    from hiermoe.measure.a import A",
        },
    ),
    (readers_run_nothing, {"hiermoe/analysis/a.py": "from hiermoe.runs.sweep import expand"}),
    (readers_run_nothing, {"hiermoe/advice/a.py": "def f():\n    from hydra import compose"}),
    (file_names_are_unique, {"hiermoe/ranks/a.py": "", "hiermoe/dispatch/a.py": ""}),
    (peers_alone_know_lanes, {"hiermoe/dispatch/a.py": "x = rank % hierarchy.lanes(level)"}),
    (peers_alone_know_lanes, {"hiermoe/dispatch/a.py": "n = h.lanes(2)\nx = rank // n % n"}),
    (bytes_are_priced_in_one_place, {f"hiermoe/{n}.py": "def f(c, n): return n * c.beta_ms_per_byte" for n in "ab"}),
    (bytes_are_priced_in_one_place, {f"hiermoe/{n}.py": 'def f(c): return c["beta_ms_per_byte"] * 2' for n in "ab"}),
    (files_are_short, {"hiermoe/ranks/a.py": "pass\n" * 401}),
    (files_are_named_for_what_they_do, {"hiermoe/ranks/utils.py": ""}),
    (modules_say_what_they_are, {"hiermoe/ranks/a.py": "# Docs.\npass"}),
]
RULES = list(dict.fromkeys(rule for rule, _ in BROKEN))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_keeps_its_rule(rule: Callable[[Sources], list[str]]) -> None:
    broken = rule(SOURCES)
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(("rule", "sources"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_rule_is_noticed(rule: Callable[[Sources], list[str]], sources: Sources) -> None:
    assert len(rule(sources)) == (2 if rule is bytes_are_priced_in_one_place else 1)


def test_every_folder_has_its_place_in_the_order() -> None:
    assert {folder_of(path) for path in SOURCES} == {*ORDER, "__init__", "__main__", "baselines"}


def test_docstrings_may_name_anything() -> None:
    assert not strings_run_downwards({"hiermoe/records/a.py": '"""hiermoe.measure.walk"""\nimport pandas'})
