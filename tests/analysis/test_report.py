"""The report: every figure is drawn and has its data, nothing is left open, nothing is loaded from elsewhere."""

import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from hiermoe.analysis.claims import load_claims
from hiermoe.analysis.figures import FIGURES
from hiermoe.analysis.figures.spec import FigureSpec, render
from hiermoe.analysis.frames import Results, load
from hiermoe.analysis.report import write_reference, write_report
from hiermoe.records.project import RULES
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import Cell
from hiermoe.runs.indexing import indexed
from tests.analysis.conftest import records_of, write

SIMULATED = [spec for spec in FIGURES if "simulated" in spec.sources]
DRAWN = ["main", *(spec.name for spec in SIMULATED), "planner_cost_local"]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(
    cells: dict[str, list[Cell]], filled: RunStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, pd.DataFrame]:
    report = write_report(indexed(cells), filled, tmp_path_factory.mktemp("report"))
    return report.page.parent, report.verdicts


@pytest.mark.parametrize("spec", SIMULATED, ids=lambda spec: spec.name)
def test_figure_is_drawn_with_its_data_beside_it(spec: FigureSpec, written: tuple[Path, pd.DataFrame]) -> None:
    stem = written[0] / "figures" / spec.name
    with Image.open(stem.with_suffix(".png")) as image:
        assert image.width >= 1400
        assert len(image.convert("L").getcolors() or []) > 10  # not blank
    assert stem.with_suffix(".pdf").stat().st_size > 5000
    assert set(pd.read_csv(stem.with_suffix(".csv"))["source"]) == {"simulated"}


def test_verdicts_are_written_as_they_are_returned(written: tuple[Path, pd.DataFrame]) -> None:
    folder, verdicts = written
    stored = pd.read_csv(folder / "verdicts.csv")
    assert stored["verdict"].tolist() == verdicts["verdict"].tolist()
    assert set(stored["claim"]) == {claim.claim for claim in load_claims()}


def test_nothing_is_left_open(written: tuple[Path, pd.DataFrame]) -> None:
    for name in ("report.md", "report.html"):
        text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", (written[0] / name).read_text())
        for sign in ("{{", "}}", "{%", "Undefined", "None", "NaN", "nan ", "TODO"):
            assert sign not in text, f"{sign} in {name}"


