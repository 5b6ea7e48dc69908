"""The site: `make docs` builds it with every warning an error, so that a link to nothing fails."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_fairness_plugin.cli.field import declared_fields
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.measure.objectives import one_of

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
FORGE = "https://github.com/quant-fairness/quant-fairness/blob/main"
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
"""A link of a page to a file outside docs/."""

project = "quant-fairness"
author = "the quant-fairness authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
exclude_patterns = ["_build", "requirements.txt"]
html_theme = "furo"
html_title = "quant-fairness"
html_show_sphinx = False
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
smartquotes = False  # they would make one dash of an option's two
default_role = "code"  # docstrings name things in single backticks
python_maximum_signature_line_length = 100
autodoc_member_order = "bysource"
add_module_names = False


def link_to_forge(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links to files outside the site into links to the repository, if there are such files."""

    def there(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"docs/{docname}.md links to ../{path}, and there is no such file")
        return f"]({FORGE}/{path}{anchor})"

    source[0] = OUTSIDE.sub(there, source[0])


def list_options(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put every field of the configuration, with its option and help, in the place of the comment `options`."""
    lines = ["| field | option | default | |", "|---|---|---|---|"]
    for name, field in declared_fields(FairConfig).items():
        said = f"{field.option.help} {one_of(field.names)}." if field.option.help.endswith(":") else field.option.help
        cells = (f"`{name}`", f"`{field.flag}`", f"`{field.default!r}`", said.replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    source[0] = source[0].replace("<!-- options -->", "\n".join(lines))


def put_words_back(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Put words back before the first colon of what is said of an attribute, which napoleon takes for a type."""
    for place, line in enumerate(lines):
        if what in ("attribute", "property") and line.startswith(":type: "):
            del lines[place]
            lines[0] = f"{line.removeprefix(':type: ')}: {lines[0]}"
            return


def list_other_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put every page that the start page lists nowhere in the place of its line OTHERS, so that none is lost."""
    if docname == app.config.root_doc:
        listed = {docname, *source[0].splitlines()}
        others = sorted(path.stem for path in Path(__file__).parent.glob("*.md") if path.stem not in listed)
        source[0] = source[0].replace("\nOTHERS\n", "\n" + "".join(f"{name}\n" for name in others))


def setup(app: Sphinx) -> None:
    """Register what is done to a page before it is read."""
    app.connect("source-read", link_to_forge)
    app.connect("source-read", list_other_pages)
    app.connect("source-read", list_options)
    app.connect("autodoc-process-docstring", put_words_back, priority=600)  # napoleon's is 500
