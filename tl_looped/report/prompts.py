"""What the report reads: prompts as asked for, and the built-in ones."""

from __future__ import annotations

from dataclasses import dataclass

from tl_looped.engine.errors import InputError
from tl_looped.training.variable_chains import solve

CHAIN_MODELS = ("looped-hops", "looped-hops-settling")
"""The embedded models, which read variable chains and nothing else."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, as text or as token ids.

    Attributes:
        text: the text; None where token ids are given.
        token_ids: the token ids; None where text is given.
        answer: the text (or for a model without tokenizer the id) of the token that should come next; None: not known.
        note: a remark for the reader.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    answer: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            raise InputError("a prompt is either text or token ids: give one of the two.")

    @property
    def name(self) -> str:
        """The prompt on one line."""
        return self.text if self.text is not None else "tokens " + ",".join(map(str, self.token_ids or ()))


# Three chains mixed together, every variable defined before it is used, so that both embedded models can read them.
_CHAINS = (
    ("k=3; a=8; p=k; b=a; x=5; ? x", "5"),
    ("a=4; m=9; c=a; b=7; d=c; f=b; ? d", "4"),
    ("g=6; t=2; h=g; n=1; u=t; k=h; v=u; q=k; e=n; y=q; ? y", "6"),
)
CHAIN_TO_PATCH = _CHAINS[1][0]
"""The chain of the report's section on patching."""

# The paper's two illustrations.
_ENGLISH = ("Hello! I've been well. I hope that you're doing well.", "The square root of 16 is")


def built_in(model_name: str) -> tuple[Prompt, ...]:
    """The prompts for a model when none are given: chains with known answers for the embedded ones, else English."""
    if model_name not in CHAIN_MODELS:
        return tuple(Prompt(text) for text in _ENGLISH)
    return tuple(Prompt(text, answer=answer, note=_hops(text)) for text, answer in _CHAINS)


def _hops(text: str) -> str:
    answer, path = solve(text)
    hops = f"{len(path)} hop{'s' if len(path) > 1 else ''}"
    return (
        f"The answer is {hops} away: {' → '.join([*path, answer])}. The model was trained to answer at the last "
        "position only, so its read-outs at the others mean little."
    )