def test_page_needs_nothing_beside_itself(written: tuple[Path, pd.DataFrame]) -> None:
    page = (written[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(DRAWN)
    assert not re.findall(r"<(?:link|script|iframe)\b", page)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "@import" not in page and "url(" not in page
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_text_links_every_figure_and_says_what_is_left_out(written: tuple[Path, pd.DataFrame]) -> None:
    text = (written[0] / "report.md").read_text()
    for link in re.findall(r"\]\((.*?\.png)\)", text):
        assert (written[0] / link).exists()
    assert text.count("](figures/") == len(DRAWN)
    assert "no trace was recorded" in text


def test_table_of_a_figure_stands_below_it(written: tuple[Path, pd.DataFrame]) -> None:
    text = (written[0] / "report.md").read_text()
    section = text.split("](figures/placement.png)")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| model | routing | placement |")
    assert lines[1] == "|" + "---|" * (lines[0].count("|") - 1)
    assert len(lines) == 2 + 3 * 5  # Qwen3 on two routings, DeepSeek-V3 on one
    assert "<table>" in (written[0] / "report.html").read_text().split("Placement: what each policy gains")[1]


def test_text_names_no_folder_of_this_machine(written: tuple[Path, pd.DataFrame], filled: RunStore) -> None:
    text = (written[0] / "report.md").read_text()
    assert str(filled.folder) not in text
    assert str(Path(__file__).resolve().parents[2]) not in text


def test_reference_is_small_and_complete(written: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    folder = write_reference(tmp_path / "reference", written[0])
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"report.md", *(f"{name}.png" for name in DRAWN)}
    assert sum(path.stat().st_size for path in files) < 2e6


def test_report_is_written_again_only_where_something_in_it_has_changed(
    cells: dict[str, list[Cell]], small_store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: cells[name][:8] for name in ("fig11", "fig9")}
    configs = [one.config for sweep in few.values() for one in sweep]

    def written() -> bool:
        report = write_report(indexed(few), small_store, tmp_path)
        pd.testing.assert_frame_equal(report.verdicts, pd.read_csv(tmp_path / "verdicts.csv"), check_dtype=False)
        return report.is_new

    for config in configs:
        write(small_store, config, records_of(config))
    assert written() and not written()
    write(small_store, configs[0], records_of(configs[0]))  # another record of the same run
    assert written() and not written()
    (tmp_path / "figures" / "main.png").unlink()
    assert written() and not written()
    rules = tmp_path / "claims.yaml"
    rules.write_text(RULES.read_text() + "# another\n")
    monkeypatch.setattr("hiermoe.analysis.up_to_date.RULES", rules)
    assert written() and not written()


def test_report_without_records_says_so(cells: dict[str, list[Cell]], tmp_path: Path) -> None:
    report = write_report(indexed(cells), RunStore(tmp_path / "none"), tmp_path)
    assert set(report.verdicts["verdict"]) == {"not testable"}
    text = (report.page.parent / "report.md").read_text()
    # Beside them loss curves, and whole steps and measured runs of two kinds each.
    absent = text.split("## Not in this report")[1].split("\n## ")[0]
    assert absent.count("\n- ") == len(DRAWN) - 1 + 5
    assert text.startswith("# HierMoE, reproduced\n\n**No run has a record yet")
    assert "`make reproduce ON=slurm NODES=4 GPUS_PER_NODE=8` measures on a cluster" in text
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("present", [{"megatron"}, {"megatron", "hd_moe"}, {"hiermoe", "h1", "hd2"}])
def test_half_a_sweep_is_drawn_or_left_out_but_never_crashes(
    present: set[str], cells: dict[str, list[Cell]], small_store: RunStore
) -> None:
    some = {
        name: [c for c in sweep if c.config.routing is None or c.config.routing.name == "uniform"]
        for name, sweep in cells.items()
    }
    for config in {c.config.run_id: c.config for sweep in some.values() for c in sweep}.values():
        if config.system is None or (
            config.system.name in present
            and config.model.name == "qwen3_30b_a3b_paper"
            and config.model.num_experts == 128
        ):
            write(small_store, config, records_of(config))
    results = load(indexed(some), small_store)
    for spec, source in ((one, source) for one in FIGURES for source in one.sources):
        table = spec.table(results.of_source(source), load_claims())
        if not table.empty:
            spec.words(table)
            spec.draw(table, "a title")


def test_figures_leave_models_without_the_leading_routing_on_their_own(results: Results) -> None:
    """Recorded routing exists for one model only: the other is shown on what it has, and the panel says so."""
    spec = next(spec for spec in FIGURES if spec.name == "fig10")
    figure = spec.draw(spec.table(results, load_claims()), "a title")
    assert [panel.get_title() or panel.get_title("left") for panel in figure.axes] == [
        "Qwen3-30B-A3B (paper's, 32 layers), recorded routing",
        "DeepSeek-V3 (paper's, half width), uniform routing",
    ]


def test_figure_is_drawn_again_only_if_something_about_it_has_changed(results: Results, tmp_path: Path) -> None:
    spec = next(spec for spec in FIGURES if spec.name == "fig12")
    table, files = spec.table(results, load_claims()), [tmp_path / f"fig12{end}" for end in (".png", ".pdf", ".csv")]

    def drawn(table: pd.DataFrame, spec: FigureSpec = spec) -> bool:
        """Whether rendering writes the picture anew."""
        before = files[0].stat().st_mtime_ns if files[0].exists() else 0
        assert render(spec, table, tmp_path, "fig12") == spec.words(table)
        return files[0].stat().st_mtime_ns != before

    assert drawn(table) and not drawn(table)
    assert drawn(table.iloc[1:])
    files[1].unlink()
    assert drawn(table.iloc[1:]) and files[1].exists()
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert drawn(table.iloc[1:])
