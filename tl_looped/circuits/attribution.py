"""Edge attribution: what patching every edge would do, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.circuits.graph import HEAD, LOGITS, MLP_READS, Graph
from tl_looped.circuits.results import EdgeScores
from tl_looped.engine.errors import InputError
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.network import frozen_weights
from tl_looped.engine.numbers import wide
from tl_looped.engine.runs import Prompts, Run, RunOptions, with_run_options
from tl_looped.engine.schedule import HookSite, LoopCount
from tl_looped.lens.writes import cut_writes
from tl_looped.model import LoopedModel
from tl_looped.nn.attention import Attention
from tl_looped.observe.watching import watch
from tl_looped.patching.attribution import check_gradients, moved, site_gradients, steps_of
from tl_looped.patching.checks import prepare_patch
from tl_looped.patching.results import Metric, Metrics, Reduce
from tl_looped.patching.sources import Given, Source

_AT_ONCE = 2**26  # numbers in the gradients that are formed at once


@with_run_options
def edge_attribution(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    source: Given,
    metric: Metric,
    n_steps: int | None = None,
    reduce: Reduce = "scalar",
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> EdgeScores:
    r"""Score every edge, from a write to a later read, across loops: what patching it alone would change.

    score(w → r) = Σ (other − this value of w) · ∂ metric / ∂ w through r alone, summed over prompts and positions.
    Writers are the embedding (and an initial state that is not the prelude's), every head's z and every MLP's output in
    every loop; readers every head's query, key and value, every MLP and the logits.

    The gradient comes from the metric to q, k, v or an MLP's input, by an exact vector-Jacobian product through W_Q[h]
    and the norm before it to the stream, and back along the stream with all other layers' writes constant: through
    injections, norms on the stream or between loops, and the gate of an update, which are part of the way. Inputs are
    not expanded by head. Where the stream is a sum, one gradient serves all writes to it.

    Args:
        model: in evaluation mode, without hooks of its own.
        prompts, n_loops, options: as in `LoopedModel.forward`: the prompts whose behaviour is explained.
        source: the cache of the other prompts, with all writes of all loops; or as in `patch_sweep`.
        metric: a differentiable function of logits, to a scalar or [batch], see `reduce`.
        n_steps: average the gradients over so many runs whose embeddings lie between this prompt's and the other's, as
            in `attribution_sweep`; None for one gradient at this run.
        reduce: "scalar": the metric returns a scalar. "mean": it returns [batch], averaged.
        progress: show a bar over steps.

    Returns:
        Scores [writer, reader], in units of the metric; positive where the other value would raise it.

    Raises:
        InputError: before the runs, or after the first when the metric can't be differentiated; a model whose layers
            read tokens beside the stream (value embeddings).

    Source:
        Edge attribution patching (Syed et al. 2023, arXiv 2310.10348); along the input, EAP-IG (Hanna et al. 2024,
        arXiv 2403.17806). The way through loops is this library's.

    Example:
        _, other = model.run_with_cache("a=9; c=a; b=7; d=c; f=b; ? d")
        gap = lambda logits: logits[0, -1, 9] - logits[0, -1, 14]  # the ids of 4 and 9
        scores = edge_attribution(model, "a=4; c=a; b=7; d=c; f=b; ? d", source=other, metric=gap, n_steps=5)
        scores.top(30).plot().show()
    """
    check_gradients()
    metrics = one_number(metric, reduce, "edge_attribution")
    run, given, graph = prepare_edges(model, prompts, n_loops, source, options)
    fractions = steps_of(model, given, n_steps)
    deltas, baseline = _deltas(model, run, given, graph, metrics)
    paths = _Paths(model, run, graph, deltas, sums=_is_sum(model))
    scores = torch.zeros(graph.possible.shape, dtype=torch.float64)
    for fraction in tqdm(fractions, desc="Attribution", disable=not progress or len(fractions) == 1):
        scores += paths.scores(metrics, given, fraction) / len(fractions)
    if reduce == "mean":
        scores /= len(run.tokens)
    method = "edge attribution" if n_steps is None else f"edge attribution, integrated, {n_steps} steps"
    made_by = {"model": model.cfg.model_name, **run.describe(), "source": given.name, "method": method}
    return EdgeScores(made_by, **graph.rows(), scores=scores.masked_fill(~graph.possible, torch.nan), metric=baseline)


def one_number(metric: Metric, reduce: Reduce, call: str) -> Metrics:
    """A metric that gives one number for all prompts."""
    if reduce == "none":
        raise InputError(f"{call} gives one number for all prompts: pass reduce='mean', or call it prompt by prompt.")
    return Metrics(metric, reduce, only_one=call)


def prepare_edges(
    model: LoopedModel, prompts: Prompts, n_loops: LoopCount | None, source: Given, options: RunOptions
) -> tuple[Run, Source, Graph]:
    """The run, the source of the other values, and the graph.

    Raises:
        InputError: as `prepare_patch`; a source without all writes; layers that read tokens beside the stream.
    """
    run, given = prepare_patch(model, prompts, n_loops, source, options, several_stacks=True)
    if model.cfg.reads_tokens_in_layers:
        raise InputError(
            f"layers of {model.cfg.model_name} read tokens beside the stream, by value embeddings, which are no edge: "
            "patch nodes instead (tl_looped.patching.patch_sweep, attribution_sweep)."
        )
    graph = Graph.of(model, run.counts, run.state is not None)
    given.require(list(dict.fromkeys(node.site.name for node in graph.writers)), run)
    return run, given, graph


def _is_sum(model: LoopedModel) -> bool:
    """Whether within a loop the stream is the sum of what heads and MLPs write."""
    return model.cfg.norm_placement == "pre" and model.cfg.heads_mixed_by() is None


def _deltas(
    model: LoopedModel, run: Run, source: Source, graph: Graph, metrics: Metrics
) -> tuple[dict[str, Tensor], float]:
    """(other − this value of every write, by site; the metric of this run)."""
    deltas: dict[str, Tensor] = {}
    names = list(dict.fromkeys(node.site.name for node in graph.writers))

    def see(site: HookSite, x: Tensor) -> None:
        deltas[site.name] = source.values(site, x) - x

    logits = watch(model, run, names, see, read_out=True)
    return deltas, float(metrics(cast(Tensor, logits))[0].mean())


class _Leaf(NamedTuple):
    """A write of one graph: when, to which part of the stream, where, whose, and what each writer would add to it."""

    time: int
    part: str
    site: HookSite
    writers: list[int]
    delta: Float[Tensor, "writer batch pos width"]


class _Paths:
    """The way from every reader back to every write before it, along the stream with later branches cut.

    Writes are leaves of one graph. Where the stream is a sum of all writes of a part, these have one gradient: a reader
    asks for that of the last before it, and it is the gradient of the others.

    Args:
        model, run, graph: what runs.
        deltas: other − this value of every write, by site.
        sums: whether within a loop the stream is a plain sum, also of heads; else every write is asked for.
    """

    def __init__(self, model: LoopedModel, run: Run, graph: Graph, deltas: dict[str, Tensor], sums: bool):
        self.model, self.run, self.graph = model, run, graph
        one_sum = sums and model.cfg.sum_broken_by(run.n_loops) is None
        self.leaves: list[_Leaf] = []
        for i, node in enumerate(graph.writers):
            site = HookSite("hook_attn_out", *node.call) if sums and node.kind == "head" else node.site
            if self.leaves and self.leaves[-1].site == site:
                self.leaves[-1].writers.append(i)
                continue
            part = site.name if node.layer is None or not sums else f"{node.stack} {node.loop}"
            self.leaves.append(_Leaf(node.time, "" if one_sum else part, site, [i], self._delta(site, deltas)))
        self.groups: list[tuple[list[int], list[str]]] = []  # readers at one place, and what they read there
        for i, node in enumerate(graph.readers):
            if node.head:
                self.groups[-1][0].append(i)
                continue
            second = [HookSite(MLP_READS[1], *node.call).name] if node.kind == "mlp" and model.cfg.gated_mlp else []
            self.groups.append(([i], [LOGITS] if node.kind == LOGITS else [node.site.name, *second]))

    def _delta(self, site: HookSite, deltas: dict[str, Tensor]) -> Float[Tensor, "writer batch pos width"]:
        """What each writer at a leaf would add to it."""
        if site.component == "hook_attn_out":
            attn = cast(Attention, self.model.transformer.get_submodule(f"{site.stack}.{site.layer}.attn"))
            z = deltas[HookSite(HEAD, site.stack, site.layer, site.loop).name]
            with torch.no_grad():
                return wide(attn.results(z)[0].movedim(2, 0))
        found = wide(deltas[site.name])
        return found.movedim(2, 0) if site.component == HEAD else found[None]

    def scores(self, metrics: Metrics, source: Source, fraction: float) -> Float[Tensor, "writer reader"]:
        """Scores of all edges, at a run whose embeddings have moved so far to the source's."""
        model = self.model
        sites = [HookSite.parse(name) for _, names in self.groups[:-1] for name in names]
        grads = site_gradients(model, self.run, sites, metrics, source, fraction)
        run, moves = moved(model, self.run, source, fraction)
        seen: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: LoopHookPoint) -> None:
            seen[hook.name] = x

        found = torch.zeros(self.graph.possible.shape, dtype=torch.float64)
        hooks = [*moves, *((site.name, keep) for site in sites)]
        with frozen_weights(model), torch.enable_grad():
            with cut_writes(model, [leaf.site.name for leaf in self.leaves], hooks) as leaves:
                value = metrics(model.execute(run)).sum()
            seen[LOGITS], grads[LOGITS] = value, torch.ones_like(value)
            for readers, names in self.groups:
                self._back([(seen[name], grads[name]) for name in names], readers, leaves, found)
        return found

    def _back(
        self, outputs: Sequence[tuple[Tensor, Tensor]], readers: list[int], leaves: dict[str, Tensor], found: Tensor
    ) -> None:
        """Fill in the scores of readers at one place: a head each of what is read there, or all of it."""
        time = self.graph.readers[readers[0]].time
        before: dict[str, list[_Leaf]] = {}
        for leaf in self.leaves:
            if leaf.time < time:
                before.setdefault(leaf.part, []).append(leaf)
        asked = [leaves[part[-1].site.name] for part in before.values()]
        at_once = max(1, _AT_ONCE // sum(one.numel() for one in asked))
        for chosen in torch.arange(len(readers)).split(at_once):
            seeds = [_one_by_one(grad, chosen, len(readers)) for _, grad in outputs]
            grads = torch.autograd.grad(
                [x for x, _ in outputs], asked, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
            for part, grad in zip(before.values(), grads, strict=True):
                if grad is None:  # nothing that is read comes from here
                    continue
                for leaf in part:
                    columns = torch.tensor(readers)[chosen]
                    found[leaf.writers[0] : leaf.writers[-1] + 1, columns] = _products(leaf.delta, wide(grad)).cpu()


def _one_by_one(grad: Tensor, chosen: Tensor, n: int) -> Float[Tensor, "reader *dims"]:
    """A gradient for each of some readers: of one head and zero for the others, or the whole where it is one reader."""
    if n == 1:
        return grad[None]
    alone = torch.eye(n, device=grad.device, dtype=grad.dtype)[chosen.to(grad.device)]
    return grad * alone[:, None, None, :, None]


def _products(
    delta: Float[Tensor, "writer batch pos width"], grad: Float[Tensor, "reader batch pos *width"]
) -> Float[Tensor, "writer reader"]:
    """Change times gradient, of each writer's own head where the gradient is by all heads."""
    delta, grad = delta.double(), grad.double()
    if grad.ndim == 5:
        return torch.einsum("hbpd,rbphd->hr", delta, grad)
    return delta.flatten(1) @ grad.flatten(1).T
