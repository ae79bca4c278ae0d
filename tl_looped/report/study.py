"""The page of an architecture study: what the paper reports beside what came out, and the curves."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from tl_looped import __version__
from tl_looped.claims import ArchitectureStudy
from tl_looped.claims.architectures import DIRECTIONS, INITIALISATION_WORDS, NORM_WORDS
from tl_looped.report.html import Section, escape, figure, page, table

_CLAIMS = ("norm", "injection", "the paper reports", "found", "agree")
_DETAILS = ("norm", "injection", "layers", "found", "came to rest", "smallest cosine", "norm grows", "direction")


def architectures_page(study: ArchitectureStudy, command: str = "") -> str:
    """The study as one HTML page.

    Args:
        study: what came out.
        command: the command that made it, for the reader who wants to make it again.
    """
    made, names = study.made_by, list(dict.fromkeys(cell["initialisation"] for cell in study.cells))
    layers = list(dict.fromkeys(cell["layers"] for cell in study.cells))
    sizes = ", ".join(map(str, layers))
    facts = [
        ("command", f"<code>{escape(command)}</code>" if command else ""),
        ("models", f"{len(study.cells)}: core layers {sizes}; seeds of each: {made['seeds']}"),
        ("size", f"d_model {made['d_model']}, {made['n_heads']} heads; no prelude, no coda"),
        ("read", f"{made['prompts']} prompts of {made['pos']} random tokens, {made['n_loops']} loops"),
        ("made with", f"tl_looped {escape(__version__)}"),
    ]
    sections = [Section("What was measured", _method(study)), *(_section(study, name) for name in names)]
    title = "Looped architectures before training: which have fixed points"
    return page(title, table((), [fact for fact in facts if fact[1]], "facts"), sections)


def _method(study: ArchitectureStudy) -> str:
    made = study.made_by
    norms = [(f"<code>{name}</code>", escape(words)) for name, words in NORM_WORDS.items()]
    text = (
        "<p>A core with random weights runs for many loops. x<sub>t</sub> is the output of one of its layers at one "
        f"token in loop t, and T = {made['n_loops'] - 1} the last loop. The distance is "
        "‖x<sub>t</sub> − x<sub>T</sub>‖ / ‖x<sub>T</sub>‖. A layer’s output came to rest at a token if the distance "
        f"stays within {made['tolerance']:g} over at least the last {made['hold']:.0%} of the loops. A model has a "
        f"<b>fixed point</b> if {made['share']:.0%} of its layers and tokens came to rest. It is <b>degenerate</b> if "
        "all layers have the same one: the smallest cosine between the first layer’s and another’s, median over "
        f"tokens, is at least {made['threshold']:g}; else <b>distinct</b>. Beside that stands by how much the last "
        "layer’s token norm grows from the first loop to the last, and what its tokens do in direction alone: come to "
        "a fixed point, orbit, or slide on.</p>"
    )
    return text + table((), norms, "facts")


def _section(study: ArchitectureStudy, initialisation: str) -> Section:
    claims, summary = study.claims(initialisation), study.summary(initialisation)
    agreed, cells = int(claims["agrees"].sum()), int(claims["cells"].sum())
    rows = [[escape(cell) for cell in row] for row in _claim_rows(claims)]
    details = [[escape(cell) for cell in row] for row in _detail_rows(summary)]
    return Section(
        f"Initialisation: {initialisation}",
        f"<p>{escape(INITIALISATION_WORDS[initialisation])}</p>"
        f'<p class="finding">{agreed} of {cells} models show what arXiv 2604.11791 reports of their kind.</p>'
        + table(_CLAIMS, rows)
        + figure(
            study.plot(initialisation),
            "Distance to the last loop, median over layers and tokens; one line for each seed. A line that falls only "
            "at the very end has no fixed point: the last loop is at distance zero of itself whatever the state does.",
        )
        + table(_DETAILS, details),
    )


def _claim_rows(claims: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    for row in claims.to_dict("records"):
        injection = "with" if row["injection"] else "without"
        yield row["norm"], injection, row["reported"], row["found"], f"{row['agrees']} of {row['cells']}"


def _detail_rows(summary: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    for row in summary.to_dict("records"):
        injection = "with" if row["injection"] else "without"
        cosines = f"{row['cosine_low']:.4f}–{row['cosine_high']:.4f}"
        rest, growth = f"{row['converged']:.0%}", f"× {row['growth']:.3g}"
        shares = sorted(((row[column], name) for name, column in DIRECTIONS.items()), reverse=True)
        directions = ", ".join(f"{name} {share:.0%}" for share, name in shares if share > 0)
        yield row["norm"], injection, str(row["layers"]), row["verdict"], rest, cosines, growth, directions
