"""The report's sections on read-outs inside the loop, agreement of loops, and early exits."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.lens import logit_lens, readout_agreement, trace_exits
from tl_looped.model import LoopedModel
from tl_looped.report.data import Reading, ReportData, spread
from tl_looped.report.html import Section, escape, figure, table
from tl_looped.report.words import percent
from tl_looped.viz.style import shorten, show_token

_MOST_LOOPS = 32  # drawn in a heatmap of loops and layers
_MOST_LAYERS = 16
_MOST_COMPARED = 12  # loops, each with each
_MOST_CHANGES = 8  # of the top token, told one by one
_AGREE = 0.99  # share of tokens that is as good as all of them


def readout_sections(model: LoopedModel, data: ReportData) -> list[Section]:
    """The sections on read-outs of the report's prompts, with its loops and seed."""
    sections = [lens_section(model, data)]
    return [*sections, exits_section(model, data)] if data.n_loops > 1 else sections


def lens_section(model: LoopedModel, data: ReportData) -> Section:
    """What each layer in each loop would say next at the end of every prompt, and how far the loops agree."""
    loops, layers = spread(data.n_loops, _MOST_LOOPS), spread(data.cfg.n_core, _MOST_LAYERS)
    some = len(loops) < data.n_loops or len(layers) < data.cfg.n_core
    parts = [
        "<p>A read-out need not wait for the end of a loop. Here what leaves every core layer in every loop is read, "
        "at the last position, as if it left the loop: the layers that would still come in that loop are not run, what "
        "comes after the loops is. So the last core layer’s is the read-out of the loop. The token in a cell is the "
        "most probable next one; darker means more probable; hover over a cell for the top five."
        f"{' Of so many loops and layers some are shown, evenly spaced.' if some else ''}</p>"
    ]
    result = logit_lens(model, data.runs, site="resid_post", loops=loops, layers=layers)
    for i, reading in enumerate(data.readings):
        name = escape(shorten(show_token(reading.prompt.name), 60))
        words = escape(top_tokens_in_words(reading))
        cells = figure(result.plot_layers(i))
        parts.append(f'<h3>Prompt {i + 1}: {name}</h3><p class="finding">{words}</p>{cells}')
    if data.n_loops > 1:
        parts.append(_agreement(model, data))
    return Section("What each layer would say, loop by loop", "".join(parts))


def top_tokens_in_words(reading: Reading) -> str:
    """Which token is on top of the read-out at the last position, in which loops it changes, and what came back."""
    ids = reading.top_ids[:, -1, 0].tolist()

    def name(t: int) -> str:
        return f"“{show_token(reading.top_tokens[t][-1][0])}”"

    changes = [t for t in range(1, len(ids)) if ids[t] != ids[t - 1]]
    if not changes:
        return f"The top token is {name(0)} after every loop."
    told = [f"{'back to ' if ids[t] in ids[:t] else 'to '}{name(t)} in loop {t}" for t in changes[:_MOST_CHANGES]]
    listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    words = f"After loop 0 the top token is {name(0)}. It changes {listed}."
    if len(changes) <= _MOST_CHANGES:
        return words
    last = changes[-1]
    return f"{words} It changes {len(changes)} times in all, at last to {name(last)} in loop {last}."


def _agreement(model: LoopedModel, data: ReportData) -> str:
    loops = spread(data.n_loops, _MOST_COMPARED)
    found = readout_agreement(model, data.runs, loops=loops, positions=data.judged)
    n = int(found.real.sum())
    tops = torch.cat([reading.top_ids[:, data.judged, 0] for reading in data.readings], dim=-1)  # [loop, read]
    words = agreement_in_words((tops == tops[-1]).double().mean(-1), n)
    which = "every loop" if len(loops) == data.n_loops else f"{len(loops)} loops of {data.n_loops}"
    return f'<h3>Which loops agree</h3><p class="finding">{escape(words)}</p>' + figure(
        found.plot(),
        f"The read-outs after {which}, each beside each, over {judged_in_words(data, n)}. Left: how often both have "
        "the same top token. Right: how far the column’s read-out is from the row’s, on average.",
    )


