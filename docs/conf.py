"""Sphinx: the documentation of tl_looped, from these pages and the docstrings."""

from __future__ import annotations

import re
from typing import Any

import tl_looped

project = "tl_looped"
author = "tl_looped contributors"
version = release = tl_looped.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"tl_looped {release}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "none"  # signatures have them; jaxtyping's shapes are strings, which nothing could resolve
napoleon_google_docstring = True
napoleon_use_rtype = False
python_display_short_literal_types = True
# Docstrings name what they mean, such as `observe`, without saying where it is.
default_role = "code"


def setup(app: Any) -> None:
    """Axes such as [loop, *axes] are no emphasis, and |x| is no substitution."""

    def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        lines[:] = [re.sub(r"(?<![*\w`])\*(?=\w)", r"\\*", line).replace("|", r"\|") for line in lines]

    app.connect("autodoc-process-docstring", escape)
