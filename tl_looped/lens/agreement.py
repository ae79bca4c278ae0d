"""How much read-outs agree: those of different loops with each other, those of different lenses with the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.engine.checks import check_eval
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.numbers import interval, log_probs_of
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import CORE, LoopCount
from tl_looped.lens.lens import measure_states
from tl_looped.lens.measures import kl_divergence
from tl_looped.lens.reads import (
    TRANSLATED,
    Convert,
    LensKind,
    LensSite,
    Place,
    Positions,
    Translator,
    check_kind,
    choose_positions,
    choose_reads,
    converter,
    read_states,
    table_of,
)
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.batch import chunks
from tl_looped.viz.readout import agreement_heatmaps, lens_curves


@dataclass(frozen=True, eq=False, repr=False)
class ReadoutAgreement(Result):
    """Every loop's read-out of the state against every other's.

    Attributes:
        loops, positions: which were read.
        real: which of the positions read hold a real token.
        same_top: whether the two loops have the same top token.
        kl: KL(loop of the row ‖ loop of the column), in nats; NaN at padding.
    """

    loops: tuple[int, ...]
    positions: tuple[int, ...]
    real: Bool[Tensor, "batch pos"]
    same_top: Bool[Tensor, "loop loop batch pos"]
    kl: Float[Tensor, "loop loop batch pos"]

    def mean_agreement(self) -> Float[Tensor, "loop loop"]:
        """Share of real positions at which two loops have the same top token."""
        return self.same_top[:, :, self.real].double().mean(-1)

    def mean_kl(self) -> Float[Tensor, "loop loop"]:
        """Mean KL(row ‖ column) over real positions, in nats."""
        return self.kl[:, :, self.real].mean(-1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each pair of loops and real position: loop, other, batch, pos, same_top, kl."""
        labels = {"loop": self.loops, "other": self.loops, "batch": range(len(self.real)), "pos": self.positions}
        return table_of(labels, self.real.expand(self.same_top.shape), {"same_top": self.same_top, "kl": self.kl})

    def plot(self) -> go.Figure:
        """Top-token agreement and KL between loops, averaged over real positions."""
        return agreement_heatmaps(self.mean_agreement(), self.mean_kl(), self.loops)


@with_run_options
def readout_agreement(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    kind: LensKind = "exact",
    loops: Iterable[int] | None = None,
    positions: Positions = None,
    **options: Unpack[RunOptions],
) -> ReadoutAgreement:
    """Whether any two loops would say the same, at each position.

    Over many prompts, with the last loop alone: `observe(measures=[AGREEMENT, KL_TO_FINAL])`.

    Args:
        model, prompts, n_loops, loops, options: as in `logit_lens`.
        kind: as in `logit_lens`, without those that need a translator.
        positions: all by default.

    Raises:
        InputError: fewer than two loops, or what `logit_lens` refuses.
    """
    check_eval(check_looped(model, several_stacks=True))
    runs = model.prepare(prompts, n_loops, **options)
    if kind in TRANSLATED:
        raise InputError("agreement compares what the model itself says: pass kind='exact', 'direct' or 'coda'.")
    check_kind(model, kind, False)
    reads = choose_reads(model, runs, loops=loops, positions=positions)
    if len(reads.loops) < 2:
        raise InputError(f"agreement compares loops, got loops={list(reads.loops)}: pass two or more.")
    run = model.batch_of(runs)
    states, _ = read_states(model, run, reads, converter(model, run, reads, kind), reads.loops)
    same, kl = _compare(model, torch.stack([states[loop, None] for loop in reads.loops]))
    real = run.attention_mask[:, list(reads.positions)].cpu()
    return ReadoutAgreement(
        made_by={"model": model.cfg.model_name, **run.describe(), "kind": kind},
        loops=reads.loops,
        positions=reads.positions,
        real=real,
        same_top=same.unflatten(-1, real.shape),
        kl=kl.unflatten(-1, real.shape).masked_fill(~real, float("nan")),
    )


