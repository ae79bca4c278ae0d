"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tl_looped.engine.checks import check_number
from tl_looped.engine.errors import InputError, check_count

Processor = Callable[[Tensor, Tensor], Tensor]
"""Of transformers' form: (tokens [batch, pos], logits [batch, d_vocab]) to logits."""


@dataclass(frozen=True)
class Sampling:
    """The options of a choice, checked, with transformers' names and meanings.

    Attributes:
        do_sample: draw from the distribution; else take the most probable token.
        temperature: logits are divided by it.
        top_k: draw from the k most probable tokens.
        top_p: draw from the fewest most probable tokens whose probabilities reach this sum; after `top_k`.
        repetition_penalty: of tokens that the row has, positive logits are divided by it and negative ones multiplied.
        freq_penalty: is subtracted from a token's logit as often as the row has the token (TransformerLens's).
        logits_processor: what changes logits after the penalties and before the temperature, in order.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    freq_penalty: float = 0.0
    logits_processor: tuple[Processor, ...] = ()

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, mend="for the most probable token pass do_sample=False")
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0.0, 1.0, high_too=True, mend="leave it out for all tokens")
        check_number("repetition_penalty", self.repetition_penalty, mend="1.0 is none")
        check_number("freq_penalty", self.freq_penalty, low_too=True, mend="0.0 is none")
        for processor in self.logits_processor:
            if not callable(processor):
                raise InputError(
                    "logits_processor is a list of functions of tokens and logits, as transformers' LogitsProcessor, "
                    f"got {processor!r} in it."
                )
        given = [f"{name}={value!r}" for name, value in self._shaping() if value is not None]
        if not self.do_sample and given:
            raise InputError(
                f"do_sample=False takes the most probable token, so {' and '.join(given)} would change nothing: leave "
                "out one or the other."
            )

    def _shaping(self) -> list[tuple[str, object]]:
        temperature = None if self.temperature == 1.0 else self.temperature
        return [("temperature", temperature), ("top_k", self.top_k), ("top_p", self.top_p)]

    def describe(self) -> dict[str, Any]:
        """The options, with what processors say of themselves."""
        described = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**described, "logits_processor": [repr(one) for one in self.logits_processor]}

    def choose(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
        generator: torch.Generator,
    ) -> Int[Tensor, " batch"]:
        """The next token of every row.

        Args:
            logits: float32 at least.
            tokens: the rows so far.
            real: which of them are text, not padding, which no penalty counts.
            generator: of random numbers, on the CPU, so that every device draws the same.
        """
        logits = self._penalised(logits, tokens, real)
        if not self.do_sample:
            return logits.argmax(-1)
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        probs = warpers(tokens, logits).softmax(-1)  # pyright: ignore[reportArgumentType] - torch.LongTensor
        # As torch.multinomial draws one of each row, which on a device would draw other numbers, or wait for the CPU.
        draws = torch.empty(probs.shape, dtype=probs.dtype).exponential_(generator=generator)
        return (probs / draws.to(probs.device, non_blocking=True)).argmax(-1)

    def _penalised(
        self, logits: Float[Tensor, "batch d_vocab"], tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch d_vocab"]:
        if self.repetition_penalty != 1.0:
            own = torch.where(real, tokens, tokens[:, -1:])  # the newest is the row's own
            logits = RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty))(own, logits)  # pyright: ignore[reportArgumentType] - torch.LongTensor
        if self.freq_penalty:
            logits = logits - self.freq_penalty * torch.zeros_like(logits).scatter_add(1, tokens, real.to(logits))
        for processor in self.logits_processor:
            logits = _as_before(processor(tokens, logits.clone()), logits, processor)
        return logits


def as_tuple(given: Any) -> tuple[Any, ...]:
    """One or several processors, or criteria, as transformers takes them; None is none."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Sequence) else (given,)


def _as_before(found: Any, logits: Tensor, processor: Processor) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != logits.shape or not found.is_floating_point():
        kind = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"logits_processor {processor!r} gave {kind}: it must give logits of shape {tuple(logits.shape)}."
        )
    return found
