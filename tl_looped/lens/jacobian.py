"""Jacobian lens by loop: a state carried to what the last norm reads, by the mean of the Jacobians in between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.engine.checks import check_eval, check_finite, check_floats
from tl_looped.engine.errors import InputError, check_count, resolve_index
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.identity import fingerprint
from tl_looped.engine.network import frozen_weights
from tl_looped.engine.numbers import cosine, wide, wide_dtype
from tl_looped.engine.runs import Prompts, Run, RunOptions, Runs, with_run_options
from tl_looped.engine.schedule import CORE, HookSite, LoopCount, LoopSchedule
from tl_looped.lens.reads import LensSite, Reads, Translator, choose_reads, table_of
from tl_looped.model import LoopedModel, check_looped
from tl_looped.viz.loops import Series, loop_series

To = int | tuple[int, int] | None
_ORDER = {"hook_resid_pre": 0, "hook_resid_mid": 1, "hook_resid_post": 2, "hook_state_post": 3}  # within a layer


@dataclass(frozen=True, eq=False, repr=False)
class JacobianLens(Translator):
    """How a small change of a state changes what the last norm reads, on average. Made by `jacobian_lens`.

    Attributes:
        site, n_loops, layers: see `Translator`.
        loops: those it has matrices for.
        target: the hook point that states are carried to.
        directions: the vectors at the target of which alone the rows are held; None for all of J.
        matrix: J of each place, so that `x @ matrix[loop, layer].T` carries x; or the product `directions` J.
    """

    kind = "jacobian"

    loops: tuple[int, ...]
    target: str
    directions: Float[Tensor, "row d_model"] | None
    matrix: Float[Tensor, "loop layer row d_model"]

    def check(self, model: LoopedModel, n_loops: LoopCount, reads: Reads) -> None:
        """An error unless it carries the states of this model, loop count, site, loops and layers to the last norm."""
        super().check(model, n_loops, reads)
        if self.directions is not None:
            raise InputError(
                "the translator holds rows of J for some directions alone, which a norm can't be taken of: make one "
                "with jacobian_lens(model, prompts) and no directions."
            )
        if self.made_by["to"] is not None:
            raise InputError(
                f"the translator carries states to {self.target!r}, not to the last norm: make one with "
                "jacobian_lens(model, prompts) and no to."
            )
        missing = sorted({*reads.loops} - {*self.loops})
        if missing:
            raise InputError(
                f"the translator has the loops {list(self.loops)}, not {missing}: read those alone, with loops=."
            )

    def translate(self, x: Float[Tensor, "*dims d_model"], layer: int, loop: int) -> Float[Tensor, "*dims row"]:
        """J x for a state of this layer and loop; with `directions`, their products with J x."""
        matrix = self.matrix[self.loops.index(loop), self.layers.index(layer)].to(x.device)
        return (wide(x).to(matrix.dtype) @ matrix.T).to(x.dtype)

    def singular_values(self) -> Float[Tensor, "loop layer value"]:
        """The singular values of each matrix, the largest first."""
        return torch.linalg.svdvals(self.matrix)

    def effective_rank(self) -> Float[Tensor, "loop layer"]:
        """exp(entropy of the singular values as shares of their sum): d_model where all are alike, 1 where one is."""
        shares = self.singular_values() / self.singular_values().sum(-1, keepdim=True)
        return torch.special.entr(shares).sum(-1).exp()

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each loop and layer: largest singular value, effective rank, and cosine of J with no change."""
        unchanged = torch.eye(self.matrix.shape[-1]).to(self.matrix) if self.directions is None else self.directions
        columns = {
            "largest": self.singular_values()[..., 0],
            "effective_rank": self.effective_rank(),
            "unchanged": cosine(self.matrix.flatten(2), unchanged.flatten().expand(*self.matrix.shape[:2], -1)),
        }
        return table_of({"loop": self.loops, "layer": self.layers}, torch.ones(self.matrix.shape[:2]).bool(), columns)

    def plot(self) -> go.Figure:
        """The effective rank over loops, a line for each layer."""
        names = ["" if self.site == "state" else f"layer {layer}" for layer in self.layers]
        lines = [Series(name, values) for name, values in zip(names, self.effective_rank().T, strict=True)]
        title = f"Jacobian from {self.site} to {self.target}: {self.made_by.get('model', '')}"
        return loop_series(lines, self.loops, "effective rank", title)


