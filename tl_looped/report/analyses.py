"""The report's sections on what the paper measures: convergence, attention stability, limit behaviour, stages."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_looped.attention import PATTERN_DISTANCE, TOTAL_VARIATION, attention_stability
from tl_looped.dynamics import (
    COSINE_TO_END,
    DISTANCE,
    STEP,
    Convergence,
    LimitBehaviour,
    LongRun,
    convergence_of,
    cycle,
    limits_of,
    long_run_of,
    trajectory,
)
from tl_looped.dynamics.verdicts import sketch_of
from tl_looped.engine.numbers import median
from tl_looped.model import LoopedModel
from tl_looped.observe import Observed, observe
from tl_looped.report.data import ReportData
from tl_looped.report.html import Section, escape, figure, table
from tl_looped.stages import STAGE_MEASURES, neuron_shares
from tl_looped.viz.curves import Group

LONG_RUN = 128
"""Loops after which a state counts as the end, as in the paper."""


def loop_analyses(
    model: LoopedModel, data: ReportData, long_run: int = LONG_RUN, progress: bool = False
) -> list[Section]:
    """Four sections, measured on the report's prompts.

    Args:
        model: the model.
        data: the prompts, and with how many loops and which seed they were read.
        long_run: loops after which a state counts as the end; at least 8.
        progress: whether to show bars.
    """
    prompts, seed = [list(reading.token_ids) for reading in data.readings], data.seed
    sketch = sketch_of(model.cfg)
    measures = [DISTANCE, COSINE_TO_END, sketch, STEP, PATTERN_DISTANCE, TOTAL_VARIATION]
    per_token = [DISTANCE.name, COSINE_TO_END.name, sketch.name]
    options = {"seed": seed, "progress": progress}
    ends = observe(model, prompts, long_run, measures=measures, per_token=per_token, **options)
    stages = observe(model, data.runs, measures=STAGE_MEASURES, progress=progress)
    first = torch.tensor([max(prompts, key=len)])
    return [
        _convergence(model, ends, prompts, first, long_run, seed),
        _attention(model, ends, first, long_run, seed),
        _in_the_long_run(long_run_of(ends, progress=progress), limits_of(ends, stack=data.stack), long_run),
        _stages(model, stages),
    ]


def _convergence(
    model: LoopedModel, ends: Observed, prompts: list[list[int]], first: Tensor, long_run: int, seed: int | None
) -> Section:
    stack = model.cfg.looping_stack(model.cfg.head_stack)
    verdict = convergence_of(ends, stack=stack)
    path = trajectory(model, first, min(long_run, 32), stack=stack, seed=seed)
    body = (
        f"<p>Every prompt is run for {long_run} loops. The state after the last stands for the fixed point, and the "
        f"distance to it is followed at every core layer and token.</p><ul>{_verdicts(verdict)}</ul>"
    )
    if model.cfg.n_core > 1:
        ring = cycle(model, prompts, long_run, stack=stack, seed=seed, progress=False)
        smallest = ring.smallest[~ring.smallest.isnan()]
        lowest = f": the cosine between them goes down to {float(smallest.min()):.3f}" if len(smallest) else ""
        body += f"<p>The fixed points of the core layers are <b>{escape(ring.verdict())}</b>{lowest}.</p>"
    return Section(
        f"Does the state come to rest? {long_run} loops",
        body
        + _curves(
            ends,
            DISTANCE.name,
            "layer",
            "Mean distance to the last loop over tokens, then over prompts, with quartiles over prompts; a line for "
            "each core layer. A straight line down is convergence at a constant rate, the floor is rounding.",
        )
        + figure(
            path.plot(),
            f"The last token of the longest prompt: its states in all layers and {min(long_run, 32)} loops, along the "
            "two directions in which they vary most.",
        ),
    )


def _verdicts(verdict: Convergence) -> str:
    """A list item for each core layer: how much converged, how fast."""
    items = []
    for layer in range(verdict.converged.shape[0]):
        share = verdict.converged[layer].nanmean()
        loop, rate = median(verdict.loop[layer]), median(verdict.rate[layer])
        speed = (
            f"; median first loop within {verdict.tolerance:g}: {float(loop):.0f}, median factor a loop: "
            f"{float(rate.exp()):.3f}"
            if bool(loop.isfinite()) and bool(rate.isfinite())
            else ""
        )
        items.append(f"<li>core layer {layer}: {float(share):.1%} of tokens come to rest{speed}</li>")
    return "".join(items)


def _attention(model: LoopedModel, ends: Observed, first: Tensor, long_run: int, seed: int | None) -> Section:
    title, loops = "Does attention come to rest?", min(long_run, 32)
    if first.shape[1] == 1:
        return Section(title, '<p class="note">A single token can only look at itself: nothing to come to rest.</p>')
    stack = model.cfg.looping_stack(model.cfg.head_stack)
    heads = attention_stability(model, first, loops, stack=stack, position=-1, seed=seed, progress=False)
    settled = heads.heads()["settles_at"].dropna()
    n_heads = heads.settles_at.numel()
    said = f"{len(settled)} of {n_heads} heads settle within {loops} loops"
    said += f", by loop {int(settled.max())} at the latest" if len(settled) else ""
    return Section(
        title,
        f"<p>At the last position of the longest prompt, {said}: from there on no more than {heads.tolerance:.0%} of a "
        "head’s attention sits elsewhere than in the last loop.</p>"
        + figure(
            heads.plot(),
            "Each head of the core at that position: the share of its attention that sits elsewhere than in the last "
            "loop. The mark is where it settles.",
        )
        + _curves(
            ends,
            PATTERN_DISTANCE.name,
            "layer",
            "Frobenius distance between each pattern and that of the last loop, mean over heads and prompts.",
        ),
    )


def _in_the_long_run(found: LongRun, paper: LimitBehaviour, loops: int) -> Section:
    tokens, prompts = found.shares(), found.prompt_shares()
    rows = [[verdict, f"{tokens[verdict]:.1%}", f"{prompts[verdict]:.1%}"] for verdict in tokens if tokens[verdict]]
    shares = [paper.shares(layer) for layer in range(paper.labels.shape[0])]
    theirs = [[f"core layer {i}", *(f"{value:.2%}" for value in row.values())] for i, row in enumerate(shares)]
    return Section(
        "What each token’s state does in the long run",
        f"<p>Judged by {loops} loops, with errors: a state is at rest, approaching a limit, drifting, in an orbit, "
        "quasi-periodic or chaotic, or these loops can’t tell (undecided).</p>"
        + table(["verdict", "tokens", "prompts with such a token"], rows, "readout")
        + figure(found.plot(), "Share of each verdict: of all tokens, and of those at each position.")
        + "<p>The paper’s own classes go by the cosine to the state after the last loop, so they depend on where the "
        "run ends: a slow approach counts as a slider, a slow drift as a fixed point. Shares of tokens:</p>"
        + table(["", *shares[0]], theirs, "readout")
        + figure(
            paper.plot(),
            "Cosine of the last core layer’s output and its output in the last loop, a line for each token.",
        ),
    )


def _stages(model: LoopedModel, stages: Observed) -> Section:
    figures = "".join(_curves(stages, measure.name, "loop", escape(measure.label)) for measure in STAGE_MEASURES)
    return Section(
        "Stages of inference",
        "<p>What layers do with attention and the residual stream, within each loop: a line for each loop, later loops "
        "more yellow; the grey parts are the layers that run once. Where the lines lie on each other, every loop goes "
        "through the same stages.</p>"
        + figures
        + figure(
            neuron_shares(model).plot(),
            "Neurons that push single tokens up (prediction) or down (suppression), judged by their weights alone.",
        ),
        collapsed=True,
    )


def _curves(observed: Observed, name: str, group: Group, caption: str) -> str:
    """A measure's figure; a sentence where it is undefined, as entropies over one token are."""
    if not bool(observed[name].isfinite().any()):
        return f'<p class="note">{escape(observed.labels[name])}: not defined for these prompts.</p>'
    return figure(observed.plot(name, group, log=group == "layer"), caption)
