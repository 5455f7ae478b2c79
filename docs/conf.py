"""Sphinx's settings for the site: `make docs` writes it to docs/_build/html."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

from yoloxkd.assembly.recipe_rows import recipe_rows
from yoloxkd.version import __version__

project = "yoloxkd"
author = "the yoloxkd authors"
copyright = "the yoloxkd authors, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "results/*/**"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "html_image"]
default_role = "code"  # single backquotes in docstrings
myst_heading_anchors = 4  # links to a heading, as in `runs.md#resuming`

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"  # light and dark by the reader's system; nothing is fetched when a page is read
html_title = f"yoloxkd {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5fa5", "color-brand-content": "#0b5fa5"},
    "dark_css_variables": {"color-brand-primary": "#7cc4ff", "color-brand-content": "#7cc4ff"},
}
highlight_language = "text"


ROOT = Path(__file__).parent.parent
PAGES = {"changelog": "CHANGELOG.md", "export-consumers": "export/README.md", "benchmarks": "benchmarks/results.md"}
"""Pages of the site whose text lies elsewhere in the repository."""


def _linked(target: str, folder: Path) -> str:
    """A relative link of a file in `folder`, as a page of the site."""
    path, _, heading = target.partition("#")
    file = os.path.relpath((folder / path).resolve(), ROOT)
    if (ROOT / file).is_dir():  # a run's folder, which a site cannot show
        file += "/results.csv"
    page = next((f"{name}.md" for name, place in PAGES.items() if place == file), os.path.relpath(file, "docs"))
    return f"/{page}#{heading}" if heading else f"/{page}"


def _recipe_table() -> str:
    """A row for each recipe with a teacher: its command, what its first line says of the paper's table, and what ran here."""
    lines, options = [], {}
    for file in sorted((ROOT / "cfg" / "recipes").glob("*.yaml")):
        text = file.read_text("utf-8")
        first = text.splitlines()[0]
        if first.startswith(("# FGD", "# PGD")):
            options[file.stem] = "" if re.search("^data:", text, re.M) else " --data coco"
            options[file.stem] += " --teacher FILE" if "--teacher FILE" in text else ""
            lines.append((file.stem, options[file.stem], first.removeprefix("# ").rstrip("."), "two steps, made small"))
    for name, row in recipe_rows().items():
        lines.append((name, options[row.like], row.describe().splitlines()[0].rstrip("."), "its settings are checked"))
    rows = [
        f"| `yoloxkd train --recipe {name}{more}` | {what.replace('|', '/')} | {here} |"
        for name, more, what, here in lines
    ]
    return "\n".join(["", "| command | the paper's row and figure | run here |", "|---|---|---|", *rows, ""])


def _from_the_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    place = PAGES.get(docname, f"docs/{docname}.md")
    text = (ROOT / place).read_text("utf-8")
    folder = (ROOT / place).parent
    text += _recipe_table() if docname == "recipes" else ""
    link = re.compile(r"(?<!!)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")  # no images: those lie beside the pages
    figure = re.compile(r"[\d.]+ ± [\d.]+|\[[+-][\d.]+, [+-][\d.]+\]")  # stays on one line
    text = figure.sub(lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    source[0] = link.sub(lambda found: f"{found[1]}({_linked(found[2], folder)})", text)


def setup(app: Sphinx) -> None:
    app.connect("source-read", _from_the_repository)
