"""Tuned lens: an affine translator for each layer, or each layer and loop, fitted to what the run says at last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.engine.checks import check_eval, check_number
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.identity import fingerprint
from tl_looped.engine.numbers import log_probs_of, wide_dtype
from tl_looped.engine.runs import Prompts, RunOptions, Runs, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.lens.measures import kl_divergence
from tl_looped.lens.reads import (
    LensSite,
    Reads,
    Translator,
    choose_reads,
    direct_input,
    read_states,
    table_of,
)
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.batch import chunks
from tl_looped.viz.readout import lens_losses


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens(Translator):
    """Translators x → x + x W + b, read out by the direct lens. Made by `fit_tuned_lens`.

    Attributes:
        site, n_loops, layers: see `Translator`.
        per_loop: whether each loop has its own translators.
        weight, bias: W and b of each; the loop axis has length one where all loops share them.
        kept: whether a translator was kept; one that was worse than the direct lens on its training prompts is zero.
        direct_loss, tuned_loss: mean KL(run ‖ lens) on the training prompts, in nats, for each loop and layer.
        held_out_direct_loss, held_out_tuned_loss: the same on the held-out prompts.
    """

    kind = "tuned"

    per_loop: bool
    weight: Float[Tensor, "translator_loop layer d_model d_model"]
    bias: Float[Tensor, "translator_loop layer d_model"]
    kept: Bool[Tensor, "translator_loop layer"]
    direct_loss: Float[Tensor, "loop layer"]
    tuned_loss: Float[Tensor, "loop layer"]
    held_out_direct_loss: Float[Tensor, "loop layer"]
    held_out_tuned_loss: Float[Tensor, "loop layer"]

    def translate(self, x: Float[Tensor, "*dims d_model"], layer: int, loop: int) -> Float[Tensor, "*dims d_model"]:
        """A state as the translator of this layer and loop sees it."""
        at = (loop if self.per_loop else 0, self.layers.index(layer))
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        weight, bias = (part[at].to(device=x.device, dtype=wide.dtype) for part in (self.weight, self.bias))
        return (wide + wide @ weight + bias).to(x.dtype)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each loop and layer: the four losses in nats, and whether the translator was kept."""
        labels = {"loop": range(self.n_loops), "layer": self.layers}
        names = ("direct_loss", "tuned_loss", "held_out_direct_loss", "held_out_tuned_loss", "kept")
        everywhere = torch.ones_like(self.direct_loss, dtype=torch.bool)
        return table_of(labels, everywhere, {name: getattr(self, name) for name in names})

    def plot(self) -> go.Figure:
        """Direct and tuned loss on the held-out prompts, over loops, for each layer."""
        return lens_losses(self.held_out_direct_loss, self.held_out_tuned_loss, self.layers, self.site)


