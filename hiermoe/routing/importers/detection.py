"""Which form a file is of: every importer is asked, and one must answer."""

from pathlib import Path

from hiermoe.routing.importers import IMPORTERS
from hiermoe.routing.load_forms import LOAD_FORMS


def detected(path: Path) -> tuple[str, str]:
    """Name of the form, and what was found, in words.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no importer knows it, or several do.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    answers = {name: importer.recognized(path) for name, importer in IMPORTERS.items()}
    found = {name: words for name, words in answers.items() if words}
    if len(found) == 1:
        return next(iter(found.items()))
    if not found and (loads := [words for form in LOAD_FORMS.values() if (words := form.recognized(path))]):
        raise ValueError(f"{path}: {loads[0]}: loads alone, no tokens; hiermoe advise loads={path} takes them")
    if not found:
        raise ValueError(f"{path}: no form is recognized in it; name one of {', '.join(sorted(IMPORTERS))} before it")
    both = "; ".join(f"{name}: {words}" for name, words in found.items())
    raise ValueError(f"{path}: it may be of several forms ({both}); name one of them before it")
