"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tl_looped.engine.checks import check_number
from tl_looped.engine.errors import InputError, check_count


@dataclass(frozen=True)
class Sampling:
    """The options of a choice, checked, with transformers' names and meanings.

    Attributes:
        do_sample: draw from the distribution; else take the most probable token.
        temperature: logits are divided by it.
        top_k: draw from the k most probable tokens.
        top_p: draw from the fewest most probable tokens whose probabilities reach this sum; after `top_k`.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, mend="for the most probable token pass do_sample=False")
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0.0, 1.0, high_too=True, mend="leave it out for all tokens")
        given = [f"{name}={value!r}" for name, value in self._shaping() if value is not None]
        if not self.do_sample and given:
            raise InputError(
                f"do_sample=False takes the most probable token, so {' and '.join(given)} would change nothing: leave "
                "out one or the other."
            )

    def _shaping(self) -> list[tuple[str, object]]:
        temperature = None if self.temperature == 1.0 else self.temperature
        return [("temperature", temperature), ("top_k", self.top_k), ("top_p", self.top_p)]

    def choose(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        generator: torch.Generator,
    ) -> Int[Tensor, " batch"]:
        """The next token of every row.

        Args:
            logits: float32 at least.
            tokens: the rows so far.
            generator: of random numbers, on the CPU, so that every device draws the same.
        """
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
