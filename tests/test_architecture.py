"""The drawing of the house shows the imports that there are."""

from docs.draw_architecture import PLACES, WHAT, drawn_counts, import_counts
from tests.test_layers import ORDER


def test_drawing_is_up_to_date() -> None:
    assert drawn_counts() == import_counts(), "run python docs/draw_architecture.py"


def test_every_folder_has_a_box() -> None:
    assert WHAT.keys() == PLACES.keys() == {*ORDER, "baselines"}
