"""One HTML page that holds all it needs: no file beside it, no network, and no text in it that could run."""

from __future__ import annotations

import html
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tl_looped.viz.browser import circuitsvis_script
from tl_looped.viz.style import data_block

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading, as plain text.
        html: its body, as HTML; what comes from a prompt or a model must have gone through `escape`.
        collapsed: whether it is closed until the reader opens it.
    """

    title: str
    html: str
    collapsed: bool = False

    @property
    def anchor(self) -> str:
        """Its id in the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "section"


def escape(text: object) -> str:
    """Any text as HTML, in an element or in a quoted attribute."""
    return html.escape(str(text), quote=True)


def figure(fig: go.Figure, caption: str = "") -> str:
    """A plotly figure as data that the page's script draws; the caption is HTML."""
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><div class="plot">{data_block(str(fig.to_json()))}</div>{text}</figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table; head and cells are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page, with a list of its sections at the top.

    Only the page's own scripts may run, and nothing may be fetched: a policy in its head says so to the browser, on top
    of all text being escaped.

    Args:
        title: the page's title, as plain text.
        lead: HTML that comes under the title.
        sections: in the order in which they are shown.
    """
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data: blob:"
    anchors = _anchors(sections)
    links = "".join(f'<li><a href="#{anchors[i]}">{escape(s.title)}</a></li>' for i, s in enumerate(sections))
    body = "".join(_section(section, anchors[i]) for i, section in enumerate(sections))
    scripts = (get_plotlyjs(), circuitsvis_script(), (_FOLDER / "report.js").read_text(encoding="utf-8"))
    code = "".join(f'<script nonce="{nonce}">{script}</script>\n' for script in scripts)
    style = (_FOLDER / "report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # else a browser asks a server for one
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{lead}\n<nav><ul>{links}</ul></nav>\n{body}\n</main>\n{code}</body>\n</html>\n"
    )


def _anchors(sections: Sequence[Section]) -> list[str]:
    seen: dict[str, int] = {}
    anchors = []
    for section in sections:
        count = seen[section.anchor] = seen.get(section.anchor, 0) + 1
        anchors.append(section.anchor if count == 1 else f"{section.anchor}-{count}")
    return anchors


def _section(section: Section, anchor: str) -> str:
    heading = f"<h2>{escape(section.title)}</h2>"
    if section.collapsed:
        return f'<section id="{anchor}"><details><summary>{heading}</summary>{section.html}</details></section>'
    return f'<section id="{anchor}">{heading}{section.html}</section>'
