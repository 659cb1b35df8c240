"""A system, a model and a cluster that nobody knows: one YAML each, and they are in the figures by label and colour."""

from collections.abc import Iterator

import matplotlib as mpl
import pytest
import yaml
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from hiermoe.analysis.claims import load_claims
from hiermoe.analysis.figures import FIGURES, style
from hiermoe.analysis.figures.spec import FigureSpec
from hiermoe.analysis.frames import Results, load
from hiermoe.records.project import CONF
from hiermoe.runs import compose
from hiermoe.runs.indexing import indexed
from hiermoe.runs.run_config import RunConfig
from tests.analysis.conftest import MemoryStore, records_of, write

COLOR = "#12ab34"
NEW = {"system": ("hd_moe", "aurora"), "model": ("deepseek_v3_paper", "borealis"), "cluster": ("h100_ib400", "caldera")}
LABELS = {"system": "Aurora dispatch", "model": "Borealis-9T", "cluster": "8×Caldera, 1 Tb/s a GPU"}
SWEEPS = ("fig10", "fig11", "fig12", "table4", "scaling", "heat_map")


def kept(config: RunConfig) -> bool:
    """Enough of every sweep: synthetic routing, two clusters, two models, two sizes."""
    return (
        config.routing.name in ("uniform", "resampled")
        and config.cluster.name.partition("@")[0] in ("a6000_4x8", "a6000_2x8", "a6000_1x8", "h100_ib400", "caldera")
        and config.model.name in ("qwen3_30b_a3b_paper", "deepseek_v3_paper", "deepseek_v3", "borealis")
        and config.world_size in (None, 8, 64)
    )


@pytest.fixture(scope="module")
def entered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Made-up records of the sweeps as they are expanded with the three new files; the new system is the fastest."""
    conf = tmp_path_factory.mktemp("entered") / "conf"
    for group, (like, name) in NEW.items():
        content = yaml.safe_load((CONF / group / f"{like}.yaml").read_text())
        content |= {"name": name, "label": LABELS[group], "entrant": True}
        content |= {"color": COLOR} if group == "system" else {}
        (conf / group).mkdir(parents=True)
        (conf / group / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    cached = (compose._base, style.color, style.placement, style.model, style.fabric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hiermoe.records.groups.OWN", conf)
        for function in cached:
            function.cache_clear()
        cells = {name: [c for c in compose.expand(name) if kept(c.config)] for name in SWEEPS}
        store = MemoryStore(conf.parent / "runs")
        for config in {c.config.run_id: c.config for sweep in cells.values() for c in sweep}.values():
            rows = records_of(config)
            rows["predicted_ms"] *= 0.25 if config.system.name == "aurora" else 1.0
            write(store, config, rows)
        yield load(indexed(cells), store)
    for function in cached:
        function.cache_clear()


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text().replace("\n", " ") for text in figure.findobj(Text))  # type: ignore[union-attr]


def colors(figure: Figure) -> set[str]:
    """Of all lines, and of the edges of all marks: uniform routing fills marks with a paler tone."""
    lines = [line for line in figure.findobj(Line2D) if isinstance(line, Line2D)]
    return {to_hex(tone) for line in lines for tone in (line.get_color(), line.get_markeredgecolor())}


def seen(spec: FigureSpec, results: Results) -> tuple[Figure, str]:
    """The figure, and everything that is written in it, in its table and about it."""
    table = spec.table(results, load_claims())
    assert not table.empty
    words = spec.words(table)
    with mpl.rc_context(style.SETTINGS):
        figure = spec.draw(table, words.title)
    figure.canvas.draw()
    return figure, "\n".join([texts(figure), words.title, words.caption, *words.text, table.to_csv()])


SIMULATED = [spec for spec in FIGURES if spec.sweep in SWEEPS and "simulated" in spec.sources]


@pytest.mark.slow
@pytest.mark.parametrize("spec", SIMULATED, ids=lambda spec: spec.name)
def test_new_system_is_in_every_figure_that_compares_systems(spec: FigureSpec, entered: Results) -> None:
    figure, written = seen(spec, entered)
    assert LABELS["system"] in written
    assert spec.name == "heat_map" or COLOR in colors(figure)  # whose colours are times


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fig10", "fig11", "balance", "heat_map"])
def test_new_model_is_in_every_figure_that_compares_models(name: str, entered: Results) -> None:
    figure, _ = seen(next(spec for spec in FIGURES if spec.name == name), entered)
    assert LABELS["model"] in texts(figure)


@pytest.mark.parametrize("name", [pytest.param("scaling", marks=pytest.mark.slow), "heat_map"])
def test_new_cluster_is_in_every_figure_that_compares_clusters(name: str, entered: Results) -> None:
    figure, _ = seen(next(spec for spec in FIGURES if spec.name == name), entered)
    assert LABELS["cluster"].replace(",", "") in texts(figure).replace(",", "")
