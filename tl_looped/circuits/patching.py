"""Edges patched in real runs: one by one, or all that are not in a circuit."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.circuits.attribution import one_number, prepare_edges
from tl_looped.circuits.graph import Edge, Graph
from tl_looped.circuits.results import Circuit, Faithfulness
from tl_looped.circuits.running import run_edges
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.model import LoopedModel
from tl_looped.patching.results import LoopPatchingResult, Metric, Metrics, Reduce
from tl_looped.patching.sources import Given


@with_run_options
def patch_edges(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    source: Given,
    metric: Metric,
    edges: Sequence[Edge | Sequence[Edge]],
    reduce: Reduce = "scalar",
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> LoopPatchingResult:
    """The metric when a reader sees the other run's value of a write, along one edge alone: one run for each.

    What the reader makes of it goes on through the whole model. Every reader's stream runs through all that lies on
    it, so the result is exact, also where norms or injections come between.

    Args:
        model: in evaluation mode, without hooks of its own.
        prompts, n_loops, options: as in `edge_attribution`.
        source: the cache of the other prompts, with all writes of all loops; or as in `patch_sweep`.
        metric: from logits to a scalar or [batch], see `reduce`.
        edges: (who writes, who reads), by name; or lists of such, which are patched together.
        reduce: as in `patch_sweep`.
        progress: show a bar over edges.

    Returns:
        A PatchingResult with the axis "edge": values [edge, batch?].

    Raises:
        InputError: before the runs: no edges, unknown names, an edge that runs backward in time.

    Source:
        Path patching (Wang et al. 2022, arXiv 2211.00593) of single edges.

    Example:
        edge = ("blocks.1.loop.0.attn.hook_z.0", "blocks.1.loop.1.attn.hook_q.0")
        patch_edges(model, "a=4; c=a; ? c", source=other, metric=gap, edges=[edge]).effect()
    """
    metrics = Metrics(metric, reduce, only_one="patch_edges")
    run, given, graph = prepare_edges(model, prompts, n_loops, source, options)
    if not edges:
        raise InputError("edges is empty: name at least one, as (who writes, who reads).")
    groups = [[one] if one and isinstance(one[0], str) else list(one) for one in edges]
    masks = [graph.mask(group) for group in groups]  # pyright: ignore[reportArgumentType] - mask checks each
    with torch.no_grad():
        baseline = metrics(model.execute(run))
        bar = tqdm(masks, desc="Edges", disable=not progress)
        values = torch.stack([metrics(run_edges(model, run, given, graph, ~mask)) for mask in bar], 1)
    index = pd.DataFrame({"edge": [" + ".join(f"{edge[0]} -> {edge[1]}" for edge in group) for group in groups]})
    return LoopPatchingResult.of(metrics, values, baseline, index, "edges", (model, run, given), method="edge patching")


@with_run_options
def faithfulness(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    source: Given,
    metric: Metric,
    circuits: Circuit | Sequence[Circuit],
    draws: int = 10,
    draw_seed: int = 0,
    reduce: Reduce = "scalar",
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> Faithfulness:
    """What circuits do alone: along all other edges readers see the other run's values. A run each.

    Beside each circuit stand its complement, and random ones. These are grown: edges in a random order are added until
    those on a path from an input to the logits are as many as the circuit has; the others are left out.

    Args:
        model: in evaluation mode, without hooks of its own.
        prompts, n_loops, options: as in `edge_attribution`.
        source: the cache of the other prompts, with all writes of all loops; or as in `patch_sweep`.
        metric: from logits to a scalar or [batch], see `reduce`.
        circuits: one or several, such as `[scores.top(n) for n in (10, 30, 100)]`.
        draws: random circuits for each.
        draw_seed: seed of these.
        reduce: "scalar": the metric returns a scalar. "mean": it returns [batch], averaged.
        progress: show a bar over runs.

    Raises:
        InputError: before the runs: a circuit of a run of another form, or without edges; after two: a metric that is
            the same with all edges and with none.

    Source:
        Faithfulness and completeness of circuits (Wang et al. 2022, arXiv 2211.00593), with edges as in Syed et al.
        2023 (arXiv 2310.10348).

    Example:
        curve = faithfulness(model, "a=4; c=a; ? c", source=other, metric=gap, circuits=[scores.top(30)])
        curve.plot().show()
    """
    metrics = one_number(metric, reduce, "faithfulness")
    check_count("draws", draws, minimum=0)
    check_count("draw_seed", draw_seed, minimum=0)
    run, given, graph = prepare_edges(model, prompts, n_loops, source, options)
    several = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    for circuit in several:
        _check_circuit(circuit, graph)
    if not several:
        raise InputError("circuits is empty: pass at least one, such as scores.top(30).")

    def value(mask: Bool[Tensor, "writer reader"]) -> float:
        return float(metrics(run_edges(model, run, given, graph, mask))[0].double().mean())

    every = graph.possible
    whole, none = value(every), value(torch.zeros_like(every))
    if whole == none:
        raise InputError(f"the metric is {whole:.4g} with all edges and with none, so there is nothing to keep of it.")
    generator = torch.Generator().manual_seed(draw_seed)
    random = [[_random(graph, one.n_edges, generator) for _ in range(draws)] for one in several]
    masks = [mask for one, drawn in zip(several, random, strict=True) for mask in (one.edges, ~one.edges, *drawn)]
    found = [value(mask) for mask in tqdm(masks, desc="Circuits", disable=not progress)]
    shares = ((torch.tensor(found, dtype=torch.float64) - none) / (whole - none)).view(len(several), draws + 2)
    sizes = torch.tensor([[int(mask.sum()) for mask in drawn] for drawn in random], dtype=torch.long)
    made_by = {"model": model.cfg.model_name, **run.describe(), "source": given.name}
    return Faithfulness(
        made_by={**made_by, "draws": draws, "draw_seed": draw_seed},
        n_edges=torch.tensor([one.n_edges for one in several]),
        faithfulness=shares[:, 0],
        completeness=shares[:, 1],
        random=shares[:, 2:],
        random_edges=sizes.view(len(several), draws),
        metric=(whole, none),
    )


def _check_circuit(circuit: Circuit, graph: Graph) -> None:
    """Raise unless a circuit's nodes are those of a run."""
    theirs = circuit.graph
    if theirs != graph:
        ours = f"{len(graph.writers)} writers and {len(graph.readers)} readers"
        raise InputError(
            f"the circuit has {len(theirs.writers)} writers and {len(theirs.readers)} readers of other names than this "
            f"run with its {ours}: pass the n_loops, initial_state and model that it comes from."
        )
    if not bool(circuit.edges.any()):
        raise InputError("the circuit has no edges: take more, such as scores.top(30).")


def _random(graph: Graph, n: int, generator: torch.Generator) -> Bool[Tensor, "writer reader"]:
    """A random circuit of at least n edges, and the fewest such, all on paths from an input to the logits."""
    edges = graph.possible.nonzero()
    order = edges[torch.randperm(len(edges), generator=generator)]

    def first(k: int) -> Bool[Tensor, "writer reader"]:
        mask = torch.zeros_like(graph.possible)
        mask[order[:k, 0], order[:k, 1]] = True
        return graph.prune(mask)

    low, high = n, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if int(first(middle).sum()) >= n else (middle + 1, high)
    return first(low)
