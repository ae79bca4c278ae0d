"""Scores of edges, the circuits made of them, and how faithful these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.circuits.graph import Edge, Graph
from tl_looped.engine.checks import check_number
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.results import Result
from tl_looped.engine.schedule import LoopCount
from tl_looped.model import LoopedModel, check_looped
from tl_looped.patching.results import LoopPatchingResult
from tl_looped.viz.circuits import circuit_figure, faithfulness_figure


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Result):
    """Some of a run's edges.

    Attributes:
        writers, readers: name, kind, stack, layer, loop, head and time of each, in the order of time.
        edges: which are in it.
        scores: of edge attribution; NaN where there are none.
    """

    writers: tuple[dict[str, Any], ...]
    readers: tuple[dict[str, Any], ...]
    edges: Bool[Tensor, "writer reader"]
    scores: Float[Tensor, "writer reader"]

    @classmethod
    def of(
        cls, model: LoopedModel, edges: Sequence[Edge], n_loops: LoopCount | None = None, *, state_given: bool = False
    ) -> Circuit:
        """The circuit of named edges, as they are.

        Args:
            model: whose edges.
            edges: (who writes, who reads), by name.
            n_loops: of the runs that it is a part of; None for the count the model was trained with.
            state_given: whether these are given an initial state.

        Raises:
            InputError: no edges, names that such a run does not have, an edge that runs backward in time.
        """
        check_looped(model, several_stacks=True)
        graph = Graph.of(model, n_loops, state_given or not model.cfg.starts_from_prelude)
        mask = graph.mask(edges)
        n = model.cfg.schedule(n_loops).n_loops(None)
        made_by = {"model": model.cfg.model_name, "n_loops": n, "chosen_by": "name"}
        return cls(made_by, **graph.rows(), edges=mask, scores=torch.full(mask.shape, torch.nan, dtype=torch.float64))

    @property
    def graph(self) -> Graph:
        """Its writers and readers, with all edges that there are."""
        return Graph.from_rows(self.writers, self.readers)

    @property
    def n_edges(self) -> int:
        """How many edges are in it."""
        return int(self.edges.sum())

    def names(self) -> list[Edge]:
        """Its edges, as (who writes, who reads)."""
        return [(self.writers[w]["name"], self.readers[r]["name"]) for w, r in self.edges.nonzero().tolist()]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each of its edges."""
        return self.graph.table(self.edges, self.scores)

    def tied(self) -> pd.DataFrame:
        """One row for each physical edge: in which loops (of the reader, else of the writer) it is in the circuit.

        Writers and readers are named without a loop, with how many loops lie between them (where both are of one stack
        that loops); `n` counts the edges of this run that the physical edge stands for, `score` is their sum.
        """
        return self.graph.tied(self.edges, self.scores)

    def plot(self, most: int = 200) -> go.Figure:
        """Its largest edges, from left to right through the loops: heads and MLPs of a layer one above the other."""
        title = f"Circuit of {self.n_edges} edges: {self.made_by.get('model', '')}"
        return circuit_figure(self.writers, self.readers, self.edges, self.scores, title, most)


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Result):
    """What patching each edge would change, to first order.

    Attributes:
        writers, readers: name, kind, stack, layer, loop, head and time of each, in the order of time.
        scores: in units of the metric; NaN where there is no edge.
        metric: of the run that nothing is patched into.
    """

    writers: tuple[dict[str, Any], ...]
    readers: tuple[dict[str, Any], ...]
    scores: Float[Tensor, "writer reader"]
    metric: float

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int((~self.scores.isnan()).sum())

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each edge."""
        return Graph.from_rows(self.writers, self.readers).table(~self.scores.isnan(), self.scores)

    def top(self, n: int) -> Circuit:
        """The n edges of largest score, either sign, less those that lie on no path from an input to the logits.

        Raises:
            InputError: no path is left.
        """
        check_count("n", n)
        sizes = self.scores.abs().nan_to_num(-1).flatten()
        mask = torch.zeros_like(sizes, dtype=torch.bool)
        mask[sizes.argsort(descending=True, stable=True)[:n]] = True
        return self._circuit(mask.view(self.scores.shape) & ~self.scores.isnan(), "top", n)

    def threshold(self, least: float) -> Circuit:
        """The edges whose score is at least so large, either sign, pruned as by `top`.

        Raises:
            InputError: no path is left.
        """
        check_number("least", least, low_too=True)
        return self._circuit(self.scores.abs() >= least, "threshold", least)

    def measured(self, result: LoopPatchingResult) -> EdgeScores:
        """The same edges, with what `patch_edges` measured of each alone in place of the estimate.

        Args:
            result: of single edges of this run; one that was not measured counts as none.

        Raises:
            InputError: it has prompts of their own, edges that were patched together, or ones that are not here.
        """
        effect, table = result.effect(), result.index_df
        names = list(map(str, table["edge"])) if "edge" in table else []
        if effect.ndim != 1 or len(names) != len(effect):
            raise InputError("measured needs a result of patch_edges with one number for an edge: pass reduce='mean'.")
        graph = Graph.from_rows(self.writers, self.readers)
        scores = torch.full_like(self.scores, torch.nan)
        for name, value in zip(names, effect.tolist(), strict=True):
            scores[graph.mask([(name.partition(" -> ")[0], name.partition(" -> ")[2])])] = value
        return replace(self, scores=scores, made_by={**self.made_by, "method": "edge patching"})

    def _circuit(self, mask: Bool[Tensor, "writer reader"], by: str, value: float | int) -> Circuit:
        edges = Graph.from_rows(self.writers, self.readers).prune(mask)
        if not bool(edges.any()):
            raise InputError(
                f"no path from an input to the logits is among the {int(mask.sum())} edges of {by}({value}): take more."
            )
        made_by = {**self.made_by, "chosen_by": by, by: value}
        return Circuit(made_by, self.writers, self.readers, edges, self.scores)

    def plot(self, most: int = 100) -> go.Figure:
        """The largest edges, as a circuit is drawn, but none left out for lying on no path."""
        title = f"The largest of {self.n_edges} edges: {self.made_by.get('model', '')}"
        return circuit_figure(self.writers, self.readers, ~self.scores.isnan(), self.scores, title, most)


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness(Result):
    """How much of a behaviour circuits keep, beside circuits drawn at random.

    Attributes:
        n_edges: of each circuit.
        faithfulness: (metric of the circuit − metric of none) / (metric of all − metric of none): 1 where the circuit
            does what the whole model does, 0 where it does what the other values alone do.
        completeness: the same for all edges but the circuit's: 0 where nothing of the behaviour is left without it.
        random: the faithfulness of random circuits, as large or a little larger; each of its edges lies on a path.
        random_edges: how many edges these have.
        metric: (of all edges, of none).
    """

    n_edges: Int[Tensor, " circuit"]
    faithfulness: Float[Tensor, " circuit"]
    completeness: Float[Tensor, " circuit"]
    random: Float[Tensor, "circuit draw"]
    random_edges: Int[Tensor, "circuit draw"]
    metric: tuple[float, float]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each circuit."""
        table = {"n_edges": self.n_edges, "faithfulness": self.faithfulness, "completeness": self.completeness}
        if self.random.shape[1]:
            table |= {"random_mean": self.random.mean(1), "random_largest": self.random.amax(1)}
        return pd.DataFrame({name: values.numpy() for name, values in table.items()})

    def plot(self) -> go.Figure:
        """Curves over the number of edges."""
        title = f"Faithfulness of circuits: {self.made_by.get('model', '')}"
        return faithfulness_figure(self.n_edges, self.faithfulness, self.completeness, self.random, title)
