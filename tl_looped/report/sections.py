"""What the report says, section by section."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version

from tl_looped import __version__
from tl_looped.engine.schedule import CODA, PRELUDE
from tl_looped.report.data import TOP, Reading, ReportData
from tl_looped.report.html import Section, escape, figure, page, table
from tl_looped.report.words import answer_in_words, convergence_in_words, model_in_words, state_in_words
from tl_looped.viz import LoopAttention, attention_from_position, schedule_svg
from tl_looped.viz.readout import readout_curves, readout_heatmap
from tl_looped.viz.state import state_convergence, step_by_position
from tl_looped.viz.style import shorten, show_token

_MOST_ROWS = 12
_MOST_CHARACTERS = 20


def report_page(data: ReportData, command: str = "", extra: Sequence[Section] = ()) -> str:
    """The report as one HTML page.

    Args:
        data: what was measured.
        command: the command that made it, for the reader who wants to make it again.
        extra: sections of other analyses, put before the prompts.
    """
    how, model, *prompts = sections(data)
    count = f"{len(data.readings)} prompt{'s' if len(data.readings) > 1 else ''}"
    title = f"{data.model_name}: {count}, read loop by loop"
    rows = [(escape(name), value) for name, value in _provenance(data, command)]
    return page(title, table((), rows, "facts"), [how, model, *extra, *prompts])


def _provenance(data: ReportData, command: str) -> list[tuple[str, str]]:
    """What made the report, as (name, HTML)."""
    trained = "" if data.n_loops == data.cfg.n_loops else f" (the model was trained with {data.cfg.n_loops})"
    seed = "not needed: this model draws nothing at random" if data.seed is None else str(data.seed)
    packages = ("transformer-lens", "torch", "transformers", "circuitsvis", "plotly")
    versions = [f"tl_looped {__version__}", *(f"{name} {version(name)}" for name in packages)]
    versions.append(f"Python {platform.python_version()}")
    rows = [
        ("date", escape(datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"))),
        ("command", f"<code>{escape(command)}</code>" if command else ""),
        ("loops", f"{data.n_loops}{trained}"),
        ("seed", seed),
        ("initial state", escape(state_in_words(data))),
        ("made with", escape(", ".join(versions))),
    ]
    return [(name, value) for name, value in rows if value]


def sections(data: ReportData) -> list[Section]:
    """All sections of the report, top to bottom."""
    n = len(data.readings)
    titles = [
        f"Prompt {i} of {n}: {shorten(show_token(r.prompt.name), 60)}" for i, r in enumerate(data.readings, start=1)
    ]
    prompts = [Section(title, _prompt(reading)) for title, reading in zip(titles, data.readings, strict=True)]
    return [how_to_read(), the_model(data), *prompts]


def how_to_read() -> Section:
    """A few lines for a reader who is new to looped models."""
    return Section(
        "How to read this",
        "<p>An ordinary language model sends a text through a stack of different layers once. A <b>looped</b> model "
        "has a small stack, the <b>core</b>, and sends its intermediate result, the <b>state</b>, through that same "
        "stack again and again. Each pass is a <b>loop</b>; loops count from 0. A <b>prelude</b> may come before the "
        "loops and a <b>coda</b> after them; each of these runs once.</p>"
        "<p>The model could stop after any loop and say what it thinks the next token is. That is the <b>read-out</b> "
        "of the loop, and it is exact: what the model itself would answer if it ran that many loops. For every prompt "
        "this page shows how the read-out changes from loop to loop, where the model looks (<b>attention</b>), and "
        "whether the state comes to rest (<b>convergence</b>).</p>"
        "<p>Predictions are for the token after the <b>last position</b>, unless a plot has an axis for positions. "
        "<b>Entropy</b> says how undecided a read-out is, in nats: 0 is certain, 0.69 a coin toss between two tokens. "
        "<b>KL</b> says how far a read-out is from the last loop’s, also in nats: 0 is the same. In tokens, · stands "
        "for a space at an end and ⏎ for a line break. Plots answer to the mouse: hover for values, drag to zoom, "
        "double-click to go back.</p>",
    )


def the_model(data: ReportData) -> Section:
    """The schedule as a drawing, and the model's choices in words."""
    rows = [(escape(name), escape(words)) for name, words in model_in_words(data)]
    return Section(
        "The model",
        f"{schedule_svg(data.cfg, data.runs.counts)}"
        '<p class="note">From left to right. x is the state, e what enters the loops from the left; N, N′ and “norm” '
        "are root-mean-square norms, f an attention or an MLP. A read-out after loop t takes the state leaving that "
        f"loop straight to whatever stands right of the frame.{_which_stack(data)}</p>" + table((), rows, "facts"),
    )


def _which_stack(data: ReportData) -> str:
    if data.cfg.two_states is None:
        return ""
    return f" Two stacks loop: this page looks at {data.stack}, whose state the head reads; loops are its own."


def _prompt(reading: Reading) -> str:
    """The body of a prompt's section."""
    return "".join(
        (
            _tokens(reading),
            "<h3>Read-out after every loop</h3>",
            f'<p class="finding">{escape(answer_in_words(reading))}</p>',
            _readout_table(reading),
            _readout_plots(reading),
            "<h3>Attention</h3>",
            _attention(reading),
            "<h3>Convergence of the state</h3>",
            f'<p class="finding">{escape(convergence_in_words(reading))}</p>',
            _convergence(reading),
        )
    )


