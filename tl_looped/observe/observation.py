"""Measures taken while a model runs, reduced at once, over many prompts and any number of loops.

A measure sees the activation at one place, and where it compares loops that of one or two others. So what a run keeps
does not grow with its loops, but for the numbers that it returns.

Prompts of the same length run as one batch, and no others do: there is no padding that a measure would have to leave
out, and a prompt's numbers do not depend on its company.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformer_lens.model_protocol import TransformerLensModel
from typing_extensions import Unpack

from tl_looped.engine.checks import check_eval
from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.identity import digest, weights_digest
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.observe.batch import Batch
from tl_looped.observe.measure import Measure, check_measures
from tl_looped.observe.observed import Observed, Store
from tl_looped.observe.places import Places
from tl_looped.observe.runners import FeedforwardRunner, LoopedRunner, Runner
from tl_looped.observe.watching import spell_place

BATCH_SIZE = 16
"""Prompts that run at once, unless the caller says how many."""


@with_run_options
def observe(
    model: Engine | TransformerLensModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    measures: Sequence[Measure],
    per_token: Sequence[str] = (),
    batch_size: int = BATCH_SIZE,
    save_to: str | Path | None = None,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> Observed:
    """Take measures at every place where their sites fire, for every prompt, in memory that does not grow with loops.

    Each measure is computed inside the forward and averaged over positions (those where it is defined), so one number
    (or one for each head) is kept for a prompt and a place. Of activations are kept: for measures that compare with
    previous loops, one or two for each core layer; for those that compare with the last, one for each core layer, from
    a first run that goes to the end and keeps nothing else, so that such measures take two runs of every batch; and
    small ones that wait to be measured together, up to 262,144 numbers of a component.

    Hooks that are on the model act in every run. Logits are formed for read-outs only, for some positions at a time.

    Args:
        model: in evaluation mode: a looped model, or a feedforward one of TransformerLens.
        prompts: in any form; padding is cut off.
        n_loops: loops to run; None for the count the model was trained with.
        measures: what to take; several may read the same site.
        per_token: names of measures to keep for every token too.
        batch_size: most prompts to run at once. Only prompts of the same length run together.
        save_to: a file for what is done so far, written every few seconds and when the call ends, also by an error or
            an interrupt. The same call goes on from it.
        progress: show a bar.
        options: see `RunOptions`.

    Returns:
        The measures, prompts in the order given.

    Raises:
        InputError: before anything runs, for input that is wrong, or a file of another call; or in the run, where
            activations are not finite: the message says in which prompt, and in which layer and loop they began.

    Source:
        The measures of arXiv 2604.11791 over many prompts; the observation is this library's.
    """
    check_count("batch_size", batch_size)
    kept = (per_token,) if isinstance(per_token, str) else tuple(per_token)
    chosen = check_measures(measures, kept)
    if isinstance(model, torch.nn.Module):
        check_eval(model)
    if isinstance(model, Engine):
        for measure in chosen:
            if measure.reads_tokens:
                model.cfg.check_causal(f"measure {measure.name!r}")
        runner: Runner = LoopedRunner(model, model.prepare(prompts, n_loops, **options))
    else:
        runner = FeedforwardRunner(model, prompts, n_loops, options)
    places = _places(chosen, runner)
    batches = runner.runs.equal_lengths(batch_size)
    tokens = tuple(runner.runs.rows.unpadded(row) for row in range(len(runner.runs)))
    empty = Observed(
        made_by={
            **runner.describe(),
            "prompts": digest(*tokens),
            "measures": {measure.name: measure.describe() for measure in chosen},
            "per_token": kept,
            "weights": None if save_to is None else weights_digest(model),
        },
        schedule=runner.schedule,
        tokens=tokens,
        done=torch.zeros(len(tokens), dtype=torch.bool),
        labels={measure.name: measure.label for measure in chosen},
        units={measure.name: measure.unit for measure in chosen},
        kinds={measure.name: places[measure.name].kind for measure in chosen},
        stacks={measure.name: places[measure.name].stack or "" for measure in chosen},
        axes={measure.name: tuple(axis for axis in measure.axes if axis != "pos") for measure in chosen},
        values={},
        per_token={name: (None,) * len(tokens) for name in kept},
    )
    store = Store(empty, save_to)
    twice = any(measure.compare == "last" for measure in chosen)
    steps = runner.n_loops * (2 if twice else 1)
    name = f"Observing{' (each batch runs to its end first)' if twice else ''}"
    with torch.no_grad(), store.writing(), tqdm(desc=name, total=len(batches) * steps, disable=not progress) as bar:
        for done, rows in enumerate(batches):
            bar.update(done * steps - bar.n)
            pending = [row for row in rows if not store.done[row]]
            if pending:
                batch = _take(runner, pending, chosen, places, kept, bar)
                store.put(pending, batch.values, batch.per_token)
        bar.update(bar.total - bar.n)
    return store.result()


def _places(measures: Sequence[Measure], runner: Runner) -> dict[str, Places]:
    """Where each measure reads.

    Raises:
        InputError: a site that the model, or one of its layers, does not have; or a comparison of loops without any.
    """
    found = {}
    for measure in measures:
        if measure.compare != "none" and runner.n_loops < 2:
            raise InputError(f"measure {measure.name!r} compares loops, but {runner.one_loop}.")
        try:
            found[measure.name] = runner.places(measure.site)
        except InputError as error:
            raise InputError(f"measure {measure.name!r} reads {measure.site!r}: {error}") from error
        if measure.compare != "none" and found[measure.name].kind == "once":
            raise InputError(f"measure {measure.name!r} compares loops, but {measure.site!r} fires once in a run.")
    return found


def _take(
    runner: Runner,
    rows: list[int],
    measures: Sequence[Measure],
    places: dict[str, Places],
    kept: tuple[str, ...],
    bar: tqdm,
) -> Batch:
    """Run one batch and take its measures."""
    batch = Batch(runner, rows, measures, places, kept, bar)
    to_end = sorted({places[measure.name].key for measure in measures if measure.compare == "last"})
    try:
        if to_end:
            runner.run(rows, to_end, batch.keep, only_end=True)
            bar.update(runner.n_loops)
        runner.run(rows, sorted(batch.measures), batch.take)
        batch.finish()
    except Exception as error:
        _check_finite(runner, rows, batch, error)  # whatever a measure made of such numbers, they are what is wrong
        raise
    _check_finite(runner, rows, batch, None)
    return batch


def _check_finite(runner: Runner, rows: Sequence[int], batch: Batch, error: Exception | None) -> None:
    """Raise where an activation that was seen is not finite, and say where in the run that began."""
    wrong = batch.first_not_finite()
    if wrong is not None:
        name, row = runner.origin(rows) or wrong
        raise InputError(
            f"prompt {rows[row]}: activations are not finite, from {spell_place(name)} on. Look at the weights there, "
            "run in a wider dtype or with fewer loops, or leave the prompt out."
        ) from error
