"""The page of an architecture study: what the paper reports beside what came out, and the curves."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from tl_looped import __version__
from tl_looped.claims import ArchitectureStudy
from tl_looped.claims.architectures import DIRECTIONS, INITIALISATION_WORDS, NORM_WORDS
from tl_looped.report.html import Section, escape, figure, page, table

_CLAIMS = ("norm", "injection", "the paper reports", "found", "agree")
_DETAILS = ("norm", "injection", "layers", "found", "writes / reads", "came to rest", "cosine", "growth", "direction")


def architectures_page(study: ArchitectureStudy, command: str = "") -> str:
    """The study as one HTML page.

    Args:
        study: what came out.
        command: the command that made it, for the reader who wants to make it again.
    """
    made = study.made_by
    layers = list(dict.fromkeys(cell["layers"] for cell in study.cells))
    sizes = ", ".join(map(str, layers))
    facts = [
        ("command", f"<code>{escape(command)}</code>" if command else ""),
        ("models", f"{len(study.cells)}: core layers {sizes}; seeds of each: {made['seeds']}"),
        ("size", f"d_model {made['d_model']}, {made['n_heads']} heads; no prelude, no coda"),
        ("read", f"{made['prompts']} prompts of {made['pos']} random tokens, {made['n_loops']} loops"),
        ("made with", f"tl_looped {escape(__version__)}"),
    ]
    found = (_section(study, *start) for start in study.starts())
    sections = [Section("What was measured", _method(study)), *found, _decides(study)]
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


def _section(study: ArchitectureStudy, initialisation: str, input_scale: float | None) -> Section:
    claims, summary = study.claims(initialisation, input_scale), study.summary(initialisation, input_scale)
    inputs = "" if input_scale is None else f", inputs of scale {input_scale:g}"
    agreed, cells = int(claims["agrees"].sum()), int(claims["cells"].sum())
    rows = [[escape(cell) for cell in row] for row in _claim_rows(claims)]
    details = [[escape(cell) for cell in row] for row in _detail_rows(summary)]
    return Section(
        f"Initialisation: {initialisation}{inputs}",
        f"<p>{escape(INITIALISATION_WORDS[initialisation])}</p>"
        f'<p class="finding">{agreed} of {cells} models show what arXiv 2604.11791 reports of their kind.</p>'
        + table(_CLAIMS, rows)
        + figure(
            study.plot(initialisation, input_scale),
            "Distance to the last loop, median over layers and tokens; one line for each seed. A line that falls only "
            "at the very end has no fixed point: the last loop is at distance zero of itself whatever the state does.",
        )
        + table(_DETAILS, details),
    )


def _decides(study: ArchitectureStudy) -> Section:
    rows = []
    for row in study.decides().to_dict("records"):
        bounds = [f"{row[name]:.2g}".replace("nan", "–") for name in ("rest_up_to", "none_from", "auc")]
        injection = "with" if row["injection"] else "without"
        rows.append([escape(row["norm"]), injection, f"{row['at_rest']} of {row['models']}", *bounds])
    return Section(
        "What decides",
        "<p>How much the layers write in the first loop over what they read: the norm of the sum of all that attention "
        "and MLPs add, over that of the stream that enters the first layer. Over all models of the page: up to which "
        "ratio all come to rest, from which on none does, and the chance that of two models, one at rest and one not, "
        "the first has the smaller ratio (0.5: the ratio says nothing).</p>"
        + table(("norm", "injection", "at rest", "all up to", "none from", "chance"), rows),
    )


def _claim_rows(claims: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    for row in claims.to_dict("records"):
        injection = "with" if row["injection"] else "without"
        yield row["norm"], injection, row["reported"], row["found"], f"{row['agrees']} of {row['cells']}"


def _detail_rows(summary: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    for row in summary.to_dict("records"):
        injection = "with" if row["injection"] else "without"
        cosines = f"{row['cosine_low']:.4f}–{row['cosine_high']:.4f}"
        rest, growth, writes = f"{row['converged']:.0%}", f"× {row['growth']:.3g}", f"{row['writes']:.2g}"
        shares = sorted(((row[column], name) for name, column in DIRECTIONS.items()), reverse=True)
        directions = ", ".join(f"{name} {share:.0%}" for share, name in shares if share > 0)
        yield row["norm"], injection, str(row["layers"]), row["verdict"], writes, rest, cosines, growth, directions
