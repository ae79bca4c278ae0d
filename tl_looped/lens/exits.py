"""When a token has been looped enough: Ouro's gate, and rules that any model can have.

A rule has a statistic after every loop and a threshold. The same rule judges a whole run afterwards (`exit_curves`) and
each token while text is generated (`model.generate(..., exit_rule=...)`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.engine.checks import check_number
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.numbers import first_met, length, ratio, wide
from tl_looped.generation import LoopEnd
from tl_looped.lens.measures import entropy, kl_divergence

if TYPE_CHECKING:
    from tl_looped.model import LoopedModel

Meter = Callable[[LoopEnd], Float[Tensor, " rows"]]


# Ouro's gate, as tensor functions.


def exit_distribution(gate_logits: Float[Tensor, "loop *dims"]) -> Float[Tensor, "loop *dims"]:
    """The chance to stop after each loop.

    p_t = λ_t Π_{s<t} (1 − λ_s) with λ = sigmoid(gate); the last loop takes what remains.

    Source:
        arXiv 2510.25741.
    """
    gate = wide(gate_logits).sigmoid()
    going_on = torch.cumprod(1 - gate, dim=0)
    reached = torch.cat((torch.ones_like(gate[:1]), going_on[:-1]))
    return torch.cat((gate[:-1] * reached[:-1], reached[-1:]))


def threshold_exit(distribution: Float[Tensor, "loop *dims"], threshold: int | float) -> Int[Tensor, "*dims"]:
    """The first loop at which the cumulative exit distribution reaches the threshold.

    Raises:
        InputError: a threshold outside (0, 1].
    """
    GateRule(threshold)
    found = first_met(distribution.cumsum(0) >= threshold)
    return found.nan_to_num(len(distribution) - 1).long()  # the last takes what remains, though rounding leaves it out


def weighted_logits(
    logits: Float[Tensor, "loop *dims d_vocab"], distribution: Float[Tensor, "loop *dims"]
) -> Float[Tensor, "*dims d_vocab"]:
    """The mean of the loops' logits, each weighted by the chance to stop there.

    Raises:
        InputError: a distribution over other loops or positions than the logits'.
    """
    if logits.shape[:-1] != distribution.shape:
        raise InputError(
            f"the distribution has shape {tuple(distribution.shape)}, but logits of shape {tuple(logits.shape)} need "
            f"{tuple(logits.shape[:-1])}: one chance for each loop and position."
        )
    return (logits * distribution[..., None]).sum(0)


# Rules.


@dataclass(frozen=True)
class ThresholdRule:
    """Base of the rules: stop when a statistic of the loop is at or below a threshold (or above, for some).

    Attributes:
        threshold: in the statistic's unit.
    """

    threshold: int | float

    name: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    stops_above: ClassVar[bool] = False
    most: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        check_number(f"{self.name}: the threshold ({self.unit})", self.threshold, high=self.most, high_too=True)

    @classmethod
    def check(cls, model: LoopedModel) -> None:
        """Raise InputError if the model can't have this rule."""

    @classmethod
    def meter(cls) -> Meter:
        """A fresh meter: called after every loop, in order, it gives the statistic, NaN where it is not defined yet."""
        raise NotImplementedError

    def met(self, statistic: Float[Tensor, "*dims"]) -> Bool[Tensor, "*dims"]:
        """Whether to stop; never where the statistic is NaN."""
        return statistic >= self.threshold if self.stops_above else statistic <= self.threshold

    def begin(self, model: LoopedModel, n_loops: int) -> Callable[[LoopEnd], Bool[Tensor, " rows"]]:
        """A judge for some tokens; see `tl_looped.generation.ExitRule`."""
        self.check(model)
        meter = self.meter()
        return lambda end: self.met(meter(end))