@torch.inference_mode(mode=False)  # it needs gradients, whatever the caller's mode
@with_run_options
def jacobian_lens(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    site: LensSite = "resid_post",
    loops: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    to: To = None,
    directions: Tensor | None = None,
    skip_first: int = 16,
    stack: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> JacobianLens:
    """J of every loop and layer: the mean Jacobian from a state to what the last norm reads.

    For a prompt with the positions V that count, J = 1 / |V| Σ_(s in V) Σ_(t in V) ∂ y_t / ∂ x_s, x the stream at the
    source and y that at the target; then the mean over prompts. `logit_lens(..., kind="jacobian", translator=lens)`
    reads J x through the last norm and the head: where J is no change it is the direct lens. These are the numbers of
    TransformerLens's `JacobianLens` on `model.unrolled(n_loops)`.

    All of J takes one backward pass for each of d_model rows, shared by all loops and layers, and d_model² numbers for
    each of them. Where d_model is wide, name `directions` u: only u J is computed, exactly, by a backward pass each.
    With the columns of the unembedding, times the last norm's gain, these are the vectors that stand for tokens.

    Args:
        model: the model. In half precision products are rounded so; they are summed in float32.
        prompts: texts such as the model was trained on, in any form; those of no more than skip_first + 1 tokens are
            left out.
        n_loops, stack: as in `logit_lens`.
        site: the source: "resid_pre", "resid_mid", "resid_post", or "state".
        loops, layers: sources; None for all, of the loops those that come before the target in every layer.
        to: carry to the same site in another loop, (loop, layer) or for the state a loop; None for what the last norm
            reads, which is the last layer's output.
        directions: vectors at the target, [row, d_model], of which alone to hold the rows; None for all of J.
        skip_first: positions at the beginning that don't count; nor does the last, which predicts nothing.
        batch_size: rows that run together: prompts of one length, each as often as there is room.
        progress: show a bar over batches.

    Raises:
        InputError: train mode, tokens that see what comes after them, no prompt that is long enough, a loop or layer
            that does not exist or comes after the target, or a head that reads through no norm, or through more.

    Source:
        Gurnee et al. 2026, Transformer Circuits; in loops: arXiv 2609.01924. The estimator is TransformerLens's.

    Example:
        lens = jacobian_lens(model, texts)
        logit_lens(model, prompt, kind="jacobian", translator=lens, site="resid_post", targets=" Paris")
    """
    check_eval(check_looped(model, several_stacks=True))
    model.cfg.check_causal("jacobian_lens")
    check_count("skip_first", skip_first, minimum=0)
    check_count("batch_size", batch_size)
    runs = model.prepare(prompts, n_loops, **options)
    if runs.prefix is not None or (runs.visible is not None and bool(runs.visible.triu(1).any())):
        raise InputError(
            "tokens that see what comes after them have no Jacobian lens: leave out prefix_length= and "
            "token_type_ids=, or pass an attention_mask= in which none does."
        )
    reads, target = _places(model, choose_reads(model, runs, site, loops, layers, stack=stack), runs, loops, to)
    rows = _directions(model, directions)
    groups = [g for g in runs.equal_lengths(batch_size) if len(runs.rows.unpadded(g[0])) > skip_first + 1]
    if not groups:
        raise InputError(
            f"no prompt is longer than skip_first + 1 = {skip_first + 1} tokens (the longest has {runs.rows.longest}), "
            "so no position counts: pass longer prompts, or a smaller skip_first."
        )
    total, used = torch.zeros((), dtype=rows.dtype), sum(map(len, groups))
    for group in tqdm(groups, "Jacobians", unit="batch", disable=not progress):
        total = total + _summed(model, runs, group, reads, target, rows, skip_first, batch_size).cpu()
    matrix = (total / used).unflatten(0, (len(reads.loops), -1))
    check_finite(matrix, ("loop", "layer", "row"), {"loop": reads.loops, "layer": reads.layers or (0,)})
    return JacobianLens(
        made_by={
            "model": model.cfg.model_name,
            "fingerprint": fingerprint(model),
            **model.batch_of(runs, [0]).describe(),
            "to": to,
            "prompts": used,
            "left_out": len(runs) - used,
            "skip_first": skip_first,
            **model.cfg.made_of(reads.stack),
        },
        site=site,
        n_loops=model.cfg.schedule(runs.counts).n_loops(reads.stack),
        layers=reads.layers or (0,),
        loops=reads.loops,
        target=target.name,
        directions=None if directions is None else rows.cpu(),
        matrix=matrix,
    )


def _places(
    model: LoopedModel, reads: Reads, runs: Runs, loops: Iterable[int] | None, to: To
) -> tuple[Reads, HookSite]:
    """The sources, and the target that comes after them."""
    schedule = model.cfg.schedule(runs.counts)
    if to is None:
        broken = model.cfg.readout_broken_by()
        if broken is not None:
            raise InputError(f"the Jacobian lens reads through one norm, and of {model.cfg.model_name} {broken}.")
        target = _last_norm_reads(model, schedule)
    else:
        of_state = reads.layers is None
        if of_state != isinstance(to, int) or not (of_state or (isinstance(to, tuple) and len(to) == 2)):
            raise InputError(f"to must be {'a loop' if of_state else '(loop, layer)'} of {reads.site!r}, got {to!r}.")
        loop, layer = (to, None) if isinstance(to, int) else to
        layer = None if layer is None else resolve_index("the layer of to", layer, schedule.n_layers(reads.stack))
        target = replace(reads, layers=None if layer is None else (layer,)).streams[layer]
        target = target.at(resolve_index("the loop of to", loop, schedule.n_loops(reads.stack)))
    calls = list(schedule.layer_calls())

    def when(of: HookSite) -> tuple[int, int]:
        stack = of.stack or reads.stack
        layer = schedule.n_layers(stack) - 1 if of.layer is None else of.layer
        return calls.index((stack, layer, of.loop)), _ORDER[of.component]

    late = [t for t in reads.loops if any(when(of.at(t)) > when(target) for of in reads.streams.values())]
    kept = tuple(t for t in reads.loops if t not in late)
    if (late and loops is not None) or not kept:
        raise InputError(
            f"{reads.site!r} in loops {late} comes after {target.name!r}, which it is to be carried to: name "
            "loops= and layers= before that."
        )
    return replace(reads, loops=kept), target


def _last_norm_reads(model: LoopedModel, schedule: LoopSchedule) -> HookSite:
    """The last layer's output; or, where a loop comes last and no norm closes it, the state, which is the same."""
    stack, layer, loop = schedule.at_depth(-1)
    if loop is None or model.cfg.norms_each_loop:
        return HookSite("hook_resid_post", stack, layer, loop)
    return HookSite("hook_state_post", None if stack == CORE else stack, loop=loop)


def _directions(model: LoopedModel, given: Tensor | None) -> Float[Tensor, "row d_model"]:
    """The vectors at the target that rows are computed of."""
    d_model, dtype = model.cfg.d_model, wide_dtype(model.dtype)
    if given is None:
        return torch.eye(d_model, dtype=dtype, device=model.device)
    check_floats(given, "directions", "[row, d_model]", 2)
    if given.ndim != 2 or given.shape[1] != d_model:
        raise InputError(f"directions must be [row, {d_model}], vectors of the residual stream, got {[*given.shape]}.")
    return given.detach().to(model.device, dtype, copy=True)


def _summed(
    model: LoopedModel,
    runs: Runs,
    group: list[int],
    reads: Reads,
    target: HookSite,
    directions: Float[Tensor, "row d_model"],
    skip_first: int,
    batch_size: int,
) -> Float[Tensor, "place row d_model"]:
    """The Jacobians of some prompts of one length, summed over prompts; each runs in copies, one for each direction."""
    copies = min(max(1, batch_size // len(group)), len(directions))
    run = model.batch_of(runs, [row for row in group for _ in range(copies)])
    names = [of.at(t).name for t in reads.loops for of in reads.streams.values()]
    with frozen_weights(model), torch.enable_grad():
        seen = _streams(model, run, {*names, target.name})
    sources, out = [seen[name] for name in names], seen[target.name]
    counted = slice(skip_first, run.tokens.shape[1] - 1)
    found = torch.zeros(len(sources), *directions.shape, dtype=directions.dtype, device=out.device)
    for first in range(0, len(directions), copies):
        part = directions[first : first + copies]
        cotangent = torch.zeros_like(out)
        cotangent.unflatten(0, (-1, copies))[:, : len(part), counted] = part[:, None].to(out.dtype)
        grads = torch.autograd.grad(out, sources, cotangent, retain_graph=True, allow_unused=True)
        for place, grad in enumerate(grads):
            if grad is not None:  # None: nothing at the target comes from here, as where a hook of yours cuts it off
                each = wide(grad).unflatten(0, (-1, copies))[:, : len(part), counted]
                found[place, first : first + len(part)] = each.mean(2).sum(0)
    return found


def _streams(model: LoopedModel, run: Run, names: set[str]) -> dict[str, Tensor]:
    """The streams at some places of a run, with the graph behind the first of them."""
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: LoopHookPoint) -> Tensor:
        seen[hook.name] = x if x.requires_grad else x.detach().clone().requires_grad_()
        return seen[hook.name]

    with model.hooks([(name, keep) for name in sorted(names)]):
        model.execute(run, return_type=None)
    return seen
