"""Text from a looped model, whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import InputError
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, Runs
from tl_looped.generation.stream import GenerationStep, TokenStream, generate_stream

GenerateReturn = Literal["input", "str", "tokens", "result"]


@dataclass(frozen=True, eq=False, repr=False)
class Generated(Result):
    """Generated text, and how it came about.

    Attributes:
        tokens: prompts and new tokens.
        real: which of them are text, not padding before it or filler after it.
        text: prompt and new text of each row, without special tokens; None without a tokenizer.
        pieces: what each new token adds to its row's text, [batch][new]; None without a tokenizer.
        log_probs: log probability of each new token under the model itself, before temperature, top_k and top_p, in
            nats; NaN in filler.
        loops: how many loops the position ran whose logits gave each new token; 0 in filler.
    """

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    text: tuple[str, ...] | None
    pieces: tuple[tuple[str, ...], ...] | None
    log_probs: Float[Tensor, "batch new"]
    loops: Int[Tensor, "batch new"]

    @property
    def new_tokens(self) -> Int[Tensor, "batch new"]:
        """The tokens after the prompt."""
        return self.tokens[:, -self.loops.shape[1] :]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each new token, without filler: batch, pos, token, text (None if unknown), log_prob, loops."""
        start = self.tokens.shape[1] - self.loops.shape[1]
        rows = [
            {
                "batch": row,
                "pos": start + i,
                "token": int(self.tokens[row, start + i]),
                "text": None if self.pieces is None else self.pieces[row][i],
                "log_prob": float(self.log_probs[row, i]),
                "loops": int(self.loops[row, i]),
            }
            for row, i in self.real[:, start:].nonzero().tolist()
        ]
        return pd.DataFrame(rows, columns=["batch", "pos", "token", "text", "log_prob", "loops"])


def generate(
    model: Engine,
    input: Prompts,
    max_new_tokens: int = 10,
    n_loops: int | None = None,
    *,
    return_type: GenerateReturn = "input",
    verbose: bool = True,
    **options: Any,
) -> str | list[str] | Tensor | Generated:
    """Generate text. The same seed gives the same text.

    Args:
        model: the model.
        input: prompts in any form.
        max_new_tokens, n_loops, options: as in `generate_stream`.
        return_type: "str", the prompt and the new text as the tokenizer decodes their ids, without special tokens: of
            some tokenizers the prompt comes back spaced in another way (a list of texts for a list of texts and for
            more than one row of tokens); "tokens", both as ids [batch, pos]; "input", whichever the input was;
            "result", a `Generated` with everything.
        verbose: show a progress bar.

    Returns:
        What return_type says. In tokens, a row that has ended goes on with the tokenizer's padding token, or without
        one with its end-of-text token.

    Raises:
        InputError: as `generate_stream`, or text is asked for without a tokenizer; nothing was run.
    """
    if return_type not in ("input", "str", "tokens", "result"):
        raise InputError(f"return_type must be 'input', 'str', 'tokens' or 'result', got {return_type!r}.")
    if return_type == "str" and model.tokenizer is None:
        raise InputError(
            "return_type='str', but this model has no tokenizer: pass return_type='tokens', or set model.tokenizer."
        )
    if return_type == "input":
        return_type = "tokens" if isinstance(input, (Tensor, Runs)) else "str"
    stream = generate_stream(model, input, max_new_tokens, n_loops, **options)
    steps = list(tqdm(stream, desc="Generating", total=max_new_tokens, unit="token", disable=not verbose))
    result = _collect(model, stream, steps)
    if return_type == "result":
        return result
    if return_type == "tokens":
        return result.tokens
    texts = list(cast("tuple[str, ...]", result.text))
    several = isinstance(input, (list, tuple)) and isinstance(input[0], (str, list, tuple))
    return texts if several or len(texts) > 1 else texts[0]


def _collect(model: Engine, stream: TokenStream, steps: list[GenerationStep]) -> Generated:
    """The steps as one result."""
    loops = torch.stack([step.loops for step in steps], dim=1)
    tokens = torch.cat((stream.prompt.tokens, torch.stack([step.tokens for step in steps], dim=1)), dim=1)
    real = torch.cat((stream.prompt.attention_mask, loops > 0), dim=1)
    text = pieces = None
    if model.tokenizer is not None:
        rows = zip(tokens, real, strict=True)
        text = tuple(
            cast(str, model.tokenizer.decode(row[mask].tolist(), skip_special_tokens=True)) for row, mask in rows
        )
        pieces = tuple(zip(*[step.text or () for step in steps], strict=True))
    log_probs = torch.stack([step.log_probs for step in steps], dim=1)
    return Generated(stream.made_by, tokens, real, text, pieces, log_probs, loops)
