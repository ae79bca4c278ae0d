"""Prompts from lists, files and datasets, as texts or token ids, and as tokens of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from tl_looped.engine.errors import InputError, check_count, nearest
from tl_looped.engine.runs import padding_mask
from tl_looped.model import LoopedModel

Prompts = str | os.PathLike[str] | Tensor | Iterable[Any]
"""A file, a list of texts or of token ids, a tensor [batch, pos], or a dataset."""


def read_prompts(prompts: Prompts, field: str | None = None, limit: int | None = None) -> list[str | list[int]]:
    """Prompts as texts or lists of token ids, in the order given; nothing is tokenised.

    Args:
        prompts: a list of texts, or of lists of token ids; the path of a text file with one prompt a line (empty lines
            are left out), or with `field` of a JSONL file; or with `field` a dataset, as `datasets` has them: anything
            that gives mappings when iterated. Texts may stand among token ids.
        field: which field of a dataset's (or a JSONL file's) rows holds the prompt.
        limit: take the first so many; None for all.

    Raises:
        InputError: no such file or field, a line that is not JSON, a row that is not a prompt, an empty prompt, or no
            prompts; the message says which row.
    """
    if limit is not None:
        check_count("limit", limit)
    if isinstance(prompts, Tensor):
        raise InputError("a tensor of token ids is tokens already: pass a list of lists of ids.")
    rows, where = _rows(prompts, field)
    found = [_prompt(row, field, f"{where} {i}") for i, row in enumerate(islice(rows, limit))]
    if not found:
        place = f" in {str(prompts)!r}" if isinstance(prompts, (str, os.PathLike)) else ""
        raise InputError(f"there are no prompts{place}.")
    return found


def tokenize_prompts(
    model: LoopedModel | TransformerLensModel, prompts: Prompts, field: str | None = None, limit: int | None = None
) -> tuple[Int[Tensor, "_"], ...]:
    """The tokens of each prompt, int64 on the CPU, each of its own length: there is no padding.

    Args:
        model: its tokenizer reads texts, as `model.to_tokens` does.
        prompts: as in `read_prompts`; or a tensor [batch, pos], whose padding (as `runs.padding_mask` sees it) is cut
            off.
        field, limit: as in `read_prompts`.

    Raises:
        InputError: as `read_prompts`; text that the model can't read, an id out of its vocabulary, or more tokens than
            its context has; the message says which prompt.
    """
    if isinstance(prompts, Tensor):
        rows = _unpadded(model, prompts, field, limit)
    else:
        rows = [_tokens(model, one, i) for i, one in enumerate(read_prompts(prompts, field, limit))]
    for i, row in enumerate(rows):
        _check_row(row, i, int(getattr(model.cfg, "d_vocab", -1)), int(getattr(model.cfg, "n_ctx", -1)))
    return tuple(rows)


def _rows(prompts: Any, field: str | None) -> tuple[Iterator[Any], str]:
    """The rows of a source, and what one is called in messages."""
    if isinstance(prompts, (str, os.PathLike)):
        return _lines(Path(prompts), field), f"{str(prompts)!r}, prompt"
    if isinstance(prompts, Mapping):
        raise InputError(
            f"a mapping with {_names(prompts)} is no list of prompts: pass one of them, such as its split."
        )
    if not isinstance(prompts, Iterable):
        raise InputError(f"prompts must be a list, a file, a tensor or a dataset, got {type(prompts).__name__}.")
    return iter(prompts), "prompt"


def _lines(path: Path, field: str | None) -> Iterator[Any]:
    """The lines of a file that are not empty: text, or with a field what the JSON in them says."""
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}; for a single prompt, pass a list of one text.")
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


def _prompt(row: Any, field: str | None, where: str) -> str | list[int]:
    """One row as text or token ids."""
    if isinstance(row, Mapping):
        if field is None:
            raise InputError(f"{where} has the fields {_names(row)}: pass field=, the one that holds the prompt.")
        if field not in row:
            raise InputError(f"{where} has no field {field!r}, but {_names(row)}.{nearest(field, map(str, row))}")
        row = row[field]
    elif field is not None:
        raise InputError(f"{where} is {_shown(row)}, which has no fields: leave out field={field!r}.")
    if isinstance(row, Tensor) and row.ndim == 1 and not row.is_floating_point():
        row = row.tolist()
    if isinstance(row, str) and row:
        return row
    ids = row if isinstance(row, Sequence) and not isinstance(row, (str, bytes)) else []
    if ids and all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        return list(ids)
    if isinstance(row, Sequence) and len(row) == 0:
        raise InputError(f"{where} is empty, so there is nothing to run.")
    raise InputError(f"{where} must be text or a list of token ids, got {_shown(row)}.")


def _tokens(model: LoopedModel | TransformerLensModel, prompt: str | list[int], index: int) -> Int[Tensor, "_"]:
    if not isinstance(prompt, str):
        return torch.tensor(prompt, dtype=torch.long)
    try:
        return model.to_tokens(prompt)[0].long().cpu()
    except InputError as error:
        raise InputError(f"prompt {index}: {error}") from error


def _unpadded(
    model: LoopedModel | TransformerLensModel, tokens: Tensor, field: str | None, limit: int | None
) -> list[Tensor]:
    if field is not None:
        raise InputError(f"a tensor of token ids has no fields: leave out field={field!r}.")
    if limit is not None:
        check_count("limit", limit)
    if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.ndim != 2 or tokens.numel() == 0:
        raise InputError(
            f"a tensor of prompts must hold token ids, [batch, pos], got {tokens.dtype} of shape {tuple(tokens.shape)}."
        )
    tokens = tokens.long().cpu()
    real = padding_mask(tokens, getattr(model, "tokenizer", None))
    empty = (~real.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"prompt {empty[0]} is padding only, so there is nothing to run.")
    return [row[mask] for row, mask in zip(tokens[:limit], real[:limit], strict=True)]


def _check_row(row: Int[Tensor, "_"], index: int, d_vocab: int, n_ctx: int) -> None:
    if 0 < n_ctx < len(row):
        raise InputError(
            f"prompt {index} has {len(row)} tokens, more than the model's context of {n_ctx}: shorten it, or leave it "
            "out."
        )
    low, high = (int(end) for end in torch.aminmax(row))
    if low < 0 or 0 < d_vocab <= high:
        raise InputError(
            f"prompt {index} has the token id {low if low < 0 else high}, out of the vocabulary [0, {d_vocab})."
        )


def _names(row: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, row)) or "nothing"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
