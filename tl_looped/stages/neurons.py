"""Prediction and suppression neurons: MLP neurons that raise, or lower, a small set of tokens.

A neuron writes a fixed direction w into the residual stream. Its effect on the logits, were nothing to come after it,
is w · W_U, one number for each token. Where that has a heavy tail, the neuron moves a few tokens and leaves the others:
up, where the tail is on the right (prediction), down, where it is on the left (suppression). The input does not enter,
nor does the loop: a looped layer has the same neurons in every loop. The vocabulary's columns alone make tails, so
random directions are read through them too: what neurons have beyond those is theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.engine.checks import check_number
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.numbers import quantile, wide
from tl_looped.engine.results import Result
from tl_looped.engine.schedule import CORE
from tl_looped.model import LoopedModel, check_looped
from tl_looped.nn import LoopedTransformer
from tl_looped.nn.block import Block
from tl_looped.viz.curves import layer_shares

KURTOSIS = 10.0
"""From which kurtosis on (3 is a normal distribution's) a neuron counts, unless the caller says otherwise."""

RANDOM_SHARE = 0.01
"""The share of random directions above the kurtosis that neurons are held against."""

_CHUNK = 2**24  # logit effects held at once: 64 MiB in float32


class LogitEffects(NamedTuple):
    """Moments, over the vocabulary, of each neuron's effect on the logits."""

    mean: Float[Tensor, " neuron"]
    variance: Float[Tensor, " neuron"]
    skew: Float[Tensor, " neuron"]
    kurtosis: Float[Tensor, " neuron"]


@torch.no_grad()
def logit_effects(
    directions: Float[Tensor, "neuron d_model"], W_U: Float[Tensor, "d_model d_vocab"], unit: bool = True
) -> LogitEffects:
    """Mean, variance, skew and kurtosis over the vocabulary of w · W_U for each neuron's output direction w.

    Skew is E[(y − ȳ)³] / σ³; kurtosis E[(y − ȳ)⁴] / σ⁴, 3 for a normal distribution (not the excess over it). Both are
    NaN for a neuron that moves all tokens alike. The vocabulary is taken in pieces: [neuron, d_vocab] is never held.

    For a feedforward model of TransformerLens: `logit_effects(model.W_out[layer], model.W_U)`, after
    `model.enable_compatibility_mode(fold_ln=True)`, which folds the final norm's weight into W_U.

    Args:
        directions: what each neuron writes, a row of W_out.
        W_U: the unembedding, the final norm's weight folded in.
        unit: take the cosine of w and each token's column of W_U, as the source does, so that tokens with a long column
            do not decide alone; else the product, which is the logit.

    Raises:
        InputError: widths that do not fit, fewer than two tokens, or weights that are not finite.

    Source:
        Gurnee et al. 2024, arXiv 2401.12181, prediction neurons.
    """
    if directions.shape[1] != W_U.shape[0]:
        raise InputError(
            f"directions are {directions.shape[1]} wide and W_U reads {W_U.shape[0]}: pass W_out [d_mlp, d_model] and "
            "W_U [d_model, d_vocab]."
        )
    n_neurons, d_vocab = len(directions), W_U.shape[1]
    if d_vocab < 2:
        raise InputError(f"moments over the vocabulary need two tokens or more, got {d_vocab}.")
    w = wide(directions)
    tiny = torch.finfo(w.dtype).tiny
    w = w / w.norm(dim=1, keepdim=True).clamp(min=tiny) if unit else w
    pieces = list(W_U.split(max(1, _CHUNK // n_neurons), dim=1))

    def columns(piece: Tensor) -> Tensor:
        piece = piece.to(w.dtype)
        return piece / piece.norm(dim=0).clamp(min=tiny) if unit else piece

    center = torch.stack([columns(piece).sum(1, dtype=torch.float64) for piece in pieces]).sum(0) / d_vocab
    powers, length = w.new_zeros(3, n_neurons, dtype=torch.float64), 0.0
    for piece in pieces:
        length += float(columns(piece).square().sum()) / d_vocab
        effect = w @ (columns(piece) - center[:, None].to(w.dtype))  # the mean effect is that of the mean column
        square = effect.square()
        for i, power in enumerate((square, square * effect, square.square())):
            powers[i] += power.sum(1, dtype=torch.float64)
    if not bool(powers.isfinite().all()):
        raise InputError("the effects on the logits are not finite: look for NaN or infinity in W_out and W_U.")
    second, third, fourth = powers / d_vocab
    # What is left of the products of equal columns is rounding, and its shape would be noise.
    floor = (8 * torch.finfo(w.dtype).eps) ** 2 * length * w.double().square().sum(1)
    spread = torch.where(second > floor, second, math.nan)
    return LogitEffects(w.double() @ center, second, third / spread**1.5, fourth / spread.square())


def largest_kurtosis(d_vocab: int) -> float:
    """The kurtosis of an effect on a single one of `d_vocab` tokens: no neuron has a larger one."""
    return (d_vocab**2 - 3 * d_vocab + 3) / (d_vocab - 1)


@dataclass(frozen=True, eq=False, repr=False)
class NeuronShares(Result):
    """Prediction and suppression neurons of every MLP layer, in the order prelude, core, coda.

    Attributes:
        stacks, layers: which layer each row is.
        kurtosis, skew: of each neuron's effect on the logits, see `logit_effects`; NaN for a neuron that moves all
            tokens alike, which is then neither.
        random: kurtosis of random directions, read as the layer's neurons are.
        min_kurtosis: above it a neuron counts; None: above 99 % of the layer's random directions.
        min_skew: a prediction neuron's skew is above it, a suppression neuron's below its negative.
    """

    stacks: tuple[str, ...]
    layers: tuple[int, ...]
    kurtosis: Float[Tensor, "row neuron"]
    skew: Float[Tensor, "row neuron"]
    random: Float[Tensor, "row random"]
    min_kurtosis: float | None
    min_skew: float

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n    {self._in_words()}"

    def prediction(self) -> Float[Tensor, " row"]:
        """Share of each layer's neurons that raise a small set of tokens."""
        return self._share(self.skew > self.min_skew)

    def suppression(self) -> Float[Tensor, " row"]:
        """Share of each layer's neurons that lower a small set of tokens."""
        return self._share(self.skew < -self.min_skew)

    def _share(self, side: Tensor) -> Float[Tensor, " row"]:
        return ((self.kurtosis > self.thresholds()[:, None]) & side).double().mean(1)

    def thresholds(self) -> Float[Tensor, " row"]:
        """The kurtosis above which a layer's neurons count."""
        same = torch.full_like(self.kurtosis[:, 0], self.min_kurtosis or 0)
        return self._of_random() if self.min_kurtosis is None else same

    def beyond_random(self) -> Float[Tensor, " row"]:
        """Share of each layer's neurons above 99 % of its random directions: 0.01 if they were random too."""
        return (self.kurtosis > self._of_random()[:, None]).double().mean(1)

    def _of_random(self) -> Float[Tensor, " row"]:
        return quantile(self.random, 1 - RANDOM_SHARE)

    def _in_words(self) -> str:
        """What counts, or that nothing does."""
        bar = "99 % of random directions" if self.min_kurtosis is None else f"{self.min_kurtosis:g}"
        n, most = int((self.kurtosis > self.thresholds()[:, None]).sum()), float(self.kurtosis.nan_to_num(0).max())
        found = f"{n} of {self.kurtosis.numel()} neurons have" if n else "No neuron has"
        low, high = self._of_random().aminmax()
        beyond = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
        return f"{found} a kurtosis above {bar}; the largest is {most:.3g}, that of random directions {beyond} (99 %)."

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each layer: stack, layer, prediction, suppression (shares), n_neurons, and kurtosis.

        That is: the neurons' median and largest, random_99 (99 % of random directions are below it), and beyond_random,
        the share of neurons above that.
        """
        return pd.DataFrame(
            {
                "stack": self.stacks,
                "layer": self.layers,
                "prediction": self.prediction().numpy(),
                "suppression": self.suppression().numpy(),
                "n_neurons": self.kurtosis.shape[1],
                "median": self.kurtosis.nanmedian(1).values.numpy(),
                "largest": self.kurtosis.nan_to_num(-math.inf).amax(1).numpy(),
                "random_99": self._of_random().numpy(),
                "beyond_random": self.beyond_random().numpy(),
            }
        )

    def neurons(self) -> pd.DataFrame:
        """One row for each neuron: stack, layer, neuron, kurtosis, skew."""
        row, neuron = np.indices(self.kurtosis.shape).reshape(2, -1)
        places = {"stack": np.array(self.stacks)[row], "layer": np.array(self.layers)[row], "neuron": neuron}
        return pd.DataFrame(
            {**places, "kurtosis": self.kurtosis.flatten().numpy(), "skew": self.skew.flatten().numpy()}
        )

    def plot(self) -> go.Figure:
        """The shares over the layers, and how many neurons are beyond random directions."""
        names = [
            f"{'core' if stack == CORE else stack} {layer}"
            for stack, layer in zip(self.stacks, self.layers, strict=True)
        ]
        shares = {"prediction neurons": self.prediction(), "suppression neurons": self.suppression()}
        shares |= {"beyond 99 % of random directions": self.beyond_random()}
        title = f"{self.made_by.get('model', '')}: {self._in_words()}"
        return layer_shares(shares, names, "share of the layer's neurons", title)


@torch.no_grad()
def neuron_shares(
    model: LoopedModel,
    *,
    min_kurtosis: float | None = KURTOSIS,
    min_skew: float = 0.0,
    unit: bool = True,
    fold: bool = True,
    n_random: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> NeuronShares:
    """The share of prediction and of suppression neurons in every MLP layer.

    With `fold`, a norm between the MLP and the stream (`ln2_post`) has its weight multiplied into the neurons'
    directions, and the final norm (the one that closes a loop, for Ouro) into W_U; its scale is positive and the same
    for all tokens, so it changes neither moment. A linear map of the state after the loops (Parcae) is part of what the
    core's neurons write to the head. Injection, later layers and later loops, and the other of two stacks, are left
    out, also where they have weights of their own on the stream's way (Huginn's layers).

    Args:
        model: the model. Nothing is run.
        min_kurtosis: a neuron counts above it; 3 is a normal distribution's. None: above 99 % of the layer's random
            directions. (A small model's neurons may all be below the source's 10: the result says so.)
        min_skew: of at least 0; see `NeuronShares`.
        unit: cosines instead of logits, see `logit_effects`.
        fold: whether the norms' weights count.
        n_random: random directions (normal draws), of which a layer's neurons are told apart; 100 at least.
        seed: of these.
        progress: show a bar over layers.

    Raises:
        InputError: a threshold that is not a number, below 0, or above what the vocabulary's size allows; weights that
            are not finite; or `fold` of a model whose layers are gated by the loop's time.

    Source:
        Gurnee et al. 2024, arXiv 2401.12181 (kurtosis above 10, by the sign of the skew); arXiv 2604.11791.
    """
    for name, value in (("min_kurtosis", 0.0 if min_kurtosis is None else min_kurtosis), ("min_skew", min_skew)):
        check_number(name, value, low_too=True)
    check_count("n_random", n_random, minimum=round(1 / RANDOM_SHARE))
    most = largest_kurtosis(check_looped(model, several_stacks=True).cfg.d_vocab)
    if min_kurtosis is not None and min_kurtosis >= most:
        raise InputError(
            f"with {model.cfg.d_vocab} tokens no neuron's kurtosis exceeds {most:.3g}, so none could be above "
            f"{min_kurtosis:g}: pass a smaller min_kurtosis."
        )
    if model.cfg.head_transform:
        raise InputError(
            f"the head of {model.cfg.model_name} reads the stream through a map with an activation function, so a "
            "neuron's effect on logits depends on the rest: look at states (tl_looped.lens.logit_lens) instead."
        )
    if fold and model.cfg.loop_time:
        raise InputError(
            f"a gate that changes with the loop multiplies what neurons of {model.cfg.model_name} write, so no one "
            "weight can be folded in: pass fold=False."
        )
    transformer, layers, W_U = model.transformer, model.cfg.layers(), model.W_U
    then = transformer.after_loops if isinstance(transformer, LoopedTransformer) else None
    if fold and transformer.head_gain is not None:
        W_U = _scaled(W_U, transformer.head_gain[:, None])
    generator, d_mlp = torch.Generator().manual_seed(seed), model.cfg.d_mlp
    drawn = torch.randn(n_random, model.cfg.d_model, generator=generator).to(wide(W_U))
    found = []
    for (stack, _), block in tqdm(
        zip(layers, model.layer_modules(), strict=True), "Neurons", len(layers), disable=not progress
    ):
        written = torch.cat((wide(block.mlp.W_out), drawn))
        found.append(logit_effects(_as_read(written, block, fold, then if stack == CORE else None), W_U, unit))
    kurtosis = torch.stack([one.kurtosis for one in found]).cpu()
    return NeuronShares(
        made_by={"model": model.cfg.model_name, "unit": unit, "fold": fold, "seed": seed},
        stacks=tuple(stack for stack, _ in layers),
        layers=tuple(layer for _, layer in layers),
        kurtosis=kurtosis[:, :d_mlp],
        skew=torch.stack([one.skew for one in found]).cpu()[:, :d_mlp],
        random=kurtosis[:, d_mlp:],
        min_kurtosis=None if min_kurtosis is None else float(min_kurtosis),
        min_skew=float(min_skew),
    )


def _as_read(
    w: Float[Tensor, "write d_model"], block: Block, fold: bool, then: Tensor | None
) -> Float[Tensor, "write d_model"]:
    """Directions that a layer's MLP writes, as the head reads them."""
    w = _scaled(w, block.neuron_gain) if fold and block.neuron_gain is not None else w
    return w if then is None else w @ wide(then).T


def _scaled(weight: Tensor, by: Tensor) -> Tensor:
    return wide(weight) * wide(by)
