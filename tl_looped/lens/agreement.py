"""How much the read-outs of different loops agree, at each position and on average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.engine.checks import check_eval
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import log_probs_of
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.lens.measures import kl_divergence
from tl_looped.lens.reads import (
    TRANSLATED,
    LensKind,
    Positions,
    check_kind,
    choose_reads,
    converter,
    read_states,
    table_of,
)
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.batch import chunks
from tl_looped.viz.readout import agreement_heatmaps


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
