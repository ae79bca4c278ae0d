"""Logits as sums: what every part of a looped model writes to one, through loops, injections and norms, exactly.

With what norms divide by held fixed (and the gate of a gated update), the residual stream is linear from every write to
the logits: injections, norms between loops and on the stream, the coda's stream, the last norm. So a logit is the sum
over all writes w of <w, g>, with g the gradient of the logit by the stream where w is added; branches of later layers
are cut, as they are writes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.engine.checks import check_eval, check_finite
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.network import frozen_weights, matrix
from tl_looped.engine.numbers import wide
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, Run, RunOptions, with_run_options
from tl_looped.engine.schedule import HookSite, LoopCount
from tl_looped.lens.reads import resolve_target
from tl_looped.lens.writes import KINDS, cut_writes, write_sites
from tl_looped.model import LoopedModel, check_looped
from tl_looped.viz.contributions import contribution_bars
from tl_looped.viz.patching import patching_heatmap

By = Literal["component", "head", "neuron", "loop"]
Token = str | int
_BATCH = 8
_EXACT = 1e-4  # of what is summed: parts that miss their sum by more (or by more than roundings) leave something out
_HELD = ("hook_scale", "hook_update_gate", "hook_modulation")  # what is no sum of writes, at its value in the run
_WRITES: dict[str, tuple[str, str]] = {  # by -> what is a write of attention, and of an MLP
    "component": ("hook_attn_out", "hook_mlp_out"),
    "head": ("attn.hook_z", "hook_mlp_out"),
    "neuron": ("hook_attn_out", "mlp.hook_post"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(Result):
    """What every component adds to a logit, or to a difference of two.

    Attributes:
        components: of each: name, kind ("embed", "pos_embed", "state", "attn", "head", "mlp", "neuron", "bias", or with
            by="loop" "part"), stack, layer, loop, index (of a head or neuron); None where it has none.
        contributions: in logits; over components they sum to `target`.
        target: the logit, or the difference.
        measured: by how much the target falls when the component's write at the last position is zeroed in the real
            model, where that was asked for; else NaN.
        tokens: for each prompt the token and the one that it is compared with, or −1.
    """

    components: tuple[dict[str, Any], ...]
    contributions: Float[Tensor, "prompt component"]
    target: Float[Tensor, " prompt"]
    measured: Float[Tensor, "prompt component"]
    tokens: Int[Tensor, "prompt 2"]

    def error(self) -> float:
        """The largest difference between the target and the sum of its parts, over prompts, beside what is summed."""
        return _missed(self.contributions, self.target)

    def agreement(self) -> float:
        """Correlation of contributions with what zeroing measured, over the largest; NaN below three numbers."""
        where = ~self.measured.isnan()
        if int(where.sum()) < 3:
            return float("nan")
        return float(torch.corrcoef(torch.stack([self.contributions[where], self.measured[where]]))[0, 1])

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each prompt and component."""
        prompts, n = self.contributions.shape
        table = pd.DataFrame([component for _ in range(prompts) for component in self.components])
        table.insert(0, "prompt", [prompt for prompt in range(prompts) for _ in range(n)])
        table["contribution"] = self.contributions.flatten().numpy()
        table["measured"] = self.measured.flatten().numpy()
        return table.convert_dtypes()

    def stack(self, kind: str = "head", stack: str | None = None) -> Float[Tensor, "prompt loop layer *index"]:
        """Contributions of one kind in the layers of a stack that loops, by loop and layer (and head or neuron).

        Raises:
            InputError: there are none of this kind in a stack that loops.
        """
        found = [c for c in self.components if c["kind"] == kind and c["loop"] is not None]
        stacks = list(dict.fromkeys(c["stack"] for c in found))
        chosen = stacks[-1] if stack is None and stacks else stack
        if chosen not in stacks:
            kinds = sorted({c["kind"] for c in self.components})
            raise InputError(f"no {kind!r} of a stack that loops is here ({stacks or 'none'}; kinds: {kinds}).")
        where = [i for i, c in enumerate(self.components) if c["kind"] == kind and c["stack"] == chosen]
        last = [self.components[i] for i in where][-1]
        shape = [last["loop"] + 1, last["layer"] + 1, *([last["index"] + 1] if last["index"] is not None else [])]
        return self.contributions[:, where].unflatten(1, shape)

    def plot(self, most: int = 24) -> go.Figure:
        """The largest contributions, mean over prompts with their range, and the sum of all others."""
        names = [str(component["name"]) for component in self.components]
        title = f"What makes the logit: {self.made_by.get('model', '')}"
        return contribution_bars(names, self.contributions, self.target, most, title)

    def heatmap(self, kind: str = "head", stack: str | None = None) -> go.Figure:
        """Contributions of one kind by loop, layer and head (or neuron), means over prompts; see `stack`."""
        values = self.stack(kind, stack).mean(0)
        axes = ("loop", "layer", kind)[: values.ndim]
        title = f"What each {kind} adds to the logit: {self.made_by.get('model', '')}"
        return patching_heatmap(values, axes, title, "logits")