def _tokens(reading: Reading) -> str:
    cells = "".join(
        f'<span>{_token(token)}<span class="place">{i}</span></span>' for i, token in enumerate(reading.tokens)
    )
    answer = _token(reading.answer, is_answer=True)
    if reading.prompt.answer is not None:
        source = f"The answer {answer} was given with the prompt."
    else:
        source = f"No answer was given, so the model’s own top token after the last loop is tracked: {answer}."
    note = f" {escape(reading.prompt.note)}" if reading.prompt.note else ""
    ids = reading.prompt.text is None and reading.tokens == tuple(map(str, reading.token_ids))
    what = " (as ids: the model has no tokenizer)" if ids else ""
    return (
        f'<p class="note">{len(reading.tokens)} tokens{what} with their positions:</p><div class="strip">{cells}</div>'
        f"<p>{source}{note}</p>"
    )


def _readout_table(reading: Reading) -> str:
    """Top tokens and measures at the last position; of many loops some, and all of them behind a click."""
    n_loops = len(reading.answer_prob)
    columns = ["after loop", f"probability of {_token(reading.answer, is_answer=True)}", "its rank (0: on top)"]
    columns += ["entropy (nats)", "KL to the last loop (nats)"]
    columns += [f"top {i}" for i in range(1, reading.top_probs.shape[-1] + 1)]

    def row(t: int) -> list[str]:
        ids, probs = reading.top_ids[t, -1].tolist(), reading.top_probs[t, -1].tolist()
        top = [
            f'{_token(token, is_answer=id == reading.answer_id)} <span class="prob">{_percent(prob)}</span>'
            for token, prob, id in zip(reading.top_tokens[t][-1], probs, ids, strict=True)
        ]
        measures = (
            _percent(float(reading.answer_prob[t]), decimals=2),
            f"{int(reading.answer_rank[t]):,}",
            f"{float(reading.entropy[t, -1]):.3f}",
            f"{float(reading.kl_to_final[t, -1]):.3f}",
        )
        return [str(t), *measures, *top]

    shown = _some_loops(n_loops)
    head = table(columns, [row(t) for t in shown], "readout")
    if len(shown) == n_loops:
        return head
    rest = table(columns, [row(t) for t in range(n_loops)], "readout")
    return f"{head}<details><summary>All {n_loops} loops</summary>{rest}</details>"


def _token(token: str, is_answer: bool = False) -> str:
    """A token in a box; a long one is cut, and shown in full when the mouse is over it."""
    shown = show_token(token)
    full = f' title="{escape(shown)}"' if len(shown) > _MOST_CHARACTERS else ""
    kind = "token answer" if is_answer else "token"
    return f'<span class="{kind}"{full}>{escape(shorten(shown, _MOST_CHARACTERS))}</span>'


def _percent(prob: float, decimals: int = 1) -> str:
    """A probability in percent, as HTML, that is not shown as 0 or 1 when it is neither."""
    least = 10.0 ** -(decimals + 2)
    if 0 < prob < least:
        return f"&lt;{least:.{decimals}%}"
    return f"&gt;{1 - least:.{decimals}%}" if 1 - least < prob < 1 else f"{prob:.{decimals}%}"


def _some_loops(n_loops: int) -> list[int]:
    """All loops, or of many the first eight, then ever fewer, and the last."""
    if n_loops <= _MOST_ROWS:
        return list(range(n_loops))
    later = []
    t = 8
    while t < n_loops - 1:
        later.append(t)
        t = max(t + 1, round(t * 1.5))
    return [*range(8), *later, n_loops - 1]


def _readout_plots(reading: Reading) -> str:
    curves = readout_curves(
        reading.answer_prob, reading.answer_rank, reading.entropy[:, -1], reading.kl_to_final[:, -1], reading.answer
    )
    first = reading.first_read
    cells = readout_heatmap(
        reading.top_probs, reading.top_tokens, reading.tokens[first:], range(first, len(reading.tokens))
    )
    left_out = f" The first {first} positions are left out." if first else ""
    return figure(curves, "The read-out at the last position, loop by loop.") + figure(
        cells,
        "The most probable next token (in the cell) after every loop, at every position. Darker means more probable; "
        f"hover over a cell for the top {TOP}.{left_out}",
    )


def _attention(reading: Reading) -> str:
    note = f'<p class="note">{escape(reading.attention_note)}</p>' if reading.attention_note else ""
    if not reading.attention:
        return note
    core = [layer for layer in reading.attention if layer.stack not in (PRELUDE, CODA)]
    start = reading.attention.index(core[0])
    view = LoopAttention(reading.tokens, reading.attention, start)
    rows = figure(
        attention_from_position(core, reading.tokens),
        "Where the last position looks, loop by loop: each row is a loop, and its cells sum to 100%.",
    )
    return (
        f"{note}{rows}<p>Every head in full. Pick a layer and a loop; click a head to see it large. "
        "A row (destination) is the position that looks, a column (source) the position it looks at; "
        f"darker blue is more attention, grey is the future, which it can’t see.</p>{view.fragment()}"
    )


def _convergence(reading: Reading) -> str:
    curves = state_convergence(reading.step, reading.cosine, reading.tokens)
    places = step_by_position(reading.step, reading.tokens)
    return figure(
        curves,
        "xₜ is the state that enters loop t, xₜ₊₁ the one that leaves it. Left: how far apart they are, as a share of "
        "the length of xₜ₊₁ (1 = as far as it is long; log scale). Right: the cosine of the angle between them "
        "(1 = same direction). Loop 0 starts from the initial state; there is no cosine where that is zero.",
    ) + figure(
        places,
        "The same steps by position, one line a loop, later loops more yellow. Where lines fall from loop to loop, the "
        "state at that position comes to rest.",
    )
