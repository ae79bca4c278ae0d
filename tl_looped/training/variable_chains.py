"""Variable chains: `a=4; c=a; b=7; d=c; f=b; ? d` has the answer 4, three hops away.

A context assigns digits to some letters and letters to others, in 3 to 5 chains mixed together; the query asks for a
variable's value. The number of assignments on the way to the digit is its *hops*, the digit's own assignment included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tl_looped.engine.errors import InputError

PAD, BOS = "[PAD]", "[BOS]"
DIGITS, LETTERS = "0123456789", "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = (PAD, BOS, "=", ";", "?", *DIGITS, *LETTERS)
MAX_HOPS = 6
MAX_CONTEXT = 256  # tokens; the longest context in training has 66

_MIN_CHAINS, _MAX_CHAINS = 3, 5
# The most assignments of a context whose longest chain has 1, 2, ... links.
_MOST_ASSIGNMENTS = {1: 5, 2: 7, 3: 10, 4: 12, 5: 14, 6: 16}
_BOS_ID, _EQUALS_ID, _STOP_ID, _ASK_ID = (VOCABULARY.index(word) for word in (BOS, "=", ";", "?"))
_DIGIT_ID, _LETTER_ID = VOCABULARY.index(DIGITS[0]), VOCABULARY.index(LETTERS[0])

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character; spaces only separate. Every text starts with a beginning-of-text token."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex("."), "isolated")])
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, _BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, model_max_length=MAX_CONTEXT
    )


def solve(prompt: str) -> tuple[str, list[str]]:
    """Follow a prompt's chain.

    Returns:
        The answer, and the variables passed on the way to it, the queried one first: as many as there are hops.

    Raises:
        InputError: the prompt is not of the task's form, or its chain does not end in a digit.

    >>> solve("a=4; c=a; b=7; d=c; f=b; ? d")
    ('4', ['d', 'c', 'a'])
    """
    match = re.fullmatch(r"((?:[a-z]=[a-z0-9];)+)\?([a-z])", prompt.replace(" ", ""))
    if match is None:
        raise InputError(f"{prompt!r} is not of the form 'a=4; c=a; ? c'.")
    values = {pair[0]: pair[2] for pair in match[1].split(";") if pair}
    path = [match[2]]
    while values.get(path[-1], "").isalpha():
        path.append(values[path[-1]])
        if len(path) > len(values):
            raise InputError(f"the chain of {match[2]!r} in {prompt!r} goes in a circle.")
    if path[-1] not in values:
        raise InputError(f"{path[-1]!r} has no value in {prompt!r}.")
    return values[path[-1]], path


@dataclass(frozen=True)
class Contexts:
    """A batch of contexts of n assignments, with every variable queried.

    Attributes:
        context: [BOS], the assignments and `?`, as token ids, [batch, 4n + 2].
        query: the variable of each assignment, as a token id, [batch, n].
        hops: how far its digit is away, [batch, n].
        answer: that digit, as a token id, [batch, n].
        source: the assignment whose variable it copies, -1 for a digit, [batch, n].
    """

    context: Ints
    query: Ints
    hops: Ints
    answer: Ints
    source: Ints

    def packed(self) -> tuple[Ints, Ints, Bools]:
        """All queries of a context behind it, as if each were asked alone.

        Returns:
            Tokens [batch, 5n + 2], positions [5n + 2], and who sees whom [query, key]: each query sees the context and
            itself, and all of them have the position after `?`.
        """
        size, n = self.context.shape[1], self.query.shape[1]
        visible = np.tril(np.ones((size + n, size + n), dtype=bool))
        visible[size:, size:] = np.eye(n, dtype=bool)
        return np.concatenate([self.context, self.query], axis=1), np.minimum(np.arange(size + n), size), visible

    def text(self, row: int, query: int) -> str:
        """One context with one query, as a person would type it."""
        words = "".join(VOCABULARY[token] for token in self.context[row][1:]).replace(";", "; ")
        return f"{words} {VOCABULARY[self.query[row, query]]}"


def draw_size(rng: np.random.Generator, max_hops: int, easier: float = 0.25) -> tuple[int, int]:
    """(number of assignments, links of the longest chain) of a batch.

    The longest chain has `max_hops` links, or with probability `easier` anything from 1 to it; half of the time the
    context is as large as it may be.
    """
    longest = int(rng.integers(1, max_hops + 1)) if rng.random() < easier else max_hops
    most = _MOST_ASSIGNMENTS[longest]
    return most if rng.random() < 0.5 else int(rng.integers(longest + 2, most + 1)), longest


def draw_contexts(rng: np.random.Generator, batch: int, n: int, longest: int, shuffled: bool) -> Contexts:
    """Draw contexts of `n` assignments whose longest chain has `longest` links.

    Args:
        rng: where the randomness comes from.
        batch: number of contexts.
        n: assignments in each.
        longest: links of the longest chain.
        shuffled: assignments in any order; otherwise each variable is assigned before it is used.

    Raises:
        InputError: 3 to 5 chains of at most `longest` links can't have `n` assignments.
    """
    lengths = _chain_lengths(rng, batch, n, longest)
    rows = np.arange(batch)[:, None]
    chain = np.repeat(np.tile(np.arange(_MAX_CHAINS), batch), lengths.ravel()).reshape(batch, n)
    chain = np.take_along_axis(chain, rng.random((batch, n)).argsort(1), 1)
    member = chain[:, :, None] == np.arange(_MAX_CHAINS)
    hops = np.take_along_axis(member.cumsum(1), chain[:, :, None], 2)[:, :, 0]
    if shuffled:
        order = rng.random((batch, n)).argsort(1)
        chain, hops = np.take_along_axis(chain, order, 1), np.take_along_axis(hops, order, 1)
    names = rng.random((batch, len(LETTERS))).argsort(1)[:, :n] + _LETTER_ID
    digits = rng.integers(0, len(DIGITS), size=(batch, _MAX_CHAINS)) + _DIGIT_ID
    # where[b, c, h]: the assignment that is link h of chain c; link 0 is the digit itself
    where = np.full((batch, _MAX_CHAINS, n + 1), -1)
    where[rows, chain, hops] = np.arange(n)
    source, answer = where[rows, chain, hops - 1], digits[rows, chain]
    context = np.empty((batch, 4 * n + 2), dtype=np.int64)
    context[:, 0], context[:, -1] = _BOS_ID, _ASK_ID
    body = context[:, 1:-1].reshape(batch, n, 4)
    body[..., 0], body[..., 1], body[..., 3] = names, _EQUALS_ID, _STOP_ID
    body[..., 2] = np.where(source < 0, answer, names[rows, source])
    return Contexts(context, names, hops, answer, source)


def _chain_lengths(rng: np.random.Generator, batch: int, n: int, longest: int) -> Ints:
    """Lengths of 3 to 5 chains that add up to n, the first of them `longest`, [batch, 5]; unused chains are 0."""
    low, high = max(_MIN_CHAINS, -(-n // longest)), min(_MAX_CHAINS, n - longest + 1)
    if low > high:
        raise InputError(f"no context of {n} assignments in 3 to 5 chains has a longest chain of {longest}.")
    chains = rng.integers(low, high + 1, size=batch)
    lengths = (np.arange(_MAX_CHAINS) < chains[:, None]).astype(np.int64)
    lengths[:, 0] = longest
    left = n - lengths.sum(1)
    rows = np.arange(batch)
    while (left > 0).any():
        open_chains = (lengths > 0) & (lengths < longest)
        pick = np.where(open_chains, rng.random(lengths.shape), -1.0).argmax(1)
        lengths[rows, pick] += left > 0
        left = left - (left > 0)
    return lengths
