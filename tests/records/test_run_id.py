"""A run's name changes with what the code says that makes its numbers, and with nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hiermoe.records.run_id import _read, code_digest, reachable, run_id
from tests.conftest import Composer

PRICE = '''"""What a row costs."""

from hiermoe.planner.counts import count, rank
import math


def price(rows: int, beta: float) -> float:
    """Rows times beta."""
    # rounded up
    return math.ceil(count(rows) + rank) * beta
'''
COUNTS = "rank = 3\n\n\ndef count(rows):\n    return rows\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes modules of a small project, and gives the digest of what can be reached from one of them."""

    def write(begin: str, **files: str) -> str:
        for name, text in files.items():
            path = tmp_path / "hiermoe" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        code_digest.cache_clear()
        _read.cache_clear()
        return code_digest((begin,), tmp_path)

    return write


def test_comments_docstrings_and_format_do_not_count(write: Callable[..., str]) -> None:
    before = write("hiermoe.planner.price", planner__price=PRICE, planner__counts=COUNTS)
    changed = PRICE.replace("# rounded up", "# to whole rows, since no half row travels").replace(
        '"""Rows', '"""Many rows'
    )
    changed = changed.replace("rows: int, beta: float", "\n    rows: int,\n    beta: float,\n")
    changed = changed.replace("count, rank", "(rank, count)")
    assert changed != PRICE
    assert write("hiermoe.planner.price", planner__price=changed) == before


def test_a_moved_file_does_not_count(write: Callable[..., str], tmp_path: Path) -> None:
    before = write("hiermoe.planner.price", planner__price=PRICE, planner__counts=COUNTS)
    (tmp_path / "hiermoe" / "planner" / "counts.py").unlink()
    moved = "import math\n\nfrom hiermoe.a.b.counts import count, rank\n" + PRICE.split("import math")[1]
    assert write("hiermoe.cost.price", cost__price=moved, a__b__counts=COUNTS) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [("+ rank", "- rank"), ("ceil", "floor"), ("count, rank", "count, rank2 as rank"), ("import math", "")],
)
def test_what_is_computed_counts(write: Callable[..., str], old: str, new: str) -> None:
    before = write("hiermoe.planner.price", planner__price=PRICE, planner__counts=COUNTS)
    assert write("hiermoe.planner.price", planner__price=PRICE.replace(old, new)) != before


def test_what_is_imported_counts_and_what_is_not_does_not(write: Callable[..., str]) -> None:
    files = {"planner__price": PRICE, "planner__counts": COUNTS}
    before = write("hiermoe.planner.price", **files)
    assert write("hiermoe.planner.price", planner__other="x = 1\n") == before
    assert write("hiermoe.planner.price", planner__counts=COUNTS.replace("3", "4")) != before


def test_what_a_run_can_reach_is_all_that_it_imports() -> None:
    simulated = reachable(("hiermoe.measure.predict",))
    measured = reachable(("hiermoe.measure.replay",))
    assert {"hiermoe.planner.traffic", "hiermoe.topology.hierarchy"} <= simulated
    assert not any(module.startswith("hiermoe.dispatch") for module in simulated)
    # imported inside functions, since only ranks pay for it
    assert {"hiermoe.measure.bench_layer", "hiermoe.dispatch.exchange", "hiermoe.planner.traffic"} <= measured


def test_targets_count_by_their_code_and_wherever_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"system": {"name": "s"}, "model": {"name": "m"}}

    def named(target: str) -> str:
        return run_id(config | {"policy": {"_target_": target}}, ())

    assert named("baselines.smartmoe.SmartMoEPolicy") != named("baselines.smartmoe.pack")
    without_code = named("nowhere.smartmoe.SmartMoEPolicy")
    assert named("elsewhere.smartmoe.SmartMoEPolicy") == without_code != named("baselines.smartmoe.SmartMoEPolicy")


def test_the_host_counts_where_it_measures() -> None:
    config = {"system": {"name": "s"}, "model": {"name": "m"}}
    assert len({run_id(config, (), host=host) for host in (None, "here", "there")}) == 3


def test_only_what_this_machine_measures_is_named_by_it(composed: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ((), ("measure=replay", "ranks=local", "world_size=8"))
    ids = []
    for host in ("here", "there"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        ids.append([composed(*kind).run_id for kind in kinds])
    (simulated, here), (simulated_again, there) = ids
    assert simulated == simulated_again and here != there
    assert composed(*kinds[1]).named_on("here", {}) == here


def test_how_a_thing_is_shown_changes_no_id() -> None:
    bare = {"system": {"name": "s"}, "model": {"name": "m"}, "cluster": {"levels": [{"name": "node"}]}}
    looks = {"label": "Aurora", "color": "#12AB34", "placement_label": "x", "placement_color": None, "entrant": True}
    shown = {
        "system": {"name": "s", **looks},
        "model": {"name": "m", **looks},
        "cluster": {"levels": [{"name": "node", "label": "nodes"}], **looks},
    }
    assert run_id(bare, ()) == run_id(shown, ())
    assert run_id(bare, ()) != run_id({**bare, "seed": 1}, ())
