"""How much the read-outs of different loops agree, at each position and on average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_looped.engine.checks import check_eval
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import wide_dtype
from tl_looped.engine.results import Result
from tl_looped.lens.measures import kl_divergence, log_probs_of
from tl_looped.lens.reads import (
    LensKind,
    Positions,
    check_kind,
    choose_reads,
    chunks,
    converter,
    read_states,
    real_positions,
)
from tl_looped.model import LoopedModel, check_looped
from tl_looped.viz.agreement import agreement_heatmaps


@dataclass(frozen=True, eq=False, repr=False)
class LoopAgreement(Result):
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
        rows = [
            {
                "loop": self.loops[i],
                "other": self.loops[j],
                "batch": batch,
                "pos": self.positions[pos],
                "same_top": bool(self.same_top[i, j, batch, pos]),
                "kl": float(self.kl[i, j, batch, pos]),
            }
            for i in range(len(self.loops))
            for j in range(len(self.loops))
            for batch, pos in self.real.nonzero().tolist()
        ]
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Top-token agreement and KL between loops, averaged over real positions."""
        return agreement_heatmaps(self.mean_agreement(), self.mean_kl(), self.loops)


@torch.no_grad()
def loop_agreement(
    model: LoopedModel,
    input: str | list[str] | Tensor,
    n_loops: int | None = None,
    *,
    kind: LensKind = "exact",
    loops: Iterable[int] | None = None,
    positions: Positions = None,
    **options: Any,
) -> LoopAgreement:
    """Whether any two loops would say the same, at each position.

    Args:
        model, input, n_loops, loops, options: as in `loop_lens`.
        kind: as in `loop_lens`, without "tuned".
        positions: all by default.

    Raises:
        InputError: fewer than two loops, or what `loop_lens` refuses.
    """
    check_eval(check_looped(model))
    run = model.batch(input, n_loops, **options)
    if kind == "tuned":
        raise InputError("agreement compares what the model itself says: pass kind='exact', 'direct' or 'coda'.")
    check_kind(model, kind, False)
    reads = choose_reads(model, run, "state", loops, None, positions)
    if len(reads.loops) < 2:
        raise InputError(f"agreement compares loops, got loops={list(reads.loops)}: pass two or more.")
    states, _ = read_states(model, run, reads, converter(model, run, reads, kind))
    rows = torch.stack([states[loop, 0].flatten(0, 1) for loop in reads.loops])
    n, total = rows.shape[:2]
    kl = torch.zeros(n, n, total, dtype=wide_dtype(rows.dtype))
    same = torch.zeros(n, n, total, dtype=torch.bool)
    for piece in chunks(total, model.cfg.d_vocab * n):
        log_probs = log_probs_of(model.transformer.unembed(rows[:, piece]))
        top = log_probs.argmax(-1)
        same[:, :, piece] = (top[:, None] == top).cpu()
        for i in range(n):
            for j in range(n):
                kl[i, j, piece] = kl_divergence(log_probs[i], log_probs[j]).cpu()
    real = real_positions(run, reads).cpu()
    shape = (n, n, *real.shape)
    return LoopAgreement(
        made_by={"model": model.cfg.model_name, **run.describe(), "kind": kind},
        loops=reads.loops,
        positions=reads.positions,
        real=real,
        same_top=same.reshape(shape),
        kl=kl.reshape(shape).masked_fill(~real, float("nan")),
    )
