"""What draws circuitsvis views in a browser, without a network."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import circuitsvis

_OWN = ("loop_attention.js", "token_views.js")


@lru_cache(maxsize=1)
def circuitsvis_script() -> str:
    """The circuitsvis bundle and the drawing of every view of ours on the page: the text of one script element."""
    bundle = (Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    bundle = bundle.partition("//# sourceMappingURL")[0]  # a developer console would ask for that file
    own = "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in _OWN)
    # Run once in a notebook too, where every view brings it: a second run would warn of the first.
    once = f"globalThis.CircuitsVis ??= (() => {{\n{bundle}\nreturn CircuitsVis;\n}})();"
    # The bundle has the tag that would end the script in a string; escaped, it is the same string.
    return f"{once}\n{own}".replace("</script", "<\\/script")


def notebook_html(fragment: str) -> str:
    """A view with all that draws it, for a notebook's cell."""
    return f'{fragment}<script type="module">{circuitsvis_script()}</script>'
