"""The report's section on patching: which position carries the answer of a variable chain, in which loop."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.model import LoopedModel
from tl_looped.patching import attribution_sweep, patch_sweep
from tl_looped.report.html import Section, escape, figure
from tl_looped.training.variable_chains import solve
from tl_looped.viz.style import show_token

_NAMED = 0.2  # share of the answer from which a position is named in words


def chain_patching(model: LoopedModel, text: str, n_loops: int | None = None) -> Section:
    """Patch a chain's digit into a prompt where it is another one: measured, estimated, and beside a control.

    Args:
        model: one that reads variable chains.
        text: a prompt such as "a=4; c=a; b=7; ? c", with a digit that the query does not reach.
        n_loops: loops to run; None for the count it was trained with.
    """
    answer, path = solve(text)
    corrupted, other = _with_other_digit(text, path[-1])
    unrelated = next(part[0] for part in text.split("; ") if part[-1].isdigit() and part[0] != path[-1])
    control, _ = _with_other_digit(text, unrelated)
    right, wrong = model.to_single_token(answer), model.to_single_token(other)

    def metric(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
        return logits[0, -1, right] - logits[0, -1, wrong]

    with torch.no_grad():
        logits, cache = model.run_with_cache(text, n_loops)
    what: dict[str, Any] = {"source": cache, "metric": metric, "site": "state", "axes": ("loop", "pos")}
    measured, untouched = (patch_sweep(model, one, n_loops, progress=False, **what) for one in (corrupted, control))
    estimated = attribution_sweep(model, corrupted, n_loops, progress=False, **what)
    gap = float(metric(logits)) - float(cast(Tensor, measured.baseline))
    tokens = model.to_str_tokens(text)
    top = float(estimated.effect().abs().max() / abs(gap)) if gap else 0.0
    still = float(untouched.effect().abs().max())
    return Section(
        f"Which position carries the answer, in which loop: {text}",
        f"<p>The same prompt with <code>{escape(path[-1])}={escape(other)}</code> has another answer; the two are "
        f"{gap:.1f} logits apart. The state that enters a loop at one position is taken from this prompt’s run and put "
        "into the other’s, for every loop and position in turn. What comes back of the difference says where the "
        f"answer lay.</p><ul>{_in_words(measured.effect(), gap, tokens)}</ul>"
        + figure(measured.plot(), "Measured by patching: red brings the answer of this prompt back.")
        + f"<p>Attribution estimates the same from one backward pass: its largest cell is {top:.1%} of the difference. "
        f"As a control, <code>{escape(control)}</code> differs in a digit that the query does not reach: no patch "
        f"there changes the metric by more than {still:.1g} logits.</p>"
        + figure(estimated.plot(), "Estimated by attribution, on a scale of its own."),
    )


def _with_other_digit(text: str, variable: str) -> tuple[str, str]:
    """The prompt with another digit for a variable, and that digit."""
    parts = text.split("; ")
    place = next(i for i, part in enumerate(parts) if part.startswith(f"{variable}="))
    other = str((int(parts[place][-1]) + 5) % 10)
    parts[place] = f"{variable}={other}"
    return "; ".join(parts), other


def _in_words(effect: Float[Tensor, "loop pos"], gap: float, tokens: list[str]) -> str:
    """For every loop, the positions that bring back a good part of the difference, as list items."""
    items = []
    for t, row in enumerate(effect / gap if gap else effect):
        places = [p for p in row.argsort(descending=True).tolist() if row[p] >= _NAMED]
        named = ", ".join(
            f"{row[p]:.0%} at position {p} (<code>{escape(show_token(tokens[p]))}</code>)" for p in places
        )
        items.append(f"<li>entering loop {t}: {named or 'no single position brings much back'}</li>")
    return "".join(items)