@torch.inference_mode(mode=False)  # it needs gradients, whatever the caller's mode
@with_run_options
def decompose(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    targets: Token | Sequence[Token] | Tensor | None = None,
    against: Token | Sequence[Token] | Tensor | None = None,
    by: By = "component",
    compare: int = 0,
    batch_size: int = _BATCH,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> Decomposition:
    """The logit of a token after each prompt, as the sum of what every component writes to it.

    For a write w at the last position, <w, ∂ target / ∂ stream>, with what norms divide by, the gates of updates and
    the slope of a soft cap (cap(l) / l) held as they were. Writes at other positions reach the logit through attention
    alone, so they are in what heads write. A contribution is *direct*: what later layers make of a write is theirs.

    Args:
        model: a looped model, or a feedforward one that is loaded as one.
        prompts, n_loops, options: as in `LoopedModel.forward`; read at each prompt's last token.
        targets: a token for all prompts, or one for each; None: the model's own top token.
        against: the tokens whose logits are subtracted.
        by: "component": embedding, initial state, every attention and MLP in every loop, biases on the way. "head",
            "neuron": these in place of attentions, or of MLPs. "loop": sums over loops, prelude and coda.
        compare: zero so many of the largest components, each by itself, in the real model, to see how far the direct
            picture is from it; a run for each.
        batch_size: prompts that run together, of one length.
        progress: show a bar over batches.

    Returns:
        Contributions, [prompt, component], that sum to the logit (or the difference) up to rounding: `error()`.

    Raises:
        InputError: a target that is no token, or not one for each prompt; an unknown `by`; a head that reads the stream
            through an activation function (ALBERT); train mode; parts that do not sum to the target, as hooks of yours
            add to the stream what no component wrote.

    Source:
        Direct logit attribution (Elhage et al. 2021), carried through loops; the rest is this library's.

    Example:
        found = decompose(model, "a=4; c=a; b=7; d=c; f=b; ? d", targets="4", against="7", by="head")
        found.to_dataframe().nlargest(5, "contribution")
    """
    check_eval(check_looped(model, several_stacks=True))
    if by not in get_args(By):
        raise InputError(f"by must be one of {get_args(By)}, got {by!r}.")
    check_count("compare", compare, minimum=0)
    check_count("batch_size", batch_size)
    if compare and by == "loop":
        raise InputError("compare zeroes components, and by='loop' has sums of them: pass compare=0, or another by.")
    if model.cfg.head_transform:
        raise InputError(
            f"the head of {model.cfg.model_name} reads the stream through a map with an activation function, so its "
            "logits are no sums of what layers write: patch instead (tl_looped.patching.patch_sweep)."
        )
    runs = model.prepare(prompts, n_loops, **options)
    if not runs.whole:
        raise InputError(f"what is decomposed is a logit of a whole run: leave out {runs.parted_by}.")
    wanted, other = (_tokens(model, one, len(runs), name) for one, name in ((targets, "targets"), (against, "against")))
    parts: list[tuple[list[int], _Batch]] = []
    batch_size = 1 if model.cfg.learned_positions else batch_size  # rows share the vectors of positions
    for rows in tqdm(runs.equal_lengths(batch_size), "Decomposing", unit="batch", disable=not progress):
        batch = _Batch(model, model.batch_of(runs, rows), "component" if by == "loop" else by)
        batch.decompose(None if wanted is None else wanted[rows], None if other is None else other[rows])
        parts.append((rows, batch))
    _compare([batch for _, batch in parts], compare)
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()

    def gathered(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for _, batch in parts])[order].cpu()

    first = parts[0][1]
    made_by = {"model": model.cfg.model_name, **first.run.describe(), "by": by, "compare": compare}
    found = Decomposition(
        made_by=made_by,
        components=tuple(first.components),
        contributions=gathered("contributions"),
        target=gathered("target"),
        measured=gathered("measured"),
        tokens=gathered("tokens"),
    )
    return _by_loop(found) if by == "loop" else found