@with_run_options
def fit_tuned_lens(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    held_out: Prompts | None = None,
    stack: str | None = None,
    site: LensSite = "resid_post",
    layers: Iterable[int] | None = None,
    per_loop: bool = False,
    steps: int = 300,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    order_seed: int = 0,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> TunedLens:
    """Fit translators so that the direct lens says what the run says at last: KL(run ‖ lens), by Adam, from zero.

    A translator starts as the direct lens. One that ends worse than that on the training prompts is set back to zero,
    so none is worse there (a translator that all loops share: on average over loops); on the held-out prompts it may
    be, and the losses say so.

    Args:
        model: the model; its weights stay as they are.
        prompts: to fit on, in any form.
        n_loops: loops of every run; None for the count the model was trained with.
        held_out: prompts that are not fitted on, in any form; None: every fifth of `prompts` is held out.
        stack: as in `logit_lens`.
        site: the residual stream to read, or "state".
        layers: core layers; None for all.
        per_loop: a translator for each (loop, layer), not one for each layer.
        steps: of Adam; the learning rate falls to zero over them.
        batch_size: prompts in a step. Those of the same length run together, without padding.
        learning_rate: at the beginning.
        order_seed: of the order of the prompts.
        progress: whether to show a bar.
        options: see `RunOptions`. `held_out` is read with the same, but for what belongs to each prompt
            (`attention_mask`, `position_ids`, prefixes) and `limit`; `model.prepare` gives it its own.

    Raises:
        InputError: too few prompts, or what `logit_lens` refuses.

    Source:
        Belrose et al. 2023, arXiv 2303.08112.
    """
    check_eval(check_looped(model, several_stacks=True))
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        check_count(name, value)
    check_count("order_seed", order_seed, minimum=0)
    check_number("learning_rate", learning_rate)
    runs = model.prepare(prompts, n_loops, **options)
    reads = choose_reads(model, runs, site, None, layers, stack=stack)
    train, rest = _split(model, runs, held_out, options)
    fitter = _Fitter(model, len(reads.loops), reads, per_loop)
    fitter.fit(train, steps, batch_size, learning_rate, order_seed, progress)
    direct, tuned = fitter.losses(train, batch_size)
    kept = fitter.set_back(direct, tuned)
    direct, tuned = fitter.losses(train, batch_size)
    held_direct, held_tuned = fitter.losses(rest, batch_size)
    return TunedLens(
        made_by={
            "model": model.cfg.model_name,
            "fingerprint": fingerprint(model),
            **model.batch_of(runs, [0]).describe(),
            "prompts": len(train.rows),
            "held_out_prompts": len(rest.rows),
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "order_seed": order_seed,
            **model.cfg.made_of(reads.stack),
        },
        site=site,
        n_loops=len(reads.loops),
        layers=reads.layers or (0,),
        per_loop=per_loop,
        weight=fitter.weight.detach().cpu(),
        bias=fitter.bias.detach().cpu(),
        kept=kept.cpu(),
        direct_loss=direct,
        tuned_loss=tuned,
        held_out_direct_loss=held_direct,
        held_out_tuned_loss=held_tuned,
    )


class _Part:
    """Some of the prompts: to fit on, or held out."""

    def __init__(self, runs: Runs, rows: Sequence[int]):
        self.runs, self.rows = runs, rows
        self._group = {row: i for i, group in enumerate(runs.equal_lengths(len(runs))) for row in group}

    def batches(self, rows: Sequence[int], most: int) -> list[list[int]]:
        """Rows in batches of one length each."""
        groups = [list(group) for _, group in groupby(sorted(rows, key=self._group.__getitem__), self._group.get)]
        return [group[i : i + most] for group in groups for i in range(0, len(group), most)]


def _split(model: LoopedModel, runs: Runs, held_out: Prompts | None, options: RunOptions) -> tuple[_Part, _Part]:
    """What to fit on, and what is held out."""
    rows = range(len(runs))
    if held_out is None:
        if len(runs) < 5:
            raise InputError(
                f"pass at least 5 prompts (every fifth is held out), or one or more with held_out=..., got {len(runs)}."
            )
        return _Part(runs, [row for row in rows if row % 5 != 4]), _Part(runs, rows[4::5])
    if not isinstance(held_out, Runs):
        own = ("attention_mask", "position_ids", "prefix_length", "token_type_ids", "limit")
        shared = cast(RunOptions, {name: value for name, value in options.items() if name not in own})
        held_out = model.prepare(held_out, runs.counts, **shared)
    if not held_out.whole or held_out.counts != runs.counts:
        raise InputError(f"held_out must be whole runs of {runs.counts} loops, as the prompts are, got {held_out}.")
    return _Part(runs, rows), _Part(held_out, range(len(held_out)))


class _Fitter:
    """Translators while they are fitted."""

    def __init__(self, model: LoopedModel, n_loops: int, reads: Reads, per_loop: bool):
        self.model, self.reads, self.per_loop = model, reads, per_loop
        self.shape = (n_loops, len(reads.streams))
        d, shape = model.cfg.d_model, (n_loops if per_loop else 1, len(reads.streams))
        dtype = wide_dtype(model.dtype)
        self.weight = torch.zeros(*shape, d, d, dtype=dtype, device=model.device, requires_grad=True)
        self.bias = torch.zeros(*shape, d, dtype=dtype, device=model.device, requires_grad=True)

    def states(self, part: _Part, rows: Sequence[int]) -> tuple[Float[Tensor, "loop layer tokens d_model"], Tensor]:
        """The states at all tokens of prompts of one length, and the run's own log probabilities there."""
        run = self.model.batch_of(part.runs, rows)
        reads = replace(self.reads, positions=tuple(range(run.tokens.shape[1])))
        kept, logits = read_states(self.model, run, reads, lambda x, place: x.flatten(0, 1), reads.loops)
        states = torch.stack([kept[t, layer] for t in reads.loops for layer in reads.streams])
        return states.to(self.weight.dtype).unflatten(0, self.shape), log_probs_of(logits)

    def translated(self, states: Float[Tensor, "loop layer tokens d_model"]) -> Tensor:
        """All states as their translators see them."""
        return states + states @ self.weight + self.bias[:, :, None]

    def kl(self, states: Float[Tensor, "tokens d_model"], final: Tensor) -> Float[Tensor, " tokens"]:
        """KL(run ‖ direct lens) of each token."""
        vectors = direct_input(self.model, self.reads.site, states.to(self.model.dtype))
        return kl_divergence(final, log_probs_of(self.model.transformer.unembed(vectors)))

    @torch.enable_grad()
    def fit(self, part: _Part, steps: int, batch_size: int, learning_rate: float, seed: int, progress: bool) -> None:
        """Adam on batches of prompts in a seeded order."""
        optimizer = torch.optim.Adam([self.weight, self.bias], lr=learning_rate)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in (bar := tqdm(range(steps), desc="Fitting the tuned lens", disable=not progress)):
            while len(order) < min(batch_size, len(part.rows)):
                order += [part.rows[i] for i in torch.randperm(len(part.rows), generator=generator).tolist()]
            rows, order = order[:batch_size], order[batch_size:]
            groups = [self.states(part, group) for group in part.batches(rows, batch_size)]
            states, final = torch.cat([of for of, _ in groups], dim=2), torch.cat([said for _, said in groups])
            total = 0.0
            optimizer.zero_grad()
            for piece in chunks(*final.shape):
                total += self._step(states[:, :, piece], final[piece], states.shape[2])
            optimizer.step()
            decay.step()
            bar.set_postfix({"KL, nats": f"{total:.4f}"})

    def _step(self, states: Float[Tensor, "loop layer tokens d_model"], final: Tensor, n_tokens: int) -> float:
        """Add the gradient of the mean KL of some tokens; one place's logits exist at a time."""
        translated = self.translated(states)
        slope = torch.zeros_like(translated)
        total = 0.0
        for t, i in np.ndindex(self.shape):
            leaf = translated[t, i].detach().requires_grad_()
            loss = self.kl(leaf, final).sum() / (n_tokens * math.prod(self.shape))
            (slope[t, i],) = torch.autograd.grad(loss, leaf)
            total += float(loss.detach())
        translated.backward(slope)
        return total

    @torch.no_grad()
    def losses(self, part: _Part, batch_size: int) -> tuple[Float[Tensor, "loop layer"], Float[Tensor, "loop layer"]]:
        """Mean KL(run ‖ lens) of the direct and of the tuned lens over all real tokens, in nats."""
        sums = torch.zeros(2, *self.shape, dtype=torch.float64)
        n_tokens = 0
        for rows in part.batches(part.rows, batch_size):
            states, final = self.states(part, rows)
            n_tokens += len(final)
            for piece in chunks(*final.shape):
                for which, read in enumerate((states[:, :, piece], self.translated(states[:, :, piece]))):
                    for t, i in np.ndindex(self.shape):
                        sums[which, t, i] += self.kl(read[t, i], final[piece]).double().sum().cpu()
        direct, tuned = sums / n_tokens
        return direct, tuned

    @torch.no_grad()
    def set_back(self, direct: Float[Tensor, "loop layer"], tuned: Float[Tensor, "loop layer"]) -> Tensor:
        """Set translators that are worse than the direct lens to zero; returns which are kept."""
        better = tuned < direct if self.per_loop else (tuned.mean(0) < direct.mean(0))[None]
        better = better.to(self.weight.device)
        self.weight.masked_fill_(~better[..., None, None], 0)  # also one that is not finite any more
        self.bias.masked_fill_(~better[..., None], 0)
        return better
