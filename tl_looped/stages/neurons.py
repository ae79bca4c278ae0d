"""Prediction and suppression neurons: MLP neurons that raise, or lower, a small set of tokens.

A neuron writes a fixed direction w into the residual stream. Its effect on the logits, were nothing to come after it,
is w · W_U, one number for each token. Where that has a heavy tail, the neuron moves a few tokens and leaves the others:
up, where the tail is on the right (prediction), down, where it is on the left (suppression). The input does not enter,
nor does the loop: a looped layer has the same neurons in every loop.
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
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import wide
from tl_looped.engine.results import Result
from tl_looped.engine.schedule import CORE
from tl_looped.model import LoopedModel, check_looped
from tl_looped.nn import LoopedTransformer
from tl_looped.nn.block import Block
from tl_looped.viz.curves import layer_shares

KURTOSIS = 10.0
"""From which kurtosis on (3 is a normal distribution's) a neuron counts, unless the caller says otherwise."""

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
        min_kurtosis: above it a neuron counts.
        min_skew: a prediction neuron's skew is above it, a suppression neuron's below its negative.
    """

    stacks: tuple[str, ...]
    layers: tuple[int, ...]
    kurtosis: Float[Tensor, "row neuron"]
    skew: Float[Tensor, "row neuron"]
    min_kurtosis: float
    min_skew: float

    def prediction(self) -> Float[Tensor, " row"]:
        """Share of each layer's neurons that raise a small set of tokens."""
        return self._share(self.skew > self.min_skew)

    def suppression(self) -> Float[Tensor, " row"]:
        """Share of each layer's neurons that lower a small set of tokens."""
        return self._share(self.skew < -self.min_skew)

    def _share(self, side: Tensor) -> Float[Tensor, " row"]:
        return ((self.kurtosis > self.min_kurtosis) & side).double().mean(1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each layer: stack, layer, prediction, suppression (shares), n_neurons."""
        return pd.DataFrame(
            {
                "stack": self.stacks,
                "layer": self.layers,
                "prediction": self.prediction().numpy(),
                "suppression": self.suppression().numpy(),
                "n_neurons": self.kurtosis.shape[1],
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
        """Both shares over the layers."""
        names = [
            f"{'core' if stack == CORE else stack} {layer}"
            for stack, layer in zip(self.stacks, self.layers, strict=True)
        ]
        shares = {"prediction neurons": self.prediction(), "suppression neurons": self.suppression()}
        title = f"Neurons with kurtosis above {self.min_kurtosis:g}: {self.made_by.get('model', '')}"
        return layer_shares(shares, names, "share of the layer's neurons", title)


@torch.no_grad()
def neuron_shares(
    model: LoopedModel,
    *,
    min_kurtosis: float = KURTOSIS,
    min_skew: float = 0.0,
    unit: bool = True,
    fold: bool = True,
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
        min_kurtosis: a neuron counts above it; 3 is a normal distribution's.
        min_skew: of at least 0; see `NeuronShares`.
        unit: cosines instead of logits, see `logit_effects`.
        fold: whether the norms' weights count.
        progress: show a bar over layers.

    Raises:
        InputError: a threshold that is not a number, below 0, or above what the vocabulary's size allows; weights that
            are not finite; or `fold` of a model whose layers are gated by the loop's time.

    Source:
        Gurnee et al. 2024, arXiv 2401.12181 (kurtosis above 10, by the sign of the skew); arXiv 2604.11791.
    """
    for name, value in (("min_kurtosis", min_kurtosis), ("min_skew", min_skew)):
        check_number(name, value, low_too=True)
    most = largest_kurtosis(check_looped(model, several_stacks=True).cfg.d_vocab)
    if min_kurtosis >= most:
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
    found = [
        logit_effects(_directions(block, fold, then if stack == CORE else None), W_U, unit)
        for (stack, _), block in tqdm(
            zip(layers, model.layer_modules(), strict=True), "Neurons", len(layers), disable=not progress
        )
    ]
    options = {"unit": unit, "fold": fold}
    return NeuronShares(
        made_by={"model": model.cfg.model_name, **options},
        stacks=tuple(stack for stack, _ in layers),
        layers=tuple(layer for _, layer in layers),
        kurtosis=torch.stack([one.kurtosis for one in found]).cpu(),
        skew=torch.stack([one.skew for one in found]).cpu(),
        min_kurtosis=float(min_kurtosis),
        min_skew=float(min_skew),
    )


def _directions(block: Block, fold: bool, then: Tensor | None) -> Float[Tensor, "d_mlp d_model"]:
    w = block.mlp.W_out
    w = _scaled(w, block.neuron_gain) if fold and block.neuron_gain is not None else w
    return w if then is None else wide(w) @ wide(then).T


def _scaled(weight: Tensor, by: Tensor) -> Tensor:
    return wide(weight) * wide(by)
