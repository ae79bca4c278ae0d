"""Prompts in any form that people have them in, read once, as rows of token ids with their padding known."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_looped.engine.errors import InputError, check_count, nearest
from tl_looped.engine.tokens import PaddingSide, apply_chat, tokenize

Encode = Callable[[str], Int[Tensor, " pos"]]
Row = tuple[Int[Tensor, " pos"], Bool[Tensor, " pos"]]  # token ids, and which of them are real

_FILES = (".txt", ".jsonl", ".json")
_TOLD = "_tl_looped_real"  # on a tensor of ids that we made: which of them are real


@dataclass(frozen=True, eq=False)
class Rows:
    """Prompts as token ids, int64 on the CPU; each row has its own length, padding that was given included.

    Attributes:
        ids: of each prompt.
        real: which of them are real, and not padding.
        padding_side: where rows of different length are filled up.
        filler: the id that fills them.
    """

    ids: tuple[Int[Tensor, "_"], ...]
    real: tuple[Bool[Tensor, "_"], ...]
    padding_side: PaddingSide = "right"
    filler: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def longest(self) -> int:
        """Positions of the longest row."""
        return max(map(len, self.ids))

    def unpadded(self, row: int) -> Int[Tensor, " pos"]:
        """The real tokens of a row."""
        return self.ids[row][self.real[row]]

    def places(self, row: int) -> Int[Tensor, " pos"]:
        """Where the real tokens of a row stand in `padded()`."""
        before = self.longest - len(self.ids[row]) if self.padding_side == "left" else 0
        return self.real[row].nonzero()[:, 0] + before

    def padded(self, rows: Sequence[int] | None = None) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
        """Rows as one tensor, and which of its tokens are real; all of them, or some."""
        chosen = range(len(self)) if rows is None else rows
        ids, real = [self.ids[row] for row in chosen], [self.real[row] for row in chosen]
        pad = torch.nn.utils.rnn.pad_sequence
        return (
            pad(ids, batch_first=True, padding_value=self.filler, padding_side=self.padding_side),
            pad(real, batch_first=True, padding_value=False, padding_side=self.padding_side),
        )

    def check(self, n_ctx: int | None, d_vocab: int | None) -> None:
        """Raise for a prompt that is longer than a context, or an id out of a vocabulary; None: any.

        Raises:
            InputError: the message says which prompt.
        """
        for index, ids in enumerate(self.ids):
            which = "the prompt" if len(self) == 1 else f"prompt {index}"
            if n_ctx is not None and len(ids) > n_ctx:
                raise InputError(
                    f"{which} has {len(ids)} tokens, more than the model's context of {n_ctx}: shorten it, or leave it "
                    "out."
                )
            low, high = (int(end) for end in torch.aminmax(ids))
            if low < 0 or (d_vocab is not None and high >= d_vocab):
                where = "" if len(self) == 1 else f"{which}: "
                raise InputError(f"{where}token id {low if low < 0 else high} is out of the vocabulary [0, {d_vocab}).")


def remember_padding(tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """The same ids, which from now on tell which of them are real: not as ids, which may be ambiguous, but beside them.

    A tensor made from them, as by slicing, does not tell.
    """
    setattr(tokens, _TOLD, real.cpu())
    return tokens


def read_rows(
    prompts: object,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    field: str | None = None,
    limit: int | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    attention_mask: Tensor | None = None,
    encode: Encode | None = None,
) -> Rows:
    """Read prompts once.

    Args:
        prompts: a text; token ids, [pos] or [batch, pos]; a BatchEncoding; chat messages, a list of
            {"role": ..., "content": ...}; a list of any of these, of unequal length too; a `Path` to a text file (one
            prompt a line, empty lines left out) or to a JSONL file; a dataset, or anything else that gives mappings.
        tokenizer: reads text; None where there is none.
        field: which field of a dataset's or a JSONL file's rows holds the prompt.
        limit: take the first so many; None for all.
        prepend_bos: see `tokenize`.
        padding_side: where to fill up rows of different length; None: as the tokenizer says, else at the right.
        attention_mask: which tokens are real, [batch, pos]; where ids alone leave two readings, it decides.
        encode: from a text to its token ids; None: as `tokenize` does it.

    Raises:
        InputError: something is no prompt, or its padding can't be told; the message says which row and what mends it.
    """
    if limit is not None:
        check_count("limit", limit)
    if padding_side not in (None, "left", "right"):
        raise InputError(f"padding_side must be 'left' or 'right', got {padding_side!r}.")
    encode = encode or (lambda text: torch.tensor(tokenize(tokenizer, text, prepend_bos)))
    told = attention_mask is not None and attention_mask.ndim == 2
    found = list(islice(_Reader(tokenizer, field, encode, told).rows(prompts), limit))
    if not found:
        place = f" in {str(prompts)!r}" if isinstance(prompts, os.PathLike) else ""
        raise InputError(f"there are no prompts{place}.")
    rows = Rows(
        tuple(ids for ids, _ in found),
        tuple(real for _, real in found),
        padding_side or _side(tokenizer),
        _filler(tokenizer),
    )
    if attention_mask is not None and told:
        rows = _masked(rows, attention_mask[:limit])
    for index, real in enumerate(rows.real):
        if not bool(real.any()):
            raise InputError(f"prompt {index} is padding only, so there is nothing to run.")
    return rows


def _side(tokenizer: PreTrainedTokenizerBase | None) -> PaddingSide:
    return "left" if tokenizer is not None and tokenizer.padding_side == "left" else "right"


def _filler(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """An id for positions that nobody sees: the tokenizer's padding where it has one."""
    for name in () if tokenizer is None else ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name)
        if isinstance(value, int):
            return value
    return 0


