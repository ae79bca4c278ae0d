"""The errors that tl_looped raises about its input. A message says what happened, the value seen, and what mends it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoopedError(Exception):
    """Base of every error that tl_looped raises on purpose."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would show the message in quotes


class InputError(LoopedError, ValueError):
    """A value given to a call is wrong: tokens, states, loop counts, options, names of sites."""


class HookNameError(InputError, KeyError):
    """A hook or activation name that the model does not have, or that does not run in this call."""


class LoadError(LoopedError, ValueError):
    """A checkpoint, a folder or a hub id that can't be loaded whole and exactly."""


def nearest(word: str, choices: Iterable[str], n: int = 3) -> str:
    """The up to `n` choices most like `word`, as text for an error message; empty when none is alike."""
    close = difflib.get_close_matches(word, list(choices), n=n, cutoff=0.5)
    return f" Nearest: {', '.join(repr(name) for name in close)}." if close else ""


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Return `value` when it is an integer of at least `minimum` (a bool is not), else raise InputError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).")
    if value < minimum:
        raise InputError(f"{name} must be at least {minimum}, got {value}.")
    return value


def resolve_index(name: str, value: object, size: int) -> int:
    """Turn an index that may be negative, as in Python, into one in [0, size), else raise InputError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).")
    if not -size <= value < size:
        raise InputError(f"{name} {value} is out of range: {size} exist, so it must lie in [{-size}, {size - 1}].")
    return value % size
