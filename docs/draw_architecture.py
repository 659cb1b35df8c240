"""Draw docs/architecture.svg from the imports: `python docs/draw_architecture.py`.

A box is a folder, an arrow an import with the number of (file, imported module) pairs behind it; it points at what is
imported. Arrows that others imply are left out of the picture; the file's description holds the counts of all.
"""

import ast
import json
import re
from collections import Counter
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"

WHAT = {
    "records": "what a number is",
    "routing": "what tokens want",
    "model": "whose sizes",
    "topology": "where things are",
    "planner": "what it would cost",
    "policies": "where experts go",
    "dispatch": "how tokens move",
    "ranks": "where a run happens",
    "megatron": "for users",
    "narrow": "siblings for traces",
    "measure": "what is measured",
    "runs": "one run, its records",
    "analysis": "records to answers",
    "advice": "would it help you",
    "commands": "one file a command",
    "baselines": "other systems",
}
# Column and row of each box: in their order, what may be imported above what imports it.
PLACES = {"records": (1, 0), "routing": (0, 1), "model": (2, 1), "topology": (1, 2), "planner": (1, 3)}
PLACES |= {"policies": (1, 4), "dispatch": (1, 5), "baselines": (0, 5), "ranks": (0, 6), "megatron": (2, 6)}
PLACES |= {"narrow": (2, 7), "measure": (1, 8), "runs": (0, 9), "analysis": (2, 9), "advice": (2, 10)}
PLACES |= {"commands": (1, 11)}
TONES = {"commands": "#F2F2F2", "advice": "#FBE9D8", "analysis": "#FBE9D8", "runs": "#E3EEF9", "measure": "#E3EEF9"}
TONES |= {"megatron": "#F9E4EC", "narrow": "#F9E4EC", "baselines": "#F2F2F2"}


def import_counts() -> dict[str, dict[str, int]]:
    """Importing folder -> imported folder -> pairs of a file and a module of that folder that it imports."""
    counts: dict[str, Counter[str]] = {folder: Counter() for folder in WHAT}
    for path in sorted([*ROOT.glob("hiermoe/*/**/*.py"), ROOT / "hiermoe" / "model.py", *ROOT.glob("baselines/*.py")]):
        importer = _folder(".".join(path.relative_to(ROOT).with_suffix("").parts))
        modules = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module or "")
        counts[importer].update(folder for name in modules if (folder := _folder(name)) in WHAT and folder != importer)
    return {importer: dict(sorted(imported.items())) for importer, imported in counts.items()}


def _folder(module: str) -> str:
    package, _, rest = module.partition(".")
    return {"hiermoe": rest.split(".")[0], "baselines": "baselines"}.get(package, "")


def drawn_counts() -> dict[str, dict[str, int]]:
    """The counts that the picture was drawn from."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", PICTURE.read_text(), re.DOTALL)
    assert found is not None, f"{PICTURE} holds no counts"
    return json.loads(found[1].replace("&quot;", '"'))


def _above(counts: dict[str, dict[str, int]], folder: str) -> set[str]:
    """Everything that a folder imports, directly or not."""
    return set().union(*({direct} | _above(counts, direct) for direct in counts[folder]))


def draw(counts: dict[str, dict[str, int]]) -> Figure:
    """The picture: what is imported stands above what imports it."""
    place = {folder: (column * 3.1, -1.25 * row) for folder, (column, row) in PLACES.items()}
    rows = 1 + max(row for _, row in PLACES.values())
    figure = Figure(figsize=(9, 0.78 * rows))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-1.6, 7.8)
    axes.set_ylim(-1.25 * (rows - 1) - 0.7, 0.7)
    for folder, imported in counts.items():
        implied = set().union(*(_above(counts, direct) for direct in imported))
        for other in sorted(set(imported) - implied):
            (x, y), (to_x, to_y) = place[folder], place[other]
            start, end, bend = (x, y + 0.38), (to_x, to_y - 0.38), 0.0
            if x == to_x and to_y - y > 1.3:  # around the boxes between
                start, end, bend = (x + 1.1, y), (to_x + 1.1, to_y), 0.12
            axes.add_patch(
                FancyArrowPatch(
                    start, end, arrowstyle="-|>", mutation_scale=10, color="#777777", linewidth=1.1, zorder=1,
                    connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0,
                )
            )  # fmt: skip
            side = bend * (end[1] - start[1]) / 3  # about the middle of the curve
            axes.text(
                (start[0] + end[0]) / 2 + side, (start[1] + end[1]) / 2, str(imported[other]), fontsize=8, zorder=3,
                color="#444444", ha="center", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
            )  # fmt: skip
    for folder, (x, y) in place.items():
        axes.add_patch(
            FancyBboxPatch(
                (x - 1.1, y - 0.36), 2.2, 0.72, boxstyle="round,pad=0,rounding_size=0.1", zorder=2, linewidth=1,
                facecolor=TONES.get(folder, "#E6F4EA"), edgecolor="#555555",
            )
        )  # fmt: skip
        name = f"{folder}.py" if folder == "model" else f"{folder}/"
        axes.text(x, y + 0.13, name, fontsize=11, fontweight="bold", ha="center", va="center", zorder=4)
        axes.text(x, y - 0.17, WHAT[folder], fontsize=8, ha="center", va="center", zorder=4, color="#333333")
    return figure


def main() -> None:
    """Write the picture; the same imports give the same bytes."""
    counts = import_counts()
    with mpl.rc_context({"svg.hashsalt": "hiermoe", "svg.fonttype": "none", "font.family": "sans-serif"}):
        draw(counts).savefig(PICTURE, metadata={"Date": None, "Creator": None, "Description": json.dumps(counts)})


if __name__ == "__main__":
    main()