@dataclass(frozen=True)
class GateRule(ThresholdRule):
    """Stop where the cumulative exit distribution of the model's gate reaches the threshold, a share in (0, 1].

    Source:
        arXiv 2510.25741.
    """

    name: ClassVar[str] = "gate"
    unit: ClassVar[str] = "cumulative exit probability"
    stops_above: ClassVar[bool] = True
    most: ClassVar[float] = 1.0

    @classmethod
    def check(cls, model: LoopedModel) -> None:
        """Raise InputError if the model has no gate, or a hook is on it."""
        if model.transformer.exit_logit is None:
            raise InputError(
                f"{model.cfg.model_name} has no exit gate, so GateRule can't judge it: use KLRule, LatentRule, "
                "StableTopRule, EntropyRule or AccelerationRule."
            )
        if model.hook_dict.shared("hook_exit_gate").fwd_hooks:
            raise InputError(
                "a hook is on 'hook_exit_gate', but GateRule computes the gate from the state, so an edit there would "
                "be ignored: edit 'hook_state_post' instead, or remove the hook."
            )

    @classmethod
    def meter(cls) -> Meter:
        """The chance to have stopped by now."""
        going_on: list[Tensor] = []

        def measure(end: LoopEnd) -> Tensor:
            left = 1 - wide(end.gate_logit).sigmoid()
            going_on[:] = [left * going_on[0] if going_on else left]
            return 1 - going_on[0]

        return measure


@dataclass(frozen=True)
class KLRule(ThresholdRule):
    """Stop where KL(read-out one loop earlier ‖ read-out), in nats, is small. Not defined after the first loop.

    Source:
        arXiv 2502.05171.
    """

    name: ClassVar[str] = "KL"
    unit: ClassVar[str] = "nats"

    @classmethod
    def meter(cls) -> Meter:
        """KL between successive read-outs."""
        before: list[Tensor] = []

        def measure(end: LoopEnd) -> Tensor:
            now = end.log_probs
            value = kl_divergence(before[0], now) if before else torch.full_like(now[:, 0], float("nan"))
            before[:] = [now]
            return value

        return measure


@dataclass(frozen=True)
class LatentRule(ThresholdRule):
    """Stop where the state moves little: ‖x_{t+1} − x_t‖ / ‖x_{t+1}‖, with x_t the state that enters loop t.

    Source:
        arXiv 2502.05171.
    """

    name: ClassVar[str] = "latent difference"
    unit: ClassVar[str] = "relative L2"

    @classmethod
    def meter(cls) -> Meter:
        """The relative step of the state."""
        return lambda end: ratio(length(_step(end)), length(wide(end.state)))


@dataclass(frozen=True)
class AccelerationRule(ThresholdRule):
    """Stop where the step changes little: ‖Δ_t − Δ_{t−1}‖ / ‖x_{t+1}‖ with Δ_t = x_{t+1} − x_t, as in `accelerations`.

    Not defined after the first loop. The paper calls it acceleration, and its rule second-order; it takes the length as
    it is, and waits for two loops in a row. Dividing by the state's norm, as `LatentRule` does, lets one threshold
    serve states of different size.

    Source:
        arXiv 2509.23314.
    """

    name: ClassVar[str] = "acceleration"
    unit: ClassVar[str] = "relative L2"

    @classmethod
    def meter(cls) -> Meter:
        """The relative length of the difference of two steps."""
        before: list[Tensor] = []

        def measure(end: LoopEnd) -> Tensor:
            step, size = _step(end), length(wide(end.state))
            value = ratio(length(step - before[0]), size) if before else torch.full_like(size, float("nan"))
            before[:] = [step]
            return value

        return measure


@dataclass(frozen=True)
class EntropyRule(ThresholdRule):
    """Stop where the read-out's entropy, in nats, is small."""

    name: ClassVar[str] = "entropy"
    unit: ClassVar[str] = "nats"

    @classmethod
    def meter(cls) -> Meter:
        """Entropy of the read-out."""
        return lambda end: entropy(end.log_probs)


@dataclass(frozen=True)
class StableTopRule(ThresholdRule):
    """Stop where the top token has been the same for so many loops in a row, at least 2.

    Source:
        arXiv 2502.05171 (stability of the argmax).
    """

    name: ClassVar[str] = "stable top token"
    unit: ClassVar[str] = "loops"
    stops_above: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count(f"{self.name}: the number of loops", self.threshold, minimum=2)

    @classmethod
    def meter(cls) -> Meter:
        """For how many loops in a row the top token has been what it is; 1 after the first."""
        kept: list[Tensor] = []

        def measure(end: LoopEnd) -> Tensor:
            top = end.log_probs.argmax(-1)
            run = torch.where(top == kept[0], kept[1] + 1, 1) if kept else torch.ones_like(top)
            kept[:] = [top, run]
            return run.to(end.log_probs.dtype)

        return measure


def _step(end: LoopEnd) -> Float[Tensor, "rows d_model"]:
    return wide(end.state) - wide(end.state_before)
