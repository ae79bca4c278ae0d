"""Accuracy of a variable-chain model by hops and loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from tl_looped.model import LoopedModel, one_core
from tl_looped.training.trainer import query_logits
from tl_looped.training.variable_chains import MAX_HOPS, Contexts, draw_contexts, draw_size

LOOPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)
FRESH_SEED = 987_654_321  # far from the seeds of training


def fresh_contexts(
    shuffled: bool, total: int, size: tuple[int, int] | None = None, batch: int = 200, seed: int = FRESH_SEED
) -> list[Contexts]:
    """Contexts that training has not seen, of the sizes it ends with, or all of one (assignments, longest chain)."""
    rng = np.random.default_rng(seed)
    sizes = (size or draw_size(rng, MAX_HOPS) for _ in range(total // batch))
    return [draw_contexts(rng, batch, n, longest, shuffled) for n, longest in sizes]


def accuracy_table(model: LoopedModel, contexts: Sequence[Contexts], loops: Sequence[int] = LOOPS) -> pd.DataFrame:
    """Share of right answers: a row for each number of hops, a column for each loop count, and the queries counted."""
    right: dict[int, np.ndarray] = {}
    count: dict[int, int] = {}
    with torch.no_grad():
        for batch in contexts:
            logits = query_logits(one_core(model), batch, max(loops))
            hits = logits[[t - 1 for t in loops]].argmax(-1).numpy() == batch.answer
            for h in np.unique(batch.hops):
                chosen = batch.hops == h
                right[int(h)] = right.get(int(h), np.zeros(len(loops))) + hits[:, chosen].sum(1)
                count[int(h)] = count.get(int(h), 0) + int(chosen.sum())
    hops = sorted(right)
    table = pd.DataFrame([right[h] / count[h] for h in hops], index=pd.Index(hops, name="hops"), columns=list(loops))
    table.columns.name = "loops"
    table.insert(0, "queries", [count[h] for h in hops])
    return table