def _masked(rows: Rows, mask: Tensor) -> Rows:
    """The rows with padding as a mask says, in the layout of `Rows.padded`."""
    ids, _ = rows.padded()
    if mask.shape != ids.shape:
        raise InputError(
            f"attention_mask must have the shape of the tokens, {tuple(ids.shape)} = [batch, pos], "
            f"got {tuple(mask.shape)}."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("attention_mask must be of zeros and ones: 1 for tokens that are seen, 0 for others.")
    return Rows(tuple(ids), tuple(mask.cpu().bool()), rows.padding_side, rows.filler)


class _Reader:
    """What is a prompt, and what is several."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, field: str | None, encode: Encode, mask_given: bool):
        self.tokenizer, self.field, self.encode, self.mask_given = tokenizer, field, encode, mask_given

    def rows(self, prompts: object) -> Iterator[Row]:
        """Every prompt of a source."""
        if isinstance(prompts, (str, Tensor, np.ndarray, Mapping)) and self.field is not None:
            raise InputError(f"{_kind(prompts)} has no rows with fields: leave out field={self.field!r}.")
        if isinstance(prompts, str):
            yield self._text(prompts, None)
        elif isinstance(prompts, (Tensor, np.ndarray)):
            yield from self._matrix(torch.as_tensor(prompts))
        elif isinstance(prompts, Mapping):
            yield from self._encoding(prompts)
        elif isinstance(prompts, os.PathLike):
            path = Path(prompts)
            for index, row in enumerate(_lines(path, self.field)):
                yield self._row(row, f"{str(path)!r}, prompt {index}")
        elif isinstance(prompts, Sequence) and _all_integers(prompts):
            yield from self._matrix(torch.tensor(list(prompts)))
        elif isinstance(prompts, Sequence) and _is_chat(prompts) and self.field is None:
            yield self._chat(prompts, None)
        elif isinstance(prompts, Iterable):
            for index, row in enumerate(prompts):
                yield self._row(row, f"prompt {index}")
        else:
            raise InputError(
                "prompts must be text, token ids, messages, a list of these, a Path to a file or a dataset, got "
                f"{type(prompts).__name__}."
            )

    def _row(self, row: Any, where: str) -> Row:
        """One prompt among several."""
        if self.field is not None:
            if not isinstance(row, Mapping):
                raise InputError(f"{where} is {_shown(row)}, which has no fields: leave out field={self.field!r}.")
            if self.field not in row:
                raise InputError(
                    f"{where} has no field {self.field!r}, but {_names(row)}.{nearest(self.field, map(str, row))}"
                )
            row = row[self.field]
        elif isinstance(row, Mapping):
            raise InputError(f"{where} has the fields {_names(row)}: pass field=, the one that holds the prompt.")
        if isinstance(row, str):
            return self._text(row, where)
        if isinstance(row, (Tensor, np.ndarray)):
            return self._ids(torch.as_tensor(row), where)
        if isinstance(row, Sequence) and len(row) == 0:
            raise InputError(f"{where} is empty, so there is nothing to run.")
        if isinstance(row, Sequence) and _all_integers(row):
            return self._ids(torch.tensor(list(row)), where)
        if isinstance(row, Sequence) and _is_chat(row):
            return self._chat(row, where)
        raise InputError(f"{where} must be text, a list of token ids or messages, got {_shown(row)}.")

    def _text(self, text: str, where: str | None) -> Row:
        if where is None and text.endswith(_FILES) and len(text) < 256 and Path(text).is_file():
            raise InputError(f"{text!r} is the name of a file: pass pathlib.Path({text!r}) to read prompts from it.")
        if not text:
            raise InputError(f"{where or 'the prompt'} is empty, so there is nothing to run.")
        try:
            tokens = self.encode(text)
        except InputError as error:
            raise error if where is None else InputError(f"{where}: {error}") from error
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def _chat(self, messages: Sequence[Any], where: str | None) -> Row:
        try:
            tokens = torch.tensor(apply_chat(self.tokenizer, messages))
        except InputError as error:
            raise error if where is None else InputError(f"{where}: {error}") from error
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def _ids(self, ids: Tensor, where: str) -> Row:
        """A prompt of its own length: all of it is real, but for padding that can be nothing else."""
        _check_integers(ids, where)
        if ids.ndim != 1 or ids.numel() == 0:
            raise InputError(f"{where} must be token ids, [pos], at least one, got shape {tuple(ids.shape)}.")
        ids = ids.long().cpu()
        pad = self._padding()
        real = torch.ones_like(ids, dtype=torch.bool)
        return ids, real if pad is None or self._shared(pad) else ~_edges(ids.eq(pad)[None])[0]

    def _matrix(self, ids: Tensor) -> Iterator[Row]:
        """A tensor of prompts, [pos] or [batch, pos]; see `certain_padding`."""
        _check_integers(ids, "tokens")
        told = getattr(ids, _TOLD, None)
        ids = (ids[None] if ids.ndim == 1 else ids).long().cpu()
        if ids.ndim != 2 or ids.numel() == 0:
            raise InputError(f"tokens must be [batch, pos] with at least one token, got shape {tuple(ids.shape)}.")
        pad = self._padding()
        if told is not None and told.shape == ids.shape and not self.mask_given:
            if pad is not None and not bool(ids[~told].eq(pad).all()):
                raise InputError(
                    "tokens that to_tokens filled in as padding were changed: pass attention_mask= to say which "
                    "tokens are real."
                )
            real = told
        else:
            pad = None if self.mask_given else pad
            real = certain_padding(ids, pad, pad is not None and self._shared(pad))
        yield from zip(ids, real, strict=True)

    def _encoding(self, encoded: Mapping[str, Any]) -> Iterator[Row]:
        """What a tokenizer of transformers returns: its own mask decides."""
        if "input_ids" not in encoded:
            raise InputError(
                f"a mapping with {_names(encoded)} is no list of prompts: pass one of them, such as its split, or "
                "a BatchEncoding with input_ids."
            )
        ids, mask = encoded["input_ids"], encoded.get("attention_mask")
        ids, mask = ([one] if _flat(one) else one for one in (ids, ids if mask is None else mask))
        if len(ids) != len(mask):
            raise InputError(f"input_ids has {len(ids)} prompts, attention_mask {len(mask)}: one for each is needed.")
        for index, (row, real) in enumerate(zip(ids, mask, strict=True)):
            row = torch.as_tensor(row)
            _check_integers(row, f"input_ids of prompt {index}")
            told = _told(torch.as_tensor(real).cpu(), row, index) if "attention_mask" in encoded else None
            yield self._ids(row, f"prompt {index}") if told is None else (row.long().cpu(), told)

    def _padding(self) -> int | None:
        return None if self.tokenizer is None else cast("int | None", self.tokenizer.pad_token_id)

    def _shared(self, pad: int) -> bool:
        """Whether padding has the id of the beginning or the end of text, so that ids alone do not tell it."""
        return self.tokenizer is not None and pad in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)


def certain_padding(ids: Int[Tensor, "batch pos"], pad: int | None, shared: bool) -> Bool[Tensor, "batch pos"]:
    """True for real tokens; padding is what can be nothing else, so a row's numbers do not depend on its batch.

    - A padding id with no other meaning is padding at either end of a row.
    - One that is also the beginning or the end of text is real where every row has it: a column of them. Rows that
      differ in it leave two readings.

    Raises:
        InputError: two readings are left.
    """
    if pad is None:
        return torch.ones_like(ids, dtype=torch.bool)
    edge = _edges(ids.eq(pad))
    if not shared:
        return ~edge
    doubtful = edge & ~edge.all(0)
    if bool(doubtful.any()):
        row, pos = doubtful.nonzero()[0].tolist()
        raise InputError(
            f"token {pad} at row {row}, position {pos} may be padding, or the beginning or end of the text, which "
            "have the same id here: pass attention_mask= (1 for real tokens; model.to_tokens_with_mask gives both), a "
            "list of lists of ids, or the texts."
        )
    return torch.ones_like(ids, dtype=torch.bool)


def _edges(padding: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The runs of padding ids that reach an end of their row."""
    leading = padding.long().cumprod(-1)
    trailing = padding.long().flip(-1).cumprod(-1).flip(-1)
    return (leading | trailing).bool()


def _lines(path: Path, field: str | None) -> Iterator[Any]:
    """The lines of a file that are not empty: text, or with a field what the JSON in them says."""
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}.")
    if field is None and path.suffix == ".jsonl":
        raise InputError(f"{str(path)!r} is a JSONL file: pass field=, the name of the field that holds the prompt.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold other separators
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} can't be read as text: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield line if field is None else json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{str(path)!r}, line {number} is not JSON, which field={field!r} needs: {error}."
            ) from error


