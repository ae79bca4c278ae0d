"""What draws circuitsvis views in a browser, without a network, and where no script runs, what stands there instead."""

from __future__ import annotations

import base64
import html
import sys
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import circuitsvis

_OWN = ("loop_attention.js", "token_views.js")
_WIDTH = 680  # pixels, of a still picture
# Draws what is on the page and not drawn yet: now if a view has brought the code, else when one does.
_DRAW = '<script type="module">globalThis.tlLoopedDraw?.();</script>'
_STILL_NOTE = (
    "A still picture, as no script has run here. In a notebook that is trusted, run the first cell with such a view "
    "again: it has the code for all."
)


@lru_cache(maxsize=1)
def circuitsvis_script() -> str:
    """The circuitsvis bundle and the drawing of every view of ours on the page: the text of one script element."""
    bundle = (Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    bundle = bundle.partition("//# sourceMappingURL")[0]  # a developer console would ask for that file
    own = "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in _OWN)
    # Run once where several views bring it: a second run would warn of the first.
    once = f"globalThis.CircuitsVis ??= (() => {{\n{bundle}\nreturn CircuitsVis;\n}})();"
    # The bundle has the tag that would end the script in a string; escaped, it is the same string.
    return f"{once}\nglobalThis.tlLoopedDraw = () => {{\n{own}\n}};\ntlLoopedDraw();".replace("</script", "<\\/script")


def packed(data: bytes) -> str:
    """Bytes, deflated, in base64: what the page unpacks."""
    return base64.b64encode(zlib.compress(data, 6)).decode()


@lru_cache(maxsize=1)
def _packed_script() -> str:
    """The script, packed: a third of its size, and what unpacks it."""
    return (
        '<script type="module">if (!globalThis.CircuitsVis) {\n'
        f'const packed = Uint8Array.from(atob("{packed(circuitsvis_script().encode())}"), (c) => c.charCodeAt(0));\n'
        'const text = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));\n'
        'const script = document.createElement("script");\n'
        "script.textContent = await new Response(text).text();\n"
        "document.head.append(script);\n} else { tlLoopedDraw(); }</script>"
    )


def notebook_html(fragment: str, picture: str) -> str:
    """A view for a notebook's cell.

    The code that draws views comes with the first of a notebook alone, and again when that cell is run again; the
    others find it on the page.

    Args:
        fragment: the view's element, with its data.
        picture: an SVG picture for where no script runs; the script takes it away.
    """
    address = base64.b64encode(picture.encode()).decode()
    still = (
        f'<div class="tl-still"><img width="{_WIDTH}" alt="{html.escape(_STILL_NOTE, quote=True)}" '
        f'src="data:image/svg+xml;base64,{address}"><p><small>{_STILL_NOTE}</small></p></div>'
    )
    return f"<div>{fragment}{still}</div>{_packed_script() if _brings_code() else _DRAW}"


_host: tuple[str, str] | None = None  # the cell that has the code, and which of its runs


def _brings_code() -> bool:
    """Whether the view that is shown now is the one of its notebook to bring the code."""
    global _host
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not hasattr(shell, "get_parent") or "google.colab" in sys.modules:
        return True  # no notebook; or one that shows every cell in a page of its own
    parent: dict[str, Any] = shell.get_parent() or {}
    run = str(parent.get("header", {}).get("msg_id"))
    here = (str(parent.get("metadata", {}).get("cellId") or run), run)
    brings = _host is None or (here[0] == _host[0] and here[1] != _host[1])
    if brings:
        _host = here
    return brings
