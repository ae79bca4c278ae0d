"""When a row's text has ended, and how its tokens become text piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, check_count

Criterion = Callable[[Tensor, Tensor], Any]
"""Of transformers' form: (tokens [batch, pos], the newest logits [batch, d_vocab]) to whether each row ends."""

_INCOMPLETE = "\ufffd"  # what decoders write for the first bytes of a character


@dataclass(frozen=True)
class Stopping:
    """What ends a row, checked.

    Attributes:
        eos: tokens that end it.
        strings: texts that end it.
        filler: the token that ended rows go on with while others have not ended.
        criteria: functions that end rows.
    """

    eos: tuple[int, ...]
    strings: tuple[str, ...]
    filler: int
    criteria: tuple[Criterion, ...] = ()

    @classmethod
    def checked(
        cls,
        tokenizer: PreTrainedTokenizerBase | None,
        cfg: LoopedConfig,
        batch: int,
        stop_at_eos: bool,
        eos_token_id: int | Sequence[int] | None,
        stop_strings: str | Sequence[str] | None,
        criteria: tuple[Criterion, ...] = (),
    ) -> Stopping:
        """From the caller's options; `generate_stream` says what each is.

        Raises:
            InputError: an option that contradicts another, lacks a tokenizer, or is out of range.
        """
        eos = _eos_tokens(tokenizer, cfg, stop_at_eos, eos_token_id)
        strings = _stop_strings(tokenizer, stop_strings)
        padding = None if tokenizer is None else tokenizer.pad_token_id
        filler = cast("int | None", padding) if padding is not None else next(iter(eos), None)
        for criterion in criteria:
            if not callable(criterion):
                raise InputError(
                    "stopping_criteria is a list of functions of tokens and logits, as transformers' StoppingCriteria, "
                    f"got {criterion!r} in it."
                )
        if filler is None and batch > 1 and (strings or criteria):
            what = "a stop string" if strings else "a stopping criterion"
            raise InputError(
                f"a row that {what} ends is filled up while the others go on, but the tokenizer has neither a "
                "padding nor an end-of-text token: set tokenizer.pad_token, or generate the rows one at a time."
            )
        return cls(eos, strings, 0 if filler is None else filler, criteria)

    def by_criteria(
        self, tokens: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch d_vocab"]
    ) -> Bool[Tensor, " batch"]:
        """The rows that a criterion ends, the newest token included."""
        ends = torch.zeros_like(tokens[:, 0], dtype=torch.bool)
        for criterion in self.criteria:
            said = torch.as_tensor(criterion(tokens, logits), device=ends.device)
            if said.dtype != torch.bool or said.shape not in ((), ends.shape):
                raise InputError(
                    f"stopping_criteria: {criterion!r} gave {said.dtype} of shape {tuple(said.shape)}: it must give "
                    f"True or False, for all rows or as [{len(ends)}]."
                )
            ends = ends | said
        return ends


def _eos_tokens(
    tokenizer: PreTrainedTokenizerBase | None,
    cfg: LoopedConfig,
    stop_at_eos: bool,
    eos_token_id: int | Sequence[int] | None,
) -> tuple[int, ...]:
    if not stop_at_eos:
        if eos_token_id is not None:
            raise InputError(
                f"stop_at_eos=False, but eos_token_id={eos_token_id!r} says where to stop: leave out one or the other."
            )
        return ()
    if eos_token_id is None:
        if tokenizer is None and not cfg.eos_token_ids:
            raise InputError(
                "neither this model's config nor a tokenizer says which token ends a text: pass eos_token_id=..., or "
                "stop_at_eos=False."
            )
        written = None if tokenizer is None else cast("int | None", tokenizer.eos_token_id)
        known = [*cfg.eos_token_ids, *([] if written is None else [written])]
        return tuple(dict.fromkeys(token for token in known if token < cfg.d_vocab))  # the model can't say any other
    given = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
    if not isinstance(given, (list, tuple)) or not given:
        raise InputError(f"eos_token_id must be a token id or a list of at least one, got {eos_token_id!r}.")
    for token in given:
        if check_count("eos_token_id", token, minimum=0) >= cfg.d_vocab:
            raise InputError(f"eos_token_id {token} is out of the vocabulary [0, {cfg.d_vocab}).")
    return tuple(given)


def _stop_strings(
    tokenizer: PreTrainedTokenizerBase | None, stop_strings: str | Sequence[str] | None
) -> tuple[str, ...]:
    if stop_strings is None:
        return ()
    given = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(one, str) and one for one in given):
        raise InputError(f"stop_strings must be a text or a list of at least one, none empty, got {stop_strings!r}.")
    if tokenizer is None:
        raise InputError(
            "stop_strings needs a tokenizer, and this model has none: set model.tokenizer, or pass eos_token_id=..."
        )
    return tuple(given)


class RowText:
    """The text of one row, as its tokens come.

    A token's piece is what it adds to the text before it, so pieces put together are the decoded text, also where a
    decoder writes spaces between tokens or drops one at the beginning. A character of several tokens comes with the
    last of them. Special tokens are written out.

    Args:
        tokenizer: of the model.
        prompt: the row's real tokens.

    Attributes:
        text: what was generated so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int]):
        self.tokenizer = tokenizer
        self.text = ""
        self._window = list(prompt)  # as many of the last tokens as a piece depends on
        self._read = len(prompt)  # how many of them are in the text

    def add(self, token: int) -> str:
        """The piece of text that a token completes."""
        self._window.append(token)
        before, after = self._decode(self._window[: self._read]), self._decode(self._window)
        if after.endswith(_INCOMPLETE):
            return ""
        piece = after[len(before) :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self.text += piece
        return piece

    def _decode(self, tokens: list[int]) -> str:
        # cleaning up could shorten the text before a token
        return cast(str, self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