def _all_integers(values: Sequence[Any]) -> bool:
    if isinstance(values, (str, bytes)) or not len(values):
        return False
    return all(isinstance(one, (int, np.integer)) and not isinstance(one, bool) for one in values)


def _is_chat(values: Sequence[Any]) -> bool:
    return bool(len(values)) and all(isinstance(one, Mapping) and "role" in one for one in values)


def _flat(values: Any) -> bool:
    """Whether this is one row of numbers, and not a list of rows."""
    if isinstance(values, (Tensor, np.ndarray)):
        return values.ndim == 1
    return len(values) > 0 and not isinstance(values[0], (Sequence, Tensor, np.ndarray))


def _check_integers(ids: Tensor, what: str) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"{what} must be integers, got dtype {ids.dtype}: pass token ids, or text.")


def _told(mask: Tensor, ids: Tensor, index: int) -> Bool[Tensor, " pos"]:
    """The mask that came with a prompt's ids, checked."""
    if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(
            f"attention_mask of prompt {index} must be of zeros and ones, one for each of its {len(ids)} input_ids, "
            f"got {_shown(mask.tolist())}."
        )
    return mask.bool()


def _kind(prompts: object) -> str:
    return "a text" if isinstance(prompts, str) else f"a {type(prompts).__name__}"


def _names(row: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, row)) or "nothing"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
