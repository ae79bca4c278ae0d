"""Tuned lens: an affine translator for each layer, or each layer and loop, fitted to what the run says at last."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.engine.checks import check_eval, check_number
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.identity import fingerprint
from tl_looped.engine.numbers import wide_dtype
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Run
from tl_looped.lens.measures import kl_divergence, log_probs_of
from tl_looped.lens.reads import LensSite, Reads, choose_reads, chunks, direct_input, read_states
from tl_looped.model import LoopedModel, check_looped
from tl_looped.viz.tuned import lens_losses


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens(Result):
    """Translators x → x + x W + b, read out by the direct lens. Made by `fit_tuned_lens`.

    Attributes:
        site: the residual stream it reads.
        n_loops: of the runs it was fitted on.
        layers: the core layers it has translators for; (0,) stands for the state.
        per_loop: whether each loop has its own translators.
        weight, bias: W and b of each; the loop axis has length one where all loops share them.
        kept: whether a translator was kept; one that was worse than the direct lens on its training texts is zero.
        direct_loss, tuned_loss: mean KL(run ‖ lens) on the training texts, in nats, for each loop and layer.
        held_out_direct_loss, held_out_tuned_loss: the same on the held-out texts.
    """

    site: LensSite
    n_loops: int
    layers: tuple[int, ...]
    per_loop: bool
    weight: Float[Tensor, "translator_loop layer d_model d_model"]
    bias: Float[Tensor, "translator_loop layer d_model"]
    kept: Bool[Tensor, "translator_loop layer"]
    direct_loss: Float[Tensor, "loop layer"]
    tuned_loss: Float[Tensor, "loop layer"]
    held_out_direct_loss: Float[Tensor, "loop layer"]
    held_out_tuned_loss: Float[Tensor, "loop layer"]

    def check(self, model: LoopedModel, run: Run, reads: Reads) -> None:
        """An error unless the translators were fitted for this model, loop count and site, and on these layers."""
        if self.made_by["fingerprint"] != fingerprint(model):
            raise InputError(
                f"the translator was fitted on {self.made_by['model']} with other weights than this "
                f"{model.cfg.model_name}: fit one with fit_tuned_lens(model, texts)."
            )
        if self.n_loops != run.n_loops:
            raise InputError(
                f"the translator was fitted on runs of {self.n_loops} loops, this one has {run.n_loops}: pass "
                f"n_loops={self.n_loops}, or fit one with fit_tuned_lens(model, texts, n_loops={run.n_loops})."
            )
        if self.site != reads.site:
            raise InputError(f"the translator reads {self.site!r}, not {reads.site!r}: pass site={self.site!r}.")
        missing = sorted({*(reads.layers or ())} - set(self.layers))
        if missing:
            raise InputError(f"the translator has the layers {list(self.layers)}, not {missing}.")

    def translate(self, x: Float[Tensor, "*dims d_model"], layer: int, loop: int) -> Float[Tensor, "*dims d_model"]:
        """A state as the translator of this layer and loop sees it."""
        at = (loop if self.per_loop else 0, self.layers.index(layer))
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        weight, bias = (part[at].to(device=x.device, dtype=wide.dtype) for part in (self.weight, self.bias))
        return (wide + wide @ weight + bias).to(x.dtype)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each loop and layer: the four losses in nats, and whether the translator was kept."""
        names = ("direct_loss", "tuned_loss", "held_out_direct_loss", "held_out_tuned_loss")
        rows = [
            {
                "loop": t,
                "layer": layer,
                **{name: float(getattr(self, name)[t, i]) for name in names},
                "kept": bool(self.kept[t if self.per_loop else 0, i]),
            }
            for t in range(self.n_loops)
            for i, layer in enumerate(self.layers)
        ]
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Direct and tuned loss on the held-out texts, over loops, for each layer."""
        return lens_losses(self.held_out_direct_loss, self.held_out_tuned_loss, self.layers, self.site)


def fit_tuned_lens(
    model: LoopedModel,
    texts: list[str] | Tensor,
    n_loops: int | None = None,
    *,
    held_out: list[str] | Tensor | None = None,
    site: LensSite = "resid_post",
    layers: Iterable[int] | None = None,
    per_loop: bool = False,
    steps: int = 300,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> TunedLens:
    """Fit translators so that the direct lens says what the run says at last: KL(run ‖ lens), by Adam, from zero.

    A translator starts as the direct lens. One that ends worse than that on the training texts is set back to zero, so
    none is worse there (a translator that all loops share: on average over loops); on the held-out texts it may be, and
    the losses say so.

    Args:
        model: the model; its weights stay as they are.
        texts: to fit on: texts, or token ids [batch, pos].
        n_loops: loops of every run.
        held_out: texts that are not fitted on; None: every fifth of `texts` is held out.
        site: the residual stream to read, or "state".
        layers: core layers; None for all.
        per_loop: a translator for each (loop, layer), not one for each layer.
        steps: of Adam; the learning rate falls to zero over them.
        batch_size: texts in a step.
        learning_rate: at the beginning.
        seed: of the order of the texts.
        progress: whether to show a bar.
        options: `prepend_bos`, `padding_side`, as in `LoopedModel.to_tokens`.

    Raises:
        InputError: too few texts, or what `loop_lens` refuses.

    Source:
        Belrose et al. 2023, arXiv 2303.08112.
    """
    check_eval(check_looped(model))
    train, rest = _split(texts, held_out)
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        check_count(name, value)
    check_count("seed", seed, minimum=0)
    check_number("learning_rate", learning_rate)
    fitter = _Fitter(model, n_loops, site, layers, per_loop, options)
    for part in (train, rest):
        fitter.prepare(part, slice(None))  # all input is checked before the first step
    fitter.fit(train, steps, batch_size, learning_rate, seed, progress)
    direct, tuned = fitter.losses(train, batch_size)
    kept = fitter.set_back(direct, tuned)
    direct, tuned = fitter.losses(train, batch_size)
    held_direct, held_tuned = fitter.losses(rest, batch_size)
    return TunedLens(
        made_by={
            "model": model.cfg.model_name,
            "fingerprint": fingerprint(model),
            "n_loops": fitter.n_loops,
            "texts": len(train),
            "held_out_texts": len(rest),
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
        },
        site=site,
        n_loops=fitter.n_loops,
        layers=fitter.layers,
        per_loop=per_loop,
        weight=fitter.weight.detach().cpu(),
        bias=fitter.bias.detach().cpu(),
        kept=kept.cpu(),
        direct_loss=direct,
        tuned_loss=tuned,
        held_out_direct_loss=held_direct,
        held_out_tuned_loss=held_tuned,
    )


def _split(texts: list[str] | Tensor, held_out: list[str] | Tensor | None) -> tuple[Any, Any]:
    if isinstance(texts, str) or len(texts) < (1 if held_out is not None else 5):
        raise InputError(
            "texts must be a list of at least 5 texts (every fifth is held out), or one or more with held_out=..., "
            f"got {texts!r}."
        )
    for part in (texts, held_out):
        if isinstance(part, Tensor) and part.ndim != 2:
            raise InputError(
                f"texts as token ids must be [batch, pos], one row for each, got shape {tuple(part.shape)}."
            )
    if held_out is not None:
        if isinstance(held_out, str) or not len(held_out):
            raise InputError(f"held_out must be a list of at least one text, got {held_out!r}.")
        return texts, held_out
    apart = torch.arange(len(texts)) % 5 == 4
    if isinstance(texts, Tensor):
        return texts[~apart], texts[apart]
    return [text for text, out in zip(texts, apart, strict=True) if not out], texts[4::5]


class _Fitter:
    """Translators while they are fitted."""

    def __init__(
        self,
        model: LoopedModel,
        n_loops: int | None,
        site: LensSite,
        layers: Iterable[int] | None,
        per_loop: bool,
        options: dict[str, Any],
    ):
        self.model, self.per_loop, self.options = model, per_loop, options
        self.site: LensSite = site
        self.n_loops = model.cfg.schedule(n_loops).n_loops()
        self.asked = tuple(layers) if isinstance(layers, Iterable) else layers  # it is read for every batch
        d, device = model.cfg.d_model, model.device
        probe = model.batch(torch.zeros(1, 1, dtype=torch.long), self.n_loops, attention_mask=torch.ones(1, 1))
        self.layers = choose_reads(model, probe, site, None, self.asked, None).layers or (0,)
        shape = (self.n_loops if per_loop else 1, len(self.layers))
        dtype = wide_dtype(model.dtype)
        self.weight = torch.zeros(*shape, d, d, dtype=dtype, device=device, requires_grad=True)
        self.bias = torch.zeros(*shape, d, dtype=dtype, device=device, requires_grad=True)

    def prepare(self, texts: Any, rows: Any) -> tuple[Run, Reads]:
        """A checked run of some of the texts."""
        chosen = texts[rows] if isinstance(texts, Tensor) or isinstance(rows, slice) else [texts[i] for i in rows]
        run = self.model.batch(chosen, self.n_loops, **self.options)
        return run, choose_reads(self.model, run, self.site, None, self.asked, None)

    def states(self, texts: Any, rows: Any) -> tuple[Float[Tensor, "loop layer tokens d_model"], Tensor]:
        """The states at all real tokens, and the run's own log probabilities there."""
        run, reads = self.prepare(texts, rows)
        kept, logits = read_states(self.model, run, reads, lambda x, place: x)
        real = run.attention_mask
        stacked = [
            torch.stack([kept[t, i][real] for i in range(len(self.layers))]).to(self.weight.dtype)
            for t in range(self.n_loops)
        ]
        return torch.stack(stacked), log_probs_of(logits[real])

    def translated(self, states: Float[Tensor, "loop layer tokens d_model"]) -> Tensor:
        """All states as their translators see them."""
        return states + states @ self.weight + self.bias[:, :, None]

    def kl(self, states: Float[Tensor, "tokens d_model"], final: Tensor) -> Float[Tensor, " tokens"]:
        """KL(run ‖ direct lens) of each token."""
        vectors = direct_input(self.model, self.site, states.to(self.model.dtype))
        return kl_divergence(final, log_probs_of(self.model.transformer.unembed(vectors)))

    def fit(self, texts: Any, steps: int, batch_size: int, learning_rate: float, seed: int, progress: bool) -> None:
        """Adam on batches of texts in a seeded order."""
        parameters = [self.weight, self.bias]
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in (bar := tqdm(range(steps), desc="Fitting the tuned lens", disable=not progress)):
            while len(order) < min(batch_size, len(texts)):
                order += torch.randperm(len(texts), generator=generator).tolist()
            rows, order = order[:batch_size], order[batch_size:]
            states, final = self.states(texts, rows)
            total = 0.0
            optimizer.zero_grad()
            for piece in chunks(states.shape[2], self.model.cfg.d_vocab):
                total += self._step(states[:, :, piece], final[piece], states.shape[2])
            optimizer.step()
            decay.step()
            bar.set_postfix({"KL, nats": f"{total:.4f}"})

    def _step(self, states: Float[Tensor, "loop layer tokens d_model"], final: Tensor, n_tokens: int) -> float:
        """Add the gradient of the mean KL of some tokens; one place's logits exist at a time."""
        translated = self.translated(states)
        slope = torch.zeros_like(translated)
        total = 0.0
        for t in range(states.shape[0]):
            for i in range(states.shape[1]):
                leaf = translated[t, i].detach().requires_grad_()
                loss = self.kl(leaf, final).sum() / (n_tokens * states.shape[0] * states.shape[1])
                (slope[t, i],) = torch.autograd.grad(loss, leaf)
                total += float(loss.detach())
        translated.backward(slope)
        return total

    @torch.no_grad()
    def losses(self, texts: Any, batch_size: int) -> tuple[Float[Tensor, "loop layer"], Float[Tensor, "loop layer"]]:
        """Mean KL(run ‖ lens) of the direct and of the tuned lens over all real tokens, in nats."""
        shape = (self.n_loops, len(self.layers))
        sums = torch.zeros(2, *shape, dtype=torch.float64)
        n_tokens = 0
        for begin in range(0, len(texts), batch_size):
            states, final = self.states(texts, slice(begin, begin + batch_size))
            n_tokens += len(final)
            for piece in chunks(len(final), self.model.cfg.d_vocab):
                for which, read in enumerate((states[:, :, piece], self.translated(states[:, :, piece]))):
                    for t in range(shape[0]):
                        for i in range(shape[1]):
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
