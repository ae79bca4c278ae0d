"""Text to tokens and back, with TransformerLens's method names, for any tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_looped.engine.errors import InputError

PaddingSide = Literal["left", "right"]
Ids = int | Sequence[Any] | Tensor | np.ndarray | np.integer  # one id, [pos], or rows of them of any length
_SHOWN_VOCABULARY = 100  # a vocabulary up to this size is shown in an error


def tokenize(tokenizer: PreTrainedTokenizerBase | None, text: str, prepend_bos: bool | None = None) -> list[int]:
    """Token ids of a text.

    A text that starts with the beginning-of-text token, as one from a chat template, gets no second one.

    Args:
        tokenizer: any tokenizer of transformers.
        text: one prompt.
        prepend_bos: whether a beginning-of-text token comes first. None: as the model's own tokenizer does it, which is
            how the model was trained and evaluated. (TransformerLens's default is to add one.)

    Raises:
        InputError: no tokenizer, an empty prompt, or text that the tokenizer can't read.
    """
    if tokenizer is None:
        raise InputError("this model has no tokenizer, so it can't read text: pass token ids, or set model.tokenizer.")
    if not isinstance(text, str):
        raise InputError(f"text must be a string, got {text!r}.")
    if not text:
        raise InputError(f"an empty prompt has nothing to run: {text!r}.")
    own = prepends_bos(tokenizer)
    written = text
    if prepend_bos and not own:
        if tokenizer.bos_token is None:
            raise InputError("prepend_bos=True, but the tokenizer has no beginning-of-text token.")
        written = f"{tokenizer.bos_token}{text}"
    try:
        ids = _encode(tokenizer, written, prepend_bos is not False)
    except InputError as error:
        raise InputError(f"the model's tokenizer can't read {_unreadable(tokenizer, text)}: {error}.") from error
    added = own if prepend_bos is None else prepend_bos
    if added and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    if not ids:
        raise InputError(f"a prompt without tokens has nothing to run: {text!r}.")
    return ids


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    try:
        return cast("list[int]", tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(str(error)) from error


def _unreadable(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The first word that a tokenizer without a token for unknown words can't read, and the words that it can."""

    def fails(piece: str) -> bool:
        try:
            _encode(tokenizer, piece, special=False)
        except InputError:
            return True
        return False

    word = next(filter(fails, text.split()), text)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.pre_tokenizer is not None:  # it may split words further
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(word)]
        word = next(filter(fails, pieces), word)
    known = sorted(tokenizer.get_vocab())
    words = f" (it knows {' '.join(known)})" if len(known) <= _SHOWN_VOCABULARY else ""
    return f"{word!r} in {text!r}{words}"


def apply_chat(
    tokenizer: PreTrainedTokenizerBase | None, messages: Sequence[Mapping[str, Any]], system: str | None = None
) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, up to where the model is to answer.

    The template writes all special tokens itself, so nothing is to be added to these ids.

    Args:
        tokenizer: one with a chat template.
        messages: what was said, each a mapping with "role" ("user", "assistant", ...) and "content", both texts.
        system: instructions, as a first message of the role "system".

    Raises:
        InputError: no tokenizer, no chat template, a malformed message, or messages that the template refuses.
    """
    if tokenizer is None:
        raise InputError(
            "this model has no tokenizer, so it can't read messages: pass token ids, or set model.tokenizer."
        )
    if not tokenizer.chat_template:
        raise InputError(
            "the model's tokenizer has no chat template, so it can't read messages: pass text, or set "
            "tokenizer.chat_template."
        )
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InputError(f'messages must be a list of {{"role": ..., "content": ...}}, got {messages!r}.')
    for i, message in enumerate(messages):
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(part, str) for part in parts) or not parts[0]:
            raise InputError(f'message {i} must be {{"role": text, "content": text}}, got {message!r}.')
    given = [dict(message) for message in messages]
    if system is not None:
        if given[0]["role"] == "system":
            raise InputError(f"system={system!r}, but the messages begin with one of the role 'system': leave one out.")
        given.insert(0, {"role": "system", "content": system})
    try:
        ids = tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # a template may raise anything
        raise InputError(f"the tokenizer's chat template can't read the messages: {error}.") from error
    if not ids:
        raise InputError(f"the tokenizer's chat template makes no tokens of {given!r}.")
    return cast("list[int]", ids)


def to_string(tokenizer: PreTrainedTokenizerBase | None, tokens: Ids) -> str | list[str]:
    """Text of token ids: a string for one or for [pos], a list of them for rows.

    Raises:
        InputError: no tokenizer, or what is no token id.
    """
    ids = _checked_ids(tokens)
    batched = bool(ids) and isinstance(ids[0], list)
    texts = _decode(tokenizer, cast("list[list[int]]", ids if batched else [ids]))
    return texts if batched else texts[0]


def to_str_tokens(tokenizer: PreTrainedTokenizerBase | None, tokens: Ids) -> list[str]:
    """The text of each token of one prompt, whose ids may have a batch axis of one.

    Raises:
        InputError: no tokenizer, what is no token id, or several prompts.
    """
    ids = _checked_ids(tokens)
    if ids and isinstance(ids[0], list):
        if len(ids) > 1:
            raise InputError(f"to_str_tokens reads one prompt, got {len(ids)}: pass one row, or list(tokens).")
        ids = ids[0]
    return _decode(tokenizer, [[token] for token in cast("list[int]", ids)])


def _checked_ids(tokens: Ids) -> list[int] | list[list[int]]:
    def plain(one: Any) -> Any:
        return one.tolist() if isinstance(one, (Tensor, np.ndarray, np.generic)) else one

    def are_ids(row: Iterable[Any]) -> bool:
        return all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**31 for one in row)

    ids = plain(tokens)
    ids = [plain(one) for one in ids] if isinstance(ids, (list, tuple)) else [ids]
    rows = [list(row) for row in ids] if all(isinstance(row, (list, tuple)) for row in ids) else [ids]
    if not all(map(are_ids, rows)):
        raise InputError(f"tokens must be a token id, a list or [pos] of them, or [batch, pos], got {tokens!r}.")
    return rows if ids and isinstance(ids[0], (list, tuple)) else ids


def _decode(tokenizer: PreTrainedTokenizerBase | None, rows: list[list[int]]) -> list[str]:
    if tokenizer is None:
        raise InputError("this model has no tokenizer, so it can't write text: set model.tokenizer.")
    # cleaning up would write some tokens otherwise than they were read
    return [cast(str, tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in rows]


def prepends_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself starts every text with a beginning-of-text token."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def single_token(tokenizer: PreTrainedTokenizerBase | None, text: str) -> int:
    """The id of a text that is exactly one token.

    Raises:
        InputError: it is not one token; the message shows its tokens.
    """
    tokens = tokenize(tokenizer, text, prepend_bos=False)
    if len(tokens) != 1 and tokenizer is not None:
        raise InputError(f"{text!r} is {len(tokens)} tokens, not one: {tokenizer.convert_ids_to_tokens(tokens)}.")
    return tokens[0]
