"""Text to tokens and back, with TransformerLens's method names, for any tokenizer of transformers."""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.utilities.tokenize_utils import get_input_with_manually_prepended_bos
from transformers import PreTrainedTokenizerBase

from tl_looped.engine.errors import InputError

PaddingSide = Literal["left", "right"]


def tokenize(
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | list[str],
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Token ids, and which of them are real, both [batch, pos] on the CPU.

    Args:
        tokenizer: any tokenizer of transformers.
        text: one prompt or several; several are padded to one length.
        prepend_bos: whether a beginning-of-text token comes first. None: as the model's own tokenizer does it, which is
            how the model was trained and evaluated. (TransformerLens's default is to add one.)
        padding_side: "left" or "right"; None: as the tokenizer says.

    Raises:
        InputError: no tokenizer, an empty prompt, text that the tokenizer can't read, or padding without a token for
            it.
    """
    if tokenizer is None:
        raise InputError("this model has no tokenizer, so it can't read text: pass token ids, or set model.tokenizer.")
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, (list, tuple)) else []
    if not texts or not all(isinstance(one, str) for one in texts):
        raise InputError(f"text must be a string or a list of at least one string, got {text!r}.")
    if any(not one for one in texts):
        raise InputError(f"an empty prompt has nothing to run: {text!r}.")
    if padding_side not in (None, "left", "right"):
        raise InputError(f"padding_side must be 'left' or 'right', got {padding_side!r}.")
    if len(texts) > 1 and tokenizer.pad_token_id is None:
        raise InputError(
            "the tokenizer has no padding token: run the prompts one at a time, or set tokenizer.pad_token."
        )
    options: dict[str, Any] = {"add_special_tokens": prepend_bos is not False}
    if prepend_bos and not prepends_bos(tokenizer):
        if tokenizer.bos_token is None:
            raise InputError("prepend_bos=True, but the tokenizer has no beginning-of-text token.")
        texts = list(get_input_with_manually_prepended_bos(str(tokenizer.bos_token), texts))
    if len(texts) > 1:
        options |= {"padding": True, "padding_side": padding_side or tokenizer.padding_side}
    try:
        encoded = tokenizer(texts, return_tensors="pt", **options)
    except Exception as error:  # tokenizers raises bare Exception for text outside its vocabulary
        raise InputError(f"the model's tokenizer can't read {text!r}: {error}") from error
    tokens, real = encoded["input_ids"].long(), encoded["attention_mask"].bool()
    if tokens.shape[1] == 0 or not bool(real.any(-1).all()):
        raise InputError(f"a prompt without tokens has nothing to run: {text!r}.")
    return tokens, real


def prepends_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself starts every text with a beginning-of-text token."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def single_token(tokenizer: PreTrainedTokenizerBase | None, text: str) -> int:
    """The id of a text that is exactly one token.

    Raises:
        InputError: it is not one token; the message shows its tokens.
    """
    tokens = tokenize(tokenizer, text, prepend_bos=False)[0][0].tolist()
    if len(tokens) != 1 and tokenizer is not None:
        raise InputError(f"{text!r} is {len(tokens)} tokens, not one: {tokenizer.convert_ids_to_tokens(tokens)}.")
    return tokens[0]


def apply_chat(tokenizer: PreTrainedTokenizerBase | None, messages: Any) -> list[int]:
    raise InputError("chat")