def _missed(contributions: Tensor, target: Tensor) -> float:
    """The largest difference between a target and its sum, beside what is summed."""
    size = contributions.abs().sum(1).clamp(min=1e-12)
    return float(((contributions.sum(1) - target).abs() / size).max())


def _tokens(model: LoopedModel, given: Any, n: int, name: str) -> Tensor | None:
    """One id for each prompt."""
    if given is None:
        return None
    if isinstance(given, (str, int)):
        return torch.full((n,), resolve_target(model, given))
    listed = given.tolist() if isinstance(given, Tensor) else list(given)
    if len(listed) != n:
        raise InputError(f"{name} has {len(listed)} tokens for {n} prompts: give one for each, or one for all.")
    return torch.tensor([resolve_target(model, one) for one in listed])


class _Batch:
    """Prompts of one length, and what came out."""

    def __init__(self, model: LoopedModel, run: Run, by: str):
        self.model, self.run, self.by = model, run, by
        self.sites = write_sites(model, run.counts, run.state is not None, *_WRITES[by])
        self.components: list[dict[str, Any]] = []
        self.found: list[Tensor] = []  # what each adds, [batch, part]
        self.rows = torch.arange(len(run.tokens), device=run.tokens.device)

    def decompose(self, wanted: Tensor | None, other: Tensor | None) -> None:
        """Fill in the numbers."""

        def hold(x: Tensor, hook: LoopHookPoint) -> Tensor:
            return x.detach()

        held = [(lambda name: name.endswith(_HELD), hold)]
        biases = {name: one for name, one in self.model.transformer.named_parameters() if name.endswith(".bias")}
        with frozen_weights(self.model, biases.values()), torch.enable_grad():
            with cut_writes(self.model, self.sites, held) as writes:
                head_in = self._head_in()
            value = self._value(head_in, wanted, other)
            asked = [*writes.values(), *biases.values()]
            grads = torch.autograd.grad(value.sum(), asked, allow_unused=True, retain_graph=len(self.rows) > 1)
            self._add_writes(writes, grads)
            self._add_biases(biases, grads[len(writes) :], value)
        self.contributions, self.target = torch.cat(self.found, dim=1), value.detach().double()
        check_finite(self.contributions, ("prompt", "component"))
        missed = _missed(self.contributions, self.target)
        if missed > max(_EXACT, 16 * torch.finfo(head_in.dtype).eps):
            raise InputError(
                f"what the components write misses the target by {missed:.2g} of what is summed, so something else is "
                "added to the stream, such as an edit by your hooks: leave the `with model.hooks(...)` block or call "
                "model.reset_hooks(), or edit what a component writes (hook_embed, hook_attn_out, hook_mlp_out)."
            )
        self.measured = torch.full_like(self.contributions, torch.nan)

    def _head_in(self) -> Float[Tensor, "batch d_model"]:
        """What the unembedding reads at every prompt's last token."""
        run, network = self.run, self.model.transformer
        frame = self.model.frame(run)
        out = network.finish(network(run.tokens, frame, run.state, run.start, run.stop), frame)
        return out[self.rows, run.last_positions]

    def _value(self, head_in: Tensor, wanted: Tensor | None, other: Tensor | None) -> Float[Tensor, " batch"]:
        """The target, linear in what the head reads."""
        head = self.model.transformer.unembed
        raw = F.linear(wide(head_in), wide(matrix(head, "unembed")), None if head.bias is None else wide(head.bias))
        capped = wide(head(head_in)).detach()
        slope = torch.where(raw == 0, 1.0, capped / raw.detach()) if self.model.cfg.logit_cap else torch.ones_like(raw)
        wanted = capped.argmax(-1) if wanted is None else wanted.to(raw.device)
        value = (raw * slope)[self.rows, wanted]
        none = torch.full_like(wanted, -1)
        self.tokens = torch.stack([wanted, none if other is None else other.to(raw.device)], dim=1)
        return value if other is None else value - (raw * slope)[self.rows, self.tokens[:, 1]]

    def _add_writes(self, writes: dict[str, Tensor], grads: Sequence[Tensor | None]) -> None:
        """<write, gradient> at the last position: one number, or one for each head or neuron."""
        for (name, x), grad in zip(writes.items(), grads, strict=False):
            kind, site = self.sites[name]
            place = (self.rows, self.run.last_positions)
            product = torch.zeros_like(x[place], dtype=torch.float64)
            if grad is not None:  # None: nothing that is read comes from here
                product = x.detach()[place].double() * grad[place].double()
            parts = product if kind == "neuron" else product.sum(-1, keepdim=kind != "head")
            several = kind in ("head", "neuron")
            self.found.append(parts)
            self.components += [_component(kind, site, i if several else None) for i in range(parts.shape[1])]

    def _add_biases(self, biases: dict[str, nn.Parameter], grads: Sequence[Tensor | None], value: Tensor) -> None:
        """Biases on the stream's way: of norms, of the head, and of what heads or neurons write with."""
        found = zip(biases.items(), grads, strict=True)
        there = {name: (bias, grad) for (name, bias), grad in found if grad is not None and bool(bias.any())}
        if not there:
            return
        asked = [bias for bias, _ in there.values()]
        # A gradient is a sum over prompts: of several, each has its own.
        each = [[grad for _, grad in there.values()]]
        if len(self.rows) > 1:
            each = [torch.autograd.grad(one, asked, retain_graph=True) for one in value]
        for i, (name, bias) in enumerate(zip(there, asked, strict=True)):
            parts = [(bias.detach().double() * of_prompt[i].double()).sum() for of_prompt in each]
            self.found.append(torch.stack(parts)[:, None])
            self.components.append({**_EMPTY, "name": name, "kind": "bias"})

    @torch.no_grad()
    def measure(self, at: int) -> None:
        """Zero one component in a run of its own."""
        component = self.components[at]
        name = next(n for n, (k, s) in self.sites.items() if _component(k, s, component["index"]) == component)

        def silence(x: Tensor, hook: LoopHookPoint) -> Tensor:
            x, place = x.clone(), (self.rows, self.run.last_positions)
            x[place if component["index"] is None else (*place, component["index"])] = 0
            return x

        with self.model.hooks([(name, silence)]):
            logits = wide(self.model.transformer.unembed(self._head_in())).double()
        value = logits[self.rows, self.tokens[:, 0]]
        if bool((self.tokens[:, 1] >= 0).all()):
            value = value - logits[self.rows, self.tokens[:, 1]]
        self.measured[:, at] = self.target - value