def judged_in_words(data: ReportData, n: int) -> str:
    """At which positions read-outs are judged."""
    answers = data.judged.start == -1
    return f"the last position of {n} prompts, where the answer is due" if answers else f"{n} positions of all prompts"


def agreement_in_words(shares: Float[Tensor, " loop"], n: int) -> str:
    """From which loop on the top tokens are those of the last loop.

    Args:
        shares: of positions at which each loop's top token is the last loop's.
        n: how many positions there are.
    """
    with_last = shares.tolist()
    first = next(t for t in range(len(with_last)) if min(with_last[t:]) >= _AGREE)
    least = min(with_last[first:])
    where = "at all of them" if least == 1 else f"at {percent(least)} of them or more"
    start = f"The read-out after loop 0 has the last loop’s top token at {percent(with_last[0])} of {n} positions"
    if first == 0:
        return f"{start}, and that after every later loop {where}."
    last = len(with_last) - 1
    if first == last:
        return f"{start}; even that after loop {last - 1} has another one at {percent(1 - with_last[-2])} of them."
    return f"{start}; that after loop {first} and every later one {where}."


def exits_section(model: LoopedModel, data: ReportData) -> Section:
    """What rules that stop tokens early would save and cost on the report's prompts."""
    trace = trace_exits(model, data.runs, positions=data.judged, batch_size=1)
    curves = trace.curves()
    best = curves.most_saved(_AGREE).to_dict("records")
    rows = [
        (
            escape(row["rule"]),
            f"{row['threshold']:.3g} {escape(row['unit'])}",
            f"{data.n_loops - row['saved']:.2f}",
            percent(row["agreement"]),
            f"{row['kl']:.2g}",
        )
        for row in best
    ]
    head = ("rule", "threshold", f"loops run of {data.n_loops}", "same top token", "KL (nats)")
    return Section(
        "When it could stop",
        "<p>A token need not run all loops. A rule looks at it after every loop, and stops it when a number passes a "
        "threshold: when the read-out (KL) or the state (latent difference) hardly changes any more, when the state’s "
        "steps hardly change any more (acceleration), when the read-out is sure (entropy), or when its top "
        "token has stayed the same for some loops. Where a model has an exit gate, that is a rule too. Every rule was "
        f"tried with many thresholds on {judged_in_words(data, curves.n_tokens)}; on others a threshold that was "
        "chosen here may cost more.</p>"
        f'<p class="finding">{escape(exits_in_words(best, trace.rules, data.n_loops))}</p>'
        + (table(head, rows) if rows else "")
        + figure(
            curves.plot(),
            "Each point is a rule with one threshold: loops saved, and what that costs. Left: the share of tokens "
            "whose top token is the full run’s; higher is better. Right: how far the read-out is from the full run’s; "
            "lower is better.",
        ),
    )


def exits_in_words(best: Sequence[Mapping[Hashable, Any]], rules: Sequence[str], n_loops: int) -> str:
    """Which rule saves most while nearly all tokens keep the full run's top token.

    Args:
        best: the best point of each rule that saves anything at that price, the best rule first.
        rules: all that were tried.
        n_loops: loops of the full run.
    """
    price = f"If {percent(_AGREE)} of the tokens are to keep the full run’s top token"
    if not best:
        return f"{price}, no rule saves anything: every loop counts."
    first = best[0]
    words = (
        f"{price}, the best rule is {first['rule']}, with the threshold {first['threshold']:.3g} {first['unit']}: "
        f"tokens stop after {n_loops - first['saved']:.2f} of {n_loops} loops on average."
    )
    useless = [rule for rule in rules if rule not in {row["rule"] for row in best}]
    if not useless:
        return words
    listed = useless[0] if len(useless) == 1 else f"{', '.join(useless[:-1])} and {useless[-1]}"
    return f"{words} Nothing is saved at that price by {listed}."
