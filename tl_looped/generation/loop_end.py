"""What can be asked at the end of a loop: the state, and what the model would say if it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import log_probs_of


@dataclass
class LoopEnd:
    """The end of one loop, for a number of tokens (rows) at once. What is not asked for is not computed.

    Attributes:
        loop: the loop that has ended, from 0.
        state: the state that left it.
        state_before: the state that entered it.
        read: gives the logits if the model stopped here.
        gate: gives the logits of the exit gate, as its hooks leave them; None for a model without one.
    """

    loop: int
    state: Float[Tensor, "rows d_model"]
    state_before: Float[Tensor, "rows d_model"]
    read: Callable[[], Float[Tensor, "rows d_vocab"]]
    gate: Callable[[], Float[Tensor, " rows"]] | None = None

    @cached_property
    def log_probs(self) -> Float[Tensor, "rows d_vocab"]:
        """Log probabilities of the read-out, in nats, float32 at least."""
        return log_probs_of(self.read())

    @cached_property
    def gate_logit(self) -> Float[Tensor, " rows"]:
        """Logit of the exit gate.

        Raises:
            InputError: the model has none.
        """
        if self.gate is None:
            raise InputError("this model has no exit gate: use a rule on read-outs or states.")
        return self.gate()


@runtime_checkable
class ExitRule(Protocol):
    """When a token has been looped enough: `tl_looped.lens.exits` has the published ones."""

    def begin(self, model: Engine, n_loops: int) -> Callable[[LoopEnd], Bool[Tensor, " rows"]]:
        """A fresh judge for some tokens: called after every loop, in order, it says which of them stop there.

        Raises:
            InputError: the model can't have this rule.
        """
        ...
