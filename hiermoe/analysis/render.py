"""From one Markdown text to a page that needs nothing beside itself."""

import base64
import html
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt

from hiermoe.analysis.verdicts import VERDICTS
from hiermoe.records.project import TEMPLATES


def environment() -> Environment:
    """Templates in which a missing value is an error."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def to_html(markdown: str, title: str, folder: Path, made_from: str = "") -> str:
    """A page with its style and images inside.

    Args:
        markdown: the report; images are linked relative to ``folder``.
        title: of the page.
        folder: where the images are.
        made_from: name of all that it shows, for who asks whether it is still true.

    Raises:
        FileNotFoundError: an image that the text links to is missing.
    """
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    body = re.sub(r'<img src="([^":]+\.png)"', lambda m: f'<img src="{_data_uri(folder / m[1])}"', body)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    for verdict in VERDICTS:
        name = verdict.replace(" ", "-")
        body = re.sub(rf"(\S {verdict})(?=</td>|<br)", rf'<span class="verdict {name}">\1</span>', body)
    headings = re.findall(r"<h2>(.*?)</h2>", body)
    contents = [(re.sub(r"\W+", "-", heading.lower()).strip("-"), heading) for heading in headings]
    for anchor, heading in contents:
        body = body.replace(f"<h2>{heading}</h2>", f'<h2 id="{anchor}">{heading}</h2>', 1)
    style = (TEMPLATES / "style.css").read_text()
    page = environment().get_template("page.html.j2")
    return page.render(title=html.escape(title), made_from=made_from, style=style, body=body, contents=contents)


def _data_uri(image: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
