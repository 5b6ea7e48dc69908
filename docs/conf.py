"""The site: `make docs` builds it with every warning an error, so that a link to nothing fails."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

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
default_role = "code"  # docstrings name things in single backticks
autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
add_module_names = False
# A pattern of the start page's lists that matches no page yet. No link is forgiven.
suppress_warnings = ["toc.empty_glob"]


def link_to_forge(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links to files outside the site into links to the repository, if there are such files."""

    def there(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"docs/{docname}.md links to ../{path}, and there is no such file")
        return f"]({FORGE}/{path}{anchor})"

    source[0] = OUTSIDE.sub(there, source[0])


def setup(app: Sphinx) -> None:
    """Register the hook."""
    app.connect("source-read", link_to_forge)
