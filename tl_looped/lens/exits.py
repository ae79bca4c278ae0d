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
Memory = dict[str, Tensor]


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
    def statistic(cls, end: LoopEnd, memory: Memory) -> Float[Tensor, " rows"]:
        """The statistic after a loop, NaN where it is not defined yet.

        Args:
            end: of every loop, in order.
            memory: what earlier calls left in it, for later ones.
        """
        raise NotImplementedError

    @classmethod
    def meter(cls) -> Meter:
        """A fresh meter: called after every loop, in order, it gives the statistic."""
        memory: Memory = {}
        return lambda end: cls.statistic(end, memory)

    def met(self, statistic: Float[Tensor, "*dims"]) -> Bool[Tensor, "*dims"]:
        """Whether to stop; never where the statistic is NaN."""
        return statistic >= self.threshold if self.stops_above else statistic <= self.threshold

    def begin(self, model: LoopedModel, n_loops: int) -> Callable[[LoopEnd], Bool[Tensor, " rows"]]:
        """A judge for some tokens; see `tl_looped.generation.ExitRule`."""
        self.check(model)
        meter = self.meter()
        return lambda end: self.met(meter(end))


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
        """Raise InputError if the model has no gate."""
        if model.transformer.exit_logit is None:
            raise InputError(
                f"{model.cfg.model_name} has no exit gate, so {cls.__name__} can't judge it: use KLRule, LatentRule, "
                "StableTopRule, EntropyRule or AccelerationRule."
            )

    @classmethod
    def statistic(cls, end: LoopEnd, memory: Memory) -> Float[Tensor, " rows"]:
        """The chance to have stopped by now."""
        left = 1 - wide(end.gate_logit).sigmoid()
        memory["going on"] = left * memory.get("going on", 1)
        return 1 - memory["going on"]


class GateChanceRule(GateRule):
    """Stop where the chance that the model's gate gives to stopping after this very loop reaches the threshold.

    Source:
        arXiv 2605.11011 (its halting by "threshold"; by "cdf" is `GateRule`).
    """

    name: ClassVar[str] = "gate chance"
    unit: ClassVar[str] = "exit probability"

    @classmethod
    def statistic(cls, end: LoopEnd, memory: Memory) -> Float[Tensor, " rows"]:
        """The chance to stop here."""
        return wide(end.gate_logit).sigmoid()


class KLRule(ThresholdRule):
    """Stop where KL(read-out one loop earlier ‖ read-out), in nats, is small. Not defined after the first loop.

    Source:
        arXiv 2502.05171.
    """

    name: ClassVar[str] = "KL"
    unit: ClassVar[str] = "nats"

    @classmethod
    def statistic(cls, end: LoopEnd, memory: Memory) -> Float[Tensor, " rows"]:
        """KL between successive read-outs."""
        before, now = memory.get("before"), end.log_probs
        memory["before"] = now
        return torch.full_like(now[:, 0], float("nan")) if before is None else kl_divergence(before, now)


class LatentRule(ThresholdRule):
    """Stop where the state moves little: ‖x_{t+1} − x_t‖ / ‖x_{t+1}‖, with x_t the state that enters loop t.

    Source:
        arXiv 2502.05171.
    """

    name: ClassVar[str] = "latent difference"
    unit: ClassVar[str] = "relative L2"

    @classmethod
    def statistic(cls, end: LoopEnd, memory: Memory) -> Float[Tensor, " rows"]:
        """The relative step of the state."""
        return ratio(length(_step(end)), length(wide(end.state)))


class AccelerationRule(ThresholdRule):
    """Stop where the step changes little: ‖Δ_t − Δ_{t−1}‖ / ‖x_{t+1}‖ with Δ_t = x_{t+1} − x_t, as in `acceleration`.

    Not defined after the first loop. The paper calls it acceleration, and its rule second-order; it takes the length as
    it is, and waits for two loops in a row. Dividing by the state's norm, as `LatentRule` does, lets one threshold
    serve states of different size.

    Source:
        arXiv 2509.23314.
    """

    name: ClassVar[str] = "acceleration"
    unit: ClassVar[str] = "relative L2"

    @classmethod
    def statistic(cls, end: LoopEnd, memory: Memory) -> Float[Tensor, " rows"]:
        """The relative length of the difference of two steps."""
        before, step, size = memory.get("before"), _step(end), length(wide(end.state))
        memory["before"] = step
        return torch.full_like(size, float("nan")) if before is None else ratio(length(step - before), size)


class EntropyRule(ThresholdRule):
    """Stop where the read-out's entropy, in nats, is small."""

    name: ClassVar[str] = "entropy"
    unit: ClassVar[str] = "nats"

    @classmethod
    def statistic(cls, end: LoopEnd, memory: Memory) -> Float[Tensor, " rows"]:
        """Entropy of the read-out."""
        return entropy(end.log_probs)


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
    def statistic(cls, end: LoopEnd, memory: Memory) -> Float[Tensor, " rows"]:
        """For how many loops in a row the top token has been what it is; 1 after the first."""
        top = end.log_probs.argmax(-1)
        same = top == memory.get("top", top)
        memory["run"] = torch.where(same, memory.get("run", 0) + torch.ones_like(top), 1)
        memory["top"] = top
        return memory["run"].to(end.log_probs.dtype)


def _step(end: LoopEnd) -> Float[Tensor, "rows d_model"]:
    return wide(end.state) - wide(end.state_before)


RULES: dict[str, type[ThresholdRule]] = {
    rule.name: rule
    for rule in (GateRule, GateChanceRule, KLRule, LatentRule, AccelerationRule, EntropyRule, StableTopRule)
}
"""All rules here, by name."""