@torch.no_grad()
def _compare(
    model: LoopedModel, states: Float[Tensor, "loop rows d_model"]
) -> tuple[Bool[Tensor, "loop loop rows"], Float[Tensor, "loop loop rows"]]:
    """(same top token, KL) of every pair, on the CPU; log probabilities of a piece of the rows exist at a time."""
    n, total = states.shape[:2]
    same, kl = [], []
    for piece in chunks(total, model.cfg.d_vocab * n):
        log_probs = log_probs_of(model.transformer.unembed(states[:, piece]))
        top = log_probs.argmax(-1)
        same.append((top[:, None] == top).cpu())
        kl.append(torch.stack([torch.stack([kl_divergence(p, q) for q in log_probs]) for p in log_probs]).cpu())
    return torch.cat(same, dim=-1), torch.cat(kl, dim=-1)


# Lenses side by side.

_MEASURES = ("same_top", "kl", "rank")


@dataclass(frozen=True, eq=False, repr=False)
class LensComparison(Result):
    """Several lenses against what the run itself says at last, at every loop and layer; means over positions.

    Attributes:
        kinds: the lenses.
        site: what was read.
        loops, layers: of what was read; layers is None for the state.
        same_top: share of positions at which the lens's top token is the run's.
        kl: KL(run ‖ lens), in nats.
        rank: of the run's top token; 0 is the top.
        low, high: 95 % intervals of the means over prompts of these three, by resampling prompts.
    """

    kinds: tuple[LensKind, ...]
    site: LensSite
    loops: tuple[int, ...]
    layers: tuple[int, ...] | None
    same_top: Float[Tensor, "lens loop layer prompt"]
    kl: Float[Tensor, "lens loop layer prompt"]
    rank: Float[Tensor, "lens loop layer prompt"]
    low: Float[Tensor, "measure lens loop layer"]
    high: Float[Tensor, "measure lens loop layer"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each lens, loop and layer: of same_top, kl and rank the mean over prompts and its interval."""
        columns = {}
        for name, low, high in zip(_MEASURES, self.low, self.high, strict=True):
            columns |= {name: getattr(self, name).mean(-1), f"{name}_low": low, f"{name}_high": high}
        labels = {"lens": range(len(self.kinds)), "loop": self.loops, "layer": self.layers or (0,)}
        table = table_of(labels, torch.ones(self.kl.shape[:3]).bool(), columns)
        table["lens"] = [self.kinds[which] for which in table["lens"]]
        return table if self.layers is not None else table.drop(columns="layer")

    def plot(self) -> go.Figure:
        """The three measures, a panel each, over loops and the layers in them; a line with its intervals for a lens."""
        places = [(t, layer) for t in self.loops for layer in self.layers or (None,)]
        means = torch.stack([getattr(self, name).mean(-1) for name in _MEASURES])
        title = f"Lenses against the run's own output: {self.made_by.get('model', '')}, {self.site}"
        low, high = self.low.flatten(2), self.high.flatten(2)
        return lens_curves(means.flatten(2), low, high, self.kinds, places, title)


@with_run_options
def compare_lenses(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    translators: Sequence[Translator] = (),
    kinds: Sequence[LensKind] | None = None,
    site: LensSite = "resid_post",
    loops: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    positions: Positions = None,
    stack: str | None = None,
    resamples: int = 1000,
    bootstrap_seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> LensComparison:
    """How well every lens tells, at every loop and layer, what the run says at last; one run for all of them.

    Args:
        model, prompts, n_loops, site, loops, layers, stack, options: as in `logit_lens`. Take prompts that no lens was
            fitted on, and more than a few: intervals are over prompts.
        translators: a `TunedLens`, a `JacobianLens`, or both, of this site; each is a lens more.
        kinds: lenses that need none; None for "exact", where the head reads this stack's state, and "direct". (Where
            there is a coda, "exact" runs it, and is what "coda" is.)
        positions: of each prompt, from its own first token or back from its last; all by default.
        resamples, bootstrap_seed: of the bootstrap.
        batch_size: prompts that run together, of one length.
        progress: show a bar over batches.

    Raises:
        InputError: no lens, one lens twice, a translator among `kinds`, or what `logit_lens` refuses.

    Source:
        The measures of the tuned lens (Belrose et al. 2023, arXiv 2303.08112), with loops.

    Example:
        compare_lenses(model, held_out, translators=[tuned, jacobian]).plot()
    """
    check_eval(check_looped(model, several_stacks=True))
    for name, value in (("resamples", resamples), ("batch_size", batch_size)):
        check_count(name, value)
    check_count("bootstrap_seed", bootstrap_seed, minimum=0)
    runs = model.prepare(prompts, n_loops, **options)
    reads = choose_reads(model, runs, site, loops, layers, stack=stack)
    lenses = _lenses(model, kinds, translators, reads.stack)
    for translator in translators:
        translator.check(model, runs.counts, reads)
    batches = runs.equal_lengths(batch_size)
    for rows in batches:
        choose_positions(positions, len(runs.rows.unpadded(rows[0])))
    shape = (len(_MEASURES), len(lenses), len(reads.loops), len(reads.streams))
    found = torch.empty(*shape, len(runs), dtype=torch.float64)
    for rows in tqdm(batches, "Comparing lenses", unit="batch", disable=not progress):
        run = model.batch_of(runs, rows)
        at = replace(reads, positions=choose_positions(positions, run.tokens.shape[1]))
        readers = [
            converter(model, run, at, kind, None if translator is None else translator.translate)
            for kind, translator in lenses.items()
        ]

        def read(x: Tensor, place: Place, readers: list[Convert] = readers) -> Tensor:
            return torch.stack([reader(x, place) for reader in readers])

        states, final = read_states(model, run, at, read, reads.loops)
        top = final.argmax(-1, keepdim=True)
        for which in range(len(lenses)):
            said = measure_states(model, at, {place: x[which] for place, x in states.items()}, final, top, 1)
            same, rank = said["top_ids"][..., 0] == top[:, 0], said["target_ranks"][..., 0]
            values = torch.stack([same.double(), said["kl_to_final"].double(), rank.double()]).cpu()
            found[:, which, ..., rows] = values.unflatten(1, shape[2:]).unflatten(-1, (len(rows), -1)).mean(-1)
    low, high = interval(found, resamples, bootstrap_seed)
    return LensComparison(
        made_by={
            "model": model.cfg.model_name,
            **model.batch_of(runs, [0]).describe(),
            "prompts": len(runs),
            "resamples": resamples,
            "bootstrap_seed": bootstrap_seed,
            **model.cfg.made_of(reads.stack),
        },
        kinds=tuple(lenses),
        site=site,
        loops=reads.loops,
        layers=reads.layers,
        **dict(zip(_MEASURES, found, strict=True)),
        low=low,
        high=high,
    )


def _lenses(
    model: LoopedModel, kinds: Sequence[LensKind] | None, translators: Sequence[Translator], stack: str
) -> dict[LensKind, Translator | None]:
    """Every lens by its kind, with its translator."""
    if not isinstance(translators, Sequence) or not all(isinstance(one, Translator) for one in translators):
        raise InputError(f"translators must be a list of TunedLens and JacobianLens, got {translators!r}.")
    if kinds is None:
        kinds = ("exact", "direct") if stack in (CORE, model.cfg.head_stack) else ("direct",)
    given: list[LensKind] = [*kinds, *(one.kind for one in translators)]
    if not given or len(set(given)) < len(given):
        raise InputError(f"name one lens or more, each once, with kinds= and translators=, got {given}.")
    for kind in kinds:
        if kind in TRANSLATED:
            raise InputError(f"kind {kind!r} is that of a translator: pass translators=[{TRANSLATED[kind]}(...)].")
        check_kind(model, kind, False, stack)
    return dict(zip(given, [*(None for _ in kinds), *translators], strict=True))