def _compare(batches: Sequence[_Batch], most: int) -> None:
    """Measure the components that are largest over all prompts, whatever batches these are in."""
    sizes = torch.cat([batch.contributions for batch in batches]).abs().mean(0)
    order = sizes.argsort(descending=True, stable=True).tolist()
    chosen = [at for at in order if batches[0].components[at]["kind"] in KINDS.values()]
    for at in chosen[:most]:
        for batch in batches:
            batch.measure(at)


_EMPTY: dict[str, Any] = {"name": "", "kind": "", "stack": None, "layer": None, "loop": None, "index": None}


def _component(kind: str, site: HookSite, index: int | None) -> dict[str, Any]:
    name = site.name if index is None else f"{site.name}.{index}"
    return {"name": name, "kind": kind, "stack": site.stack, "layer": site.layer, "loop": site.loop, "index": index}


def _by_loop(found: Decomposition) -> Decomposition:
    """Sums over loops, and over what runs once."""

    def part(c: dict[str, Any]) -> tuple[str, str | None, int | None]:
        if c["stack"] is None or c["kind"] == "state":
            return {"bias": "biases", "state": "initial state"}.get(c["kind"], "embedding"), c["stack"], None
        return (c["stack"] if c["loop"] is None else f"{c['stack']}.loop.{c['loop']}"), c["stack"], c["loop"]

    parts = [part(component) for component in found.components]
    order = list(dict.fromkeys(parts))
    sums = [found.contributions[:, [one == key for one in parts]].sum(1) for key in order]
    return replace(
        found,
        components=tuple({**_EMPTY, "name": n, "kind": "part", "stack": s, "loop": t} for n, s, t in order),
        contributions=torch.stack(sums, dim=1),
        measured=torch.full((len(found.target), len(order)), torch.nan, dtype=torch.float64),
    )
